"""Statistics over the points of a series: intervals of efficiencies, repeats, and scaling laws."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from launch.report.series import Series
from launch.report.steps import drop_warmup

Floats = npt.NDArray[np.float64]

SEED = 20_240_229
REPLICATES = 400
NORMAL = 1.959964
"""Quantile of the normal distribution that leaves 2.5 % above it."""
CHUNK = 2_000_000
"""Step times that are drawn at once."""


class Medians:
    """The median step time of one size, drawn anew many times.

    Args:
        runs: step times after warm-up of each run of this size, seconds; [steps].
        index: of the size in its series; no two sizes draw the same.
    """

    def __init__(self, runs: Sequence[Sequence[float]], index: int) -> None:
        chance = np.random.default_rng((SEED, index))
        times = [np.asarray(run, dtype=np.float64) for run in runs]
        drawn = np.stack([_draw(of_run, chance) for of_run in times])  # [runs, replicates]
        count = len(times)
        chosen = chance.integers(0, count, (count, REPLICATES))
        self.value = float(np.mean([np.median(of_run) for of_run in times]))
        self.replicates: Floats = drawn[chosen, np.arange(REPLICATES)].mean(axis=0)
        # Drawing few runs from themselves shows a smaller spread than theirs.
        few = math.sqrt(count / (count - 1)) * student(count - 1) if count > 1 else 0.0
        self.widening = max(few, *(_widening(of_run) for of_run in times)) / NORMAL


def correlation(times: Floats) -> float:
    """Estimate the correlation of each step with the one before, by their order: one long step must not decide."""
    steps = len(times)
    if steps < 3 or np.ptp(times) == 0:
        return 0.0
    ranks = np.argsort(np.argsort(times)).astype(np.float64)
    rho = float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])
    rho += (1 + 4 * rho) / steps  # a short series shows less of it than there is
    return min(0.97, max(0.0, rho))


def block_length(times: Floats) -> int:
    """Return how many steps are drawn together, so that the error of the spread of their means is least."""
    steps, rho = len(times), correlation(times)
    best = (math.sqrt(6) * rho / (1 - rho * rho)) ** (2 / 3) * steps ** (1 / 3)
    return max(1, min(math.ceil(best), steps // 3))


def _widening(times: Floats) -> float:
    """Return the quantile for the blocks of one run: Student's, and what their ends cut of the correlation."""
    length, rho = block_length(times), correlation(times)
    cut = min(0.6, 2 * rho / (1 - rho * rho) / length)
    return student(max(1.0, len(times) / length - 1)) / math.sqrt(1 - cut)


def student(freedom: float) -> float:
    """Return the quantile of Student's distribution that leaves 2.5 % above it (Abramowitz and Stegun, 26.7.5)."""
    if freedom <= 1:
        return 12.706
    if freedom <= 2:
        return 4.303
    z, v = NORMAL, freedom
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return z + sum(term / v ** (power + 1) for power, term in enumerate(terms))


def _draw(times: Floats, chance: np.random.Generator) -> Floats:
    """Return medians of as many steps, drawn in blocks that continue at the first step."""
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
    """Return the middle 95 % of the replicates, widened around the value."""
    low, high = np.quantile(replicates, (0.025, 0.975))
    return value - widening * (value - float(low)), value + widening * (float(high) - value)


def ratio(efficiency: float, point: Medians, base: Medians) -> tuple[float, float]:
    """Return the interval of an efficiency, which is inverse to the point's step time, and goes as the base's.

    An efficiency is not negative: a widened interval ends at zero.
    """
    drawn = efficiency * (point.value / point.replicates) * (base.replicates / base.value)
    low, high = interval(efficiency, drawn, max(point.widening, base.widening))
    return max(0.0, low), high


def amdahl(sizes: Floats, speedups: Floats) -> Floats:
    """Fit the serial share s of ``1 / speedup = s + (1 - s) / size`` by least squares; Amdahl, 1967.

    Args:
        sizes: ranks over those of the smallest point, [points].
        speedups: against the smallest point, [..., points].
    """
    weight = 1 - 1 / sizes
    found: Floats = ((1 / speedups - 1 / sizes) * weight).sum(axis=-1) / (weight * weight).sum()
    return found


def gustafson(sizes: Floats, speedups: Floats) -> Floats:
    """Fit the serial share s of ``speedup = size - s (size - 1)`` by least squares; Gustafson, 1988.

    Shapes as for ``amdahl``.
    """
    weight = sizes - 1
    found: Floats = ((sizes - speedups) * weight).sum(axis=-1) / (weight * weight).sum()
    return found


# Findings on the points of a series: intervals of their efficiencies, repeats of one size, and scaling laws.


LEAST_SIZES = 3
"""A law of one parameter that is fitted to fewer sizes is no finding."""


@dataclass(frozen=True)
class Law:
    """A law that was fitted to a series: Amdahl's for strong, Gustafson's for weak scaling."""

    series: str
    name: str
    serial_share: float
    low: float
    high: float
    """Ends of its 95 % interval."""
    largest_error: float
    """Largest distance of a measured speedup from the law's, as a share of the law's."""
    base: str
    """Label of the smallest point."""


@dataclass(frozen=True)
class Repeats:
    """Several runs of one size in a series, and the efficiency by the mean of their step times."""

    ranks: int
    count: int
    efficiency: float
    low: float
    high: float


