"""Keeping the experts of a model equally busy, between the steps.

Owns the exchange among ranks; the arithmetic is the model's (gpt/model/moe.py). Does nothing for a model
without experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from gpt.model.moe import expert_counts, move_balance_bias
from gpt.parallel.world import World


def balance_experts(module: nn.Module, world: World) -> Tensor | None:
    """Move the experts' biases by the tokens of this step, over all ranks; waits for no device.

    Collective. Returns how uneven the tokens were, () float64: the most that any expert was chosen beyond its even
    share, in units of that share: 0 is even, 1 twice (MaxVio, arXiv 2408.15664, section 4.1). None where there are no
    experts.
    """
    mine_LE = expert_counts(module)
    if mine_LE is None:
        return None
    counts_LE = world.add_up(mine_LE.double())
    move_balance_bias(module, counts_LE)
    return (counts_LE / counts_LE.mean(1, keepdim=True)).max() - 1
