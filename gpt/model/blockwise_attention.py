"""Attention to keys that come block by block, each block with the log-sum-exp of its scores (arXiv 2310.01889).

A softmax over all keys is put together from softmaxes over blocks of them: each result counts by how much of the sum of
exponentials its block has. On the way back the same sum of all blocks turns a block's scores into the weights of the
whole softmax, so each block can be computed again by itself (arXiv 2205.14135, section 3.1 and algorithm 4).

B batch, H heads, K key-value heads, C head width, T queries, S keys of a block. ``lse_BHT`` is the log-sum-exp of the
scores of each query, fp32 or wider. Must not know where blocks come from.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
FLASH_MULTIPLE = 8
"""Multiple to which heads are padded for CUDA's flash kernel; zeros beyond the width change nothing."""


def attend_block(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, causal: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """Attend to one block of keys; returns the result (B, H, T, C) and the log-sum-exp (B, H, T).

    Args:
        q_BHTC: queries.
        k_BKSC: keys; K divides H.
        v_BKSC: values.
        causal: each query looks at the keys up to its own, S = T; else at all of them.
        fused: by torch's flash kernel, which CPUs have, and GPUs for half precision; else, and where there is none, the
            formula written out, T x S in memory.
    """
    k_BHSC, v_BHSC = (repeat_for_queries(x, q_BHTC) for x in (k_BKSC, v_BKSC))
    if not (fused and has_kernel(q_BHTC)):
        scores_BHTS = scores(q_BHTC, k_BHSC, causal)
        lse_BHT = scores_BHTS.logsumexp(-1)
        return (scores_BHTS - lse_BHT.unsqueeze(-1)).exp().type_as(v_BHSC) @ v_BHSC, lse_BHT
    scale = 1 / math.sqrt(q_BHTC.size(-1))
    if q_BHTC.is_cuda:
        q, k, v = (pad_heads(x) for x in (q_BHTC, k_BHSC, v_BHSC))
        y, lse_BHT, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
        return y[..., : q_BHTC.size(-1)], lse_BHT
    y_BHTC, lse_BHT = aten._scaled_dot_product_flash_attention_for_cpu(q_BHTC, k_BHSC, v_BHSC, 0.0, causal, scale=scale)
    return y_BHTC, lse_BHT


def attend_block_backward(
    grad_BHTC: Tensor,
    q_BHTC: Tensor,
    k_BKSC: Tensor,
    v_BKSC: Tensor,
    y_BHTC: Tensor,
    lse_BHT: Tensor,
    causal: bool,
    fused: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute one block's addend to the gradient of the queries, and the gradients of its keys and values.

    Args:
        grad_BHTC: gradient of the result of all blocks.
        q_BHTC: queries.
        k_BKSC: keys of the block.
        v_BKSC: values of the block.
        y_BHTC: result of all blocks.
        lse_BHT: log-sum-exp over all blocks.
        causal: as in ``attend_block``.
        fused: as in ``attend_block``.
    """
    k_BHSC, v_BHSC = (repeat_for_queries(x, q_BHTC) for x in (k_BKSC, v_BKSC))
    if not (fused and has_kernel(q_BHTC)):
        dq, dk, dv = formula_backward(grad_BHTC, q_BHTC, k_BHSC, v_BHSC, y_BHTC, lse_BHT, causal)
    elif q_BHTC.is_cuda:
        dq, dk, dv = cuda_backward(grad_BHTC, q_BHTC, k_BHSC, v_BHSC, y_BHTC, lse_BHT, causal)
    else:
        scale = 1 / math.sqrt(q_BHTC.size(-1))
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BHTC, q_BHTC, k_BHSC, v_BHSC, y_BHTC, lse_BHT, 0.0, causal, scale=scale
        )
    return dq, sum_over_queries(dk, k_BKSC), sum_over_queries(dv, v_BKSC)


def formula_backward(
    grad_BHTC: Tensor, q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, y_BHTC: Tensor, lse_BHT: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients by the formulas of softmax and matrix products."""
    weights_BHTS = (scores(q_BHTC, k_BHSC, causal) - lse_BHT.unsqueeze(-1)).exp()
    drift_BHT1 = (grad_BHTC.type_as(lse_BHT) * y_BHTC.type_as(lse_BHT)).sum(-1, keepdim=True)
    pull_BHTS = weights_BHTS * ((grad_BHTC @ v_BHSC.mT).type_as(lse_BHT) - drift_BHT1)
    pull_BHTS = (pull_BHTS / math.sqrt(q_BHTC.size(-1))).type_as(q_BHTC)
    return pull_BHTS @ k_BHSC, pull_BHTS.mT @ q_BHTC, weights_BHTS.type_as(grad_BHTC).mT @ grad_BHTC


def cuda_backward(
    grad_BHTC: Tensor, q_BHTC: Tensor, k_BHSC: Tensor, v_BHSC: Tensor, y_BHTC: Tensor, lse_BHT: Tensor, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the gradients by CUDA's flash kernel."""
    width = q_BHTC.size(-1)
    grad, q, k, v, y = (pad_heads(x) for x in (grad_BHTC, q_BHTC, k_BHSC, v_BHSC, y_BHTC))
    unused = torch.empty(
        2, dtype=torch.uint64, device=q.device
    )  # the state of dropout's random numbers, without dropout
    found = aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, y, lse_BHT, None, None, q.size(2), k.size(2), 0.0, causal, unused, unused, scale=width**-0.5
    )
    dq, dk, dv = (x[..., :width] for x in found)
    return dq, dk, dv


def merge(y_BHTC: Tensor, lse_BHT: Tensor, other_BHTC: Tensor, other_lse_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """Merge the results of two sets of keys into the result of both, (B, H, T, C) and (B, H, T)."""
    both_BHT = torch.logaddexp(lse_BHT, other_lse_BHT)
    mine_BHT1, its_BHT1 = ((lse - both_BHT).exp().unsqueeze(-1) for lse in (lse_BHT, other_lse_BHT))
    return mine_BHT1 * y_BHTC + its_BHT1 * other_BHTC, both_BHT


def has_kernel(q_BHTC: Tensor) -> bool:
    """Tell whether torch has a flash kernel for these queries that returns the log-sum-exp and takes it back."""
    return not q_BHTC.is_cuda or q_BHTC.dtype in (torch.bfloat16, torch.float16)


def scores(q_BHTC: Tensor, k_BHSC: Tensor, causal: bool) -> Tensor:
    """Compute the scaled scores, (B, H, T, S) in fp32 or wider, the future at minus infinity."""
    found_BHTS = (q_BHTC @ k_BHSC.mT) / math.sqrt(q_BHTC.size(-1))
    found_BHTS = found_BHTS.to(torch.promote_types(found_BHTS.dtype, torch.float32))
    if causal:
        future_TS = torch.ones(found_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTC.device).triu(1)
        found_BHTS = found_BHTS.masked_fill(future_TS, -math.inf)
    return found_BHTS


def repeat_for_queries(x_BKSC: Tensor, q_BHTC: Tensor) -> Tensor:
    """Repeat keys or values for each head of the queries, (B, H, S, C)."""
    sharers = q_BHTC.size(1) // x_BKSC.size(1)
    return x_BKSC if sharers == 1 else x_BKSC.repeat_interleave(sharers, dim=1)


def sum_over_queries(x_BHSC: Tensor, x_BKSC: Tensor) -> Tensor:
    """Sum gradients over the query heads that share a key-value head; shaped as the second argument."""
    return x_BHSC.unflatten(1, (x_BKSC.size(1), -1)).sum(2)


def pad_heads(x_BHTC: Tensor) -> Tensor:
    """Pad heads with zeros to a width that the kernel takes."""
    return F.pad(x_BHTC, (0, -x_BHTC.size(-1) % FLASH_MULTIPLE))
