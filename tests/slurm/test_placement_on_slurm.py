"""Placement on a real Slurm: points whose GPUs are taken move to where there is room, or are given up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from launch.runs.folder import RunFolder
from launch.slurm.client import JobState
from launch.slurm.failover import fail_over
from launch.slurm.jobs import SlurmJob
from launch.slurm.status import RunStatus, find_run_status
from slurm.sandbox.cluster import Cluster
from tests.support.commands import ON_SLURM, is_alive, run, wait_for
from tests.support.runs import COUNTING, options

pytestmark = pytest.mark.slurm

NO_ROOM = "{partition: low, gres: 'gpu:2'}"
WORDS = [*ON_SLURM, *COUNTING, *options(steps=5)]


@pytest.fixture
def no_gpus(sandbox: Cluster) -> str:
    """A job that holds the GPUs of all nodes, and one CPU of each."""
    options = ["--parsable", "--partition=high", "--nodes=4", "--gpus-per-node=2", "--chdir=/", "--output=/dev/null"]
    job = sandbox.slurm("sbatch", *options, "--wrap", "exec sleep 600").strip()
    wait_for(lambda: sandbox.slurm("squeue", "-h", "-j", job, "-o", "%T").strip() == "RUNNING", "the GPUs to be taken")
    return job


def of(folder: RunFolder, *names: str) -> list[dict[str, Any]]:
    return [event for event in folder.read_events() if event["event"] in names]


def test_detached_points_move_to_where_there_is_room(sandbox: Cluster, no_gpus: str, tmp_path: Path) -> None:
    conf = sandbox.env["SLURM_CONF"]
    places = [NO_ROOM, "{partition: low, gres: 'gpu:9'}", "{partition: high, price_per_gpu_hour: 2}"]
    listed = f"cluster.placement=[{', '.join(places)}]"
    words = ["-m", *options(step_s="0.01,0.02"), "name=s", listed, "cluster.retry_interval_min=0.05"]
    words += ["launch.detach=true"]
    text = run("launch", *words, *WORDS, cwd=tmp_path, SLURM_CONF=conf)
    said = "partition=low gres=gpu:9 is skipped: cluster.gres=gpu:9, and the best node of low has 2 of gpu"
    assert said in text
    failover = int(text.split("process ")[1].split()[0])
    folders = [RunFolder(path.parent) for path in (tmp_path / "outputs" / "s").glob("*/plan.json")]
    try:
        wait_for(lambda: all(of(folder, "finished") for folder in folders), "both points to finish elsewhere")
        wait_for(lambda: not is_alive(failover), "the process that moved them to leave")
    finally:
        run("launch.cancel --now outputs/s", cwd=tmp_path, SLURM_CONF=conf)
    for folder in folders:
        first, moved, second = of(folder, "submitted", "moved", "stayed", "cancelled", "gave_up")
        assert (first["placement"], first["gpus"]) == ("partition=low gres=gpu:2", 2)
        assert (moved["job_id"], moved["to"]) == (first["job_id"], "partition=high") and "Resources" in moved["cause"]
        assert (second["placement"], second["partition"], second["price_per_gpu_hour"]) == ("partition=high", "high", 2)
        assert second["job_id"] != first["job_id"]
    assert {r["state"] for r in json.loads(run("launch.status --json", cwd=tmp_path, SLURM_CONF=conf))} == {"finished"}


def test_a_point_is_given_up_and_one_that_has_started_is_left_alone(
    sandbox: Cluster, no_gpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    conf = sandbox.env["SLURM_CONF"]
    listed = f"cluster.placement=[{NO_ROOM}, {{partition: high, gres: 'gpu:1'}}]"
    words = [listed, "run_dir=run", "cluster.retry_interval_min=0.05", "cluster.give_up_after_min=0.15"]
    text = run("launch", *words, *WORDS, cwd=tmp_path, status=1, SLURM_CONF=conf)
    folder = RunFolder(tmp_path / "run")
    assert "run placement_timeout (" in text and "the same command submits it again" in text
    assert [event["event"] for event in folder.read_events()][-1] == "gave_up" and of(folder, "moved")
    (seen,) = json.loads(run("launch.status --json run", cwd=tmp_path, SLURM_CONF=conf))
    assert seen["state"] == "placement_timeout" and " s in the queue" in seen["detail"]
    assert sandbox.slurm("squeue", "-h", "-o", "%i").split() == [no_gpus]

    # The moment in which a job starts: it was seen waiting, and runs when it is to be moved.
    monkeypatch.setenv("SLURM_CONF", conf)
    folder.record_event("submitted", cluster="slurm", job_id=no_gpus, candidate=0)
    point: RunStatus = find_run_status(folder)
    assert isinstance(point.job, SlurmJob) and point.job.job_id == no_gpus
    point.state, point.job_status = "pending", JobState("PENDING", partition="low", submitted=1.0)
    point.plan = None
    assert fail_over([point], Console()) is None
    assert [event["event"] for event in folder.read_events()][-2:] == ["gave_up", "stayed"]
    assert sandbox.slurm("squeue", "-h", "-j", no_gpus, "-o", "%T").strip() == "RUNNING"
