"""Causal self-attention (MHA, GQA, MQA; arXiv 2305.13245), its cache, packed documents, and attention that is computed
for one block of keys after another."""

from __future__ import annotations

import math
from collections import OrderedDict
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import CausalBias, causal_lower_right

from gpt.config import NEXT_DOCUMENT, AttentionBackend, ModelConfig, Pack, TrainConfig
from gpt.model.layers import COMPUTE_DTYPES, Linear, build_norm, build_rotation

# Key-value cache of attention: generation computes the keys and values of each token once.
#
#     cache = Cache(config.block_size)
#     logits_BTV = model(prompt_BT, cache)                # fills the cache
#     logits_BTV = model(next_B1, cache)                  # continues after the cached tokens; one new token or many
#
# B batch, T new tokens, S cached and new tokens, K key-value heads, C head width. The cache is for inference; training
# passes no cache.


class LayerCache:
    """Cached keys and values of one layer, for at most ``capacity`` tokens.

    The first call of ``extend`` allocates the memory for all tokens, with the shape, dtype and device of its arguments.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        """Number of cached tokens."""
        self._k_BKSC: Tensor | None = None
        self._v_BKSC: Tensor | None = None

    def extend(self, k_BKTC: Tensor, v_BKTC: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values of T new tokens, each (B, K, T, C). Return the keys and values of all S tokens so far,
        each (B, K, S, C)."""
        if self._k_BKSC is None or self._v_BKSC is None:
            self._k_BKSC, self._v_BKSC = (x.new_empty(*x.shape[:2], self.capacity, x.size(3)) for x in (k_BKTC, v_BKTC))
        start, end = self.length, self.length + k_BKTC.size(2)
        assert end <= self.capacity, f"{end} tokens in a cache for {self.capacity}"
        assert k_BKTC.size(0) == self._k_BKSC.size(0), "a cache belongs to one batch of sequences"
        with torch.no_grad():
            self._k_BKSC[:, :, start:end] = k_BKTC
            self._v_BKSC[:, :, start:end] = v_BKTC
        self.length = end
        return self._k_BKSC[:, :, :end], self._v_BKSC[:, :, :end]


class Cache:
    """Caches of all layers, for one batch of sequences of equal length.

    ``capacity`` is the largest number of tokens, at most the model's ``block_size``. Memory per token and sequence: 2 x
    n_layer x kv_heads x head_dim numbers; in latent attention n_layer x (kv_lora_rank + rope_head_width).
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._layers: list[LayerCache] = []

    @property
    def length(self) -> int:
        """Number of cached tokens, which is the position of the next token."""
        return self._layers[0].length if self._layers else 0

    def layer(self, index: int) -> LayerCache:
        """Return the cache of the layer ``index``, from 0; create it at the first call."""
        while len(self._layers) <= index:
            self._layers.append(LayerCache(self.capacity))
        return self._layers[index]


# Attention to keys that arrive block by block, each block with the log-sum-exp of its scores (arXiv 2310.01889).
#
# A softmax over all keys is a weighted sum of softmaxes over blocks of keys. The weight of a block is its share of the
# sum of exponentials. In the backward pass the sum over all blocks turns a block's scores into the weights of the whole
# softmax. So each block can be recomputed by itself (arXiv 2205.14135, section 3.1 and algorithm 4).
#
# B batch, H heads, K key-value heads, C head width, T queries, S keys of a block. ``lse_BHT`` is the log-sum-exp of the
# scores of each query, fp32 or wider.


aten = torch.ops.aten
FLASH_MULTIPLE = 8
"""Widths of heads are padded with zeros to a multiple of this for CUDA's flash kernel."""


