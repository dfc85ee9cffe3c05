"""Figures that a report takes from the step records of one run: its steps, and the times of its ranks.

Plain values, so that a command which only shows figures loads no numpy. Must not know how they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

WARMUP_STEPS = 5
"""Left out at the start of each attempt: they pay for memory pools, caches, connections and DDP's second bucketing."""
LEAST_SHARE = 0.02
"""Share of the step time below which nobody is called slow: a clock read at another moment makes as much."""


@dataclass(frozen=True)
class Step:
    """One optimizer step over all ranks: the time of the slowest rank, the work of all of them."""

    step: int
    attempt: int
    time_s: float
    work: float | None
    """In the unit of the point; None where neither the ranks nor the set-up tell."""
    mfu_palm: float | None
    recorded_by: int = 1
    """Ranks whose own work was added up."""
    phases: Mapping[str, float] | None = None
    """Phase -> seconds of it in ``time_s``, on the rank with the longest own time: see ``losses``; they add up to it.
    None where the ranks did not all say the same."""


@dataclass(frozen=True)
class RankTime:
    """Times of one rank, means over the steps after warm-up, in seconds."""

    rank: int
    own_s: float
    """Its step time, less what it says it waited in collectives (``comm_s``)."""
    excess_s: float
    """``own_s`` above the median of the other ranks; below it where negative."""
    data_wait_s: float | None
    wait_excess_s: float | None
    """``data_wait_s`` above the median of the other ranks."""
    is_slow: bool = False
    """True where it takes longer than the others beyond their spread, and does so throughout the run."""
    waits_long: bool = False
    """True where it waits longer for its data than the others, in the same sense."""


@dataclass(frozen=True)
class RankTimes:
    """Times of all ranks of a run that recorded steps."""

    ranks: tuple[RankTime, ...]
    windows: tuple[tuple[int, int], ...]
    """First and last step of each window of the run."""
    excess_s: tuple[tuple[float, ...], ...]
    """[ranks, windows]: mean of a rank's own time in a window above the median of all ranks there."""
    is_net: bool = False
    """True where waiting in collectives was recorded and is taken off."""


@dataclass(frozen=True)
class UnreadLines:
    """Lines among the step records of one rank in one attempt that are no records: cut by a crash, or garbled."""

    rank: int
    attempt: int | None
    """None where nothing in the file of the rank tells it."""
    lines: int


@dataclass(frozen=True)
class StepReading:
    """Everything that a report takes from the step records of a run."""

    steps: tuple[Step, ...] = ()
    """In order, of attempts with the set-up of the last one that had all nodes of the run."""
    rank_times: RankTimes | None = None
    unit: str | None = None
    """Unit of the work, as the set-up states it or the records show it; None where nothing says."""
    last_step: int | None = None
    loss: float | None = None
    """Training loss of the last step."""
    attempt: int = 0
    """Attempt whose set-up the steps have."""
    attempt_steps: Mapping[int, int] = field(default_factory=dict)
    """Attempt -> steps that it made, and that no later one made again."""
    bf16_ratio: float | None = None
    """MFU of the bf16 peak over that of the peak in the precision of the run, by the last record."""
    attempt_times: Mapping[int, tuple[float, float]] | None = None
    """Attempt -> times of its first and its last record that count, by the first rank."""
    unread: tuple[UnreadLines, ...] = ()
    """By rank, and by attempt in the order of its file."""
