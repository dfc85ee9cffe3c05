"""Series: points of a sweep that differ only in their size; and the comparison of several sweeps."""

from __future__ import annotations

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote

from launch.errors import ConfigError
from launch.report.environment import Environment
from launch.report.points import Point, State
from launch.report.selection import Selection
from launch.report.steps import WARMUP_STEPS, Step
from launch.runs.find import is_run, labels_inside, point_labels, tells_apart
from launch.runs.overrides import typed_key, typed_value

# Series: the points of a sweep that differ only in their size, and so may be compared with each other.


SIZE_KEYS = frozenset({"nodes", "ranks_per_node"})
"""Overrides along which a series runs."""


def _model(environment: Environment) -> str | None:
    if environment.model is None:
        return None
    parameters = "" if environment.parameters is None else f" with {environment.parameters:,} parameters"
    joined = " and" if parameters else " with"
    length = "" if environment.block_size is None else f"{joined} sequences of {environment.block_size} tokens"
    return f"{environment.model}{parameters}{length}"


def _kind(environment: Environment) -> str | None:
    if environment.weak_scaling is None:
        return None
    return "weak scaling" if environment.weak_scaling else "strong scaling"


def _batch(environment: Environment) -> str | None:
    """The batch in sequences, or the work of a step in the unit of the program, where they were stated."""
    if environment.weak_scaling:
        if environment.per_rank_batch is not None:
            return f"{environment.per_rank_batch} sequences per rank"
        if environment.work_per_step is not None:
            return (
                f"{work_text(environment.work_per_step / environment.world_size, environment.unit)} per step and rank"
            )
    elif environment.global_batch is not None:
        return f"a global batch of {environment.global_batch} sequences"
    elif environment.work_per_step is not None:
        return f"{work_text(environment.work_per_step, environment.unit)} per step"
    return None


def work_text(work: float, unit: str | None) -> str:
    """An amount of work for people: 1,024 samples."""
    number = f"{work:,.0f}" if work == round(work) or work >= 1000 else f"{work:.3g}"
    return f"{number} {unit or 'units of work'}"


CONDITIONS: dict[str, Callable[[Environment], str | None]] = {
    "hardware": lambda e: e.device_names,
    "precision": lambda e: e.precision,
    "model": _model,
    "kind of scaling": _kind,
    "batch": _batch,
    "unit": lambda e: e.unit,
}
"""Properties that all measured points of a series share; None, and not compared, where a point does not tell."""


MADE_WITH: dict[str, Callable[[Environment], str | None]] = {
    "software": lambda e: None if e.torch is None else f"torch {e.torch}",
    "code": lambda e: e.code and f"commit {e.code}",
}
"""Properties that a point takes from the day on which it was made, rather than from what was typed: points that differ
in one are told apart, and compared with others of their kind only."""


@dataclass(frozen=True)
class MeasuredPoint:
    """A point and its figures; ``figures`` is None where too few steps are left."""

    point: Point
    figures: Measurement | None
    neighbours: tuple[str, ...] = ()
    """Points it shared cores or a GPU with while it made steps."""

    @property
    def ranks(self) -> int | None:
        """Number of ranks, from the run, or else from what was typed."""
        if self.point.environment is not None:
            return self.point.environment.world_size
        nodes, per_node = (typed_number(self.point.overrides, key) for key in ("nodes", "ranks_per_node"))
        return nodes * per_node if nodes is not None and per_node is not None else None

    @property
    def nodes(self) -> int | None:
        """Number of nodes, from the run, or else from what was typed."""
        if self.point.environment is not None:
            return self.point.environment.nodes
        return typed_number(self.point.overrides, "nodes")

    @property
    def run_rate(self) -> float | None:
        """Work per second of the run time, where it was stated how much there is and it was done in one go."""
        point, environment = self.point, self.point.environment
        if environment is None or environment.work_per_step is None or environment.max_steps is None:
            return None
        if point.state is not State.FINISHED or point.attempts != 1 or not point.run_time_s:
            return None
        return environment.work_per_step * environment.max_steps / point.run_time_s

    @property
    def crowded(self) -> bool | None:
        """Tell whether ranks shared cores or a GPU; None where it is not known what they ran on."""
        environment = self.point.environment
        return None if environment is None else bool(self.crowding())

    def crowding(self) -> list[str]:
        """One phrase for each way in which its ranks shared cores or a GPU."""
        own = [] if self.point.environment is None else self.point.environment.crowding()
        return own + ([f"at the same time as {_few(self.neighbours)}"] if self.neighbours else [])