def attend_block(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, causal: bool, fused: bool) -> tuple[Tensor, Tensor]:
    """Compute attention to one block of keys. Return the result (B, H, T, C) and the log-sum-exp of the scores
    (B, H, T).

    Args:
        q_BHTC: queries.
        k_BKSC: keys; K divides H.
        v_BKSC: values.
        causal: True if each query attends to the keys up to its own position (then S = T); False for all keys.
        fused: True to use torch's flash kernel, which exists for CPUs, and on GPUs for half precision. If False, or if
            there is no kernel, the formula is computed directly, with T x S numbers per head in memory.
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


class Documents(NamedTuple):
    """Positions and attention bias for packed documents, of a batch of sequences."""

    positions: Tensor
    """Position of each token in its document, (B, T) integers."""
    bias: Tensor
    """Tensor that is added to the scores of attention, (B, 1, T, T): 0 if the key is in the same document as the query
    and not after it, else minus infinity. It has the dtype of queries and keys, so that no layer has to convert it."""


def find_documents(config: TrainConfig, targets_BT: Tensor) -> Documents | None:
    """Return positions and attention bias for the packed documents of a batch; None if documents are not packed.

    A document ends at a target ``NEXT_DOCUMENT``. A new document begins at each sequence's first token. The bias has
    B x T x T numbers.
    """
    if config.data.pack is Pack.none:
        return None
    ends_BT = targets_BT == NEXT_DOCUMENT
    index_T = torch.arange(ends_BT.size(1), device=ends_BT.device)
    starts_BT = F.pad(ends_BT[:, :-1], (1, 0))
    first_BT = (index_T * starts_BT).cummax(1).values
    hidden_BTT = (first_BT.unsqueeze(2) != first_BT.unsqueeze(1)) | (index_T > index_T.unsqueeze(1))
    bias_BTT = torch.zeros(hidden_BTT.shape, dtype=COMPUTE_DTYPES[config.precision], device=ends_BT.device)
    return Documents(index_T - first_BT, bias_BTT.masked_fill_(hidden_BTT, -math.inf).unsqueeze(1))


class Attended(NamedTuple):
    """Queries, and the result of their attention to all blocks of keys, as the backward pass of each block needs
    them."""

    queries: Tensor
    """Queries, (B, H, T, C)."""
    result: Tensor
    """Result of attention to all blocks, (B, H, T, C)."""
    lse: Tensor
    """Log-sum-exp of the scores over all blocks, (B, H, T)."""


def attend_block_backward(
    grad_BHTC: Tensor, attended: Attended, k_BKSC: Tensor, v_BKSC: Tensor, causal: bool, fused: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the backward pass of attention to one block of keys. Return three gradients: the part of the gradient of
    the queries (B, H, T, C) that comes from this block, and those of its keys and values, each (B, K, S, C).

    Args:
        grad_BHTC: gradient of the result of all blocks.
        attended: queries, and the result of all blocks.
        k_BKSC: keys of the block.
        v_BKSC: values of the block.
        causal: True if each query attends to the keys up to its own position, see ``attend_block``.
        fused: True to use the flash kernel, see ``attend_block``.
    """
    q_BHTC, y_BHTC, lse_BHT = attended
    k_BHSC, v_BHSC = (repeat_for_queries(x, q_BHTC) for x in (k_BKSC, v_BKSC))
    scale = 1 / math.sqrt(q_BHTC.size(-1))
    if not (fused and has_kernel(q_BHTC)):
        weights_BHTS = (scores(q_BHTC, k_BHSC, causal) - lse_BHT.unsqueeze(-1)).exp()
        drift_BHT1 = (grad_BHTC.type_as(lse_BHT) * y_BHTC.type_as(lse_BHT)).sum(-1, keepdim=True)
        pull_BHTS = weights_BHTS * ((grad_BHTC @ v_BHSC.mT).type_as(lse_BHT) - drift_BHT1)
        pull_BHTS = (pull_BHTS / math.sqrt(q_BHTC.size(-1))).type_as(q_BHTC)
        dq, dk = pull_BHTS @ k_BHSC, pull_BHTS.mT @ q_BHTC
        dv = weights_BHTS.type_as(grad_BHTC).mT @ grad_BHTC
    elif q_BHTC.is_cuda:
        width = q_BHTC.size(-1)
        grad, q, k, v, y = (pad_heads(x) for x in (grad_BHTC, q_BHTC, k_BHSC, v_BHSC, y_BHTC))
        # The kernel requires the state of dropout's random numbers, even without dropout.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        found = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, y, lse_BHT, None, None, q.size(2), k.size(2), 0.0, causal, unused, unused, scale=width**-0.5
        )
        dq, dk, dv = (x[..., :width] for x in found)
    else:
        dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_BHTC, q_BHTC, k_BHSC, v_BHSC, y_BHTC, lse_BHT, 0.0, causal, scale=scale
        )
    return dq, sum_over_queries(dk, k_BKSC), sum_over_queries(dv, v_BKSC)


