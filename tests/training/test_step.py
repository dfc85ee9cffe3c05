"""What the host does in a step: it keeps freed memory, and waits for no device."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from gpt.config import OptimConfig
from gpt.model.gpt import GPT
from gpt.parallel import engine, nd
from gpt.parallel.distributed import PendingSum, World
from gpt.parallel.optimizer import AdamW, build_optimizer
from gpt.training.diagnostics import Gradients
from gpt.training.step import keep_freed_memory
from tests.support.distributed import run_distributed
from tests.support.learning import MODELS, host_waits, start
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


def wrapped(rank: int, size: int, folder: Path) -> bool:
    """Tell whether the engine of a plain run calls the model itself."""
    run = start(rank, size, folder, *MODELS["tied"], "parallel=ddp")
    return isinstance(run.engine.module, GPT)


@pytest.mark.parametrize("ranks", [1, 2])
def test_one_rank_calls_the_model_itself(ranks: int, tmp_path: Path) -> None:
    assert run_distributed(wrapped, ranks, tmp_path / "runs") == [ranks == 1] * ranks


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
