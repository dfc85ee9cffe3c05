"""Interruptions of a run and the division of its allocation into parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

from launch.runs.events import fewer_nodes

# Interruptions of a run: from when each cost time, for which cause, and what restarts in place saved of that.


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


# Division of an allocation: stretches of its time, each of one part, and the interruption that it was lost to.


@dataclass(frozen=True)
class Record:
    """One step record of the first rank: when its step began and ended, and what was done after it."""

    attempt: int
    step: int
    begun: float
    ended: float
    counts: bool
    evaluated: bool
    compile_s: float = 0.0
    """Compilation inside of the step, or before it where the record does not tell when it began."""
    val_compile_s: float = 0.0
    """Compilation inside of the evaluation after it."""
    restore_s: float = 0.0
    """Loading of a checkpoint before it."""
    is_aside: bool = False
    """True where a command took the run back from it."""


@dataclass(frozen=True)
class Stretch:
    """Some time of an allocation."""

    part: str
    """One of ``goodput.PARTS``."""
    seconds: float
    lost_to: Interruption | None = None
    restart_s: float | None = None
    """Where a start that came to its first step ends here: what it took, without restore and compilation."""
    is_in_place: bool = False
    """True where the ranks of an earlier attempt had made steps in this allocation."""


class Division:
    """The time of a run, one allocation after another.

    Args:
        events: the event log.
        records: of the first rank, all that it wrote, in the order of their end.
        rollbacks: of all attempts.
    """

    def __init__(
        self, events: Sequence[dict[str, Any]], records: Sequence[Record], rollbacks: Sequence[Rollback]
    ) -> None:
        self._records = records
        self._begun: dict[int, float] = {}
        for record in records:
            self._begun.setdefault(record.attempt, record.begun)
        self._ends, self._end_of = read_interruptions(events, self._begun)
        self._final = self._end_of[max(self._end_of)] if self._end_of else None
        self._rollbacks = rollbacks
        self._save_s = defaultdict[tuple[int, int], float](float)
        for event in filter(_is_save, events):
            self._save_s[event["attempt"], event["step"]] += float(event["seconds"])
        self._before = {attempt: self._last_end(begun) for attempt, begun in self._begun.items()}
        self._fewer = fewer_nodes(events)
        self._has_stepped = False

    def divide(self, begun: float, ended: float, *, is_last: bool) -> Iterator[Stretch]:
        """Yield the stretches of the next allocation; ``is_last`` where none follows."""
        at = begun
        before: Record | None = None
        for record in self._records:
            if not begun <= record.ended <= ended:
                continue
            starts = max(at, min(record.begun, record.ended))
            in_step = min(record.compile_s, record.ended - starts)
            yield from self._between(before, record, at, starts, record.compile_s - in_step)
            yield from self._step(record, record.ended - starts, in_step)
            at, before = record.ended, record
        yield from self._after(before, at, ended, is_last)
        self._has_stepped = self._has_stepped or before is not None

    def _step(self, record: Record, seconds: float, compile_s: float) -> Iterator[Stretch]:
        lost_to = None if record.counts else self._lost_to(record)
        if compile_s:
            yield Stretch("compile", compile_s, lost_to or self._before[record.attempt])
        part = "lost" if lost_to is not None else "fewer" if record.attempt in self._fewer else "steps"
        yield Stretch(part, seconds - compile_s, lost_to)

    def _between(
        self, before: Record | None, record: Record, at: float, until: float, compile_s: float
    ) -> Iterator[Stretch]:
        """Divide the time before a step: the save after the one before it, then starts, restore and compilation."""
        if saved := self._saved(before, until - at):
            yield Stretch("saves", saved)
        at += saved
        is_first = before is None or before.attempt != record.attempt
        back = None if before is None else self._rollback_between(before, record)
        lost_to = self._before[record.attempt] if back is None else back
        compiled = min(compile_s, until - at)
        restored = min(record.restore_s, until - at - compiled)
        if compiled:
            yield Stretch("compile", compiled, lost_to)
        if restored:
            yield Stretch("restore", restored, lost_to)
        until -= compiled + restored
        if is_first:
            yield from self._starts(at, until, is_in_place=before is not None)
        elif back is not None:
            yield Stretch("restarts", until - at, back)
        else:
            assert before is not None
            compiled = min(before.val_compile_s, until - at)
            if compiled:
                yield Stretch("compile", compiled, self._before[before.attempt])
            yield Stretch("evaluations" if before.evaluated else "other", until - at - compiled)

    def _after(self, before: Record | None, at: float, ended: float, is_last: bool) -> Iterator[Stretch]:
        """Divide the time after the last step of an allocation, or all of it where it has none."""
        if saved := self._saved(before, ended - at):
            yield Stretch("saves", saved)
        at += saved
        if before is None:
            for stretch in self._starts(at, ended, is_in_place=None):
                # A program that tells no steps ran until then: nothing followed that could have cost time.
                is_end = is_last and not self._records and stretch.lost_to is self._final
                yield replace(stretch, part="start", lost_to=None) if is_end else stretch
            return
        if compiled := min(before.val_compile_s, ended - at):
            yield Stretch("compile", compiled, self._before[before.attempt])
        at += compiled
        if is_last:
            yield Stretch("shutdown", ended - at)
            return
        for since, until, end in self._slices(at, ended):
            yield Stretch("shutdown", until - since, end)

    def _starts(self, at: float, until: float, is_in_place: bool | None) -> Iterator[Stretch]:
        """Divide the time of starts: the first one of a run is lost to nothing.

        Args:
            at: Unix time of its begin.
            until: Unix time of its end.
            is_in_place: as of ``Stretch``; None where no step follows.
        """
        slices = [*self._slices(at, until)]
        for number, (since, end, lost_to) in enumerate(slices, start=1):
            noticed = since if not is_in_place or lost_to is None else lost_to.noticed or since
            # A start that was preceded by others in the same allocation says nothing about a whole one.
            is_told = is_in_place is not None and number == len(slices) and (is_in_place or number == 1)
            yield Stretch(
                "start" if lost_to is None else "restarts",
                end - since,
                lost_to,
                end - min(max(since, noticed), end) if is_told else None,
                bool(is_in_place),
            )

    def _slices(self, at: float, until: float) -> Iterator[tuple[float, float, Interruption | None]]:
        """Cut a time without steps where another interruption begins; None before the first one."""
        current = max((end for end in self._ends if end.since <= at), key=lambda end: end.since, default=None)
        if current is None and self._has_stepped:
            current = UNKNOWN
        for end in self._ends:
            if at < end.since < until:
                yield at, end.since, current
                at, current = end.since, end
        yield at, until, current

    def _last_end(self, until: float) -> Interruption | None:
        """Return the last interruption before a moment; None where there was none."""
        return max((end for end in self._ends if end.since < until), key=lambda end: end.since, default=None)

    def _lost_to(self, record: Record) -> Interruption:
        """Return the interruption that a step was lost to."""
        for back in self._rollbacks:
            if back.takes(record.attempt, record.step, record.ended):
                return back.interruption
        end = self._end_of[record.attempt]
        return Interruption(end.since, "continued") if record.is_aside and end.cause != "continued" else end

    def _rollback_between(self, before: Record, record: Record) -> Interruption | None:
        """Return the roll-back of an attempt between two of its steps; None where there was none."""
        for back in self._rollbacks:
            if back.attempt == before.attempt == record.attempt and before.ended <= back.time <= record.ended:
                return back.interruption
        return None

    def _saved(self, before: Record | None, gap: float) -> float:
        """Return what the saves behind a step took, at most the time until the next one."""
        if before is None:
            return 0.0
        return min(gap, self._save_s.get((before.attempt, before.step), 0.0))


UNKNOWN = Interruption(0.0, "unknown")


def _is_save(event: Mapping[str, Any]) -> bool:
    return event["event"] == "saved" and isinstance(event.get("seconds"), int | float) and "attempt" in event
