"""Models of the time of a step over the number of nodes, and their fit to measured points.

A workload with a cost model of its own (the GPT's) is asked for the time of a step on nodes as they were measured:
fitted are the rate at which a rank computes, and one factor on latency and bandwidth of the links, unless those were
measured. For any other program the time is a sum of a part that is divided among the ranks, a part that is not, and a
part that grows with the logarithm of their number, as trees and latencies do. To both the slowest rank adds what it is
slower than their mean, where the records tell. Owns the fits. Must not know what is
shown.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from launch.project.search import minimum, root
from launch.project.stragglers import RankSpread
from launch.workload import StepTime


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
        """Time of a step. Raises ConfigError where a run of this size cannot work."""

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
        """Time of a step. Raises ConfigError where a run of this size cannot work."""
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
        """Time of a step. Raises ConfigError where a run of this size cannot work."""
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
