"""Records of steps, their files and views, and the breakdown of a step by torch's profiler."""

from __future__ import annotations

import csv
import gc
import json
import math
import random
import re
import resource
import statistics
import struct
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch.autograd import DeviceType

from gpt.accounting import count
from gpt.config import CompileMode, is_installed
from gpt.metrics import architecture_rows, writers
from gpt.metrics.writers import console_line
from gpt.model.gpt import GPT
from gpt.parallel.distributed import World
from gpt.parallel.nd import find_timed_groups
from gpt.topology import ParallelDims
from gpt.train import train
from gpt.training.diagnostics import MARK, Gradients, Interval, StepBreakdown, break_down, classify
from gpt.training.guards import WINDOW, LossWindow
from gpt.training.step import queue_step
from launch.errors import ConfigError
from launch.runs.environment import reachable_files
from launch.runs.event_files import record_scalars
from launch.runs.folder import RunFolder
from launch.runs.process import Phase, lasting_imports
from launch.runs.records import StepRecord, read_records
from launch.worker import Run as Rank
from tests.support.commands import ROOT, run
from tests.support.commands import TINY as LAUNCHED
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.learning import BATCH, MODELS, TINY, start
from tests.support.small_models import LLAMA, loss_of, small

WORDS = (*LAUNCHED, "optim.max_steps=8", "checkpoint.interval=4", "eval.interval=4", "logging.gradients_interval=2")


def test_gradient_figures_are_those_of_the_whole_gradient() -> None:
    """Of one process, whose figures tests/parallel/test_engines.py finds under every engine."""
    config = small(**LLAMA, vocab_size=51, n_layer=2)
    torch.manual_seed(0)
    model = GPT(config)
    loss_of(model, torch.randint(51, (2, 8))).backward()
    whole = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    gradients, told = Gradients(config, torch.device("cpu")), record(1, 1.0)
    gradients.into(told, gradients.sums((name, grad, 1.0) for name, grad in whole.items()).tolist())
    flat = torch.cat([grad.flatten() for grad in whole.values()]).double()
    names = ["token_embedding", "blocks.0", "blocks.1", "norm", "head"]
    parts = [torch.cat([g.flatten() for n, g in whole.items() if n.startswith(f"{name}.")]) for name in names]
    assert told.layer_grad_norms is not None and list(told.layer_grad_norms) == names
    assert [*told.layer_grad_norms.values()] == pytest.approx([part.norm().item() for part in parts], rel=1e-4)
    assert told.grad_mean == pytest.approx(flat.mean().item(), rel=1e-4, abs=1e-9)
    assert told.grad_std == pytest.approx(flat.std(correction=0).item(), rel=1e-4)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose first attempt went on to step 6 without saving again, was lost, and was resumed from step 4."""
    folder = tmp_path_factory.mktemp("views")
    words = (*WORDS, "profile=true", f"run_dir={folder / 'run'}")
    words += ("deterministic=true", "model.dropout=0.1", "recompute=full")
    words += (f"logging.wandb={str(is_installed('wandb')).lower()}",)
    run("gpt.train", *words, cwd=folder, WANDB_MODE="offline")
    there = RunFolder(folder / "run")
    records = read_records(there.metrics(0))
    step_8 = there.checkpoints / "step_00000008"
    step_8.rename(folder / "lost")
    (there.metrics(0)).write_text("".join(json.dumps(r) + "\n" for r in records[:6]))
    with (there.path / "steps.csv").open("a") as file:
        file.write("7,1,torn")
    # The first attempt has started itself again for the seed of its hashes, which takes as long as all else.
    run("gpt.train", *words, cwd=folder, WANDB_MODE="offline", PYTHONHASHSEED="1337")
    return there


def test_the_table_has_one_row_for_each_step(resumed: RunFolder) -> None:
    rows = list(csv.DictReader(resumed.steps_csv.open()))
    records = read_records(resumed.metrics(0))
    assert [(r["step"], r["attempt"]) for r in rows] == [(str(s), "1" if s <= 4 else "2") for s in range(1, 9)]
    assert [float(r["loss"]) for r in rows] == [r["loss"] for r in records]
    assert [bool(r["grad_norm/blocks.1"]) for r in rows] == [step % 2 == 0 for step in range(1, 9)]
    assert all(float(r["memory_peak_gib"]) > 0.05 and not r["memory_reserved_gib"] for r in rows)


def test_the_whole_run_is_in_one_file(resumed: RunFolder) -> None:
    value = json.loads(resumed.run_json.read_bytes())
    assert value["steps"] == read_records(resumed.metrics(0))
    assert value["config"]["optim"]["max_steps"] == 8 and value["startup"]["attempt"] == 2
    assert value["run"]["start_time"] == resumed.read_events()[0]["time"] < value["steps"][0]["time"]
    assert [e["step"] for e in value["evaluations"]] == [4, 8]
    assert [(c["step"], c["attempt"], c["kept"]) for c in value["checkpoints"]] == [(4, 1, True), (8, 2, True)]
    summary = value["summary"]
    assert (summary["state"], summary["attempts"], summary["steps"]) == ("finished", 2, 8)
    assert summary["best_val_loss"] == min(e["val_loss"] for e in value["evaluations"])


def offline_history(path: Path) -> dict[int, dict[str, float]]:
    """The curves in a file that W&B keeps offline, step -> name -> value. It is a log of LevelDB with messages."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, found, begun = path.read_bytes(), {}, b""
    at = 7  # a header of its own
    while at + 7 <= len(data):
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])  # after four bytes of a checksum
        begun += data[at + 7 : at + 7 + size]
        at += 7 + size
        if 32768 - at % 32768 < 7:  # too little left of a block for another piece
            at += 32768 - at % 32768
        if kind in (1, 4):  # a whole message, or the last piece of one
            record, begun = Record.FromString(begun), b""
            if record.HasField("history"):
                items = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                found[record.history.step.num] = {name: json.loads(text) for name, text in items.items()}
    return found


