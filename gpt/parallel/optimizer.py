"""AdamW (arXiv 1711.05101), clipping of gradients, and the loss scale of fp16."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gpt.components import build_custom_optimizer
from gpt.config import OptimConfig
from gpt.config.optim import ADAMW
from gpt.parallel.distributed import World
from gpt.parallel.timeline import WORLD

# Clipping of gradients to a global norm, in one all-reduce with the figures of the step.
#
# The sums for the update and the sums for the records wait for the same ranks at the same place, so they travel
# together. Meanwhile the host has other work to do.


class Clipped(NamedTuple):
    """Gradient norm and figures of a step, as all ranks know them before its update."""

    norm: Tensor | None
    """Global norm of the gradients before they were clipped, (); None if the optimizer clips in its step."""
    sums: Tensor
    """Figures of the step, (N,), summed over all ranks."""
    flaw: Tensor
    """0, or not a number if a rank has found gradients that are not finite; (), the same on all ranks."""


def clip_replica(
    parameters: Iterable[nn.Parameter], limit: float, world: World, figures_N: Tensor, meanwhile: Callable[[], None]
) -> Clipped:
    """Clip gradients that every rank holds whole, as ``Engine.clip``; a ``limit`` of 0 leaves them. Collective."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Replicas have the same gradients. A replica with other numbers must not be alone in skipping the step.
    pending = world.start_all_reduce(torch.cat([flaw_of(norm).unsqueeze(0), figures_N]))
    if limit > 0:
        clip_grads_with_norm_(parameters, limit, norm)
    meanwhile()
    flaw, sums = pending.wait().tensor_split([1])
    return Clipped(norm, sums, flaw.squeeze(0))


def clip_shards(
    gradients: Iterable[tuple[str, Tensor, float]],
    limit: float,
    world: World,
    figures_N: Tensor,
    meanwhile: Callable[[], None],
    waits_as: str = WORLD,
) -> Clipped:
    """Clip sharded gradients, as ``Engine.clip``; a ``limit`` of 0 leaves them. Collective.

    Each gradient comes with 1 over the number of its replicas, so that over the world every element counts once. The
    timeline of a step records the wait for the other ranks under the name ``waits_as``.
    """
    parts = [(part, share) for _, part, share in gradients]
    # Gradients may be offloaded to the host; collectives run on the device. The squares come first, since the number of
    # figures differs between steps. The place of an element may decide the order of its sum over the ranks.
    squares = sum_of_squares(parts).to(world.device)
    pending = world.start_all_reduce(torch.cat([squares.unsqueeze(0), figures_N]))
    meanwhile()
    squares, sums = pending.wait(waits_as).tensor_split([1])
    norm = squares.squeeze(0).sqrt()
    if limit > 0:
        scale_to(limit, norm, [part for part, _ in parts])
    return Clipped(norm, sums, flaw_of(norm))


def sum_figures(world: World, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
    """Sum the figures alone, for an engine whose optimizer clips in its step. Collective."""
    pending = world.start_all_reduce(figures_N)
    meanwhile()
    return Clipped(None, pending.wait(), figures_N.new_zeros(()))


def flaw_of(norm: Tensor) -> Tensor:
    """Return 0 for a norm that is finite, else not a number; () float64."""
    return norm.double() * 0.0


def scale_to(limit: float, norm: Tensor, parts: Sequence[Tensor]) -> None:
    """Scale shards of gradients of global norm ``norm`` (), in place, to a norm of at most ``limit``."""
    torch._foreach_mul_(list(parts), (limit / (norm + 1e-6)).clamp(max=1.0).to(parts[0]))


# Dynamic loss scale of fp16 (arXiv 1710.03740, section 3.2): small gradients survive, and overflowing steps are
# skipped.
#
# A step overflows if the ranks have agreed to skip it, as they do in any precision (gpt/training/step.py). All of this
# stays on the device, so that no rank waits. The arithmetic is that of torch.amp.GradScaler, which looks at the
# gradients of one rank only.


INITIAL = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
"""Factors of the scale, powers of two: scaling and unscaling round nothing."""
GROWTH_INTERVAL = 2000
"""Steps in a row without overflow after which the scale grows. These four are torch's defaults."""
MINIMUM = 1.0
"""Least scale. An overflow of gradients that are not scaled up has another cause: the run has diverged."""


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
    """Loss scale that doubles after 2,000 steps without overflow, and halves if a step overflows."""

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
        """Adapt the scale after a step; ``overflows``, a bool (), is true if the step was skipped."""
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


# AdamW (arXiv 1711.05101) and its skipped steps; norms of sharded gradients.


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which steps this rank's shards of DTensors. Its state stays DTensors, as checkpoints take it.

    The step is elementwise, on gradients that are sharded like their parameters. Through DTensor torch would look for a
    sharding of each parameter: 2 to 3 ms of the host apiece in the first step. It would also hash all of them in each
    step, and refuse a list with plain tensors among them.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        has_complex = super()._init_group(group, *lists)  # fills the lists: parameters, gradients, state
        for index, (p, grad) in enumerate(zip(*lists[:2], strict=True)):
            if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
                lists[1][index] = grad.redistribute(placements=p.placements)  # completes a partial sum
        for tensors in lists:
            tensors[:] = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return has_complex


def build_optimizer(
    module: nn.Module, config: OptimConfig, kind: type[torch.optim.AdamW] = AdamW, fused: bool = False
) -> torch.optim.Optimizer:
    """Build AdamW, or the user's optimizer, over the parameters of ``module``; weight decay is for matrices only.

    Biases and norms have no weight decay. ``fused`` chooses the fused step also on devices for which it is not the
    default.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer != ADAMW:
        own: torch.optim.Optimizer = build_custom_optimizer(config, groups)
        return own
    fused = fused or all(p.device.type in ("cuda", "cpu") for p in parameters)
    return kind(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )


@contextmanager
def skipping(optimizer: torch.optim.Optimizer, skip: Tensor) -> Iterator[None]:
    """Have a step of the fused ``optimizer`` change nothing, and not count, if ``skip``, a bool (), is true.

    The fused kernel reads ``skip`` on the device; for a user's optimizer the host reads it before the step. Offloaded
    parameters are stepped by the host, which waits here: torch would read the flag while it is still being copied.
    """
    optimizer.found_inf = skip.float().to(first_parameter(optimizer).device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def first_parameter(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return a parameter of an optimizer, whose parameters are all on one device."""
    found: Tensor = optimizer.param_groups[0]["params"][0]
    return found


def sum_of_squares(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return this rank's part of the sum of squares of sharded gradients, () float64.

    Args:
        parts: shards, each with 1 over the number of its replicas. At least one.
    """
    return torch.stack(shared_squares(parts)).sum()


def shared_squares(parts: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, ...]:
    """Return the sum of squares of each shard, times 1 over the number of its replicas; each () float64."""
    # float64 on the device: the squares of a whole model do not fit the digits of a float32.
    norms = torch.stack(torch._foreach_norm([part for part, _ in parts])).double()
    return times(norms.square(), [share for _, share in parts])


def sum_of_elements(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return this rank's part of the sum of the elements of sharded gradients, () float64."""
    sums = torch.stack([part.sum() for part, _ in parts]).double()
    return torch.stack(times(sums, [share for _, share in parts])).sum()


def times(values_N: Tensor, factors: Sequence[float]) -> tuple[Tensor, ...]:
    """Multiply each of N values on a device by a number of the host; each product is ().

    The factors are arguments of the kernel: a tensor of them would be copied to the device, and the host would wait.
    """
    return tuple(torch._foreach_mul(values_N.unbind(), list(factors)))
