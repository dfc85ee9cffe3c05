"""Interrupted on a real Slurm, a run comes back: by a requeue, or in place inside of the allocation."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from launch.runs.events import first_failure
from launch.runs.folder import RunFolder
from launch.runs.process import ENVIRONMENT as HEARTBEATS
from launch.runs.process import read_heartbeat
from launch.runs.records import read_records
from launch.slurm.jobs import agent_logs, job_of
from launch.storm import __main__ as drill
from launch.storm.injection import Site
from slurm.sandbox.cluster import Cluster, cut_link, heal, power_cut, preempt
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import TINY, run, start_fork, wait_for
from tests.support.runs import COUNTING, PROGRAM, StormyRun, checkpoint, from_step, options, paced, rank_hosts

pytestmark = pytest.mark.slurm

STEPS = 120
WORDS = [*TINY, f"optim.max_steps={STEPS}", "eval.interval=0", "checkpoint.interval=15", "model.dropout=0.1"]


def of(events: list[dict[str, Any]], name: str, key: str) -> list[Any]:
    return [e[key] for e in events if e["event"] == name]


def test_a_program_interrupted_in_every_way_counts_each_step_once(sandbox: Cluster, tmp_path: Path) -> None:
    begin, hurry, steps = tmp_path / "begin", tmp_path / "hurry", 5000
    begin.touch()
    words = [*COUNTING, *options(steps=steps, begin=begin, hurry=hurry), "resilience.grace_period_s=30"]
    storm = StormyRun(sandbox, tmp_path, *words)
    here, job = storm.folder, storm.job
    storm.wait_for_steps(attempt=1)
    begin.unlink()  # the ranks of the next attempts make no step
    # Slurm counts in minutes, and of the first one less is left than the 50 s before its end that the run is to have.
    sandbox.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    storm.wait(lambda: storm.of("requeued"), "the end of its time")
    sandbox.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    # Three times before the first step, which by default must not count as three attempts without progress.
    storm.wait_for_ranks(2)
    sandbox.slurm("scontrol", "requeue", job)
    storm.wait_for_ranks(3)
    sandbox.slurm("scancel", "--signal=TERM", job)
    storm.wait_for_ranks(4)
    preempt(sandbox, job, seconds=1)
    storm.wait_for_ranks(5)
    begin.touch()
    # A node that is back before Slurm calls it down: srun gives up, and ends the step.
    storm.wait_for_steps(attempt=5)
    rebooting = storm.hosts()[1]
    power_cut(sandbox, rebooting)
    time.sleep(3)
    heal(sandbox, rebooting)
    # srun is killed: the agents go on without it.
    storm.wait_for_steps(attempt=6)
    storm.kill_srun()
    storm.wait(lambda: storm.of("srun_lost"), "the batch script to look")
    preempt(sandbox, job, seconds=1)
    storm.wait(lambda: len(storm.of("requeued")) == 6, "the way back into the queue")
    hurry.touch()
    assert storm.process.wait(timeout=300) == 0, (here.read_events(), storm.log.read_text())
    events = here.read_events()
    causes = ["timed_out", *["preempted"] * 3, "node_failed", "preempted", "finished"]
    assert of(events, "attempt_ended", "cause") == causes
    assert of(events, "attempt_ended", "step")[1:4] == [None] * 3
    assert of(events, "requeued", "job_id") == [job] * 6
    saved = {e["attempt"]: e["step"] for e in events if e["event"] == "stopped" and e["step"]}
    assert set(saved) == {1, 6}, "in time, where it was asked to leave"
    # The node that rebooted asked nobody: what was done since the save before is done again.
    goes_on = [0, None, None, None, saved[1], saved[1], saved[6]]
    assert [from_step(here, attempt) for attempt in range(1, 8)] == goes_on
    assert checkpoint(here)["step"] == steps


def test_where_jobs_are_not_requeued_a_run_continues_in_the_next_job(sandbox: Cluster, tmp_path: Path) -> None:
    hurry = tmp_path / "hurry"
    words = [*COUNTING, *options(steps=5000, begin=tmp_path, hurry=hurry), "resilience.grace_period_s=30"]
    storm = StormyRun(sandbox, tmp_path, *words, "resilience.requeue=chain")
    first, status = storm.job, partial(run, "launch.status", str(storm.folder.path), cwd=tmp_path, **sandbox.env)
    storm.wait_for_steps(attempt=1)
    (second,) = of(storm.of("next_job"), "next_job", "job_id")
    waits = sandbox.slurm("squeue", "--noheader", "--format=%i %r %E", "--jobs", second)
    assert waits.split()[:2] == [second, "Dependency"] and f"afterany:{first}" in waits
    sandbox.slurm("scontrol", "update", f"JobId={first}", "TimeLimit=1")
    storm.wait(lambda: storm.of("requeued"), "the end of its time")
    storm.wait_for_steps(attempt=2)
    assert storm.job == second and "running" in status()
    third = str(storm.of("next_job")[-1]["job_id"])
    for host in storm.hosts():  # No agent is left that could decide.
        power_cut(sandbox, host)
    storm.wait_for_steps(attempt=3)
    assert storm.job == third
    hurry.touch()
    assert storm.process.wait(timeout=300) == 0, (storm.folder.read_events(), storm.log.read_text())
    events = storm.folder.read_events()
    assert of(events, "attempt_ended", "cause") == ["timed_out", "node_failed", "finished"]
    assert of(events, "submitted", "job_id") == [first, second, third] and of(events, "requeued", "by") == ["chain"]
    assert len(of(events, "next_job", "job_id")) == 4 and events[-1]["event"] == "agent_ended"
    assert checkpoint(storm.folder)["step"] == 5000
    wait_for(lambda: not sandbox.slurm("squeue", "--noheader").strip(), "the end of the job after the last one")


def test_a_run_that_is_cancelled_takes_its_next_job_along(sandbox: Cluster, tmp_path: Path) -> None:
    refused = StormyRun(sandbox, tmp_path, *COUNTING, *options(steps=100000))
    refused.wait_for_steps(attempt=1)
    sandbox.slurm("scontrol", "update", f"JobId={refused.job}", "Requeue=0")
    sandbox.slurm("scancel", "--signal=TERM", refused.job)
    assert refused.process.wait(timeout=300) == 1
    (why,) = of(refused.folder.read_events(), "requeue_failed", "cause")
    assert "Slurm did not requeue it" in why and "resilience.requeue=chain" in why
    words = (*COUNTING, *options(steps=100000), "resilience.requeue=chain")
    (tmp_path / "chain").mkdir()
    storm = StormyRun(sandbox, tmp_path / "chain", *words)
    storm.wait_for_steps(attempt=1)
    assert len(sandbox.slurm("squeue", "--noheader").splitlines()) == 2
    assert storm.end() == 1
    assert [e["job_id"] is None for e in storm.of("next_job")] == [False, True]
    wait_for(lambda: not sandbox.slurm("squeue", "--noheader").strip(), "the end of both jobs")
    assert of(storm.folder.read_events(), "attempt_ended", "cause") == ["cancelled"]


def test_a_training_that_is_preempted_and_loses_a_node_ends_in_the_same_weights(
    sandbox: Cluster, tmp_path: Path
) -> None:
    # The same run, uninterrupted, computes while this one waits for Slurm.
    whole, log = RunFolder(tmp_path / "whole"), tmp_path / "log of the whole"
    undisturbed = [*WORDS, "nodes=2", "cluster=local", f"run_dir={whole.path}"]
    alone = start_fork("launch", *undisturbed, cwd=tmp_path, log=log)
    slowly, hurry = paced(tmp_path)
    storm = StormyRun(sandbox, tmp_path, *WORDS, *slowly, "parallel.timeout_s=60")
    here = storm.folder
    storm.wait_for_steps(attempt=1)
    preempt(sandbox, storm.job, seconds=1)
    storm.wait(lambda: any(e["attempt"] == 2 for e in storm.of("saved")), "a checkpoint of the second attempt")
    dead = storm.rank_hosts(2)[-1]
    power_cut(sandbox, dead)
    storm.wait(lambda: len(storm.of("agent_started")) == 3, "the comeback without it")
    hurry.touch()
    assert storm.process.wait(timeout=300) == 0, (here.read_events(), storm.log.read_text())
    events = here.read_events()
    # Slurm puts the job back when it misses the node, unless the agents did before.
    first, second, last = of(events, "attempt_ended", "cause")
    assert (first, last) == ("preempted", "finished") and second in ("preempted", "node_failed")
    assert dead not in rank_hosts(here, 3)
    (stopped,) = of(events, "stopped", "step")
    before = max(e["step"] for e in events if e["event"] == "saved" and e["attempt"] == 2)
    assert of(events, "started", "from_step") == [0, stopped, before], "from the steps at which it saved"
    assert all(seconds > 0 for seconds in of(events, "recovered", "seconds_since_last_step"))
    assert of(events, "recovered", "attempt") == [2, 3]
    assert alone.wait(timeout=300) == 0, log.read_text()
    assert differing(read_weights(whole.path, STEPS, tmp_path), read_weights(here.path, STEPS, tmp_path)) == []
    done = {(rank, r["step"]): r["samples"] for rank in here.metric_ranks() for r in read_records(here.metrics(rank))}
    used = [sample for first, final in done.values() for sample in range(first, final + 1)]
    assert sorted(used) == list(range(8 * STEPS)), "no sample repeated, none skipped"


def test_a_drill_waits_for_the_end_of_the_job_and_names_one_that_goes_on(
    sandbox: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in sandbox.env.items():
        monkeypatch.setenv(name, value)
    folder = RunFolder(tmp_path)
    job = sandbox.slurm("sbatch", "--parsable", "--hold", "--chdir=/tmp", "--output=/dev/null", "--wrap=true").strip()
    folder.record_event("submitted", job_id=job)
    site = Site(folder, is_slurm=True)
    monkeypatch.setattr(drill, "GONE_S", 0.0)
    assert drill._remains(site) == [f"job {job} is PENDING"]
    sandbox.slurm("scancel", job)
    monkeypatch.setattr(drill, "GONE_S", 60.0)
    assert drill._remains(site) == []


# Inside an allocation of a real Slurm: SAVE and STOP, killed and frozen ranks, repeated crashes, left-over ranks.


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
