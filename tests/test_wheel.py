"""The wheel carries everything: it is built, installed beside the libraries of this environment, and used elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

import launch
from launch.runs.environment import PACKAGES
from tests.support.commands import ROOT, TIMEOUT_S, TINY, environment

SOURCES = ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", *PACKAGES)


def finished(*command: str | Path, cwd: Path, status: int = 0) -> str:
    """Run a command to its end, with no import path but its own; what it printed."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment(PYTHONPATH="", PIP_NO_INDEX="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == status, f"exit status {done.returncode}, expected {status}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources: a build leaves folders, which a later one would pack again."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source, copy = ROOT / name, folder / "sources" / name
        copy.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, copy, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy)
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--wheel-dir", folder)
    finished(*pip, folder / "sources", cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel, and the libraries of this one by a path, which brings no editable install."""
    folder = tmp_path_factory.mktemp("environment")
    finished(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-compile")
    finished(*pip, wheel, cwd=folder)
    (site,) = folder.glob("lib/python3*/site-packages")
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (site / "libraries.pth").write_text("\n".join(libraries) + "\n")
    return folder


def test_everything_that_is_read_at_run_time_is_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    files = (path for package in PACKAGES for path in (ROOT / package).rglob("*") if path.is_file())
    expected = {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}
    assert {name for name in inside if ".dist-info/" not in name} == expected
    typed = {path.rsplit("/", 1)[0] for path in inside if path.endswith("/py.typed")}
    assert typed == {"gpt", "launch", "slurm", "configs", "hydra_plugins/launch_plugin"}


def test_one_version_everywhere(wheel: Path) -> None:
    assert wheel.name == f"gpt_launch-{launch.__version__}-py3-none-any.whl"
    released = re.findall(r"^## (\d+\.\d+\.\d+)\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert released[:1] in ([], [launch.__version__])


def test_the_commands_are_there(installed: Path, tmp_path: Path) -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    scripts = re.findall(r"^(\S+) = ", setup["options.entry_points"]["console_scripts"], re.MULTILINE)
    assert all((installed / "bin" / script).is_file() for script in scripts)
    version = finished(installed / "bin" / "gpt-launch", "--version", cwd=tmp_path)
    assert version == f"gpt-launch {launch.__version__}\n"
    up = finished(installed / "bin" / "slurm-sandbox", "status", "--dir", tmp_path / "none", cwd=tmp_path, status=3)
    assert "type next: python -m slurm.sandbox up --dir" in up


def test_it_plans_and_trains_outside_the_checkout(installed: Path, tmp_path: Path) -> None:
    gpt_launch = installed / "bin" / "gpt-launch"
    plan = finished(gpt_launch, "nodes=2", "cluster=slurm", "cluster.gpus_per_node=4", "dry_run=true", cwd=tmp_path)
    assert "#SBATCH --nodes=2" in plan and f"{installed}/bin/python" in plan
    text = finished(gpt_launch, *TINY, "data=synthetic", "optim.max_steps=3", "name=wheel", cwd=tmp_path)
    assert "finished  step 3/3" in text
    (environment_json,) = tmp_path.glob("outputs/wheel/*/attempts/0001/environment.json")
    assert Path(json.loads(environment_json.read_text())["code"]["root"]).is_relative_to(installed)
