"""Checks that the parts of the schema share, and words for their messages. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from launch.errors import ConfigError


def require_positive(key: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is above zero."""
    if not value > 0:
        raise ConfigError(f"{key}={value}", "a number above 0", f"{key}=1")


def require_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless ``low <= value <= high``."""
    if not low <= value <= high:
        bound = f"at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise ConfigError(f"{key}={value}", bound, f"{key}={low:g}")


def nearest_divisor(number: int, wish: int) -> int:
    """The divisor of ``number`` that lies nearest to ``wish``, for error messages."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))


def closest(word: str, choices: Iterable[str]) -> list[str]:
    """Up to three of ``choices`` that look like ``word``, or begin like it, best first, for error messages."""
    known = sorted(choices)
    alike = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return alike or [choice for choice in known if choice[:3] == word[:3]][:3]


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
