"""Series: points of a sweep that differ only in size, and their statistics: intervals, repeats, scaling laws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

import numpy as np

from launch.errors import ConfigError
from launch.report.points import Point, disturbs
from launch.report.read import Environment, Floats
from launch.report.selection import Selection, source_labels
from launch.runs.find import labels_inside, point_labels, tells_apart
from launch.runs.overrides import typed_key

SIZE_KEYS = frozenset({"nodes", "ranks_per_node"})
"""Keys of overrides that may differ between the points of a series."""


def _model(environment: Environment) -> str | None:
    if environment.model is None:
        return None
    parameters = "" if environment.parameters is None else f" with {environment.parameters:,} parameters"
    joined = " and" if parameters else " with"
    length = "" if environment.block_size is None else f"{joined} sequences of {environment.block_size} tokens"
    return f"{environment.model}{parameters}{length}"


def batch_text(environment: Environment) -> str | None:
    """Return the batch in sequences, or the work of a step in the unit of the program; None if not stated."""
    work, batch = environment.work_per_step, environment.global_batch
    if environment.weak_scaling:
        if environment.per_rank_batch is not None:
            return f"{environment.per_rank_batch} sequences per rank"
        each = None if work is None else work_text(work / environment.world_size, environment.unit)
        return each and f"{each} per step and rank"
    if batch is not None:
        return f"a global batch of {batch} sequences"
    return None if work is None else f"{work_text(work, environment.unit)} per step"


def work_text(work: float, unit: str | None) -> str:
    """Write an amount of work for people: 1,024 samples."""
    number = f"{work:,.0f}" if work == round(work) or work >= 1000 else f"{work:.3g}"
    return f"{number} {unit or 'units of work'}"


Conditions = Mapping[str, Callable[[Environment], str | None]]

CONDITIONS: Conditions = {
    "hardware": lambda e: e.device_names,
    "precision": lambda e: e.precision,
    "model": _model,
    "kind of scaling": lambda e: (
        None if e.weak_scaling is None else f"{'weak' if e.weak_scaling else 'strong'} scaling"
    ),
    "batch": batch_text,
    "unit": lambda e: e.unit,
}
"""Property -> function of an environment that returns its value as text, or None if not recorded.

