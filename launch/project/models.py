"""Models of the time of a step over the number of nodes, with stragglers, fitted to measured points."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np

from launch.report.points import Point
from launch.report.read import Floats, read_columns
from launch.report.steps import TIME, WAITS, step_times
from launch.runs.folder import RunFolder
from launch.workload import StepTime

# Minimum and root of a function of one number, by halving. Pure arithmetic.


GOLDEN = (math.sqrt(5) - 1) / 2


def root(function: Callable[[float], float], low: float, high: float, rounds: int = 60) -> float:
    """Zero of a falling function of a positive number, by bisection of its logarithm.

    The nearer end where it does not cross zero between ``low`` and ``high``.
    """
    if function(low) <= 0:
        return low
    if function(high) >= 0:
        return high
    for _ in range(rounds):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def minimum(function: Callable[[float], float], low: float, high: float, rounds: int = 48) -> float:
    """Argument of the minimum of a function of a positive number, by golden sections of its logarithm (Kiefer, 1953).

    Exact to the tolerance of the rounds where it has one minimum between ``low`` and ``high``.
    """
    a, b = math.log(low), math.log(high)
    for _ in range(rounds):
        left, right = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
        if function(math.exp(left)) <= function(math.exp(right)):
            b = right
        else:
            a = left
    return math.exp((a + b) / 2)


# Expected maximum of so many independent draws, from a sample or of a normal distribution. Pure arithmetic.


LEAST_TAIL = 10
"""Fewest values that a tail is fitted to."""


def maximum_weights(size: int, draws: int) -> Floats:
    """Weights of ascending values whose weighted sum is the mean of the largest of ``draws``, over all choices.

    That of every choice without replacement is the U-statistic of the maximum (Hoeffding, 1948): its expectation is the
    expected maximum of ``draws`` independent draws, whatever the distribution. ``draws`` is at most ``size``.
    """
    places = np.arange(size, 1, -1)
    # A value's weight from that of the next larger one: C(i - 2, d - 1) / C(i - 1, d - 1).
    ratios = np.maximum(places - draws, 0) / (places - 1)
    return draws / size * np.cumprod(np.append(1.0, ratios))[::-1]


@dataclass(frozen=True, eq=False)
class Sample:
    """Ascending values, and the exponential tail through the largest of them."""

    values: Floats

    @property
    def in_tail(self) -> int:
        """Number of the largest values that the tail is fitted to: as many as the square root of all."""
        return min(max(LEAST_TAIL, math.isqrt(len(self.values))), len(self.values) // 2)

    @property
    def reach(self) -> int:
        """Draws up to which the values speak for themselves: beyond, the few largest would be all that counts."""
        return max(1, len(self.values) // max(1, self.in_tail))

    @property
    def tail(self) -> float:
        """Mean excess of the largest values above the next one: the scale of an exponential tail, by maximum
        likelihood."""
        if not self.in_tail:
            return 0.0
        threshold = self.values[-self.in_tail - 1]
        return float((self.values[-self.in_tail :] - threshold).mean())

    def expected_maximum(self, draws: int) -> float:
        """Return the expected maximum; beyond the reach it grows by the tail's scale with the logarithm of the draws.

        So grows the maximum of every distribution whose tail is exponential, and less that of a normal one or of a
        bounded one: for these it is an upper estimate.
        """
        inside = min(draws, self.reach)
        known = float(maximum_weights(len(self.values), inside) @ self.values)
        return known + self.tail * math.log(draws / inside)


@lru_cache(maxsize=256)
def normal_maximum(draws: int) -> float:
    """Return the expected maximum of independent standard normal draws, by numerical integration."""
    x = np.linspace(-10.0, 10.0, 4001)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()])
    return float(((x > 0) + 0.5 * (x == 0) - below**draws).sum() * (x[1] - x[0]))


# Stragglers of a synchronous step: how much longer than the mean the slowest of so many ranks works by itself.


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
    return spread_of(np.array(own).T, has_stages=has_stages)


# Models of the time of a step over the number of nodes, and their fit to measured points.


@dataclass(frozen=True)
class Measured:
    """Median time of a step on so many nodes, with its quartiles, in seconds."""

    nodes: int
    ranks: int
    step_s: float
    low_s: float
    high_s: float

    @property
    def spread(self) -> float:
        """Half of the interquartile range over the median."""
        return (self.high_s - self.low_s) / 2 / self.step_s


class Model(Protocol):
    """A fitted model."""

    @property
    def text(self) -> str:
        """One sentence on what was fitted, for people."""

    def seconds(self, nodes: int) -> float:
        """Time of a step. Raises ConfigError if a run of this size cannot work."""

    def parts(self, nodes: int) -> dict[str, float]:
        """Share of the step by cause, in seconds; they add up to ``seconds``."""

    def own_s(self, nodes: int) -> float:
        """Time of a step in which a rank works by itself."""


Costs = Callable[[int, float, float], StepTime]
"""(nodes, rate factor, link factor) -> time of a step, as ``launch.workload.PlanRequest`` has these factors."""

RATES = (1e-6, 1e4)
LINKS = (1e-4, 1e3)
ROUNDS = 12
"""Turns in which rate and links are fitted; where the smallest point has one rank, the first is exact."""
SETTLED = 1e-4
"""A relative change of the links after which another turn would change nothing that is shown."""


@dataclass(frozen=True)
class CostModel:
    """A workload's own model, at the rate and the speed of links that were measured."""

    costs: Costs
    rate: float
    links: float
    links_are_given: bool

    @property
    def text(self) -> str:
        """One sentence on what was fitted, for people."""
        links = "links as given" if self.links_are_given else f"its links at {self.links:.3g} times that"
        return f"the workload's cost model, with ranks at {self.rate:.3g} times the rate it assumes, and {links}"

    def seconds(self, nodes: int) -> float:
        """Time of a step. Raises ConfigError if a run of this size cannot work."""
        return self.costs(nodes, self.rate, self.links).step_s

    def parts(self, nodes: int) -> dict[str, float]:
        """Seconds of the step by cause: compute, bubble, and exposed communication by mesh axis."""
        found = self.costs(nodes, self.rate, self.links)
        waits = {f"communication {name}": seconds for name, seconds in found.communication_s.items() if seconds}
        return {"compute": found.compute_s, **({"bubble": found.bubble_s} if found.bubble_s else {}), **waits}

    def own_s(self, nodes: int) -> float:
        """Time of a step in which a rank computes."""
        return self.costs(nodes, self.rate, self.links).compute_s


