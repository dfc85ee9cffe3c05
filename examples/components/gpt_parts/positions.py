"""Positions without parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig


class Sinusoids(nn.Module):
    """Sines and cosines of the position, added to the embedding (arXiv 1706.03762, section 3.5)."""

    table: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(config.block_size, config.n_embd), persistent=False)

    def reset_buffers(self) -> None:
        """Fill the table in place: the model is built without memory, and no checkpoint holds this."""
        size, width = self.table.shape
        rates = 10000.0 ** (-torch.arange(0, width, 2, device="cpu") / width)
        angles = torch.outer(torch.arange(size, device="cpu"), rates)
        self.table.copy_(torch.stack((angles.sin(), angles.cos()), -1).flatten(1)[:, :width])

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        return x + self.table[start : start + x.size(1)]
