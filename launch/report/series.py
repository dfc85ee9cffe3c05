"""Series: points of a sweep that differ in size only, the figures of each, and what may be compared."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice

from launch.errors import ConfigError, counted
from launch.report.environment import Environment
from launch.report.points import Point, State
from launch.report.selection import Selection, source_labels
from launch.report.steps import Step, drop_warmup
from launch.runs.find import labels_inside, point_labels, tells_apart
from launch.runs.overrides import typed_key, typed_value

SIZE_KEYS = frozenset({"nodes", "ranks_per_node"})
"""Overrides along which a series runs."""
NOISY = 0.1
"""Above this interquartile range, in medians, an efficiency is marked. It does not shrink with the number of steps, as
a standard error would: what disturbs a machine lasts for many steps, which are no independent samples."""
MIN_STEPS = 5
"""Fewer steps, or fewer intervals in which a log was read, have no quartiles and no efficiency."""


def _model(environment: Environment) -> str | None:
    if environment.model is None:
        return None
    parameters = "" if environment.parameters is None else f" with {environment.parameters:,} parameters"
    joined = " and" if parameters else " with"
    length = "" if environment.block_size is None else f"{joined} sequences of {environment.block_size} tokens"
    return f"{environment.model}{parameters}{length}"


def _batch(environment: Environment) -> str | None:
    """Return the batch in sequences, or the work of a step in the unit of the program, if stated."""
    work = environment.work_per_step
    if environment.weak_scaling:
        if environment.per_rank_batch is not None:
            return f"{environment.per_rank_batch} sequences per rank"
        if work is not None:
            return f"{work_text(work / environment.world_size, environment.unit)} per step and rank"
        return None
    if environment.global_batch is not None:
        return f"a global batch of {environment.global_batch} sequences"
    return None if work is None else f"{work_text(work, environment.unit)} per step"


def work_text(work: float, unit: str | None) -> str:
    """Write an amount of work for people: 1,024 samples."""
    number = f"{work:,.0f}" if work == round(work) or work >= 1000 else f"{work:.3g}"
    return f"{number} {unit or 'units of work'}"


CONDITIONS: Mapping[str, Callable[[Environment], str | None]] = {
    "hardware": lambda e: e.device_names,
    "precision": lambda e: e.precision,
    "model": _model,
    "kind of scaling": lambda e: (
        None if e.weak_scaling is None else f"{'weak' if e.weak_scaling else 'strong'} scaling"
    ),
    "batch": _batch,
    "unit": lambda e: e.unit,
}
"""Properties that all measured points of a series share; None, and not compared, if a point does not say."""
MADE_WITH: Mapping[str, Callable[[Environment], str | None]] = {
    "software": lambda e: None if e.torch is None else f"torch {e.torch}",
    "code": lambda e: e.code and f"commit {e.code}",
}
"""Properties that a point takes from the day on which it was made. Points that differ in one are told apart, and
compared with others of their kind only."""


@dataclass(frozen=True)
class Measurement:
    """Figures of one point, from ``steps`` optimizer steps. Times in seconds; low and high are the quartiles."""

    steps: int
    step_time_s: float
    low_s: float
    high_s: float
    throughput: float | None
    """Work per second, in the unit of the point; None if the work of a step is not known."""
    mfu_palm: float | None
    resolution_s: float = 0.0
    """Seconds over which most step times are means; 0 if most steps were timed one by one."""
    intervals: float = math.inf
    """Number of such means."""

    @property
    def spread_share(self) -> float:
        """Interquartile range over the median."""
        return (self.high_s - self.low_s) / self.step_time_s if self.step_time_s else 0.0

    @property
    def is_noisy(self) -> bool:
        """True if the steps differ too much, or are timed too coarsely, for an exact efficiency."""
        return self.spread_share > NOISY or NOISY * self.intervals < 1


def measure(steps: Sequence[Step]) -> Measurement | None:
    """Measure a point; None if fewer than ``MIN_STEPS`` steps are left after warm-up."""
    used = drop_warmup(steps)
    if len(used) < MIN_STEPS:
        return None
    low, median, high = statistics.quantiles([step.time_s for step in used], n=4, method="inclusive")
    mfu = [step.mfu_palm for step in used if step.mfu_palm is not None]
    work = [step.work for step in used if step.work is not None]
    resolution_s = statistics.median(step.resolution_s for step in used)
    length_s = median * (used[-1].step - used[0].step + 1)  # some programs print every tenth step
    return Measurement(
        steps=len(used),
        step_time_s=median,
        low_s=low,
        high_s=high,
        throughput=statistics.median(work) / median if len(work) == len(used) and median > 0 else None,
        mfu_palm=statistics.median(mfu) if mfu else None,
        resolution_s=resolution_s,
        intervals=length_s / resolution_s if resolution_s else math.inf,
    )


@dataclass(frozen=True)
class MeasuredPoint:
    """A point and its figures; ``figures`` is None if too few steps are left."""

    point: Point
    figures: Measurement | None
    neighbours: tuple[str, ...] = ()
    """Points it shared cores or a GPU with while it made steps."""

    @property
    def ranks(self) -> int | None:
        """Number of ranks, from the run, or else from the overrides."""
        if self.point.environment is not None:
            return self.point.environment.world_size
        nodes, per_node = (self._typed(key) for key in ("nodes", "ranks_per_node"))
        return nodes * per_node if nodes is not None and per_node is not None else None

    @property
    def nodes(self) -> int | None:
        """Number of nodes, from the run, or else from the overrides."""
        return self._typed("nodes") if self.point.environment is None else self.point.environment.nodes

    def _typed(self, key: str) -> int | None:
        value = typed_value(self.point.overrides, key)
        return int(value) if value is not None and value.isdigit() else None

    @property
    def run_rate(self) -> float | None:
        """Work per second of the run time, if the work was stated and done in one attempt."""
        point, environment = self.point, self.point.environment
        if environment is None or environment.work_per_step is None or environment.max_steps is None:
            return None
        if point.state is not State.FINISHED or point.attempts != 1 or not point.run_time_s:
            return None
        return environment.work_per_step * environment.max_steps / point.run_time_s

    @property
    def crowded(self) -> bool | None:
        """True if ranks shared cores or a GPU; None if it is not known what they ran on."""
        return None if self.point.environment is None else bool(self.crowding())

    def crowding(self) -> list[str]:
        """Return one phrase for each way in which its ranks shared cores or a GPU."""
        own = [] if self.point.environment is None else self.point.environment.crowding()
        names = self.neighbours
        few = " and ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} other points"
        return own + ([f"at the same time as {few}"] if names else [])

    @property
    def is_coarse(self) -> bool:
        """True if its steps were timed in too few intervals for any efficiency."""
        return self.figures is not None and self.figures.intervals < MIN_STEPS

    @property
    def has_efficiency(self) -> bool:
        """True if an efficiency of this point, or against it, may be stated."""
        return self.figures is not None and not self.crowded and not self.is_coarse

    def host(self, rank: int) -> str | None:
        """Return the host of a rank; None if it was not recorded."""
        places = () if self.point.environment is None else self.point.environment.ranks
        return places[rank].host if rank < len(places) else None


@dataclass(frozen=True)
class Series:
    """Points that differ in size only, smallest first. ``label`` sets it apart from others; empty if it is alone."""

    label: str
    members: tuple[MeasuredPoint, ...]

    @property
    def smallest(self) -> MeasuredPoint | None:
        """The smallest point with figures; if none has any, the smallest whose run time can be compared."""
        measured = [member for member in self.members if member.figures is not None]
        timed = [member for member in self.members if member.run_rate is not None]
        return next(iter(measured or timed), None)

    @property
    def scaling(self) -> str | None:
        """``strong``, ``weak``, or None if no point says."""
        known = [m.point.environment.weak_scaling for m in self.members if m.point.environment is not None]
        return next(("weak" if weak else "strong" for weak in known if weak is not None), None)

    @property
    def has_rates(self) -> bool:
        """True if the work of every measured point is known, in one unit, so that they compare by throughput."""
        measured = [(m.figures.throughput, m.point.unit) for m in self.members if m.figures is not None]
        return all(rate is not None for rate, _ in measured) and len({unit for _, unit in measured}) == 1

    @property
    def compares(self) -> bool:
        """True if there are several points: one alone has no speedup."""
        return len(self.members) > 1


def split(members: Sequence[MeasuredPoint]) -> list[Series]:
    """Group points into series by their overrides other than their size, and by their cluster, in order of appearance.

    The processes of one machine say nothing of how nodes scale, nor one cluster of another: they are not compared. Nor
    are points that were made with other software or code, or are in another folder of a comparison.

    Raises:
        ConfigError: points of one series were measured under different conditions.
    """
    groups: dict[tuple[str, frozenset[str]], list[MeasuredPoint]] = {}
    several = len(clusters_of(members)) > 1
    for member in members:
        where = {f"cluster={member.point.cluster}"} if several and member.point.cluster else set()
        groups.setdefault((member.point.source, identity(member.point) | where), []).append(member)
    groups = {
        (source, alike | apart): group
        for (source, alike), mixed in groups.items()
        for apart, group in _made_alike(mixed).items()
    }
    common = frozenset.intersection(*(alike for _, alike in groups)) if groups else frozenset()
    found = []
    for (source, alike), group in groups.items():
        label = ",".join(filter(None, (source, *sorted(alike - common)))) or ("default" if len(groups) > 1 else "")
        # Points whose size is not known come last.
        sizes = {one.point.path: [math.inf if n is None else n for n in (one.ranks, one.nodes)] for one in group}
        found.append(Series(label, tuple(sorted(group, key=lambda one: (sizes[one.point.path], one.point.name)))))
    for series in found:
        _require_comparable(series)
    return found


def _made_alike(members: Sequence[MeasuredPoint]) -> dict[frozenset[str], list[MeasuredPoint]]:
    """Return what sets groups apart -> points that were made with the same software and code.

    A point that does not say belongs to the first group.
    """
    several = {name: list(found) for name, found in made_with(members).items() if len(found) > 1}
    groups: dict[frozenset[str], list[MeasuredPoint]] = {}
    for member in members:
        environment = member.point.environment
        own = {name: environment and MADE_WITH[name](environment) for name in several}
        groups.setdefault(frozenset(own[name] or found[0] for name, found in several.items()), []).append(member)
    return groups


def made_with(members: Sequence[MeasuredPoint]) -> dict[str, dict[str, list[str]]]:
    """Return property of ``MADE_WITH`` -> its values among measured points -> their titles."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in MADE_WITH}
    for member in members:
        environment = member.point.environment
        if environment is None or (member.figures is None and member.run_rate is None):
            continue
        for name, property_of in MADE_WITH.items():
            if (value := property_of(environment)) is not None:
                found[name].setdefault(value, []).append(member.point.title)
    return found


