"""Tensors of which each rank holds a part: the part, how many hold the same, sums over ranks, and modules that compute
with their part of each parameter.

Must not know who cuts what, nor why.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.func import functional_call

from gpt.parallel.compile import replace_forward
from gpt.parallel.distributed import World
from gpt.parallel.optimizer import scale_to, sum_of_squares

BUCKET_BYTES = 32 * 2**20
"""As much is sent at once: more hides the latency, and is held twice meanwhile."""


def all_reduce_in_buckets(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Add tensors up over the ranks of a group, in place, ``BUCKET_BYTES`` at a time."""
    bucket: list[Tensor] = []
    for tensor, following in zip_longest(tensors, tensors[1:]):
        bucket.append(tensor)
        if following is None or following.dtype != tensor.dtype or sum(t.nbytes for t in bucket) >= BUCKET_BYTES:
            flat = torch.cat([t.flatten() for t in bucket])
            dist.all_reduce(flat, group=group)
            for part, values in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
                part.copy_(values.view_as(part))
            bucket = []


def inverse_replicas(grad: Tensor, ranks: int) -> float:
    """One over the number of ranks, out of ``ranks``, that hold the same part of this gradient."""
    if not isinstance(grad, DTensor):
        return 1 / ranks
    placements = list(enumerate(grad.placements))
    assert not any(placement.is_partial() for _, placement in placements), "a part of a sum has no share"
    # FSDP2 cuts what was cut before into strided shards, which are no Shard to Python.
    return math.prod(grad.device_mesh.size(i) for i, placement in placements if not placement.is_replicate()) / ranks


def clip_sharded_gradients(gradients: Iterable[tuple[str, Tensor, float]], limit: float, world: World) -> Tensor:
    """Scale gradients of which each rank holds parts down to a norm of ``limit``, 0 for any; the norm they had, ().

    Each comes with the share of it that counts on this rank: over the world every element counts once. Collective.
    """
    parts = [(part, share) for _, part, share in gradients]
    # Gradients may be offloaded; ranks talk on the device.
    norm = world.all_reduce(sum_of_squares(parts).to(world.device)).sqrt()
    if limit > 0:
        scale_to(limit, norm, [part for part, _ in parts])
    return norm


def local_tensor(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute(module: nn.Module, mesh: DeviceMesh, shardings: Mapping[str, Placement]) -> None:
    """Make the parameters of a module, the same on all ranks of ``mesh``, DTensors: sharded as ``shardings`` says, or
    replicated.

    One that was cut over other ranks before is cut further.
    """
    for name, parameter in list(module.named_parameters()):
        placement = shardings.get(name, Replicate())
        sharded = distribute_tensor(local_tensor(parameter.detach()), mesh, [placement], src_data_rank=None)
        if isinstance(parameter, DTensor):
            combined = DeviceMesh._concatenate([parameter.device_mesh, mesh])
            sharded = DTensor.from_local(
                sharded.to_local(), combined, [*parameter.placements, placement], run_check=False
            )
        set_tensor(module, name, nn.Parameter(sharded))


def set_tensor(module: nn.Module, name: str, tensor: Tensor) -> None:
    """Let a module have ``tensor`` as what it has under ``name``."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)


def compute_on_shards(module: nn.Module, replicated_gradient: Placement) -> None:
    """Have a module compute with plain tensors: the parts that this rank holds of its parameters at each call.

    ``replicated_gradient``: what the rank then finds of the gradient of a parameter that it holds whole.
    """
    caller = nn.Module()
    caller.module, caller.forward = module, module.forward

    def forward(*inputs: Any) -> Any:
        parts = {f"module.{name}": local_shard(p, replicated_gradient) for name, p in module.named_parameters()}
        return functional_call(caller, parts, inputs)

    replace_forward(module, forward)


def local_shard(parameter: Tensor, replicated_gradient: Placement) -> Tensor:
    """This rank's part of a parameter; the gradient finds its way back."""
    assert isinstance(parameter, DTensor)
    placements = [replicated_gradient if p.is_replicate() else p for p in parameter.placements]
    return parameter.to_local(grad_placements=placements)


def reduce_partial(part: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """``placement`` of the sum of what the ranks of ``mesh`` have."""
    return DTensor.from_local(part, mesh, [Partial()]).redistribute(placements=[placement]).to_local()