These properties must be equal for all measured points of a series.
"""
MADE_WITH: Conditions = {
    "software": lambda e: None if e.torch is None else f"torch {e.torch}",
    "code": lambda e: e.code and f"commit {e.code}",
}
"""Properties that may change between two commands. Points that differ in one belong to different series."""
COMPARED: Conditions = {**CONDITIONS, **MADE_WITH}
"""Properties that may differ between two folders of a comparison."""


def _made_with(point: Point, name: str) -> str | None:
    """Return a property of ``MADE_WITH``, or the cluster; None if the point does not record it."""
    if name == "cluster":
        return point.cluster and f"cluster={point.cluster}"
    return None if point.environment is None else MADE_WITH[name](point.environment)


@dataclass(frozen=True)
class Series:
    """Points that differ only in size, smallest first.

    ``label`` distinguishes several series; it is empty if there is only one.
    """

    label: str
    members: tuple[Point, ...]

    @property
    def smallest(self) -> Point | None:
        """Smallest point with figures; if no point has figures, the smallest point with a comparable run time.

        None if no point has either.
        """
        measured = [point for point in self.members if point.figures is not None]
        timed = [point for point in self.members if point.run_rate is not None]
        return next(iter(measured or timed), None)

    @property
    def scaling(self) -> str | None:
        """Kind of scaling: ``strong``, ``weak``, or None if no point records it."""
        known = [point.environment.weak_scaling for point in self.members if point.environment is not None]
        return next(("weak" if weak else "strong" for weak in known if weak is not None), None)

    @property
    def has_rates(self) -> bool:
        """True if the work of every measured point is known in one unit, so that throughputs are comparable."""
        measured = [(point.figures.throughput, point.unit) for point in self.members if point.figures is not None]
        return all(rate is not None for rate, _ in measured) and len({unit for _, unit in measured}) == 1

    @property
    def compares(self) -> bool:
        """True if the series has several points: a single point has no speedup."""
        return len(self.members) > 1

    @property
    def of(self) -> str:
        """Text `` of LABEL`` for sentences; empty if there is only one series."""
        return f" of {self.label}" if self.label else ""


def split(points: Sequence[Point]) -> list[Series]:
    """Group points into series in order of appearance, by their cluster and by all overrides except the size.

    Points of different clusters are not compared: the processes of one machine do not show how nodes scale. Points with
    different software, code, or folder of a comparison are in different series, too.

    Raises:
        ConfigError: points of one series were measured under different conditions.
    """
    groups: dict[tuple[str, frozenset[str]], list[Point]] = {}
    several = len(made_with(points)["cluster"]) > 1
    for point in points:
        where = {_made_with(point, "cluster") or ""} - {""} if several else set()
        groups.setdefault((point.source, identity(point) | where), []).append(point)
    for name in MADE_WITH:
        whole, groups = groups, {}
        for (source, alike), group in whole.items():
            values = list(made_with(group)[name])
            for point in group:
                # A point that does not record the property belongs to the first group.
                own = {_made_with(point, name) or values[0]} if len(values) > 1 else set()
                groups.setdefault((source, alike | own), []).append(point)
    common = frozenset.intersection(*(alike for _, alike in groups)) if groups else frozenset()
    every = []
    for (source, alike), group in groups.items():
        label = ",".join(filter(None, (source, *sorted(alike - common)))) or ("default" if len(groups) > 1 else "")
        # Points of unknown size come last.
        sizes = {point.path: [math.inf if n is None else n for n in (point.ranks, point.nodes)] for point in group}
        every.append(Series(label, tuple(sorted(group, key=lambda point: (sizes[point.path], point.name)))))
        _require_comparable(every[-1])
    return every


def made_with(points: Sequence[Point]) -> dict[str, dict[str, list[str]]]:
    """Return property (cluster, software, code) -> value -> titles of the points with this value.

    A point without figures or run rate is listed under the cluster only.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name in ("cluster", *MADE_WITH):
        found[name] = {}
        for point in points:
            counts = name == "cluster" or point.figures is not None or point.run_rate is not None
            if counts and (value := _made_with(point, name)) is not None:
                found[name].setdefault(value, []).append(point.title)
    return found


def identity(point: Point) -> frozenset[str]:
    """Return the overrides of a point without those for its size."""
    return frozenset(one for one in filter(tells_apart, point.overrides) if typed_key(one) not in SIZE_KEYS)


def _require_comparable(series: Series) -> None:
    first = series.smallest
    for other in series.members:
        if first is None or (other.figures if first.figures is not None else other.run_rate) is None:
            continue
        assert first.environment is not None and other.environment is not None
        for name, condition in CONDITIONS.items():
            if name == "batch" and not other.is_gpt:
                # A user states the work once for all points, and may be wrong; a note names steps with different work.
                continue
            here, there = condition(first.environment), condition(other.environment)
            if here is not None and there is not None and here != there:
                typed = [override for override in other.overrides if typed_key(override) != "fresh"]
                again = " ".join(["python -m launch", *typed, "fresh=true"])
                raise ConfigError(
                    f"different {name} in one scaling series: {first.title} has {here}, {other.title} has {there}",
                    f"the same {name} for all points whose efficiency is compared",
                    f"{again}, so that it has {here}; or take {other.path} out of the folder",
                )


# Labels of points, and the comparison of several sweeps and runs, each with its own baseline.


def label_points(points: Sequence[Point]) -> list[Point]:
    """Return the points with labels that distinguish them.

    The label of a single point distinguishes it from the other runs in its parent folder.
    """
    if len(points) == 1:
        path = points[0].path.absolute()
        return [replace(points[0], label=labels_inside([path.parent]).get(path, ""))]
    labels = point_labels([(point.path, point.overrides) for point in points])
    return [replace(point, label=label) for point, label in zip(points, labels, strict=True)]


