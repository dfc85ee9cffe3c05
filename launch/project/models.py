"""Models of the time of a step as a function of the number of nodes, with stragglers, fitted to measured points."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from statistics import NormalDist

import numpy as np

from launch.report.points import Point
from launch.report.read import Floats, read_columns
from launch.report.series import fit_not_negative
from launch.report.steps import TIME, WAITS, step_times
from launch.runs.folder import RunFolder
from launch.workload import StepTime

GOLDEN = (math.sqrt(5) - 1) / 2


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the zero of a falling function of a positive number, by bisection of the logarithm.

    If the function does not cross zero between ``low`` and ``high``, return the nearer end.
    """
    if function(low) <= 0:
        return low
    if function(high) >= 0:
        return high
    for _ in range(60):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def minimum(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the argument at which a function of a positive number is smallest.

    The method is golden sections of the logarithm (Kiefer, 1953). The function must have one minimum between ``low``
    and ``high``.
    """
    a, b = math.log(low), math.log(high)
    for _ in range(48):
        left, right = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
        if function(math.exp(left)) <= function(math.exp(right)):
            b = right
        else:
            a = left
    return math.exp((a + b) / 2)


@lru_cache(maxsize=256)
def normal_maximum(draws: int) -> float:
    """Return the expected maximum of ``draws`` independent standard normal draws, by numerical integration."""
    x = np.linspace(-10.0, 10.0, 4001)
    below = np.array([NormalDist().cdf(value) for value in x.tolist()])
    return float(((x > 0) + 0.5 * (x == 0) - below**draws).sum() * (x[1] - x[0]))


# Stragglers of a synchronous step: the excess of the slowest rank's computation over the mean.


MOST_STEPS = 2000
"""Largest number of a run's last steps that are read. More steps add no information and need memory for all ranks."""


@dataclass(frozen=True)
class RankSpread:
    """Spread of the own times of a point's ranks. An own time is the time of a step without waits."""

    ranks: int
    own_s: float
    """Mean own time of a step over ranks and steps, seconds."""
    excess: float
    """Excess of the slowest rank of a step over the mean rank, as a share of ``own_s``; the mean over the steps."""

    def share(self, ranks: int) -> float:
        """Return the expected excess of the slowest of ``ranks`` ranks over their mean, as a share of that mean.

        The measured excess grows as the expected maximum of so many independent normal draws.
        """
        return self.excess * normal_maximum(ranks) / normal_maximum(self.ranks)


def spread_of(own: Floats, has_stages: bool = False) -> RankSpread:
    """Return the spread of own times.

    Args:
        own: own times in seconds, [steps, ranks]; two ranks or more.
        has_stages: True for a pipeline. Its stages differ by design, so each rank is only compared with itself.
    """
    deviations = own - own.mean(axis=1, keepdims=True)
    if has_stages:
        deviations = deviations - deviations.mean(axis=0)
    own_s = float(own.mean())
    return RankSpread(own.shape[1], own_s, float(deviations.max(axis=1).mean()) / own_s)


def read_spread(point: Point) -> RankSpread | None:
    """Return how much the ranks of a point differ in own time: the time of a step without waits for other ranks.

    None if a rank lacks a step, its time or its communication time. None also with fewer than two ranks or steps, or
    if a rank has no records.
    """
    run, used = RunFolder(point.path), point.steps.after_warmup()
    expected = 0 if point.environment is None else point.environment.world_size
    steps, attempts = used.step[-MOST_STEPS:], used.attempt[-MOST_STEPS:]
    own, has_stages = [], False
    for rank in run.metric_ranks():
        columns = read_columns(run.metrics(rank), (TIME, *WAITS, "time"))
        if not len(columns):
            continue
        at = np.searchsorted(columns.steps, steps).clip(0, len(columns) - 1)
        times = step_times(columns)
        is_there = (columns.steps[at] == steps).all() and (columns.attempts[at] == attempts).all()
        if not is_there or np.isnan(times + columns.values["comm_s"])[at].any():
            return None
        waits = [np.nan_to_num(columns.values[name])[at] for name in WAITS]
        has_stages |= not np.isnan(columns.values["bubble_s"][at]).all()
        own.append(times[at] - sum(waits))
    if len(own) < max(2, expected) or len(steps) < 2 or not np.mean(own) > 0:
        return None
    return spread_of(np.array(own).T, has_stages)


# Models of the time of a step, and their fit to measured points.


@dataclass(frozen=True)
class Measured:
    """Median time of a step on a number of nodes, with quartiles, in seconds."""

    nodes: int
    ranks: int
    step_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True)
class StepParts:
    """Modelled time of a step in seconds."""

    step_s: float
    own_s: float
    """Part of the step in seconds in which a rank computes and does not wait."""
    by_cause: dict[str, float]
    """Cause -> seconds; the causes add up to ``step_s``."""


