"""Series: points of a sweep that differ only in size, and their statistics: intervals, repeats, scaling laws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice

import numpy as np

from launch.errors import ConfigError
from launch.report.points import Point, disturbs
from launch.report.read import Environment, Floats
from launch.report.selection import Selection, source_labels
from launch.runs.find import labels_inside, point_labels, tells_apart
from launch.runs.overrides import typed_key

SIZE_KEYS = frozenset({"nodes", "ranks_per_node"})
"""Keys whose values may differ between the points of a series."""


def _model(environment: Environment) -> str | None:
    if environment.model is None:
        return None
    parameters = "" if environment.parameters is None else f" with {environment.parameters:,} parameters"
    joined = " and" if parameters else " with"
    length = "" if environment.block_size is None else f"{joined} sequences of {environment.block_size} tokens"
    return f"{environment.model}{parameters}{length}"


def batch_text(environment: Environment) -> str | None:
    """Return the batch size as text, such as ``a global batch of 64 sequences``.

    If the run recorded no number of sequences, the text is the recorded work of a step in the unit of the program, such
    as ``1,024 samples per step``. None if neither is recorded. In weak scaling, the text is about one rank, otherwise
    about all ranks together.
    """
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
    """Return an amount of work as text for people, such as 1,024 samples. Without a unit: units of work."""
    number = f"{work:,.0f}" if work == round(work) or work >= 1000 else f"{work:.3g}"
    return f"{number} {unit or 'units of work'}"


CONDITIONS: Mapping[str, Callable[[Environment], str | None]] = {
    "hardware": lambda e: e.device_names,
    "precision": lambda e: e.precision,
    "model": _model,
    "kind of scaling": lambda e: (
        None if e.weak_scaling is None else f"{'weak' if e.weak_scaling else 'strong'} scaling"
    ),
    "batch": batch_text,
    "unit": lambda e: e.unit,
}
"""Property -> function that returns the value of the property in an environment as text, None if not recorded.

All measured points of a series must have equal values of these properties.
"""
MADE_WITH: Mapping[str, Callable[[Point], str | None]] = {
    "cluster": lambda p: p.cluster and f"cluster={p.cluster}",
    "software": lambda p: f"torch {p.environment.torch}" if p.environment and p.environment.torch else None,
    "code": lambda p: f"commit {p.environment.code}" if p.environment and p.environment.code else None,
}
"""Property -> function that returns the value of the property at a point as text, None if not recorded.

