"""Normalization layers, over the last dimension.

Owns the choice of layer; the arithmetic is torch's, which computes the statistics in fp32 whatever the input.
"""

from __future__ import annotations

from torch import nn

from gpt.config import ModelConfig, Norm


def build_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """Build the normalization layer that ``config.norm`` names, (..., width) -> (..., width), by default over D.

    ``layernorm`` has a gain and a shift (arXiv 1607.06450), ``layernorm_nobias`` and ``rmsnorm`` (arXiv 1910.07467) a
    gain only.
    """
    width = config.n_embd if width is None else width
    if config.norm is Norm.rmsnorm:
        return nn.RMSNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm is Norm.layernorm)
