"""Measured points of a sweep, and models of the time of a step on any number of nodes, fitted to these points.

The largest point is predicted from the other points, which shows the error of a model.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from shlex import quote
from statistics import NormalDist

import numpy as np

from launch.config import Config
from launch.config.compose import read_point as read_config
from launch.config.compose import workload_of
from launch.errors import ConfigError
from launch.report.goodput import Failures
from launch.report.points import Point, read_point
from launch.report.read import Floats, read_columns
from launch.report.selection import Selection
from launch.report.series import Series, fit_not_negative, label_points, split
from launch.report.steps import TIME, WAITS, step_times
from launch.runs.events import select_events
from launch.runs.folder import RunFolder
from launch.workload import PlanRequest, StepTime

UNLIMITED_GB = 1e6
"""Memory in GB that is assumed for a CPU node with unknown memory. The value has no effect on the time of a step."""
GOLDEN = (math.sqrt(5) - 1) / 2


def root(function: Callable[[float], float], low: float, high: float) -> float:
    """Return the positive number between ``low`` and ``high`` at which a falling function is zero.

    The method is bisection of the logarithm of the number. If the function is nowhere above zero, return ``low``. If it
    is nowhere below zero, return ``high``.
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
    """Return the positive number at which a function is smallest.

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
"""Largest number of a run's last steps whose records are read. More steps add no information and need memory."""


@dataclass(frozen=True)
class RankSpread:
    """Spread of the own times of a run's ranks. An own time is the time of a step without waits for other ranks."""

    ranks: int
    own_s: float
    """Mean own time over ranks and steps, seconds."""
    excess: float
    """Own time of the slowest rank minus the mean of the ranks, as a share of ``own_s``; the mean over the steps."""

    def share(self, ranks: int) -> float:
        """Return the expected excess of the slowest of ``ranks`` ranks over the mean rank, as a share of the mean own
        time.

        The result is extrapolated: the measured excess grows with the expected maximum of ``ranks`` normal draws.
        """
        return self.excess * normal_maximum(ranks) / normal_maximum(self.ranks)


def spread_of(own: Floats, has_stages: bool = False) -> RankSpread:
    """Return the spread of the ranks' own times in one run.

    Args:
        own: time of each step without waits for other ranks, in seconds, [steps, ranks]; two ranks or more.
        has_stages: True for a pipeline. Its stages differ by design, so each rank is only compared with itself.
    """
    deviations = own - own.mean(axis=1, keepdims=True)
    if has_stages:
        deviations = deviations - deviations.mean(axis=0)
    own_s = float(own.mean())
    return RankSpread(own.shape[1], own_s, float(deviations.max(axis=1).mean()) / own_s)


