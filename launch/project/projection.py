"""Projection of a measured sweep: read its points, predict the largest one, and make a row for each size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

from launch.config import Config
from launch.config.compose import read_point as read_config
from launch.config.compose import workload_of
from launch.errors import ConfigError
from launch.project.models import (
    Costs,
    Measured,
    Model,
    RankSpread,
    cost_model,
    fit_costs,
    fit_trend,
    read_spread,
    trend_model,
)
from launch.report.goodput import Failures
from launch.report.points import Point, read_point
from launch.report.selection import Selection
from launch.report.series import Series, label_points, split
from launch.runs.folder import RunFolder
from launch.workload import PlanRequest, StepTime

UNLIMITED_GB = 1e6
"""Memory in GB of a CPU node whose memory is unknown. The value has no effect on the time of a step."""


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
    """Points of one series with step times, smallest first, to which a projection is fitted."""

    series: Series
    base: Point
    """Largest point, whose config is used at other sizes."""
    config: Config
    """Config of the largest point, with the devices that its ranks recorded."""
    measured: tuple[Measured, ...]
    """Figures of the points to which a model is fitted."""
    rates: tuple[float | None, ...] = ()
    """Work per second of each point, in the unit of the sweep; None if unknown."""
    left_out: tuple[str, ...] = ()
    """Names of points whose ranks shared cores or a GPU. They do not show how separate nodes behave."""
    spreads: Mapping[int, RankSpread] = field(default_factory=dict)
    """Nodes -> spread of the ranks' own times, for each point with several ranks; empty if one point lacks it."""
    untold: str = ""
    """Name of a point with several ranks and an unknown spread, for which ``spreads`` is empty; "" if there is none."""

    @property
    def is_weak(self) -> bool:
        """Return whether the work of a step grows with the number of ranks."""
        return self.series.scaling == "weak"

    @property
    def ranks_per_node(self) -> int:
        """Number of ranks on each node, at every size."""
        return self.measured[0].ranks // self.measured[0].nodes

    def fit(self, points: Sequence[Measured]) -> Model:
        """Fit a model to some of the points, smallest first.

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
        """Return the workload's cost model for the nodes of the sweep; None if there is none."""
        workload = workload_of(self.config)

        def costs(nodes: int, rate: float, links: float) -> StepTime:
            found = workload.step_time(*self.request(nodes, rate, links))
            assert isinstance(found, StepTime)
            return found

        return costs if workload.step_time(*self.request(self.measured[0].nodes)) is not None else None

    def request(self, nodes: int, rate: float = 1.0, links: float = 1.0) -> tuple[Config, PlanRequest]:
        """Return the largest point's config with ``nodes`` nodes, and the request to plan or estimate this run.

        ``rate`` and ``links`` are the factors of ``request_for``.
        """
        config = replace(self.config, nodes=nodes)
        return config, request_for(config, self.base.overrides, RunFolder(self.base.path), rate, links)


def with_devices(config: Config, base: Point) -> Config:
    """Return ``config`` with the devices that the ranks of ``base`` recorded."""
    known = config.cluster
    if base.environment is not None and not base.environment.ranks[0].device.startswith("cpu"):
        name = known.gpu_name or base.environment.ranks[0].device_name
        known = replace(known, gpu_name=name, gpus_per_node=config.ranks_on_node)
    elif known.mem_gb is None:
        known = replace(known, mem_gb=UNLIMITED_GB)
    return replace(config, cluster=known)


