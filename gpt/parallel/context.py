"""Context parallelism: ``cp`` ranks share each sequence, so that a long one's activations are dealt out.

Everything but attention looks at one token at a time and needs no change. Owns which tokens a rank takes, and how its
queries meet the keys of the others: gathered from all ranks at once (arXiv 2407.21783, section 3.3.2), or passed
round (gpt/parallel/ring_attention.py). Where a model is hooked into: its positions, ``attend`` of each attention, and
the balance loss of experts. Gradients add up over the ranks by what already adds up those of other samples.

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
from gpt.model.attention import Attention, lower_right
from gpt.model.moe import set_sequence_mean
from gpt.model.position import set_positions
from gpt.parallel.ring_attention import ring_attend

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SequenceShard:
    """This rank's part of every sequence: chunk ``rank`` of 2N, and the same one counted from the end.

    A token looks at all before it, so late chunks are more work than early ones; an early and a late one together are
    the same for every rank.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def part(self, x_BS: Tensor) -> Tensor:
        """This rank's tokens, (B, T)."""
        chunks = x_BS.chunk(2 * self.ranks, dim=-1)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim=-1)

    def ends(self, length: int) -> tuple[int, int]:
        """Where this rank's chunks of a sequence of ``length`` tokens end."""
        chunk = length // (2 * self.ranks)
        return (self.rank + 1) * chunk, length - self.rank * chunk

    def mean(self, x: Tensor) -> Tensor:
        """Mean over the ranks; the gradient is not wanted."""
        mean = x.detach().clone()
        dist.all_reduce(mean, group=self.group)
        return mean / self.ranks


def shard_sequences(
    model: nn.Module, group: dist.ProcessGroup, config: TrainConfig, device: torch.device
) -> SequenceShard:
    """Let a model, or a part of one, compute this rank's part of each sequence together with the others of ``group``.

    From then on it takes sequences of ``block_size`` tokens only, of which it is given ``part``, on ``device``.
    """
    shard = SequenceShard(group)
    set_positions(model, shard.part(torch.arange(config.model.block_size, device=device)))
    # Collectives are not compiled: what is compiled of a block ends before them and goes on after them.
    set_sequence_mean(model, torch.compiler.disable(shard.mean))
    for module in model.modules():
        if isinstance(module, Attention):
            module.attend = torch.compiler.disable(build_attend(module, shard, config))  # type: ignore[method-assign]
    return shard


def build_attend(attention: Attention, shard: SequenceShard, config: TrainConfig) -> Attend:
    """What takes the place of ``attention.attend``."""
    if config.parallel.cp_method is CpMethod.ring:
        return partial(ring_attend, shard.group, attention.backend)
    for end in shard.ends(config.model.block_size):
        lower_right(config.model.block_size // (2 * shard.ranks), end)
    return partial(allgather_attend, shard, attention.attend)


def allgather_attend(shard: SequenceShard, attend: Attend, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
    """Attention of this rank's queries to all keys: (B, H, T, C).

    ``attend`` takes its queries for the last ones of the keys, so each chunk is given the keys up to its end.
    """
    k_BKSC, v_BKSC = AllGatherSequence.apply(torch.stack((k_BKTC, v_BKTC)), shard.group).unbind()
    parts = zip(q_BHTC.chunk(2, dim=2), shard.ends(k_BKSC.size(2)), strict=True)
    return torch.cat([attend(q, k_BKSC[:, :, :end], v_BKSC[:, :, :end]) for q, end in parts], dim=2)


class AllGatherSequence(torch.autograd.Function):
    """Every rank's T of the S tokens brought together in their order, along the last dimension but one.

    In the backward pass the gradients that all ranks have for a token are added up on the rank that holds it.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size(group))]
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
        dist.reduce_scatter(mine, parts, group=ctx.group)
        return mine, None
