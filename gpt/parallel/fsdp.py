"""FSDP2 (``fully_shard``): parameters, gradients and optimizer state sharded over the ranks (arXiv 2304.11277).

With several replicas (HSDP), each one is sharded, and gradients are averaged between replicas.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import Shard

from gpt.config import Precision, TrainConfig


def apply_fsdp(model: nn.Module, blocks: list[nn.Module], mesh: DeviceMesh, config: TrainConfig) -> None:
    """Shard every parameter of ``model`` over ``mesh``; each of the ``blocks`` is all-gathered by itself."""
    # torch 2.13 warns against writing into the logits, which are a view. The loss does not.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor", UserWarning)
    for module in (*blocks, model):
        fsdp_shard_module(module, mesh, config)


def fsdp_shard_module(module: nn.Module, mesh: DeviceMesh, config: TrainConfig, dimension: int = 0) -> None:
    """Shard the parameters of ``module`` that are not sharded yet along a dimension; they are all-gathered together."""
    bf16 = config.precision is Precision.bf16
    # Only copies from pinned memory overlap with computing on the GPU.
    host = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda")
    fully_shard(
        module,
        mesh=mesh,
        mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy(),
        offload_policy=host if config.parallel.cpu_offload else OffloadPolicy(),
        reshard_after_forward=config.parallel.reshard_after_forward,
        shard_placement_fn=lambda _: Shard(dimension),
    )
