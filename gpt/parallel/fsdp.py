"""FSDP2 (``fully_shard``): parameters, gradients and optimizer state sharded over the ranks (arXiv 2304.11277)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from gpt.config import Precision, TrainConfig
from gpt.model.gpt import GPT
from gpt.parallel.world import World


class ShardedEngine:
    """A model of which every rank holds a slice of each parameter; blocks are gathered one at a time."""

    def __init__(self, model: GPT, config: TrainConfig, world: World) -> None:
        mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("dp_shard",))
        bf16 = config.precision is Precision.bf16
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
        reshard = config.parallel.reshard_after_forward
        for block in model.blocks:
            fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard)
        self.module: nn.Module = model

    def backward_pass(self, last: bool) -> AbstractContextManager[object]:
        assert isinstance(self.module, FSDPModule)
        self.module.set_requires_gradient_sync(last)
        return nullcontext()
