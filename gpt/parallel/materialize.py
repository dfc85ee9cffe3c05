"""Values for a model that was constructed and parallelized on the meta device, where tensors have shapes alone.

So no rank ever holds more of the model than its shards and one whole parameter, and a model larger than a device, or
than the memory of a node, can begin. Must not know how the model is sharded, nor where the values come from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from gpt.model.gpt import GPT
from gpt.model.init import Weights
from gpt.parallel.dtensor import local_tensor, set_tensor


@torch.no_grad()
def materialize(parts: Sequence[GPT], weights: Weights, device: torch.device, home: torch.device | None = None) -> None:
    """Give a model memory and values: one parameter after another is made whole on the CPU, and this rank's shard kept.

    Args:
        parts: the model, or stages of one that may share modules, on the meta device.
        weights: the values by name; the same on all ranks, which need not call this together.
        device: that computes.
        home: where the shards lie between steps, where that is not ``device``.
    """
    for part in parts:
        part.to_empty(device=home or device)
        if home is not None and home != device:
            for name, buffer in list(part.named_buffers()):
                set_tensor(part, name, buffer.to(device))
    for part in parts:  # after all have memory: making it anew would lose the values of a shared module
        for name, tensor in part.state_dict(keep_vars=True).items():
            copy_shard(tensor, weights(name, tensor.shape))
        part.reset_buffers()


def copy_shard(tensor: Tensor, whole: Tensor) -> None:
    """Copy this rank's shard of ``whole``, or all of it, into ``tensor``, which may be a DTensor."""
    own = local_tensor(tensor)
    if isinstance(tensor, DTensor) and own.numel():
        (chunk,) = tensor.__create_chunk_list__()  # as checkpoints find it
        for dimension, (start, length) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            whole = whole.narrow(dimension, start, length)
    if own.numel():
        own.copy_(whole)
