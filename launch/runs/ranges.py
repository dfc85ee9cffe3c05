"""Range checks that schemas share, and the look-alikes of a mistyped name, for error messages. Torch-free."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from launch.errors import ConfigError

EXAMPLES = {"optim.lr": "0.001", "optim.min_lr": "0.0001"}
"""Values to propose where 1, the usual proposal, would cost a run: nothing learns at such a rate."""


def require_positive(key: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is above zero."""
    if not value > 0:
        raise ConfigError(f"{key}={value}", "a number above 0", f"{key}={EXAMPLES.get(key, '1')}")


def require_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless ``low <= value <= high``."""
    if not low <= value <= high:
        bound = f"at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise ConfigError(f"{key}={value}", bound, f"{key}={low:g}")


def closest(name: str, choices: Iterable[str]) -> list[str]:
    """Up to three of ``choices`` that look like ``name``, or begin like it, best first, for error messages."""
    known = sorted(choices)
    alike = [choice for choice in known if choice.lower() == name.lower() != choice]
    alike = alike or difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    return alike or [choice for choice in known if choice[:3].lower() == name[:3].lower()][:3]
