"""From the steps of a point to its figures: median step time and its spread, tokens per second, MFU.

Owns which steps count. Must not know of other points.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from launch.report.points import Step

WARMUP_STEPS = 5
"""Left out at the start of each attempt: they pay for memory pools, caches, connections and DDP's second bucketing."""

MIN_STEPS = 5
"""Fewer steps than this have no quartiles worth the name."""


@dataclass(frozen=True)
class Measurement:
    """Figures of one point, from ``steps`` optimizer steps. Times in seconds; low and high are the quartiles."""

    steps: int
    step_time_s: float
    low_s: float
    high_s: float
    tokens_per_s: float
    mfu_palm: float | None


def after_warmup(steps: Sequence[Step]) -> list[Step]:
    """The steps that count: all but the first ``WARMUP_STEPS`` of each attempt."""
    first: dict[int, int] = {}
    for step in steps:
        first[step.attempt] = min(step.step, first.get(step.attempt, step.step))
    return [step for step in steps if step.step >= first[step.attempt] + WARMUP_STEPS]


def measure(steps: Sequence[Step]) -> Measurement | None:
    """Measure a point; None where fewer than ``MIN_STEPS`` steps are left after warm-up."""
    used = after_warmup(steps)
    if len(used) < MIN_STEPS:
        return None
    times = [step.time_s for step in used]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    mfu = [step.mfu_palm for step in used if step.mfu_palm is not None]
    return Measurement(
        steps=len(used),
        step_time_s=median,
        low_s=low,
        high_s=high,
        tokens_per_s=statistics.median(step.tokens for step in used) / median,
        mfu_palm=statistics.median(mfu) if mfu else None,
    )
