"""An optimizer with one moment instead of two."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


class Lion(torch.optim.Optimizer):
    """Steps of the sign of a momentum, with decoupled weight decay (arXiv 2302.06675, algorithm 2)."""

    def __init__(self, params: Iterable[Any], lr: float, betas: tuple[float, float] = (0.9, 0.99)) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            (fast, slow), lr, decay = group["betas"], group["lr"], group["weight_decay"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                momentum = state["momentum"]
                weight.mul_(1 - lr * decay)
                weight.sub_(lr * momentum.lerp(weight.grad, 1 - fast).sign())
                momentum.lerp_(weight.grad, 1 - slow)
