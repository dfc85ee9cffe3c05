"""A model spread along several dimensions of a grid of ranks: sharded or copied over the data ranks.

Owns the order in which the ways are applied (inner ones first), and what all of them share: gradients that are summed
over the ranks that saw other tokens, and a norm in which every element counts once. Each way is a module of its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from gpt.batch import Batch
from gpt.config import Strategy, TrainConfig
from gpt.model.gpt import GPT
from gpt.optim import scale_to, squares_of_parts
from gpt.parallel.fsdp import shard
from gpt.parallel.mesh import build_mesh
from gpt.parallel.native import NativeEngine
from gpt.parallel.world import World
from gpt.topology import Topology


class ComposedEngine(NativeEngine):
    """Every rank holds a slice of each parameter; blocks are gathered one at a time."""

    def __init__(self, model: GPT, config: TrainConfig, world: World, layout: Topology, batch: Batch) -> None:
        assert config.parallel.strategy is Strategy.fsdp
        mesh = build_mesh(layout, world, config.parallel.timeout_s)
        shard(model, list(model.blocks), mesh, config)
        super().__init__(model, model, config, world, layout, batch, averaged=layout.data_ranks)

    def one_pass(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()

    def clip(self, limit: float) -> Tensor:
        parts = [(part, share) for _, part, share in self.gradients()]
        norm = self.world.add_up(squares_of_parts(parts)).sqrt()
        if limit > 0:
            scale_to(limit, norm, [part for part, _ in parts])
        return norm

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name, local(parameter.grad), share_of(parameter.grad, self.world.size)


def share_of(grad: Tensor, ranks: int) -> float:
    """One over the number of ranks, out of ``ranks``, that hold the same part of this gradient."""
    if not isinstance(grad, DTensor):
        return 1 / ranks
    placements = enumerate(grad.placements)
    return math.prod(grad.device_mesh.size(i) for i, placement in placements if isinstance(placement, Shard)) / ranks


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
