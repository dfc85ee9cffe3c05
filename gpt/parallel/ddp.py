"""Data parallelism with a replica on every rank: DDP (arXiv 2006.15704) and ZeRO-1 (arXiv 1910.02054)."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from gpt.model.gpt import GPT
from gpt.parallel.distributed import Moment, build_mesh, current, waiting
from gpt.parallel.engine import Clipped, RunLayout, TorchEngine, clip_replica
from gpt.parallel.modules import local_tensor, set_tensor, split_into_buckets
from gpt.topology import BUCKET_BYTES, BUCKETS_IN_FLIGHT, ParallelDims

# Row shards of replicated parameters: gradients reduce-scattered and parameters all-gathered in flat buckets.
#
# Every parameter is sharded along its first dimension as ``torch.chunk`` does it, so shards of any number of ranks make
# up the same whole. A flat bucket keeps the chunks of all its tensors for one rank together, padded to the size of the
# first rank's chunks. So a bucket takes one collective, and no tensor is sent twice.


GATHER_BYTES = 256 * 2**20
"""Largest number of bytes that one all-gather gathers. This memory is used between two steps, when no activations are
in memory."""

collectives = torch.ops._c10d_functional
"""torch's functional collectives as operations, because torch 2.13 renames the Python functions that call these
operations."""


class SplitParameter(NamedTuple):
    """A whole parameter, which every rank has (``whole``), and the rows of it that this rank updates (``shard``)."""

    whole: nn.Parameter
    shard: nn.Parameter
    """This rank's rows: a DTensor over the memory of ``whole``."""


def split_parameter(whole: nn.Parameter, mesh: DeviceMesh) -> SplitParameter:
    """Return a parameter with this rank's shard of it. An optimizer that updates the shard changes ``whole``."""
    chunks, rank = whole.detach().chunk(mesh.size(), dim=0), mesh.get_local_rank()
    chunk = chunks[rank] if rank < len(chunks) else whole.detach()[:0]  # there may be fewer rows than ranks
    return SplitParameter(whole, nn.Parameter(as_row_shard(chunk, whole, mesh), requires_grad=whole.requires_grad))


def as_row_shard(local: Tensor, whole: Tensor, mesh: DeviceMesh) -> DTensor:
    """Return a DTensor with the shape of ``whole``, sharded by rows over ``mesh``. ``local`` has this rank's rows."""
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=whole.shape, stride=whole.stride())


