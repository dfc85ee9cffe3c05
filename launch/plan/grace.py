"""How long a run takes to save and leave when it is told to: the step under way, and the save after it.

Owns the estimate, from what was measured in run folders.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from launch.runs.folder import RunFolder
from launch.runs.records import RECENT, recent_records


@dataclass(frozen=True)
class Measured:
    """The longest of the last steps and saves of a run, seconds."""

    save_s: float
    step_s: float
    folder: Path

    @property
    def stop_s(self) -> float:
        """A signal that comes at the start of a step waits for its end; then the run saves."""
        return self.step_s + self.save_s


def measure(folder: RunFolder) -> Measured | None:
    """What the ledger and the step records say; None where no save was measured yet."""
    saves = [e["seconds"] for e in folder.read_events() if e["event"] == "saved" and "seconds" in e]
    if not saves:
        return None
    steps = [record["step_time_s"] for record in recent_records(folder.metrics(0))]
    return Measured(max(saves[-RECENT:]), max(steps, default=0.0), folder.path)


def slowest(measured: Iterable[Measured | None]) -> Measured | None:
    """The one that takes longest; None where nothing was measured."""
    return max((m for m in measured if m is not None), key=lambda m: m.stop_s, default=None)
