"""The host runs ahead of the device: what of a step makes it wait, on a GPU that is not there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from gpt.parallel import engine, nd
from gpt.parallel.distributed import PendingSum, World
from gpt.training.diagnostics import Gradients
from tests.support.learning import host_waits
from tests.support.small_models import small

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
