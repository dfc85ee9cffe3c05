"""Row shards of replicated parameters: gradients reduce-scattered and parameters all-gathered in flat buckets.

Every parameter is sharded along its first dimension as ``torch.chunk`` does it, so that shards of any number of ranks
make up the same whole. In a flat bucket the chunks of all its tensors for one rank lie together, padded to those of the
first rank: a bucket takes one collective, and no tensor is sent twice. Must not know the optimizer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from gpt.parallel.timeline import waiting
from gpt.topology.gradient_buckets import BUCKET_BYTES, BUCKETS_IN_FLIGHT

GATHER_BYTES = 256 * 2**20
"""Size of an all-gather bucket, which lives beside the model between two steps, when no activations do."""

collectives = torch.ops._c10d_functional
"""The functions of torch.distributed have other names in torch 2.13 than before."""


class SplitParameter(NamedTuple):
    """A replicated parameter, and this rank's shard of it: a DTensor over the same memory."""

    whole: nn.Parameter
    shard: nn.Parameter


def split_parameter(whole: nn.Parameter, mesh: DeviceMesh) -> SplitParameter:
    """Return a parameter with this rank's shard of it, for an optimizer to step in place."""
    chunk = own_chunk(whole.detach(), mesh.size(), mesh.get_local_rank())
    return SplitParameter(whole, nn.Parameter(as_row_shard(chunk, whole, mesh), requires_grad=whole.requires_grad))


def own_chunk(tensor: Tensor, ranks: int, rank: int) -> Tensor:
    """Return a rank's chunk of the rows of a tensor, over the same memory; with fewer rows than ranks some are
    empty."""
    chunks = tensor.chunk(ranks, dim=0)
    return chunks[rank] if rank < len(chunks) else tensor[:0]


