"""Causal self-attention with as many key-value heads as queries (MHA) or fewer (GQA, arXiv 2305.13245; one is MQA).

B batch, T time, D width, H heads, K key-value heads, C head width. The number of heads is read off the tensors, not
off the config, so a layer whose matrices were cut by heads from outside still computes its own part.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import AttentionBackend, ModelConfig, Position
from gpt.model.position import Rope


class Attention(nn.Module):
    """Project to queries, keys and values, attend to the past, project back (arXiv 1706.03762, section 3.2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.query = nn.Linear(config.n_embd, config.n_head * config.head_dim, bias=config.bias)
        self.key = nn.Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.bias)
        self.value = nn.Linear(config.n_embd, config.kv_heads * config.head_dim, bias=config.bias)
        self.output = nn.Linear(config.n_head * config.head_dim, config.n_embd, bias=config.bias)
        rope = config.position is Position.rope
        self.rope = Rope(config.block_size, config.head_dim, config.rope_base) if rope else None
        self.attend = sdpa_attention if config.attention is AttentionBackend.sdpa else manual_attention
        self.dropout = config.dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        q_BTHC = self.query(x_BTD).unflatten(-1, (-1, self.head_dim))
        k_BTKC = self.key(x_BTD).unflatten(-1, (-1, self.head_dim))
        v_BTKC = self.value(x_BTD).unflatten(-1, (-1, self.head_dim))
        if self.rope is not None:
            q_BTHC, k_BTKC = self.rope(q_BTHC), self.rope(k_BTKC)
        dropout = self.dropout if self.training else 0.0
        y_BHTC = self.attend(q_BTHC.transpose(1, 2), k_BTKC.transpose(1, 2), v_BTKC.transpose(1, 2), dropout)
        return self.output(y_BHTC.transpose(1, 2).flatten(2))


def sdpa_attention(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, dropout: float) -> Tensor:
    """torch's fused kernels, flash attention (arXiv 2307.08691) where the device and the dtype have it."""
    # enable_gqa narrows torch's choice of kernels, so it is asked for only where it is needed.
    grouped = q_BHTC.size(1) != k_BKTC.size(1)
    return F.scaled_dot_product_attention(q_BHTC, k_BKTC, v_BKTC, dropout_p=dropout, is_causal=True, enable_gqa=grouped)


def manual_attention(q_BHTC: Tensor, k_BKTC: Tensor, v_BKTC: Tensor, dropout: float) -> Tensor:
    """The formula written out, softmax(Q K^T / sqrt(C)) V with the future masked: the reference, T x T in memory."""
    sharers = q_BHTC.size(1) // k_BKTC.size(1)
    if sharers > 1:
        k_BKTC, v_BKTC = k_BKTC.repeat_interleave(sharers, dim=1), v_BKTC.repeat_interleave(sharers, dim=1)
    time, width = q_BHTC.shape[-2:]
    future_TT = torch.ones(time, time, dtype=torch.bool, device=q_BHTC.device).triu(1)
    scores_BHTT = (q_BHTC @ k_BKTC.mT) / math.sqrt(width)
    weights_BHTT = scores_BHTT.masked_fill(future_TT, -math.inf).softmax(-1)
    return F.dropout(weights_BHTT, dropout) @ v_BKTC
