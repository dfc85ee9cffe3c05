"""Normalization layers, over the last dimension.

Owns the choice of layer; the arithmetic is torch's, which computes the statistics in fp32 whatever the input.
"""

from __future__ import annotations

from torch import nn

from gpt.config import ModelConfig, Norm


def build_norm(config: ModelConfig) -> nn.Module:
    """The normalization layer that ``config.norm`` names: (..., D) -> (..., D).

    ``layernorm`` has a gain, and a shift where ``config.bias`` is set (arXiv 1607.06450); ``rmsnorm`` has a gain only
    (arXiv 1910.07467).
    """
    if config.norm is Norm.rmsnorm:
        return nn.RMSNorm(config.n_embd, eps=config.norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.norm_eps, bias=config.bias)