def _few(names: Sequence[str]) -> str:
    """Two names at most, and how many there are besides."""
    return " and ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} other points"


@dataclass(frozen=True)
class Series:
    """Points that differ in size only, smallest first. ``label`` is what sets it apart, empty for the only one."""

    label: str
    members: tuple[MeasuredPoint, ...]

    @property
    def smallest(self) -> MeasuredPoint | None:
        """The smallest point that has figures; where none has, the smallest whose run time can be compared."""
        measured = [member for member in self.members if member.figures is not None]
        timed = [member for member in self.members if member.run_rate is not None]
        return next(iter(measured or timed), None)

    @property
    def scaling(self) -> str | None:
        """``strong``, ``weak``, or None where no point tells."""
        known = [m.point.environment.weak_scaling for m in self.members if m.point.environment is not None]
        told = [weak for weak in known if weak is not None]
        return ("weak" if told[0] else "strong") if told else None

    @property
    def has_rates(self) -> bool:
        """Tell whether the work of every measured point is known, in one unit, so that they compare by throughput."""
        measured = [(m.figures.throughput, m.point.unit) for m in self.members if m.figures is not None]
        return all(rate is not None for rate, _ in measured) and len({unit for _, unit in measured}) == 1

    @property
    def compares(self) -> bool:
        """Tell whether there is anything to compare: one point alone has no speedup."""
        return len(self.members) > 1


def typed_number(overrides: Iterable[str], key: str) -> int | None:
    """The number typed for ``key``, None where there is none."""
    value = typed_value(overrides, key)
    return int(value) if value is not None and value.isdigit() else None


def label_points(points: Sequence[Point]) -> list[Point]:
    """The points, each with its label among them; one alone with that among the runs that it lies beside."""
    if len(points) == 1:
        path = points[0].path.absolute()
        return [replace(points[0], label=labels_inside([path.parent]).get(path, ""))]
    labels = point_labels([(point.path, point.overrides) for point in points])
    return [replace(point, label=label) for point, label in zip(points, labels, strict=True)]


def split(members: Sequence[MeasuredPoint]) -> list[Series]:
    """Group points into series by their overrides other than their size, and by their cluster, in order of appearance.

    The processes of one machine say nothing of how nodes scale, nor one cluster of another: none is measured against
    them. Nor are points that were made with other software or code, or lie in another folder of a comparison.

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
        found.append(Series(label, tuple(sorted(group, key=_by_size))))
    for series in found:
        _require_comparable(series)
    return found


def _made_alike(members: Sequence[MeasuredPoint]) -> dict[frozenset[str], list[MeasuredPoint]]:
    """Group points that were made with the same software and code; what sets groups apart is in their keys.

    A point that does not tell belongs to the first group: there is nothing to tell it apart by.
    """
    several = {name: list(found) for name, found in made_with(members).items() if len(found) > 1}
    groups: dict[frozenset[str], list[MeasuredPoint]] = {}
    for member in members:
        environment = member.point.environment
        told = {name: environment and MADE_WITH[name](environment) for name in several}
        groups.setdefault(frozenset(told[name] or found[0] for name, found in several.items()), []).append(member)
    return groups


def made_with(members: Sequence[MeasuredPoint]) -> dict[str, dict[str, list[str]]]:
    """Property of ``MADE_WITH`` -> its values among measured points -> their titles."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in MADE_WITH}
    for member in members:
        environment = member.point.environment
        if environment is None or (member.figures is None and member.run_rate is None):
            continue
        for name, property_of in MADE_WITH.items():
            value = property_of(environment)
            if value is not None:
                found[name].setdefault(value, []).append(member.point.title)
    return found


def clusters_of(members: Sequence[MeasuredPoint]) -> dict[str, list[str]]:
    """The points that ran on each cluster, as far as that is known."""
    found: dict[str, list[str]] = {}
    for member in members:
        if member.point.cluster is not None:
            found.setdefault(member.point.cluster, []).append(member.point.title)
    return found


def identity(point: Point) -> frozenset[str]:
    """Overrides that were typed for a point, apart from its size."""
    told = filter(tells_apart, point.overrides)
    return frozenset(override for override in told if typed_key(override) not in SIZE_KEYS)