def fit_costs(points: Sequence[Measured], costs: Costs, *, links_are_given: bool = False) -> CostModel:
    """Fit a workload's model to points, smallest first: the rate to the smallest, the links to the others."""
    smallest, others = points[0], points[1:]

    def best_rate(links: float) -> float:
        return root(lambda rate: costs(smallest.nodes, rate, links).step_s - smallest.step_s, *RATES)

    def best_links(rate: float) -> float:
        def error(links: float) -> float:
            return squared_error(others, lambda nodes: costs(nodes, rate, links).step_s)

        return minimum(error, *LINKS)

    links = 1.0
    rate = best_rate(links)
    if others and not links_are_given:
        for _ in range(ROUNDS):
            before, links = links, best_links(rate)
            rate = best_rate(links)
            if smallest.ranks == 1 or abs(math.log(links / before)) < SETTLED:
                break
    return CostModel(costs, rate, links, links_are_given)


def squared_error(points: Sequence[Measured], seconds: Callable[[int], float]) -> float:
    """Sum of the squared logarithms of predicted over measured times: twice as long counts as half as long does."""
    return sum(math.log(seconds(point.nodes) / point.step_s) ** 2 for point in points)


@dataclass(frozen=True)
class TrendModel:
    """A sum of terms over the number of ranks, for a program of which nothing is known but its times."""

    weights: tuple[float, float, float]
    """Seconds of the divided part on one rank, of the constant part, and for each doubling of the ranks."""
    is_weak: bool
    ranks_per_node: int

    @property
    def text(self) -> str:
        """One sentence on what was fitted, for people."""
        divided, constant, doubling = self.weights
        whole = "" if self.is_weak else f"{divided:.3g} s divided among the ranks, "
        return f"a trend of step times: {whole}{constant:.3g} s on each, and {doubling:.3g} s for each doubling"

    def seconds(self, nodes: int) -> float:
        """Time of a step."""
        return sum(self.parts(nodes).values())

    def parts(self, nodes: int) -> dict[str, float]:
        """Seconds of the step by term; those that are zero are left out."""
        terms = terms_of(nodes * self.ranks_per_node, self.is_weak)
        named = zip(("divided among the ranks", "on every rank", "grows with the ranks"), self.weights, strict=True)
        return {name: w * term for (name, w), term in zip(named, terms, strict=True) if w * term}

    def own_s(self, nodes: int) -> float:
        """Time of a step that does not grow with the ranks."""
        divided, constant, _ = terms_of(nodes * self.ranks_per_node, self.is_weak)
        return self.weights[0] * divided + self.weights[1] * constant


