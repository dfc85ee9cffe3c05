"""Parts of a user's model, each with a mistake that a rehearsal has to find; the line is marked with ``mistake``."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from gpt.config import ModelConfig


class Ffn(nn.Module):
    """A sound feed-forward layer."""

    parallel = ("pp", "cp")

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.down = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x_BTD)))


class Waiting(Ffn):
    """Reads a value of each forward pass."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        if x_BTD.device.type != "meta" and x_BTD.abs().max().item() > 1e4:  # mistake
            return x_BTD
        return super().forward(x_BTD)


class Copying(Ffn):
    """Copies a figure to the host."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        if x_BTD.device.type != "meta":
            self.seen = x_BTD.detach().mean().cpu()  # mistake
        return super().forward(x_BTD)


class Fp32(Ffn):
    """Computes in fp32 in a run in 16 bits."""

    def forward(self, x_BTD: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            hidden = x_BTD.float() @ self.up.weight.float().T  # mistake
        return self.down(torch.relu(hidden))


class Keeping(Ffn):
    """Keeps activations of every block, which recomputation should free."""

    kept: ClassVar[list[Tensor]] = []

    def forward(self, x_BTD: Tensor) -> Tensor:
        hidden = self.up(x_BTD)  # mistake
        self.kept.append(hidden)
        return self.down(torch.relu(hidden))
