"""Inside an allocation of a real Slurm: SAVE and STOP, killed and frozen ranks, repeated crashes, left-over ranks."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from launch.runs.events import first_failure
from launch.runs.folder import RunFolder
from launch.runs.process import ENVIRONMENT as HEARTBEATS
from launch.runs.process import read_heartbeat
from launch.slurm.jobs import agent_logs, job_of
from slurm.sandbox.cluster import Cluster, cut_link
from tests.support.commands import wait_for
from tests.support.runs import COUNTING, PROGRAM, StormyRun, checkpoint, from_step, options

pytestmark = pytest.mark.slurm

HEARTBEAT_TIMEOUT_S = 8


def ranks_in(folder: RunFolder) -> dict[int, int]:
    """Process ids of the ranks that work on a run folder, on whatever node of the sandbox, by rank."""
    found = {}
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            variables = process.environ()
            if variables.get("LAUNCH_RUN_DIR") == str(folder.path) and "RANK" in variables:
                found[int(variables["RANK"])] = process.pid
    return found


def test_one_job_survives_a_killed_and_a_frozen_rank_and_obeys_the_files(sandbox: Cluster, tmp_path: Path) -> None:
    storm = StormyRun(sandbox, tmp_path, *COUNTING, f"resilience.heartbeat_timeout_s={HEARTBEAT_TIMEOUT_S}")
    folder = storm.folder
    storm.wait_for_steps(attempt=1, count=1)
    (folder.path / "SAVE").touch()
    storm.wait(lambda: storm.of("saved"), "the checkpoint that was asked for")
    saved = next(e["step"] for e in folder.read_events() if e["event"] == "saved")
    os.kill(ranks_in(folder)[1], signal.SIGKILL)
    storm.wait_for_steps(attempt=2, count=1)
    (folder.path / "SAVE").touch()
    storm.wait(lambda: len(storm.of("saved")) == 2, "a checkpoint of the second attempt")
    saved_at = time.monotonic()
    pid = ranks_in(folder)[1]
    beats = Path(psutil.Process(pid).environ()[HEARTBEATS]) / "1"
    wait_for(lambda: (last := read_heartbeat(beats)) is not None and last.ran_at > saved_at, "a heartbeat")
    os.kill(pid, signal.SIGSTOP)
    storm.wait_for_steps(attempt=3, count=1)
    (folder.path / "STOP").touch()
    assert storm.process.wait(timeout=120) == 1, "a run that was stopped has not finished"

    events = folder.read_events()
    assert [e["cause"] for e in events if e["event"] == "attempt_ended"] == ["crashed", "hung", "cancelled"]
    assert [e["event"] for e in events].count("submitted") == 1 and "requeued" not in {e["event"] for e in events}
    killed, frozen = first_failure(events, 1), first_failure(events, 2)
    assert killed is not None and frozen is not None
    assert (killed["rank"], killed["cause"]) == (1, "killed by SIGKILL")
    assert (frozen["rank"], frozen["host"]) == (1, killed["host"]) and PROGRAM.name in frozen["traceback"]
    assert from_step(folder, attempt=2) == saved
    assert checkpoint(folder)["attempt"] == 3, "STOP saves before it ends"
    shown = sandbox.slurm("scontrol", "show", "job", str(events[0]["job_id"]))
    assert "Restarts=0" in shown
    assert not ranks_in(folder)
    # What test_goodput.py measures is the allocation, whose second of begin and end Slurm tells.
    begin, end = (datetime.fromisoformat(shown.split(f" {name}=")[1].split()[0]) for name in ("StartTime", "EndTime"))
    allocated = next(e["allocated_at"] for e in events if e["event"] == "agent_started")
    ended = max(e["ended_at"] for e in events if e["event"] == "agent_ended")
    assert abs(allocated - begin.timestamp()) <= 1 and ended <= end.timestamp() + 1


def test_a_rank_behind_a_cut_link_commits_nothing_once_the_job_runs_elsewhere(sandbox: Cluster, tmp_path: Path) -> None:
    storm = StormyRun(sandbox, tmp_path, *COUNTING, *options(save_every=10), nodes=1)
    folder = storm.folder
    storm.wait(lambda: storm.of("saved"), "a checkpoint")
    (left_over,) = ranks_in(folder).values()
    host = str(storm.of("agent_started")[0].get("host") or sandbox.slurm("squeue", "--noheader", "--format=%N").strip())
    cut_link(sandbox, host)
    try:
        # It trains on, all by itself, until it finds that it was replaced.
        storm.wait(lambda: any(e["attempt"] == 2 for e in storm.of("saved")), "a checkpoint of the run elsewhere")
        wait_for(lambda: not Path(f"/proc/{left_over}").exists(), "the end of the rank that was left over")
        agent = agent_logs(folder.path, job_of(storm.of("submitted")[0]), 0)[1]
        wait_for(lambda: "was left over" in agent.read_text(), "the end of its agent", 60)
        events = folder.read_events()
        begun = next(i for i, e in enumerate(events) if e["event"] == "started" and e["attempt"] == 2)
        assert {e["attempt"] for e in events[begun:] if e["event"] in ("saved", "started", "attempt_ended")} == {2}
        assert folder.attempts() == [1, 2], "the left-over agent started nothing"
        assert checkpoint(folder)["attempt"] == 2
    finally:
        storm.end()
