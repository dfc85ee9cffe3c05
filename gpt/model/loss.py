"""Loss of one forward pass, and the precision of its computation.

Shapes: B sequences, T tokens of a sequence, V vocabulary, N = B T, R rows of a chunk.
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
"""Dtype of matrix products, and of the values between them."""

CACHED_LOGITS = 2**17
"""Number of logits of a chunk for each thread of a CPU: half a megabyte, for second-level caches of one or two."""


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the context of the forward pass: matrix products in 16 bits over fp32 weights for a 16-bit
    ``config.precision``.

    Under fsdp the gathered weights already have 16 bits. autocast then only affects the loss and the norms.
    """
    half = config.precision.is_half
    return torch.autocast(device.type, COMPUTE_DTYPES[config.precision] if half else None, enabled=half)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Compute the cross-entropy of logits in nats, summed over the tokens, () in fp32."""
    summed_loss: Tensor = CrossEntropy.apply(logits_BTV.flatten(0, 1), targets_BT.flatten())
    return summed_loss


class CrossEntropy(torch.autograd.Function):
    """Summed cross-entropy that keeps only the logits, and has one chunk of them in fp32 at a time.

    torch's composition keeps the log-softmax of all logits in fp32, and makes two gradients of that size. Recomputing
    the softmax per chunk costs exponentials, but saves time on memory traffic.
    """

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        chunks = zip(in_chunks(logits_NV), in_chunks(targets_N, logits_NV), strict=True)
        ctx.save_for_backward(logits_NV, targets_N)
        found = [
            logits_RV.log_softmax(-1, dtype=torch.float32).gather(-1, targets_R.unsqueeze(-1))
            for logits_RV, targets_R in chunks
        ]
        return -torch.cat(found).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits_NV, targets_N = ctx.saved_tensors
        grad_NV = torch.empty_like(logits_NV)
        columns_N1 = targets_N.unsqueeze(-1)
        minus_N1 = gradient.neg().expand(columns_N1.shape)
        parts = [in_chunks(x, logits_NV) for x in (grad_NV, logits_NV, columns_N1, minus_N1)]
        for grad_RV, logits_RV, column_R1, minus_R1 in zip(*parts, strict=True):
            own = grad_RV.dtype == torch.float32
            softmax_RV = torch.softmax(logits_RV, -1, dtype=torch.float32, out=grad_RV if own else None)
            softmax_RV.mul_(gradient).scatter_add_(-1, column_R1, minus_R1)
            if not own:
                grad_RV.copy_(softmax_RV)
        return grad_NV, None


def exponentials(logits_NV: Tensor, columns_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of a softmax, each (N,) in fp32: the largest logit of each row; the sum of exp(logit - largest);
    and for one column of each row, logit - largest."""
    found = []
    for logits_RV, columns_R in zip(in_chunks(logits_NV), in_chunks(columns_N, logits_NV), strict=True):
        peak_R1 = logits_RV.amax(-1, keepdim=True).float()
        shifted_RV = logits_RV - peak_R1
        column_R = shifted_RV.gather(-1, columns_R.unsqueeze(-1)).squeeze(-1)
        found.append((peak_R1.squeeze(-1), shifted_RV.exp_().sum(-1), column_R))
    peak, total, column = (torch.cat(parts) for parts in zip(*found, strict=True))
    return peak, total, column


def write_softmax(out_NV: Tensor, logits_NV: Tensor, peak_N: Tensor, rest_N: Tensor) -> None:
    """Write exp(logits - peak - rest), computed in fp32, into ``out_NV``."""
    rows = in_chunks(peak_N.unsqueeze(-1), logits_NV), in_chunks(rest_N.unsqueeze(-1), logits_NV)
    for out_RV, logits_RV, peak_R1, rest_R1 in zip(in_chunks(out_NV), in_chunks(logits_NV), *rows, strict=True):
        if out_RV.dtype == peak_R1.dtype:
            torch.sub(logits_RV, peak_R1, out=out_RV).sub_(rest_R1).exp_()
        else:  # saves one pass, at the cost of digits that half precision does not have
            torch.exp(logits_RV - (peak_R1 + rest_R1), out=out_RV)


def in_chunks(x: Tensor, logits_NV: Tensor | None = None) -> tuple[Tensor, ...]:
    """Split the rows of ``x``, by default of ``logits_NV``, into chunks for ``chunk_elements`` logits each."""
    logits_NV = x if logits_NV is None else logits_NV
    return x.split(max(1, chunk_elements(logits_NV.device) // max(1, logits_NV.size(1))))


def chunk_elements(device: torch.device) -> int:
    """Return the number of logits in fp32 at a time. On a CPU this number fits into the caches of its cores."""
    return LOSS_CHUNK if device.type != "cpu" else min(LOSS_CHUNK, CACHED_LOGITS * torch.get_num_threads())


def summed_loss(
    module: nn.Module,
    config: TrainConfig,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    device: torch.device,
    criterion: Callable[[Tensor, Tensor], Tensor] = cross_entropy,
) -> Tensor:
    """Compute the loss of one forward pass in nats, summed over the tokens, by ``criterion(logits, targets)``, ()."""
    with autocast(config, device):
        logits_BTV = module(tokens_BT.to(device, non_blocking=True))
    return criterion(logits_BTV, targets_BT.to(device, non_blocking=True))
