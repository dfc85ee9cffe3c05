"""Expected maximum of so many independent draws, from a sample or of a normal distribution. Pure arithmetic."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from launch.runs.columns import Floats

LEAST_TAIL = 10
"""Fewest values that a tail is fitted to."""


def maximum_weights(size: int, draws: int) -> Floats:
    """Weights of ascending values whose weighted sum is the mean of the largest of ``draws``, over all choices.

    That of every choice without replacement is the U-statistic of the maximum (Hoeffding, 1948): its expectation is the
    expected maximum of ``draws`` independent draws, whatever the distribution. ``draws`` is at most ``size``.
    """
    places = np.arange(size, 1, -1)
    # A value's weight from that of the next larger one: C(i - 2, d - 1) / C(i - 1, d - 1).
    ratios = np.maximum(places - draws, 0) / (places - 1)
    return draws / size * np.cumprod(np.append(1.0, ratios))[::-1]


@dataclass(frozen=True, eq=False)
class Sample:
    """Ascending values, and the exponential tail through the largest of them."""

    values: Floats

    @property
    def in_tail(self) -> int:
        """Number of the largest values that the tail is fitted to: as many as the square root of all."""
        return min(max(LEAST_TAIL, math.isqrt(len(self.values))), len(self.values) // 2)

    @property
    def reach(self) -> int:
        """Draws up to which the values speak for themselves: beyond, the few largest would be all that counts."""
        return max(1, len(self.values) // max(1, self.in_tail))

    @property
    def tail(self) -> float:
        """Mean excess of the largest values above the next one: the scale of an exponential tail, by maximum
        likelihood."""
        if not self.in_tail:
            return 0.0
        threshold = self.values[-self.in_tail - 1]
        return float((self.values[-self.in_tail :] - threshold).mean())

    def expected_maximum(self, draws: int) -> float:
        """Return the expected maximum; beyond the reach it grows by the tail's scale with the logarithm of the draws.

        So grows the maximum of every distribution whose tail is exponential, and less that of a normal one or of a
        bounded one: for these it is an upper estimate.
        """
        inside = min(draws, self.reach)
        known = float(maximum_weights(len(self.values), inside) @ self.values)
        return known + self.tail * math.log(draws / inside)


@lru_cache(maxsize=256)
def normal_maximum(draws: int) -> float:
    """Return the expected maximum of independent standard normal draws, by numerical integration."""
    x = np.linspace(-10.0, 10.0, 4001)
    below = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in x.tolist()])
    return float(((x > 0) + 0.5 * (x == 0) - below**draws).sum() * (x[1] - x[0]))
