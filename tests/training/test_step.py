"""A step: freed memory, waits for the device, the loss scale of fp16, and the loss without whole logits."""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import FlopCounterMode

from gpt.config import OptimConfig
from gpt.model import layers
from gpt.model.gpt import GPT, initialize, summed_loss
from gpt.parallel import engine, nd
from gpt.parallel import engine as module
from gpt.parallel.distributed import PendingSum, World
from gpt.parallel.engine import LossScale, skipping
from gpt.parallel.optimizer import AdamW, build_optimizer
from gpt.training.diagnostics import Gradients
from gpt.training.guards import is_bad
from gpt.training.run import Run
from gpt.training.step import keep_freed_memory, queue_step
from launch.runs.folder import RunFolder
from launch.runs.process import Phase
from launch.runs.records import StepRecord, read_records
from tests.support.commands import TINY
from tests.support.commands import run as run_command
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, compose, host_waits, plain_loop, save, start, whole
from tests.support.learning import step as learned_step
from tests.support.small_models import small

BLOCK_BYTES = 100_000_000
PAGES = BLOCK_BYTES // 4096


def take_blocks(rank: int, size: int, chosen: dict[str, str]) -> tuple[bool, list[int]]:
    """Whether freed memory is kept, and the page faults of each of three blocks that are taken and freed."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_"))]:
        del os.environ[name]
    os.environ |= chosen
    kept, faults = keep_freed_memory(), []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = bytearray(BLOCK_BYTES)
        del block
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return kept, faults


@pytest.mark.skipif(
    sys.platform != "linux" or "glibc" not in os.confstr("CS_GNU_LIBC_VERSION") or "LD_PRELOAD" in os.environ,
    reason="glibc's own memory only",
)
@pytest.mark.parametrize("chosen", [{}, {"MALLOC_MMAP_MAX_": "65536"}], ids=["kept", "as the user says"])
def test_freed_memory_is_not_asked_of_the_kernel_again(chosen: dict[str, str]) -> None:
    ((told, (first, *later)),) = run_distributed(take_blocks, 1, chosen)
    # Huge pages are found faster; then the figures say nothing, and both are small.
    assert told is not bool(chosen)
    if first > PAGES // 2:
        assert all(faults < PAGES // 100 for faults in later) is (not chosen)


def test_adamw_is_fused_and_steps_as_the_plain_one() -> None:
    models = [nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    config = OptimConfig(lr=1e-2, weight_decay=0.1)
    fused = build_optimizer(models[0], config)
    groups = [{k: v for k, v in group.items() if k != "params"} | {"fused": False} for group in fused.param_groups]
    parameters = [[p for p in models[1].parameters() if (p.dim() >= 2) is matrices] for matrices in (True, False)]
    plain = AdamW([{**group, "params": own} for group, own in zip(groups, parameters, strict=True)])
    assert all(group["fused"] for group in fused.param_groups)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        # Gradients of our own: those of a sum of squares behind a norm are rounding, which Adam makes as large as any.
        for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator)
            theirs.grad = mine.grad.clone()
        for optimizer in (fused, plain):
            optimizer.step()
    torch.testing.assert_close(*([*model.parameters()] for model in models), rtol=1e-6, atol=1e-7)


# The host runs ahead of the device: what of a step makes it wait, on a GPU that is not there.


SHARES = (0.5, 0.25, 1.0)


def sharded(device: torch.device) -> list[tuple[str, torch.Tensor, float]]:
    """Gradients of a model of four layers, sharded and replicated in several ways."""
    names = ["token_embedding.weight", *(f"blocks.{i}.ffn.up.weight" for i in range(4)), "norm.weight"]
    return [(name, torch.empty(4, 4, device=device), SHARES[i % 3]) for i, name in enumerate(names)]


def world_on(device: torch.device) -> World:
    """A world of one rank, whose sums are there at once."""
    work: Any = SimpleNamespace(wait=lambda: True)
    there = SimpleNamespace(device=device, start_all_reduce=lambda values: PendingSum(values, work))
    return cast(World, there)


def clip_shards(device: torch.device) -> None:
    figures_N = torch.empty(3, dtype=torch.float64, device=device)
    engine.clip_shards(sharded(device), 1.0, world_on(device), figures_N, lambda: None)


def clip_replica(device: torch.device) -> None:
    weight = nn.Parameter(torch.empty(4, 4, device=device))
    weight.grad = torch.empty(4, 4, device=device)
    figures_N = torch.empty(3, dtype=torch.float64, device=device)
    engine.clip_replica([weight], 1.0, world_on(device), figures_N, lambda: None)


def sum_gradients(device: torch.device) -> None:
    Gradients(small(n_layer=4), device).sums(sharded(device))


@pytest.mark.parametrize("part_of_a_step", [clip_shards, clip_replica, sum_gradients])
def test_nothing_between_backward_pass_and_optimizer_waits_for_the_device(part_of_a_step: Any) -> None:
    assert host_waits(part_of_a_step) == []


def test_dispatch_to_experts_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    # The sizes of the exchange are numbers of the host; nothing else of the plan may be read there.
    reads = []

    def read(tensor: torch.Tensor) -> list[list[int]]:
        reads.append(tensor.shape)
        return [[16] * 4, [16] * 4]

    monkeypatch.setattr(FakeTensor, "tolist", read)  # which would ask for each value
    monkeypatch.setattr(nd, "all_to_all", lambda x, *_: x.clone())
    group: Any = SimpleNamespace(size=lambda: 4)

    def plan(device: torch.device) -> None:
        found = nd.plan_dispatch(64, torch.empty(8, dtype=torch.int32, device=device), group, False)
        assert found.order.shape == (64,)

    assert host_waits(plan) == [] and len(reads) == 1


# fp16 with a dynamic loss scale, against a plain loop with torch.amp.GradScaler; every engine skips the same steps.


STEPS, MICRO, GROWTH_INTERVAL, HIGH = 8, 4, 2, 2.0**19
"""Gradients overflow at the scale ``HIGH``, and again where it has grown."""
WORDS = ("precision=fp16", f"optim.max_micro_batch={MICRO}", "optim.lr=3e-3", *MODELS["experts"])
ENGINES = {
    "ddp": (2, False),
    "zero1": (1, False),
    "fsdp": (2, True),
    "pp parallel.pp=2": (1, False),
    "ep parallel.ep=2": (1, False),
}
"""Parallelism on two ranks; the factor of its gradients before they are averaged over ranks, with which they overflow
earlier; and True where it computes with weights of 16 bits, whose gradients overflow earlier as well."""
RESUMED = ("cp parallel.cp=2", "zero1", "fsdp")
CROSSED = {"zero1": "fsdp"}
"""A checkpoint of each goes on under the other, with its loss scale."""


def plain_loops(rank: int, size: int, folder: Path, kinds: list[tuple[int, bool]]) -> dict[Any, dict[str, Any]]:
    found = {}
    for factor, casts in kinds:
        scaler = torch.amp.GradScaler("cpu", init_scale=HIGH, growth_interval=GROWTH_INTERVAL)
        found[factor, casts] = plain_loop(compose(*WORDS), folder.parent / "cache", STEPS, MICRO, factor, casts, scaler)
    return found


def record_of(run: Run) -> StepRecord:
    record, _ = queue_step(run, None, Phase.training).finish(0.0)
    assert run.guard.judge(record) is None
    return record


def begin(rank: int, size: int, folder: Path, *words: str) -> Run:
    run = start(rank, size, folder, *words)
    if not run.step:
        run.engine.loss_scale.load({"scale": HIGH, "steps": 0})
    return run


def figures_of(records: list[StepRecord]) -> dict[str, Any]:
    return {
        "losses": [r.loss for r in records],
        "norms": [r.grad_norm for r in records],
        "scales": [r.loss_scale for r in records],
        "skipped": [r.skipped_steps for r in records],
    }


def learn(rank: int, size: int, folder: Path, names: list[str]) -> dict[str, dict[str, Any]]:
    found = {}
    with mock.patch.object(module, "GROWTH_INTERVAL", GROWTH_INTERVAL):
        for name in names:
            run = begin(rank, size, folder / name, *WORDS, *f"parallel={name}".split())
            records = [record_of(run) for _ in range(STEPS)]
            found[name] = figures_of(records) | {"weights": whole(run, dict(run.engine.module.named_parameters()))}
    return found


def assert_close(found: dict[str, Any], expected: dict[str, Any], name: str) -> None:
    """Check that the same steps were skipped, and that the rest agrees to the digits of fp16."""
    assert found["norms"] == [None if n is None else pytest.approx(n, rel=0.02) for n in expected["norms"]], name
    assert found["losses"] == pytest.approx(expected["losses"], rel=2e-3), name
    for parameter, weight in expected["weights"].items():
        error = (found["weights"][parameter].float() - weight).norm() / weight.norm()
        assert error < 0.02, f"{name}: {parameter} {error:.1e}"


def test_every_engine_skips_and_learns_as_a_plain_loop_with_torchs_scaler(tmp_path: Path) -> None:
    kinds = sorted(set(ENGINES.values()))
    references = run_distributed(plain_loops, 1, tmp_path / "runs", kinds)[0]
    found = run_distributed(learn, 2, tmp_path / "runs", list(ENGINES), timeout_s=300)
    for name, kind in ENGINES.items():
        expected = references[kind]
        for rank, told in enumerate(found):
            for what in ("scales", "skipped"):
                assert told[name][what] == expected[what], f"{name}, rank {rank}: {what}"
        assert_close(found[0][name], expected, name)
    for expected in references.values():
        assert 1 < expected["skipped"][-1] < STEPS - 2, "it overflows twice, and learns"


def go_on(rank: int, size: int, folder: Path, names: list[str]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Figures before a checkpoint, after it, and of the runs that go on from it."""
    found = {}
    dense = ("precision=fp16", f"optim.max_micro_batch={MICRO}", *MODELS["untied, grouped queries"])
    with mock.patch.object(module, "GROWTH_INTERVAL", GROWTH_INTERVAL):
        for name in names:
            run = begin(rank, size, folder / name, *dense, *f"parallel={name}".split())
            before = figures_of([record_of(run) for _ in range(5)])
            save(run)
            to_come = figures_of([record_of(run) for _ in range(2)])
            for other in filter(None, (name, CROSSED.get(name))):
                again = begin(rank, size, folder / name, *dense, *f"parallel={other}".split())
                assert again.step == 5
                found[name, other] = [before, to_come, figures_of([record_of(again) for _ in range(2)])]
    return found