def merge_blocks(y_BHTC: Tensor, lse_BHT: Tensor, other_BHTC: Tensor, other_lse_BHT: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two results of attention to different keys. Return the result of attention to all these keys (B, H, T, C),
    and its log-sum-exp (B, H, T)."""
    both_BHT = torch.logaddexp(lse_BHT, other_lse_BHT)
    mine_BHT1, its_BHT1 = ((lse - both_BHT).exp().unsqueeze(-1) for lse in (lse_BHT, other_lse_BHT))
    return mine_BHT1 * y_BHTC + its_BHT1 * other_BHTC, both_BHT


# Sinks: one more column of scores, whose logit is learned for each head, and which has no value (gpt-oss).
#
# The column only adds to the sum of exponentials. So the column is merged like one more block of keys, whose result is
# 0. The backward pass of the other blocks needs only the new sum.


class Sinks(nn.Module):
    """Attention sinks: one trained logit for each head, (H,). The softmax of a head treats its sink as the score of one
    more key, which has no value."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(heads))

    def forward(self) -> Tensor:
        return self.weight


def merge_sinks(y_BHTC: Tensor, lse_BHT: Tensor, sinks_H: Tensor) -> tuple[Tensor, Tensor]:
    """Add sinks to the result of attention to all keys. Return the new result (B, H, T, C) and its log-sum-exp
    (B, H, T)."""
    both_BHT = torch.logaddexp(lse_BHT, sinks_H.type_as(lse_BHT).unsqueeze(1))
    return y_BHTC * (lse_BHT - both_BHT).exp().unsqueeze(-1).type_as(y_BHTC), both_BHT


def sink_gradient(grad_BHTC: Tensor, attended: Attended, sinks_H: Tensor) -> Tensor:
    """Return the gradient of the sinks, (H,).

    Args:
        grad_BHTC: gradient of the result of ``merge_sinks``.
        attended: queries, and the result of ``merge_sinks``.
        sinks_H: the sinks.
    """
    share_BHT = (sinks_H.unsqueeze(1) - attended.lse).exp()
    return -(share_BHT * (grad_BHTC * attended.result).sum(-1)).sum((0, 2)).type_as(sinks_H)


class SinkAttention(torch.autograd.Function):
    """Causal attention with sinks by torch's flash kernel. The inputs are queries (B, H, T, C), keys and values, each
    (B, K, T, C), and sinks (H,); the result is (B, H, T, C)."""

    @staticmethod
    def forward(ctx: Any, q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, sinks_H: Tensor) -> Tensor:
        y_BHTC, lse_BHT = merge_sinks(*attend_block(q_BHTC, k_BKTC, v_BKTC, True, True), sinks_H)
        ctx.save_for_backward(q_BHTC, k_BKTC, v_BKTC, y_BHTC, lse_BHT, sinks_H)
        return y_BHTC

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTC: Tensor) -> tuple[Tensor, ...]:
        q_BHTC, k_BKTC, v_BKTC, y_BHTC, lse_BHT, sinks_H = ctx.saved_tensors
        given = grad_BHTC, Attended(q_BHTC, y_BHTC, lse_BHT)
        return *attend_block_backward(*given, k_BKTC, v_BKTC, True, True), sink_gradient(*given, sinks_H)


def has_kernel(q_BHTC: Tensor) -> bool:
    """Return True if torch has a flash kernel for the device and dtype of these queries."""
    return not q_BHTC.is_cuda or q_BHTC.dtype in (torch.bfloat16, torch.float16)


def scores(q_BHTC: Tensor, k_BHSC: Tensor, causal: bool) -> Tensor:
    """Compute the scaled scores Q K^T / sqrt(C), (B, H, T, S), in fp32 or wider. With ``causal``, scores of keys after
    the query are minus infinity."""
    found_BHTS = (q_BHTC @ k_BHSC.mT) / math.sqrt(q_BHTC.size(-1))
    found_BHTS = found_BHTS.to(torch.promote_types(found_BHTS.dtype, torch.float32))
    if causal:
        future_TS = torch.ones(found_BHTS.shape[-2:], dtype=torch.bool, device=q_BHTC.device).triu(1)
        found_BHTS = found_BHTS.masked_fill(future_TS, -math.inf)
    return found_BHTS


def repeat_for_queries(x_BKSC: Tensor, q_BHTC: Tensor) -> Tensor:
    """Repeat the K heads of keys or values for the H heads of the queries, (B, K, S, C) -> (B, H, S, C)."""
    sharers = q_BHTC.size(1) // x_BKSC.size(1)
    return x_BKSC if sharers == 1 else x_BKSC.repeat_interleave(sharers, dim=1)


