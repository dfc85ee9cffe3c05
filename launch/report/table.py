"""The scaling table: one row for each point, properties that the points share, and notes that explain the figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.report.notes import report_notes
from launch.report.points import GpuUse, Point, read_point
from launch.report.selection import Selection, select
from launch.report.series import (
    CONDITIONS,
    MADE_WITH,
    Series,
    batch_text,
    efficiency_intervals,
    label_selected,
    split,
)
from launch.report.steps import RankTime, RankTimes, StepFigures, lost


@dataclass(frozen=True, kw_only=True)
class Row:
    """Row of the scaling table: the results of one run.

    None means that a value is unknown or too uncertain to report.
    """

    point: str
    nodes: int | None
    ranks: int | None
    topology: str | None
    throughput: float | None = None
    """Work per second in ``unit``. In the CSV file, the column is named for the unit, such as tokens_per_s."""
    throughput_per_rank: float | None = None
    """Throughput divided by the number of ranks."""
    step_time_s: float | None = None
    """Median step time of the slowest rank in seconds, over the steps after warm-up."""
    step_time_s_spread: float | None = None
    """Interquartile range of the step time in seconds; None if step times are means over several steps."""
    speedup: float | None = None
    """Throughput divided by the throughput of the smallest point of the series.

    If the work of a step is not known, the speedup is the ratio of step times.
    """
    efficiency: float | None = None
    """Speedup divided by the ratio of the number of ranks to the number of ranks of the smallest point, 1 is ideal.

    None if ranks of either point shared cores or a GPU, or if step times are too coarse.
    """
    efficiency_low: float | None = None
    """Lower end of the 95 % interval of the efficiency, by a block bootstrap over the steps of both points."""
    efficiency_high: float | None = None
    """Upper end of the 95 % interval of the efficiency."""
    noisy: bool | None = None
    """True if step times of this or the smallest point vary too much, or are too coarse, for an exact efficiency.

    None if ``efficiency`` is None.
    """
    mfu_palm: float | None = None
    """Model FLOPs utilization by the formula of the PaLM paper, 0 to 1."""
    oversubscribed: bool | None
    state: str
    series: str
    scaling: str | None
    loss: float | None
    """Training loss of the last step, for the GPT library in nats per token."""
    last_step: int | None
    steps_measured: int = 0
    step_time_s_low: float | None = None
    """First quartile of the step time in seconds."""
    step_time_s_high: float | None = None
    """Third quartile of the step time in seconds."""
    step_time_resolution_s: float | None = None
    """Seconds over which each step time is a mean; None if steps were timed one by one."""
    throughput_low: float | None = None
    """Throughput at the third quartile of the step time."""
    throughput_high: float | None = None
    """Throughput at the first quartile of the step time."""
    throughput_ideal: float | None = None
    """Throughput that this number of ranks would have if each were as fast as at the smallest point.

    None if ranks of the smallest point shared cores or a GPU.
    """
    unit: str | None = None
    """Unit of the throughput: tokens, samples or images; None if unknown."""
    run_time_s: float | None = None
    """Seconds that the ranks ran, including their start, over all attempts."""
    attempts: int = 0
    label: str = ""
    """Name that distinguishes the point in this table: the overrides that not all points share."""
    goodput: float | None = None
    """Share of the allocated time, 0 to 1, that went into steps that were not lost; None if unknown.

    Steps of attempts on fewer nodes than requested count, too.
    """
    gpu_hours: float | None = None
    """GPU-hours of all allocations, each from its start to its end."""
    cost: float | None = None
    """Cost of all allocations in the currency of cluster.price_per_gpu_hour."""
    cost_per_billion: float | None = None
    """Cost of a billion units of work, such as tokens; None unless the work of every step of the run is known."""
    energy_kwh: float | None = None
    """Energy of all GPUs in kWh while ranks ran, over all attempts; None if some GPUs were not sampled."""
    joules_per_work: float | None = None
    """Energy of one unit of work, such as a token, in joules; None unless the work of every step is known."""
    gpu_power_w: float | None = None
    """Mean power of one GPU in watts."""
    throttled: float | None = None
    """Share (0 to 1) of the samples of all GPUs in which clocks were lowered for a reason in ``THROTTLE_REASONS``."""
    parts_s: Mapping[str, float] = field(default_factory=dict)
    """Seconds that the run spent on each activity, such as its start or its saves, by key of ``goodput.PARTS``.

    The values add up to the time from the submission to the end of the run.
    """
    hours_of: str | None = None
    """Unit of ``causes_h``: ``GPU``; ``node`` if the run has no GPUs."""
    interruptions: int | None = None
    """Number of interruptions that cost time, including roll-backs."""
    causes_h: Mapping[str, float] = field(default_factory=dict)
    """Cause of an interruption, such as ``crashed`` (key of ``goodput.CAUSES``) -> hours that were lost.

    They are GPU-hours, or node-hours if the run has no GPUs.
    """
    losses: Mapping[str, float] = field(default_factory=dict)
    """Key of ``steps.LOSSES`` -> efficiency that is lost in this phase, as a share.

    A value is negative if the phase takes less of the step than at the smallest point. The values add up to 1 -
    efficiency.
    """
    source: str = ""
    """In a comparison of folders, label of the folder of this point; empty in a report of one folder."""
    unread_lines: int = 0
    """Number of unreadable lines in the step records of all ranks."""


# Details of one run: the distribution of its step times, and its slowest ranks with their hosts.


SLOWEST = 8
"""Largest number of ranks in the table of the slowest ranks."""


@dataclass(frozen=True)
class RankRow:
    """One of the slowest ranks of a run."""

    time: RankTime
    host: str | None
    share: float
    """Excess of the rank's own time (step time without waits for other ranks) over the median of the other ranks.

    It is a share of the median step time.
    """


@dataclass(frozen=True)
class RunDetail:
    """Step times and ranks of one measured run, for the page."""

    label: str
    step_time_s: float
    step_times_s: tuple[float, ...]
    """Step times in seconds after warm-up, in the order of the steps."""
    slowest: tuple[RankRow, ...]
    rank_times: RankTimes | None
    """Times of each rank relative to the other ranks; None if ranks cannot be compared."""


@dataclass(frozen=True)
class ScalingTable:
    """A report: rows by series and size, properties that rows share, and notes."""

    selection: Selection
    rows: tuple[Row, ...]
    batches: dict[str, str]
    """Kind of scaling (``strong``, ``weak``) -> batch of the points of this kind, as text for people."""
    conditions: str
    """Model, precision, hardware and software of the points, as text for people."""
    notes: tuple[str, ...]
    is_gpt: bool = True
    """True if every point is a run of the GPT library. Points whose workload is not known do not count."""
    details: tuple[RunDetail, ...] = ()
    """Step times and ranks of the measured points, in the order of the rows."""
    gpus: tuple[GpuUse | None, ...] = ()
    """Use of the GPUs of each point, in the order of the rows; None if the GPUs were not sampled."""

    @property
    def name(self) -> str:
        """Name of the reported runs: the sources of a comparison, the label of one run, or the name of the folder."""
        if self.selection.parts:
            return " and ".join(dict.fromkeys(row.source for row in self.rows))
        return self.rows[0].label if len(self.rows) == 1 else self.selection.folder.resolve().name

    @property
    def title(self) -> str:
        """Title of the report: Comparison, Summary or Scaling, then the name of the runs."""
        kind = "Comparison" if self.selection.parts else "Summary" if len(self.rows) == 1 else "Scaling"
        return f"{kind} of {self.name}"

    @property
    def unit(self) -> str:
        """Unit of the throughput: tokens, samples or images; ``work`` if points differ or no unit is known."""
        units = {row.unit for row in self.rows if row.throughput is not None}
        return (units.pop() if len(units) == 1 else None) or ("tokens" if self.is_gpt else "work")

    def sections(self) -> list[tuple[str, list[Row]]]:
        """Return (heading, rows) for each kind of scaling, in the order of the rows."""
        sizes = Counter((row.scaling, row.series) for row in self.rows)
        found = []
        for kind in dict.fromkeys(row.scaling for row in self.rows):
            what = f"{kind} scaling".capitalize() if kind and max(sizes.values()) > 1 else "Points"
            what, batch = "Summary" if len(self.rows) == 1 else what, self.batches.get(kind or "")
            heading = f"{what} of {self.name}" + (f" with {batch}" if batch else "")
            found.append((heading, [row for row in self.rows if row.scaling == kind]))
        return found


def build(folder: Path) -> ScalingTable:
    """Return the report of the runs that ``select`` chooses for ``folder``.

    Raises:
        ConfigError: there is no point, or points that belong together are not comparable.
    """
    return tabulate_selection(select(folder))


def tabulate_selection(selection: Selection) -> ScalingTable:
    """Return the report of the selected runs.

    Raises:
        ConfigError: points that belong together are not comparable.
    """
    return tabulate(selection, [read_point(path) for path in selection.runs])


def tabulate(selection: Selection, points: Sequence[Point]) -> ScalingTable:
    """Return the report of ``points``, which were read from the runs of ``selection``, in the same order.

    Raises:
        ConfigError: points that belong together are not comparable.
    """
    points = label_selected(selection, points)
    every = split(points)
    rows = []
    for series in every:
        intervals = efficiency_intervals(series)
        rows += [_row(series, point, intervals.get(point.name, (None, None))) for point in series.members]
    shown = [point for series in every for point in series.members]
    batches: dict[str, list[str]] = {}
    for series in every:
        known = [point.environment for point in series.members if point.environment is not None]
        batches.setdefault(series.scaling or "", []).extend(filter(None, map(batch_text, known)))
    return ScalingTable(
        selection=selection,
        rows=tuple(rows),
        batches={kind: " or ".join(dict.fromkeys(texts)) for kind, texts in batches.items() if kind},
        conditions=_conditions(shown),
        notes=tuple(report_notes(points, every, rows)),
        details=tuple(_detail(point, point.figures) for point in shown if point.figures is not None),
        gpus=tuple(point.gpu_use for point in shown),
        is_gpt=all(point.is_gpt for point in points if point.environment is not None),
    )


def _row(series: Series, point: Point, interval: tuple[float | None, float | None]) -> Row:
    """Return the row of a point. ``interval`` is the 95 % interval of its efficiency."""
    return Row(
        point=point.name,
        label=point.title,
        topology=None if point.environment is None else point.environment.topology,
        oversubscribed=point.crowded,
        state=str(point.state),
        series=series.label,
        scaling=series.scaling,
        unread_lines=sum(point.unread.values()),
        **{name: getattr(point, name) for name in AS_RECORDED},
        **_time_and_energy(point),
        **_figures(point),
        **_against_smallest(series, point, interval),
    )


def _detail(point: Point, figures: StepFigures) -> RunDetail:
    """Return the step times and the slowest ranks of a point. ``figures`` are the figures of the point's steps."""
    step_s, of_ranks = figures.step_time_s, point.rank_times
    slowest = sorted(of_ranks.ranks if of_ranks else (), key=lambda rank: -rank.excess_s)[:SLOWEST]
    rows = (RankRow(rank, point.host(rank.rank), rank.excess_s / step_s if step_s else 0.0) for rank in slowest)
    times = point.steps.after_warmup().time_s.tolist()
    return RunDetail(point.title, step_s, tuple(times), tuple(rows), of_ranks)


