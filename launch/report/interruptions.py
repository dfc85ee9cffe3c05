"""Interruptions of a run: from when each cost time, for which cause, and what restarts in place saved of that.

Owns the causes, which are those of the restart limits, and the estimate. Must not know how time is divided into parts,
nor how a report shows it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

CAUSES = {
    "crashed": "crashed",
    "hung": "hung",
    "out_of_memory": "out of memory",
    "diverged": "diverged",
    "node_failed": "node failed",
    "node_sick": "sick node",
    "preempted": "preempted",
    "timed_out": "time limit",
    "requested": "requeue requested",
    "cancelled": "cancelled",
    "budget": "budget",
    "repeated": "diverged repeatedly",
    "refused": "refused",
    "continued": "continued otherwise",
    "unknown": "cause not known",
}
"""Cause -> its name for people, in the order in which they are shown. ``continued`` is a command that extended a run
which had finished, or took one back by ``resume_from``."""
DEFINITION = (
    "allocated time from the last step that counts before an interruption to the next new one: its end, the start "
    "after it, restore, compile and steps done again, without saves, evaluations and the wait for nodes"
)
SAVED_DEFINITION = (
    "what the road through the queue takes from the allocation to the first step, in the median, less what the restart "
    "took from the end that was noticed to its first step"
)


@dataclass(frozen=True)
class Interruption:
    """End of an attempt that the run came back from, or of a start that came to no attempt."""

    since: float
    """Unix time from which time is lost to it, once no step is made any more."""
    cause: str
    """One of ``CAUSES``."""
    noticed: float | None = None
    """Unix time of its entry in the event log; None where there is none."""


@dataclass(frozen=True)
class Rollback:
    """Return of an attempt to a checkpoint, by itself."""

    attempt: int
    step: int
    """Step of the checkpoint."""
    time: float
    """Unix time."""

    @property
    def interruption(self) -> Interruption:
        """Interruption that it is."""
        return Interruption(self.time, "diverged", self.time)

    def takes(self, attempt: int, step: int, ended: float) -> bool:
        """Tell whether a step, by the Unix time of its end, was lost to it."""
        return attempt == self.attempt and step > self.step and ended <= self.time


def read_rollbacks(events: Sequence[Mapping[str, Any]]) -> list[Rollback]:
    """Return the roll-backs of all attempts, in the order of the event log."""
    return [
        Rollback(event["attempt"], event["step"], event["time"])
        for event in events
        if event["event"] == "rolled_back" and event.get("attempt") is not None
    ]


@dataclass(frozen=True)
class Restart:
    """Start of the ranks after an interruption, up to the first step, without loading a checkpoint and compilation."""

    seconds: float
    size: int
    """GPUs of its allocation, nodes where it has none."""
    wait_s: float = 0.0
    """Wait for the allocation."""


@dataclass(frozen=True)
class Losses:
    """Losses of a run to its interruptions."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Cause -> seconds of allocated time."""
    hours: Mapping[str, float] = field(default_factory=dict)
    """Cause -> hours of ``unit``."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Cause -> interruptions."""
    unit: str = "node"
    """GPU, or node where the run has no GPUs."""
    in_place: tuple[Restart, ...] = ()
    """Restarts inside of an allocation that came to a step."""
    requeues: tuple[Restart, ...] = ()
    """Starts of later allocations that came to a step."""
    first: Restart | None = None
    """Start of the first allocation."""


@dataclass(frozen=True)
class Saving:
    """Estimate of what restarts in place saved against the road through the queue."""

    restarts: int
    hours: float
    """Hours of GPUs, of nodes where the run has none."""
    wait_s: float
    """Wall time of waiting in the queue."""
    basis: str
    """Road that the restarts are compared with, for people."""


def saved_in_place(losses: Losses, others: Sequence[Losses] = ()) -> Saving | None:
    """Estimate what restarts in place saved; None where there were none, or no other road is known.

    Args:
        losses: of the run.
        others: of the other runs of its sweep.
    """
    roads = {
        "requeues of this run": losses.requeues,
        "requeues of other points": [road for other in others for road in other.requeues],
        "the first start of this run": [] if losses.first is None else [losses.first],
    }
    basis = next((name for name, found in roads.items() if found), None)
    if basis is None or not losses.in_place:
        return None
    start_s = median(road.seconds for road in roads[basis])
    wait_s = median(road.wait_s for road in roads[basis])
    hours = sum((start_s - restart.seconds) / 3600 * restart.size for restart in losses.in_place)
    return Saving(len(losses.in_place), hours, wait_s * len(losses.in_place), basis)


def read_interruptions(
    events: Sequence[Mapping[str, Any]], stepped: Mapping[int, float]
) -> tuple[list[Interruption], dict[int, Interruption]]:
    """Return the ends of attempts, and of starts without one, in the order of their time, and the former by attempt.

    Args:
        events: the event log.
        stepped: attempt -> Unix time at which it began its first step, of those that made one.
    """
    ends: dict[int, Mapping[str, Any]] = {}
    started: dict[int, float] = {}
    without: list[Interruption] = []
    is_sick = is_entered = False
    for event in events:
        name, attempt = event["event"], event.get("attempt")
        if name == "agent_started":
            is_sick = is_entered = False
        elif name == "node_sick":
            is_sick = True
        elif name == "started" and attempt is not None:
            started.setdefault(attempt, event["time"])
        elif name == "attempt_ended" and attempt is not None:
            ends.setdefault(attempt, event)  # of several the first holds
        elif name == "attempt_ended" or (name == "decided" and attempt is None and not is_entered):
            is_entered = name == "attempt_ended"  # what is then decided is no other interruption
            cause = "node_sick" if is_sick and event.get("cause") == "node_failed" else cause_of(event.get("cause"))
            without.append(Interruption(event["time"], cause, event["time"]))
    by_attempt = {}
    for attempt in sorted({*ends, *started, *stepped}):
        end = ends.get(attempt)
        noticed = None if end is None else end["time"]
        cause = _cause_of_failure(events, attempt) if end is None else cause_of(end.get("cause"))
        since = stepped.get(attempt, started.get(attempt, noticed))
        assert since is not None, "it is in one of them"
        by_attempt[attempt] = Interruption(since, cause, noticed)
    return sorted([*by_attempt.values(), *without], key=lambda one: one.since), by_attempt


def cause_of(told: object) -> str:
    """Return the key of ``CAUSES`` for the cause that the event log tells of an attempt's end."""
    return "continued" if told == "finished" else told if isinstance(told, str) and told in CAUSES else "unknown"


def _cause_of_failure(events: Sequence[Mapping[str, Any]], attempt: int) -> str:
    """Cause of an attempt whose end no agent entered."""
    failed = [event for event in events if event["event"] == "rank_failed" and event.get("attempt") == attempt]
    if not failed:
        return "unknown"
    return "hung" if any(event.get("hung") for event in failed) else "crashed"
