"""From the measured points of a sweep to projected ones: the held-out test, and a row for each size."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from shlex import quote

from launch.config import Config
from launch.config.cluster import ClusterConfig, InterconnectConfig
from launch.config.compose import read_point as read_config
from launch.config.compose import workload_of
from launch.errors import ConfigError
from launch.project.models import (
    CostModel,
    Costs,
    Measured,
    Model,
    RankSpread,
    StragglerModel,
    fit_costs,
    fit_trend,
    read_spread,
)
from launch.report.goodput import Failures
from launch.report.points import Point, read_point
from launch.report.selection import Selection
from launch.report.series import Series, label_points, split
from launch.runs.folder import RunFolder
from launch.runs.measured import read_matmul_rates, read_network
from launch.schema import check_ranges
from launch.workload import PlanRequest, StepTime, WorkloadPlan

# The measured points of a sweep, and a model of them: what a projection starts from.


@dataclass(frozen=True)
class SweepPoints:
    """The points of one series that have step times, smallest first, and the config of the largest."""

    series: Series
    members: tuple[Point, ...]
    measured: tuple[Measured, ...]
    config: Config
    network: InterconnectConfig | Path | None = None
    """Links as they were measured, or the file of each collective's; None where they are as the config says.

    What a file says of the collectives against each other is kept, and one factor on all of them is fitted where
    there is more than one point: a straight line through small and large messages is not how every link is.
    """
    left_out: tuple[str, ...] = ()
    """Points whose ranks shared cores or a GPU, which says nothing of nodes of their own."""
    spreads: Mapping[int, RankSpread] = field(default_factory=dict)
    """Nodes of a point with several ranks -> spread of their own times; empty unless all of these tell."""
    untold: str = ""
    """Reason for which there are none, for people; empty where no point has several ranks."""

    @property
    def base(self) -> Point:
        """The largest point, whose config is taken to other sizes."""
        return self.members[-1]

    @property
    def is_weak(self) -> bool:
        """Return whether the work of a step grows with the number of ranks."""
        return self.series.scaling == "weak"

    def fit(self, points: Sequence[Measured]) -> Model:
        """Fit a model to some of the points.

        The times that were measured hold what their slowest ranks took longer: it is taken off before the fit, and at
        every size comes back as what is expected there.
        """
        costs = self.costs()
        even = [self.without_stragglers(point) for point in points]
        if costs is None:
            model: Model = fit_trend(even, self.is_weak)
        else:
            model = fit_costs(even, costs, links_are_given=isinstance(self.network, InterconnectConfig))
        widest = next((point for point in reversed(points) if point.nodes in self.spreads), None)
        if widest is None:
            return model
        per_node = widest.ranks // widest.nodes
        return StragglerModel(model, self.spreads[widest.nodes], per_node, model.own_s(widest.nodes))

    def without_stragglers(self, point: Measured) -> Measured:
        """Return a point as if all its ranks had been as fast as their mean, as far as that is known."""
        late = self.stragglers_s(point) or 0.0
        return replace(point, step_s=point.step_s - late, low_s=point.low_s - late, high_s=point.high_s - late)

    def stragglers_s(self, point: Measured) -> float | None:
        """Time by which the slowest rank of a point took longer than their mean; None where that is not known."""
        spread = self.spreads.get(point.nodes)
        return None if spread is None else spread.own_s * spread.share(point.ranks)

    def fit_onto(self, gpu: str) -> Model:
        """Fit a model to all points, and take it to other GPUs: the same shares of what those are said to do.

        Raises:
            ConfigError: the sweep ran on CPUs, or too little is known of its GPUs or of these.
        """
        seen = None if self.base.environment is None else self.base.environment.device_names
        model = self.fit(self.measured)
        even = model.even if isinstance(model, StragglerModel) else model
        costs = self.costs(gpu) if self.has_gpus else None
        if costs is None or not isinstance(even, CostModel):
            raise ConfigError(
                f"--gpu {gpu} for a sweep on {seen or 'devices that were not recorded'}",
                "GPUs whose peaks are known, for the sweep and to project onto, and a workload with a cost model",
                "python -m launch.project without --gpu",
            )
        onto = replace(even, costs=costs)
        return replace(model, even=onto) if isinstance(model, StragglerModel) else onto

    @property
    def has_gpus(self) -> bool:
        """Return whether the ranks of the sweep computed on GPUs."""
        environment = self.base.environment
        return environment is not None and not environment.ranks[0].device.startswith("cpu")

    def costs(self, gpu: str | None = None) -> Costs | None:
        """The workload's cost model for the nodes of the sweep; None if it has none, or knows too little.

        Args:
            gpu: other GPUs than those of the sweep.
        """
        step_time = workload_of(self.config).step_time
        size = self.measured[0].nodes
        if step_time(*self.ask(size, gpu=gpu)) is None:
            return None

        def costs(nodes: int, rate: float, links: float) -> StepTime:
            found = step_time(*self.ask(nodes, rate, links, gpu))
            assert isinstance(found, StepTime)
            return found

        return costs

    def ask(
        self, nodes: int, rate: float = 1.0, links: float = 1.0, gpu: str | None = None
    ) -> tuple[Config, PlanRequest]:
        """The config of the largest point on so many nodes, and what a workload is told of them."""
        config = replace(self.config, nodes=nodes, cluster=self.cluster(gpu))
        request = PlanRequest(
            overrides=self.base.overrides,
            folder=RunFolder(self.base.path),
            is_local=False,
            nodes=nodes,
            ranks_per_node=config.ranks_on_node,
            cluster=config.cluster,
            local_gpus=0,
            rate_factor=rate,
            link_factor=links,
        )
        return config, request

    def cluster(self, gpu: str | None = None) -> ClusterConfig:
        """Return what is known of the nodes: the config, with the devices that were seen and the links measured."""
        known = self.config.cluster
        if self.has_gpus:
            assert self.base.environment is not None
            name = known.gpu_name or self.base.environment.ranks[0].device_name
            known = replace(known, gpu_name=name, gpus_per_node=self.config.ranks_on_node)
        elif known.mem_gb is None:
            known = replace(known, mem_gb=UNLIMITED_GB)
        if gpu is not None:
            known = replace(known, gpu_name=gpu, gpu_tflops=None, gpu_memory_gib=None, matmul_rates=None)
        if isinstance(self.network, Path):
            return replace(known, network=str(self.network))
        return known if self.network is None else replace(known, interconnect=self.network, network=None)

    def plan(self, nodes: int, gpu: str | None) -> WorkloadPlan:
        """The workload's plan of another size. Raises ConfigError if that cannot work."""
        config, request = self.ask(nodes, gpu=gpu)
        found = workload_of(config).plan(config, request)
        assert isinstance(found, WorkloadPlan)
        return found

    def save_s(self) -> float | None:
        """Median time that a save of the largest point took, seconds; None if it made none."""
        events = RunFolder(self.base.path).read_events()
        saves = [float(e["seconds"]) for e in events if e["event"] == "saved" and e.get("seconds") is not None]
        return statistics.median(saves) if saves else None

    def restart_s(self) -> float | None:
        """Time from the start of its allocation to the first step of the largest point, seconds; None where unknown."""
        return None if self.base.goodput is None else self.base.goodput.seconds.get("start")