These properties may change between two commands. Points with different values belong to different series.
"""


@dataclass(frozen=True)
class Series:
    """Points that differ only in size, smallest first.

    ``label`` distinguishes several series; it is empty if there is only one.
    """

    label: str
    members: tuple[Point, ...]

    @property
    def smallest(self) -> Point | None:
        """Smallest point with figures; None if no point has figures."""
        return next((point for point in self.members if point.figures is not None), None)

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
        """True if the series has several points. A single point has no speedup."""
        return len(self.members) > 1

    @property
    def of(self) -> str:
        """Phrase `` of LABEL`` to append to a noun in a sentence; empty if there is only one series."""
        return f" of {self.label}" if self.label else ""


def split(points: Sequence[Point]) -> list[Series]:
    """Return the series of points, in order of appearance.

    The points of a series have equal overrides, except for the size. They also have the same cluster, software, code
    and, in a comparison, the same source. Points of different clusters are not compared, because processes of one
    machine do not show how nodes scale.

    Raises:
        ConfigError: points of one series were measured under different conditions.
    """
    groups = defaultdict[tuple[str, frozenset[str]], list[Point]](list)
    for point in points:
        groups[point.source, identity(point)].append(point)
    for name, value_of in MADE_WITH.items():
        whole, groups = groups, defaultdict(list)
        for (source, alike), group in whole.items():
            values = list(made_with(group)[name])
            for point in group:
                # A point that does not record the property belongs to the first group.
                own = {value_of(point) or values[0]} if len(values) > 1 else set()
                groups[source, alike | own].append(point)
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
    """Return property of ``MADE_WITH`` -> value -> titles of the points with this value.

    Points without figures are left out.
    """
    found: dict[str, dict[str, list[str]]] = {}
    for name, value_of in MADE_WITH.items():
        found[name] = {}
        for point in points:
            if point.figures is not None and (value := value_of(point)) is not None:
                found[name].setdefault(value, []).append(point.title)
    return found


def identity(point: Point) -> frozenset[str]:
    """Return the overrides of a point that distinguish it from other points, without those of ``SIZE_KEYS``."""
    return frozenset(one for one in filter(tells_apart, point.overrides) if typed_key(one) not in SIZE_KEYS)


def _require_comparable(series: Series) -> None:
    first = series.smallest
    for other in series.members:
        if first is None or other.figures is None:
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
    """Return the points with labels that distinguish them from each other.

    The label of a single point distinguishes it from the other runs in its parent folder.
    """
    if len(points) == 1:
        path = points[0].path.absolute()
        return [replace(points[0], label=labels_inside([path.parent]).get(path, ""))]
    labels = point_labels([(point.path, point.overrides) for point in points])
    return [replace(point, label=label) for point, label in zip(points, labels, strict=True)]


def label_selected(selection: Selection, points: Sequence[Point]) -> list[Point]:
    """Return the points with their labels, and with the titles of the points that disturbed them.

    A point disturbs another if both made steps at the same time on shared cores, on a shared GPU or in a shared job.

    ``points`` were read from the runs of ``selection``, in the same order. In a comparison, each label begins with the
    point's source.
    """
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


# 95 % intervals of the efficiencies of a series.


SEED = 20_240_229
REPLICATES = 400
NORMAL = 1.959964
"""97.5 % quantile of the standard normal distribution."""


def efficiency_intervals(series: Series) -> dict[str, tuple[float, float]]:
    """Return name of a point -> 95 % interval of its efficiency. The smallest point has none.

    Empty if the series has no efficiencies, or if steps were not timed one by one.
    """
    base = series.smallest
    runs = [point for point in series.members if point.has_efficiency]
    is_claimed = base is not None and base.has_efficiency and series.has_rates
    # Means over several steps do not show the spread of single steps.
    is_coarse = any(run.figures is not None and run.figures.resolution_s for run in runs)
    if not is_claimed or is_coarse or len(runs) < 2:
        return {}
    drawn = [Medians(run.steps.after_warmup().time_s, at) for at, run in enumerate(runs)]
    rates = [run.figures.throughput if run.figures else None for run in runs]
    found = {}
    for run, rate, own in zip(runs[1:], rates[1:], drawn[1:], strict=True):
        assert rate and rates[0] and run.ranks and runs[0].ranks
        found[run.name] = ratio(rate / rates[0] * runs[0].ranks / run.ranks, own, drawn[0])
    return found


def fit_not_negative(rows: Floats) -> Floats:
    """Return a weight for each column of ``rows``, so that the weighted sum of each row is about 1.

    The weights are fitted by least squares. No weight is negative. If two fits are equally good, the fit with fewer
    weights above 0 is returned. ``rows`` has the shape [equations, weights], the result [weights].
    """
    least, best = math.inf, np.zeros(rows.shape[1])
    for count in range(1, min(rows.shape) + 1):
        for chosen in map(list, combinations(range(rows.shape[1]), count)):
            weights = np.zeros(rows.shape[1])
            weights[chosen], *_ = np.linalg.lstsq(rows[:, chosen], np.ones(len(rows)), rcond=None)
            error = float(((rows @ weights - 1) ** 2).sum())
            if (weights >= 0).all() and error < least - 1e-12:
                least, best = error, weights
    return best


# Resampling of the median step time of a size from its measured steps: the block bootstrap of Künsch, 1989.


class Medians:
    """Median step time of one run in seconds, and the medians of resampled steps.

    Args:
        times: step times after warm-up in seconds, [steps].
        index: index of the run in its series. It is a part of the random seed, so that each run draws its own samples.
    """

    def __init__(self, times: Floats, index: int) -> None:
        self.value = float(np.median(times))
        steps, length, rho = len(times), block_length(times), correlation(times)
        chance, drawn = np.random.default_rng((SEED, index)), []
        for _ in range(REPLICATES):
            # A block that reaches the last step continues with the first step.
            begins = chance.integers(0, steps, (math.ceil(steps / length), 1))
            places = (begins + np.arange(length)).ravel()[:steps] % steps
            drawn.append(np.median(times[places]))
        self.replicates = np.array(drawn)
        """Median step times in seconds of the bootstrap's samples, [REPLICATES].

        A sample has as many steps as the run, drawn in blocks of successive steps.
        """
        # Student's quantile, corrected for the correlation that is lost at the ends of blocks.
        cut = min(0.6, 2 * rho / (1 - rho * rho) / length)
        self.widening = student(max(1.0, steps / length - 1)) / math.sqrt(1 - cut) / NORMAL
        """Factor by which the bootstrap interval of the run is widened.

        Without this factor, the interval of a run with few or correlated steps is too narrow.
        """


def correlation(times: Floats) -> float:
    """Return the rank correlation between the times of successive steps, limited to 0 to 0.97.

    The correlation is of ranks, so that a single long step does not dominate. ``times`` are step times in seconds,
    [steps]. The result is 0 for fewer than three steps, and for equal times.
    """
    steps = len(times)
    if steps < 3 or np.ptp(times) == 0:
        return 0.0
    ranks = np.argsort(np.argsort(times)).astype(np.float64)
    rho = float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])
    rho += (1 + 4 * rho) / steps  # A short series shows less correlation than there is.
    return min(0.97, max(0.0, rho))


def block_length(times: Floats) -> int:
    """Return the number of successive steps that the bootstrap draws together, as one block.

    A block of this length gives the best estimate of the spread of a mean. More correlated steps need longer blocks.

    ``times`` are step times in seconds, [steps].
    """
    steps, rho = len(times), correlation(times)
    best = (math.sqrt(6) * rho / (1 - rho * rho)) ** (2 / 3) * steps ** (1 / 3)
    return max(1, min(math.ceil(best), steps // 3))


def student(freedom: float) -> float:
    """Return the 97.5 % quantile of Student's t distribution with ``freedom`` degrees of freedom.

    The series is from Abramowitz and Stegun, 26.7.5.
    """
    if freedom <= 2:
        return 12.706 if freedom <= 1 else 4.303
    z, v = NORMAL, freedom
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / v ** (power + 1) for power, term in enumerate(terms))


def ratio(efficiency: float, point: Medians, base: Medians) -> tuple[float, float]:
    """Return the (lower, upper) end of the 95 % interval of an efficiency, by the bootstrap.

    The distances of the ends from the efficiency are multiplied by the larger ``widening`` of the two runs. The lower
    end is at least 0.

    Args:
        efficiency: efficiency of the point.
        point: resampled step times of the point.
        base: resampled step times of the smallest point, to which the point is compared.
    """
    drawn = efficiency * (point.value / point.replicates) * (base.replicates / base.value)
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    widening = max(point.widening, base.widening)
    return max(0.0, efficiency - widening * (efficiency - low)), efficiency + widening * (high - efficiency)