def read_spread(point: Point) -> RankSpread | None:
    """Return the spread of the own times of a point's ranks; None if it cannot be measured.

    Each rank needs records of the same steps, each with the step time and the communication time. The run needs at
    least two ranks and two steps.
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
    """Median time of a step on a number of nodes, with its quartiles ``low_s`` and ``high_s``, in seconds."""

    nodes: int
    ranks: int
    step_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True)
class StepParts:
    """Time of a step by a model, in seconds."""

    step_s: float
    own_s: float
    """Seconds of the step in which a rank computes and does not wait."""
    by_cause: dict[str, float]
    """Cause -> seconds. The causes add up to ``step_s``."""


@dataclass(frozen=True)
class Model:
    """A model of the time of a step on any number of nodes, fitted to measured numbers of nodes."""

    text: str
    """Sentence about the fit, for people."""
    at: Callable[[int], StepParts]
    """Function that returns the time of a step on a number of nodes. Raises ConfigError if such a run cannot work."""

    def with_stragglers(self, spread: RankSpread, ranks_per_node: int, reference_s: float) -> Model:
        """Return a new model: this model, which assumes equally fast ranks, plus the time that the slowest rank adds.

        Args:
            spread: spread of the ranks' own times (step time without waits for other ranks), as measured in one run.
            ranks_per_node: number of ranks on each node, at every size.
            reference_s: own time in seconds that this model returns for the number of nodes of that run.
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
    """Return (rate factor, link factor) with which a cost model fits measured points.

    The rate factor is fitted to the smallest point, and the link factor to the other points. Both fits are repeated
    alternately until the link factor no longer changes.

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
    """Return a model of the step time: a workload's cost model with the factors ``rate`` and ``links``.

    The causes of a step's time are those of ``StepTime``.
    """

    def at(nodes: int) -> StepParts:
        found = costs(nodes, rate, links)
        waits = {f"communication {name}": seconds for name, seconds in found.communication_s.items() if seconds}
        bubble = {"bubble": found.bubble_s} if found.bubble_s else {}
        return StepParts(found.step_s, found.compute_s, {"compute": found.compute_s, **bubble, **waits})

    text = f"ranks at {rate:.3g} times the assumed rate, and links at {links:.3g} times the assumed bandwidth"
    return Model(f"the workload's cost model, with {text}", at)


TERMS = ("divided among the ranks", "on every rank", "grows with the ranks")
"""Names of the terms whose sum is the step time of a program without a cost model, in the order of ``terms_of``."""


def terms_of(ranks: int) -> tuple[float, float, float]:
    """Return, for a number of ranks, the factors by which the fitted seconds of ``TERMS`` are multiplied."""
    return 1 / ranks, 1.0, math.log2(ranks)


def fit_trend(points: Sequence[Measured], is_weak: bool) -> tuple[float, ...]:
    """Return the seconds of each of ``TERMS``, fitted by least squares of relative errors. No value is negative.

    In weak scaling (``is_weak``) the first value is 0. Of equally good fits, the one with fewer terms is returned.
    """
    rows = np.array([terms_of(point.ranks) for point in points]) / [[point.step_s] for point in points]
    return (0.0, *fit_not_negative(rows[:, 1:]).tolist()) if is_weak else tuple(fit_not_negative(rows).tolist())


def trend_model(weights: Sequence[float], is_weak: bool, ranks_per_node: int) -> Model:
    """Return a model of the step time as a sum of ``TERMS``, for a program without a cost model.

    Args:
        weights: seconds of each term, from ``fit_trend``.
        is_weak: True in weak scaling, where no work is divided among the ranks.
        ranks_per_node: number of ranks on each node, at every size.
    """

    def at(nodes: int) -> StepParts:
        terms = [weight * term for weight, term in zip(weights, terms_of(nodes * ranks_per_node), strict=True)]
        causes = {cause: seconds for cause, seconds in zip(TERMS, terms, strict=True) if seconds}
        return StepParts(sum(terms), terms[0] + terms[1], causes)

    text = "" if is_weak else f"{weights[0]:.3g} s divided among the ranks, "
    text += f"{weights[1]:.3g} s on each, and {weights[2]:.3g} s for each doubling"
    return Model(f"a trend of step times: {text}", at)


# The points of a sweep, and what their run folders say about failures.


def request_for(
    config: Config, overrides: Sequence[str], folder: RunFolder, rate: float = 1.0, links: float = 1.0
) -> PlanRequest:
    """Return the request with which a workload plans a run on cluster nodes, or estimates its step time.

    Args:
        config: config of the run, with its number of nodes.
        overrides: overrides as typed.
        folder: folder of the run.
        rate: factor by which the cost model multiplies the compute rate.
        links: factor by which the cost model multiplies the bandwidth of all links.
    """
    return PlanRequest(
        overrides=tuple(overrides),
        folder=folder,
        is_local=False,
        nodes=config.nodes,
        ranks_per_node=config.ranks_on_node,
        cluster=config.cluster,
        local_gpus=0,
        rate_factor=rate,
        link_factor=links,
    )


@dataclass(frozen=True)
class SweepPoints:
    """Points of one series to which a projection is fitted, smallest first."""

    series: Series
    base: Point
    """Largest point, whose config is used for other sizes."""
    config: Config
    """Config of the largest point, with the devices that its ranks recorded."""
    measured: tuple[Measured, ...]
    """Size and step time of each point."""
    rates: tuple[float | None, ...] = ()
    """Work per second of each point, in the unit of the sweep; None if unknown."""
    left_out: tuple[str, ...] = ()
    """Titles of points whose ranks shared cores or a GPU. They do not show how separate nodes behave."""
    spreads: Mapping[int, RankSpread] = field(default_factory=dict)
    """Number of nodes of a point with several ranks -> measured spread of the own times of its ranks.

    Empty if the spread of at least one such point is unusable (``untold``).
    """
    untold: str = ""
    """Title of a point with several ranks whose spread of own times is unusable; "" if there is no such point.

    A spread is unusable if it is unknown, or if the slowest rank exceeds the mean rank by at least the time of a step.
    """

    @property
    def is_weak(self) -> bool:
        """Return whether the work of a step grows with the number of ranks."""
        return self.series.scaling == "weak"

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks on each node, at every size."""
        return self.measured[0].ranks // self.measured[0].nodes

    def fit(self, points: Sequence[Measured]) -> Model:
        """Return a model that is fitted to ``points``, smallest first.

        Measured times include the delay of the slowest rank. This delay is subtracted before the fit, and the expected
        delay at each size is added afterwards.
        """
        costs = self.costs()
        late_s = [self.stragglers_s(point) or 0.0 for point in points]
        even = [replace(point, step_s=point.step_s - late) for point, late in zip(points, late_s, strict=True)]
        if costs is None:
            model = trend_model(fit_trend(even, self.is_weak), self.is_weak, self.ranks_per_node)
        else:
            model = cost_model(costs, *fit_costs(even, costs))
        widest = max((point.nodes for point in points if point.nodes in self.spreads), default=None)
        if widest is None:
            return model
        return model.with_stragglers(self.spreads[widest], self.ranks_per_node, model.at(widest).own_s)

    def stragglers_s(self, point: Measured) -> float | None:
        """Return the seconds by which the slowest rank exceeds the mean rank in a step; None if not known."""
        spread = self.spreads.get(point.nodes)
        return None if spread is None else spread.own_s * spread.share(point.ranks)

    def costs(self) -> Costs | None:
        """Return the workload's cost model for the nodes of the sweep; None if the workload has no model."""
        workload = workload_of(self.config)

        def costs(nodes: int, rate: float, links: float) -> StepTime:
            found = workload.step_time(*self.request(nodes, rate, links))
            assert isinstance(found, StepTime)
            return found

        return costs if workload.step_time(*self.request(self.measured[0].nodes)) is not None else None

    def request(self, nodes: int, rate: float = 1.0, links: float = 1.0) -> tuple[Config, PlanRequest]:
        """Return the config of the largest point with ``nodes`` nodes, and the request to plan such a run.

        ``rate`` and ``links`` are the factors of ``request_for``.
        """
        config = replace(self.config, nodes=nodes)
        return config, request_for(config, self.base.overrides, RunFolder(self.base.path), rate, links)


