"""Interrupted on a real Slurm, a run comes back by itself and ends as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from slurm.sandbox.cluster import Cluster
from slurm.sandbox.faults import power_cut, preempt
from tests.support.commands import ON_SLURM, TINY, run, start, wait_for
from tests.support.weights import differing, read_weights

STEPS = 360
WORDS = [*TINY, "nodes=2", f"optim.max_steps={STEPS}", "eval.interval=0", "checkpoint.interval=50", "model.dropout=0.1"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The same run, uninterrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run("launch", *WORDS, "cluster=local", f"run_dir={folder / 'run'}", cwd=folder)
    return RunFolder(folder / "run")


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
def test_a_run_interrupted_in_every_way_ends_in_the_same_weights(
    sandbox: Cluster, whole: RunFolder, tmp_path: Path
) -> None:
    process, here, job = submit(sandbox, tmp_path)
    preempt(sandbox, job)
    wait_for_steps(process, here, attempt=2)
    sandbox.slurm("scontrol", "requeue", job)
    wait_for_steps(process, here, attempt=3)
    sandbox.slurm("scancel", "--signal=TERM", job)
    assert process.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    events = here.read_events()
    assert of(events, "attempt_ended", "cause") == ["preempted"] * 3 + ["finished"]
    assert (of(events, "requeued", "job_id"), of(events, "requeued", "by")) == ([job] * 3, ["agent", "slurm", "agent"])
    saved, started = of(events, "stopped", "step"), of(events, "started", "from_step")
    assert started == [0, *saved], "it went on from the step at which it saved"
    assert differing(read_weights(whole.path, STEPS, tmp_path), read_weights(here.path, STEPS, tmp_path)) == []
    used = [
        sample
        for rank in here.metric_ranks()
        for record in read_records(here.metrics(rank))
        for sample in range(record["samples"][0], record["samples"][1] + 1)
    ]
    assert sorted(used) == list(range(8 * STEPS)), "no sample repeated, none skipped"


@pytest.mark.slurm
def test_the_time_limit_is_survived(sandbox: Cluster, tmp_path: Path) -> None:
    # An attempt has 40 s, in which a busy machine may not even begin.
    words = ["cluster.timeout_min=1", "cluster.signal_delay_s=20", "resilience.max_without_progress=10"]
    process, here, job = submit(sandbox, tmp_path, "optim.max_steps=100000", *words)
    wait_for(lambda: len(of(here.read_events(), "recovered", "step")) > 0 or process.poll() is not None, "the comeback")
    sandbox.slurm("scancel", job)
    assert process.wait(timeout=300) == 1
    events = here.read_events()
    assert of(events, "recovered", "step"), (events, (tmp_path / "log").read_text())
    assert of(events, "attempt_ended", "cause")[0] == "timed_out"
    assert of(events, "requeued", "job_id")[0] == job
    # On a busy machine the limit may come before an attempt has made a step: what counts is the one that saved.
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