@dataclass(frozen=True)
class SeriesFindings:
    """Findings on one series."""

    intervals: Mapping[str, tuple[float, float]]
    """Name of a point -> 95 % interval of its efficiency."""
    repeats: tuple[Repeats, ...]
    law: Law | None


@dataclass(frozen=True)
class _Run:
    """A point whose efficiency is claimed."""

    name: str
    ranks: int
    step_time_s: float
    throughput: float
    times_s: Sequence[float]
    """After warm-up."""


def find(series: Series) -> SeriesFindings:
    """Return the findings on a series; none if no efficiency is claimed."""
    base = series.smallest
    runs = [
        _Run(
            member.point.name,
            member.ranks or 0,
            member.figures.step_time_s,
            member.figures.throughput or 0.0,
            [step.time_s for step in drop_warmup(member.point.steps)],
        )
        for member in series.members
        if member.figures is not None and member.has_efficiency
    ]
    is_claimed = base is not None and base.has_efficiency and series.compares and series.has_rates
    if base is None or not is_claimed or len(runs) < 2:
        return SeriesFindings({}, (), None)
    drawn = [Medians([run.times_s], at) for at, run in enumerate(runs)]
    smallest, *_ = runs  # the points of a series are in the order of their sizes
    intervals = {
        run.name: ratio(_efficiency([run], [smallest]), own, drawn[0])
        for run, own in zip(runs[1:], drawn[1:], strict=True)
    }
    sizes: dict[int, list[_Run]] = defaultdict(list)
    for run in runs:
        sizes[run.ranks].append(run)
    of_base = _medians(sizes[smallest.ranks], len(runs))
    repeats = []
    for at, (ranks, of_size) in enumerate(sizes.items(), start=len(runs) + 1):
        if len(of_size) > 1 and ranks != smallest.ranks:
            efficiency = _efficiency(of_size, sizes[smallest.ranks])
            ends = ratio(efficiency, _medians(of_size, at), of_base)
            repeats.append(Repeats(ranks, len(of_size), efficiency, *ends))
    return SeriesFindings(intervals, tuple(repeats), _law(series, sizes, base.point.title))


def _medians(runs: Sequence[_Run], index: int) -> Medians:
    return Medians([run.times_s for run in runs], index)


def _efficiency(runs: Sequence[_Run], base: Sequence[_Run]) -> float:
    """Return the efficiency of a size by the mean step time of its runs, and of those of the smallest size."""
    one, smallest = runs[0], base[0]
    here = sum(run.step_time_s for run in runs) / len(runs)
    there = sum(run.step_time_s for run in base) / len(base)
    scale = (one.step_time_s / here) * (there / smallest.step_time_s)
    return one.throughput / smallest.throughput * smallest.ranks / one.ranks * scale


def _law(series: Series, sizes: Mapping[int, Sequence[_Run]], base: str) -> Law | None:
    """Fit the law of the kind of scaling to all sizes above the smallest; None if there are too few."""
    if len(sizes) < LEAST_SIZES or series.scaling is None:
        return None
    smallest, *above = sizes
    drawn = {ranks: _medians(runs, ranks) for ranks, runs in sizes.items()}
    relative = np.array(above) / smallest
    speedups = relative * np.array([_efficiency(sizes[ranks], sizes[smallest]) for ranks in above])
    of_base = drawn[smallest]
    strays = [of_base.replicates / of_base.value * drawn[n].value / drawn[n].replicates for n in above]
    is_weak = series.scaling == "weak"
    fit = gustafson if is_weak else amdahl
    share = float(fit(relative, speedups))
    replicates = fit(relative, speedups * np.stack(strays, axis=-1))
    low, high = interval(share, replicates, max(one.widening for one in drawn.values()))
    by_law = relative - share * (relative - 1) if is_weak else 1 / (share + (1 - share) / relative)
    error = float(np.max(np.abs(speedups / by_law - 1)))
    return Law(series.label, "Gustafson" if is_weak else "Amdahl", share, low, high, error, base)


def law_notes(found: SeriesFindings, series: Series) -> list[str]:
    """Return the notes on the findings of one series."""
    told = []
    titles = {member.point.name: member.point.title for member in series.members}
    of = f" of {series.label}" if series.label else ""
    if found.intervals:
        ends = ", ".join(f"{titles[name]} {_ends(*pair)}" for name, pair in found.intervals.items())
        told.append(
            f"95 % intervals of efficiency{of}, by a block bootstrap over the steps of both points: {ends}. They tell "
            "of these runs; another run may lie elsewhere."
        )
    for size in found.repeats:
        told.append(
            f"{size.count} runs of {size.ranks} ranks{of} have together an efficiency of {100 * size.efficiency:.1f} % "
            f"(95 % interval {_ends(size.low, size.high)}, over steps and runs)."
        )
    if (law := found.law) is not None:
        limit = ""
        if law.name == "Amdahl" and law.low > 0:
            limit = f" By it, no number of ranks is more than {1 / law.serial_share:.3g} times as fast as {law.base}."
        told.append(
            f"{law.name}'s law fits the speedups{of} with a serial share of {100 * law.serial_share:.2f} % "
            f"(95 % interval {100 * law.low:.2f} to {100 * law.high:.2f} %); no measured speedup is farther from it "
            f"than {100 * law.largest_error:.1f} %.{limit}"
        )
    return told


def _ends(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"
