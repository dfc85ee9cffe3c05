"""Intervals of efficiency and of the laws that are fitted to it, by a block bootstrap over steps and repeats.

Step times that follow each other are alike: what disturbs a machine lasts for many steps. So blocks of steps are drawn
instead of steps (circular block bootstrap: Politis and Romano, 1992), as long as the autocorrelation of the run asks
for (Carlstein, 1986), and a run of few blocks gets a wider interval, as Student's distribution has it. Must not know
how a report shows it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

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
    """Estimate the correlation of each step with the one before, by their order: one that hangs must not decide."""
    steps = len(times)
    if steps < 3 or np.ptp(times) == 0:
        return 0.0
    ranks = np.argsort(np.argsort(times)).astype(np.float64)
    rho = float(np.corrcoef(ranks[:-1], ranks[1:])[0, 1])
    rho += (1 + 4 * rho) / steps  # a short series shows less of it than there is
    return min(0.97, max(0.0, rho))


def block_length(times: Floats) -> int:
    """Choose how many steps belong together, so that the spread of their means is told with the least error."""
    steps, rho = len(times), correlation(times)
    best = (math.sqrt(6) * rho / (1 - rho * rho)) ** (2 / 3) * steps ** (1 / 3)
    return max(1, min(math.ceil(best), steps // 3))


def _widening(times: Floats) -> float:
    """Quantile for the blocks of one run: of Student's distribution, and what their ends cut of the correlation."""
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
    """Medians of as many steps, drawn in blocks that go round at the end."""
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
