"""Breakdown of the steps that a profiler watched, over all ranks of a run: computing, communication, copies, idle time.

Must not know how a step is watched, nor how a report looks.
"""

from __future__ import annotations

from dataclasses import dataclass

from launch.runs.columns import read_columns
from launch.runs.folder import RunFolder

SHOWN = {"compute": "computing", "exposed": "exposed communication", "copies": "copies", "idle": "idle"}
"""Part -> its name for people; these make the whole step. A CPU tells no copies."""
FIELDS = {part: f"breakdown_{part}_s" for part in (*SHOWN, "comm")}


@dataclass(frozen=True)
class StepBreakdown:
    """Means over the watched steps of all ranks."""

    steps: int
    """Steps that the first rank has watched."""
    ranks: int
    parts_s: dict[str, float]
    """Part of ``SHOWN``, and ``comm``, all communication -> seconds."""

    @property
    def step_s(self) -> float:
        """Mean length of the watched steps."""
        return sum(seconds for part, seconds in self.parts_s.items() if part in SHOWN)

    def text(self) -> str:
        """Name the shares of the parts, for people."""
        shares = {part: 100 * seconds / self.step_s for part, seconds in self.parts_s.items()}
        told = [f"{name} {shares[part]:.1f} %" for part, name in SHOWN.items() if part in shares]
        return f"{', '.join(told)}; communication, hidden or not, takes {shares['comm']:.1f} %"


def read_breakdown(run: RunFolder) -> StepBreakdown | None:
    """Read the watched steps of a run; None where there is none. Only the first rank's file is read to see that."""
    sums, counts = dict.fromkeys(FIELDS, 0.0), dict.fromkeys(FIELDS, 0)
    steps = ranks = 0
    for rank in run.metric_ranks():
        columns = read_columns(run.metrics(rank), tuple(FIELDS.values()))
        watched = int(columns.known[FIELDS["idle"]].sum())
        if not watched:
            if not ranks:
                return None
            continue
        steps, ranks = steps or watched, ranks + 1
        for part, name in FIELDS.items():
            known = columns.known[name]
            sums[part] += float(columns.values[name][known].sum())
            counts[part] += int(known.sum())
    if not ranks:
        return None
    return StepBreakdown(steps, ranks, {part: sums[part] / counts[part] for part in FIELDS if counts[part]})
