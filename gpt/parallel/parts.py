"""What a rank holds of the tensors of a model that is spread, and sums over the ranks that hold the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

BUCKET_BYTES = 32 * 2**20
"""As much is sent at once: more hides the latency, and is held twice meanwhile."""


def sum_over(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
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
