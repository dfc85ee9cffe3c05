"""Arguments of a script: refused where the program would not get what was meant, else passed on as they were typed."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.plan import make_plan
from launch.runs.folder import RunFolder
from launch.script import ScriptConfig, ScriptWorkload
from launch.script.arguments import Style, written_options

SCRIPT = ["workload=script", "script.path=x.py"]


def config_of(*words: str) -> ScriptConfig:
    config = typed_config(compose_launch([*SCRIPT, *words]))
    assert isinstance(config, ScriptConfig)
    config.validate()
    return config


def arguments(*words: str) -> list[str]:
    """Arguments that the program of these overrides gets on three nodes."""
    config = config_of("nodes=3", *words)
    return list(ScriptWorkload().command(config, RunFolder("/runs/a"), attempt=2).args[2:])


@pytest.mark.parametrize(
    ("typed", "got"),
    [
        ("script.args='--n {nodes}'", ["--n", "3"]),
        ("script.args='--n={world_size}'", ["--n=3"]),
        ("script.args='--out {run_dir}/x-{attempt}'", ["--out", "/runs/a/x-2"]),
        ("script.args=['{nodes}',b]", ["3", "b"]),
        ("script.options.n='{nodes}'", ["--n=3"]),
        ("script.args={nodes}", ["3"]),
        ("script.args=[{world_size}]", ["3"]),
        ("script.options.n={checkpoint_dir}", ["--n=/runs/a/checkpoints"]),
    ],
)
def test_a_value_in_braces_that_lacks_its_sign_is_refused(typed: str, got: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of(typed)
    if refusal.value.fix.startswith("'"):  # Hydra cannot read what was typed: it is proposed whole
        (word,) = shlex.split(refusal.value.fix)
    else:
        meant = refusal.value.fix.partition(" ")[0]
        assert meant in ("${nodes}", "${world_size}", "${run_dir}")
        word = typed.replace("{", "${")
        literal = typed.replace("{", "\\{")
        assert arguments(literal) == shlex.split(" ".join(got_literally(typed)))
    assert arguments(word) == got


def got_literally(typed: str) -> list[str]:
    """The words of an override as they stand, options as an argparse program gets them."""
    key, _, value = typed.partition("=")
    if value.startswith("["):
        return [word.strip("'") for word in value.strip("[]").split(",")]
    return [f"--n={value}" if "options" in key else value.strip("'")]


@pytest.mark.parametrize(
    "args",
    [
        '{"nodes": 3}',
        '--config={"name":{"nodes":[1]}}',
        "--format {step}-{nodes}",
        "--file {name}.pt",
        "--format {step:04d}",
        "--template {{nodes}}",
        "--text '{nodes} nodes'",
        "--number {0}",
    ],
)
def test_other_braces_are_those_of_the_program(args: str) -> None:
    assert arguments(f"script.options.x={json.dumps(args)}") == [f"--x={args}"]


@pytest.mark.parametrize(
    ("typed", "found", "got"),
    [
        ("script.args=[[a,b],c]", "with a list in the list", ["a", "b", "c"]),
        ("script.args=[--x,null,3]", "with null in the list", ["--x", "3"]),
        ("script.args=[{a:1}]", "with a mapping in the list", ['{"a": 1}']),
        ("script.options.x=[[1,2],[3]]", "with a list in the list", ["--x=[[1,2],[3]]"]),
        ("script.options.o.x=[{a:'b c'}]", "with a mapping in the list", ['--o.x=[{"a":"b c"}]']),
    ],
)
def test_a_list_in_a_list_is_refused_with_one_that_can_be_written(typed: str, found: str, got: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of(typed)
    assert found in refusal.value.found
    assert arguments(*shlex.split(refusal.value.fix)) == got


@pytest.mark.parametrize(
    "value",
    [[[1, 2], [3]], [["a b", "c,d"], []], [{"lr": 0.5, "tags": ["x", None]}], ["a", "b c", "d=e"], [1, 2.5, True]],
)
def test_a_program_of_hydra_reads_the_lists_that_were_typed(value: Any) -> None:
    (word,) = written_options({"x": value}, Style.hydra)
    read = OverridesParser.create().parse_override(word)
    assert read.key_or_group == "x" and read.value() == value


def test_lists_in_lists_go_through_to_a_program_of_hydra() -> None:
    assert arguments("script.options.x=[[1,2],[3]]", "script.style=hydra") == ["x=[[1,2],[3]]"]


def test_keys_without_use_for_a_script_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").touch()
    useless = ["cluster.gpu_name=H200x", "cluster.interconnect.inter_node.bandwidth_gb_per_s=3"]
    words = [*SCRIPT, *useless, "cluster.timeout_min=5"]
    plan = make_plan(typed_config(compose_launch(words)), words, ClusterKind.slurm)
    (warning,) = plan.warnings
    assert warning.startswith(f"{', '.join(useless)}: without use")
    assert make_plan(typed_config(compose_launch(SCRIPT)), SCRIPT, ClusterKind.slurm).warnings == ()


def test_a_path_with_an_equals_sign_reaches_a_program_of_hydra_as_one_text() -> None:
    folder = "/data/outputs/n/nodes=2,optim.lr=1e-3"
    (word,) = written_options({"hydra": {"run": {"dir": f"{folder}/hydra"}}}, Style.hydra)
    parsed = OverridesParser.create().parse_override(word)
    assert parsed.key_or_group == "hydra.run.dir" and parsed.value() == f"{folder}/hydra"
