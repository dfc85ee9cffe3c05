"""A checkpoint on disk, whoever wrote it: what ``launch.verify`` asks of a workload.

Torch-free. Must not know what is in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SavedCheckpoint:
    """Description of one checkpoint on disk, and how to check it."""

    path: Path
    step: int | None
    """Step that a run would go on from; None of one that no run will load."""
    size: int
    """Bytes that checking it reads."""
    find_damage: Callable[[Callable[[int], None]], tuple[str, ...] | None]
    """Read all of it, telling the bytes as it goes. Returns what is damaged, a line each; None where it is deleted."""