def clusters_of(members: Sequence[MeasuredPoint]) -> dict[str, list[str]]:
    """Return cluster -> titles of the points that ran on it, as far as that is known."""
    found: dict[str, list[str]] = {}
    for member in members:
        if member.point.cluster is not None:
            found.setdefault(member.point.cluster, []).append(member.point.title)
    return found


def identity(point: Point) -> frozenset[str]:
    """Return the overrides of a point without its size."""
    told = filter(tells_apart, point.overrides)
    return frozenset(override for override in told if typed_key(override) not in SIZE_KEYS)


def _require_comparable(series: Series) -> None:
    first = series.smallest
    for other in series.members:
        if first is None or (other.figures if first.figures is not None else other.run_rate) is None:
            continue
        assert first.point.environment is not None and other.point.environment is not None
        for name, condition in CONDITIONS.items():
            if name == "batch" and not other.point.is_gpt:
                continue  # stated by hand, once for all points or wrongly; a note names steps with other work
            here, there = condition(first.point.environment), condition(other.point.environment)
            if here is not None and there is not None and here != there:
                typed = [override for override in other.point.overrides if typed_key(override) != "fresh"]
                again = " ".join(["python -m launch", *typed, "fresh=true"])
                raise ConfigError(
                    f"different {name} in one scaling series: {first.point.title} has {here}, "
                    f"{other.point.title} has {there}",
                    f"the same {name} for all points whose efficiency is compared",
                    f"{again}, so that it has {here}; or take {other.point.path} out of the folder",
                )


