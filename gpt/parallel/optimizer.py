"""AdamW and its learning-rate schedule (arXiv 1711.05101; cosine: arXiv 1608.03983)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gpt.config import OptimConfig


class AdamW(torch.optim.AdamW):
    """torch's, also for a model of which some parameters are DTensors and some are not: its fused step, which is the
    one for GPUs, refuses a list with both."""

    def step(self, closure: Any = None) -> Any:
        everything = [group["params"] for group in self.param_groups]
        loss = None
        for kind in sorted({isinstance(p, DTensor) for parameters in everything for p in parameters}):
            for group, parameters in zip(self.param_groups, everything, strict=True):
                group["params"] = [p for p in parameters if isinstance(p, DTensor) is kind]
            loss = super().step(closure)
        for group, parameters in zip(self.param_groups, everything, strict=True):
            group["params"] = parameters
        return loss


def build_optimizer(module: nn.Module, config: OptimConfig, kind: type[torch.optim.AdamW] = AdamW) -> torch.optim.AdamW:
    """AdamW over the parameters of ``module``; weight decay for matrices, none for biases and norms."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = all(p.device.type == "cuda" for p in parameters)
    return kind(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )


def clip_gradients(module: nn.Module, limit: float) -> Tensor:
    """Scale the gradients down to a global norm of ``limit`` (0: leave them) and return the norm they had, ().

    For a rank that holds all of them. Does not wait for the device.
    """
    parameters = [p for p in module.parameters() if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if limit > 0:
        clip_grads_with_norm_(parameters, limit, norm)
    return norm


def sum_of_squares(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """This rank's share of the sum of squares of gradients of which it holds parts, () float64.

    Args:
        parts: each with one over the number of ranks that hold the same part. At least one.
    """
    # float64 on the device: the squares of a whole model do not fit the digits of a float32.
    norms = torch.stack(torch._foreach_norm([part for part, _ in parts])).double()
    return (norms.square() * share_tensor(parts)).sum()


def sum_of_elements(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The same for the sum of their elements."""
    return (torch.stack([part.sum() for part, _ in parts]).double() * share_tensor(parts)).sum()


def share_tensor(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """The second of each pair, (pairs,) float64, where the first ones are."""
    return torch.tensor([share for _, share in parts], dtype=torch.float64, device=parts[0][0].device)


def scale_to(limit: float, norm: Tensor, parts: Sequence[Tensor]) -> None:
    """Scale parts of gradients, in place, whose global norm () is ``norm`` down to one of ``limit``."""
    torch._foreach_mul_(list(parts), (limit / (norm + 1e-6)).clamp(max=1.0).to(parts[0]))
