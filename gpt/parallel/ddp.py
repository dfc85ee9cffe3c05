"""Data parallelism with a replica on every rank: DDP (arXiv 2006.15704) and ZeRO-1 (arXiv 1910.02054).

DDP all-reduces gradients in buckets during the last backward pass. ZeRO-1 reduce-scatters them instead, as many bytes
as half an all-reduce; each rank steps AdamW for its shard of every parameter; and the parameters are all-gathered, the
other half (section 7.2.1). Shards and buckets are gpt/parallel/rows.py's.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from gpt.config import TrainConfig
from gpt.model.gpt import GPT
from gpt.model.loss import autocast
from gpt.parallel.base import TorchEngine
from gpt.parallel.clipping import Clipped, clip_shards
from gpt.parallel.distributed import World, build_mesh
from gpt.parallel.dtensor import inverse_replicas, local_tensor, set_tensor
from gpt.parallel.rows import GradientReducer, all_gather_rows, split_parameter
from gpt.parallel.timeline import Moment, current, waiting
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims

NEVER = 2**31 - 1
"""Steps between two of DDP's statistics: the largest number that it takes."""


class DDPEngine(TorchEngine):
    """DistributedDataParallel: a replica on every rank. A single rank calls the model itself."""

    def __init__(self, model: GPT, config: TrainConfig, world: World, dims: ParallelDims, batch: Batch) -> None:
        if world.size == 1:  # nobody to average with, so nothing to copy into buckets
            super().__init__(model, model, config, world, dims, batch, averaged=1)
            return
        devices = [world.device] if world.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.11 knows no other name. The buffers are constants.
            warnings.simplefilter("ignore", FutureWarning)
            self._ddp = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        # For statistics that nobody reads DDP would wait for the device in each hundredth step.
        self._ddp._set_ddp_runtime_logging_sample_rate(NEVER)
        super().__init__(self._ddp, self._ddp, config, world, dims, batch, world.size, sync_context=self._sync_last)
        self.timed_groups = ("dp",)
        self._warm_up_buckets()

    def _run_backward(self, loss: Tensor, last: bool) -> None:
        """Record what DDP waits at the end of the last backward pass, when all gradients are computed.

        The callbacks of a backward pass run in the order in which they were queued. This one is queued at its begin,
        ahead of the one in which DDP waits.
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

        DDP rebuilds its buckets after the first backward pass, and with them the order of summation: a resumed run
        would take its first step in another order than the uninterrupted one and differ in the last bits. After this,
        the first real step of every attempt uses the final buckets.
        """
        device, block = self.world.device, self.config.model.block_size
        tokens_BT = torch.zeros(self.batch.micro, block, dtype=torch.long, device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for _ in range(2):
                with autocast(self.config, device):
                    logits_BTV = self.module(tokens_BT)
                logits_BTV.float().square().mean().backward()
        self.module.zero_grad()

    def _sync_last(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._ddp.no_sync()


class Zero1Engine(TorchEngine):
    """ZeRO-1: a replica on every rank, each of which reduces, clips and steps its rows of every parameter."""

    def __init__(self, model: GPT, config: TrainConfig, world: World, dims: ParallelDims, batch: Batch) -> None:
        self._mesh = build_mesh(ParallelDims("zero1", 1, world.size), world, config.parallel.timeout_s)
        with torch.device("meta"):
            shards = GPT(config.model)
        pairs = []
        for name, whole in model.named_parameters():
            pairs.append(split_parameter(whole, self._mesh))
            set_tensor(shards, name, pairs[-1].shard)
        for name, buffer in model.named_buffers():
            set_tensor(shards, name, buffer)  # replicated, and stored whole
        self._wholes = [whole.detach() for whole, _ in pairs]
        self._reducer = GradientReducer(pairs, self._mesh)
        super().__init__(
            model,
            shards,
            config,
            world,
            dims,
            batch,
            averaged=1,
            sync_context=self._sync_last,
            reduce_gradients=self._reducer.finish,
        )
        self.timed_groups = ("dp",)
        self.optimizer.register_step_post_hook(self._all_gather_parameters)

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        limit = self.config.optim.grad_clip
        return clip_shards(self.gradients(), limit, self.world, figures_N, meanwhile)

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        for name, shard in self.trained.named_parameters():
            if shard.grad is not None:
                yield name, local_tensor(shard.grad), inverse_replicas(shard.grad, self.world.size)

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._all_gather_parameters()

    def _sync_last(self, last: bool) -> AbstractContextManager[object]:
        return self._reducer.last_micro_batch() if last else nullcontext()

    def _all_gather_parameters(self, *_: Any) -> None:
        """All-gather the parameters, of which each rank has stepped its shard in place."""
        with waiting("dp"):
            all_gather_rows(self._wholes, self._mesh.get_group())
