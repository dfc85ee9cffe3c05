"""Figures as the tables of a report write them: on the terminal, in Markdown and in HTML alike."""

from __future__ import annotations

import math
from collections.abc import Sequence

UNAVAILABLE = "unavailable"
"""Stands for a figure that is not known."""


def count(value: float | None) -> str:
    """A whole number, with commas between the thousands."""
    return UNAVAILABLE if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Throughput with three digits at least: 9.87, 98.7, 987, 98,765."""
    if value is None or value >= 100:
        return count(value)
    return f"{value:.3g}"


def seconds(value: float | None) -> str:
    """A duration in ms or s with three digits."""
    if value is None:
        return UNAVAILABLE
    number, unit = (value * 1000, "ms") if value < 0.9995 else (value, "s")
    return f"{number:#.3g}".rstrip(".") + f" {unit}"


def percent(value: float | None) -> str:
    """A share in percent; small ones, such as the MFU of a small model, keep a digit."""
    if value is None:
        return UNAVAILABLE
    return f"{value * 100:.1f} %"


def percentages(shares: Sequence[float]) -> list[str]:
    """Round shares to tenths of a percent so that they add up to their rounded sum: 100.0 where that is 1.

    Those whose digits behind are largest are rounded up (largest remainder method).
    """
    tenths = [1000 * share for share in shares]
    below = [math.floor(value) for value in tenths]
    order = sorted(range(len(tenths)), key=lambda index: below[index] - tenths[index])
    for index in order[: round(sum(tenths)) - sum(below)]:
        below[index] += 1
    return [f"{value / 10:.1f}" for value in below]


def run_time(value: float | None) -> str:
    """A long duration: 12.3 s, 4 min 05 s, 2 h 10 min."""
    if value is None or value < 99.95:
        return seconds(value)
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def amount(value: float | None) -> str:
    """A sum of money, or hours, with two decimals."""
    return UNAVAILABLE if value is None else f"{value:,.2f}"


def told(value: float | None, unit: str) -> str:
    """Write a figure with four digits, and its unit."""
    if value is None:
        return UNAVAILABLE
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.4g} {unit}"