def padded_chunk(tensor: Tensor, ranks: int) -> int:
    """Return the number of elements of the largest shard, if a tensor is sharded by rows over ``ranks`` ranks."""
    return -(-len(tensor) // ranks) * (tensor.numel() // max(1, len(tensor)))


@torch.no_grad()
def all_gather_rows(tensors: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """All-gather whole tensors, in place. Collective.

    Before the call, only this rank's own rows of each tensor are valid. After it, the rows of all ranks are. Rank r
    owns the r-th shard of a tensor that is sharded by rows.

    One all-gather gathers at most ``GATHER_BYTES``.
    """
    ranks, rank = group.size(), group.rank()
    for indices in split_into_buckets(tensors, GATHER_BYTES):
        bucket = [tensors[index] for index in indices]
        sizes = [padded_chunk(tensor, ranks) for tensor in bucket]
        mine = bucket[0].new_zeros(sum(sizes))
        for tensor, size, place in zip(bucket, sizes, mine.split(sizes), strict=True):
            chunk = tensor.flatten()[rank * size : (rank + 1) * size]
            place[: chunk.numel()].copy_(chunk)
        gathered = collectives.wait_tensor(collectives.all_gather_into_tensor(mine, ranks, group.group_name))
        # Only the last chunks are padded, so the chunks of all ranks begin with the whole tensor.
        for tensor, parts in zip(bucket, gathered.view(ranks, -1).split(sizes, dim=1), strict=True):
            tensor.copy_(parts.flatten()[: tensor.numel()].view_as(tensor))
        del gathered  # before the next bucket gets memory


class GradientBucket:
    """Parameters whose gradients are reduced together, by one all-reduce (sum) over a process group.

    After the all-reduce, the gradients are views of one tensor, so that no sum is copied.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: dist.ProcessGroup) -> None:
        self.parameters, self.group = parameters, group
        self.missing: set[nn.Parameter] = set()
        """Parameters whose gradients the backward pass has yet to compute."""

    def send(self) -> Callable[[], object]:
        """Start the collective of the bucket. Return a function that waits for the summed gradients."""
        for parameter in self.parameters:
            if parameter.grad is None:  # the parameter took no part in the step, but another rank may have used it
                parameter.grad = torch.zeros_like(parameter)
        gradients = [local_tensor(p.grad) for p in self.parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        places = flat.split([gradient.numel() for gradient in gradients])
        for parameter, gradient, place in zip(self.parameters, gradients, places, strict=True):
            own = place.view_as(gradient)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                own = DTensor.from_local(
                    own, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
            parameter.grad = own
        return dist.all_reduce(flat, group=self.group, async_op=True).wait


class RowBucket(GradientBucket):
    """Bucket whose gradients are reduce-scattered (sum): each rank gets the summed gradients of its own rows, as
    gradients of the shards. The gradients of the whole parameters are deleted."""

    def __init__(self, pairs: Sequence[SplitParameter], group: dist.ProcessGroup) -> None:
        super().__init__([whole for whole, _ in pairs], group)
        sizes = [padded_chunk(whole, group.size()) for whole in self.parameters]
        self.sums = self.parameters[0].new_zeros(sum(sizes))
        """Summed gradients of this rank's rows, flat. The tensor is used again in each step, because the host needs
        time to make the DTensors over it."""
        self._gradients: list[tuple[nn.Parameter, DTensor]] = []
        for (whole, shard), place in zip(pairs, self.sums.split(sizes), strict=True):
            assert isinstance(shard, DTensor)
            local = shard.to_local()
            rows = as_row_shard(place[: local.numel()].view_as(local), whole, shard.device_mesh)
            self._gradients.append((shard, rows))

    def send(self) -> Callable[[], object]:
        # A parameter that took no part in the step counts as zeros, as another rank may have used it.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad.contiguous() for p in self.parameters]
        ranks = self.group.size()
        flat = torch._chunk_cat(gradients, dim=0, num_chunks=ranks).view(-1)  # ordered by the rank that gets a chunk
        for parameter in self.parameters:
            parameter.grad = None
        arriving = collectives.reduce_scatter_tensor(flat, "sum", ranks, self.group.group_name)
        return partial(self._receive, flat, arriving)

    def _receive(self, _flat: Tensor, arriving: Tensor) -> None:
        """Wait for the sums, and set them as the gradients of the shards. ``arriving`` is the result of the collective.
        The collective reads ``_flat``; this argument only keeps that tensor in memory until the sums have arrived."""
        self.sums.copy_(collectives.wait_tensor(arriving))
        for shard, gradient in self._gradients:
            shard.grad = gradient


def row_buckets(parameters: Sequence[SplitParameter], mesh: DeviceMesh) -> list[RowBucket]:
    """Return buckets of at most ``BUCKET_BYTES`` for the parameters that are trained, from the last parameter to the
    first."""
    reduced = [pair for pair in reversed(parameters) if pair.whole.requires_grad and pair.whole.numel()]
    indices = split_into_buckets([pair.whole for pair in reduced], BUCKET_BYTES)
    return [RowBucket([reduced[index] for index in bucket], mesh.get_group()) for bucket in indices]


class GradientReducer:
    """Reduces gradients in buckets during the last backward pass of a step. A bucket is sent as soon as two conditions
    hold: the backward pass has computed all gradients of the bucket, and all earlier buckets were sent.

    So all ranks send the buckets in the same order, and every attempt of a run sums in the same order. The memory of a
    bucket is freed only when its sums have arrived. So at most ``BUCKETS_IN_FLIGHT`` buckets are sent and not yet
    received.

    Args:
        buckets: the buckets in the order in which they are sent.
    """

    def __init__(self, buckets: Sequence[GradientBucket]) -> None:
        self._buckets = buckets
        self._bucket_of = {parameter: bucket for bucket in buckets for parameter in bucket.parameters}
        for parameter in self._bucket_of:
            parameter.register_post_accumulate_grad_hook(self._note_gradient)
        self._to_send: deque[GradientBucket] = deque()
        """Buckets that still have to be sent in the last backward pass of a step; empty at other times."""
        self._in_flight: deque[Callable[[], object]] = deque()
        """For each bucket that was sent and not yet received, the function that waits for its sums."""

    def begin_last(self) -> None:
        """Prepare for the last backward pass of a step, in which buckets are sent."""
        for bucket in self._buckets:
            bucket.missing = {*bucket.parameters}
        self._to_send.extend(self._buckets)

    @torch.no_grad()
    def finish(self) -> None:
        """Send the remaining buckets, and wait for the sums of all buckets."""
        while self._to_send:
            self._send(self._to_send.popleft())
        while self._in_flight:
            self._receive()

    def _note_gradient(self, parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter)
        self._bucket_of[parameter].missing.discard(parameter)
        while self._to_send and not self._to_send[0].missing:
            self._send(self._to_send.popleft())

    def _send(self, bucket: GradientBucket) -> None:
        if len(self._in_flight) == BUCKETS_IN_FLIGHT:
            self._receive()
        self._in_flight.append(bucket.send())

    def _receive(self) -> None:
        with waiting("dp"):
            self._in_flight.popleft()()


# The engines of DDP (arXiv 2006.15704) and ZeRO-1 (arXiv 1910.02054).
#
# DDP all-reduces gradients in buckets during the last backward pass. ZeRO-1 reduce-scatters the gradients, in half the
# bytes of an all-reduce. Each rank then steps AdamW for its shard of every parameter. An all-gather of the parameters
# is the other half (section 7.2.1).


NEVER = 2**31 - 1
"""Number of steps between two of DDP's measurements of its own speed. It is the largest number that DDP accepts, so
that DDP never measures."""


class DDPEngine(TorchEngine):
    """Engine of torch's DistributedDataParallel (DDP), with a replica of the model on every rank. A run of one rank
    uses the model without DDP."""

    def __init__(self, model: GPT, layout: RunLayout) -> None:
        world = layout.world
        if world.size == 1:  # there is no rank to average with, so nothing to copy into buckets
            super().__init__(model, model, layout, averaged=1)
            return
        devices = [world.device] if world.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.11 knows no other name. The buffers are constants.
            warnings.simplefilter("ignore", FutureWarning)
            replica = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # DDP would wait for the device in each hundredth step, for statistics that no code reads.
        replica._set_ddp_runtime_logging_sample_rate(NEVER)
        super().__init__(replica, replica, layout, averaged=world.size)
        self.timed_groups = ("dp",)
        self._warm_up_buckets()

    def begin_backward(self) -> None:
        """Clear the gradients of the last step.

        With several micro-batches, gradients are set to zero in DDP's buckets. If they were None, the gradients of the
        first micro-batch would be outside of the buckets, and need as much memory again.
        """
        if self.world.size == 1 or self.batch.accumulation == 1:
            super().begin_backward()
            return
        for parameter, gradient in zip(self._parameters, self._in_buckets, strict=True):
            parameter.grad = gradient
        torch._foreach_zero_([gradient for gradient in self._in_buckets if gradient is not None])

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        return clip_replica(self._parameters, self.config.optim.grad_clip, self.world, figures_N, meanwhile)

    def _run_backward(self, loss: Tensor, last: bool) -> None:
        """Run the backward pass. If ``last`` is True, it is the last backward pass of a step: then record how long DDP
        waits for its all-reduces after all gradients are computed.

        DDP waits in a callback that autograd runs at the end of the backward pass. To know when this wait begins, this
        method queues a callback of its own, which takes the time. Autograd runs callbacks in the order in which they
        were queued. This one is queued when the backward pass begins, and DDP's later, so this one runs first.
        """
        timeline = current()
        if timeline is None or not last or self.timed_groups is None:
            super()._run_backward(loss, last)
            return
        computed: list[Moment] = []
        queue = torch.autograd.Variable._execution_engine.queue_callback
        loss.register_hook(lambda _: queue(lambda: computed.append(timeline.now())))
        super()._run_backward(loss, last)
        timeline.add_wait("dp", computed[0])

    def _warm_up_buckets(self) -> None:
        """Run two forward and backward passes and discard their gradients.

        DDP rebuilds its buckets after the first backward pass, and with them the order of summation. A resumed run
        would take its first step in another order than the uninterrupted run, and differ in the last bits. After this
        call, the first real step of every attempt uses the final buckets.
        """
        device, block = self.world.device, self.config.model.block_size
        tokens_BT = torch.zeros(self.batch.micro, block, dtype=torch.long, device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for _ in range(2):
                self._micro_batch_loss(tokens_BT, tokens_BT).backward()  # needs the memory of one micro-batch
        self._in_buckets = [parameter.grad for parameter in self._parameters]
        self.module.zero_grad()  # torch loads no state into an optimizer whose parameters have gradients
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)  # so that step records have the peak of training

    def sync_context(self, last: bool) -> AbstractContextManager[object]:
        if last or not isinstance(self.module, DistributedDataParallel):
            return nullcontext()
        return self.module.no_sync()


class Zero1Engine(TorchEngine):
    """Engine of ZeRO-1: every rank has the whole model, and reduces, clips and updates its own rows of every
    parameter."""

    def __init__(self, model: GPT, layout: RunLayout) -> None:
        config, world = layout.config, layout.world
        self._mesh = build_mesh(ParallelDims("zero1", 1, world.size), world.device.type)
        with torch.device("meta"):
            shards = GPT(config.model)
        pairs = []
        for name, whole in model.named_parameters():
            pairs.append(split_parameter(whole, self._mesh))
            set_tensor(shards, name, pairs[-1].shard)
        for name, buffer in model.named_buffers():
            set_tensor(shards, name, buffer)  # replicated, and stored whole
        self._wholes = [whole for whole, _ in pairs]
        self._reducer = GradientReducer(row_buckets(pairs, self._mesh))
        super().__init__(model, shards, layout, averaged=1)
        self.timed_groups = ("dp",)
        self.optimizer.register_step_post_hook(lambda *_: self.gather_stepped())

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._all_gather(self._wholes)

    def gather_stepped(self) -> None:
        self._all_gather([whole for whole in self._wholes if whole.requires_grad])

    def sync_context(self, last: bool) -> AbstractContextManager[object]:
        if last:
            self._reducer.begin_last()
        return nullcontext()

    def reduce_gradients(self) -> None:
        self._reducer.finish()

    def _all_gather(self, parameters: Sequence[nn.Parameter]) -> None:
        """All-gather whole parameters, after each rank has changed its own rows in place."""
        with waiting("dp"):
            all_gather_rows([whole.detach() for whole in parameters], self._mesh.get_group())
