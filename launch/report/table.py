"""The scaling table: one row a point, and plainly what the figures do and do not say.

Owns the rows, the claim of efficiency and where none is made. Must not know how a table is shown or drawn.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.report import series as series_of
from launch.report.points import Point, State, find_points, neighbours, read_point
from launch.report.series import (
    MIN_STEPS,
    WARMUP_STEPS,
    MeasuredPoint,
    Measurement,
    Series,
    drop_warmup,
    measure,
    work_text,
)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One point. The fields are the columns of ``scaling.csv``, in this order; None is what is not known or claimed."""

    point: str
    nodes: int | None
    ranks: int | None
    topology: str | None
    throughput: float | None = None
    """Work per second in ``unit``; its columns in ``scaling.csv`` are named for it: tokens_per_s, samples_per_s."""
    throughput_per_rank: float | None = None
    step_time_s: float | None = None
    """Median over the steps after warm-up, of the slowest rank."""
    step_time_s_spread: float | None = None
    """Interquartile range."""
    speedup: float | None = None
    """Throughput over that of the smallest point of the series: a measured ratio. Where the work of a step is not
    known, the ratio of step times; where there are no steps, and the same work was stated, that of run times."""
    efficiency: float | None = None
    """speedup over the ratio of ranks; None where ranks of either point shared cores or a GPU."""
    mfu_palm: float | None = None
    oversubscribed: bool | None
    state: str
    series: str
    scaling: str | None
    loss: float | None
    """Training loss of the last step, nats per token in the GPT library."""
    last_step: int | None
    steps_measured: int = 0
    step_time_s_low: float | None = None
    """First quartile."""
    step_time_s_high: float | None = None
    """Third quartile."""
    throughput_low: float | None = None
    """At the third quartile of the step time."""
    throughput_high: float | None = None
    """At the first quartile of the step time."""
    throughput_ideal: float | None = None
    """Of as many ranks as fast as those of the smallest point; None where these shared cores or a GPU."""
    unit: str | None = None
    """Unit of the throughput: tokens, samples, images; None where nothing says."""
    run_time_s: float | None = None
    """Time that the ranks ran, start-up included, over all attempts."""
    attempts: int = 0
    label: str = ""
    """Label that sets the point apart from the others of this table: the overrides that not all of them share."""


@dataclass(frozen=True)
class ScalingTable:
    """A report of ``folder``: rows by series and size, what they have in common, and notes in plain language."""

    folder: Path
    rows: tuple[Row, ...]
    batches: dict[str, str]
    """Kind of scaling -> what its points have in common, for people."""
    conditions: str
    notes: tuple[str, ...]
    is_gpt: bool = True
    """True where the GPT library made every point whose workload is known."""

    @property
    def name(self) -> str:
        """Title of the report."""
        return self.folder.resolve().name

    @property
    def is_scaling(self) -> bool:
        """Tell whether some series has several sizes; a single point, or one of each kind, scales nothing."""
        return max(Counter((row.scaling, row.series) for row in self.rows).values(), default=0) > 1

    @property
    def compares_run_times(self) -> bool:
        """Tell whether run times are all there is to show: no program recorded how long its steps take."""
        has_steps = any(row.step_time_s is not None for row in self.rows)
        return not self.is_gpt and not has_steps and any(row.run_time_s is not None for row in self.rows)

    @property
    def unit(self) -> str:
        """Unit of the throughput: tokens, samples, images; work where points differ, or nothing says."""
        units = {row.unit for row in self.rows if row.throughput is not None}
        return (units.pop() if len(units) == 1 else None) or ("tokens" if self.is_gpt else "work")

    def sections(self) -> list[tuple[str, list[Row]]]:
        """Heading and rows for each kind of scaling."""
        kinds = list(dict.fromkeys(row.scaling for row in self.rows))
        return [(self._heading(kind), [row for row in self.rows if row.scaling == kind]) for kind in kinds]

    def _heading(self, kind: str | None) -> str:
        batch = self.batches.get(kind or "")
        with_batch = f" with {batch}" if batch else ""
        if len(self.rows) == 1:
            return f"Summary of {self.name}{with_batch}"
        if self.is_scaling and not (self.compares_run_times and all(row.speedup is None for row in self.rows)):
            kind_text = f"{kind.capitalize()} scaling" if kind else "Scaling"
            return f"{kind_text} of {self.name}{with_batch or ('' if kind else ', kind not known')}"
        return f"{'Run times' if self.compares_run_times else 'Points'} of {self.name}{with_batch}"


