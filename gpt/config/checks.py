"""Checks that the parts of the schema share, and numbers for their messages. Torch-free."""

from __future__ import annotations

import importlib.util


def nearest_divisor(number: int, wish: int) -> int:
    """Find the divisor of ``number`` that is nearest to ``wish``, for error messages."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def is_importable(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False
