"""ZeRO stage 1: every rank holds model and gradients, and the moments of its part only (arXiv 1910.02054, section 5.1).

Owns the parts. Each parameter is cut along its first dimension like FSDP2's, as a DTensor whose local tensor is a view
of the whole one: the optimizer steps the view, then the ranks gather what the others have stepped. So the state is
stored and resharded like any other, and the arithmetic is element by element that of ddp.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from gpt.config import TrainConfig
from gpt.model.gpt import GPT
from gpt.parallel.ddp import ReplicatedEngine
from gpt.parallel.dtensor import put
from gpt.parallel.mesh import build_mesh
from gpt.parallel.world import World
from gpt.topology.batch import Batch
from gpt.topology.dims import Topology


class Zero1Engine(ReplicatedEngine):
    """DDP, with an optimizer that each rank runs for a part of every parameter."""

    def __init__(self, model: GPT, config: TrainConfig, world: World, layout: Topology, batch: Batch) -> None:
        self._mesh = build_mesh(Topology("zero1", 1, world.size), world, config.parallel.timeout_s)
        self._pairs: list[tuple[nn.Parameter, nn.Parameter]] = []
        """The whole of a parameter, and this rank's part of it."""
        with torch.device("meta"):
            parts = GPT(config.model)
        for name, whole in model.named_parameters():
            part = nn.Parameter(part_of(whole.detach(), self._mesh))
            put(parts, name, part)
            self._pairs.append((whole, part))
        for name, buffer in model.named_buffers():
            put(parts, name, buffer)  # which every rank has and stores whole
        super().__init__(model, config, world, layout, batch, trained=parts)
        self.optimizer.register_step_pre_hook(self._hand_out)
        self.optimizer.register_step_post_hook(self._collect)

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._collect()

    def _hand_out(self, *_: Any) -> None:
        """Give the optimizer this rank's part of the averaged gradients."""
        for whole, part in self._pairs:
            if whole.grad is not None:
                part.grad = part_of(whole.grad, self._mesh)

    @torch.no_grad()
    def _collect(self, *_: Any) -> None:
        """Bring every parameter together from its parts."""
        for whole, part in self._pairs:
            assert isinstance(part, DTensor)
            whole.copy_(part.full_tensor())
            part.grad = None


def part_of(whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """This rank's slice of ``whole`` along its first dimension, as a DTensor over the same memory."""
    chunks = whole.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    local = chunks[rank] if rank < len(chunks) else whole[:0]  # fewer rows than ranks: some have none
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())