def sum_over_queries(x_BHSC: Tensor, x_BKSC: Tensor) -> Tensor:
    """Sum gradients over the query heads that share a key-value head, (B, H, S, C) -> (B, K, S, C). Of ``x_BKSC`` only
    the shape is used."""
    return x_BHSC.unflatten(1, (x_BKSC.size(1), -1)).sum(2)


def pad_heads(x_BHTC: Tensor) -> Tensor:
    """Pad the width of heads with zeros to a multiple of ``FLASH_MULTIPLE``."""
    return F.pad(x_BHTC, (0, -x_BHTC.size(-1) % FLASH_MULTIPLE))


# Causal self-attention with as many key-value heads as query heads (MHA), fewer (GQA, arXiv 2305.13245), or one (MQA).
#
# B batch, T time, S time with the cached tokens (S = T without a cache), D width, H heads, K key-value heads, C head
# width. The number of heads comes from the shapes of the tensors, not from the config. So a layer whose matrices are
# sharded by heads computes its own part.


class Attention(nn.Module):
    """Project to queries, keys and values, attend to the past, project back (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.narrower = config.head_dim, config.head_dim - config.value_width
        self.padding = 0 if config.attention is AttentionBackend.manual else self.narrower
        """Number of zeros that are appended to the values of each head, because torch's kernels have one width for keys
        and values."""
        self.add_inputs(config)
        self.output = Linear(config.n_head * config.value_width, config.n_embd, bias=config.bias)
        # One gain for all heads, so that heads can be sharded.
        self.query_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.key_norm = build_norm(config, config.head_dim) if config.qk_norm else None
        self.rope = build_rotation(config)
        self.backend = config.attention
        self.dropout = config.dropout
        self.window, self.softcap = config.window, config.attention_softcap
        self.sinks = Sinks(config.n_head) if config.attention_sinks else None

    def add_inputs(self, config: ModelConfig) -> None:
        """Add the layers that compute queries, keys and values."""
        self.query = Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)
        self.key = Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.bias)
        self.value = Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.bias)

    def forward(self, x_BTD: Tensor, past: LayerCache | Documents | None = None) -> Tensor:
        """Compute attention, (B, T, D) -> (B, T, D).

        If ``past`` is a cache, the T tokens follow the cached tokens, and are added to the cache. If ``past`` has
        packed documents, a token attends to its own document only. None means no cache and no packed documents.
        """
        cache = past if isinstance(past, LayerCache) else None
        documents = past if isinstance(past, Documents) else None
        start = documents.positions if documents is not None else 0 if cache is None else cache.length
        q_BHTC, k_BKSC, v_BKSC = self.inputs(x_BTD, start, cache)
        y_BHTC = self.attend(q_BHTC, k_BKSC, v_BKSC, *([] if documents is None else [documents.bias]))
        y_BHTC = y_BHTC[..., : -self.padding] if self.padding else y_BHTC
        return self.output(y_BHTC.transpose(1, 2).flatten(2))

    def inputs(self, x_BTD: Tensor, start: int | Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries (B, H, T, C) of the T new tokens, and keys and values (B, K, S, C) of the cached and new
        tokens; of the new tokens alone if ``cache`` is None.

        ``start`` is the position of the first new token, or a tensor with the positions of all new tokens.
        """
        q_BTHC = self.query(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKC = self.key(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKC = self.value(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            # Under autocast a norm returns fp32, while the values stay bf16.
            q_BTHC, k_BTKC = self.query_norm(q_BTHC).type_as(v_BTKC), self.key_norm(k_BTKC).type_as(v_BTKC)
        if self.rope is not None:
            q_BTHC, k_BTKC = self.rope(q_BTHC, start), self.rope(k_BTKC, start)
        q_BHTC, k_BKSC, v_BKSC = q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2)
        if cache is not None:
            k_BKSC, v_BKSC = cache.extend(k_BKSC, v_BKSC)
        return q_BHTC, k_BKSC, v_BKSC

    def attend(self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, bias_B1TS: Tensor | None = None) -> Tensor:
        """Compute attention by the backend of the config, (B, H, T, C). The queries are those of the last T of S
        tokens.

        ``bias_B1TS`` is added to the scores instead of a causal mask; None means a causal mask. With a window, each
        block of queries attends to its own keys and those of the previous block, and a mask hides keys outside of the
        window.

        Context parallelism replaces this method, because other ranks have some of the keys.
        """
        new, seen = q_BHTC.size(2), k_BKSC.size(2)
        if self.window is None or seen <= self.window:
            return self.attend_whole(q_BHTC, k_BKSC, v_BKSC, bias_B1TS)
        parts = []
        for first in range(0, new, self.window):
            last = min(first + self.window, new)
            keys = slice(max(0, seen - new + first - self.window), seen - new + last)
            key_S = torch.arange(keys.stop - keys.start, device=q_BHTC.device)
            distance_TS = key_S[first - last :, None] - key_S
            hidden_TS = (distance_TS < 0) | (distance_TS >= self.window)
            given = q_BHTC[:, :, first:last], k_BKSC[:, :, keys], v_BKSC[:, :, keys]
            bias = q_BHTC.new_zeros(()) if bias_B1TS is None else bias_B1TS[:, :, first:last, keys]
            parts.append(self.attend_whole(*given, bias.masked_fill(hidden_TS, -math.inf)))
        return torch.cat(parts, dim=2)

    def attend_whole(self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, bias_B1TS: Tensor | None) -> Tensor:
        """Compute attention to all given keys, without a window, (B, H, T, C). Arguments as in ``attend``."""
        dropout = self.dropout if self.training else 0.0
        sinks_H = None if self.sinks is None else self.sinks()
        # Sinks need the log-sum-exp. The kernels return it only without a mask, a cache and dropout.
        plain = bias_B1TS is None and not dropout and q_BHTC.size(2) == k_BKSC.size(2)
        if self.backend is AttentionBackend.manual or (sinks_H is not None and not plain):
            return self.attend_manually(q_BHTC, k_BKSC, v_BKSC, dropout, bias_B1TS)
        if sinks_H is not None:
            return SinkAttention.apply(q_BHTC, k_BKSC, v_BKSC, sinks_H)
        if self.backend is AttentionBackend.flash:
            with sdpa_kernel(FLASH_FIRST, set_priority=True):
                return sdpa_attention(q_BHTC, k_BKSC, v_BKSC, dropout, bias_B1TS)
        return sdpa_attention(q_BHTC, k_BKSC, v_BKSC, dropout, bias_B1TS)

    def attend_manually(
        self, q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, dropout: float, bias_B1TS: Tensor | None
    ) -> Tensor:
        """Compute softmax(Q K^T / sqrt(C) + bias) V, (B, H, T, C), directly: the reference for fused kernels.

        If ``bias_B1TS`` is None, a causal mask is used. The scores, T x S numbers per head, are in memory. ``softcap``
        bounds the scores if the model has a bound. Sinks are the scores of one more key, which has no value.
        """
        k_BHSC, v_BHSC = (repeat_for_queries(x, q_BHTC) for x in (k_BKSC, v_BKSC))
        new, seen = q_BHTC.size(2), k_BHSC.size(2)
        scores_BHTS = (q_BHTC @ k_BHSC.mT) / math.sqrt(q_BHTC.size(3))
        if self.softcap is not None:
            scores_BHTS = softcap(scores_BHTS, self.softcap)
        if bias_B1TS is None:
            future_TS = torch.ones(new, seen, dtype=torch.bool, device=q_BHTC.device).triu(seen - new + 1)
            scores_BHTS = scores_BHTS.masked_fill(future_TS, -math.inf)
        else:
            scores_BHTS = scores_BHTS + bias_B1TS
        if self.sinks is not None:
            sinks_BHT1 = self.sinks().type_as(scores_BHTS)[:, None, None].expand(*scores_BHTS.shape[:3], 1)
            scores_BHTS = torch.cat((scores_BHTS, sinks_BHT1), dim=-1)
        return F.dropout(scores_BHTS.softmax(-1)[..., :seen], dropout) @ v_BHSC


class LatentAttention(Attention):
    """Attention whose keys and values are computed from one short vector for each token, the latent (multi-head latent
    attention, arXiv 2405.04434, section 2.1).

    Rotary embeddings rotate only the last channels of each head. All heads share the rotated channels of the keys. A
    cache keeps only the latent and these shared channels. In shapes, R is the width of the latent, and P the number of
    rotated channels.
    """

    def add_inputs(self, config: ModelConfig) -> None:
        rank, between, width = config.kv_lora_rank, config.q_lora_rank, config.n_head * config.head_dim
        assert rank is not None
        self.plain_dim, self.widths = config.value_width, (rank, config.rotary_width)
        make = partial(Linear, bias=config.bias)
        self.query = make(config.n_embd, width)
        if between is not None:
            layers = {"down": make(config.n_embd, between), "norm": build_norm(config, between)}
            self.add_module("query", nn.Sequential(OrderedDict(layers, up=make(between, width))))
        self.latent, self.latent_norm = make(config.n_embd, sum(self.widths)), build_norm(config, rank)
        self.expand = make(rank, 2 * config.n_head * config.value_width)

    def inputs(self, x_BTD: Tensor, start: int | Tensor, cache: LayerCache | None) -> tuple[Tensor, Tensor, Tensor]:
        plain_BTHC, turned_BTHP = (
            self.query(x_BTD).unflatten(-1, (-1, self.head_dim)).tensor_split([self.plain_dim], -1)
        )
        latent_BT1R, shared_BT1P = self.latent(x_BTD).unsqueeze(2).split(self.widths, dim=-1)
        latent_BT1R = self.latent_norm(latent_BT1R).type_as(shared_BT1P)
        if self.rope is not None:
            # DeepSeek rotates adjacent channels as a pair, ``Rope`` channels c and c + P/2.
            paired = (x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2) for x in (turned_BTHP, shared_BT1P))
            turned_BTHP, shared_BT1P = (self.rope(x, start) for x in paired)
        latent_B1SR, shared_B1SP = latent_BT1R.transpose(1, 2), shared_BT1P.transpose(1, 2)
        if cache is not None:
            latent_B1SR, shared_B1SP = cache.extend(latent_B1SR, shared_B1SP)
        both_BSHC = self.expand(latent_B1SR.squeeze(1)).unflatten(-1, (-1, 2 * self.plain_dim))
        k_BHSC, v_BHSC = both_BSHC.transpose(1, 2).chunk(2, dim=-1)
        k_BHSC = torch.cat((k_BHSC, shared_B1SP.expand(-1, k_BHSC.size(1), -1, -1)), dim=-1)
        q_BHTC = torch.cat((plain_BTHC, turned_BTHP), dim=-1).transpose(1, 2)
        return q_BHTC, k_BHSC, F.pad(v_BHSC, (0, self.padding))


def softcap(x: Tensor, bound: float) -> Tensor:
    """Return ``bound`` tanh(x / ``bound``), a number between -``bound`` and ``bound`` (Gemma 2, arXiv 2408.00118,
    section 2)."""
    return torch.tanh(x / bound) * bound


FLASH_FIRST = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, *FLASH_FIRST]
HOPPER = (9, 0)
"""Compute capability from which cuDNN's attention is the fastest. FlashAttention-2, torch's flash kernel, was written
for Ampere and reaches 35 % of an H100's peak; 75 % is possible (arXiv 2407.08608)."""


