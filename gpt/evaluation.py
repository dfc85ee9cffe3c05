"""The loss: of one forward pass, and its mean over sequences of the validation split, by all ranks together.

Owns what is measured of a model's predictions, in training and after it. Must not know optimizers or run folders.

Shapes: B sequences, T tokens of one, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import TrainConfig
from gpt.data.loader import Samples
from gpt.parallel.engine import autocast
from gpt.parallel.world import World


def summed_loss(module: nn.Module, config: TrainConfig, tokens_BT: Tensor, targets_BT: Tensor, world: World) -> Tensor:
    """Cross-entropy in nats, summed over the tokens, in fp32."""
    with autocast(config, world.device):
        logits_BTV = module(tokens_BT.to(world.device, non_blocking=True))
    targets = targets_BT.to(world.device, non_blocking=True).flatten()
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="sum")


@torch.no_grad()
def mean_loss(
    module: nn.Module,
    config: TrainConfig,
    samples: Samples,
    world: World,
    sequences: int,
    batch: int,
    on_round: Callable[[], None] = lambda: None,
) -> float:
    """Mean cross-entropy, nats per token, over the first validation sequences; the same ones for any number of ranks.

    Collective: every rank takes its share of them, ``batch`` at a time, and calls ``on_round`` before each.
    """
    mine = np.arange(world.rank, sequences, world.size)
    rounds = math.ceil(math.ceil(sequences / world.size) / batch)
    was_training = module.training
    module.eval()
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    for i in range(rounds):
        on_round()
        part = mine[i * batch : (i + 1) * batch]
        # Sharded ranks must all take every pass, so one that has run out repeats a sequence and does not count it.
        tokens_BT, targets_BT = samples.batch("val", part if len(part) else np.zeros(1, dtype=np.int64))
        summed = summed_loss(module, config, tokens_BT, targets_BT, world)
        if len(part):
            loss += summed
    module.train(was_training)
    return world.sum(loss.item())[0] / (sequences * config.model.block_size)
