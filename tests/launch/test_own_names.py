"""A user's project may have a launch.py, a gpt.py, configs/ and slurm/ of its own: ``gpt_launch`` works beside them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from tests.support.commands import ROOT, python

SCRIPT = """
import sys, time
from pathlib import Path
import configs, gpt, launch, slurm
from gpt_launch import worker

assert {module.MINE for module in (configs, gpt, launch, slurm)} == {"configs", "gpt", "launch", "slurm"}
run = worker.attach()
saved = Path(run.checkpoint_dir, "step.txt") if run.checkpoint_dir else None
first = int(saved.read_text()) if saved and saved.exists() else 0
for step in range(first + 1, int(sys.argv[1]) + 1):
    run.record(step, loss=1 / step, samples=8)
    if len(sys.argv) > 2 and not Path(sys.argv[2]).exists():
        time.sleep(0.2)
    if run.stop_requested():
        if run.rank == 0:
            saved.parent.mkdir(parents=True, exist_ok=True)
            saved.write_text(str(step))
        run.saved(step)
        break
"""


def make_project(folder: Path) -> Path:
    """Write a project that uses all four names of the packages, with a script that imports them; return its folder."""
    for package in ("configs", "slurm"):
        (folder / package).mkdir(parents=True)
    for name, file in {name: f"{name}.py" for name in ("launch", "gpt")}.items():
        (folder / file).write_text(f"MINE = {name!r}\n")
    for name in ("configs", "slurm"):
        (folder / name / "__init__.py").write_text(f"MINE = {name!r}\n")
    (folder / "train.py").write_text(SCRIPT)
    return folder


def point(project: Path, nodes: int) -> RunFolder:
    """Return the run folder of the sweep's point with so many nodes, which its other arguments name too."""
    [found] = (project / "outputs" / "mine").glob(f"nodes={nodes}*")
    return RunFolder(found)


def gpt_launch(project: Path, *args: str, status: int = 0) -> str:
    """Run ``gpt-launch`` in the project, as one types it; return its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "COLUMNS": "200"}
    environment.pop("PYTHONSAFEPATH", None)  # the working directory comes first on sys.path, as for a user
    done = subprocess.run(
        [sys.executable, "-m", "gpt_launch", *args], cwd=project, env=environment, text=True, capture_output=True
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stderr if status else done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make_project(tmp_path / "project")


def test_a_sweep_of_a_script_status_and_report(project: Path) -> None:
    words = ("workload=script", "script.path=train.py", "script.args=[5]", "name=mine", "launch.report_files=[md]")
    assert "Sweep 1: nodes=1,2" in gpt_launch(project, "-m", "nodes=1,2", *words)
    assert [r["step"] for r in read_records(point(project, 2).metrics(0))] == [1, 2, 3, 4, 5], (
        "worker, beside a launch.py"
    )
    status = gpt_launch(project, "status", "outputs")
    assert status.count("finished") == 2
    refused = gpt_launch(project, "status", "nowhere", status=2)
    assert "type next: gpt-launch status outputs" in refused, "python -m launch would run the project's launch.py"
    assert "nodes=2" in gpt_launch(project, "report", "outputs/mine")
    assert gpt_launch(project, "cancel", "--help").startswith("usage: gpt-launch cancel")


def test_the_gpt_is_the_project_s_own(project: Path) -> None:
    words = ("model=tiny_116k", "optim.max_steps=2", "data.max_bytes=200000", "name=own", "launch.report_files=[md]")
    gpt_launch(project, *words)
    [metrics] = (project / "outputs" / "own").glob("*/metrics")
    assert [r["step"] for r in read_records(RunFolder(metrics.parent).metrics(0))] == [1, 2]
    assert "whole" in gpt_launch(project, "verify", "outputs")


def test_gpt_launch_worker_is_launch_worker_without_a_launch_py(tmp_path: Path) -> None:
    code = "from gpt_launch import worker; import launch.worker; assert worker is launch.worker"
    python(code, cwd=tmp_path)