def with_devices(config: Config, base: Point) -> Config:
    """Return ``config`` with the devices on which the ranks of ``base`` ran."""
    known = config.cluster
    if base.environment is not None and not base.environment.ranks[0].device.startswith("cpu"):
        name = known.gpu_name or base.environment.ranks[0].device_name
        known = replace(known, gpu_name=name, gpus_per_node=config.ranks_on_node)
    elif known.mem_gb is None:
        known = replace(known, mem_gb=UNLIMITED_GB)
    return replace(config, cluster=known)


def read_sweep(selection: Selection, network: Path | None = None) -> SweepPoints:
    """Return the points of a sweep.

    Args:
        selection: runs of the sweep.
        network: file of ``launch.bench_network``; None for the links that the config of the sweep names.

    Raises:
        ConfigError: the runs are not one series, fewer than two of them have step times, or a file is broken.
    """
    several = split(label_points([*map(read_point, selection.runs)]))
    if len(several) != 1:
        names = ", ".join(series.label for series in several)
        again = f"python -m launch.project {quote(str(selection.folder))} --sweep N"
        raise ConfigError(f"{len(several)} series in {selection.folder}: {names}", "one, along nodes", again)
    timed = [one for one in several[0].members if one.figures is not None and one.nodes and one.ranks]
    members = tuple(one for one in timed if not one.crowded)
    left_out = tuple(one.title for one in timed if one.crowded)
    sizes = {(one.nodes, one.ranks) for one in members}
    if len(sizes) < 2 or len({one.nodes for one in members}) < len(members):
        raise ConfigError(
            f"step times of {', '.join(one.title for one in members) or 'no point'} in {selection.folder}"
            + (f"; in those of {', '.join(left_out)} ranks shared cores or a GPU" if left_out else ""),
            "those of two or more numbers of nodes, each measured once: one to fit, and one to be predicted",
            "python -m launch -m nodes=1,2,4 ...",
        )
    if several[0].scaling is None:
        raise ConfigError(
            f"{selection.folder}, whose runs do not say how much work a step is",
            "a global batch that is the same for all points, or grows with the ranks",
            "script.work_per_step=N, beside script.weak_scaling where it grows",
        )
    config = read_config(RunFolder(members[-1].path))
    if network is not None:
        config = replace(config, cluster=replace(config.cluster, network=str(network.absolute())))
    config = with_devices(config, members[-1])
    measured = tuple(map(as_measured, members))
    rates = tuple(None if one.figures is None else one.figures.throughput for one in members)
    spreads: dict[int, RankSpread] = {}
    untold = ""
    for point, member in zip(measured, members, strict=True):
        spread = read_spread(member) if point.ranks > 1 else None
        # An excess as long as the step itself comes from pauses, and is no property of the ranks.
        if spread is not None and spread.own_s * spread.share(point.ranks) < point.low_s:
            spreads[point.nodes] = spread
        elif point.ranks > 1:
            untold = member.title
    # If the stragglers of one point are unknown, no point's stragglers are used.
    return SweepPoints(several[0], members[-1], config, measured, rates, left_out, {} if untold else spreads, untold)