def prefer_fast_kernels(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which torch tries cuDNN's attention kernel before its other kernels, on Hopper and later
    GPUs. On other devices the context does nothing.

    A process enters the context once, because entering costs the host as much as an operation.
    """
    if device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) < HOPPER:
        return nullcontext()
    return sdpa_kernel(CUDNN_FIRST, set_priority=True)


def sdpa_attention(
    q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, dropout: float, bias_B1TS: Tensor | None = None
) -> Tensor:
    """Compute attention by torch's ``scaled_dot_product_attention``, (B, H, T, C).

    torch chooses flash attention (arXiv 2307.08691) if device and dtype support it, and with a bias on GPUs another
    fused kernel. A bias of None means a causal mask.
    """
    new, seen = q_BHTC.size(2), k_BKSC.size(2)
    # torch's is_causal aligns the first query with the first key. With cached keys, the last query belongs to the last
    # key, and a single query sees all keys. This bias needs no T x S mask if the kernel supports it.
    bias = causal_bias(new, seen) if 1 < new < seen and bias_B1TS is None else bias_B1TS
    # enable_gqa restricts torch's choice of kernels, so it is set only if needed.
    grouped = q_BHTC.size(1) != k_BKSC.size(1)
    return F.scaled_dot_product_attention(
        q_BHTC, k_BKSC, v_BKSC, bias, dropout_p=dropout, is_causal=new == seen and bias is None, enable_gqa=grouped
    )


@cache
def causal_bias(new: int, seen: int) -> CausalBias:
    """Return the causal bias of attention for queries of the last ``new`` of ``seen`` tokens. The bias stores these two
    numbers, not a mask (new, seen).

    The result is cached, because torch cannot create one while selective activation checkpointing records an operation.
    """
    return causal_lower_right(new, seen)
