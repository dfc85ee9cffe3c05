"""A program of one's own: a module that Python would not run is refused, and arguments arrive as they were typed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from launch.config import ClusterKind
from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.plan.plan import make_plan
from launch.runs.folder import RunFolder
from launch.script import ScriptConfig, ScriptWorkload, require_module, require_program
from launch.script.arguments import ScriptOptions, Style, written_options
from tests.support.commands import TIMEOUT_S, environment, run

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
    ],
)
def test_a_value_in_braces_that_lacks_its_sign_is_refused(typed: str, got: list[str]) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of(typed)
    assert refusal.value.fix.partition(" ")[0] in ("${nodes}", "${world_size}", "${run_dir}")
    assert arguments(typed.replace("{", "\\{")) == shlex.split(" ".join(got_literally(typed)))
    assert arguments(typed.replace("{", "${")) == got


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
    ("typed", "found"),
    [
        ("script.args=[[a,b],c]", "with a list in the list"),
        ("script.args=[--x,null,3]", "with null in the list"),
        ("script.options.o.x=[{a:'b c'}]", "with a mapping in the list"),
    ],
)
def test_a_list_in_a_list_is_refused(typed: str, found: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        config_of(typed)
    key = typed.partition("=")[0]
    assert refusal.value.found.startswith(f"{key}=[") and found in refusal.value.found
    assert "flat list" in refusal.value.expected and refusal.value.fix == f"{key}=[A,B]"


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


# Modules that ``python -m`` would not run.


SAYS = "print('ran')\n"


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    """A folder with packages and modules of each kind, and beside it a zip file and a second folder of a namespace."""
    folder = tmp_path / "work"
    files = {
        "work/alone.py": SAYS,
        "work/whole/__init__.py": "raise SystemExit('imported')\n",  # python -m imports it, the launcher must not
        "work/package/__init__.py": "",
        "work/package/train.py": SAYS,
        "work/package/inner/__init__.py": "",
        "work/package/inner/__main__.py": SAYS,
        "work/space/here.py": SAYS,
        "other/space/there.py": SAYS,
        "other/extended/away.py": SAYS,
        "work/extended/__init__.py": "__path__ = __import__('pkgutil').extend_path(__path__, __name__)\n",
    }
    files["other/extended/__init__.py"] = files["work/extended/__init__.py"]
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as packed:
        packed.writestr("zipped/__init__.py", "")
        packed.writestr("zipped/train.py", SAYS)
    return folder


def runs(module: str, workdir: Path, pythonpath: Sequence[str]) -> bool:
    """Tell whether Python itself runs the module."""
    done = subprocess.run(
        [sys.executable, "-m", module],
        cwd=workdir,
        env=environment(PYTHONPATH=os.pathsep.join(pythonpath)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    return done.returncode == 0 and done.stdout == "ran\n"


MODULES = (
    *("alone", "package.train", "package.inner", "package.inner.__main__", "space.here", "space.there"),
    *("zipped.train", "extended.away"),
    *("aloen", "alone.train", "package", "package.trian", "package.inner.train", "space", "space.nowhere"),
    *("zipped", "zipped.nothere", "nowhere.train", "package.", ".package", "whole.nothere"),
)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_is_refused_where_python_would_not_run_it(module: str, workdir: Path) -> None:
    elsewhere = [str(workdir.parent / "other"), str(workdir.parent / "packed.zip")]
    script = ScriptOptions(module=module, workdir=str(workdir), env={"PYTHONPATH": os.pathsep.join(elsewhere)})
    before = set(sys.modules)
    try:
        require_program(script)
    except ConfigError as refusal:
        assert not runs(module, workdir, elsewhere)
        assert refusal.found.startswith(f"script.module={module}, ")
        if not refusal.fix.endswith(("MODULE", "FILE")):
            proposed = refusal.fix.removeprefix("script.module=")
            assert runs(proposed, workdir, elsewhere)
    else:
        assert runs(module, workdir, elsewhere)
    assert not {"package", "whole", "space", "zipped", "extended"} & (set(sys.modules) - before)


@pytest.mark.parametrize(
    ("module", "fix"),
    [
        ("package.trian", "script.module=package.train"),
        ("package.iner", "script.module=package.inner"),
        ("package", "script.module=package.train"),
        ("alone.train", "script.module=alone"),
        ("package/train.py", "script.path=package/train.py"),
    ],
)
def test_the_module_that_was_meant_is_proposed(module: str, fix: str, workdir: Path) -> None:
    with pytest.raises(ConfigError) as refusal:
        require_module(module, workdir)
    assert refusal.value.fix == fix


def test_nothing_is_refused_that_this_machine_cannot_know(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Editable:
        """As an editable install puts one into ``sys.meta_path``."""

        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> ModuleSpec | None:
            if name != "mapped":
                return None
            return spec_from_file_location(name, workdir / "package" / "__init__.py")

    with pytest.raises(ConfigError):
        require_module("mapped.train", workdir)
    require_module("mapped.train", workdir, elsewhere=True)  # in an image, or by what cluster.setup sets
    with pytest.raises(ConfigError):
        require_module("package.nothere", workdir, elsewhere=True)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    require_module("mapped.train", workdir)
    with pytest.raises(ConfigError, match="no nothere in"):
        require_module("mapped.nothere", workdir)
    script = ScriptOptions(module="later", workdir=str(workdir), env={"PYTHONPATH": "%{run_dir}/code"})
    require_program(script)


def test_the_launcher_refuses_it_before_it_submits(tmp_path: Path) -> None:
    said = run("launch", "workload=script", "script.module=launch.stauts", "cluster=local", cwd=tmp_path, status=2)
    assert "type next: script.module=launch.status\n" in said
    assert list(tmp_path.iterdir()) == []