def _by_size(member: MeasuredPoint) -> tuple[float, float, str]:
    """Points whose size is not known come last."""
    ranks, nodes = (float("inf") if n is None else n for n in (member.ranks, member.nodes))
    return ranks, nodes, member.point.name


def _require_comparable(series: Series) -> None:
    first = series.smallest
    for other in series.members:
        if first is None or (other.figures if first.figures is not None else other.run_rate) is None:
            continue
        assert first.point.environment is not None and other.point.environment is not None
        for name, condition in CONDITIONS.items():
            if name == "batch" and not other.point.is_gpt:
                continue  # said by hand, once for all points or wrongly; a note tells where the steps show otherwise
            here, there = condition(first.point.environment), condition(other.point.environment)
            if here is not None and there is not None and here != there:
                raise ConfigError(
                    f"different {name} in one scaling series: {first.point.title} has {here}, "
                    f"{other.point.title} has {there}",
                    f"the same {name} for all points whose efficiency is compared",
                    f"{_again(other.point)}, so that it has {here}; or take {other.point.path} out of the folder",
                )


def _again(point: Point) -> str:
    """The command that makes a point again in a new folder."""
    typed = [override for override in point.overrides if typed_key(override) != "fresh"]
    return " ".join(["python -m launch", *typed, "fresh=true"])


NOISY = 0.1
"""Above this interquartile range, in medians, an efficiency is marked. It does not shrink with the number of steps, as
a standard error would: what disturbs a machine lasts for many steps, so that they are no independent samples."""
MIN_STEPS = 5
"""Fewer steps than this have no quartiles worth the name."""


@dataclass(frozen=True)
class Measurement:
    """Figures of one point, from ``steps`` optimizer steps. Times in seconds; low and high are the quartiles."""

    steps: int
    step_time_s: float
    low_s: float
    high_s: float
    throughput: float | None
    """Work per second, in the unit of the point; None where the work of a step is not known."""
    mfu_palm: float | None

    @property
    def spread_share(self) -> float:
        """Interquartile range over the median: how much the steps differ, whatever their number and their outliers."""
        return (self.high_s - self.low_s) / self.step_time_s if self.step_time_s else 0.0

    @property
    def is_noisy(self) -> bool:
        """Tell whether the steps differ too much for an exact efficiency."""
        return self.spread_share > NOISY


def drop_warmup(steps: Sequence[Step]) -> list[Step]:
    """The steps that count: all but the first ``WARMUP_STEPS`` of each attempt."""
    first: dict[int, int] = {}
    for step in steps:
        first[step.attempt] = min(step.step, first.get(step.attempt, step.step))
    return [step for step in steps if step.step >= first[step.attempt] + WARMUP_STEPS]


def measure(steps: Sequence[Step]) -> Measurement | None:
    """Measure a point; None where fewer than ``MIN_STEPS`` steps are left after warm-up."""
    used = drop_warmup(steps)
    if len(used) < MIN_STEPS:
        return None
    times = [step.time_s for step in used]
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    mfu = [step.mfu_palm for step in used if step.mfu_palm is not None]
    work = [step.work for step in used if step.work is not None]
    return Measurement(
        steps=len(used),
        step_time_s=median,
        low_s=low,
        high_s=high,
        throughput=statistics.median(work) / median if len(work) == len(used) and median > 0 else None,
        mfu_palm=statistics.median(mfu) if mfu else None,
    )


# Comparison of several sweeps and runs in one report, each with a baseline of its own.


COMMAND = "python -m launch.report"
COMPARED: Mapping[str, Callable[[Environment], str | None]] = {**CONDITIONS, **MADE_WITH}
"""Conditions that a ratio between points of two folders is a measure of, where they differ."""


def compare(parts: Sequence[Selection]) -> Selection:
    """Join selections into one report; its files are ``comparison.*``, beside the runs of the first.

    Raises:
        ConfigError: a folder is there twice, or a run beside the sweep that it belongs to.
    """
    seen: dict[object, Selection] = {}
    for part in parts:
        key = (part.folder.resolve(), part.sweep and part.sweep.number, part.stem)
        if key in seen:
            raise twice(part.shown, f"with the same runs as {seen[key].shown}", parts, part)
        seen[key] = part
    for part in parts:
        for other in parts:
            of_other = [run.resolve() for run in other.runs]
            if part is not other and is_run(part.folder) and part.folder.resolve() in of_other:
                raise twice(part.shown, f"which belongs to {other.shown}", parts, part)
    runs = tuple(run for part in parts for run in part.runs)
    return Selection(parts[0].folder, runs, parts=tuple(parts))