def build(folder: Path, points: Sequence[Path] | None = None) -> ScalingTable:
    """Compute the scaling table of ``folder`` from its run folders, or from ``points`` where given.

    Raises:
        ConfigError: there is no point, or points that belong together are not comparable.
    """
    paths = find_points(folder) if points is None else points
    return tabulate(folder, [read_point(path) for path in paths])


def tabulate(folder: Path, points: Sequence[Point]) -> ScalingTable:
    """The scaling table of points that were read.

    Raises:
        ConfigError: points that belong together are not comparable.
    """
    points = series_of.label_points(points)
    beside = neighbours(points)
    members = [
        MeasuredPoint(point, measure(point.steps), tuple(near)) for point, near in zip(points, beside, strict=True)
    ]
    found = series_of.split(members)
    return ScalingTable(
        folder=folder,
        rows=tuple(_row(series, member) for series in found for member in series.members),
        batches=_batches(found),
        conditions=_conditions(found),
        notes=tuple(notes(found)),
        is_gpt=all(point.is_gpt for point in points if point.environment is not None),
    )


def _row(series: Series, member: MeasuredPoint) -> Row:
    point, environment = member.point, member.point.environment
    return Row(
        point=point.name,
        nodes=member.nodes,
        ranks=member.ranks,
        topology=None if environment is None else environment.topology,
        oversubscribed=member.crowded,
        state=str(point.state),
        series=series.label,
        scaling=series.scaling,
        loss=point.loss,
        last_step=point.last_step,
        unit=point.unit,
        run_time_s=point.run_time_s,
        attempts=point.attempts,
        label=point.title,
        **(_run_time_figures(series, member) if member.figures is None else _figures(series, member, member.figures)),
    )


def _figures(series: Series, member: MeasuredPoint, figures: Measurement) -> dict[str, Any]:
    """The columns that need measured steps."""
    columns: dict[str, Any] = {
        "step_time_s": figures.step_time_s,
        "step_time_s_low": figures.low_s,
        "step_time_s_high": figures.high_s,
        "step_time_s_spread": figures.high_s - figures.low_s,
        "mfu_palm": figures.mfu_palm,
        "steps_measured": figures.steps,
    }
    if figures.throughput is not None:
        assert member.ranks
        work = figures.throughput * figures.step_time_s  # of one step
        columns |= {
            "throughput": figures.throughput,
            "throughput_per_rank": figures.throughput / member.ranks,
            "throughput_low": work / figures.high_s,
            "throughput_high": work / figures.low_s,
        }
    return columns | _against_smallest(series, member, figures)


def _against_smallest(series: Series, member: MeasuredPoint, figures: Measurement) -> dict[str, Any]:
    """Speedup, and what is claimed of it: nothing for a point alone, no efficiency without the work of a step."""
    base = series.smallest
    assert base is not None and base.figures is not None and base.ranks and member.ranks
    if not series.compares:
        return {}
    if not series.has_rates:
        return {"speedup": base.figures.step_time_s / figures.step_time_s}
    assert figures.throughput is not None and base.figures.throughput is not None
    ideal = base.figures.throughput * (member.ranks / base.ranks)
    return {
        "throughput_ideal": None if base.crowded else ideal,
        "speedup": figures.throughput / base.figures.throughput,
        "efficiency": None if base.crowded or member.crowded else figures.throughput / ideal,
    }


def _run_time_figures(series: Series, member: MeasuredPoint) -> dict[str, Any]:
    """Speedup of a program that records no steps, where it was stated how much work each point did."""
    base = series.smallest
    if base is None or base.figures is not None or not series.compares:
        return {}
    if base.run_rate is None or member.run_rate is None:
        return {}
    assert base.ranks and member.ranks
    speedup = member.run_rate / base.run_rate
    claimed = not base.crowded and not member.crowded
    return {"speedup": speedup, "efficiency": speedup * base.ranks / member.ranks if claimed else None}


