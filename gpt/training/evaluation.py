"""The mean loss over sequences of the validation split, by all ranks together.

Owns who takes which sequence. Must not know optimizers, strategies or run folders.

Shapes: B sequences, T tokens of one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from gpt.data.loader import Samples
from gpt.parallel.distributed import World


@torch.no_grad()
def mean_loss(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    samples: Samples,
    world: World,
    sequences: int,
    batch: int,
    data_rank: int,
    data_ranks: int,
    on_round: Callable[[], object] = lambda: None,
) -> float:
    """Mean cross-entropy, nats per token, over the first validation sequences; the same ones for any number of ranks.

    Collective: every rank takes the sequences of its ``data_rank``, ``batch`` at a time, and calls ``on_round`` before
    each.

    Args:
        module: put into evaluation mode for that time.
        loss: of tokens and targets, both (B, T): the summed loss, or this rank's share of it where several ranks
            compute the loss of the same sequences.
        samples: where the sequences are.
        world: all ranks.
        sequences: how many.
        batch: at most so many in one pass.
        data_rank: which of ``data_ranks`` parts of the sequences this rank computes.
        data_ranks: how many parts there are.
        on_round: called before every pass.
    """
    mine = np.arange(data_rank, sequences, data_ranks)
    rounds = math.ceil(math.ceil(sequences / data_ranks) / batch)
    was_training = module.training
    module.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for i in range(rounds):
        on_round()
        part = mine[i * batch : (i + 1) * batch]
        # Sharded ranks must all take every pass, so one that has run out repeats a sequence and does not count it.
        tokens_BT, targets_BT = samples.batch("val", part if len(part) else np.zeros(1, dtype=np.int64))
        summed = loss(tokens_BT, targets_BT)
        if len(part):
            total += summed
    module.train(was_training)
    return world.sum(total.item())[0] / (sequences * samples.block_size)
