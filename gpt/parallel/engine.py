"""What the training loop sees of a parallel strategy, and the choice of one.

A strategy is applied to a finished model from outside; the model knows nothing of it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import nn

from gpt.config import OptimConfig, Precision, Strategy, TrainConfig
from gpt.model.gpt import GPT
from gpt.parallel.world import World


class Engine(Protocol):
    """A model spread over the ranks."""

    module: nn.Module
    """Called with (B, T) tokens, gives (B, T, V) logits; its gradients are averages over the data ranks."""
    trained: nn.Module
    """Holds the parameters that the optimizer steps and checkpoints store: ``module``, or this rank's part of it."""

    def build_optimizer(self, config: OptimConfig) -> torch.optim.Optimizer:
        """The optimizer of ``trained``."""
        ...

    def loaded(self) -> None:
        """To be called after a checkpoint was loaded into ``trained``. Collective."""
        ...

    def backward_pass(self, last: bool) -> AbstractContextManager[object]:
        """Context of one forward and backward pass. Gradients are exchanged in the ``last`` one of a step only."""
        ...


def spread(model: GPT, config: TrainConfig, world: World, micro_batch: int) -> Engine:
    """Apply the strategy that ``config.parallel`` names. The model must lie on ``world.device``."""
    from gpt.parallel.ddp import ReplicatedEngine
    from gpt.parallel.fsdp import ShardedEngine
    from gpt.parallel.zero1 import Zero1Engine

    if config.parallel.strategy is Strategy.fsdp:
        return ShardedEngine(model, config, world)
    tokens_BT = torch.zeros(micro_batch, config.model.block_size, dtype=torch.long, device=world.device)
    kind = Zero1Engine if config.parallel.strategy is Strategy.zero1 else ReplicatedEngine
    return kind(model, config, world, tokens_BT)


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """bf16 matrix products over fp32 weights where asked for.

    Under fsdp the gathered weights are bf16 already; autocast then still decides for the loss and the norms.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision is Precision.bf16)
