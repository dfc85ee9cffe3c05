"""Minimum and root of a function of one number, by halving. Pure arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

GOLDEN = (math.sqrt(5) - 1) / 2


def root(function: Callable[[float], float], low: float, high: float, rounds: int = 60) -> float:
    """Zero of a falling function of a positive number, by bisection of its logarithm.

    The nearer end where it does not cross zero between ``low`` and ``high``.
    """
    if function(low) <= 0:
        return low
    if function(high) >= 0:
        return high
    for _ in range(rounds):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if function(middle) > 0 else (low, middle)
    return math.sqrt(low * high)


def minimum(function: Callable[[float], float], low: float, high: float, rounds: int = 48) -> float:
    """Argument of the minimum of a function of a positive number, by golden sections of its logarithm (Kiefer, 1953).

    Exact to the tolerance of the rounds where it has one minimum between ``low`` and ``high``.
    """
    a, b = math.log(low), math.log(high)
    for _ in range(rounds):
        left, right = b - GOLDEN * (b - a), a + GOLDEN * (b - a)
        if function(math.exp(left)) <= function(math.exp(right)):
            b = right
        else:
            a = left
    return math.exp((a + b) / 2)
