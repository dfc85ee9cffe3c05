"""Phases of a step: they lie inside of it, and time that a rank waits for another is that rank's communication."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gpt.config.train import CompileMode
from gpt.parallel.nd import find_timed_groups
from gpt.topology import ParallelDims
from gpt.training.step import queue_step
from launch.runs.heartbeat import Phase
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, MODELS, TINY, start

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


def measure_beside(rank: int, size: int, folder: Path, words: list[str]) -> tuple[list[dict[str, Any]], int]:
    """Records of some steps in each of which the host does something else for a while, and how often it did."""
    run = start(rank, size, folder, *words)
    done = []

    def work() -> None:
        time.sleep(LATE_S)  # is what is measured
        done.append(None)

    found, since = [], time.perf_counter()
    for _ in range(STEPS):
        record, since = queue_step(run, None, Phase.training, meanwhile=work).finish(since)
        found.append(record.own())
    return found, len(done)


def is_longer(name: str, here: list[dict[str, Any]], there: list[dict[str, Any]]) -> bool:
    """Tell whether one rank is longer in a phase than the other by what the sleep leaves, in any step but the first.

    The first one warms up; and on a busy machine a rank may be held anywhere for as long, but not in each step.
    """
    return any(mine[name] - other[name] > LATE_S / 2 for mine, other in zip(here[1:], there[1:], strict=True))


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
    assert all(record[own] >= LATE_S for record in last) and is_longer(own, last, first)
    assert is_longer("comm_s", first, last), "it is the one that the other waits for"


@pytest.mark.parametrize(("size", "engine"), [(1, "ddp"), (2, "ddp"), (2, "zero1")])
def test_what_the_host_does_beside_a_step_is_in_none_of_its_phases(tmp_path: Path, size: int, engine: str) -> None:
    words = [*TINY, f"parallel={engine}", "optim.max_micro_batch=8"]
    for records, done in run_distributed(measure_beside, size, tmp_path / "run", words):
        assert done == STEPS
        for record in records:
            phases = ("forward_backward_s", "comm_s", "optimizer_s", "data_wait_s")
            inside = sum(record.get(name, 0.0) for name in phases)
            assert 0 < inside <= record["step_time_s"] - LATE_S + 1e-6


GROUPS = {
    "dp": "parallel=zero1",
    "fsdp": "parallel=fsdp",
    "tp": "parallel=tp parallel.tp=2",
    "cp": "parallel=cp parallel.cp=2",
    "ep": "parallel=ep parallel.ep=2",
}


@pytest.mark.parametrize("group", GROUPS)
def test_a_wait_inside_of_a_pass_is_communication_of_its_group(tmp_path: Path, group: str) -> None:
    words = [*TINY, *GROUPS[group].split(), "optim.max_micro_batch=8", *(MODELS["experts"] if group == "ep" else [])]
    first, last = run_distributed(measure, 2, tmp_path / "run", words, "forward")
    for record in (*first, *last):
        told = {name for name in record if name.startswith("comm_") and name != "comm_s"}
        assert told == {f"comm_{name}_s" for name in {group, *({"dp"} if group in ("cp", "ep") else ())}}
        assert sum(record[name] for name in told) <= record["comm_s"] and "bubble_s" not in record
        inside = sum(record[name] for name in ("forward_backward_s", "comm_s", "optimizer_s", "data_wait_s"))
        assert 0 < inside <= record["step_time_s"] + 1e-6
    assert is_longer("forward_backward_s", last, first)
    assert is_longer(f"comm_{group}_s", first, last)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_stage_that_waits_for_a_slow_one_has_a_bubble(tmp_path: Path, schedule: str) -> None:
    """The last of two stages sleeps in the forward pass of each of four micro-batches; the first one waits for it."""
    micro_batches = BATCH // 4
    words = [*TINY, "parallel=pp", "parallel.pp=2", f"parallel.schedule={schedule}", "optim.max_micro_batch=4"]
    first, last = run_distributed(measure, 2, tmp_path / "run", words, "forward")
    phases = ("forward_backward_s", "comm_s", "bubble_s", "optimizer_s")
    for record in (*first, *last):
        assert all(record[name] >= 0 for name in phases)
        assert sum(record[name] for name in phases) + record["data_wait_s"] <= record["step_time_s"] + 1e-6
    for mine, slow in zip(first, last, strict=True):
        assert slow["forward_backward_s"] >= micro_batches * LATE_S
        # The last stage begins to sleep when the first has passed on a micro-batch, and sleeps before it answers.
        busy = mine["forward_backward_s"] + mine["comm_s"]
        assert mine["bubble_s"] >= micro_batches * LATE_S - busy and mine["bubble_s"] > LATE_S / 2


def test_what_is_compiled_with_its_collectives_or_run_by_deepspeed_tells_no_communication() -> None:
    """Neither lets its waits be seen."""
    tp = ParallelDims("ddp", 1, 1, tp=2)
    config = config_from([*TINY, "parallel=tp", "parallel.tp=2"])
    assert find_timed_groups(config, tp) == ("tp",)
    assert find_timed_groups(replace(config, compile=CompileMode["default"]), tp) is None
    pp = ParallelDims("fsdp", 1, 4, pp=2)
    assert find_timed_groups(replace(config, compile=CompileMode["default"]), pp) == ("fsdp", "pp")


def test_one_rank_waits_for_nobody(tmp_path: Path) -> None:
    [records] = run_distributed(measure, 1, tmp_path / "run", [*TINY, "optim.max_micro_batch=16"], "nowhere")
    assert "comm_s" not in records[0] and records[0]["forward_backward_s"] > 0
