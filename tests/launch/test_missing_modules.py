"""A module that ``python -m`` would not run is refused before it is submitted, and none that it would run."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest

from launch.errors import ConfigError
from launch.script import require_module, require_program
from launch.script.arguments import ScriptOptions
from tests.support.commands import TIMEOUT_S, environment, run

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
        ("package/train.py", "script.path=package/train.py, or script.module=package.train"),
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
