"""FSDP2 (``fully_shard``): parameters, gradients and optimizer state sharded over the ranks (arXiv 2304.11277).

With fewer ranks to a copy than there are (HSDP), each copy is sharded and the gradients of the copies are averaged.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from gpt.config import OptimConfig, Precision, TrainConfig
from gpt.model.gpt import GPT
from gpt.optim import build_optimizer
from gpt.parallel.mesh import build_mesh
from gpt.parallel.world import World
from gpt.topology import topology


class ShardedEngine:
    """A model of which every rank holds a slice of each parameter; blocks are gathered one at a time."""

    def __init__(self, model: GPT, config: TrainConfig, world: World) -> None:
        mesh = build_mesh(topology(config.parallel, world.size), world, config.parallel.timeout_s)
        bf16 = config.precision is Precision.bf16
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        reshard = config.parallel.reshard_after_forward
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        self.module: nn.Module = model
        self.trained: nn.Module = model

    def build_optimizer(self, config: OptimConfig) -> torch.optim.Optimizer:
        return build_optimizer(self.trained, config)

    def loaded(self) -> None:
        """Nothing to do: the model holds what was loaded."""

    def backward_pass(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()
