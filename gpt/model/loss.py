"""Loss of one forward pass, and the precision it is computed in.

Shapes: B sequences, T tokens of one, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt.config import Precision, TrainConfig


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[object]:
    """Context of the forward pass: bf16 matrix products over fp32 weights where ``config.precision`` is bf16.

    Under fsdp the gathered weights are bf16 already; autocast then still decides for the loss and the norms.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision is Precision.bf16)


def cross_entropy(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    """Compute the cross-entropy of logits in nats, summed over the tokens, () in fp32."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


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