def test_weights_and_biases_has_the_curves_of_every_attempt_under_one_run(resumed: RunFolder) -> None:
    pytest.importorskip("wandb")
    first, second = sorted(resumed.path.glob("wandb/offline-run-*/run-*.wandb"))
    assert first.name == second.name, "the id follows from the folder"
    before, after = offline_history(first), offline_history(second)
    assert list(before) == [*range(1, 9)] and list(after) == [*range(5, 9)]
    records = {record["step"]: record for record in read_records(resumed.metrics(0))}
    for step, curves in after.items():
        known = record_scalars(records[step])
        assert {name: curves[name] for name in known} == known


def test_each_attempt_that_goes_through_the_profiled_steps_has_a_trace_of_them(resumed: RunFolder) -> None:
    for attempt in (resumed.attempt(1), resumed.attempt(2)):  # the second one begins at step 5
        assert (attempt / "trace_rank_00000.json.gz").stat().st_size > 1000
        table = (attempt / "profile_rank_00000.txt").read_text()
        assert "aten::addmm" in table or "aten::mm" in table


def test_the_environment_is_recorded(resumed: RunFolder) -> None:
    for attempt in (1, 2):
        told = json.loads(resumed.environment(attempt).read_bytes())
        assert told["from_step"] == 4 * (attempt - 1)
        assert told["reproducibility"] == {
            "seed": 1337, "PYTHONHASHSEED": "1337", "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
            "deterministic_algorithms": True, "tf32": False,
        }  # fmt: skip
        assert told["counts"]["total"] == told["parameters"]
        environment = told["environment"]
        assert environment["OMP_NUM_THREADS"] == "1"
        # No agent has set what ranks have for the taking; they do so themselves.
        assert environment["open_files"] == reachable_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        assert environment["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
        assert environment["TORCH_GLOO_LAZY_INIT"] == environment["TORCH_NCCL_DUMP_ON_TIMEOUT"] == "1"
        assert environment["TORCH_FR_DUMP_TEMP_FILE"] == f"{resumed.attempt(attempt)}/nccl_trace_rank_"


def test_views_of_short_steps_are_written_together_and_an_evaluation_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(writers, "time", SimpleNamespace(monotonic=lambda: now[0]))
    folder, world = RunFolder(tmp_path), World(0, 1, 0, 1, 0, torch.device("cpu"), None)
    config = config_from(["logging.tensorboard=false"])
    told = writers.MetricWriters(folder, world, Rank(), config, 0, [])
    rows = []
    for step, (seconds, val_loss) in enumerate([(0.2, None), (0.4, None), (0.6, None), (0.7, 2.0), (0.8, None)], 1):
        now[0] = seconds
        known = {"step_time_s": 0.2, "tokens_per_s": 5e6, "val_loss": val_loss}
        told.write(StepRecord(step, 1, 2.0, 1e-3, 1.0, 10, (0, 1), **known))
        rows.append(len(folder.steps_csv.read_text().splitlines()) - 1)
    assert rows == [0, 0, 3, 4, 4]
    told.show()
    assert len(folder.steps_csv.read_text().splitlines()) - 1 == 5
    told.close()


def test_the_share_of_the_bf16_peak_stands_beside_that_of_the_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writers, "describe_rank", lambda world: {"device_name": "NVIDIA H100 80GB HBM3"})
    world = World(1, 2, 1, 2, 0, torch.device("cpu"), None)
    lines = {}
    for words in (["precision=fp32"], ["precision=fp32", "tf32=true"], ["precision=bf16"]):
        told = writers.MetricWriters(RunFolder(tmp_path), world, Rank(), config_from(words), 0, [])
        record = StepRecord(1, 1, 2.0, 1e-3, 1.0, 10, (0, 1), step_time_s=0.5, tokens_per_s=2e6)
        told.write(record)
        assert record.mfu_palm is not None and record.mfu_bf16 is not None
        lines[record.mfu_bf16 / record.mfu_palm] = console_line(record, 1, 0.5)
    ratios = sorted(lines)
    assert ratios == pytest.approx([67 / 989, 494.5 / 989, 1.0])
    assert ["of the bf16 peak" in lines[ratio] for ratio in ratios] == [True, True, False]


