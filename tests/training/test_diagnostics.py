"""Breakdown of a step by torch's profiler, and its phases."""

from __future__ import annotations

import random
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.autograd import DeviceType

from gpt.config.train import CompileMode
from gpt.parallel.nd import find_timed_groups
from gpt.topology import ParallelDims
from gpt.train import train
from gpt.training.diagnostics import MARK, Interval, StepBreakdown, break_down, classify
from gpt.training.step import queue_step
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import Phase
from launch.runs.records import read_records
from launch.worker import Run as Rank
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, MODELS, TINY, start


def test_random_intervals_against_a_count_of_every_tick() -> None:
    for seed in range(200):
        chance = random.Random(seed)
        kinds: list[list[Interval]] = []
        for _ in range(3):
            begins = [chance.randrange(-10, 110) for _ in range(chance.randrange(12))]
            kinds.append([(begin, begin + chance.randrange(0, 15)) for begin in begins])
        found = break_down(0, 100, *kinds)
        expected = {"compute": 0, "communication": 0, "exposed": 0, "copies": 0, "idle": 0}
        for tick in range(100):
            compute, communication, copies = (any(a <= tick < b for a, b in intervals) for intervals in kinds)
            expected["compute"] += compute
            expected["communication"] += communication
            expected["copies"] += copies and not compute
            expected["exposed"] += communication and not compute and not copies
            expected["idle"] += not (compute or communication or copies)
        assert vars(found) == expected
        assert found.compute + found.copies + found.exposed + found.idle == 100


def test_traces_whose_answers_are_known() -> None:
    """A reduction of 30 begins 10 before the last of 100 of computing ends; a copy of 5 goes before, 2 are hidden."""
    found = break_down(0.0, 150.0, [(10.0, 60.0), (60.0, 110.0)], [(100.0, 130.0)], [(7.0, 12.0)])
    assert vars(found) == {"compute": 100.0, "communication": 30.0, "exposed": 20.0, "copies": 3.0, "idle": 27.0}
    assert vars(break_down(5.0, 8.0, [], [], [])) == dict.fromkeys(vars(found), 0.0) | {"idle": 3.0}
    hidden = break_down(0.0, 10.0, [(0.0, 10.0)], [(2.0, 9.0)], [(1.0, 3.0)])
    assert (hidden.exposed, hidden.copies, hidden.idle, hidden.communication) == (0.0, 0.0, 0.0, 7.0)


def test_events_are_told_apart_by_device_and_name() -> None:
    on_gpu = {"ncclDevKernel_AllGather_RING_LL": "communication", "Memcpy HtoD (Pinned -> Device)": "copies"}
    on_gpu |= {"Memset (Device)": "copies", "ampere_bf16_s16816gemm": "compute"}
    assert {name: classify(name, True, True) for name in on_gpu} == on_gpu
    assert classify("aten::mm", False, True) == ""
    on_cpu = {
        "gloo:all_reduce": "communication",
        "aten::mm": "compute",
        "FSDP::pre_forward": "",
        "c10d::allreduce_": "",
    }
    assert {name: classify(name, False, False) for name in on_cpu} == on_cpu


def event(name: str, device: DeviceType, begin: int, end: int, annotates: bool = False) -> Any:
    """Make an event as the profiler returns them, with times in seconds."""
    values = {"name": name, "device_type": device, "start_ns": begin * 10**9, "duration_ns": (end - begin) * 10**9}
    values["is_user_annotation"] = annotates
    return SimpleNamespace(**{key: lambda value=value: value for key, value in values.items()})


def test_marks_that_the_profiler_repeats_on_a_gpu_are_no_kernels() -> None:
    """A mark lasts there from the first kernel of what it marks to the last one, with all the pauses between."""
    gpu = DeviceType.CUDA
    kernels = [event("gemm", gpu, 1, 2), event("ncclDevKernel_AllReduce", gpu, 2, 6), event("gemm", gpu, 8, 9)]
    marks = [event(MARK, DeviceType.CPU, 0, 10, True), event(MARK, gpu, 1, 9, True)]
    marks.append(event("nccl:all_reduce", gpu, 1, 8, True))
    watching = StepBreakdown(1, cast("Any", SimpleNamespace(device=SimpleNamespace(type="cuda"))), 0)
    trace = SimpleNamespace(kineto_results=SimpleNamespace(events=lambda: [*kernels, *marks]))
    found = watching._reduce(cast("Any", SimpleNamespace(profiler=trace)))
    assert vars(found) == {"compute": 2.0, "communication": 4.0, "exposed": 4.0, "copies": 0.0, "idle": 4.0}


def run_some_steps(rank: int, size: int, folder: Path) -> None:
    words = ["parallel=fsdp", "optim.max_micro_batch=8", "optim.max_steps=8", "checkpoint.interval=0"]
    run = start(rank, size, folder, *TINY, *words, "logging.breakdown_interval=2", "eval.interval=0")
    run.worker = Rank(rank, rank, size)
    run.worker.open_folder(run.folder.path, run.attempt)
    train(run)
    run.world.gather(None)


def test_every_so_many_steps_one_is_broken_down_on_every_rank(tmp_path: Path) -> None:
    run_distributed(run_some_steps, 2, tmp_path / "run")
    for rank in range(2):
        records = read_records(RunFolder(tmp_path / "run").metrics(rank))
        told = [record for record in records if "breakdown_idle_s" in record]
        assert [record["step"] for record in told] == [4, 6, 8]
        for record in told:
            parts = [record[f"breakdown_{part}_s"] for part in ("compute", "exposed", "idle")]
            assert all(part >= 0 for part in parts) and parts[0] > 0 and "breakdown_copies_s" not in record
            assert record["breakdown_comm_s"] >= record["breakdown_exposed_s"] > 0, "FSDP on a CPU hides nothing"


def test_two_profilers_are_refused() -> None:
    config = config_from(["logging.breakdown_interval=5", "profile=true"])
    with pytest.raises(ConfigError, match=r"logging\.breakdown_interval=0"):
        config.validate()


# Phases of a step: they lie inside of it, and time that a rank waits for another is that rank's communication.


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
