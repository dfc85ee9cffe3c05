"""Ring attention: keys and values circulate among the context-parallel ranks and meet every query (arXiv 2310.01889).

While a rank computes with one block the next one is in transfer, and no rank ever holds more than two, so memory per
rank stays constant where ranks grow with the sequence length. Owns the transfers, and the part of a block that is
visible to a rank's queries. The arithmetic is gpt/model/blockwise_attention.py.

B sequences, T tokens of one that a rank holds, H heads, K key-value heads, C head width. A rank holds an early and a
late chunk of each sequence, as gpt/parallel/context.py shards them. A block is keys and values: (2, B, K, T, C).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gpt.config import AttentionBackend
from gpt.model.blockwise_attention import attend_block, attend_block_backward, merge
from gpt.parallel.timeline import waiting

KEYS, GRADIENTS = 0, 1
"""Tags that tell apart concurrent transfers."""


def ring_attend(
    group: dist.ProcessGroup, backend: AttentionBackend, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor
) -> Tensor:
    """Attend from this rank's queries to the keys of all ranks of ``group``: (B, H, T, C)."""
    y_BHTC: Tensor = RingAttention.apply(q_BHTC, k_BKTC, v_BKTC, group, backend is not AttentionBackend.manual)
    return y_BHTC


class RingAttention(torch.autograd.Function):
    """Causal attention over all blocks of the ring; in the backward pass keys circulate again, with their gradients."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, group: dist.ProcessGroup, fused: bool
    ) -> Tensor:
        own = torch.stack((k_BKTC, v_BKTC))
        y_BHTC, lse_BHT = attend_block(q_BHTC, k_BKTC, v_BKTC, True, fused)
        y_BHTC = y_BHTC.type_as(lse_BHT)
        ring = Ring(group)
        transfer = ring.send_to_next(own, KEYS)
        for owner in ring.others():
            block = transfer.wait()
            if owner != ring.next:
                transfer = ring.send_to_next(block, KEYS)
            first, keys = visible_keys(owner, ring.rank, q_BHTC.size(2))
            k, v = block[..., :keys, :]
            part, part_lse = attend_block(q_BHTC[:, :, first:], k, v, False, fused)
            part, part_lse = merge(y_BHTC[:, :, first:], lse_BHT[:, :, first:], part, part_lse)
            y_BHTC = torch.cat((y_BHTC[:, :, :first], part), dim=2)
            lse_BHT = torch.cat((lse_BHT[:, :, :first], part_lse), dim=2)
        # Token-major in memory, as the kernels return it, so that the output matrix saves this tensor and no copy.
        y_BHTC = y_BHTC.type_as(q_BHTC).transpose(1, 2).contiguous().transpose(1, 2)
        ctx.save_for_backward(q_BHTC, own, y_BHTC, lse_BHT)
        ctx.group, ctx.fused = group, fused
        return y_BHTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTC: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q_BHTC, block, y_BHTC, lse_BHT = ctx.saved_tensors
        given = (grad_BHTC.contiguous(), q_BHTC, y_BHTC, lse_BHT)
        ring = Ring(ctx.group)
        transfer = ring.send_to_next(block, KEYS)
        dq_BHTC, dblock = block_gradients(*given, block, 0, q_BHTC.size(2), True, ctx.fused)
        collecting = ring.send_to_next(dblock, GRADIENTS)
        for owner in ring.others():
            block = transfer.wait()
            if owner != ring.next:
                transfer = ring.send_to_next(block, KEYS)
            first, keys = visible_keys(owner, ring.rank, q_BHTC.size(2))
            dq, mine = block_gradients(*given, block, first, keys, False, ctx.fused)
            dq_BHTC[:, :, first:] += dq
            dblock = collecting.wait()
            dblock[..., :keys, :] += mine
            collecting = ring.send_to_next(dblock, GRADIENTS)
        dk_BKTC, dv_BKTC = collecting.wait().type_as(block)
        return dq_BHTC.type_as(q_BHTC), dk_BKTC, dv_BKTC, None, None


def block_gradients(
    grad_BHTC: Tensor,
    q_BHTC: Tensor,
    y_BHTC: Tensor,
    lse_BHT: Tensor,
    block: Tensor,
    first: int,
    keys: int,
    causal: bool,
    fused: bool,
) -> tuple[Tensor, Tensor]:
    """Compute the gradients between the first ``keys`` of a block and the queries from ``first`` on.

    Returns those of the queries, and those of keys and values as one tensor, in the precision of the accumulation.
    """
    grad, q, y, lse = (x[:, :, first:].contiguous() for x in (grad_BHTC, q_BHTC, y_BHTC, lse_BHT))
    k, v = block[..., :keys, :]
    dq, dk, dv = attend_block_backward(grad, q, k, v, y, lse, causal, fused)
    return dq.type_as(lse), torch.stack((dk, dv)).type_as(lse)


def visible_keys(owner: int, rank: int, tokens: int) -> tuple[int, int]:
    """Return the first of this rank's queries that attends to another rank's block, and the number of keys it sees.

    A rank's early chunk comes before those of higher ranks, and its late one after theirs. So every query sees the
    early chunk of a lower rank, and the late queries see both chunks of a higher one.
    """
    return (0, tokens // 2) if owner < rank else (tokens // 2, tokens)


class Ring:
    """A process group as a ring, in which each rank sends to the next one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.next = (self.rank + 1) % self.ranks

    def others(self) -> list[int]:
        """List the owners of the blocks in order of arrival; the last one is the next rank's, and is not sent on."""
        return [(self.rank - i) % self.ranks for i in range(1, self.ranks)]

    def send_to_next(self, x: Tensor, tag: int) -> Transfer:
        """Start sending a tensor to the next rank and receiving the previous one's, of the same shape."""
        return Transfer(self, x, tag)


class Transfer:
    """An asynchronous send to the next rank together with a receive from the previous one."""

    def __init__(self, ring: Ring, x: Tensor, tag: int) -> None:
        # The send buffer must not change until the send completes.
        self._sent, self._received = x.contiguous(), torch.empty_like(x, memory_format=torch.contiguous_format)
        after = dist.get_global_rank(ring.group, ring.next)
        before = dist.get_global_rank(ring.group, (ring.rank - 1) % ring.ranks)
        self._works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, self._sent, after, ring.group, tag),
                dist.P2POp(dist.irecv, self._received, before, ring.group, tag),
            ]
        )

    def wait(self) -> Tensor:
        """Wait for the transfer; return the received tensor."""
        with waiting("cp"):
            for work in self._works:
                work.wait()
        return self._received