def _batches(found: Sequence[Series]) -> dict[str, str]:
    """Kind of scaling -> the batches of its series, for people."""
    texts: dict[str, dict[str, None]] = {}
    for series in found:
        for member in series.members:
            if member.point.environment is not None and series.scaling is not None:
                batch = series_of.CONDITIONS["batch"](member.point.environment)
                texts.setdefault(series.scaling, {}).update({batch: None} if batch else {})
    return {kind: " or ".join(batches) for kind, batches in texts.items()}


def _conditions(found: Sequence[Series]) -> str:
    """Model, precision, hardware and software of the points; several values are all named."""
    known = [m.point.environment for series in found for m in series.members if m.point.environment is not None]
    if not known:
        return "Conditions unavailable: no point has recorded what it ran on."
    parts = [[series_of.CONDITIONS[name](e) for e in known] for name in ("model", "precision", "hardware")]
    parts += [[None if e.torch is None else f"torch {e.torch}" for e in known]]
    commits = [e.commit or (UNAVAILABLE if e.workload == "gpt" else None) for e in known]
    parts += [[None if commit is None else f"commit {commit[:12]}" for commit in commits]]
    parts += [[None if e.command is None else f"command {e.command}" for e in known]]
    told = [" / ".join(dict.fromkeys(value for value in values if value is not None)) for values in parts]
    return "; ".join(text for text in told if text) + "."


UNAVAILABLE = "unavailable"
STATE_TEXTS = {
    State.FAILED: "failed",
    State.STOPPED: "was stopped before its last step",
    State.RUNNING: "has not ended: it runs still, or was killed",
    State.NO_RECORDS: "has no records",
}


def notes(found: Sequence[Series]) -> list[str]:
    """Make the sentences that belong below the table of these series."""
    members = [member for series in found for member in series.members]
    candidates = [_steps_used(members), *map(_smallest, found), *map(_no_rates, found), *map(_changing_work, found)]
    candidates += [_partly_recorded(members), _run_times(members), _crowding(members), *map(_crowded_base, found)]
    candidates += [_too_few_steps(members), *map(_state, members), _mfu(members)]
    return [note for note in candidates if note]


def _steps_used(members: Sequence[MeasuredPoint]) -> str:
    used = {m.point.title: m.figures.steps for m in members if m.figures is not None}
    if not used:
        return ""
    few, many = min(used.values()), max(used.values())
    counts = f"{few} steps of each point" if few == many else ", ".join(f"{n} of {name}" for name, n in used.items())
    counts = f"{few} steps" if len(members) == 1 else counts
    return (
        "Step time is the median over the steps after warm-up, each as long as its slowest rank took; the spread is "
        f"the interquartile range. The first {WARMUP_STEPS} steps of each attempt are left out, because they pay for "
        f"memory pools, caches and connections. Used are {counts}."
    )


def _no_rates(series: Series) -> str:
    """Says that steps are compared whose work is not known."""
    measured = [member for member in series.members if member.figures is not None]
    if len(measured) < 2 or series.has_rates:
        return ""
    of = f" of {series.label}" if series.label else ""
    ideal = "1.00 would be ideal in weak scaling" if series.scaling == "weak" else "more ranks do the same work sooner"
    return (
        f"Speedup{of} is the ratio of step times ({ideal}), and no efficiency is claimed: how much work a step does is "
        "not known at every point. script.work_per_step=N with script.unit=samples says it, and so do records of "
        "tokens or samples."
    )


SAME_WORK = 1.05
"""Steps whose work differs by less than this factor do the same: the last batch of an epoch may be smaller."""


def _changing_work(series: Series) -> str:
    """Says where steps did not do the work that the kind of scaling promises, which scripts state by hand."""
    works = [
        (member, member.figures.throughput * member.figures.step_time_s)
        for member in series.members
        if member.figures is not None and member.figures.throughput is not None and not member.point.is_gpt
    ]
    if len(works) < 2 or series.scaling is None or not series.has_rates:
        return ""
    promised = [work / (m.ranks or 1) if series.scaling == "weak" else work for m, work in works]
    if max(promised) <= SAME_WORK * min(promised):
        return ""
    each = " per rank" if series.scaling == "weak" else ""
    told = ", ".join(
        f"{work_text(work, member.point.unit)}{each} at {member.point.title}"
        for (member, _), work in zip(works, promised, strict=True)
    )
    other = "false" if series.scaling == "weak" else "true"
    return (
        f"The points were started as {series.scaling} scaling, but a step did {told}. Throughput is compared all the "
        f"same; script.weak_scaling={other} says what was meant."
    )


