"""Records of steps, their files and views, and what an attempt prints at its start."""

from __future__ import annotations

import csv
import gc
import json
import math
import resource
import statistics
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from gpt.config.train import is_installed
from gpt.metrics import writers
from gpt.metrics.writers import console_line
from gpt.model.gpt import GPT
from gpt.parallel.distributed import World
from gpt.parallel.dtensor import inverse_replicas, local_tensor
from gpt.training.diagnostics import Gradients
from gpt.training.guards import WINDOW, LossWindow
from launch.runs.environment import reachable_files
from launch.runs.event_files import record_scalars
from launch.runs.folder import RunFolder
from launch.runs.process import lasting_imports
from launch.runs.records import StepRecord, read_records
from launch.worker import Run as Rank
from tests.support.commands import TINY, run
from tests.support.composing import config_from
from tests.support.distributed import run_distributed
from tests.support.small_models import LLAMA, loss_of, small

WORDS = (*TINY, "optim.max_steps=8", "checkpoint.interval=4", "eval.interval=4", "logging.gradients_interval=2")


def measured_both(rank: int, world_size: int) -> list[tuple[list[str], list[float]]]:
    return [measured(rank, world_size, sharded) for sharded in (False, True)]


def measured(rank: int, world_size: int, sharded: bool) -> tuple[list[str], list[float]]:
    """Names and sums of a model whose gradient is the mean over two ranks with a token batch each."""
    torch.manual_seed(0)
    model: nn.Module = GPT(small(**LLAMA, vocab_size=51, n_layer=2))
    if sharded:
        assert isinstance(model, GPT)
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        model = DistributedDataParallel(model)
    backward(model, rank)
    gradients = Gradients(small(**LLAMA, vocab_size=51, n_layer=2), torch.device("cpu"))
    grads = [(name.removeprefix("module."), p.grad) for name, p in model.named_parameters() if p.grad is not None]
    sums = gradients.sums((name, local_tensor(grad), inverse_replicas(grad, world_size)) for name, grad in grads)
    torch.distributed.all_reduce(sums)
    told = record(1, 1.0)
    gradients.into(told, sums.tolist())
    assert told.layer_grad_norms is not None
    return list(told.layer_grad_norms), [told.grad_mean or 0, told.grad_std or 0, *told.layer_grad_norms.values()]


def backward(model: nn.Module, rank: int) -> None:
    tokens_BT = torch.randint(51, (2, 8), generator=torch.Generator().manual_seed(rank))
    loss_of(model, tokens_BT).backward()


def test_gradient_figures_are_those_of_the_whole_gradient_under_ddp_and_fsdp() -> None:
    found, others = run_distributed(measured_both, 2)
    assert others == found, "on every rank"
    torch.manual_seed(0)
    model = GPT(small(**LLAMA, vocab_size=51, n_layer=2))
    for rank in range(2):
        backward(model, rank)
    whole = {name: p.grad / 2 for name, p in model.named_parameters() if p.grad is not None}
    flat = torch.cat([grad.flatten() for grad in whole.values()]).double()
    names = ["token_embedding", "blocks.0", "blocks.1", "norm", "head"]
    parts = [torch.cat([g.flatten() for n, g in whole.items() if n.startswith(f"{name}.")]) for name in names]
    expected = [flat.mean().item(), flat.std(correction=0).item(), *(part.norm().item() for part in parts)]
    for told, values in found:
        assert told == names and values == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose first attempt went on to step 6 without saving again, was lost, and was resumed from step 4."""
    folder = tmp_path_factory.mktemp("views")
    words = (*WORDS, "profile=true", "profile_from=2", f"run_dir={folder / 'run'}")
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


def test_the_steps_asked_for_were_profiled_once(resumed: RunFolder) -> None:
    attempt = resumed.attempt(1)
    assert (attempt / "trace_rank_00000.json.gz").stat().st_size > 1000
    assert (
        "aten::addmm" in (attempt / "profile_rank_00000.txt").read_text()
        or "aten::mm" in (attempt / "profile_rank_00000.txt").read_text()
    )
    assert not list(resumed.attempt(2).glob("*profile*")), "those steps were over"


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