# Labels of points, and the comparison of several sweeps and runs, each with a baseline of its own.


COMPARED: Mapping[str, Callable[[Environment], str | None]] = {**CONDITIONS, **MADE_WITH}
"""Conditions that a ratio between points of two folders is a measure of, if they differ."""


def label_points(points: Sequence[Point]) -> list[Point]:
    """Return the points with their labels; one alone with its label among the runs of its folder."""
    if len(points) == 1:
        path = points[0].path.absolute()
        return [replace(points[0], label=labels_inside([path.parent]).get(path, ""))]
    labels = point_labels([(point.path, point.overrides) for point in points])
    return [replace(point, label=label) for point, label in zip(points, labels, strict=True)]


def label_selected(selection: Selection, points: Sequence[Point]) -> list[Point]:
    """Return the points with their labels; in a comparison also with their source, which the labels begin with."""
    if not selection.parts:
        return label_points(points)
    sources: dict[str, list[Point]] = defaultdict(list)
    left = iter(points)
    for source, part in zip(source_labels(selection.parts), selection.parts, strict=True):
        sources[source] += islice(left, len(part.runs))
    return [
        replace(point, source=source, label=f"{source}/{point.title}")
        for source, of_source in sources.items()
        for point in label_points(of_source)
    ]


def ratios_to_first(members: Sequence[MeasuredPoint]) -> dict[str, float]:
    """Return title -> throughput over that of the first source's point with as many ranks, in the same unit.

    If the first source has several points of a size, the one with the same overrides counts; if none has, no point.
    """
    sources = list(dict.fromkeys(member.point.source for member in members))
    first = [member for member in members if member.point.source == sources[0] and member.figures is not None]
    found: dict[str, float] = {}
    for member in members:
        as_large = [one for one in first if one.ranks == member.ranks]
        alike = [one for one in as_large if identity(one.point) == identity(member.point)] or as_large
        if member.point.source == sources[0] or member.figures is None or len(alike) != 1:
            continue
        here, there = member.figures.throughput, alike[0].figures and alike[0].figures.throughput
        if here is not None and there and member.point.unit == alike[0].point.unit:
            found[member.point.title] = here / there
    return found


