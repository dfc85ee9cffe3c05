"""Documents that a program makes up."""

from __future__ import annotations

import random
from collections.abc import Iterator

from gpt.config import DataConfig


def sums(config: DataConfig) -> Iterator[str]:
    """Yield additions such as ``17+25=42``: ``data.options.count`` of them, the same ones every time."""
    numbers = random.Random(int(config.options.get("seed", 0)))
    for _ in range(int(config.options.get("count", 10_000))):
        a, b = numbers.randrange(100), numbers.randrange(100)
        yield f"{a}+{b}={a + b}\n"
