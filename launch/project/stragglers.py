"""Stragglers of a synchronous step: how much longer than the mean the slowest of so many ranks works by itself.

A step ends when its slowest rank does, and the more ranks there are, the slower is the slowest of them. Each rank's own
time of each step, its step time without its waits for others, is taken apart into the mean of the step, what a rank is
slower throughout (a slow host), and noise from step to step. Owns the reading of own times and that arithmetic. Must
not know how a step is modelled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from launch.project.extremes import Sample, maximum_weights, normal_maximum
from launch.report.points import Point
from launch.report.rank_times import WAITS
from launch.report.series import drop_warmup
from launch.report.steps import TIME, step_times
from launch.runs.columns import Floats, read_columns
from launch.runs.folder import RunFolder

MOST_STEPS = 2000
"""Steps of a run that are looked at, its last ones: more tell no more, and are held for all ranks at once."""


@dataclass(frozen=True, eq=False)
class RankSpread:
    """Spread of the own times of the ranks of a point.

    All figures are shares of the mean own time: a rank that has half of the work to do is slower by half as much.
    """

    own_s: float
    """Mean own time of a step over ranks and steps, seconds."""
    deviations: Floats
    """[steps, ranks]: own time above the mean of its step."""
    has_stages: bool = False
    """True for a pipeline: its stages differ by design, so that a rank is held against itself only."""

    @property
    def ranks(self) -> int:
        """Number of ranks, two or more."""
        return int(self.deviations.shape[1])

    @cached_property
    def _rank_means(self) -> Floats:
        means: Floats = self.deviations.mean(axis=0)
        return means

    @cached_property
    def _in_step(self) -> Floats:
        """[steps, ranks], ascending in each step."""
        return np.sort(self.deviations - self._rank_means * self.has_stages, axis=1)

    @cached_property
    def noise(self) -> Sample:
        """Noise from step to step, over all ranks. The means that were taken off took some of its variance along."""
        steps, ranks = self.deviations.shape
        taken = (1 - 1 / ranks) * (1 - 1 / steps)
        return Sample(np.sort((self.deviations - self._rank_means).ravel()) / math.sqrt(taken))

    @cached_property
    def lasting(self) -> float:
        """Standard deviation of what ranks are slower throughout, beyond what noise does to a mean; 0 for stages."""
        noise = float(self.noise.values.var()) / len(self.deviations)
        return 0.0 if self.has_stages else math.sqrt(max(0.0, float(self._rank_means.var(ddof=1)) - noise))

    def share(self, ranks: int) -> float:
        """Return the expected excess of the slowest of so many ranks over their mean, as a share of that mean.

        Up to the ranks that were measured it is the mean over all choices of so many of them, exactly what was seen at
        their number. Beyond, noise grows as the expected maximum of its sample, lasting slowness as that of a normal
        distribution; both together as their root of squares, which is exact where both are normal or one is nothing.
        """
        known = self.ranks
        inside = min(ranks, known)
        seen = float((self._in_step @ maximum_weights(known, inside)).mean())
        if ranks <= known:
            return seen
        noise = self.noise.expected_maximum(ranks) - self.noise.expected_maximum(known)
        lasting = self.lasting * (normal_maximum(ranks) - normal_maximum(known))
        return seen + math.hypot(noise, lasting)

    @property
    def text(self) -> str:
        """Spread of the own times in words: throughout, and from step to step."""
        lasting = "of pipeline stages noise only" if self.has_stages else f"{100 * self.lasting:.2g} % throughout"
        noise = f"{100 * float(self.noise.values.std()):.2g} % from step to step"
        return f"own times of {self.ranks} ranks differ by {lasting} and {noise} (standard deviations)"


def spread_of(own: Floats, *, has_stages: bool = False) -> RankSpread:
    """Take own times apart: seconds, [steps, ranks], of two steps and two ranks or more."""
    mean = float(own.mean())
    return RankSpread(mean, (own - own.mean(axis=1, keepdims=True)) / mean, has_stages)


def read_spread(point: Point) -> RankSpread | None:
    """Read the own times of a point's ranks; None where not all of them say in every step how long they waited."""
    run, used = RunFolder(point.path), drop_warmup(point.steps)[-MOST_STEPS:]
    expected = 0 if point.environment is None else point.environment.world_size
    steps, attempts = (np.array([getattr(step, name) for step in used]) for name in ("step", "attempt"))
    own, has_stages = [], False
    for rank in run.metric_ranks():
        columns = read_columns(run.metrics(rank), (TIME, *WAITS, "time"))
        if not len(columns):
            continue
        at = np.searchsorted(columns.steps, steps).clip(0, len(columns) - 1)
        known, times = step_times(columns)
        is_there = (columns.steps[at] == steps).all() and (columns.attempts[at] == attempts).all()
        if not is_there or not (known & columns.known["comm_s"])[at].all():
            return None
        waits = [np.where(columns.known[name], columns.values[name], 0.0)[at] for name in WAITS]
        has_stages |= bool(columns.known["bubble_s"][at].any())
        own.append(times[at] - sum(waits))
    if len(own) < max(2, expected) or len(steps) < 2 or not np.mean(own) > 0:
        return None
    return spread_of(np.array(own).T, has_stages=has_stages)
