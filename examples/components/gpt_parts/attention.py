"""Attention that looks back a few tokens only."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import ModelConfig
from gpt.model.attention import LayerCache


class WindowAttention(nn.Module):
    """Causal attention to the last ``model.options.window`` tokens (Longformer, arXiv 2004.05150, section 3.1)."""

    parallel: ClassVar = ("pp",)

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.window = config.n_head, int(config.options.get("window", 64))
        self.query_key_value = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.output = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x_BTD: Tensor, cache: LayerCache | None = None) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.query_key_value(x_BTD).chunk(3, -1)
        )
        if cache is not None:
            k, v = cache.extend(k, v)
        new, seen = q.size(2), k.size(2)
        distance = torch.arange(seen - new, seen, device=x_BTD.device)[:, None] - torch.arange(
            seen, device=x_BTD.device
        )
        near = (distance >= 0) & (distance < self.window)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=near)
        return self.output(y.transpose(1, 2).flatten(2))

    @staticmethod
    def forward_flops(config: ModelConfig) -> int:
        """State the FLOPs for one sequence: of the four projections, and of the scores and the sums over all pairs."""
        return 2 * config.block_size * config.n_embd * (4 * config.n_embd + 2 * config.block_size)

    @staticmethod
    def saved_bytes(config: ModelConfig, width: int) -> int:
        """State the bytes kept for the backward pass of one sequence; numbers in matrix products have ``width``
        bytes."""
        tensors = 6 * config.n_embd * width  # the input; queries, keys and values; the result, and a copy of it
        mask = config.block_size * (1 + width)  # as truth values, and as numbers that are added to the scores
        return config.block_size * (tensors + mask + 4 * config.n_head)
