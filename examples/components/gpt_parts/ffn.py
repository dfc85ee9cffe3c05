"""A feed-forward layer with another activation."""

from __future__ import annotations

from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import ModelConfig


class SquaredReluFfn(nn.Module):
    """Two matrices with the square of ReLU between them (Primer, arXiv 2109.08668, section 4.1)."""

    parallel: ClassVar = ("tp", "cp", "pp")  # each token by itself

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, config.ffn_width, bias=config.bias)
        self.down = nn.Linear(config.ffn_width, config.n_embd, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x_BTD)).square())

    @staticmethod
    def saved_bytes(config: ModelConfig, width: int) -> int:
        """State the bytes kept for the backward pass of one sequence: the input, the ReLU and its square."""
        return config.block_size * width * (config.n_embd + 2 * config.ffn_width)
