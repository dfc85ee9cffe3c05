"""The scaling table: one row a point, and in plain words what the figures do and do not say.

Owns the rows, the claim of efficiency and where none is made. Must not know how a table is shown or drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.report import series as series_of
from launch.report.points import Point, State, find_points, neighbours, read_point
from launch.report.series import MIN_STEPS, WARMUP_STEPS, Measured, Series, after_warmup, measure


@dataclass(frozen=True, kw_only=True)
class Row:
    """One point. The fields are the columns of ``scaling.csv``, in this order; None is what is not known or claimed."""

    point: str
    nodes: int | None
    ranks: int | None
    topology: str | None
    tokens_per_s: float | None = None
    tokens_per_s_per_rank: float | None = None
    step_time_s: float | None = None
    """Median over the steps after warm-up, of the slowest rank."""
    step_time_s_spread: float | None = None
    """Interquartile range."""
    speedup: float | None = None
    """tokens_per_s over that of the smallest point of the series: a measured ratio."""
    efficiency: float | None = None
    """speedup over the ratio of ranks; None where ranks of either point shared cores or a GPU."""
    mfu_palm: float | None = None
    oversubscribed: bool | None
    state: str
    series: str
    scaling: str | None
    loss: float | None
    """Training loss of the last step, nats per token."""
    last_step: int | None
    steps_measured: int = 0
    step_time_s_low: float | None = None
    """First quartile."""
    step_time_s_high: float | None = None
    """Third quartile."""
    tokens_per_s_low: float | None = None
    """At the third quartile of the step time."""
    tokens_per_s_high: float | None = None
    """At the first quartile of the step time."""
    tokens_per_s_ideal: float | None = None
    """Of as many ranks as fast as those of the smallest point; None where these shared cores or a GPU."""
    label: str = ""
    """What sets the point apart from the others of this table: the overrides that not all of them share."""


@dataclass(frozen=True)
class ScalingTable:
    """A report of ``folder``: rows by series and size, what they have in common, and notes in plain language."""

    folder: Path
    rows: tuple[Row, ...]
    batches: dict[str, str]
    """Kind of scaling -> what its points have in common, in words."""
    conditions: str
    notes: tuple[str, ...]

    @property
    def name(self) -> str:
        """What the report is about."""
        return self.folder.resolve().name

    def sections(self) -> list[tuple[str, list[Row]]]:
        """Heading and rows for each kind of scaling."""
        kinds = list(dict.fromkeys(row.scaling for row in self.rows))
        return [(self._heading(kind), [row for row in self.rows if row.scaling == kind]) for kind in kinds]

    def _heading(self, kind: str | None) -> str:
        if kind is None:
            return f"Scaling of {self.name}, kind not known"
        return f"{kind.capitalize()} scaling of {self.name} with {self.batches[kind]}"


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
    points = series_of.with_labels(points)
    beside = neighbours(points)
    members = [Measured(point, measure(point.steps), tuple(near)) for point, near in zip(points, beside, strict=True)]
    found = series_of.split(members)
    return ScalingTable(
        folder=folder,
        rows=tuple(_row(series, member) for series in found for member in series.members),
        batches=_batches(found),
        conditions=_conditions(found),
        notes=tuple(notes(found)),
    )


def _row(series: Series, member: Measured) -> Row:
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
        label=point.title,
        **_figures(series, member),
    )


def _figures(series: Series, member: Measured) -> dict[str, Any]:
    """The columns that need a measurement; none without."""
    figures, base = member.figures, series.smallest
    if figures is None:
        return {}
    assert base is not None and base.figures is not None and member.ranks and base.ranks
    tokens = figures.tokens_per_s * figures.step_time_s  # of one step
    ideal = base.figures.tokens_per_s * (member.ranks / base.ranks)
    return {
        "tokens_per_s": figures.tokens_per_s,
        "tokens_per_s_per_rank": figures.tokens_per_s / member.ranks,
        "tokens_per_s_low": tokens / figures.high_s,
        "tokens_per_s_high": tokens / figures.low_s,
        "tokens_per_s_ideal": None if base.crowded else ideal,
        "step_time_s": figures.step_time_s,
        "step_time_s_low": figures.low_s,
        "step_time_s_high": figures.high_s,
        "step_time_s_spread": figures.high_s - figures.low_s,
        "speedup": figures.tokens_per_s / base.figures.tokens_per_s,
        "efficiency": None if base.crowded or member.crowded else figures.tokens_per_s / ideal,
        "mfu_palm": figures.mfu_palm,
        "steps_measured": figures.steps,
    }


def _batches(found: Sequence[Series]) -> dict[str, str]:
    """Kind of scaling -> the batches of its series, in words."""
    words: dict[str, dict[str, None]] = {}
    for series in found:
        for member in series.members:
            if member.point.environment is not None and series.scaling is not None:
                batch = str(series_of.CONDITIONS["batch"](member.point.environment))
                words.setdefault(series.scaling, {})[batch] = None
    return {kind: " or ".join(batches) for kind, batches in words.items()}


def _conditions(found: Sequence[Series]) -> str:
    """Model, precision, hardware and software of the points; several values are all named."""
    known = [m.point.environment for series in found for m in series.members if m.point.environment is not None]
    if not known:
        return "Conditions unavailable: no point has recorded what it ran on."
    parts = [[str(series_of.CONDITIONS[name](e)) for e in known] for name in ("model", "precision", "hardware")]
    parts += [[f"torch {e.torch}" for e in known], [f"commit {e.commit[:12]}" for e in known]]
    return "; ".join(" / ".join(dict.fromkeys(values)) for values in parts) + "."


STATE_WORDS = {
    State.FAILED: "failed",
    State.STOPPED: "was stopped before its last step",
    State.RUNNING: "has not ended: it runs still, or was killed",
    State.NO_RECORDS: "has no records",
}


def notes(found: Sequence[Series]) -> list[str]:
    """The sentences that belong below the table of these series."""
    members = [member for series in found for member in series.members]
    candidates = [_steps_used(members), *map(_smallest, found), _crowding(members), *map(_crowded_base, found)]
    candidates += [_too_few_steps(members), *map(_state, members), _mfu(members)]
    return [note for note in candidates if note]


def _steps_used(members: Sequence[Measured]) -> str:
    used = {m.point.title: m.figures.steps for m in members if m.figures is not None}
    if not used:
        return ""
    few, many = min(used.values()), max(used.values())
    counts = f"{few} steps of each point" if few == many else ", ".join(f"{n} of {name}" for name, n in used.items())
    return (
        "Step time is the median over the steps after warm-up, each as long as its slowest rank took; the spread is "
        f"the interquartile range. The first {WARMUP_STEPS} steps of each attempt are left out, because they pay for "
        f"memory pools, caches and connections. Used are {counts}."
    )


def _smallest(series: Series) -> str:
    """Says what the others are measured against, and when that is not the smallest point of the sweep."""
    base = series.smallest
    if base is None or len(series.members) == 1:
        return ""
    of = f" of {series.label}" if series.label else ""
    passed_over = [m.point.title for m in series.members[: series.members.index(base)]]
    instead = f", because {' and '.join(passed_over)} gave no figures" if passed_over else ""
    ranks = "1 rank" if base.ranks == 1 else f"{base.ranks} ranks"
    return f"Speedup and efficiency{of} are against {base.point.title} ({ranks}){instead}."


def _crowding(members: Sequence[Measured]) -> str:
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


def _too_few_steps(members: Sequence[Measured]) -> str:
    few = [
        f"{m.point.title} ({len(after_warmup(m.point.steps))} of {len(m.point.steps)})"
        for m in members
        if m.figures is None and m.point.last_step is not None
    ]
    if not few:
        return ""
    return f"Too few steps for a figure, at least {MIN_STEPS} are needed after warm-up: {', '.join(few)}."


def _state(member: Measured) -> str:
    words = STATE_WORDS.get(member.point.state)
    if words is None:
        return ""
    at = f" (last step recorded: {member.point.last_step})" if member.point.last_step is not None else ""
    return f"{member.point.title} {words}{at}; see {member.point.path}."


def _mfu(members: Sequence[Measured]) -> str:
    """MFU needs the peak rate of the device: without it there is none, rather than somebody else's."""
    missing = [m.point.environment for m in members if m.figures is not None and m.figures.mfu_palm is None]
    names = dict.fromkeys(e.device_names for e in missing if e is not None)
    return f"MFU unavailable: the runs recorded none on {', '.join(names)}." if names else ""