@dataclass(frozen=True)
class StragglerModel:
    """A model of a step whose ranks are all as fast as their mean, and what the slowest of them adds to it."""

    even: Model
    spread: RankSpread
    ranks_per_node: int
    reference_s: float
    """Own time by the model at the point whose spread was measured."""

    @property
    def text(self) -> str:
        """One sentence on what was fitted, for people."""
        return f"{self.even.text}; stragglers as the expected maximum over the ranks"

    def seconds(self, nodes: int) -> float:
        """Time of a step. Raises ConfigError if a run of this size cannot work."""
        return self.even.seconds(nodes) + self.stragglers_s(nodes)

    def parts(self, nodes: int) -> dict[str, float]:
        """Seconds of the step by cause, stragglers among them."""
        return {**self.even.parts(nodes), "stragglers": self.stragglers_s(nodes)}

    def own_s(self, nodes: int) -> float:
        """Time of a step in which the mean rank works by itself."""
        return self.even.own_s(nodes)

    def stragglers_s(self, nodes: int) -> float:
        """Time by which the slowest rank is expected to take longer than their mean: a share of the own time."""
        scale = self.own_s(nodes) / self.reference_s if self.reference_s > 0 else 1.0
        return self.spread.share(nodes * self.ranks_per_node) * self.spread.own_s * scale


def terms_of(ranks: int, is_weak: bool) -> tuple[float, float, float]:
    """The terms of a trend at a number of ranks. In weak scaling nothing is divided."""
    return 0.0 if is_weak else 1 / ranks, 1.0, math.log2(ranks)


def fit_trend(points: Sequence[Measured], is_weak: bool) -> TrendModel:
    """Fit a trend without negative terms, by least squares of relative errors; of equal fits that with fewer terms."""
    import numpy as np

    rows = np.array([terms_of(point.ranks, is_weak) for point in points])
    scaled = rows / np.array([[point.step_s] for point in points])
    best: tuple[float, tuple[float, float, float]] | None = None
    for count in (1, 2, 3):
        for chosen in itertools.combinations(range(3), count):
            matrix = scaled[:, chosen]
            if count > len(points) or np.linalg.matrix_rank(matrix) < count:
                continue
            solution, *_ = np.linalg.lstsq(matrix, np.ones(len(points)), rcond=None)
            error = float(((matrix @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and (best is None or error < best[0] - 1e-12):
                weights = [0.0, 0.0, 0.0]
                for index, value in zip(chosen, solution.tolist(), strict=True):
                    weights[index] = value
                best = error, (weights[0], weights[1], weights[2])
    assert best is not None, "one positive term always fits"
    return TrendModel(best[1], is_weak, points[0].ranks // points[0].nodes)
