"""Feed-forward layers, applied to each position by itself. B batch, T time, D width, F inner width."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from gpt.config import Activation, ModelConfig


def gelu_tanh(x: Tensor) -> Tensor:
    """Compute GPT-2's approximation of GELU (arXiv 1606.08415, section 2)."""
    return F.gelu(x, approximate="tanh")


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {
    Activation.gelu: F.gelu,
    Activation.gelu_tanh: gelu_tanh,
    Activation.silu: F.silu,
    Activation.relu: F.relu,
    Activation.leaky_relu: F.leaky_relu,
}


class StandardFfn(nn.Module):
    """Two matrices with an activation between them (arXiv 1706.03762, section 3.3)."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(config.n_embd, width, bias=config.bias)
        self.down = nn.Linear(width, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.ffn_activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_BTD)))


class GatedFfn(nn.Module):
    """Gated linear unit, three matrices: SwiGLU with SiLU, GEGLU with GELU (arXiv 2002.05202, section 2)."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(config.n_embd, width, bias=config.bias)
        self.up = nn.Linear(config.n_embd, width, bias=config.bias)
        self.down = nn.Linear(width, config.n_embd, bias=config.bias)
        self.activation = ACTIVATIONS[config.ffn_activation]

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(self.activation(self.gate(x_BTD)) * self.up(x_BTD))


def build_dense(config: ModelConfig, width: int) -> nn.Module:
    """Build the layer that ``config.dense_ffn`` names, ``width`` wide inside, (B, T, D) -> (B, T, D)."""
    return GatedFfn(config, width) if config.gated else StandardFfn(config, width)
