"""Interrupted on a real Slurm, a run comes back by itself and ends as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.faults import heal, power_cut, preempt
from tests.support.commands import ON_SLURM, TINY, start, wait_for
from tests.support.storm import StormyRun
from tests.support.weights import differing, read_weights

STEPS = 360
WORDS = [*TINY, "nodes=2", f"optim.max_steps={STEPS}", "eval.interval=0", "checkpoint.interval=50", "model.dropout=0.1"]


def submit(sandbox: Cluster, folder: Path, *words: str) -> tuple[subprocess.Popen[bytes], RunFolder, str]:
    """Start a run on the sandbox and wait for its tenth step; gives the launcher, the run folder and the job."""
    here = RunFolder(folder / "run")
    words = (*WORDS, *ON_SLURM, f"run_dir={here.path}", *words)
    process = start("launch", *words, cwd=folder, log=folder / "log", **sandbox.env)
    wait_for_steps(process, here, attempt=1)
    return process, here, str(next(e["job_id"] for e in here.read_events() if e["event"] == "submitted"))


def wait_for_steps(process: subprocess.Popen[bytes], here: RunFolder, attempt: int) -> None:
    """Wait for the tenth step of an attempt."""

    def steps() -> int:
        return sum(record["attempt"] == attempt for record in read_records(here.metrics(0)))

    wait_for(lambda: steps() >= 10 or process.poll() is not None, f"the tenth step of attempt {attempt}")
    assert process.poll() is None, (here.read_events(), (here.path.parent / "log").read_text())


def of(events: list[dict[str, Any]], name: str, key: str) -> list[Any]:
    return [e[key] for e in events if e["event"] == name]


@pytest.mark.slurm
def test_a_run_interrupted_in_every_way_ends_in_the_same_weights(sandbox: Cluster, tmp_path: Path) -> None:
    # The same run, uninterrupted, computes while this one waits for Slurm.
    whole, log = RunFolder(tmp_path / "whole"), tmp_path / "log of the whole"
    alone = start("launch", *WORDS, "cluster=local", f"run_dir={whole.path}", cwd=tmp_path, log=log)
    # Ranks that import for seconds, so that they can be interrupted before their first step.
    storm = StormyRun(sandbox, tmp_path, *WORDS, "resilience.fork_ranks=false")
    here, job = storm.folder, storm.job
    # Three times before the first step, which by default must not count as three attempts without progress.
    storm.wait_for_ranks(1)
    sandbox.slurm("scontrol", "requeue", job)
    storm.wait_for_ranks(2)
    sandbox.slurm("scancel", "--signal=TERM", job)
    storm.wait_for_ranks(3)
    preempt(sandbox, job, seconds=1)
    # A node that is back before Slurm calls it down: srun gives up, and ends the step.
    storm.wait_for_steps(attempt=4)
    rebooting = storm.hosts()[1]
    power_cut(sandbox, rebooting)
    time.sleep(3)
    heal(sandbox, rebooting)
    # srun is killed: the agents go on without it.
    storm.wait_for_steps(attempt=5)
    storm.kill_srun()
    storm.wait(lambda: storm.of("srun_lost"), "the batch script to look")
    preempt(sandbox, job, seconds=1)
    assert storm.process.wait(timeout=300) == 0, (here.read_events(), storm.log.read_text())
    events = here.read_events()
    causes = ["preempted"] * 3 + ["node_failed", "preempted", "finished"]
    assert of(events, "attempt_ended", "cause") == causes
    assert of(events, "attempt_ended", "step")[:3] == [None] * 3
    assert of(events, "requeued", "job_id") == [job] * 5
    saved, started = of(events, "stopped", "step")[-1:], of(events, "started", "from_step")
    assert started == [0, 0, *saved], "it went on from the step at which it saved"
    assert alone.wait(timeout=300) == 0, log.read_text()
    assert differing(read_weights(whole.path, STEPS, tmp_path), read_weights(here.path, STEPS, tmp_path)) == []
    last = {(rank, r["step"]): r["samples"] for rank in here.metric_ranks() for r in read_records(here.metrics(rank))}
    used = [sample for first, final in last.values() for sample in range(first, final + 1)]
    assert sorted(used) == list(range(8 * STEPS)), "no sample repeated, none skipped"


@pytest.mark.slurm
def test_the_time_limit_is_survived(sandbox: Cluster, tmp_path: Path) -> None:
    process, here, job = submit(sandbox, tmp_path, "optim.max_steps=100000", "cluster.signal_delay_s=50")
    # Slurm counts in minutes, and of the first one less is left than the 50 s before its end that the run is to have.
    sandbox.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=1")
    wait_for(lambda: of(here.read_events(), "requeued", "job_id") or process.poll() is not None, "the end of its time")
    sandbox.slurm("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    wait_for(lambda: len(of(here.read_events(), "recovered", "step")) > 0 or process.poll() is not None, "the comeback")
    sandbox.slurm("scancel", job)
    assert process.wait(timeout=300) == 1
    events = here.read_events()
    assert of(events, "recovered", "step"), (events, (tmp_path / "log").read_text())
    assert of(events, "attempt_ended", "cause") == ["timed_out", "cancelled"]
    assert of(events, "requeued", "job_id") == [job]
    saved = next(i for i, e in enumerate(events) if e["event"] == "stopped")
    assert of(events[saved:], "started", "from_step")[0] == events[saved]["step"]


@pytest.mark.slurm
def test_a_node_that_loses_power_is_survived(sandbox: Cluster, tmp_path: Path) -> None:
    process, here, job = submit(sandbox, tmp_path, "optim.max_steps=100000", "parallel.timeout_s=60")
    wait_for(lambda: of(here.read_events(), "saved", "step") or process.poll() is not None, "a checkpoint")
    ranks = json.loads(here.environment(1).read_text())["ranks"]
    dead = ranks[-1]["host"]
    power_cut(sandbox, dead)
    try:
        wait_for(lambda: of(here.read_events(), "recovered", "step") or process.poll() is not None, "the comeback")
        assert process.poll() is None, (tmp_path / "log").read_text()
        newest = max(here.attempts())
        assert dead not in {r["host"] for r in json.loads(here.environment(newest).read_text())["ranks"]}
        saved_before = max(e["step"] for e in here.read_events() if e["event"] == "saved" and e["attempt"] < newest)
        assert of(here.read_events(), "started", "from_step")[-1] == saved_before
    finally:
        sandbox.slurm("scancel", job)
    assert process.wait(timeout=300) == 1
