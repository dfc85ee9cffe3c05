"""Slow ranks that are named while a run goes on: the judgement, and a real run whose last rank sleeps."""

from __future__ import annotations

import socket
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gpt.train import train
from gpt.training.health import StragglerJudge
from launch.errors import ConfigError
from launch.runs.events import straggling_ranks
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.slurm.status import find_run_status
from launch.status import as_dict, notes
from launch.worker import Run as Rank
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import TINY, start

LATE_S = 0.4
"""Far above what a step of this model takes on a busy machine."""
WINDOW = 3


def test_a_rank_is_slow_against_the_median_of_the_others_over_the_window() -> None:
    """Of random times, against the definition; a rank that is slow is told once, and once when it is no more."""
    chance = np.random.default_rng(7)
    times = chance.uniform(0.8, 1.2, (300, 5))
    times[60:160, 3] *= 1.5
    times[200:, 0] *= 1.7
    judge, slow, told = StragglerJudge(1.3, 10), set(), []
    for step, of_step in enumerate(times):
        found = judge.add(of_step.tolist())
        told += [(one.rank, one.is_slow) for one in found]
        slow = slow | {one.rank for one in found if one.is_slow} - {one.rank for one in found if not one.is_slow}
        slow -= {one.rank for one in found if not one.is_slow}
        if step < 9:
            assert not found
            continue
        means = times[step - 9 : step + 1].mean(0).tolist()
        for rank, mean in enumerate(means):
            ratio = mean / statistics.median(means[:rank] + means[rank + 1 :])
            assert rank in slow if ratio > 1.3 else True
            assert rank not in slow if ratio < 1.15 else True
    assert told == [(3, True), (3, False), (0, True)]


@pytest.mark.parametrize("ranks", [2, 3, 1024])
def test_one_slow_rank_of_any_number_is_found(ranks: int) -> None:
    judge = StragglerJudge(1.2, 3)
    times = [1.0] * ranks
    times[ranks // 2] = 1.21
    found = [judge.add(times) for _ in range(5)]
    assert [[one.rank for one in of_step] for of_step in found] == [[], [], [ranks // 2], [], []]
    assert found[2][0].own_s == pytest.approx(1.21) and found[2][0].median_s == 1.0


def run_with_a_slow_rank(rank: int, size: int, folder: Path) -> None:
    words = [*TINY, "parallel=ddp", "optim.max_micro_batch=8", "optim.max_steps=14", "checkpoint.interval=0"]
    run = start(rank, size, folder, *words, f"logging.straggler_window={WINDOW}", "logging.tensorboard=true")
    run.worker = Rank(rank, rank, size)
    run.worker.open_folder(run.folder.path, run.attempt)
    run.hosts = ("first-host", socket.gethostname())
    if rank == size - 1:
        run.engine.module.register_forward_pre_hook(lambda *_: time.sleep(LATE_S))
    train(run)
    run.world.gather(None)


def test_a_rank_that_sleeps_is_named_while_the_run_goes_on(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # the ranks need none

    run_distributed(run_with_a_slow_rank, 2, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    events = folder.read_events()
    event = next(e for e in events if e["event"] == "straggler" and e["rank"] == 1)
    assert (event["rank"], event["host"], event["steps"]) == (1, socket.gethostname(), WINDOW)
    assert event["own_s"] >= LATE_S and event["own_s"] > 1.2 * event["median_s"]
    assert events.index(event) < [e["event"] for e in events].index("finished")
    records = read_records(folder.metrics(0))
    assert any(r["slowest_rank"] == 1 for r in records if "slowest_rank" in r)
    assert all(r["own_max_s"] >= LATE_S and r["own_min_s"] <= r["own_max_s"] for r in records if "own_max_s" in r)
    assert "own_max_s" in records[-1] and not any("own_max_s" in r for r in read_records(folder.metrics(1)))
    board = EventAccumulator(str(folder.tensorboard), size_guidance={"tensors": 0}).Reload()
    told = {text.step: str(text.tensor_proto.string_val[0]) for text in board.Tensors("stragglers")}
    assert f"rank 1 on {socket.gethostname()} is slow" in told[event["step"]]


def test_status_names_the_slow_ranks_of_the_attempt_that_runs(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "sweep" / "nodes=2")
    folder.create_attempt()
    told: dict[str, Any] = {"attempt": 1, "step": 40, "own_s": 0.13, "median_s": 0.1, "steps": 20}
    folder.record_event("started", attempt=1)
    folder.record_event("straggler", rank=17, host="node-3", **told)
    folder.record_event("straggler", rank=2, host="node-1", **told)
    folder.record_event("straggler_ended", rank=2, host="node-1", **told)
    lines = notes(as_dict(find_run_status(folder)))
    expected = "rank 17 on node-3 is slow: 130.0 ms of its own a step, and the median 100.0 ms (over 20 steps up to 40)"
    assert any(line.endswith(expected) for line in lines) and not any("rank 2" in line for line in lines)
    folder.record_event("started", attempt=2)
    assert straggling_ranks(folder.read_events()) == []


def test_a_factor_that_names_everybody_is_refused() -> None:
    for factor in ("1", "0.5", "-2"):
        with pytest.raises(ConfigError, match=r"logging\.straggler_factor=1\.2"):
            config_from([f"logging.straggler_factor={factor}"]).validate()
    config_from(["logging.straggler_factor=0"]).validate()
