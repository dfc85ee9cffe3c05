"""DistributedDataParallel: every rank holds the model, gradients are averaged (arXiv 2006.15704)."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gpt.config import TrainConfig
from gpt.model.gpt import GPT
from gpt.model.loss import autocast
from gpt.parallel.base import NativeEngine
from gpt.parallel.world import World
from gpt.topology.batch import Batch
from gpt.topology.dims import Topology


class ReplicatedEngine(NativeEngine):
    """A model held whole by every rank; ``trained`` where the optimizer is to step something else."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        world: World,
        layout: Topology,
        batch: Batch,
        trained: nn.Module | None = None,
    ) -> None:
        devices = [world.device] if world.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.11 knows no other name. The buffers are constants.
            warnings.simplefilter("ignore", FutureWarning)
            self._replicated = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        super().__init__(self._replicated, trained or self._replicated, config, world, layout, batch, world.size)
        self._settle_buckets()

    def _settle_buckets(self) -> None:
        """Run two passes whose gradients are thrown away.

        DDP regroups its gradients after the first pass, and the order of summation with them: a resumed run would
        take its first step in another order than the uninterrupted one and differ in the last bits. After this, the
        first real step of every attempt uses the final grouping.
        """
        device, block = self.world.device, self.config.model.block_size
        tokens_BT = torch.zeros(self.batch.micro, block, dtype=torch.long, device=device)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            for _ in range(2):
                with autocast(self.config, device):
                    logits_BTV = self.module(tokens_BT)
                logits_BTV.float().square().mean().backward()
        self.module.zero_grad()

    def one_pass(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._replicated.no_sync()
