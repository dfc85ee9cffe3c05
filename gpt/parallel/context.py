"""Context parallelism: each sequence, and with it the activations, is sharded over ``cp`` ranks.

Everything but attention works on one token at a time and needs no change. Owns which tokens a rank has, and how its
queries attend to the keys of other ranks: all-gathered (arXiv 2407.21783, section 3.3.2), or by ring attention
(gpt/parallel/ring_attention.py). Hooks into a model at three places: its positions, ``attend`` of each attention, and
the balance loss of experts. Gradients are reduced over these ranks together with the data-parallel ranks.

B sequences, S tokens of one, T those of this rank, H heads, K key-value heads, C head width, N ranks, P the tokens of a
chunk: S = 2 N P, T = 2 P.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt.config import CpMethod, TrainConfig
from gpt.model.attention import Attention, causal_bias
from gpt.model.moe import set_sequence_mean
from gpt.model.position import set_positions
from gpt.parallel.ring_attention import ring_attend
from gpt.parallel.timeline import waiting

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SequenceShard:
    """This rank's shard of every sequence: chunk ``rank`` of 2N, and the same one counted from the end.

    A token attends to all before it, so late chunks are more work than early ones; an early and a late one together
    balance the load.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def part(self, x_BS: Tensor) -> Tensor:
        """Return this rank's tokens, (B, T)."""
        chunks = x_BS.chunk(2 * self.ranks, dim=-1)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim=-1)

    def ends(self, length: int) -> tuple[int, int]:
        """Return the ends of this rank's two chunks of a sequence of ``length`` tokens."""
        chunk = length // (2 * self.ranks)
        return (self.rank + 1) * chunk, length - self.rank * chunk

    def mean(self, x: Tensor) -> Tensor:
        """Average over the ranks, without a gradient."""
        mean = x.detach().clone()
        with waiting("cp"):
            dist.all_reduce(mean, group=self.group)
        return mean / self.ranks


def shard_sequences(
    model: nn.Module, group: dist.ProcessGroup, config: TrainConfig, device: torch.device
) -> SequenceShard:
    """Apply context parallelism over ``group`` to a model, or a stage of one; return this rank's shard of sequences.

    From then on the model takes ``part`` of sequences of exactly ``block_size`` tokens, on ``device``.
    """
    shard = SequenceShard(group)
    set_positions(model, shard.part(torch.arange(config.model.block_size, device=device)))
    # Collectives are not compiled: they break the graph of a compiled block.
    set_sequence_mean(model, torch.compiler.disable(shard.mean))
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = torch.compiler.disable(build_attend(module, shard, config))  # type: ignore[method-assign]
    return shard


def build_attend(attention: Attention, shard: SequenceShard, config: TrainConfig) -> Attend:
    """Build the replacement of ``attention.attend``."""
    if config.parallel.cp_method is CpMethod.ring:
        assert not isinstance(attention.backend, str), "an attention of the user's is no Attention"
        return partial(ring_attend, shard.group, attention.backend)
    for end in shard.ends(config.model.block_size):
        causal_bias(config.model.block_size // (2 * shard.ranks), end)
    return partial(allgather_attend, shard, attention.attend)


def allgather_attend(shard: SequenceShard, attend: Attend, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
    """Attend from this rank's queries to the all-gathered keys: (B, H, T, C).

    ``attend`` aligns its queries with the last keys, so each chunk is given the keys up to its end.
    """
    k_BKSC, v_BKSC = AllGatherSequence.apply(torch.stack((k_BKTC, v_BKTC)), shard.group).unbind()
    parts = zip(q_BHTC.chunk(2, dim=2), shard.ends(k_BKSC.size(2)), strict=True)
    return torch.cat([attend(q, k_BKSC[:, :, :end], v_BKSC[:, :, :end]) for q, end in parts], dim=2)


class AllGatherSequence(torch.autograd.Function):
    """All-gather of the sequence shards, in the order of tokens, along the last dimension but one.

    Its backward pass is a reduce-scatter of the gradients to the rank that holds the token.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
        with waiting("cp"):
            dist.all_gather(parts, x.contiguous(), group=group)
        early, late = zip(*(part.chunk(2, dim=-2) for part in parts), strict=True)
        return torch.cat((*early, *reversed(late)), dim=-2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ranks = dist.get_world_size(ctx.group)
        chunks = grad.chunk(2 * ranks, dim=-2)
        parts = [torch.cat((chunks[rank], chunks[-1 - rank]), dim=-2) for rank in range(ranks)]
        mine = torch.empty_like(parts[0])
        with waiting("cp"):
            dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None
