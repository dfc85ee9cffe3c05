"""When a checkpoint is due: the interval as it is typed, and the one that follows from failures and saves."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from typing import Any

import pytest

from gpt.config.optim import CheckpointConfig, Interval
from gpt.planning.memory import staging_bytes
from gpt.training.checkpoints import FIRST_S, LEAST_S, PRIOR_S, auto_interval_s, between_failures_s
from gpt.workload.plan import checkpoint_text
from launch.errors import ConfigError
from launch.runs.events import best_interval_s, skipped_text, unsaved_text
from launch.status import status_notes
from tests.support.commands import TINY
from tests.support.composing import config_from


@pytest.mark.parametrize(
    ("typed", "interval", "text"),
    [
        (20, Interval(steps=20), "every 20 steps"),
        ("20", Interval(steps=20), "every 20 steps"),
        (0, Interval(steps=0), "at the end"),
        ("30min", Interval(minutes=30), "every 30 minutes"),
        ("0.5 min", Interval(minutes=0.5), "every 0.5 minutes"),
        ("auto", Interval(), "as often as failures ask for"),
    ],
)
def test_an_interval_is_steps_minutes_or_auto(typed: Any, interval: Interval, text: str) -> None:
    config = CheckpointConfig(interval=typed, keep_last=1)
    config.validate()
    assert config.every() == interval and str(interval) == text


@pytest.mark.parametrize("typed", ["often", "-1", "0min", "10s", "1.5"])
def test_another_interval_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        CheckpointConfig(interval=typed, keep_last=1).validate()
    assert "checkpoint.interval" in refusal.value.found and typed in refusal.value.found


def test_the_keys_are_composed() -> None:
    config = config_from([*TINY, "checkpoint.interval=30min", "checkpoint.keep_best=2"])
    assert config.checkpoint.every() == Interval(minutes=30)
    assert config.checkpoint.asynchronous and config.checkpoint.give_up_after_min == 60


def lost_share(interval_s: float, save_s: float, mtbf_s: float, generator: random.Random) -> float:
    """Share of the time of a simulated run that saves and failures cost."""
    useful = spent = 0.0
    while spent < 3e4 * mtbf_s:
        left = generator.expovariate(1 / mtbf_s)
        segments = int(left // (interval_s + save_s))
        useful += segments * interval_s
        spent += left
    return 1 - useful / spent


def test_youngs_interval_loses_least() -> None:
    save_s, mtbf_s = 20.0, 10_000.0
    best = best_interval_s(save_s, mtbf_s)
    assert math.isclose(best, 632.5, rel_tol=1e-3)
    lost = {f: lost_share(f * best, save_s, mtbf_s, random.Random(0)) for f in (0.4, 1.0, 2.5)}
    assert lost[1.0] < lost[0.4] and lost[1.0] < lost[2.5]


def test_the_time_between_failures_is_read_from_the_event_log() -> None:
    events: list[dict[str, Any]] = [{"event": "submitted", "time": 0.0}]
    for attempt, cause in enumerate(["crashed", "preempted", "node_failed"], start=1):
        begun = 100_000.0 * attempt
        events.append({"event": "started", "attempt": attempt, "time": begun})
        if cause == "crashed":
            events.append({"event": "rank_failed", "attempt": attempt, "time": begun + 3500})
        events.append({"event": "attempt_ended", "attempt": attempt, "cause": cause, "time": begun + 3600})
    events.append({"event": "started", "attempt": 4, "time": 400_000.0})
    assert between_failures_s(events, 401_200.0) == (3 * 3600 + 1200 + PRIOR_S) / 3
    assert between_failures_s([], 0.0) == PRIOR_S


def test_auto_follows_the_last_save_and_is_never_shorter_than_it_takes() -> None:
    assert auto_interval_s([], 0.0) == FIRST_S
    saved = {"event": "saved", "attempt": 1, "time": 0.0, "step": 1, "seconds": 2.0}
    assert auto_interval_s([saved], 0.0) == best_interval_s(2.0, PRIOR_S)
    assert auto_interval_s([saved | {"write_s": 900.0}], 0.0) == 900.0
    assert auto_interval_s([saved | {"seconds": 0.001}], 0.0) == LEAST_S


def test_status_and_plan_say_that_nothing_can_be_saved() -> None:
    failed = {"event": "save_failed", "time": 0.0, "step": 7, "cause": "rank 1: OSError: [Errno 28] No space left"}
    saved = {"event": "saved", "time": 0.0, "step": 3}
    assert unsaved_text([saved]) is None and unsaved_text([failed, saved]) is None
    told = unsaved_text([saved, failed, failed | {"step": 9}])
    assert told is not None and "(tried 2 times)" in told and told.endswith("No space left")


def test_status_says_that_steps_change_no_weights_or_were_taken_back() -> None:
    def skipped(step: int) -> dict[str, Any]:
        return {"event": "step_skipped", "attempt": 1, "step": step, "cause": "loss not finite"}

    started = {"event": "started", "attempt": 1}
    assert skipped_text([]) is None and skipped_text([started, skipped(2), started]) is None
    assert skipped_text([started, skipped(2)]) == "steps skipped 1 time in this attempt, last step 2: loss not finite"
    back = {"event": "rolled_back", "step": 4, "first": 6, "last": 7, "cause": "2 steps in a row"}
    told = skipped_text([started, skipped(6), skipped(7), back])
    assert told is not None and status_notes({"label": "run", "state": "running", "skipped": told}) == [f"run: {told}"]
    assert told.startswith("steps skipped 2 times") and told.endswith("last to step 4: 2 steps in a row")


def test_the_plan_counts_the_memory_that_checkpoints_are_staged_in() -> None:
    config = config_from(TINY)
    whole = staging_bytes(config, 1)
    assert staging_bytes(config, 4) == -(-whole // 4)
    assert f"{whole / 2**30:.3f} GiB of host memory per rank" in checkpoint_text(config, 1)
    waited_for = replace(config, checkpoint=replace(config.checkpoint, asynchronous=False))
    assert staging_bytes(waited_for, 1) == 0 and "each waited for" in checkpoint_text(waited_for, 1)
    zero = config_from([*TINY, "parallel=zero2"])
    assert staging_bytes(zero, 4) > staging_bytes(config, 4) and "DeepSpeed's own files" in checkpoint_text(zero, 4)
