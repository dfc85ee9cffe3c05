"""DTensors: shards, replicas, all-reduces, and values for a model that was constructed on the meta device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, distribute_tensor
from torch.func import functional_call

from gpt.model.gpt import GPT, Weights
from gpt.parallel.compile import replace_forward

# Local shards, replicas, bucketed all-reduce, and modules that compute with their shards.


BUCKET_BYTES = 32 * 2**20
"""Bytes of an all-reduce bucket: a larger one hides the latency better, and takes as much additional memory."""


def all_reduce_in_buckets(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """All-reduce (sum) tensors over a process group, in place, in buckets of ``BUCKET_BYTES``."""
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
    """Return 1 over the number of ranks, out of ``ranks``, that hold the same shard of a gradient."""
    if not isinstance(grad, DTensor):
        return 1 / ranks
    placements = list(enumerate(grad.placements))
    assert not any(placement.is_partial() for _, placement in placements), "a partial sum has no replicas"
    # FSDP2 shards an already sharded parameter into _StridedShard, which is_shard() does not count.
    return math.prod(grad.device_mesh.size(i) for i, placement in placements if not placement.is_replicate()) / ranks


def local_tensor(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def distribute(module: nn.Module, mesh: DeviceMesh, shardings: Mapping[str, Placement]) -> None:
    """Make the parameters of a module DTensors over ``mesh``: sharded by ``shardings``, or replicated.

    The parameters are equal on all ranks before. A parameter that is sharded over another mesh already is sharded
    further.
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
    """Replace the parameter or buffer ``name`` of a module by ``tensor``."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, tensor)


def compute_on_shards(module: nn.Module, replicated_gradient: Placement) -> None:
    """Have a module compute with this rank's shards of its parameters, as plain tensors.

    ``replicated_gradient``: the placement of the gradient that a rank computes for a replicated parameter.
    """
    caller = nn.Module()
    caller.module, caller.forward = module, module.forward

    def forward(*inputs: Any) -> Any:
        parts = {f"module.{name}": local_shard(p, replicated_gradient) for name, p in module.named_parameters()}
        return functional_call(caller, parts, inputs)

    replace_forward(module, forward)


def local_shard(parameter: Tensor, replicated_gradient: Placement) -> Tensor:
    """Return this rank's shard of a parameter, through which gradients flow back."""
    assert isinstance(parameter, DTensor)
    placements = [replicated_gradient if p.is_replicate() else p for p in parameter.placements]
    return parameter.to_local(grad_placements=placements)


def reduce_partial(part: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """Sum a partial tensor over the ranks of ``mesh``; return it in ``placement`` (all-reduce or reduce-scatter)."""
    return DTensor.from_local(part, mesh, [Partial()]).redistribute(placements=[placement]).to_local()


# Values for a model that was constructed and parallelized on the meta device, where tensors have only shapes.
#
# So a rank never holds more of the model than its shards and one whole parameter. A model that is larger than a device,
# or than the memory of a node, can begin.


@torch.no_grad()
def materialize(parts: Sequence[GPT], weights: Weights, device: torch.device, home: torch.device | None = None) -> None:
    """Give a model memory and values: make one parameter after another whole on the CPU, and keep this rank's shard.

    Args:
        parts: the model, or stages of one that may share modules, on the meta device.
        weights: the values by name, the same on all ranks; the call is not collective.
        device: that computes.
        home: device that holds the shards between steps; None means ``device``.
    """
    for part in parts:
        part.to_empty(device=home or device)
        if home is not None and home != device:
            for name, buffer in list(part.named_buffers()):
                set_tensor(part, name, buffer.to(device))
    for part in parts:  # after all have memory: a shared module would lose its values if it got memory again
        for name, tensor in part.state_dict(keep_vars=True).items():
            copy_shard(tensor, weights(name, tensor.shape))
        part.reset_buffers()


def copy_shard(tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's shard of ``whole``, or all of it, into ``tensor``, which may be a DTensor."""
    own = local_tensor(tensor)
    if isinstance(tensor, DTensor) and own.numel():
        (chunk,) = tensor.__create_chunk_list__()  # the function that checkpoints use
        for dimension, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            whole = whole.narrow(dimension, start, length)
    if own.numel():
        own.copy_(whole)
