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
from launch.runs.process import Phase
from launch.runs.records import read_records
from launch.worker import Run as Rank
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, MODELS, TINY, start


def test_random_intervals_against_a_count_of_every_tick() -> None:
    for seed in range(100):
        chance = random.Random(seed)
        kinds: list[list[Interval]] = []
        for _ in range(3):
            begins = [chance.randrange(-10, 110) for _ in range(chance.randrange(12))]
            kinds.append([(begin, begin + chance.randrange(0, 15)) for begin in begins])
        found = break_down(0, 100, *kinds)
        expected = {"compute": 0, "comm": 0, "exposed": 0, "copies": 0, "idle": 0}
        for tick in range(100):
            compute, communication, copies = (any(a <= tick < b for a, b in intervals) for intervals in kinds)
            expected["compute"] += compute
            expected["comm"] += communication
            expected["copies"] += copies and not compute
            expected["exposed"] += communication and not compute and not copies
            expected["idle"] += not (compute or communication or copies)
        assert found == expected
        assert sum(found.values()) - found["comm"] == 100


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
    assert found == {"compute": 2.0, "comm": 4.0, "exposed": 4.0, "copies": 0.0, "idle": 4.0}


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
STEPS = 3
GROUPS = {
    "dp": "parallel=zero1",
    "fsdp": "parallel=fsdp",
    "tp": "parallel=tp parallel.tp=2",
    "cp": "parallel=cp parallel.cp=2",
    "ep": "parallel=ep parallel.ep=2",
}
STAGES = "parallel=pp parallel.pp=2 optim.max_micro_batch=4 parallel.schedule="
CASES = {
    ("forward", "parallel=ddp"),
    ("optimizer", "parallel=ddp"),
    *(("beside", f"parallel={engine}") for engine in ("ddp", "zero1")),
    *(("forward", words) for words in GROUPS.values()),
    *(("forward", f"{STAGES}{schedule}") for schedule in ("gpipe", "1f1b")),
}
"""What is late, and the words of the run."""
Records = list[dict[str, Any]]
Measured = dict[tuple[str, str], tuple[Records, Records]]
"""Records of both ranks in each case."""


def measure(rank: int, size: int, folder: Path, late: str, words: str) -> Records:
    """Records of some steps; the last rank is late in its forward pass or optimizer, or every host beside the step."""
    model = MODELS["experts"] if "parallel.ep" in words else []
    run = start(rank, size, folder, *TINY, "optim.max_micro_batch=8", *words.split(), *model)
    done: list[None] = []

    def wait(*_: Any) -> None:
        time.sleep(LATE_S)  # is what is measured
        done.append(None)

    if rank == size - 1 and late == "forward":
        run.engine.module.register_forward_pre_hook(wait)
    elif rank == size - 1 and late == "optimizer":
        run.engine.optimizer.register_step_pre_hook(wait)  # type: ignore[attr-defined]
    found, since = [], time.perf_counter()
    for _ in range(STEPS):
        meanwhile = wait if late == "beside" else lambda: None
        record, since = queue_step(run, None, Phase.training, meanwhile=meanwhile).finish(since)
        found.append(record.own())
    assert late != "beside" or len(done) == STEPS
    run.batches.close()
    return found


def measure_all(rank: int, size: int, folder: Path, cases: list[tuple[str, str]]) -> dict[tuple[str, str], Records]:
    return {case: measure(rank, size, folder / str(number), *case) for number, case in enumerate(cases)}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    first, last = run_distributed(measure_all, 2, tmp_path_factory.mktemp("phases"), sorted(CASES), timeout_s=300)
    for case in CASES:
        for record in (*first[case], *last[case]):
            inside = [record.get(n, 0.0) for n in ("forward_backward_s", "comm_s", "bubble_s", "optimizer_s")]
            assert all(seconds >= 0 for seconds in inside), case
            outside = (
                LATE_S if case[0] == "beside" else 0.0
            )  # what the host does beside a step is in none of its phases
            assert 0 < sum(inside) + record["data_wait_s"] <= record["step_time_s"] - outside + 1e-6, case
    return {case: (first[case], last[case]) for case in CASES}


def is_longer(name: str, here: list[dict[str, Any]], there: list[dict[str, Any]]) -> bool:
    """Tell whether one rank is longer in a phase than the other by what the sleep leaves, in any step but the first.

    The first one warms up; and on a busy machine a rank may be held anywhere for as long, but not in each step.
    """
    return any(mine[name] - other[name] > LATE_S / 2 for mine, other in zip(here[1:], there[1:], strict=True))


@pytest.mark.parametrize(("late", "own"), [("forward", "forward_backward_s"), ("optimizer", "optimizer_s")])
def test_what_a_rank_waits_for_another_is_its_communication(measured: Measured, late: str, own: str) -> None:
    first, last = measured[late, "parallel=ddp"]
    assert all(record[own] >= LATE_S for record in last) and is_longer(own, last, first)
    assert is_longer("comm_s", first, last), "it is the one that the other waits for"


@pytest.mark.parametrize("group", GROUPS)
def test_a_wait_inside_of_a_pass_is_communication_of_its_group(measured: Measured, group: str) -> None:
    first, last = measured["forward", GROUPS[group]]
    for record in (*first, *last):
        told = {name for name in record if name.startswith("comm_") and name != "comm_s"}
        assert told == {f"comm_{name}_s" for name in {group, *({"dp"} if group in ("cp", "ep") else ())}}
        assert sum(record[name] for name in told) <= record["comm_s"] and "bubble_s" not in record
    assert is_longer("forward_backward_s", last, first)
    assert is_longer(f"comm_{group}_s", first, last)


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
def test_a_stage_that_waits_for_a_slow_one_has_a_bubble(measured: Measured, schedule: str) -> None:
    """The last of two stages sleeps in the forward pass of each of four micro-batches; the first one waits for it."""
    micro_batches = BATCH // 4
    for mine, slow in zip(*measured["forward", f"{STAGES}{schedule}"], strict=True):
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
    [records] = run_distributed(measure, 1, tmp_path / "run", "beside", "parallel=ddp optim.max_micro_batch=16")
    assert "comm_s" not in records[0] and records[0]["forward_backward_s"] > 0
    assert all(
        record["forward_backward_s"] + record["optimizer_s"] <= record["step_time_s"] - LATE_S for record in records
    )