AS_RECORDED = ("nodes", "ranks", "loss", "last_step", "unit", "run_time_s", "attempts", "source")
"""Names of the fields that a row takes unchanged from its point."""


def _time_and_energy(point: Point) -> dict[str, Any]:
    """Return the fields of a row about allocations, interruptions and GPUs."""
    fields: dict[str, Any] = {}
    use, time = point.gpu_use, point.goodput
    # The work must be that of the whole run: with half of the steps, a unit of work would seem twice as expensive.
    works = [work for work in point.steps.work.tolist() if work == work]
    work = sum(works) if works and len(works) == point.last_step else None
    if use is not None:
        fields = {
            "energy_kwh": None if use.energy_j is None else use.energy_j / 3.6e6,
            "joules_per_work": None if use.energy_j is None or not work else use.energy_j / work,
            "gpu_power_w": use.mean_power_w,
            "throttled": use.throttled,
        }
    if time is not None:
        fields |= {
            "goodput": time.goodput,
            "gpu_hours": time.gpu_hours,
            "cost": time.cost,
            "cost_per_billion": None if time.cost is None or not work else time.cost / (work / 1e9),
            "parts_s": time.seconds,
            "hours_of": time.hours_of,
            "interruptions": sum(time.interruptions.values()),
            "causes_h": time.lost_h,
        }
    return fields


