"""Launching the program that counts (``tests/support/programs/counting.py``), and reading what it has counted."""

from __future__ import annotations

import json
import re
from pathlib import Path

from launch.runs.folder import RunFolder
from tests.support.scripts import printed

PROGRAM = Path(__file__).parent / "programs" / "counting.py"
COUNTING = ("workload=script", f"script.path={PROGRAM}", "script.resumes=true")


def options(**values: object) -> list[str]:
    """Options of the program, as words of a command line."""
    return [f"script.options.{name.replace('_', '-')}={value}" for name, value in values.items()]


def sum_of_squares(steps: int) -> int:
    """What it has counted after so many steps, in closed form."""
    return steps * (steps + 1) * (2 * steps + 1) // 6


def checkpoint(folder: RunFolder) -> dict[str, int]:
    """Its newest checkpoint: step, sum, and the attempt that wrote it."""
    found = json.loads((folder.checkpoints / "newest.json").read_text())
    assert isinstance(found, dict) and found["sum"] == sum_of_squares(found["step"]), "each step once"
    return found


def from_step(folder: RunFolder, attempt: int, rank: int = 0) -> int | None:
    """Step that an attempt has gone on from; None where it did not come so far."""
    found = re.search(r"^goes on from step (\d+)$", printed(folder, attempt, rank), re.MULTILINE)
    return int(found[1]) if found else None
