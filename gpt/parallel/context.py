"""Context parallelism: ring attention (arXiv 2310.01889), and sequences sharded over ``cp`` ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt.config import AttentionBackend, CpMethod, TrainConfig
from gpt.model.attention import (
    Attended,
    Attention,
    attend_block,
    attend_block_backward,
    causal_bias,
    merge_blocks,
    merge_sinks,
    sink_gradient,
)
from gpt.model.ffn import set_sequence_mean
from gpt.model.layers import set_positions
from gpt.parallel.distributed import waiting

# Ring attention: keys and values circulate among the context-parallel ranks and meet every query (arXiv 2310.01889).
#
# While a rank computes with one block the next block is in transfer. No rank ever has more than two blocks, so memory
# per rank stays constant if the ranks grow with the sequence length. The arithmetic is in gpt/model/attention.py.
#
# B sequences, T tokens of each on this rank, H heads, K key-value heads, C head width. A rank has an early and a late
# chunk of each sequence, as ``SequenceShard`` below splits them. A block is keys and values: (2, B, K, T, C).


KEYS, GRADIENTS = 0, 1
"""Message tags of two kinds of transfers that run at the same time: keys and values, and their gradients."""


class RingAttention(torch.autograd.Function):
    """Causal attention of this rank's queries to the keys of all ranks, (B, H, T, C).

    The forward pass sends keys and values from rank to rank around a ring. The backward pass sends them around once
    more, and their gradients with them. ``own`` has the keys and values of this rank, (2, B, K, T, C).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_BHTC: Tensor,
        own: Tensor,
        sinks_H: Tensor | None,
        group: dist.ProcessGroup,
        fused: bool,
    ) -> Tensor:
        k_BKTC, v_BKTC = own
        y_BHTC, lse_BHT = attend_block(q_BHTC, k_BKTC, v_BKTC, True, fused)
        y_BHTC = y_BHTC.type_as(lse_BHT)
        ring = SequenceShard(group)
        transfer = Transfer(ring, own, KEYS)
        for block, first, keys in ring.arrivals(transfer, q_BHTC.size(2)):
            k, v = block[..., :keys, :]
            part, part_lse = attend_block(q_BHTC[:, :, first:], k, v, False, fused)
            part, part_lse = merge_blocks(y_BHTC[:, :, first:], lse_BHT[:, :, first:], part, part_lse)
            y_BHTC = torch.cat((y_BHTC[:, :, :first], part), dim=2)
            lse_BHT = torch.cat((lse_BHT[:, :, :first], part_lse), dim=2)
        if sinks_H is not None:
            y_BHTC, lse_BHT = merge_sinks(y_BHTC, lse_BHT, sinks_H)
        # Token-major in memory, as the kernels return it, so that the output matrix saves this tensor and no copy.
        y_BHTC = y_BHTC.type_as(q_BHTC).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q_BHTC, own, y_BHTC, lse_BHT, sinks_H)
        ctx.group, ctx.fused = group, fused
        return y_BHTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTC: Tensor) -> tuple[Tensor | None, ...]:
        q_BHTC, block, y_BHTC, lse_BHT, sinks_H = ctx.saved_tensors
        given = grad_BHTC.contiguous(), Attended(q_BHTC, y_BHTC, lse_BHT)
        ring = SequenceShard(ctx.group)
        transfer = Transfer(ring, block, KEYS)
        dq_BHTC, dblock = block_gradients(*given, block, (0, q_BHTC.size(2)), True, ctx.fused)
        collecting = Transfer(ring, dblock, GRADIENTS)
        for block, first, keys in ring.arrivals(transfer, q_BHTC.size(2)):
            dq, mine = block_gradients(*given, block, (first, keys), False, ctx.fused)
            dq_BHTC[:, :, first:] += dq
            dblock = collecting.wait()
            dblock[..., :keys, :] += mine
            collecting = Transfer(ring, dblock, GRADIENTS)
        dblock = collecting.wait().type_as(block)
        dsinks_H = None if sinks_H is None else sink_gradient(*given, sinks_H)
        return dq_BHTC.type_as(q_BHTC), dblock, dsinks_H, None, None


def block_gradients(
    grad_BHTC: Tensor, attended: Attended, block: Tensor, visible: tuple[int, int], causal: bool, fused: bool
) -> tuple[Tensor, Tensor]:
    """Return two gradients of attention to one block of keys. The first is that of the queries from index ``first`` on,
    (B, H, T - first, C). The second is that of the first ``keys`` keys and values of the block, (2, B, K, keys, C).
    Both have the dtype of ``attended.lse``.

    Args:
        grad_BHTC: gradient of the result of all blocks.
        attended: queries, and the result of all blocks.
        block: keys and values of the block, (2, B, K, T, C).
        visible: ``first`` (index of the first query) and ``keys`` (number of keys), see ``SequenceShard.arrivals``.
        causal: True for this rank's own block, in which a query attends only to keys up to its position.
        fused: True to use the flash kernel.
    """
    first, keys = visible
    grad, *seeing = (x[:, :, first:].contiguous() for x in (grad_BHTC, *attended))
    k, v = block[..., :keys, :]
    dq, dk, dv = attend_block_backward(grad, Attended(*seeing), k, v, causal, fused)
    return dq.type_as(attended.lse), torch.stack((dk, dv)).type_as(attended.lse)