def _partly_recorded(members: Sequence[MeasuredPoint]) -> str:
    """Says where throughput counts the work of some ranks only, since only these recorded it."""
    partly = []
    for member in members:
        environment, steps = member.point.environment, drop_warmup(member.point.steps)
        if environment is None or environment.work_per_step is not None or not steps or steps[-1].work is None:
            continue
        if steps[-1].recorded_by < environment.world_size:
            partly.append(f"{member.point.title} ({steps[-1].recorded_by} of {environment.world_size})")
    if not partly:
        return ""
    return (
        "Not all ranks recorded steps, and throughput counts what those said that did: "
        f"{', '.join(partly)}. script.work_per_step=N says what all ranks do together."
    )


def _run_times(members: Sequence[MeasuredPoint]) -> str:
    """Says what a run time is, for programs that record no steps."""
    if any(member.point.steps for member in members) or not any(member.point.run_time_s for member in members):
        return ""
    claim = (
        "Speedup compares the work that was stated (script.work_per_step times the number of steps) per second of it."
        if any(member.run_rate is not None for member in members)
        else "No speedup or efficiency is claimed, since nothing says that the points did the same work: "
        "script.progress, or records by launch.worker, tell steps and their times."
    )
    return (
        "No step times were recorded. Run time is from the start of the ranks to their end, added up over attempts: "
        f"it includes start-up, evaluation and saving, and work that was done again. {claim}"
    )


def _smallest(series: Series) -> str:
    """Says what the others are measured against, and when that is not the smallest point of the sweep."""
    base = series.smallest
    if base is None or not series.compares:
        return ""
    of = f" of {series.label}" if series.label else ""
    passed_over = [m.point.title for m in series.members[: series.members.index(base)]]
    instead = f", because {' and '.join(passed_over)} gave no figures" if passed_over else ""
    ranks = "1 rank" if base.ranks == 1 else f"{base.ranks} ranks"
    are = "Speedup and efficiency{} are" if series.has_rates else "Speedup{} is"
    return f"{are.format(of)} against {base.point.title} ({ranks}){instead}."


def _crowding(members: Sequence[MeasuredPoint]) -> str:
    crowded = []
    for member in members:
        if member.crowded:
            crowded.append(f"{member.point.title} ({'; '.join(member.crowding())})")
    if not crowded:
        return ""
    return f"Ranks shared cores or a GPU, so no efficiency is claimed there: {', '.join(crowded)}."


def _crowded_base(series: Series) -> str:
    base = series.smallest
    if base is None or not base.crowded or len(series.members) == 1:
        return ""
    of = f" of {series.label}" if series.label else ""
    return (
        f"The point to compare with{of}, {base.point.title}, is one of these: no efficiency is claimed for any point."
    )


def _too_few_steps(members: Sequence[MeasuredPoint]) -> str:
    few = [
        f"{m.point.title} ({len(drop_warmup(m.point.steps))} of {len(m.point.steps)})"
        for m in members
        if m.figures is None and m.point.last_step is not None and (m.point.is_gpt or m.point.steps)
    ]
    if not few:
        return ""
    return f"Too few steps for a figure, at least {MIN_STEPS} are needed after warm-up: {', '.join(few)}."


def _state(member: MeasuredPoint) -> str:
    text = STATE_TEXTS.get(member.point.state)
    if text is None:
        return ""
    at = f" (last step recorded: {member.point.last_step})" if member.point.last_step is not None else ""
    return f"{member.point.title} {text}{at}; see {member.point.path}."


def _mfu(members: Sequence[MeasuredPoint]) -> str:
    """MFU needs the peak rate of the device: without it there is none, rather than somebody else's."""
    gpt = [m for m in members if m.point.is_gpt]  # of other programs nobody expects it
    missing = [m.point.environment for m in gpt if m.figures is not None and m.figures.mfu_palm is None]
    names = dict.fromkeys(e.device_names for e in missing if e is not None)
    return f"MFU unavailable: the runs recorded none on {', '.join(names)}." if names else ""
