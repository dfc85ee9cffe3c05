"""Clipping of gradients to a global norm, in one all-reduce with the figures of the step.

What is summed over all ranks for the update and what is summed for the records waits for the same ranks at the same
place, so it travels together; and while it does, the host has something else to do. Must not know what the figures are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gpt.parallel.distributed import World
from gpt.parallel.optimizer import sum_of_squares
from gpt.parallel.timeline import WORLD


class Clipped(NamedTuple):
    """Gradient norm and figures of a step, as all ranks know them before its update."""

    norm: Tensor | None
    """Global norm of the gradients before they were clipped, (); None where the optimizer clips in its step."""
    sums: Tensor
    """Figures of the step, (N,), summed over all ranks."""
    flaw: Tensor
    """0, or not a number where a rank has found gradients that are not finite; (), the same on all ranks."""


def clip_replica(
    parameters: Iterable[nn.Parameter], limit: float, world: World, figures_N: Tensor, meanwhile: Callable[[], None]
) -> Clipped:
    """Clip gradients that every rank holds whole, as ``Engine.clip``; a ``limit`` of 0 leaves them. Collective."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Replicas have the same gradients. One that has computed something else must not be alone in skipping the step.
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

    Each comes with 1 over the number of its replicas, so that over the world every element counts once. The timeline of
    a step has the wait for the other ranks under the name ``waits_as``.
    """
    parts = [(part, share) for _, part, share in gradients]
    # Gradients may be offloaded to the host; collectives run on the device. The squares come first: the place of an
    # element may decide in which order the ranks add it up, and the number of figures differs from step to step.
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