def read_sweep(selection: Selection, network: Path | None = None) -> SweepPoints:
    """Read the points of a sweep.

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


# From measured to projected points: the held-out test, and a row for each size.


@dataclass(frozen=True)
class HeldOut:
    """The largest measured point, predicted from the smaller ones."""

    point: Measured
    predicted_s: float
    fitted_to: tuple[int, ...]
    """Numbers of nodes of the points to which the model was fitted."""

    error: float
    """Predicted step time divided by measured step time, minus 1."""


@dataclass(frozen=True)
class ProjectedRow:
    """One measured or projected size: a line of ``projection.csv``. Times are in seconds; None if not known."""

    nodes: int
    ranks: int
    is_measured: bool
    step_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    throughput: float | None = None
    """Work per second in the unit of the sweep."""
    efficiency: float | None = None
    """Throughput per rank divided by the throughput per rank of the smallest measured point."""
    memory_bytes: int | None = None
    """Planned memory of one rank in bytes."""
    goodput: float | None = None
    """Expected share (0 to 1) of the time in steps that are not lost to failures; None without ``--mtbf-hours``."""
    gpu_hours_per_giga: float | None = None
    """GPU-hours for 10^9 units of work, goodput included."""
    cost_per_giga: float | None = None
    """Cost of 10^9 units of work in the currency of ``cluster.price_per_gpu_hour``, goodput included."""
    stragglers_s: float | None = None
    """Seconds by which the slowest rank exceeds the mean rank in a step: measured, or expected."""
    parts: dict[str, float] = field(default_factory=dict)
    """Cause -> seconds of a step, by the model; empty for a measured size."""
    refused: str = ""
    """Reason why a run of this size cannot work; empty if it can."""


@dataclass(frozen=True)
class Projection:
    """Measured and projected sizes of one sweep: the content of ``projection.json``."""

    rows: tuple[ProjectedRow, ...]
    held_out: HeldOut
    interval: float
    """Half width of every interval, as natural logarithm of a factor on the step time.

    It is the error of the held-out point, or the spread of that point's step times if that is larger.
    """
    model: str
    unit: str
    weak_scaling: bool
    notes: tuple[str, ...]
    label: str


def project(sweep: SweepPoints, sizes: Sequence[int], mtbf_node_h: float | None) -> Projection:
    """Predict the largest measured point from the other points, then extrapolate all points to ``sizes``.

    Args:
        sweep: two points or more.
        sizes: numbers of nodes.
        mtbf_node_h: mean time between failures of one node, hours; None for a projection without goodput.
    """
    held_out, model = hold_out(sweep), sweep.fit(sweep.measured)
    first, last = sweep.measured[0], held_out.point
    spread = (last.high_s - last.low_s) / 2 / last.step_s
    interval = max(abs(math.log(held_out.predicted_s / last.step_s)), spread)
    failures, notes = failures_of(sweep, mtbf_node_h)
    rows = []
    for one, rate in zip(sweep.measured, sweep.rates, strict=True):
        row = ProjectedRow(one.nodes, one.ranks, True, one.step_s, one.low_s, one.high_s, rate)
        rows.append(with_derived(replace(row, stragglers_s=sweep.stragglers_s(one)), sweep, failures))
    known = {row.nodes for row in rows}
    for nodes in (size for size in sizes if size not in known):
        row = ProjectedRow(nodes, nodes * sweep.ranks_per_node, False)
        try:
            config, request = sweep.request(nodes)
            memory, step = workload_of(config).plan(config, request).facts.get("memory_bytes"), model.at(nodes)
        except ConfigError as refusal:
            rows.append(replace(row, refused=refusal.found))
            continue
        growth = nodes / first.nodes if sweep.is_weak else 1
        projected = replace(
            row,
            step_s=step.step_s,
            low_s=step.step_s * math.exp(-interval),
            high_s=step.step_s * math.exp(interval),
            throughput=None if sweep.rates[0] is None else sweep.rates[0] * first.step_s * growth / step.step_s,
            parts=step.by_cause,
            memory_bytes=memory.get("total") if isinstance(memory, dict) else None,
            stragglers_s=step.by_cause.get("stragglers"),
        )
        rows.append(with_derived(projected, sweep, failures))
    if sweep.left_out:
        notes.append(f"left out: {', '.join(sweep.left_out)}, whose ranks shared cores or a GPU")
    beyond = max(sizes) / last.nodes
    if beyond > 16:
        notes.append(f"{max(sizes)} nodes are {beyond:.0f} times what was measured: the interval knows nothing of that")
    return Projection(
        rows=tuple(sorted(rows, key=lambda row: (row.nodes, not row.is_measured))),
        held_out=held_out,
        interval=interval,
        model=model.text,
        unit=sweep.base.unit or "units",
        weak_scaling=sweep.is_weak,
        notes=(*notes, *straggler_notes(sweep)),
        label=sweep.series.label,
    )


def hold_out(sweep: SweepPoints) -> HeldOut:
    """Predict the largest point with a model of the other points."""
    known, largest = sweep.measured[:-1], sweep.measured[-1]
    predicted_s, nodes = sweep.fit(known).at(largest.nodes).step_s, tuple(point.nodes for point in known)
    return HeldOut(largest, predicted_s, nodes, predicted_s / largest.step_s - 1)


def straggler_notes(sweep: SweepPoints) -> list[str]:
    """Return notes on how stragglers are extrapolated, and on effects that no figure includes."""
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
    """Return the cost of failures, and notes about this cost.

    The cost is None if ``mtbf_node_h`` (hours between failures of one node) is None, or if the largest point did not
    record a save and a start.
    """
    if mtbf_node_h is None:
        return None, []
    events = RunFolder(sweep.base.path).read_events()
    saves = [float(e["seconds"]) for e in events if e["event"] == "saved" and e.get("seconds") is not None]
    start_s = None if sweep.base.goodput is None else sweep.base.goodput.seconds.get("start")
    if not saves or start_s is None:
        return None, [f"no goodput: {sweep.base.title} recorded no save or no start, so a failure has no known cost"]
    save_s = statistics.median(saves)
    told = f"a save holds the steps up for {save_s:.3g} s, a restart takes {start_s:.3g} s, as at {sweep.base.title}"
    return Failures(mtbf_node_h, save_s, start_s), [f"goodput: {told}; saves at Young's interval"]


def with_derived(row: ProjectedRow, sweep: SweepPoints, failures: Failures | None) -> ProjectedRow:
    """Return the row with the figures that follow from its step time: efficiency, goodput, GPU-hours, cost.

    ``failures`` is the cost of failures; None for a row without goodput.
    """
    assert row.step_s is not None
    first, gpus, price = sweep.measured[0], sweep.config.cluster.gpus_per_node, sweep.config.cluster.price_per_gpu_hour
    shrink = first.step_s / row.step_s
    goodput = None if failures is None else failures.goodput(row.nodes)
    hours = None
    if gpus and row.throughput and goodput != 0:
        hours = row.nodes * gpus * 1e9 / row.throughput / 3600 / (1.0 if goodput is None else goodput)
    return replace(
        row,
        efficiency=shrink if sweep.is_weak else shrink * first.ranks / row.ranks,
        goodput=goodput,
        gpu_hours_per_giga=hours,
        cost_per_giga=None if hours is None or price is None else hours * price,
    )
