"""Dynamic loss scale of fp16 (arXiv 1710.03740, section 3.2): small gradients survive, steps that overflow are skipped.

Owns the scale, when it changes, and the count of skipped steps. A step overflows where the global gradient norm is not
finite. The norm is the same on every rank, however the model is sharded, so the ranks agree without a collective of
their own; and all of it stays on the device, which nobody waits for. The arithmetic is that of torch.amp.GradScaler,
which looks at the gradients of one rank only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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

    def figures(self) -> Tensor:
        """Return the scale of the step just queued, and the steps skipped so far, (2,) float64 on the device."""
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
        self._skipped = torch.zeros((), dtype=torch.float64, device=device)

    def unscale(self, gradients: Iterable[Tensor]) -> None:
        """Divide gradients, this rank's shards of them, by the scale, in place."""
        by_device: dict[torch.device, list[Tensor]] = {}
        for gradient in gradients:
            by_device.setdefault(gradient.device, []).append(gradient)
        inverse = self.scale.reciprocal()
        for device, shards in by_device.items():
            torch._foreach_mul_(shards, inverse.to(device))

    @contextmanager
    def skipping(self, optimizer: torch.optim.AdamW, norm: Tensor) -> Iterator[None]:
        """Have a step of the fused ``optimizer`` change nothing where the global gradient ``norm``, (), is not finite;
        adapt the scale afterwards."""
        overflows = norm.isfinite().logical_not().to(self.scale)
        # The fused step obeys this on the device, and does not count a step that it skips. Offloaded parameters are
        # stepped by the host, which waits here: torch would read the flag while it is still being copied.
        optimizer.found_inf = overflows.to(first_parameter(optimizer).device)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del optimizer.found_inf  # type: ignore[attr-defined]
        self._used.copy_(self.scale)
        self._skipped += overflows
        torch._amp_update_scale_(self.scale, self._steps, overflows, GROWTH, BACKOFF, GROWTH_INTERVAL)
        self.scale.clamp_(min=MINIMUM)

    def figures(self) -> Tensor:
        return torch.stack([self._used.double(), self._skipped])

    def state(self) -> dict[str, float]:
        return {"scale": self.scale.item(), "steps": self._steps.item(), "skipped": self._skipped.item()}

    def load(self, state: dict[str, float]) -> None:
        self.scale.fill_(state["scale"])
        self._steps.fill_(int(state["steps"]))
        self._skipped.fill_(state["skipped"])


def first_parameter(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return a parameter of an optimizer, whose parameters are all on one device."""
    found: Tensor = optimizer.param_groups[0]["params"][0]
    return found
