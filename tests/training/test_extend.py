"""A finished run goes on where more steps are asked for, and back to an earlier checkpoint, with nothing lost."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gpt.checkpoint import folders
from gpt.config.optim import OptimConfig, describe_extended_schedule
from launch.batch import job_overrides
from launch.errors import ConfigError
from launch.report.goodput import measure_goodput
from launch.runs.compose import read_document
from launch.runs.events import (
    Continuation,
    SavedCheckpoint,
    apply_continuation,
    is_finished,
    plan_continuation,
    refuse_alive,
    saves_that_count,
)
from launch.runs.files import write_json
from launch.runs.folder import RunFolder
from launch.runs.records import append_records, read_records
from tests.support.checkpoints import differing, read_weights
from tests.support.commands import TINY, run

SMALL = tuple(word for word in TINY if not word.startswith("data."))
EVEN = (*SMALL, "data=synthetic", "optim.lr=0.001", "optim.min_lr=0.001", "optim.warmup_steps=0")
"""A learning rate that does not depend on the length, so that a run of the whole length is the reference."""
WORDS = (*EVEN, "checkpoint.interval=4", "checkpoint.keep_last=9", "eval.interval=0", "logging.tensorboard=false")


def test_a_run_that_is_extended_and_one_that_goes_back_end_as_one_that_ran_through(tmp_path: Path) -> None:
    words = [*WORDS, "name=n"]
    run("gpt.train", *words, "optim.max_steps=12", f"run_dir={tmp_path / 'whole'}", cwd=tmp_path)
    whole = read_weights(tmp_path / "whole", 12, tmp_path)

    run("launch", *words, "optim.max_steps=8", "launch.report_files=[csv]", cwd=tmp_path)
    (path,) = (path for path in (tmp_path / "outputs" / "n").iterdir() if (path / "plan.json").exists())
    folder = RunFolder(path)
    longer = [*words, "optim.max_steps=12", "resume_from=last", "launch.report_files=[csv]"]
    said = run("launch", *longer, cwd=tmp_path)
    assert "on to step 12, after it was finished at step 8" in said
    assert [e["from_step"] for e in folder.read_events() if e["event"] == "started"] == [0, 8]
    assert differing(whole, read_weights(path, 12, tmp_path)) == []

    assert "finished already, and not submitted" in run("launch", *longer, cwd=tmp_path)
    assert "has made 12 steps" in run("launch", *words, "optim.max_steps=8", cwd=tmp_path, status=2)
    refused = run("launch", *words, "optim.max_steps=12", "resume_from=5", cwd=tmp_path, status=2)
    assert "4, 8, 12" in refused and "resume_from=4" in refused
    assert len(folder.attempts()) == 2, "nothing was started"

    before = read_records(folder.metrics(0))
    said = run("gpt.train", *words, "optim.max_steps=12", "resume_from=4", cwd=tmp_path)
    assert "back to the checkpoint of step 4; steps 5 to 12 are kept in aside/" in said
    assert differing(whole, read_weights(path, 12, tmp_path)) == []
    steps = [json.loads(line)["step"] for line in folder.metrics(0).read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 13)) and {r["attempt"] for r in read_records(folder.metrics(0))} == {
        1,
        3,
    }
    kept = read_records(folder.aside / "0001" / "metrics" / "rank_00000.jsonl")
    assert kept == before[4:]
    assert folders.steps(folder.aside / "0001" / "checkpoints") == [8, 12] and folders.steps(folder.checkpoints) == [
        4, 8, 12
    ]  # fmt: skip
    assert read_document(folder).resume_from is None, "a start of the job in the queue must not go back again"


def checkpoint(folder: RunFolder, step: int) -> SavedCheckpoint:
    path = folder.checkpoints / f"step_{step}"
    path.mkdir(parents=True, exist_ok=True)
    return SavedCheckpoint(path, step, 0, lambda told: ())


def finished_run(path: Path, steps: int = 8, began: float = 1000.0) -> tuple[RunFolder, list[SavedCheckpoint]]:
    """A run of one rank that took a second a step and saved every four."""
    folder = RunFolder(path)
    folder.create_attempt()
    job = {"job": "a", "nodes": 1, "gpus": 1, "limit_s": 9e9, "allocated_at": began}
    told: list[dict[str, Any]] = [
        {"event": "submitted", "time": began, "job_id": "1", "cluster": "slurm"},
        {"event": "agent_started", "time": began, **job},
        {"event": "started", "time": began, "attempt": 1, "max_steps": steps, "from_step": 0},
        *({"event": "saved", "time": began + s, "attempt": 1, "step": s} for s in range(4, steps + 1, 4)),
        {"event": "finished", "time": began + steps, "attempt": 1, "step": steps},
        {"event": "attempt_ended", "time": began + steps, "attempt": 1, "cause": "finished"},
        {"event": "agent_ended", "time": began + steps, "ended_at": began + steps, "job": "a", "cause": "finished"},
    ]
    folder.events.write_text("".join(json.dumps(event) + "\n" for event in told))
    records = [{"step": s, "attempt": 1, "time": began + s, "step_time_s": 1.0} for s in range(1, steps + 1)]
    append_records(folder.metrics(0), records)
    return folder, [checkpoint(folder, step) for step in range(4, steps + 1, 4)]


def test_only_more_steps_extend_a_finished_run(tmp_path: Path) -> None:
    folder, saved = finished_run(tmp_path / "run")
    assert is_finished(folder.read_events())
    assert plan_continuation(folder, None, 8, saved) == Continuation()
    goes_on = plan_continuation(folder, None, 20, saved)
    assert goes_on == Continuation(extends=8)
    with pytest.raises(ConfigError, match="has made 8 steps"):
        plan_continuation(folder, None, 7, saved)
    apply_continuation(folder, goes_on, 20, saved)
    assert not is_finished(folder.read_events()), "its agents have something to do"


def test_what_a_run_goes_back_from_is_kept_and_counts_no_longer(tmp_path: Path) -> None:
    folder, saved = finished_run(tmp_path / "run")
    assert plan_continuation(folder, 8, 8, saved) == plan_continuation(folder, "last", 8, saved) == Continuation()
    goes_on = plan_continuation(folder, 4, 6, saved)
    assert goes_on == Continuation(back_to=4, last=8)
    apply_continuation(folder, goes_on, 6, saved)
    events = folder.read_events()
    assert not is_finished(events) and [save["step"] for save in saves_that_count(events)] == [4]
    assert [r["step"] for r in read_records(folder.metrics(0))] == [1, 2, 3, 4]
    assert not (folder.checkpoints / "step_8").exists() and (folder.aside / "0001" / "checkpoints" / "step_8").is_dir()
    goodput = measure_goodput(folder, events)
    assert goodput is not None
    assert goodput.seconds == pytest.approx({"steps": 4.0, "lost": 4.0}), "time that was used stays used"


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path: Path) -> None:
    folder, saved = finished_run(tmp_path / "run", steps=12)
    with pytest.raises(ConfigError, match="4, 8, 12") as refusal:
        plan_continuation(folder, 9, 12, saved)
    assert refusal.value.fix == "resume_from=8"
    with pytest.raises(ConfigError, match="none has no checkpoint"):
        plan_continuation(RunFolder(tmp_path / "none"), "last", 12, [])


@pytest.mark.parametrize(("ended", "alive"), [(False, True), (True, False)])
def test_a_run_that_is_worked_on_does_not_go_back(ended: bool, alive: bool, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    attempt = folder.create_attempt()
    machine = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    rank = {"rank": 0, "pid": os.getpid(), "machine": machine, "host": socket.gethostname()}
    write_json(folder.environment(attempt), {"time": time.time(), "ranks": [rank]})
    if ended:
        folder.record_event("stopped", attempt=attempt)
    if alive:
        with pytest.raises(ConfigError, match=f"process {os.getpid()}"):
            refuse_alive(folder)
    else:
        refuse_alive(folder)


def test_a_job_that_comes_back_from_the_queue_does_not_go_back_again() -> None:
    typed = ["fresh=false", "resume_from=4", "optim.max_steps=8"]
    assert "resume_from=4" in job_overrides(typed, {"SLURM_JOB_NUM_NODES": "1"})
    assert "resume_from=4" not in job_overrides(typed, {"SLURM_JOB_NUM_NODES": "1", "SLURM_RESTART_COUNT": "1"})


def test_the_schedule_of_an_extended_run_is_said_in_figures() -> None:
    config = OptimConfig(max_steps=20, global_batch=1, max_micro_batch=1, lr=3e-4, min_lr=0.0, warmup_steps=0)
    # Half of a cosine of 20 steps is over at step 10; one more is cos(11/20 pi).
    assert describe_extended_schedule(config, 10).startswith("learning rate 0 at step 10, 0.000127 at step 11")
