"""A layer in place of the norms."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig


class DynamicTanh(nn.Module):
    """Dynamic tanh, which squashes instead of normalizing: gain * tanh(alpha x) + shift (arXiv 2503.10622)."""

    parallel: ClassVar = ("tp", "cp", "pp")  # each token by itself

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(1))
        self.gain = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * torch.tanh(self.alpha * x) + self.bias

    @staticmethod
    def initial_value(config: ModelConfig, name: str, shape: torch.Size, generator: torch.Generator) -> Tensor | None:
        """Start alpha at 0.5, the paper's value, or ``model.options.alpha``; leave the rest to the model's rule."""
        return torch.full(shape, float(config.options.get("alpha", 0.5)), device="cpu") if name == "alpha" else None

    @staticmethod
    def saved_bytes(config: ModelConfig, width: int) -> int:
        """State the bytes kept for the backward pass of one sequence: the input and its tanh, in fp32."""
        return config.block_size * 4 * 2 * config.n_embd