def expected_scales(norms: list[float | None]) -> list[float]:
    """The scale of each step, and of the one after, by torch's scaler where these steps overflow."""
    scaler = torch.amp.GradScaler("cpu", init_scale=HIGH, growth_interval=GROWTH_INTERVAL)
    parameter = torch.nn.Parameter(torch.zeros(()))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    scales = [scaler.get_scale()]
    for norm in norms:
        scaler.scale(parameter * (math.inf if norm is None else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        scales.append(scaler.get_scale())
    return scales


def test_a_resumed_run_has_the_same_scale_and_goes_on_bit_for_bit(tmp_path: Path) -> None:
    found = run_distributed(go_on, 2, tmp_path / "runs", list(RESUMED), timeout_s=400)
    assert len(found[0]) == len(RESUMED) + len(CROSSED)
    for told in found:
        for (name, other), (before, to_come, again) in told.items():
            if name == other:
                assert again == to_come, name
            else:
                assert again["scales"][0] == to_come["scales"][0], (name, other)
                assert again["losses"][0] == pytest.approx(to_come["losses"][0], rel=2e-3)
            norms, scales = before["norms"] + to_come["norms"], before["scales"] + to_come["scales"]
            assert before["skipped"] + to_come["skipped"] == [norms[: i + 1].count(None) for i in range(7)], name
            assert None in norms and any(norms), f"{name} has skipped, and learned"
            assert scales == expected_scales(norms)[:-1], name


def test_gradients_that_overflow_without_a_scale_end_the_run(tmp_path: Path) -> None:
    overflowing = [StepRecord(1, 1, 2.0, 1e-3, None, 8, (0, 1), 0.1, loss_scale=scale) for scale in (None, 1.0, 2.0)]
    assert [is_bad(record) for record in overflowing] == [True, True, False]
    scale = LossScale(torch.device("cpu"))
    scale.load({"scale": 2.0, "steps": 0})
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.full((2,), math.nan)
    for _ in range(2):
        with skipping(optimizer, torch.tensor(True)):
            optimizer.step()
        scale.update(torch.tensor(True))
        assert scale.state() == {"scale": 1.0, "steps": 0}, "never below its least"
    assert torch.equal(parameter, torch.ones(2)) and optimizer.state[parameter]["step"] == 0
    scale.unscale([parameter.grad])


def test_scale_and_skipped_steps_are_in_the_records_and_the_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    words = (*TINY, "precision=fp16", "optim.max_steps=2")
    run_command("gpt.train", *words, f"run_dir={folder.path}", cwd=tmp_path)
    records = read_records(folder.metrics(0))
    assert [(r["loss_scale"], r["skipped_steps"]) for r in records] == [(2.0**16, 0)] * 2
    assert json.loads(folder.run_json.read_bytes())["summary"]["skipped_steps"] == 0
    assert "loss_scale,skipped_steps" in folder.steps_csv.read_text()


# A loss without whole logits: the value and the gradients of torch's own, on one rank and on several.


SMALL = {"cpu": 700}
"""Logits of a chunk: two rows of the padded vocabulary, of which there are 96."""
VOCAB = ("model.vocab_size=257", "model.vocab_multiple=64", "chunked_loss=true")


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-6), ("bf16", 2e-2)])
def test_it_has_the_value_and_the_gradients_of_torch(tied: str, precision: str, tolerance: float) -> None:
    config = compose(*VOCAB, f"model.tie_embeddings={tied}", f"precision={precision}")
    model = GPT(config.model)
    initialize(model, 3)
    ids_BT1 = torch.randint(257, (6, 17), generator=torch.Generator().manual_seed(1))
    tokens_BT, targets_BT = ids_BT1[:, :-1], ids_BT1[:, 1:].clone()
    targets_BT[0, 3:9] = targets_BT[5] = -1
    expected = F.cross_entropy(model(tokens_BT).flatten(0, 1), targets_BT.flatten(), ignore_index=-1, reduction="sum")
    theirs = torch.autograd.grad(expected / 64, [*model.parameters()])
    largest = []

    def note(logits_RV: Tensor, targets_R: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
        largest.append(logits_RV.numel())
        return layers.loss_and_gradient(logits_RV, targets_R, vocab_size)

    model.chunk_loss = note
    with mock.patch.object(layers, "LOGITS_AT_ONCE", SMALL):
        found = summed_loss(model, config, tokens_BT, targets_BT, torch.device("cpu"))
        ours = torch.autograd.grad(found / 64, [*model.parameters()])
        with torch.no_grad(), FlopCounterMode(display=False) as counted:
            alone = summed_loss(model, config, tokens_BT, targets_BT, torch.device("cpu"))
    assert len(largest) == 96 and max(largest) <= SMALL["cpu"]
    assert torch.equal(alone, found.detach())
    head = 2 * 96 * config.model.padded_vocab * config.model.n_embd
    with torch.no_grad(), FlopCounterMode(display=False) as whole:
        model(tokens_BT)
    assert counted.get_total_flops() == whole.get_total_flops() >= head, "an evaluation computes no gradients"
    torch.testing.assert_close(found, expected, rtol=tolerance / 10, atol=0)
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=tolerance)


def steps(rank: int, size: int, folder: Path) -> dict[str, list[float]]:
    """Loss and gradient norm of three steps under each engine, with whole logits and without."""
    found = {}
    for name, words in CHUNKED.items():
        for chunked in ("false", "true"):
            with mock.patch.object(layers, "LOGITS_AT_ONCE", SMALL):
                run = start(rank, size, folder / name / chunked, *words, *VOCAB, f"chunked_loss={chunked}")
                records = [learned_step(run) for _ in range(3)]
            found[f"{name} {chunked}"] = [float(value) for record in records for value in record]
    return found


CHUNKED = {
    "ddp": ["parallel=ddp", "optim.max_micro_batch=2"],
    "zero1": ["parallel=zero1"],
    "fsdp": ["parallel=fsdp", "model.tie_embeddings=true"],
    "cp": ["parallel.cp=2"],
    "packed": ["parallel=fsdp", "data.pack=documents", "data.document_end=10"],
}


def test_every_engine_learns_as_with_whole_logits(tmp_path: Path) -> None:
    for found in run_distributed(steps, 2, tmp_path / "runs"):
        for name in CHUNKED:
            assert found[f"{name} true"] == pytest.approx(found[f"{name} false"], rel=2e-6), name
