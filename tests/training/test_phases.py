"""Phases of a step: they lie inside of it, and time that a rank waits for another is that rank's communication."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from gpt.training.step import queue_step
from launch.runs.heartbeat import Phase
from tests.support.distributed import run_distributed
from tests.support.learning import TINY, start

LATE_S = 0.15
STEPS = 4


def measure(rank: int, size: int, folder: Path, words: list[str], late: str) -> list[dict[str, Any]]:
    """Records of some steps; the last rank is late in its forward pass, its optimizer, or nowhere."""
    run = start(rank, size, folder, *words)

    def wait(*_: Any) -> None:
        time.sleep(LATE_S)  # is what is measured

    if rank == size - 1:
        if late == "forward":
            run.engine.module.register_forward_pre_hook(wait)
        elif late == "optimizer":
            run.engine.optimizer.register_step_pre_hook(wait)  # type: ignore[attr-defined]
    found, since = [], time.perf_counter()
    for _ in range(STEPS):
        record, since = queue_step(run, None, Phase.training).finish(since)
        found.append(record.own())
    return found


def mean(records: list[dict[str, Any]], name: str) -> float:
    """Mean over all steps but the first, which warms up."""
    return sum(record[name] for record in records[1:]) / (len(records) - 1)


@pytest.mark.parametrize("late", ["forward", "optimizer"])
def test_what_a_rank_waits_for_another_is_its_communication(tmp_path: Path, late: str) -> None:
    words = [*TINY, "parallel=ddp", "optim.max_micro_batch=8"]
    first, last = run_distributed(measure, 2, tmp_path / late, words, late)
    phases = ("forward_backward_s", "comm_s", "optimizer_s")
    for records in (first, last):
        for record in records:
            inside = sum(record[name] for name in phases) + record["data_wait_s"]
            assert all(record[name] >= 0 for name in phases) and inside <= record["step_time_s"] + 1e-6
    own = "forward_backward_s" if late == "forward" else "optimizer_s"
    assert mean(last, own) >= LATE_S and mean(last, own) - mean(first, own) > LATE_S / 2
    assert mean(first, "comm_s") - mean(last, "comm_s") > LATE_S / 2, "it is the one that the other waits for"


@pytest.mark.parametrize("words", ["parallel=fsdp", "parallel=zero1", "parallel=pp parallel.pp=2"])
def test_where_ranks_wait_inside_of_other_phases_communication_is_absent(tmp_path: Path, words: str) -> None:
    typed = [*TINY, *words.split(), "optim.max_micro_batch=4"]
    for records in run_distributed(measure, 2, tmp_path / "run", typed, "nowhere"):
        for record in records:
            assert "comm_s" not in record
            inside = record["forward_backward_s"] + record["optimizer_s"] + record["data_wait_s"]
            assert 0 < inside <= record["step_time_s"] + 1e-6


def test_one_rank_waits_for_nobody(tmp_path: Path) -> None:
    [records] = run_distributed(measure, 1, tmp_path / "run", [*TINY, "optim.max_micro_batch=16"], "nowhere")
    assert "comm_s" not in records[0] and records[0]["forward_backward_s"] > 0
