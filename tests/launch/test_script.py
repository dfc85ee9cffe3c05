"""A program of one's own: a module that Python would not run is refused, and arguments arrive as they were typed."""

from __future__ import annotations

import os
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

from launch.config.compose import compose_launch, typed_config
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.script import (
    ScriptConfig,
    ScriptOptions,
    ScriptWorkload,
    Style,
    require_module,
    require_program,
    written_options,
)
from tests.support.commands import TIMEOUT_S, environment, run
from tests.support.planning import refused

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
        ("script.args='--n ${nodes}'", ["--n", "3"]),
        ("script.args='--n=${world_size}'", ["--n=3"]),
        ("script.args='--out ${run_dir}/x-${attempt}'", ["--out", "/runs/a/x-2"]),
        ("script.args=['${nodes}',b]", ["3", "b"]),
        ("script.options.n='${nodes}'", ["--n=3"]),
        ("script.options.n='\\${nodes}'", ["--n=${nodes}"]),
        ("script.options.x='{nodes} of {step:04d}'", ["--x={nodes} of {step:04d}"]),
        ("""script.options.x='{"nodes": [1]}'""", ['--x={"nodes": [1]}']),
    ],
)
def test_values_of_the_run_are_filled_in_and_other_braces_stay(typed: str, got: list[str]) -> None:
    assert arguments(typed) == got


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


RUN_ALL = """
import os, runpy, sys
for name in sys.argv[1:]:
    if not (pid := os.fork()):
        status = 1
        try:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
            status = 0
        finally:
            os._exit(status)
    print(name, not os.waitpid(pid, 0)[1], file=sys.stderr)
"""
"""Program that runs each module in a process of its own, as ``python -m`` does, and prints whether it ran."""


def runs(modules: Sequence[str], workdir: Path, pythonpath: Sequence[str]) -> dict[str, bool]:
    """Return for each module whether Python itself runs it."""
    done = subprocess.run(
        [sys.executable, "-c", RUN_ALL, *modules],
        cwd=workdir,
        env=environment(PYTHONPATH=os.pathsep.join(pythonpath)),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    found = [line.rpartition(" ") for line in done.stderr.splitlines()]
    return {name: ran == "True" for name, _, ran in found if name in modules}


MODULES = (
    *("alone", "package.train", "package.inner", "package.inner.__main__", "space.here", "space.there"),
    *("zipped.train", "extended.away"),
    *("aloen", "alone.train", "package", "package.trian", "package.inner.train", "space", "space.nowhere"),
    *("zipped", "zipped.nothere", "nowhere.train", "package.", ".package", "whole.nothere"),
)


def test_a_module_is_refused_where_python_would_not_run_it(workdir: Path) -> None:
    elsewhere = [str(workdir.parent / "other"), str(workdir.parent / "packed.zip")]
    before, accepted, proposed = set(sys.modules), {}, set[str]()
    for module in MODULES:
        script = ScriptOptions(module=module, workdir=str(workdir), env={"PYTHONPATH": os.pathsep.join(elsewhere)})
        accepted[module] = True
        try:
            require_program(script)
        except ConfigError as refusal:
            accepted[module] = False
            assert refusal.found.startswith(f"script.module={module}, ")
            if not refusal.fix.endswith(("MODULE", "FILE")):
                proposed.add(refusal.fix.removeprefix("script.module="))
    assert not {"package", "whole", "space", "zipped", "extended"} & (set(sys.modules) - before)
    ran = runs([*MODULES, *proposed], workdir, elsewhere)
    assert accepted == {module: ran[module] for module in MODULES}
    assert proposed and all(ran[module] for module in proposed)


@pytest.mark.parametrize(
    ("module", "fix"),
    [
        ("package.trian", "script.module=package.train"),
        ("package.iner", "script.module=package.inner"),
        ("package", "script.module=package.train"),
        ("alone.train", "script.module=alone"),
    ],
)
def test_the_module_that_was_meant_is_proposed(module: str, fix: str, workdir: Path) -> None:
    refusal = refused(require_module, module, workdir)
    assert refusal.fix == fix


def test_nothing_is_refused_that_this_machine_cannot_know(workdir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Editable:
        """As an editable install puts one into ``sys.meta_path``."""

        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> ModuleSpec | None:
            if name != "mapped":
                return None
            return spec_from_file_location(name, workdir / "package" / "__init__.py")

    refused(require_module, "mapped.train", workdir)
    require_module("mapped.train", workdir, elsewhere=True)  # in an image, or by what cluster.setup sets
    with pytest.raises(ConfigError):
        require_module("package.nothere", workdir, elsewhere=True)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    require_module("mapped.train", workdir)
    script = ScriptOptions(module="later", workdir=str(workdir), env={"PYTHONPATH": "%{run_dir}/code"})
    require_program(script)


def test_the_launcher_refuses_it_before_it_submits(tmp_path: Path) -> None:
    said = run("launch workload=script script.module=launch.stauts cluster=local", cwd=tmp_path, status=2)
    assert "type next: script.module=launch.status\n" in said
    assert list(tmp_path.iterdir()) == []
