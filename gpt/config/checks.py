"""Checks that the parts of the schema share, and numbers for their messages. Torch-free."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib.metadata import entry_points

from launch.errors import ConfigError, closest


def nearest_divisor(number: int, wish: int) -> int:
    """Find the divisor of ``number`` that is nearest to ``wish``, for error messages."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))


def divisors(number: int) -> list[int]:
    """List the divisors of a number, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def check_custom_name(key: str, name: str, ours: Iterable[str]) -> None:
    """Raise ConfigError unless ``name`` can stand for something of the user's; imports nothing.

    Either ``package.module:attribute``, or an entry point of the group ``gpt.<last word of key>``.
    """
    installed = entry_points(group=f"gpt.{key.rpartition('.')[2]}").names
    module, colon, attribute = name.partition(":")
    if (colon and module and attribute) or name in installed:
        return
    names = [*ours, *sorted(installed)]
    raise ConfigError(
        f"{key}={name}",
        f"one of {', '.join(names)}, or one of your own as package.module:NAME",
        f"{key}={(closest(name, names) or names)[0]}",
    )


def is_importable(package: str) -> bool:
    """Tell whether a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except ImportError:
        return False
