"""From measured points to projected ones: the held-out test, and a row for each size.

Owns what is claimed of a size that was not run. Must not know how it is shown.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from launch.errors import ConfigError
from launch.project.failures import Failures
from launch.project.models import Measured, Model
from launch.project.sweep_points import SweepPoints


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