def as_row_shard(local: Tensor, whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Wrap this rank's chunk of a tensor like ``whole`` as a DTensor."""
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def padded_chunk(tensor: Tensor, ranks: int) -> int:
    """Return the elements of the first rank's chunk of a tensor, the largest one."""
    return -(-len(tensor) // ranks) * (tensor.numel() // max(1, len(tensor)))


def split_into_buckets(tensors: Sequence[Tensor], size: int) -> list[list[int]]:
    """Split tensors, in their order, into buckets of one dtype and at most ``size`` bytes, or of a single tensor.

    Returns:
        The indices of the tensors of each bucket.
    """
    buckets: list[list[int]] = [[]]
    held = 0
    for index, (tensor, following) in enumerate(zip_longest(tensors, tensors[1:])):
        buckets[-1].append(index)
        held += tensor.nbytes
        if following is not None and (following.dtype != tensor.dtype or held + following.nbytes > size):
            buckets.append([])
            held = 0
    return [bucket for bucket in buckets if bucket]


@torch.no_grad()
def all_gather_rows(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """All-gather tensors of which each rank holds its chunk of the rows, in place, ``GATHER_BYTES`` at a time."""
    for bucket in split_into_buckets(tensors, GATHER_BYTES):
        _all_gather_bucket([tensors[index] for index in bucket], group)


def _all_gather_bucket(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    ranks, rank = group.size(), group.rank()
    sizes = [padded_chunk(tensor, ranks) for tensor in tensors]
    mine = tensors[0].new_zeros(sum(sizes))
    for tensor, size, place in zip(tensors, sizes, mine.split(sizes), strict=True):
        chunk = tensor.flatten()[rank * size : (rank + 1) * size]
        place[: chunk.numel()].copy_(chunk)
    gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(mine, ranks, group.group_name))
    # Only the last chunks are padded, so the chunks of all ranks begin with the whole tensor.
    for tensor, parts in zip(tensors, gathered.view(ranks, -1).split(sizes, dim=1), strict=True):
        tensor.copy_(parts.flatten()[: tensor.numel()].view_as(tensor))


class GradientBucket:
    """Parameters whose gradients are reduce-scattered together, and this rank's shards of the sums."""

    def __init__(self, parameters: Sequence[SplitParameter], mesh: DeviceMesh) -> None:
        self._parameters, self._ranks = parameters, mesh.size()
        sizes = [padded_chunk(whole, self._ranks) for whole, _ in parameters]
        self.sums = parameters[0].whole.new_zeros(sum(sizes))
        """This rank's part of the bucket, kept between steps: making DTensors anew would cost the host each time."""
        self._gradients: list[DTensor] = []
        for (whole, shard), place in zip(parameters, self.sums.split(sizes), strict=True):
            assert isinstance(shard, DTensor)
            local = shard.to_local()
            self._gradients.append(as_row_shard(place[: local.numel()].view_as(local), whole, mesh))
        self.missing: set[nn.Parameter] = set()
        """Parameters whose gradients the backward pass has yet to compute."""

    def expect_all(self) -> None:
        """Expect the gradients of all parameters."""
        self.missing = {whole for whole, _ in self._parameters}

    def fill(self) -> Tensor:
        """Return the gradients flat, the chunks of one rank after those of the other; the parameters give them up.

        A parameter that took no part in the step counts as zeros, as another rank may have used it.
        """
        wholes = [whole for whole, _ in self._parameters]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in wholes]
        flat = torch._chunk_cat(gradients, dim=0, num_chunks=self._ranks)
        for parameter in wholes:
            parameter.grad = None
        return flat.view(-1)

    def hand_over(self) -> None:
        """Give the shards of the parameters their gradients."""
        for (_, shard), gradient in zip(self._parameters, self._gradients, strict=True):
            shard.grad = gradient


class GradientReducer:
    """Reduce-scatter (sum) of gradients in flat buckets, each as soon as the backward pass has computed it.

    Buckets are sent in one order, from the last parameters to the first, whatever the order in which gradients come: so
    all ranks send the same ones, and every attempt of a run sums in the same order. Few are on their way at a time,
    since a whole gradient is freed only when its bucket has arrived.
    """

    def __init__(self, parameters: Sequence[SplitParameter], mesh: DeviceMesh) -> None:
        self._group = mesh.get_group()
        reduced = [pair for pair in reversed(parameters) if pair.whole.requires_grad and pair.whole.numel()]
        indices = split_into_buckets([pair.whole for pair in reduced], BUCKET_BYTES)
        self._buckets = [GradientBucket([reduced[index] for index in bucket], mesh) for bucket in indices]
        self._bucket_of: dict[nn.Parameter, GradientBucket] = {}
        for bucket, held in zip(self._buckets, indices, strict=True):
            for index in held:
                whole = reduced[index].whole
                self._bucket_of[whole] = bucket
                whole.register_post_accumulate_grad_hook(self._note_gradient)
        self._to_send: deque[GradientBucket] = deque()
        self._in_flight: deque[tuple[GradientBucket, Tensor, Tensor]] = deque()
        self._is_last = False

    @contextmanager
    def last_micro_batch(self) -> Iterator[None]:
        """Send buckets while the backward pass inside, the last one of a step, computes the next ones."""
        for bucket in self._buckets:
            bucket.expect_all()
        self._to_send.extend(self._buckets)
        self._is_last = True
        yield
        self._is_last = False

    @torch.no_grad()
    def finish(self) -> None:
        """Send what is left, wait for all, and give every shard its gradient."""
        while self._to_send:
            self._send(self._to_send.popleft())
        while self._in_flight:
            self._receive()
        for bucket in self._buckets:
            bucket.hand_over()

    def _note_gradient(self, parameter: Tensor) -> None:
        if not self._is_last:
            return
        assert isinstance(parameter, nn.Parameter)
        self._bucket_of[parameter].missing.discard(parameter)
        while self._to_send and not self._to_send[0].missing:
            self._send(self._to_send.popleft())

    def _send(self, bucket: GradientBucket) -> None:
        if len(self._in_flight) == BUCKETS_IN_FLIGHT:
            self._receive()
        flat = bucket.fill()
        sums = collectives.reduce_scatter_tensor(flat, "sum", self._group.size(), self._group.group_name)
        self._in_flight.append((bucket, flat, sums))

    def _receive(self) -> None:
        bucket, _, sums = self._in_flight.popleft()
        with waiting("dp"):
            bucket.sums.copy_(collectives.wait_tensor(sums))