def comparison_notes(members: Sequence[MeasuredPoint]) -> list[str]:
    """Return the notes on a ratio across folders: what the points of each differ in from those of the first."""
    sources: dict[str, list[Environment]] = defaultdict(list)
    for member in members:
        sources[member.point.source] += [] if member.point.environment is None else [member.point.environment]
    if len(sources) < 2:
        return []
    (first, of_first), *others = sources.items()
    told = [
        f"Speedup and efficiency are against the smallest point of the same folder. Times {first} is the throughput "
        f"over that of the point of {first} with as many ranks."
    ]
    for source, environments in others:
        different = []
        for name, condition in COMPARED.items():
            here, there = (
                sorted({value for one in which if (value := condition(one)) is not None})
                for which in (environments, of_first)
            )
            if here and there and here != there:
                different.append(f"{name} ({' / '.join(here)}, not {' / '.join(there)})")
        if different:
            told.append(f"{source} differs from {first} in {'; '.join(different)}: a ratio is of all of it together.")
    return told


# Notes on points.


NAMED = 3
"""Slow ranks that a note names; of the rest it gives the number."""


def straggler_notes(member: MeasuredPoint) -> list[str]:
    """Return the notes on slow ranks and on ranks that wait for data; none if their excess is within the spread."""
    if member.figures is None or member.point.rank_times is None:
        return []
    ranks = member.point.rank_times.ranks
    slow = {rank.rank: rank.excess_s for rank in ranks if rank.is_slow}
    waiting = {rank.rank: rank.wait_excess_s or 0.0 for rank in ranks if rank.waits_long}
    found = []
    if slow:
        found.append(
            f"At {member.point.title}, slower than the other ranks throughout the run: {_told(member, slow)}. In each "
            "step all ranks wait for the slowest."
        )
    if waiting:
        found.append(
            f"At {member.point.title}, longer waits for data than on the other ranks: {_told(member, waiting)}."
        )
    return found


def _told(member: MeasuredPoint, ranks: Mapping[int, float]) -> str:
    """Write the slowest of some ranks and their excess over the median of all other ranks."""
    assert member.figures is not None
    told = []
    for rank, excess_s in sorted(ranks.items(), key=lambda item: -item[1])[:NAMED]:
        host, share = member.host(rank), 100 * excess_s / member.figures.step_time_s
        on = "" if host is None else f" on {host}"
        told.append(f"rank {rank}{on} by {1000 * excess_s:.3g} ms, {share:.1f} % of the step time")
    more = f"; and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return "; ".join(told) + more


def resolution_note(member: MeasuredPoint) -> str:
    """Return the note on a point whose steps were not timed one by one; empty for any other."""
    figures = member.figures
    if figures is None or not figures.resolution_s:
        return ""
    together = round(figures.resolution_s / figures.step_time_s) if figures.step_time_s else 0
    claim = f", and no efficiency is claimed: they took less than {MIN_STEPS} such readings" if member.is_coarse else ""
    return (
        f"At {member.point.title} a step time is a mean over about {counted(together, 'step')}, whose lines were read "
        f"together ({figures.resolution_s:.2g} s): their spread is not known{claim}. A step time in the line "
        "(script.progress with a group step_time_s), or launch.worker, tells each step."
    )
