"""Losses that are no output: they enter the gradient on the way back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Auxiliary(torch.autograd.Function):
    """``y`` unchanged; in the backward pass the gradient of ``loss``, a scalar, is added to whatever comes back.

    So the objective becomes that of the output plus ``loss``, and a model can have losses inside while it returns its
    logits only (as MoEAuxLossAutoScaler of Megatron-LM, https://github.com/NVIDIA/Megatron-LM). ``counts`` is added to
    ``total`` in the backward pass as well, which happens once also where a forward pass is repeated to save memory, and
    never in an evaluation.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, loss: Tensor, counts: Tensor, total: Tensor) -> Tensor:
        ctx.counts, ctx.total, ctx.dtype = counts, total, loss.dtype
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        gradient = gradients[0]
        # Nothing, but it hangs on the gradient: else the compiler would add to the total in the forward pass already,
        # and of two passes forward, as pipelines make them before the first one back, the second forget the first.
        nothing = gradient[(0,) * gradient.dim()].float().nan_to_num().clamp(0, 0)
        ctx.total.add_(ctx.counts + nothing)
        return gradient, torch.ones((), dtype=ctx.dtype, device=gradient.device), None, None
