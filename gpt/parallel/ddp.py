"""DistributedDataParallel: every rank holds the model, gradients are averaged (arXiv 2006.15704)."""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt.config import OptimConfig, TrainConfig
from gpt.model.gpt import GPT
from gpt.optim import build_optimizer
from gpt.parallel.engine import autocast
from gpt.parallel.world import World


class ReplicatedEngine:
    """A model held whole by every rank."""

    def __init__(self, model: GPT, config: TrainConfig, world: World, tokens_BT: Tensor) -> None:
        devices = [world.device] if world.device.type == "cuda" else None
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers; 2.11 knows no other name. The buffers are constants.
            warnings.simplefilter("ignore", FutureWarning)
            replicated = DistributedDataParallel(
                model, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        self._replicated = replicated
        self.module: nn.Module = replicated
        self.trained: nn.Module = replicated
        self._settle_buckets(config, world, tokens_BT)

    def _settle_buckets(self, config: TrainConfig, world: World, tokens_BT: Tensor) -> None:
        """Run two passes whose gradients are thrown away.

        DDP regroups its gradients after the first pass, and the order of summation with them: a resumed run would
        take its first step in another order than the uninterrupted one and differ in the last bits. After this, the
        first real step of every attempt uses the final grouping.
        """
        devices = [world.device] if world.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            for _ in range(2):
                with autocast(config, world.device):
                    logits_BTV = self.module(tokens_BT)
                logits_BTV.float().square().mean().backward()
        self.module.zero_grad()

    def build_optimizer(self, config: OptimConfig) -> torch.optim.Optimizer:
        return build_optimizer(self.trained, config)

    def loaded(self) -> None:
        """Nothing to do: the model holds what was loaded."""

    def backward_pass(self, last: bool) -> AbstractContextManager[object]:
        return nullcontext() if last else self._replicated.no_sync()