def test_the_page_shows_the_lines_of_a_run() -> None:
    page = (ROOT / "docs" / "training.md").read_text()
    record = StepRecord(
        *(60, 1, 2.5533, 2e-4, 0.966, 2048, (0, 1)), step_time_s=0.718, tokens_per_s=2853, memory_peak_gib=0.42,
        val_loss=2.2422, val_bits_per_byte=3.2348, checkpoint_s=0.3,
        tflops_per_s=0.01739, grad_mean=1.365e-06, grad_std=0.001008,
    )  # fmt: skip
    model, figures = config_from([]).model, ["tflops_per_s", "grad_mean", "grad_std", "hfu"]
    config_from([f"logging.console=[{','.join(figures)}]"]).logging.validate()
    assert f"\n{console_line(record, 60, 0.7, figures)}\n```\n" in page
    rows = architecture_rows(model, count(model).as_dict())
    assert all(text in re.sub(r"\n {20}", " ", page) for text in rows.values())
    with pytest.raises(ConfigError, match=r"type next: logging\.console=\[grad_mean\]"):
        config_from(["logging.console=[grad_men]"]).logging.validate()


# The collector of reference cycles rests while imports that stay are made, and is as before afterwards.


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    gc.enable()
    gc.unfreeze()


@pytest.mark.parametrize("was_on", [True, False])
def test_what_was_imported_is_never_looked_at_again(was_on: bool) -> None:
    if not was_on:
        gc.disable()
    with lasting_imports():
        assert not gc.isenabled()
        stays: list[object] = []
        stays.append(stays)  # a cycle, as modules have with their functions
    assert gc.isenabled() is was_on
    assert all(tracked is not stays for tracked in gc.get_objects())


def test_an_import_that_fails_leaves_the_collector_on() -> None:
    with pytest.raises(ModuleNotFoundError), lasting_imports():
        import gpt.there_is_no_such_module  # type: ignore[import-not-found]  # noqa: F401
    assert gc.isenabled()


# The variance of the loss over the last steps, against the standard library's.


def record(step: int, loss: float | None) -> StepRecord:
    return StepRecord(step=step, attempt=1, loss=loss, lr=0.1, grad_norm=1.0, tokens=1, samples=(0, 0), step_time_s=1.0)


def test_the_variance_of_the_last_losses() -> None:
    window, losses = LossWindow(), [5 / (1 + n / 50) + 0.1 * math.sin(7 * n) for n in range(2 * WINDOW)]
    told = []
    for step, loss in enumerate(losses, 1):
        made = record(step, loss)
        window.into(made)
        told.append(made.loss_variance)
        if step == WINDOW:
            window.into(record(step, None))  # a skipped step has no loss
    assert told[: WINDOW - 1] == [None] * (WINDOW - 1)
    for step in (WINDOW, WINDOW + 1, 2 * WINDOW):
        assert told[step - 1] == pytest.approx(statistics.pvariance(losses[step - WINDOW : step]), rel=1e-9)
    window.clear()
    made = record(1, 1.0)
    window.into(made)
    assert made.loss_variance is None, "a run that went back begins anew"


# Breakdown of a step by torch's profiler, and its phases.


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
"""Late part of a step, and the overrides of the run."""
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
