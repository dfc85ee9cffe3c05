"""Keeping the experts of a model equally busy, between the steps.

Owns the exchange among ranks; the arithmetic is the model's (gpt/model/moe.py).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.model.moe import expert_counts, move_balance_bias
from gpt.parallel.engine import Engine
from gpt.parallel.world import World


def balance_experts(engine: Engine, world: World) -> Tensor:
    """Move the experts' biases by the tokens of this step, over all ranks; waits for no device.

    Collective. Returns how uneven the tokens were, () float64: the most that any expert was chosen beyond its even
    share, in units of that share: 0 is even, 1 twice (MaxVio, arXiv 2408.15664, section 4.1). Ranks that share matrices
    all count the same tokens, so that every count is as many times too high; only their ratios matter.
    """
    mine_LE = expert_counts(engine.module)
    most = torch.zeros((), dtype=torch.float64, device=world.device)
    if mine_LE is not None:  # a stage of a pipeline may hold nothing but the output matrix
        counts_LE = world.add_up(mine_LE.double(), engine.layer_group)
        move_balance_bias(engine.module, counts_LE)
        most = (counts_LE / counts_LE.mean(1, keepdim=True)).max() - 1
    if engine.layer_group is not None:  # others hold the other layers
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most
