"""Positions of tokens: a learned table added to the embedding, or rotary embeddings inside attention.

B batch, T time, D width, H heads, C head width. The tokens are a whole sequence from position 0 on, unless a cache
(gpt/model/attention.py) has its beginning, or ``set_positions`` has set their positions.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt.components import build_part
from gpt.config import ModelConfig, Position, RopeScaling


class LearnedPosition(nn.Module):
    """Table with one trained vector for each position, added to that of the token (GPT-2)."""

    def __init__(self, block_size: int, n_embd: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(block_size, n_embd))
        nn.init.normal_(self.weight, std=0.02)
        self.positions_T: Tensor | None = None

    def forward(self, x_BTD: Tensor, start: int = 0) -> Tensor:
        tokens = slice(start, start + x_BTD.size(1))
        if self.positions_T is not None:
            return x_BTD + F.embedding(self.positions_T[tokens], self.weight)
        return x_BTD + self.weight[tokens]


class Rope(nn.Module):
    """Rotary embeddings (RoFormer, arXiv 2104.09864): queries and keys are turned by an angle that grows with position.

    Channel c is paired with channel c + C/2, as in the Llama weights. The paper pairs c with c + 1; the two differ by a
    permutation of the rows of the query and key matrices.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        shape = (config.block_size, config.head_dim // 2)
        self.register_buffer("cos", torch.empty(shape), persistent=False)
        self.register_buffer("sin", torch.empty(shape), persistent=False)
        self.positions_T: Tensor | None = None
        self.reset_buffers()

    def reset_buffers(self) -> None:
        """Fill the tables in place, on their device.

        They are computed on the CPU in float64: the same bits for every device, and exact phases at large positions.
        """
        positions = torch.arange(self.config.block_size, dtype=torch.float64, device="cpu")
        angles = torch.outer(positions, rotation_rates(self.config))
        self.cos.copy_(angles.cos())
        self.sin.copy_(angles.sin())

    def forward(self, x_BTHC: Tensor, start: int = 0) -> Tensor:
        tokens = slice(start, start + x_BTHC.size(1))
        rows = tokens if self.positions_T is None else self.positions_T[tokens]
        # fp32 tables promote bf16 queries and keys, while the values stay bf16.
        turned: Tensor = Rotation.apply(x_BTHC, self.cos[rows, None], self.sin[rows, None])
        return turned.type_as(x_BTHC)


class Rotation(torch.autograd.Function):
    """Rotation of each pair of channels. The backward pass turns the gradient back by the same angles.

    Torch's own derivative has twice the operations, and each uncompiled operation is a pass over memory.
    """

    @staticmethod
    def forward(ctx: Any, x_BTHC: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
        ctx.dtype = x_BTHC.dtype
        ctx.save_for_backward(cos_T1P, sin_T1P)
        return rotate(x_BTHC, cos_T1P, sin_T1P)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BTHC: Tensor) -> tuple[Tensor, None, None]:
        cos_T1P, sin_T1P = ctx.saved_tensors
        return rotate(gradient_BTHC, cos_T1P, -sin_T1P).to(ctx.dtype), None, None


def rotate(x_BTHC: Tensor, cos_T1P: Tensor, sin_T1P: Tensor) -> Tensor:
    """Turn channels c and c + C/2 by the angle of pair c, (B, T, H, C); P = C/2 pairs."""
    first, second = x_BTHC.chunk(2, dim=-1)
    cos_T1C, sin_T1C = torch.cat((cos_T1P, cos_T1P), -1), torch.cat((-sin_T1P, sin_T1P), -1)
    return torch.addcmul(torch.cat((second, first), -1) * sin_T1C, x_BTHC, cos_T1C)


def build_position(config: ModelConfig) -> nn.Module | None:
    """Build the module that adds positions to the embedding; None if nothing is added.

    The module maps (B, T, D) and the first position to (B, T, D).
    """
    if isinstance(config.position, str):
        made: nn.Module = build_part("model.position", config.position, config)
        return None if getattr(made, "on_heads", False) else made
    return LearnedPosition(config.block_size, config.n_embd) if config.position is Position.learned else None


def build_rotation(config: ModelConfig) -> nn.Module | None:
    """Build the module that rotates queries and keys; None if nothing is rotated.

    The module maps (B, T, H, C) and the first position to (B, T, H, C).
    """
    if isinstance(config.position, str):
        made: nn.Module = build_part("model.position", config.position, config)
        return made if getattr(made, "on_heads", False) else None
    return Rope(config) if config.position is Position.rope else None


def set_positions(module: nn.Module, positions_T: Tensor) -> None:
    """Set the positions of the input tokens of a model, or of a part of one: (T,) integers.

    For a rank with a part of each sequence. ``start`` then is an index into these positions.
    """
    for part in module.modules():
        if isinstance(part, LearnedPosition | Rope):
            part.positions_T = positions_T


def rotation_rates(config: ModelConfig) -> Tensor:
    """Compute the angle per position of each pair of channels, (C/2,) in float64 on the CPU, fastest first.

    Pair i of a head turns by base^(-2i/C); ``rope_scaling`` reduces these rates, see ``gpt.config.RopeScaling``.
    """
    width, base, factor = config.head_dim, config.rope_base, config.rope_factor
    if config.rope_scaling is RopeScaling.ntk:
        base *= factor ** (width / (width - 2))  # so that the slowest pair is divided by exactly the factor
    rates = base ** -(torch.arange(0, width, 2, dtype=torch.float64, device="cpu") / width)
    if config.rope_scaling is RopeScaling.linear:
        return rates / factor
    return llama3_rates(rates, config) if config.rope_scaling is RopeScaling.llama3 else rates


def llama3_rates(rates: Tensor, config: ModelConfig) -> Tensor:
    """Scale rotation rates as Llama 3.1 does, (C/2,).

    Rates with fewer than ``low`` turns in the original length are divided by the factor. Rates with more than ``high``
    turns stay unchanged. Rates between are blended linearly in the number of turns.
    """
    assert config.rope_original_block_size is not None
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    turns = config.rope_original_block_size * rates / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return rates * (kept + (1 - kept) / config.rope_factor)
