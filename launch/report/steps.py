"""Steps of a run over all ranks, times of its ranks, and the phases that lost efficiency goes to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

WARMUP_STEPS = 5
"""Left out at the start of each attempt: they pay for memory pools, caches, connections and DDP's second bucketing."""
LEAST_SHARE = 0.02
"""Share of the step time below which no rank is called slow: reading the clock at another moment makes as much."""


@dataclass(frozen=True)
class Step:
    """One optimizer step over all ranks: the time of the slowest rank, the work of all of them."""

    step: int
    attempt: int
    time_s: float
    work: float | None
    """In the unit of the point; None if neither the ranks nor the set-up say."""
    mfu_palm: float | None
    recorded_by: int = 1
    """Ranks whose own work was added up."""
    phases: Mapping[str, float] | None = None
    """Phase of ``LOSSES`` -> seconds of ``time_s``, on the rank with the longest own time; they add up to it.
    None if the ranks recorded different phases."""
    resolution_s: float = 0.0
    """Seconds over which the time is a mean: lines of a log that were read together; 0 for a measured time."""


@dataclass(frozen=True)
class RankTime:
    """Times of one rank, means over the steps after warm-up, in seconds."""

    rank: int
    own_s: float
    """Its step time without its waits in collectives (``comm_s``), if these are recorded."""
    excess_s: float
    """``own_s`` above the median of the other ranks; below it if negative."""
    data_wait_s: float | None
    wait_excess_s: float | None
    """``data_wait_s`` above the median of the other ranks."""
    is_slow: bool = False
    """True if it takes longer than the others beyond their spread, throughout the run."""
    waits_long: bool = False
    """True if it waits longer for its data than the others, in the same sense."""


@dataclass(frozen=True)
class RankTimes:
    """Times of all ranks of a run that recorded steps."""

    ranks: tuple[RankTime, ...]
    windows: tuple[tuple[int, int], ...]
    """First and last step of each window of the run."""
    excess_s: tuple[tuple[float, ...], ...]
    """[ranks, windows]: mean of a rank's own time in a window above the median of all ranks in that window."""
    is_net: bool = False
    """True if waiting in collectives was recorded and is subtracted."""


@dataclass(frozen=True)
class UnreadLines:
    """Lines among the step records of one rank in one attempt that are no records: cut by a crash, or garbled."""

    rank: int
    attempt: int | None
    """None if the file of the rank does not say."""
    lines: int


@dataclass(frozen=True)
class StepReading:
    """Everything that a report takes from the step records of a run."""

    steps: tuple[Step, ...] = ()
    """In order, of attempts with the set-up of the last attempt on all nodes of the run."""
    rank_times: RankTimes | None = None
    unit: str | None = None
    """Unit of the work, from the set-up or the records; None if neither says."""
    last_step: int | None = None
    loss: float | None = None
    """Training loss of the last step."""
    attempt: int = 0
    """Attempt whose set-up the steps have."""
    attempt_steps: Mapping[int, int] = field(default_factory=dict)
    """Attempt -> steps that it made and that no later attempt repeated."""
    bf16_ratio: float | None = None
    """MFU of the bf16 peak over that of the peak in the precision of the run, by the last record."""
    attempt_times: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Attempt -> Unix times of its first and its last record that count, by the first rank."""
    unread: tuple[UnreadLines, ...] = ()
    """By rank, and by attempt in the order of its file."""


# Efficiency that a point lost against the smallest one, divided among the phases of its steps.


RECORDED = {
    "communication": "comm_s",
    "bubble": "bubble_s",
    "data": "data_wait_s",
    "optimizer": "optimizer_s",
}
"""Phase -> field of the step records. Communication comes first: the others are part of a rank's own time."""
STRAGGLERS, REST = "stragglers", "computation"
LOSSES = {
    "communication": "exposed communication",
    "stragglers": "slowest rank of each step",
    "data": "waiting for data",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "computation": "computation and the rest",
}
"""Phase -> its name for people, in the order in which they are shown."""


def drop_warmup(steps: Sequence[Step]) -> list[Step]:
    """Return all steps but the first ``WARMUP_STEPS`` of each attempt."""
    first: dict[int, int] = {}
    for step in steps:
        first[step.attempt] = min(step.step, first.get(step.attempt, step.step))
    return [step for step in steps if step.step >= first[step.attempt] + WARMUP_STEPS]


def phase_shares(steps: Sequence[Step]) -> dict[str, float]:
    """Return the share of each phase in the time of these steps; they add up to 1. Empty if a step has no phases.

    A phase that some steps lack counts as the rest in all.
    """
    divided = [step.phases for step in steps if step.phases is not None]
    total = sum(step.time_s for step in steps)
    if len(divided) < len(steps) or not total > 0:
        return {}
    known = [phase for phase in LOSSES if phase != REST and all(phase in phases for phases in divided)]
    shares = {phase: sum(phases[phase] for phases in divided) / total for phase in known}
    return {**shares, REST: 1 - sum(shares.values())}


def lost(point: Mapping[str, float], base: Mapping[str, float], efficiency: float, alone: bool) -> dict[str, float]:
    """Divide ``1 - efficiency`` of a point: phase -> share of its step time; negative if the phase got shorter.

    The ideal step takes ``efficiency`` of the time of the real one, divided as at the smallest point. A phase lost
    what it takes beyond its part of the ideal step.

    Args:
        point: shares of the phases in its step time, as of ``phase_shares``.
        base: shares of the smallest point.
        efficiency: of the point against the smallest one.
        alone: True if the smallest point is one rank, which waits for no other.
    """
    if not point or not base:
        return {}
    ideal = {**({"communication": 0.0, STRAGGLERS: 0.0, "bubble": 0.0} if alone else {}), **base}
    known = [phase for phase in LOSSES if phase != REST and phase in point and phase in ideal]
    if not known:
        return {}
    parts = {phase: point[phase] - efficiency * ideal[phase] for phase in known}
    return {**parts, REST: 1 - efficiency - sum(parts.values())}
