"""Flags of the commands: those of Hydra that ``python -m launch`` takes, and what it says of others."""

from __future__ import annotations

import dataclasses
import importlib
import shlex
import sys

import pytest
from hydra._internal.utils import get_args_parser

from launch.__main__ import ALONE, INFO, WITH_VALUE, prepare, split_flags
from launch.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["-m", "nodes=2,4", "seed=3", "--cfg", "job"], ["nodes=2", "seed=3", "--cfg", "job"]),
        (["--info", "defaults", "-m", "nodes=2,4"], ["nodes=2", "--info", "defaults"]),
    ],
)
def test_hydra_shows_one_run_and_no_sweep(words: list[str], fix: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        prepare(words)
    typed = shlex.split(refused.value.fix)
    assert typed == ["python", "-m", "launch", *fix]
    assert sorted(prepare(typed[3:])[0]) == sorted(fix)


def test_help_is_shown_of_a_sweep_too() -> None:
    assert prepare(["-m", "nodes=2,4", "--help"])[0] == ["--help", "nodes=2"]


COMMANDS = ("gpt.train", "gpt.prepare", "gpt.generate", "gpt.evaluate", "gpt.export", "gpt.compare")
COMMANDS += ("launch.status", "launch.logs", "launch.cancel", "launch.move", "launch.batch", "launch.agent.__main__")
COMMANDS += ("launch.__main__", "launch.doctor.__main__", "launch.report.__main__", "slurm.sandbox.__main__")


@pytest.mark.parametrize("module", COMMANDS)
def test_every_command_helps_and_refuses_a_flag_that_it_does_not_have(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = importlib.import_module(module)
    needed = {"gpt.generate": ["x", "-p", "y"], "slurm.sandbox.__main__": ["status"]}.get(module, ["x"])
    monkeypatch.setattr(sys, "argv", [module, *needed, "--xyz"])
    assert command.main() == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[0] for line in said] == ["found", "expected", "type next"]
    assert "--xyz" in said[0] and "python -m" in said[2]
    if module != "launch.__main__":  # which Hydra helps
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit, match=r"^0$"):
            command.main()
        assert "usage: python -m" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (["--nodes=4"], "nodes=4"),
        (["--nodes", "4"], "nodes=4"),
        (["--gpus-per-node", "nodes=2"], "cluster.gpus_per_node=VALUE"),
        (["--max-steps", "3"], "optim.max_steps=3"),
        (["workload=script", "--max-steps=3"], "script.max_steps=3"),
        (["workload=of_a_folder", "--nodes=3"], "nodes=3"),
        (["--multrun", "nodes=1"], "--multirun"),
        (["nodes=1", "--config-dir"], "python -m launch --help"),
    ],
    ids=str,
)
def test_a_flag_is_refused_with_the_key_that_was_meant(words: list[str], fix: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        split_flags(words)
    assert refusal.value.fix == fix


def test_the_flags_are_those_of_hydra() -> None:
    actions = [action for action in get_args_parser()._actions if action.option_strings]
    assert {flag for action in actions for flag in action.option_strings} == {*ALONE, *WITH_VALUE}
    taken = {flag for action in actions if action.nargs is None for flag in action.option_strings}
    assert taken == {*WITH_VALUE}
    assert {choice for action in actions if action.dest == "info" for choice in action.choices or ()} == {*INFO}
    words = ["nodes=1", "-m", "--config-dir=x", "seed=2", "-i", "defaults", "all"]
    assert split_flags(words) == (["-m", "--config-dir", "x", "-i", "defaults"], ["nodes=1", "seed=2", "all"])


def test_a_shell_completes_the_keys_of_the_workload_in_the_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COMP_LINE", "gpt-launch workload=script script.st")
    assert "script" in {field.name for field in dataclasses.fields(prepare(["-sc", "query=bash"])[1])}
    monkeypatch.setenv("COMP_LINE", "gpt-launch workload=script")
    assert "model" in {field.name for field in dataclasses.fields(prepare(["-sc", "query=bash"])[1])}
    assert "model" in {field.name for field in dataclasses.fields(prepare(["nodes=1"])[1])}, "no line is completed"