def _figures(point: Point) -> dict[str, Any]:
    """Return the fields of a row that need measured steps; empty if the point has too few steps."""
    if (figures := point.figures) is None:
        return {}
    rate = figures.throughput
    fields: dict[str, Any] = {
        "step_time_s": figures.step_time_s,
        "mfu_palm": figures.mfu_palm,
        "steps_measured": figures.steps,
        "step_time_resolution_s": figures.resolution_s or None,
    }
    if rate is not None:
        assert point.ranks
        fields |= {"throughput": rate, "throughput_per_rank": rate / point.ranks}
    if not figures.resolution_s:  # Quartiles of means over several steps do not describe single steps.
        low_s, high_s = figures.low_s, figures.high_s
        fields |= {"step_time_s_low": low_s, "step_time_s_high": high_s, "step_time_s_spread": high_s - low_s}
        if rate is not None:
            work = rate * figures.step_time_s  # Work of one step.
            fields |= {"throughput_low": work / high_s, "throughput_high": work / low_s}
    return fields


def _against_smallest(series: Series, point: Point, interval: tuple[float | None, float | None]) -> dict[str, Any]:
    """Return speedup and efficiency relative to the smallest point, with the 95 % interval of the efficiency.

    A single point has neither. Without the work of a step, there is a speedup but no efficiency.
    """
    base, figures = series.smallest, point.figures
    if base is None or base.figures is None or figures is None or not series.compares:
        return {}
    if not series.has_rates:
        return {"speedup": base.figures.step_time_s / figures.step_time_s}
    assert figures.throughput is not None and base.figures.throughput is not None and base.ranks and point.ranks
    ideal = base.figures.throughput * (point.ranks / base.ranks)
    fields: dict[str, Any] = {
        "throughput_ideal": None if base.crowded else ideal,
        "speedup": figures.throughput / base.figures.throughput,
    }
    if not base.has_efficiency or not point.has_efficiency:
        return fields
    efficiency, (low, high) = figures.throughput / ideal, interval
    fields |= {"efficiency": efficiency, "efficiency_low": low, "efficiency_high": high, "noisy": False}
    if point is base:
        return fields
    here, there = (one.steps.after_warmup().shares() for one in (point, base))
    losses = lost(here, there, efficiency, alone=base.ranks == 1)
    return fields | {"noisy": figures.is_noisy or base.figures.is_noisy, "losses": losses}


def _conditions(points: Sequence[Point]) -> str:
    """Return model, precision, hardware, software, commit and command of the points as one text.

    If points differ in one of these, the text has all its values, separated by slashes.
    """
    known = [point.environment for point in points if point.environment is not None]
    if not known:
        return "Conditions unavailable: no point has recorded what it ran on."
    parts = [[CONDITIONS[name](one) for one in known] for name in ("model", "precision", "hardware")]
    parts += [[MADE_WITH["software"](point) for point in points]]
    commits = [one.commit or ("unavailable" if one.workload == "gpt" else "") for one in known]
    parts += [[commit and f"commit {commit[:12]}" for commit in commits]]
    parts += [[one.command and f"command {one.command}" for one in known]]
    texts = [" / ".join(dict.fromkeys(filter(None, values))) for values in parts]
    return "; ".join(text for text in texts if text) + "."
