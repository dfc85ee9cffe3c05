"""A job that is killed before it could save comes back from its last periodic checkpoint, and the event log says so."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from launch.runs.folder import RunFolder
from slurm.sandbox.cluster import Cluster
from tests.slurm.test_requeue_on_slurm import of
from tests.support.commands import ON_SLURM, start_fork, wait_for
from tests.support.counting import COUNTING, checkpoint, from_step, options


@pytest.mark.slurm
def test_too_short_a_grace_falls_back_to_the_periodic_checkpoint(sandbox: Cluster, tmp_path: Path) -> None:
    hang, here = tmp_path / "hang", RunFolder(tmp_path / "outputs" / "run")
    # A save that hangs, as on a disk that many share.
    words = [*ON_SLURM, *COUNTING, *options(save_every=5, hang=hang), f"run_dir={here.path}"]
    words += ["copy_code=true", "cluster.gpus_per_node=1"]
    process = start_fork("launch", *words, cwd=tmp_path, log=tmp_path / "log", **sandbox.env)
    wait_for(lambda: of(here.read_events(), "saved", "step") or process.poll() is not None, "a checkpoint")
    hang.touch()
    job = str(of(here.read_events(), "submitted", "job_id")[0])
    sandbox.slurm("scontrol", "requeue", job)  # SIGTERM, and SIGKILL after KillWait
    wait_for(
        lambda: len(of(here.read_events(), "agent_started", "job")) == 2 or process.poll() is not None, "the comeback"
    )
    saved = checkpoint(here)["step"]
    hang.unlink()
    wait_for(lambda: from_step(here, attempt=2) is not None or process.poll() is not None, "its ranks")
    sandbox.slurm("scancel", job)
    assert process.wait(timeout=300) == 1
    events = here.read_events()
    assert saved == max(e["step"] for e in events if e["event"] == "saved" and e["attempt"] == 1)
    ended = next(e for e in events if e["event"] == "attempt_ended")
    assert (ended["attempt"], ended["cause"]) == (1, "preempted"), (events, (tmp_path / "log").read_text())
    assert ended["reason"] == f"killed before it could save; goes on from step {saved}"
    assert [from_step(here, attempt) for attempt in (1, 2)] == [0, saved]
    first, second = (e for e in events if e["event"] == "agent_started")
    assert (first["gpus"], first["limit_s"]) == (1, 3600) and first["allocated_at"] <= first["time"]
    killed = [e for e in events if e["event"] == "agent_ended" and e["job"] == first["job"]]
    assert [e["cause"] for e in killed] == ["killed"] and first["time"] <= killed[0]["ended_at"] <= second["time"]
    code = [json.loads(here.environment(attempt).read_text())["code"] for attempt in (1, 2)]
    assert code[0]["is_snapshot"] and code[0] == code[1], "the requeued job runs the same copy"