UNLIMITED_GB = 1e6
"""Memory of a CPU node of which nobody said any: its size does not enter the time of a step."""


def read_sweep(selection: Selection, network: InterconnectConfig | Path | None = None) -> SweepPoints:
    """Read the points of a sweep.

    Raises:
        ConfigError: they are no one series, or fewer than two of them have step times.
    """
    found = label_points([*map(read_point, selection.runs)])
    several = split(found)
    again = f"python -m launch.project {quote(str(selection.folder))} --sweep N"
    if len(several) != 1:
        names = ", ".join(series.label for series in several)
        raise ConfigError(f"{len(several)} series in {selection.folder}: {names}", "one, along nodes", again)
    timed = [one for one in several[0].members if one.figures is not None and one.nodes and one.ranks]
    members = tuple(one for one in timed if not one.crowded)
    left_out = tuple(one.title for one in timed if one.crowded)
    sizes = {(one.nodes, one.ranks) for one in members}
    if len(sizes) < 2 or len({one.nodes for one in members}) < len(members):
        told = ", ".join(one.title for one in members) or "no point"
        raise ConfigError(
            f"step times of {told} in {selection.folder}"
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
    measured = tuple(map(as_measured, members))
    spreads, untold = read_spreads(members, measured)
    return SweepPoints(several[0], members, measured, config, network, left_out, spreads, untold)


def read_spreads(members: Sequence[Point], measured: Sequence[Measured]) -> tuple[dict[int, RankSpread], str]:
    """Read how the own times of ranks differ, by nodes; or nothing, and the reason.

    One rank waits for nobody. If one point of several ranks does not tell, what the others tell cannot be told from
    the rest of its time: all are taken as they are.
    """
    spreads = {}
    for member, point in zip(members, measured, strict=True):
        if point.ranks == 1:
            continue
        spread, title = read_spread(member), member.title
        if spread is None:
            return {}, f"{title} does not tell each rank's waits, comm_s, in every step"
        if spread.own_s * spread.share(point.ranks) >= point.low_s:
            return {}, f"{title} had pauses on average as long as most of its steps"
        spreads[point.nodes] = spread
    return spreads, ""


def with_matmul_rates(sweep: SweepPoints, path: Path, gpu: str | None) -> SweepPoints:
    """Return a sweep whose nodes compute at measured rates; ConfigError where the file is broken, or of other GPUs."""
    if gpu is not None:
        expected = "rates of the GPUs of the sweep, for a projection onto these"
        raise ConfigError(f"--matmul-rates {path} with --gpu {gpu}", expected, "--matmul-rates without --gpu")
    read_matmul_rates(path, "--matmul-rates")
    cluster = replace(sweep.config.cluster, matmul_rates=str(path.absolute()))
    return replace(sweep, config=replace(sweep.config, cluster=cluster))


def as_measured(member: Point) -> Measured:
    """The figures of a point that a model is fitted to."""
    assert member.figures is not None and member.nodes is not None and member.ranks is not None
    figures = member.figures
    return Measured(member.nodes, member.ranks, figures.step_time_s, figures.low_s, figures.high_s)


def read_links(path: Path) -> InterconnectConfig | Path:
    """Links from a file with the keys of ``cluster.interconnect``, or this file where ``launch.bench_network`` wrote
    it.

    Raises:
        ConfigError: no such file, or other keys in it.
    """
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    expected = (
        "what python -m launch.bench_network wrote; or intra_node and inter_node, each with latency_us and "
        "bandwidth_gb_per_s (10^9 bytes a second), as in cluster.interconnect"
    )
    fix = f"python -m launch.bench_network nodes=2 --output {path}"
    try:
        document = yaml.safe_load(path.read_text())
        if not isinstance(document, dict):
            raise ConfigError(f"--network {path}, without any key", expected, fix)
        if "tiers" in document:
            read_network(path, "--network")
            return path.absolute()
        merged = OmegaConf.merge(OmegaConf.structured(InterconnectConfig), document)
        found = OmegaConf.to_object(merged)
    except ConfigError:
        raise
    except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise ConfigError(f"--network {path}: {said}", expected, fix) from error
    assert isinstance(found, InterconnectConfig)
    check_ranges(found, "cluster.interconnect.")
    return found


# From measured points to projected ones: the held-out test, and a row for each size.


@dataclass(frozen=True)
class HeldOut:
    """The largest measured point, predicted from the smaller ones."""

    point: Measured
    predicted_s: float
    fitted_to: tuple[int, ...]
    """Numbers of nodes of the points that the prediction knew."""

    @property
    def error(self) -> float:
        """Predicted over measured time, less one."""
        return self.predicted_s / self.point.step_s - 1

    @property
    def text(self) -> str:
        """One sentence with the error, for people."""
        known = ", ".join(map(str, self.fitted_to))
        return (
            f"held out: {self.point.nodes} nodes, predicted from nodes={known}: {self.predicted_s:.4g} s a step, "
            f"measured {self.point.step_s:.4g} s: {100 * self.error:+.1f} %"
        )


@dataclass(frozen=True)
class Row:
    """One size. Times in seconds; what is not known is None."""

    nodes: int
    ranks: int
    is_measured: bool
    step_s: float | None = None
    low_s: float | None = None
    high_s: float | None = None
    throughput: float | None = None
    """Work per second, in the unit of the sweep."""
    efficiency: float | None = None
    """Throughput per rank against that of the smallest measured point."""
    memory_bytes: int | None = None
    """Of one rank, as planned."""
    goodput: float | None = None
    """Share of the time in steps that count, where nodes fail."""
    gpu_hours_per_giga: float | None = None
    """GPU-hours for 10^9 units of work, goodput included."""
    cost_per_giga: float | None = None
    stragglers_s: float | None = None
    """Part of the step by which the slowest rank takes longer than their mean: seen, or expected."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of a step by cause, as the model has them."""
    refused: str = ""
    """Reason for which a run of this size cannot work; empty where it can."""


@dataclass(frozen=True)
class Projection:
    """Measured and projected sizes of one sweep."""

    rows: tuple[Row, ...]
    model: Model
    held_out: HeldOut
    error: float
    """Half width of every interval, as a logarithm: of the held-out error, or the spread of that point if larger."""
    unit: str
    is_weak: bool
    notes: tuple[str, ...]
    label: str


def project(sweep: SweepPoints, sizes: Sequence[int], mtbf_node_h: float | None, gpu: str | None = None) -> Projection:
    """Predict the largest measured point from the others, then extrapolate all of them to ``sizes``.

    Args:
        sweep: two points or more.
        sizes: numbers of nodes.
        mtbf_node_h: mean time between failures of one node, hours; None: nothing is said of goodput.
        gpu: GPUs to project onto; None for those of the sweep.
    """
    points = sweep.measured
    held_out = hold_out(sweep)
    model = sweep.fit(points) if gpu is None else sweep.fit_onto(gpu)
    error = max(abs(math.log(held_out.predicted_s / held_out.point.step_s)), held_out.point.spread)
    failures, notes = failures_of(sweep, mtbf_node_h)
    measured = [measured_row(sweep, index, failures) for index in range(len(points))]
    known = {point.nodes for point in points} if gpu is None else set()
    projected = [projected_row(sweep, model, nodes, error, failures, gpu) for nodes in sizes if nodes not in known]
    rows = sorted([*measured, *projected], key=lambda row: (row.nodes, not row.is_measured))
    if sweep.left_out:
        notes += (f"left out: {', '.join(sweep.left_out)}, whose ranks shared cores or a GPU",)
    beyond = max(sizes) / points[-1].nodes
    if beyond > FAR:
        notes += (f"{max(sizes)} nodes are {beyond:.0f} times what was measured: the interval knows nothing of that",)
    return Projection(
        rows=tuple(rows),
        model=model,
        held_out=held_out,
        error=error,
        unit=sweep.base.unit or "units",
        is_weak=sweep.is_weak,
        notes=(*notes, *straggler_notes(sweep, sizes), *limits(sweep)),
        label=sweep.series.label,
    )


FAR = 16
"""So many times the largest measured size and beyond, a projection says so."""


def straggler_notes(sweep: SweepPoints, sizes: Sequence[int]) -> tuple[str, ...]:
    """Tell from what the stragglers follow, and from which size on they are extrapolated."""
    if not sweep.spreads:
        return ()
    nodes = max(sweep.spreads)
    spread, ranks = sweep.spreads[nodes], max(sizes) * (sweep.measured[0].ranks // sweep.measured[0].nodes)
    text = f"stragglers: {spread.text} at nodes={nodes}"
    if ranks > spread.ranks:
        beyond = f"; beyond {spread.ranks} ranks what is throughout grows as normal draws do"
        tail = f", and noise beyond {max(spread.ranks, spread.noise.reach):,} ranks by an exponential tail"
        text += ("" if spread.has_stages else beyond) + (tail if ranks > spread.noise.reach else "")
    return (text,)


def limits(sweep: SweepPoints) -> tuple[str, ...]:
    """Tell what no figure knows of."""
    others = "congestion by other jobs, and links of more tiers than in and between nodes"
    if sweep.spreads:
        return (f"not in it: {others}",)
    lacking = f" ({sweep.untold})" if sweep.untold else ""
    return (f"not in it: slow ranks{lacking}, {others}",)


def hold_out(sweep: SweepPoints) -> HeldOut:
    """Predict the largest point from the others."""
    known, largest = sweep.measured[:-1], sweep.measured[-1]
    return HeldOut(largest, sweep.fit(known).seconds(largest.nodes), tuple(point.nodes for point in known))


def failures_of(sweep: SweepPoints, mtbf_node_h: float | None) -> tuple[Failures | None, tuple[str, ...]]:
    """Return the cost of failures, as far as the largest point tells, and a note on it."""
    if mtbf_node_h is None:
        return None, ()
    save_s, restart_s = sweep.save_s(), sweep.restart_s()
    if save_s is None or restart_s is None:
        lacking = "made no save" if save_s is None else "has no event of its allocation"
        return None, (f"no goodput: {sweep.base.title} {lacking}, so that what a failure costs is not known",)
    told = f"a save holds the steps up for {save_s:.3g} s, a restart takes {restart_s:.3g} s, as at {sweep.base.title}"
    return Failures(mtbf_node_h, save_s, restart_s), (f"goodput: {told}; saves at Young's interval",)


def measured_row(sweep: SweepPoints, index: int, failures: Failures | None) -> Row:
    """The row of a measured point."""
    point, member = sweep.measured[index], sweep.members[index]
    assert member.figures is not None
    rate = member.figures.throughput
    row = Row(point.nodes, point.ranks, True, point.step_s, point.low_s, point.high_s, rate)
    return complete(replace(row, stragglers_s=sweep.stragglers_s(point)), sweep, failures)


def projected_row(
    sweep: SweepPoints, model: Model, nodes: int, error: float, failures: Failures | None, gpu: str | None
) -> Row:
    """The row of a size that was not run, or the reason for which it cannot be."""
    ranks = nodes * (sweep.measured[0].ranks // sweep.measured[0].nodes)
    try:
        planned = sweep.plan(nodes, gpu)
        seconds = model.seconds(nodes)
        parts = model.parts(nodes)
    except ConfigError as refusal:
        return Row(nodes, ranks, False, refused=refusal.found)
    memory = planned.facts.get("memory_bytes")
    row = Row(
        nodes=nodes,
        ranks=ranks,
        is_measured=False,
        step_s=seconds,
        low_s=seconds * math.exp(-error),
        high_s=seconds * math.exp(error),
        throughput=throughput(sweep, nodes, seconds),
        memory_bytes=memory.get("total") if isinstance(memory, dict) else None,
        stragglers_s=parts.get("stragglers"),
        parts=parts,
    )
    return complete(row, sweep, failures)


def throughput(sweep: SweepPoints, nodes: int, seconds: float) -> float | None:
    """Work per second at a size, from the work of a step of the smallest point."""
    first, figures = sweep.measured[0], sweep.members[0].figures
    assert figures is not None
    if figures.throughput is None:
        return None
    work = figures.throughput * first.step_s * (nodes / first.nodes if sweep.is_weak else 1)
    return work / seconds


def complete(row: Row, sweep: SweepPoints, failures: Failures | None) -> Row:
    """Add what follows from the time of a step: efficiency, goodput, GPU-hours and cost."""
    assert row.step_s is not None
    first, cluster = sweep.measured[0], sweep.config.cluster
    shrink = first.step_s / row.step_s
    goodput = None if failures is None else failures.goodput(row.nodes)
    on_gpus = sweep.cluster().gpus_per_node
    hours = None
    if on_gpus and row.throughput and goodput != 0:
        hours = row.nodes * on_gpus * 1e9 / row.throughput / 3600 / (1.0 if goodput is None else goodput)
    price = cluster.price_per_gpu_hour
    return replace(
        row,
        efficiency=shrink if sweep.is_weak else shrink * first.ranks / row.ranks,
        goodput=goodput,
        gpu_hours_per_giga=hours,
        cost_per_giga=None if hours is None or price is None else hours * price,
    )
