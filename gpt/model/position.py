"""How a token knows its place: a learned table added to the embedding, or rotary embeddings inside attention.

B batch, T time, D width, H heads, C head width. A sequence starts at position 0, unless
a cache (gpt/model/cache.py) holds its beginning.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LearnedPosition(nn.Module):
    """One trained vector for each position, added to the token's (GPT-2)."""

    def __init__(self, block_size: int, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block_size, n_embd))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x_BTD: Tensor, start: int = 0) -> Tensor:
        return x_BTD + self.weight[start : start + x_BTD.size(1)]


class Rope(nn.Module):
    """Rotary embeddings (RoFormer, arXiv 2104.09864): queries and keys are turned by an angle that grows with position.

    Channel c is paired with channel c + C/2, as in the Llama weights, not with c + 1 as in the paper; the two differ
    by a permutation of the rows of the query and key matrices.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, block_size: int, head_dim: int, base: float) -> None:
        super().__init__()
        assert head_dim % 2 == 0, f"rotary embeddings turn pairs of channels, and a head has {head_dim}"
        self.base = base
        self.register_buffer("cos", torch.empty(block_size, head_dim // 2), persistent=False)
        self.register_buffer("sin", torch.empty(block_size, head_dim // 2), persistent=False)
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the tables in place, on whatever device they lie.

        They are computed on the CPU in float64: the same bits on every device, and no loss of phase far from the start.
        """
        positions, pairs = self.cos.shape
        rates = self.base ** -(torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
        angles = torch.outer(torch.arange(positions, dtype=torch.float64, device="cpu"), rates)
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, x_BTHC: Tensor, start: int = 0) -> Tensor:
        end = start + x_BTHC.size(1)
        cos, sin = self.cos[start:end, None], self.sin[start:end, None]
        first, second = x_BTHC.chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        # The tables are fp32, which would promote bf16 queries and keys, while the values stay bf16.
        return turned.type_as(x_BTHC)
