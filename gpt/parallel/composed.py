"""A model spread along several dimensions of a grid of ranks: sharded or copied over the data ranks.

Owns the order in which the ways are applied (inner ones first), and what all of them share: gradients that are summed
over the ranks that saw other tokens, and a norm in which every element counts once. Each way is a module of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from gpt.batch import Batch
from gpt.config import Strategy, TrainConfig
from gpt.model.gpt import GPT
from gpt.optim import scale_to, squares_of_parts
from gpt.parallel.expert import deal_out, dealt_out, shard_experts
from gpt.parallel.fsdp import shard
from gpt.parallel.mesh import build_mesh, copies_mesh, expert_grid, shard_mesh
from gpt.parallel.native import NativeEngine
from gpt.parallel.world import World
from gpt.topology import Topology

BUCKET_BYTES = 32 * 2**20
"""As much is sent at once: more hides the latency, and is held twice meanwhile."""


class ComposedEngine(NativeEngine):
    """A model cut along the dimensions of the grid, whose parameters the data ranks shard (fsdp) or copy (ddp).

    A sequence that ``cp`` ranks share gives each of them a part of the gradient, so there they count as data ranks.

    Copies sum their gradients here, after the last pass, without DistributedDataParallel: that wants every parameter on
    one kind of mesh, and a pipeline's schedule would call it for one stage while another still computes.
    """

    def __init__(self, model: GPT, config: TrainConfig, world: World, layout: Topology, batch: Batch) -> None:
        timeout_s = config.parallel.timeout_s
        self.grid = build_mesh(layout, world, timeout_s)
        self._sharded = config.parallel.strategy is Strategy.fsdp
        self._summed: list[tuple[list[nn.Parameter], dist.ProcessGroup]] = []
        """Parameters whose gradients are summed here, and over which ranks."""
        data = self.grid
        if layout.ep > 1:
            data = expert_grid(self.grid, layout, world, timeout_s)
            deal_out(model, data["ep"], averaged=self._sharded)
        if self._sharded:
            if layout.ep > 1:
                shard_experts(model, shard_mesh(data, world, timeout_s, "edp"), config, layout)
            shard(model, list(model.blocks), shard_mesh(self.grid, world, timeout_s), config)
        else:
            dealt = dealt_out(model) if layout.ep > 1 else []
            rest = [p for p in model.parameters() if not any(p is other for other in dealt)]
            for chosen, grid in ((rest, self.grid), (dealt, data)):
                self._summed.append((chosen, copies_mesh(grid, world, timeout_s).get_group()))
        averaged = layout.data_ranks * layout.cp if self._sharded else 1
        super().__init__(model, model, config, world, layout, batch, averaged)

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_pass: Callable[[], None]) -> Tensor:
        loss_sum = super().backward(tokens_BT, targets_BT, on_pass)
        for parameters, group in self._summed:
            sum_over([local(p.grad) for p in parameters if p.grad is not None], group)
        return loss_sum

    def one_pass(self, last: bool) -> AbstractContextManager[object]:
        if isinstance(self.module, FSDPModule):
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


def sum_over(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Add tensors up over the ranks of a group, in place, ``BUCKET_BYTES`` at a time."""
    bucket: list[Tensor] = []
    for tensor, following in zip(tensors, [*tensors[1:], None], strict=True):
        bucket.append(tensor)
        if following is None or following.dtype != tensor.dtype or sum(t.nbytes for t in bucket) >= BUCKET_BYTES:
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat, group=group)
            for part, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                part.copy_(values.view_as(part))
            bucket = []


def share_of(grad: Tensor, ranks: int) -> float:
    """One over the number of ranks, out of ``ranks``, that hold the same part of this gradient."""
    if not isinstance(grad, DTensor):
        return 1 / ranks
    # FSDP2 cuts what was cut before into strided shards, which are no Shard to Python.
    cut = [i for i, placement in enumerate(grad.placements) if not placement.is_replicate()]
    return math.prod(grad.device_mesh.size(i) for i in cut) / ranks


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
