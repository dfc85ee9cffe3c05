"""The breakdown of a step: intervals against brute force and closed forms, and the steps of a real run."""

from __future__ import annotations

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch.autograd import DeviceType

from gpt.train import train
from gpt.training.diagnostics import MARK, Interval, StepBreakdown, break_down, classify
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.records import read_records
from launch.worker import Run as Rank
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import TINY, start


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
