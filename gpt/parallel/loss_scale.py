"""Dynamic loss scale of fp16 (arXiv 1710.03740, section 3.2): small gradients survive, steps that overflow are skipped.

Owns the scale, and when it changes. A step overflows where the ranks have agreed to skip it, as they do in any
precision (gpt/training/step.py); all of it stays on the device, which nobody waits for. The arithmetic is that of
torch.amp.GradScaler, which looks at the gradients of one rank only.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

INITIAL = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
"""Factors of the scale, powers of two: scaling and unscaling round nothing."""
GROWTH_INTERVAL = 2000
"""Steps in a row without overflow after which the scale grows. These four are torch's defaults."""
MINIMUM = 1.0
"""Least scale. Gradients that overflow without being scaled up are no matter of the scale: the run has diverged."""


class LossScale(Protocol):
    """The loss scale of an engine, as the training loop sees it."""

    def used(self) -> Tensor:
        """Return the scale of the step just queued, () float64 on the device."""
        ...

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, in numbers that JSON holds exactly. Waits for the device."""
        ...

    def load(self, state: dict[str, float]) -> None:
        """Take over a state."""
        ...


class DynamicLossScale:
    """Loss scale that doubles after 2,000 steps without overflow, and halves where a step overflows."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        """Factor of the loss, () fp32; always the same tensor."""
        self._used = self.scale.clone()
        self._steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients, this rank's shards of them, by the scale, in place."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for gradient in gradients:
            by_device.setdefault(gradient.device, []).append(gradient)
        inverse = self.scale.reciprocal()
        for device, shards in by_device.items():
            torch._foreach_mul_(shards, inverse.to(device))

    def update(self, overflows: Tensor) -> None:
        """Adapt the scale after a step that was skipped where ``overflows``, a bool (), is true."""
        self._used.copy_(self.scale)
        torch._amp_update_scale_(self.scale, self._steps, overflows.to(self.scale), GROWTH, BACKOFF, GROWTH_INTERVAL)
        self.scale.clamp_(min=MINIMUM)

    def used(self) -> Tensor:
        return self._used.double()

    def state(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "steps": self._steps.item()}

    def load(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self._steps.fill_(int(state["steps"]))
