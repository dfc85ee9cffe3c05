"""A job that is killed before it could save comes back from its last periodic checkpoint, and the event log says so."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from slurm.sandbox.cluster import Cluster
from tests.slurm.test_requeue_on_slurm import of
from tests.support.commands import ON_SLURM, TINY, start, wait_for

# A disk that hangs, as one that many share does: fsync returns once the file is gone.
HANGING_DISK = """
import os, time
fsync = os.fsync
def slowly(descriptor):
    fsync(descriptor)
    while "RANK" in os.environ and os.path.exists(os.environ["DISK_HANGS"]):
        time.sleep(0.1)
os.fsync = slowly
"""
"""Asked at each call: a forked rank has what its agent imported."""


@pytest.mark.slurm
def test_too_short_a_grace_falls_back_to_the_periodic_checkpoint(sandbox: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(HANGING_DISK)
    hangs = tmp_path / "hangs"
    more = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "DISK_HANGS": str(hangs)}
    here = RunFolder(tmp_path / "outputs" / "run")
    words = [*ON_SLURM, *TINY, f"run_dir={here.path}", "eval.interval=0", "checkpoint.interval=50"]
    words += ["optim.max_steps=100000", "copy_code=true", "cluster.gpus_per_node=1", "device=cpu"]
    process = start("launch", *words, cwd=tmp_path, log=tmp_path / "log", **{**sandbox.env, **more})
    wait_for(lambda: of(here.read_events(), "saved", "step") or process.poll() is not None, "a checkpoint")
    hangs.touch()
    job = str(of(here.read_events(), "submitted", "job_id")[0])
    sandbox.slurm("scontrol", "requeue", job)  # SIGTERM, and SIGKILL after KillWait
    wait_for(
        lambda: len(of(here.read_events(), "agent_started", "job")) == 2 or process.poll() is not None, "the comeback"
    )
    hangs.unlink()
    wait_for(
        lambda: len(of(here.read_events(), "started", "from_step")) == 2 or process.poll() is not None, "its ranks"
    )
    sandbox.slurm("scancel", job)
    assert process.wait(timeout=300) == 1
    events = here.read_events()
    saved = max(e["step"] for e in events if e["event"] == "saved" and e["attempt"] == 1)
    ended = next(e for e in events if e["event"] == "attempt_ended")
    assert (ended["attempt"], ended["cause"]) == (1, "preempted"), (events, (tmp_path / "log").read_text())
    assert ended["reason"] == f"killed before it could save; goes on from step {saved}"
    assert of(events, "started", "from_step") == [0, saved]
    first, second = (e for e in events if e["event"] == "agent_started")
    assert (first["gpus"], first["limit_s"]) == (1, 3600) and first["allocated_at"] <= first["time"]
    killed = [e for e in events if e["event"] == "agent_ended" and e["job"] == first["job"]]
    assert [e["cause"] for e in killed] == ["killed"] and first["time"] <= killed[0]["ended_at"] <= second["time"]
    code = [json.loads(here.environment(attempt).read_text())["code"] for attempt in (1, 2)]
    assert code[0]["is_snapshot"] and code[0] == code[1], "the requeued job runs the same copy"