def as_measured(member: Point) -> Measured:
    """Return the size and the step times of a point, to which a model is fitted."""
    assert member.figures is not None and member.nodes is not None and member.ranks is not None
    return Measured(member.nodes, member.ranks, member.figures.step_time_s, member.figures.low_s, member.figures.high_s)


@dataclass(frozen=True)
class HeldOut:
    """The largest measured point, and its step time as predicted from the smaller points."""

    point: Measured
    predicted_s: float
    fitted_to: tuple[int, ...]
    """Numbers of nodes of the points to which the model was fitted."""

    error: float
    """Predicted step time divided by measured step time, minus 1."""


def hold_out(sweep: SweepPoints) -> HeldOut:
    """Return the largest point, with its step time as predicted by a model that is fitted to the other points."""
    known, largest = sweep.measured[:-1], sweep.measured[-1]
    predicted_s, nodes = sweep.fit(known).at(largest.nodes).step_s, tuple(point.nodes for point in known)
    return HeldOut(largest, predicted_s, nodes, predicted_s / largest.step_s - 1)


def straggler_notes(sweep: SweepPoints) -> list[str]:
    """Return notes on how slow ranks are extrapolated, and on effects that no figure of the projection includes."""
    others = "congestion by other jobs, and links of more tiers than in and between nodes"
    if not sweep.spreads:
        lacking = f" ({sweep.untold} lacks each rank's waits, comm_s)" if sweep.untold else ""
        return [f"not in it: slow ranks{lacking}, {others}"]
    nodes = max(sweep.spreads)
    spread = sweep.spreads[nodes]
    late = f"{100 * spread.excess:.2g} %"
    text = f"at nodes={nodes} the slowest of {spread.ranks} ranks takes {late} longer than the mean"
    return [f"stragglers: {text}; with more ranks it grows as the maximum of normal draws", f"not in it: {others}"]


def failures_of(sweep: SweepPoints, mtbf_node_h: float | None) -> tuple[Failures | None, list[str]]:
    """Return the rate and cost of failures, and notes on them.

    ``mtbf_node_h`` is the mean time between failures of one node in hours. The rate and cost are None if this time is
    None, or if the largest point did not record both a save and a start.
    """
    if mtbf_node_h is None:
        return None, []
    events = select_events(RunFolder(sweep.base.path).read_events(), "saved")
    saves = [float(event["seconds"]) for event in events if event.get("seconds") is not None]
    start_s = None if sweep.base.goodput is None else sweep.base.goodput.seconds.get("start")
    if not saves or start_s is None:
        return None, [f"no goodput: {sweep.base.title} recorded no save or no start, so a failure has no known cost"]
    save_s = statistics.median(saves)
    told = f"a save stops the steps for {save_s:.3g} s, a restart takes {start_s:.3g} s, as at {sweep.base.title}"
    return Failures(mtbf_node_h, save_s, start_s), [f"goodput: {told}; saves at Young's interval"]