class Transfer:
    """Asynchronous exchange in a ring of ranks: sends ``x`` to the next rank, and receives a tensor of the same shape
    from the previous rank. ``tag`` is ``KEYS`` or ``GRADIENTS``."""

    def __init__(self, ring: SequenceShard, x: Tensor, tag: int) -> None:
        # The send buffer must not change until the send completes.
        self._sent, self._received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        after = dist.get_global_rank(ring.group, (ring.rank + 1) % ring.ranks)
        before = dist.get_global_rank(ring.group, (ring.rank - 1) % ring.ranks)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, after, ring.group, tag),
                dist.P2POp(dist.irecv, self._received, before, ring.group, tag),
            ]
        )

    def wait(self) -> Tensor:
        """Wait until ``x`` is sent and the other tensor has arrived. Return the tensor that has arrived."""
        with waiting("cp"):
            for work in self._works:
                work.wait()
        return self._received


# Context parallelism: each sequence, and with it the activations, is sharded over ``cp`` ranks.
#
# Everything but attention works on one token at a time and needs no change. Context parallelism changes three places:
# its positions, ``attend`` of each attention, and the balance loss of experts. Gradients are reduced over these ranks
# and the data-parallel ranks together.
#
# B sequences, S tokens of each, T those of this rank, H heads, K key-value heads, C head width. N ranks, P tokens of a
# chunk: S = 2 N P, T = 2 P.


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SequenceShard:
    """The tokens of each sequence that this rank has, if N ranks share each sequence.

    A sequence is cut into 2 N chunks of equal length. Rank r has chunk r and chunk 2 N - 1 - r. A token attends to all
    tokens before it, so late chunks need more work than early ones, and an early and a late chunk balance the load.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)

    def arrivals(self, transfer: Transfer, tokens: int) -> Iterator[tuple[Tensor, int, int]]:
        """Yield the blocks of keys and values of the other ranks as they arrive, and send them on to the next rank.

        Each item is (block, first, keys): this rank's queries from index ``first`` on attend to the first ``keys`` keys
        of the block. ``transfer`` has begun to send this rank's own block, which has ``tokens`` tokens.

        A rank's early chunk comes before the early chunks of higher ranks, and its late chunk after their late chunks.
        So all queries attend to the early chunk of a lower rank, and the late queries to both chunks of a higher rank.
        """
        for distance in range(1, self.ranks):
            block = transfer.wait()
            if distance < self.ranks - 1:
                transfer = Transfer(self, block, KEYS)
            is_of_lower_rank = distance <= self.rank
            yield block, *((0, tokens // 2) if is_of_lower_rank else (tokens // 2, tokens))

    def part(self, x_BS: Tensor) -> Tensor:
        """Select this rank's tokens from whole sequences, (B, S) -> (B, T) with T = S / N."""
        chunks = x_BS.chunk(2 * self.ranks, dim=-1)
        return torch.cat((chunks[self.rank], chunks[-1 - self.rank]), dim=-1)

    def ends(self, length: int) -> tuple[int, int]:
        """Return the two positions at which this rank's chunks of a sequence of ``length`` tokens end (exclusive)."""
        chunk = length // (2 * self.ranks)
        return (self.rank + 1) * chunk, length - self.rank * chunk

    def mean(self, x: Tensor) -> Tensor:
        """Return the mean of ``x`` over the ranks that share the same sequences, without a gradient. Collective."""
        mean = x.detach().clone()
        with waiting("cp"):
            dist.all_reduce(mean, group=self.group)
        return mean / self.ranks


def shard_sequences(
    model: nn.Module, group: dist.ProcessGroup, config: TrainConfig, device: torch.device
) -> SequenceShard:
    """Apply context parallelism over the ranks of ``group`` to a model or a pipeline stage, in place.

    Returns:
        The shard of sequences of this rank. The model then takes the tokens that the method ``part`` of the shard
        selects from whole sequences of exactly ``block_size`` tokens, on ``device``.
    """
    shard = SequenceShard(group)
    set_positions(model, shard.part(torch.arange(config.model.block_size, device=device)))
    # Collectives are not compiled: they break the graph of a compiled block.
    set_sequence_mean(model, torch.compiler.disable(shard.mean))
    for module in model.modules():
        if isinstance(module, Attention):
            module.padding = module.narrower  # keys and values are sent as one tensor
            module.attend = torch.compiler.disable(build_attend(module, shard, config))  # type: ignore[method-assign]
    return shard


def build_attend(attention: Attention, shard: SequenceShard, config: TrainConfig) -> Attend:
    """Return a function that replaces ``attention.attend``. ``parallel.cp_method`` chooses it: ring attention, or
    attention to all-gathered keys and values.

    The function takes the queries, keys and values of this rank's tokens. It returns the result for these tokens,
    (B, H, T, C).
    """
    if config.parallel.cp_method is CpMethod.ring:
        fused = attention.backend is not AttentionBackend.manual
        sinks = attention.sinks

        def ring_attend(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
            sinks_H = None if sinks is None else sinks()
            return RingAttention.apply(q_BHTC, torch.stack((k_BKTC, v_BKTC)), sinks_H, shard.group, fused)

        return ring_attend
    for end in shard.ends(config.model.block_size):
        causal_bias(config.model.block_size // (2 * shard.ranks), end)
    attend = attention.attend

    def allgather_attend(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor) -> Tensor:
        k_BKSC, v_BKSC = AllGatherSequence.apply(torch.stack((k_BKTC, v_BKTC)), shard.group).unbind()
        # ``attend`` aligns its queries with the last keys, so each chunk gets the keys up to its end.
        parts = zip(q_BHTC.chunk(2, dim=2), shard.ends(k_BKSC.size(2)), strict=True)
        return torch.cat([attend(q, k_BKSC[:, :, :end], v_BKSC[:, :, :end]) for q, end in parts], dim=2)

    return allgather_attend


class AllGatherSequence(torch.autograd.Function):
    """All-gather of the parts of sequences along the second to last dimension, in the order of the tokens.

    The backward pass reduce-scatters the gradients: each rank gets the sums for its tokens.
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