def label_selected(selection: Selection, points: Sequence[Point]) -> list[Point]:
    """Return the points with labels and neighbours. In a comparison, each label begins with the point's source."""
    if selection.parts:
        sources: dict[str, list[Point]] = defaultdict(list)
        left = iter(points)
        for source, part in zip(source_labels(selection.parts), selection.parts, strict=True):
            sources[source] += islice(left, len(part.runs))
        labelled = [
            replace(point, source=source, label=f"{source}/{point.title}")
            for source, of_source in sources.items()
            for point in label_points(of_source)
        ]
    else:
        labelled = label_points(points)
    near = [tuple(other.title for other in labelled if disturbs(other, point)) for point in labelled]
    return [replace(point, neighbours=titles) for point, titles in zip(labelled, near, strict=True)]


def ratios_to_first(points: Sequence[Point]) -> dict[str, float]:
    """Return title of a point -> its throughput divided by that of the first source's point with as many ranks.

    If the first source has several points of this size, the point with the same overrides counts. A point is absent
    without such a counterpart, or if the units differ.
    """
    sources = list(dict.fromkeys(point.source for point in points))
    first = [point for point in points if point.source == sources[0] and point.figures is not None]
    found: dict[str, float] = {}
    for point in points:
        as_large = [one for one in first if one.ranks == point.ranks]
        alike = [one for one in as_large if identity(one) == identity(point)] or as_large
        if point.source == sources[0] or point.figures is None or len(alike) != 1:
            continue
        here, there = point.figures.throughput, alike[0].figures and alike[0].figures.throughput
        if here is not None and there and point.unit == alike[0].unit:
            found[point.title] = here / there
    return found


# Intervals of the efficiencies of a series, repeats of one size, and scaling laws.


SEED = 20_240_229
REPLICATES = 400
NORMAL = 1.959964
"""Quantile of the normal distribution that leaves 2.5 % above it."""
CHUNK = 2_000_000
"""Largest number of resampled step times in memory at once."""
LEAST_SIZES = 3
"""Smallest number of sizes for a fitted law with one parameter."""


@dataclass(frozen=True)
class Law:
    """A scaling law that was fitted to a series: Amdahl's for strong, Gustafson's for weak scaling.

    Its parameter is ``serial_share``, a share of the work.
    """

    series: str
    name: str
    serial_share: float
    low: float
    high: float
    """Upper end of the 95 % interval of the law's parameter; ``low`` is the lower end."""
    largest_error: float
    """Largest difference of a measured speedup from the law, as a share of the law's speedup."""
    base: str
    """Label of the smallest point, the baseline."""


@dataclass(frozen=True)
class Repeats:
    """Several runs of one size in a series, and the efficiency from the mean of their step times.

    ``low`` and ``high`` are the ends of its 95 % interval.
    """

    ranks: int
    count: int
    efficiency: float
    low: float
    high: float


