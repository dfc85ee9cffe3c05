"""Normalization layers, over the last dimension.

Shapes: D is the normalized dimension, N the product of all other dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt.components import build_part
from gpt.config import ModelConfig, Norm


def build_norm(config: ModelConfig, width: int | None = None) -> nn.Module:
    """Build the normalization layer that ``config.norm`` names, (..., width) -> (..., width), by default over D.

    ``layernorm`` has a gain and a shift (arXiv 1607.06450), ``layernorm_nobias`` and ``rmsnorm`` (arXiv 1910.07467) a
    gain only; a class of the user is constructed with the config and the width.
    """
    width = config.n_embd if width is None else width
    if isinstance(config.norm, str):
        made: nn.Module = build_part("model.norm", config.norm, config, width)
        return made
    if config.norm is Norm.rmsnorm:
        return RmsNorm(width, eps=config.norm_eps)
    return nn.LayerNorm(width, eps=config.norm_eps, bias=config.norm is Norm.layernorm)


class RmsNorm(nn.RMSNorm):
    """RMSNorm of torch. On CPUs one function replaces torch's composition of a dozen operations."""

    def forward(self, x: Tensor) -> Tensor:
        # Compilers fuse these operations; DTensors and other kinds of tensors support only torch's own operations.
        plain = type(x) is Tensor and type(self.weight) is nn.Parameter and not torch.compiler.is_compiling()
        if plain and x.device.type == "cpu" and x.dtype == self.weight.dtype == torch.float32:
            normalized: Tensor = RmsNormOnCpu.apply(x, self.weight, self.eps)
            return normalized
        return super().forward(x)


class RmsNormOnCpu(torch.autograd.Function):
    """x times a gain over its root mean square (arXiv 1910.07467, equation 4), in few passes over memory; fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain_D: Tensor, eps: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_().div_(x.size(-1)).add_(eps).rsqrt_()
        normalized = x * scale
        # Keeps two tensors of the size of x, like torch's own operations; the memory plan counts two for every
        # precision.
        ctx.save_for_backward(x, gain_D, scale, normalized)
        return normalized * gain_D

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain_D, scale, normalized = ctx.saved_tensors
        product_ND = (gradient * x).flatten(0, -2)
        gain_gradient_D = product_ND.mT @ scale.flatten()
        # The derivative of the root: along x, by the mean of gradient x gain x.
        along = (product_ND @ gain_D).view_as(scale).mul_(scale.square()).div_(-x.size(-1))
        x_gradient = torch.mul(normalized, along, out=product_ND.view_as(x))
        return x_gradient.addcmul_(gradient * gain_D, scale), gain_gradient_D, None