@dataclass(frozen=True)
class Model:
    """A fitted model of the time of a step."""

    text: str
    """Sentence about the fit, for people."""
    at: Callable[[int], StepParts]
    """Function from the number of nodes to the time of a step. Raises ConfigError if a run of this size cannot work."""

    def with_stragglers(self, spread: RankSpread, ranks_per_node: int, reference_s: float) -> Model:
        """Return this model plus the time that the slowest rank adds. The model itself assumes equally fast ranks.

        Args:
            spread: spread of the own times at a measured point.
            ranks_per_node: number of ranks on each node, at every size.
            reference_s: own time of this model at the measured point, seconds.
        """

        def at(nodes: int) -> StepParts:
            even = self.at(nodes)
            scale = even.own_s / reference_s if reference_s > 0 else 1.0
            late_s = spread.share(nodes * ranks_per_node) * spread.own_s * scale
            return StepParts(even.step_s + late_s, even.own_s, {**even.by_cause, "stragglers": late_s})

        return Model(f"{self.text}; stragglers as the expected maximum over the ranks", at)


Costs = Callable[[int, float, float], StepTime]
"""Function (nodes, rate factor, link factor) -> time of a step.

The factors are those of ``launch.workload.PlanRequest``.
"""

RATES = (1e-6, 1e4)
LINKS = (1e-4, 1e3)


def fit_costs(points: Sequence[Measured], costs: Costs) -> tuple[float, float]:
    """Return the factors of compute rate and links, fitted in turns: to the smallest point, and to the other points.

    Args:
        points: measured points, smallest first.
        costs: a workload's cost model.
    """
    smallest, others = points[0], points[1:]

    def best_rate(links: float) -> float:
        return root(lambda rate: costs(smallest.nodes, rate, links).step_s - smallest.step_s, *RATES)

    def error(rate: float, links: float) -> float:  # Logarithms: twice the time counts as much as half the time.
        return sum(math.log(costs(one.nodes, rate, links).step_s / one.step_s) ** 2 for one in others)

    links = 1.0
    rate = best_rate(links)
    for _ in range(12 if others else 0):
        before, links = links, minimum(lambda links, rate=rate: error(rate, links), *LINKS)  # type: ignore[misc]
        rate = best_rate(links)
        # A single rank has no links, so its rate is already exact. A change below 1e-4 alters no printed figure.
        if smallest.ranks == 1 or abs(math.log(links / before)) < 1e-4:
            break
    return rate, links


def cost_model(costs: Costs, rate: float, links: float) -> Model:
    """Return a workload's cost model with the fitted factors ``rate`` and ``links`` of ``fit_costs``.

    The causes of a step's time are those of ``StepTime``.
    """

    def at(nodes: int) -> StepParts:
        found = costs(nodes, rate, links)
        waits = {f"communication {name}": seconds for name, seconds in found.communication_s.items() if seconds}
        bubble = {"bubble": found.bubble_s} if found.bubble_s else {}
        return StepParts(found.step_s, found.compute_s, {"compute": found.compute_s, **bubble, **waits})

    text = f"ranks at {rate:.3g} times the rate that it assumes, and links at {links:.3g} times theirs"
    return Model(f"the workload's cost model, with {text}", at)


TERMS = ("divided among the ranks", "on every rank", "grows with the ranks")


def terms_of(ranks: int) -> tuple[float, float, float]:
    """Return the factor of each of ``TERMS`` at a number of ranks, to multiply with the fitted seconds."""
    return 1 / ranks, 1.0, math.log2(ranks)


def fit_trend(points: Sequence[Measured], is_weak: bool) -> tuple[float, ...]:
    """Return seconds for each of ``TERMS``, fitted by least squares of relative errors, none of them negative.

    In weak scaling (``is_weak``) the first term is 0. Of equal fits, the fit with fewer terms is returned.
    """
    rows = np.array([terms_of(point.ranks) for point in points]) / [[point.step_s] for point in points]
    return (0.0, *fit_not_negative(rows[:, 1:]).tolist()) if is_weak else tuple(fit_not_negative(rows).tolist())


def trend_model(weights: Sequence[float], is_weak: bool, ranks_per_node: int) -> Model:
    """Return a model that is a sum of ``TERMS``, for a program without cost model.

    ``weights`` are the seconds of each term, from ``fit_trend``.
    """

    def at(nodes: int) -> StepParts:
        terms = [weight * term for weight, term in zip(weights, terms_of(nodes * ranks_per_node), strict=True)]
        causes = {cause: seconds for cause, seconds in zip(TERMS, terms, strict=True) if seconds}
        return StepParts(sum(terms), terms[0] + terms[1], causes)

    text = "" if is_weak else f"{weights[0]:.3g} s divided among the ranks, "
    text += f"{weights[1]:.3g} s on each, and {weights[2]:.3g} s for each doubling"
    return Model(f"a trend of step times: {text}", at)