@dataclass(frozen=True)
class SeriesFindings:
    """Statistical findings on one series."""

    intervals: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Name of a point -> 95 % interval of its efficiency."""
    repeats: tuple[Repeats, ...] = ()
    law: Law | None = None


def find_statistics(series: Series) -> SeriesFindings:
    """Return the findings on a series; empty if no efficiency is stated, or steps were not timed one by one."""
    base = series.smallest
    runs = [point for point in series.members if point.has_efficiency]
    is_claimed = base is not None and base.has_efficiency and series.compares and series.has_rates
    # Means over several steps do not show the spread of single steps.
    is_coarse = any(run.figures is not None and run.figures.resolution_s for run in runs)
    if base is None or not is_claimed or is_coarse or len(runs) < 2:
        return SeriesFindings()
    sizes: dict[int, list[Point]] = defaultdict(list)  # In the order of the series.
    for run in runs:
        sizes[run.ranks or 0].append(run)
    of_base, *_ = sizes.values()
    drawn = [_medians([run], at) for at, run in enumerate(runs)]
    intervals = {
        run.name: ratio(_efficiency([run], runs[:1]), own, drawn[0])
        for run, own in zip(runs[1:], drawn[1:], strict=True)
    }
    repeats = []
    all_of_base = _medians(of_base, len(runs))
    for at, (ranks, of_size) in enumerate(sizes.items(), start=len(runs) + 1):
        if len(of_size) > 1 and of_size is not of_base:
            efficiency = _efficiency(of_size, of_base)
            repeats.append(
                Repeats(ranks, len(of_size), efficiency, *ratio(efficiency, _medians(of_size, at), all_of_base))
            )
    return SeriesFindings(intervals, tuple(repeats), _fit_law(series, sizes, base.title))


def _medians(runs: Sequence[Point], index: int) -> Medians:
    return Medians([run.steps.after_warmup().time_s for run in runs], index)


def _efficiency(runs: Sequence[Point], base: Sequence[Point]) -> float:
    """Return the efficiency of a size by the mean step time of its runs, relative to the runs of the smallest size."""
    one, smallest = (group[0].figures for group in (runs, base))
    here, there = (sum(r.figures.step_time_s for r in group if r.figures) / len(group) for group in (runs, base))
    assert one is not None and one.throughput and smallest is not None and smallest.throughput
    scale = (one.step_time_s / here) * (there / smallest.step_time_s)
    return one.throughput / smallest.throughput * (base[0].ranks or 0) / (runs[0].ranks or 0) * scale


def _fit_law(series: Series, sizes: Mapping[int, Sequence[Point]], base: str) -> Law | None:
    """Fit the scaling law to all sizes above the smallest; None if sizes are too few or the kind is unknown."""
    if len(sizes) < LEAST_SIZES or series.scaling is None:
        return None
    smallest, *above = sizes
    drawn = {ranks: _medians(runs, ranks) for ranks, runs in sizes.items()}
    relative = np.array(above) / smallest
    speedups = relative * np.array([_efficiency(sizes[ranks], sizes[smallest]) for ranks in above])
    of_base = drawn[smallest]
    strays = [of_base.replicates / of_base.value * drawn[n].value / drawn[n].replicates for n in above]
    is_weak = series.scaling == "weak"
    share = float(serial_share(relative, speedups, is_weak))
    replicates = serial_share(relative, speedups * np.stack(strays, axis=-1), is_weak)
    low, high = interval(share, replicates, max(one.widening for one in drawn.values()))
    by_law = relative - share * (relative - 1) if is_weak else 1 / (share + (1 - share) / relative)
    error = float(np.max(np.abs(speedups / by_law - 1)))
    return Law(series.label, "Gustafson" if is_weak else "Amdahl", share, low, high, error, base)


def serial_share(sizes: Floats, speedups: Floats, is_weak: bool) -> Floats:
    """Fit the serial share s of a law by least squares.

    In strong scaling ``1 / speedup = s + (1 - s) / size`` (Amdahl, 1967), in weak scaling
    ``speedup = size - s (size - 1)`` (Gustafson, 1988).

    Args:
        sizes: numbers of ranks, relative to the smallest point, [points].
        speedups: speedups relative to the smallest point, [..., points].
        is_weak: True for weak scaling.

    Returns:
        Serial shares, [...].
    """
    weight, lost = (sizes - 1, sizes - speedups) if is_weak else (1 - 1 / sizes, 1 / speedups - 1 / sizes)
    found: Floats = (lost * weight).sum(axis=-1) / (weight * weight).sum()
    return found


# Resampling of the median step time of a size from its measured steps: the block bootstrap of Künsch, 1989.


class Medians:
    """Median step time of one size in seconds: measured as ``value``, resampled as ``replicates``.

    Args:
        runs: step times after warm-up of each run of this size, seconds, [steps].
        index: index of the size in its series; different sizes draw different samples.
    """

    def __init__(self, runs: Sequence[Sequence[float] | Floats], index: int) -> None:
        chance = np.random.default_rng((SEED, index))
        times = [np.asarray(run, dtype=np.float64) for run in runs]
        drawn = np.stack([_draw(of_run, chance) for of_run in times])  # Shape [runs, replicates].
        count = len(times)
        chosen = chance.integers(0, count, (count, REPLICATES))
        self.value = float(np.mean([np.median(of_run) for of_run in times]))
        self.replicates: Floats = drawn[chosen, np.arange(REPLICATES)].mean(axis=0)
        # Resampling few runs shows a smaller spread than the runs have.
        few = math.sqrt(count / (count - 1)) * student(count - 1) if count > 1 else 0.0
        self.widening = max(few, *map(_widening, times)) / NORMAL


def correlation(times: Floats) -> float:
    """Return the rank correlation (0 to 0.97) of each step time with the previous one.

    Ranks are used so that a single long step does not dominate.
    """
    steps = len(times)
    if steps < 3 or np.ptp(times) == 0:
        return 0.0
    ranks = np.argsort(np.argsort(times)).astype(np.float64)
    rho = float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])
    rho += (1 + 4 * rho) / steps  # A short series shows less correlation than there is.
    return min(0.97, max(0.0, rho))


def block_length(times: Floats) -> int:
    """Return the number of steps in a bootstrap block. It minimizes the error of the spread of the mean."""
    steps, rho = len(times), correlation(times)
    best = (math.sqrt(6) * rho / (1 - rho * rho)) ** (2 / 3) * steps ** (1 / 3)
    return max(1, min(math.ceil(best), steps // 3))


def _widening(times: Floats) -> float:
    """Return the factor that widens a bootstrap interval of one run.

    The factor is Student's quantile, corrected for the correlation that is lost at the ends of blocks.
    """
    length, rho = block_length(times), correlation(times)
    cut = min(0.6, 2 * rho / (1 - rho * rho) / length)
    return student(max(1.0, len(times) / length - 1)) / math.sqrt(1 - cut)


def student(freedom: float) -> float:
    """Return the quantile of Student's distribution that leaves 2.5 % above it, for ``freedom`` degrees of freedom.

    The series is from Abramowitz and Stegun, 26.7.5.
    """
    if freedom <= 2:
        return 12.706 if freedom <= 1 else 4.303
    z, v = NORMAL, freedom
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / v ** (power + 1) for power, term in enumerate(terms))


def _draw(times: Floats, chance: np.random.Generator) -> Floats:
    """Return ``REPLICATES`` medians in seconds, each of ``len(times)`` steps drawn in blocks.

    A block that reaches the last step continues with the first step.
    """
    steps, length = len(times), block_length(times)
    blocks = math.ceil(steps / length)
    found = []
    at_once = max(1, CHUNK // steps)
    for start in range(0, REPLICATES, at_once):
        count = min(at_once, REPLICATES - start)
        begins = chance.integers(0, steps, (count, blocks, 1))
        places = (begins + np.arange(length)).reshape(count, -1)[:, :steps] % steps
        found.append(np.median(times[places], axis=1))
    return np.concatenate(found)


def interval(value: float, replicates: Floats, widening: float) -> tuple[float, float]:
    """Return the 95 % interval of the replicates, with distances from ``value`` multiplied by ``widening``."""
    low, high = np.quantile(replicates, (0.025, 0.975))
    return value - widening * (value - float(low)), value + widening * (float(high) - value)


def ratio(efficiency: float, point: Medians, base: Medians) -> tuple[float, float]:
    """Return the 95 % interval of an efficiency, by the resampled step times of the point and its baseline.

    The lower end is at least 0.
    """
    drawn = efficiency * (point.value / point.replicates) * (base.replicates / base.value)
    low, high = interval(efficiency, drawn, max(point.widening, base.widening))
    return max(0.0, low), high