def twice(shown: Path, why: str, parts: Sequence[Selection], left_out: Selection) -> ConfigError:
    """Return the refusal of what would be in a comparison twice."""
    others = dict.fromkeys(quote(str(part.shown)) for part in parts if part is not left_out)
    return ConfigError(f"{shown}, {why}", "folders with other runs each", f"{COMMAND} {' '.join(others)}")


def source_labels(parts: Sequence[Selection]) -> list[str]:
    """Name the source of each part: as few of its folder's last components as tell the folders apart.

    Runs typed one by one that lie in one folder are of one source, as the points of a sweep are; a source with the
    folder of another one is named by its sweep.
    """
    keys = [_source(part) for part in parts]
    folders = dict.fromkeys(folder for folder, _ in keys)
    tails: dict[Path, str] = {}
    for folder in folders:
        size = 1
        while size < len(folder.parts) and any(
            folder.parts[-size:] == other.parts[-size:] for other in folders if other != folder
        ):
            size += 1
        tails[folder] = "/".join(folder.parts[-size:])
    several = Counter(folder for folder, _ in dict.fromkeys(keys))
    return [tails[folder] + (f" {which}" if several[folder] > 1 else "") for folder, which in keys]


def _source(part: Selection) -> tuple[Path, str]:
    """The folder that the points of a part lie in, and what of it they are."""
    if is_run(part.folder):
        return part.folder.resolve().parent, "runs"
    number = None if part.sweep is None else part.sweep.number
    which = "all runs" if part.sweep is None else "sweep" if number is None else f"sweep {number}"
    return part.folder.resolve(), which


def label_selected(selection: Selection, points: Sequence[Point]) -> list[Point]:
    """The points, each with its label; in a comparison also with its source, which their labels begin with."""
    if not selection.parts:
        return label_points(points)
    sources: dict[str, list[Point]] = defaultdict(list)
    left = list(points)
    for source, part in zip(source_labels(selection.parts), selection.parts, strict=True):
        sources[source] += left[: len(part.runs)]
        left = left[len(part.runs) :]
    return [
        replace(point, source=source, label=f"{source}/{point.title}")
        for source, of_source in sources.items()
        for point in label_points(of_source)
    ]


def ratios_to_first(members: Sequence[MeasuredPoint]) -> dict[str, float]:
    """Title -> throughput over that of the first source's point with as many ranks.

    Where that has several points of a size, the one that was typed alike counts, and none where there is none. Only
    the same units compare.
    """
    sources = list(dict.fromkeys(member.point.source for member in members))
    found: dict[str, float] = {}
    for member in members:
        other = _counterpart(member, [one for one in members if one.point.source == sources[0]])
        if member.point.source == sources[0] or other is None or member.figures is None or other.figures is None:
            continue
        here, there = member.figures.throughput, other.figures.throughput
        if here is not None and there and member.point.unit == other.point.unit:
            found[member.point.title] = here / there
    return found


def _counterpart(member: MeasuredPoint, others: Sequence[MeasuredPoint]) -> MeasuredPoint | None:
    """The point of another source that one compares with; None where there is none, or several might be it."""
    as_large = [one for one in others if one.ranks == member.ranks and one.figures is not None]
    alike = [one for one in as_large if identity(one.point) == identity(member.point)]
    candidates = alike or as_large
    return candidates[0] if len(candidates) == 1 else None


def comparison_notes(members: Sequence[MeasuredPoint]) -> list[str]:
    """Say what a ratio across folders is of: what the points of each differ in from those of the first."""
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
            here, there = (_values(condition, which) for which in (environments, of_first))
            if here and there and here != there:
                different.append(f"{name} ({' / '.join(here)}, not {' / '.join(there)})")
        if different:
            told.append(f"{source} differs from {first} in {'; '.join(different)}: a ratio is of all of it together.")
    return told


def _values(condition: Callable[[Environment], str | None], environments: Sequence[Environment]) -> list[str]:
    return sorted({value for one in environments if (value := condition(one)) is not None})
