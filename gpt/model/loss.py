"""Loss of one forward pass, and the precision it is computed in.

Shapes: B sequences, T tokens of one, V vocabulary, N = B T, R rows of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gpt.config import LOSS_CHUNK, Precision, TrainConfig

COMPUTE_DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}
"""Type of matrix products, and of what is between them."""


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Context of the forward pass: matrix products in 16 bits over fp32 weights where ``config.precision`` says so.

    Under fsdp the gathered weights have 16 bits already; autocast then still decides for the loss and the norms.
    """
    half = config.precision.is_half
    return torch.autocast(device.type, COMPUTE_DTYPES[config.precision] if half else None, enabled=half)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Compute the cross-entropy of logits in nats, summed over the tokens, () in fp32; computed in fp32.

    To be multiplied by positive numbers only, since the gradient is scaled inside its exponential.
    """
    summed_loss: Tensor = CrossEntropy.apply(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return summed_loss


class CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy that keeps two numbers for each token, and copies ``LOSS_CHUNK`` logits at a time to fp32.

    What torch puts together keeps the log-softmax of all logits in fp32, and makes two gradients of that size.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        peak_N, sum_N, target_N = exponentials(logits_NV, targets_N)
        rest_N = sum_N.log()
        ctx.save_for_backward(logits_NV, targets_N, peak_N, rest_N, target_N)
        return (rest_N - target_N).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N, peak_N, rest_N, target_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        write_softmax(grad_NV, logits_NV, peak_N, rest_N - gradient.log())
        of_target_N = ((target_N - rest_N).exp() - 1) * gradient
        grad_NV.scatter_(-1, targets_N.unsqueeze(-1), of_target_N.unsqueeze(-1).type_as(grad_NV))
        return grad_NV, None


def exponentials(logits_NV: Tensor, columns_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a softmax is made of: the largest logit of each row, the sum of the exponentials of the others'
    distance to it, and the distance of one column; each (N,) fp32."""
    found = []
    for logits_RV, columns_R in zip(in_chunks(logits_NV), in_chunks(columns_N, logits_NV.size(1)), strict=True):
        peak_R1 = logits_RV.amax(-1, keepdim=True).float()
        shifted_RV = logits_RV - peak_R1
        column_R = shifted_RV.gather(-1, columns_R.unsqueeze(-1)).squeeze(-1)
        found.append((peak_R1.squeeze(-1), shifted_RV.exp_().sum(-1), column_R))
    peak, total, column = (torch.cat(parts) for parts in zip(*found, strict=True))
    return peak, total, column


def write_softmax(out_NV: Tensor, logits_NV: Tensor, peak_N: Tensor, rest_N: Tensor) -> None:
    """Write exp(logits - peak - rest), computed in fp32, into ``out_NV``."""
    width = logits_NV.size(1)
    rows = in_chunks(peak_N.unsqueeze(-1), width), in_chunks(rest_N.unsqueeze(-1), width)
    for out_RV, logits_RV, peak_R1, rest_R1 in zip(in_chunks(out_NV), in_chunks(logits_NV), *rows, strict=True):
        if out_RV.dtype == peak_R1.dtype:
            torch.sub(logits_RV, peak_R1, out=out_RV).sub_(rest_R1).exp_()
        else:  # one pass less, for digits that half precision does not have
            torch.exp(logits_RV - (peak_R1 + rest_R1), out=out_RV)


def in_chunks(x: Tensor, width: int | None = None) -> tuple[Tensor, ...]:
    """Split rows, of ``width`` elements (by default those of ``x``), into chunks of about ``LOSS_CHUNK`` elements."""
    return x.split(max(1, LOSS_CHUNK // max(1, x.size(1) if width is None else width)))


def summed_loss(
    module: nn.Module,
    config: TrainConfig,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    device: torch.device,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """Compute the loss of one forward pass, summed over the tokens, by ``criterion(logits, targets)``."""
    with autocast(config, device):
        logits_BTV = module(tokens_BT.to(device, non_blocking=True))
    return criterion(logits_BTV, targets_BT.to(device, non_blocking=True))
