"""What a refusal or a plan proposes is short, can be typed as it stands, and is not what was typed already."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from gpt.config.compose import compose_train
from launch.__main__ import COMMANDS, refuse_command
from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.budget import Use, use_text
from launch.plan.plan import make_plan
from launch.plan.text import worst_case_text
from launch.runs.explain import MOST_NAMES
from launch.runs.find import find_runs, suggestion
from launch.runs.folder import RunFolder
from launch.runs.identity import RunConfig, choose_folder
from launch.runs.labels import point_labels
from launch.runs.overrides import NOT_IN_POINT, point_name
from launch.runs.provenance import ROOT, install_command
from launch.script.options import ScriptOptions
from launch.script.program import require_program
from tests.support.commands import ROOT as CHECKOUT
from tests.support.commands import TIMEOUT_S, environment, run


def refusal_of(*words: str) -> ConfigError:
    with pytest.raises(ConfigError) as refusal:
        compose_launch(words)
    return refusal.value


def test_an_extra_is_installed_from_where_the_project_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert shlex.split(install_command("data", tmp_path)) == ["pip", "install", "gpt-launch[data]"]  # from a wheel
    monkeypatch.chdir(ROOT)
    assert install_command("data") == "pip install -e '.[data]'"
    monkeypatch.chdir(tmp_path)
    assert shlex.split(install_command("data"))[-1] == f"{ROOT}[data]"


@pytest.mark.parametrize("command", COMMANDS)
def test_another_command_typed_behind_this_one_is_named_whole(command: str) -> None:
    assert (CHECKOUT / "launch" / f"{command}.py").is_file() or (CHECKOUT / "launch" / command).is_dir()
    with pytest.raises(ConfigError) as refusal:
        refuse_command([command, "-f", "outputs/a b"])
    assert refusal.value.fix == f"python -m launch.{command} -f 'outputs/a b'"
    refuse_command([f"{command}=1"])


def test_a_mistyped_key_has_its_likeness_first_and_a_dozen_names_at_most() -> None:
    refusal = refusal_of("cluster.gpus_per_nod=8")
    assert refusal.fix == "cluster.gpus_per_node=8"
    listed = refusal.expected.partition(" (")[0].removeprefix("a key such as ").split(", ")
    assert listed[0] == "cluster.gpus_per_node" and len(listed) == MOST_NAMES
    more = int(refusal.expected.partition("(")[2].split()[0])
    assert more > MOST_NAMES and refusal.expected.endswith(" more, listed in configs/)")


def test_a_key_of_a_script_is_mended_with_its_workload() -> None:
    refusal = refusal_of("script.option.lr=3")
    assert refusal.fix == "workload=script script.options.lr=3"
    assert refusal_of("script.path=a.py", "script.step=2").fix.startswith("workload=script script.path=a.py script.")
    config = compose_launch([*shlex.split(refusal.fix), "script.path=setup.cfg"])
    assert config.script.options.lr == 3


@pytest.mark.parametrize(
    ("typed", "expected", "fix"),
    [
        ("model=7", "one of baseline_23m, ", "model=baseline_23m"),
        ("optim=null", "one of baseline, ", "optim=baseline"),
        ("script.command=hostname -f", "a list", "'script.command=[hostname,-f]'"),
        ("script.command=./train --fast=3", "KEY=VALUE, quoted", """'script.command=[./train,"--fast=3"]'"""),
        ("cluster.setup=module load x", "a list", """'cluster.setup=["module load x"]'"""),
        ("cluster.exclude=[a,b]", "one text", "'cluster.exclude=\"a,b\"'"),
        ("script.env=FOO", "keys of your own below script.env, each with its value", "script.env.NAME=VALUE"),
        ("dry_run=nope", "true or false", "dry_run=false"),
        ("name=null", "a text", "the same without name=null"),
        ("name=ünï", "KEY=VALUE, quoted", "'name=\"ünï\"'"),
        ("nodes=1,,2", "KEY=VALUE, quoted", "nodes=1,2"),
        ("nodes =2", "KEY=VALUE, quoted", "nodes=2"),
        ("nodes=[1,2]", "a whole number", "python -m launch -m nodes=1,2"),
        ("optim.lr=high", "a number", "optim.lr=0.001"),
        ("precision=BF16", "one of auto, ", "precision=bf16"),
        ("cluster.mem_gb=64G", "a number", "cluster.mem_gb=64"),
        ("cluster.timeout_min=1:30:00", "a whole number", "cluster.timeout_min=90"),
        ("cluster.srun_args=--mpi=pmix", "KEY=VALUE, quoted", """'cluster.srun_args=["--mpi=pmix"]'"""),
        ("launch.report_files=[md,pngg]", "a list of md, csv, ", "'launch.report_files=[md,png]'"),
        ("script.options=lr=3,seed=4", "keys of your own", "script.options.lr=3 script.options.seed=4"),
        ("script.env.FOO", "KEY=VALUE", "script.env.FOO=VALUE"),
    ],
)
def test_a_value_that_does_not_fit_is_answered_with_one_that_does(typed: str, expected: str, fix: str) -> None:
    workload = ["workload=script"] if typed.startswith("script.") else []
    refusal = refusal_of(*workload, typed)
    assert refusal.found.removesuffix(", which cannot be read") == typed, "whole, not cut at a blank"
    assert refusal.expected.startswith(expected) and refusal.fix == fix
    if "VALUE" not in fix and "nodes=1,2" not in fix and "same" not in fix:
        compose_launch([*workload, *shlex.split(fix)])


def test_a_mistyped_program_and_a_mistyped_folder_are_answered_with_the_one_that_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:{tmp_path / 'gone'}")
    (tmp_path / "simulate").touch(mode=0o755)
    with pytest.raises(ConfigError) as refusal:
        require_program(ScriptOptions(command=["simulat", "--n=2"]))
    assert refusal.value.fix == """'script.command=[simulate,"--n=2"]'"""
    (tmp_path / "plain").touch(mode=0o644)
    with pytest.raises(ConfigError, match="is not executable") as refusal:
        require_program(ScriptOptions(command=["./plain"], workdir=str(tmp_path)))
    assert refusal.value.fix == f"chmod +x {tmp_path / 'plain'}"
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match="folder is a folder"):
        require_program(ScriptOptions(command=["./folder"], workdir=str(tmp_path)))
    (tmp_path / "folder" / "train.py").touch()
    with pytest.raises(ConfigError, match="folder, which is a folder") as refusal:
        require_program(ScriptOptions(path=str(tmp_path / "folder")))
    assert refusal.value.fix == f"script.path={tmp_path / 'folder' / 'train.py'}"
    with pytest.raises(ConfigError, match="a file") as refusal:
        require_program(ScriptOptions(module="train.py", workdir=str(tmp_path / "folder")))
    assert refusal.value.fix == "script.path=train.py, or script.module=train"
    for name in ("nodes=1", "nodes=2"):
        RunFolder(tmp_path / "outputs" / "a sweep" / name).create_attempt()
    monkeypatch.chdir(tmp_path)
    assert suggestion(Path("outputs/a sweep/node=2")) == "'outputs/a sweep/nodes=2', which is there"
    assert suggestion(Path("outputs/a swep")) == "'outputs/a sweep', which is there"
    with pytest.raises(ConfigError, match="simulate, a file"):
        find_runs([Path("simulate")])


def test_a_learning_rate_out_of_its_range_is_not_answered_with_one_at_which_nothing_learns() -> None:
    with pytest.raises(ConfigError) as refusal:
        typed_config(compose_launch(["optim.lr=nan"])).validate()
    assert refusal.value.fix == "optim.lr=0.001"


def test_a_plus_before_a_key_is_not_in_the_name_of_a_run(tmp_path: Path) -> None:
    words = ["+experiment=weak_scaling", "nodes=2", "++script.options.lr=3"]
    assert point_name(words, NOT_IN_POINT) == "experiment=weak_scaling,nodes=2,script.options.lr=3"
    runs = [(tmp_path / "a", ["+experiment=weak_scaling"]), (tmp_path / "b", [])]
    assert point_labels(runs) == ["experiment=weak_scaling", "default"]
    # A run that an earlier version has named with it goes on where it is.
    config = RunConfig(output_dir=str(tmp_path), name="sweep")
    assert choose_folder(config, words[:1], NOT_IN_POINT).path == tmp_path / "sweep" / "experiment=weak_scaling"
    before = tmp_path / "sweep" / "+experiment=weak_scaling"
    before.mkdir(parents=True)
    assert choose_folder(config, words[:1], NOT_IN_POINT).path == before


def test_one_hour_is_one() -> None:
    assert use_text(Use(1.0, 1.0, 2.5)) == "1 node-hour, 1 GPU-hour, cost 2.5"
    assert use_text(Use(1.5, 0, None)) == "1.5 node-hours"


def test_a_label_of_several_runs_is_answered_by_a_command_that_can_be_pasted(tmp_path: Path) -> None:
    for experiment in ("one", "two"):
        for point in ("nodes=1", "nodes=2"):
            (tmp_path / "outputs" / experiment / point / "attempts").mkdir(parents=True)
    # A process of its own: the command it proposes is the one that was typed.
    command = [sys.executable, "-m", "launch.logs", "--agent", "nodes=2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment(), timeout=TIMEOUT_S)
    assert done.returncode == 2 and "as several runs are called" in done.stderr
    assert "type next: python -m launch.logs --agent outputs/two/nodes=2\n" in done.stderr


def test_a_plan_of_finished_points_has_no_worst_case() -> None:
    config = typed_config(compose_launch(["cluster=slurm"]))
    done = replace(make_plan(config, [], ClusterKind.slurm), finished=True)
    assert worst_case_text([done, done], [config, config]) == "worst case: nothing is left to run"
    assert "1 node-hour" in worst_case_text([done, replace(done, finished=False)], [config, config])


def test_a_mapping_of_keys_of_the_users_choice_is_taken_as_it_is_typed() -> None:
    config = compose_launch(["workload=script", "script.options={lr:3}", "script.env={A:b}", "script.options.n=2"])
    assert config.script.options == {"lr": 3, "n": 2} and config.script.env == {"A": "b"}
    for typed in (
        "cluster.additional_parameters.hint=nomultithread",
        "cluster.additional_parameters={hint:nomultithread}",
    ):
        assert compose_launch([typed]).cluster.additional_parameters == {"hint": "nomultithread"}


def test_a_comma_that_makes_points_of_one_text_is_answered_with_the_text(tmp_path: Path) -> None:
    (tmp_path / "t.py").touch()
    words = ["workload=script", "script.path=t.py", "cluster=local", "dry_run=true"]
    said = run("launch", *words, "script.env.CUDA_VISIBLE_DEVICES=0,1", cwd=tmp_path, status=2)
    fix = said.rpartition("type next: ")[2].partition(", or ")[0]
    assert "which differ in script.env.CUDA_VISIBLE_DEVICES" in said
    assert shlex.split(fix) == ['script.env.CUDA_VISIBLE_DEVICES="0,1"']
    run("launch", *words, *shlex.split(fix), cwd=tmp_path)


@pytest.mark.parametrize("key", ["partition", "account", "exclude"])
def test_a_variable_of_the_shell_that_is_not_set_is_refused(key: str) -> None:
    with pytest.raises(ConfigError, match=f"cluster.{key}= without a value") as refusal:
        typed_config(compose_launch([f"cluster.{key}="])).validate()
    typed_config(compose_launch([refusal.value.fix.split(", or ")[1]])).validate()


def test_a_path_that_nothing_reads_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.path=/tmp/x with data=stdlib") as refusal:
        typed_config(compose_launch(["data.path=/tmp/x"])).validate()
    for fix in refusal.value.fix.split(", or "):
        typed_config(compose_launch(fix.split())).validate()


def test_the_name_of_a_config_that_is_not_there_is_refused(tmp_path: Path) -> None:
    said = run("launch", "--config-name", "foo", cwd=tmp_path, status=2)
    assert "found: no config foo\n" in said and "type next: the same without --config-name\n" in said


def test_keys_of_a_script_are_sent_to_the_launcher() -> None:
    with pytest.raises(ConfigError) as refusal:
        compose_train(["script.path=a b.py"])
    assert refusal.value.fix == "python -m launch workload=script 'script.path=a b.py'"


def test_options_may_stand_between_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        RunFolder(tmp_path / name).create_attempt()
    said = run("launch.status", "a", "--json", "b", cwd=tmp_path)
    assert [Path(row["run_dir"]).name for row in json.loads(said)] == ["a", "b"]
