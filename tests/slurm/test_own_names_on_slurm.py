"""A project with a launch.py, a gpt.py, configs/ and slurm/ of its own, on a real Slurm: sweep, requeue, status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.faults import preempt
from tests.launch.test_own_names import gpt_launch, make_project, point
from tests.support.commands import ON_SLURM, ROOT, wait_for
from tests.support.scripts import causes

pytestmark = pytest.mark.slurm


def test_a_sweep_is_preempted_requeued_and_finished(
    sandbox: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = make_project(tmp_path / "project")
    for name, value in sandbox.env.items():
        monkeypatch.setenv(name, value)
    hurry = tmp_path / "hurry"
    words = [
        *ON_SLURM, "workload=script", "script.path=train.py", f"script.args=[300,'{hurry}']", "script.resumes=true",
        "ranks_per_node=1", "name=mine", "launch.report_files=[md]",
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    log = (tmp_path / "log").open("w")
    command = [sys.executable, "-m", "gpt_launch", "-m", "nodes=1,2", *words]
    sweep = subprocess.Popen(command, cwd=project, env=environment, stdout=log, stderr=subprocess.STDOUT)
    steps = "outputs/mine/nodes=2*/metrics/rank_00000.jsonl"
    wait_for(lambda: [*project.glob(steps)] or sweep.poll() is not None, "the first step on two nodes")
    assert sweep.poll() is None, (tmp_path / "log").read_text()
    two = point(project, 2)
    assert "running" in gpt_launch(project, "status", "outputs")
    [submitted] = [e for e in two.read_events() if e["event"] == "submitted"]
    preempt(sandbox, str(submitted["job_id"]))
    wait_for(lambda: any(e["event"] == "requeued" for e in two.read_events()), "the requeue")
    hurry.touch()
    assert sweep.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert causes(two) == ["preempted", "finished"]
    made = [record["step"] for record in read_records(two.metrics(0))]
    assert made == list(range(1, 301)), "each step once"
    assert gpt_launch(project, "status", "outputs").count("finished") == 2
