"""Goodput of a run: its time by part over all attempts, what interruptions cost, and what it cost in all."""

from __future__ import annotations

import math
import time as clock
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from launch.plan.budget import EventLog, Rates, allocations, last_heartbeat, used
from launch.runs.events import FEWER_NODES, aside_records, best_interval_s, expected_goodput
from launch.runs.folder import RunFolder

PARTS = {
    "waiting": "waiting for nodes",
    "start": "start",
    "compile": "compile",
    "restore": "restore",
    "steps": "steps that count",
    "fewer": "on fewer nodes",
    "lost": "steps done again",
    "saves": "saves",
    "evaluations": "evaluations",
    "restarts": "restarts",
    "shutdown": "shutdown",
    "other": "between steps",
}
"""Part of the time -> its name for people, in the order in which they are shown.

``waiting``: from the submission, or the end of the allocation before, to the allocation; 0 on this machine, where
points of a sweep only wait for each other. ``start``: from the allocation to the first step. ``compile``, ``restore``:
as far as records say; else they are part of steps and starts. ``lost``: steps that were lost with their attempt and
done again. ``restarts``: from the last step of an attempt to the first of the next, and starts of later allocations.
``shutdown``: from the last step, or its save, to the end of the allocation. ``other``: for a reason that no record has.
"""
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
"""Cause of an interruption -> its name for people, in the order in which they are shown. ``continued`` is a command
that extended a run which had finished, or took it back by ``resume_from``."""
DEFINITION = (
    "allocated time from the last step that counts before an interruption to the next new one: its end, the start "
    "after it, restore, compile and steps done again, without saves, evaluations and the wait for nodes"
)
SAVED_DEFINITION = (
    "what the road through the queue takes from the allocation to the first step, in the median, less what the restart "
    "took from the end that was noticed to its first step"
)


@dataclass(frozen=True)
class Failures:
    """Cost of failures for a run of many nodes; the arithmetic is that of ``launch.runs.events``."""

    mtbf_node_h: float
    """Mean time between failures of one node, hours."""
    save_s: float
    """Seconds for which each save stops the steps."""
    restart_s: float

    def interval_s(self, nodes: int) -> float:
        """Return Young's interval between saves, seconds."""
        return best_interval_s(self.save_s, self.mtbf_s(nodes))

    def mtbf_s(self, nodes: int) -> float:
        """Return the mean time between failures of any of the nodes, seconds: they fail independently."""
        return 3600 * self.mtbf_node_h / nodes

    def goodput(self, nodes: int) -> float:
        """Return the share of the time in steps that count, 0 to 1, with saves at Young's interval."""
        return expected_goodput(self.save_s, self.interval_s(nodes), self.restart_s, self.mtbf_s(nodes))


@dataclass(frozen=True)
class Restart:
    """Start of the ranks after an interruption, up to the first step, without restore and compilation."""

    seconds: float
    size: int
    """GPUs of its allocation; nodes if it has no GPUs."""
    wait_s: float = 0.0
    """Wait for the allocation."""


@dataclass(frozen=True)
class Losses:
    """What the interruptions of a run cost."""

    seconds: Mapping[str, float] = field(default_factory=dict)
    """Cause -> seconds of allocated time."""
    hours: Mapping[str, float] = field(default_factory=dict)
    """Cause -> hours of ``unit``."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Cause -> interruptions."""
    unit: str = "node"
    """GPU; node if the run has no GPUs."""
    in_place: tuple[Restart, ...] = ()
    """Restarts inside of an allocation that came to a step."""
    requeues: tuple[Restart, ...] = ()
    """Starts of later allocations that came to a step."""
    first: Restart | None = None
    """Start of the first allocation."""


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by part, and its allocations; an unknown figure is None."""

    seconds: Mapping[str, float]
    """Part of ``PARTS`` -> seconds of wall time, without parts that are zero."""
    gpu_hours: float | None
    cost: float | None
    """In the currency of cluster.price_per_gpu_hour."""
    gpus: int | None
    """GPUs of the allocations, if all have the same number."""
    losses: Losses = field(default_factory=Losses)

    @property
    def total_s(self) -> float:
        """Seconds from the submission to the end, or until now."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the allocated time in steps that count, also on fewer nodes."""
        allocated = self.total_s - self.seconds.get("waiting", 0.0)
        steps_s = self.seconds.get("steps", 0.0) + self.seconds.get("fewer", 0.0)
        return steps_s / allocated if allocated else 0.0


@dataclass(frozen=True)
class Saving:
    """Estimate of what restarts in place saved against starts through the queue; never negative."""

    hours: float
    """Hours of GPUs; of nodes if the run has none."""
    wait_s: float
    """Wall time of waiting in the queue."""
    basis: str
    """Starts that the restarts are compared with, for people."""


def saved_in_place(losses: Losses, others: Sequence[Losses] = ()) -> Saving | None:
    """Estimate what restarts in place saved; None if there were none, or no other start is known.

    Args:
        losses: of the run.
        others: of the other runs of its sweep.
    """
    starts = {
        "requeues of this run": losses.requeues,
        "requeues of other points": [start for other in others for start in other.requeues],
        "the first start of this run": [] if losses.first is None else [losses.first],
    }
    basis = next((name for name, found in starts.items() if found), None)
    if basis is None or not losses.in_place:
        return None
    start_s = median(start.seconds for start in starts[basis])
    wait_s = median(start.wait_s for start in starts[basis])
    hours = sum((start_s - restart.seconds) / 3600 * restart.size for restart in losses.in_place)
    return Saving(max(0.0, hours), wait_s * len(losses.in_place), basis)


def measure_goodput(run: RunFolder, events: Sequence[dict[str, Any]]) -> Goodput | None:
    """Divide the time of a run; None if its agents recorded no allocations."""

    agents = [event for event in events if event["event"] == "agent_started"]
    if not all({"job", "nodes", "allocated_at"} <= event.keys() for event in agents):
        return None  # written by hand, or cut: the rest of the time would be missing
    log, rates = EventLog(list(events), last_heartbeat(run)), Rates()
    found = allocations(log, clock.time(), rates.poll_s)
    if not found:
        return None
    size_of = "gpus" if all(started.get("gpus") for started, _ in found) else "nodes"
    division = _Division(run, events)
    seconds = dict.fromkeys(PARTS, 0.0)
    lost_s, lost_h = defaultdict[str, float](float), defaultdict[str, float](float)
    causes: dict[float, str] = {}
    in_place, starts = list[Restart](), list[Restart]()
    has_first = False
    submitted = [event for event in events if event["event"] == "submitted"]
    since = min((event["time"] for event in submitted), default=found[0][0]["allocated_at"])
    for number, (started, ended) in enumerate(found):
        begun, size = float(started["allocated_at"]), int(started[size_of])
        before = [event for event in submitted if event["time"] <= begun]
        is_local = bool(before) and before[-1].get("cluster") == "local"
        # Between the end of an allocation and the command that asks for the next one, nothing waits.
        asked = max([since, *(event["time"] for event in before if not event.get("moved"))])
        waited_s = 0.0 if is_local else max(0.0, begun - asked)
        seconds["waiting"] += waited_s
        since = max(ended, begun)
        for stretch in division.divide(begun, since, is_last=number == len(found) - 1):
            seconds[stretch.part] += stretch.seconds
            lost_to = stretch.lost_to
            if lost_to is not None and stretch.seconds > 0:
                lost_s[lost_to.cause] += stretch.seconds
                lost_h[lost_to.cause] += stretch.seconds / 3600 * size
                # A command that takes a run back from where it was interrupted is no second interruption.
                if causes.get(lost_to.since, "continued") == "continued":
                    causes[lost_to.since] = lost_to.cause
            if stretch.restart_s is not None and stretch.is_in_place:
                in_place.append(Restart(stretch.restart_s, size))
            elif stretch.restart_s is not None:
                has_first = has_first or number == 0
                starts.append(Restart(stretch.restart_s, size, waited_s))
    use = used([log], clock.time(), rates)
    gpus = {started.get("gpus") for started, _ in found}
    counts = {cause: [*causes.values()].count(cause) for cause in causes.values()}
    unit = "GPU" if size_of == "gpus" else "node"
    first, requeues = (starts[0], starts[1:]) if has_first else (None, starts)
    return Goodput(
        seconds={part: value for part, value in seconds.items() if value > 0},
        gpu_hours=use.gpu_hours or None,
        cost=use.cost or None,
        gpus=gpus.pop() if len(gpus) == 1 else None,
        losses=Losses(lost_s, lost_h, counts, unit, tuple(in_place), tuple(requeues), first),
    )


# Division of an allocation: stretches of its time, each of one part, and the interruption that it was lost to.


@dataclass(frozen=True)
class Interruption:
    """End of an attempt that the run resumed after, of a start without an attempt, or a roll-back."""

    since: float
    """Unix time from which time is lost to it, once no step is made any more."""
    cause: str
    """One of ``CAUSES``."""
    noticed: float | None = None
    """Unix time of its entry in the event log; None if there is none."""


@dataclass(frozen=True)
class Stretch:
    """Some time of an allocation."""

    part: str
    """One of ``PARTS``."""
    seconds: float
    lost_to: Interruption | None = None
    restart_s: float | None = None
    """Seconds of a start that ends here with its first step, without restore and compilation; else None."""
    is_in_place: bool = False
    """True if the ranks of an earlier attempt had made steps in this allocation."""


@dataclass(frozen=True)
class _Rollback:
    """Return of an attempt to the checkpoint of a step, by itself."""

    attempt: int
    step: int
    time: float

    @property
    def interruption(self) -> Interruption:
        return Interruption(self.time, "diverged", self.time)

    def takes(self, record: _Record) -> bool:
        return record.attempt == self.attempt and record.step > self.step and record.ended <= self.time


@dataclass(frozen=True)
class _Record:
    """One step record of the first rank; times in seconds, ``begun`` and ``ended`` of the step in Unix time."""

    attempt: int
    step: int
    begun: float
    ended: float
    evaluated: bool
    compile_s: float
    """Compilation inside of the step, or before it if the record does not say when the step began."""
    val_compile_s: float
    """Compilation inside of the evaluation after it."""
    restore_s: float
    """Loading of a checkpoint before it."""
    counts: bool = True
    is_aside: bool = False
    """True if a command took the run back from it."""


UNKNOWN = Interruption(0.0, "unknown")


class _Division:
    """The time of a run, one allocation after another."""

    def __init__(self, run: RunFolder, events: Sequence[dict[str, Any]]) -> None:
        self._rollbacks: list[_Rollback] = []
        self._save_s = defaultdict[tuple[int, int], float](float)
        self._fewer: set[int] = set()
        ended: dict[int, dict[str, Any]] = {}
        started: dict[int, float] = {}
        failed: dict[int, str] = {}
        without_attempt: list[Interruption] = []
        is_sick = is_entered = False
        for event in events:
            name, attempt = event["event"], event.get("attempt")
            if name == "agent_started":
                is_sick = is_entered = False
            elif name == "node_sick":
                is_sick = True
            elif attempt is None:
                if name == "attempt_ended" or (name == "decided" and not is_entered):
                    is_entered = name == "attempt_ended"  # the decision that follows is no other interruption
                    is_of_node = is_sick and event.get("cause") == "node_failed"
                    cause = "node_sick" if is_of_node else _cause(event)
                    without_attempt.append(Interruption(event["time"], cause, event["time"]))
            elif name == "started":
                started.setdefault(attempt, event["time"])
            elif name == "attempt_ended":
                ended.setdefault(attempt, event)  # of several the first counts
            elif name == "rank_failed":
                failed[attempt] = "hung" if event.get("hung") else failed.get(attempt, "crashed")
            elif name == "rolled_back":
                self._rollbacks.append(_Rollback(attempt, event["step"], event["time"]))
            elif name == "saved" and isinstance(event.get("seconds"), int | float):
                self._save_s[attempt, event["step"]] += float(event["seconds"])
            elif name == FEWER_NODES:
                self._fewer.add(attempt)
        self._records = self._read(run)
        begun: dict[int, float] = {}
        for record in self._records:
            begun.setdefault(record.attempt, record.begun)
        self._end_of: dict[int, Interruption] = {}
        for attempt in sorted({*ended, *started, *begun}):
            end = ended.get(attempt)
            noticed = None if end is None else end["time"]
            cause = failed.get(attempt, "unknown") if end is None else _cause(end)
            since = begun.get(attempt, started.get(attempt, noticed))
            assert since is not None, "the attempt is in one of them"
            self._end_of[attempt] = Interruption(since, cause, noticed)
        self._final = self._end_of[max(self._end_of)] if self._end_of else None
        self._ends = sorted([*self._end_of.values(), *without_attempt], key=lambda end: end.since)
        self._before = {
            attempt: max((end for end in self._ends if end.since < at), key=lambda end: end.since, default=None)
            for attempt, at in begun.items()
        }
        """Attempt -> the last interruption before its first step."""
        self._has_stepped = False

    def _read(self, run: RunFolder) -> list[_Record]:
        """Return all records of the first rank by time, also of steps done again."""
        for rank in run.metric_ranks():
            if found := self._records_in(run.metrics(rank)):
                first: dict[int, int] = {}
                for record in found:
                    first[record.attempt] = min(record.step, first.get(record.attempt, record.step))
                # A later attempt, or the same one after a roll-back, began before the steps that were lost. They are
                # lost even if they were not done again: an attempt may end before it comes so far.
                found = [
                    replace(
                        record,
                        counts=record.step < min((s for a, s in first.items() if a > record.attempt), default=math.inf)
                        and not any(back.takes(record) for back in self._rollbacks),
                    )
                    for record in found
                ]
                for path in aside_records(run, rank):
                    found += [replace(record, counts=False, is_aside=True) for record in self._records_in(path)]
                return sorted(found, key=lambda record: record.ended)
        return []

    def _records_in(self, path: Path) -> list[_Record]:
        """Return the records of one file: the last line of each step of an attempt between two roll-backs."""
        from launch.report.columns import read_columns  # numpy, which only a report that reads records needs

        names = ("step_time_s", "compile_s", "val_compile_s", "restore_s")
        columns = read_columns(path, (*names, "time", "val_loss"), every=True)
        known = {name: columns.known[name].tolist() for name in ("time", "val_loss")}
        took = [[value if value == value else 0.0 for value in columns.values[name].tolist()] for name in names]
        times = columns.values["time"].tolist()
        last: dict[tuple[int, int, int], int] = {}
        for index, (attempt, step) in enumerate(zip(columns.attempts.tolist(), columns.steps.tolist(), strict=True)):
            # A step that is saved is recorded before its save and again after it: one step. A step that the run went
            # back from, and its repetition, are two.
            gone_back = sum(back.attempt == attempt and back.time < times[index] for back in self._rollbacks)
            last[attempt, step, gone_back] = index
        return [
            _Record(
                attempt=attempt,
                step=step,
                begun=times[index] - took[0][index],
                ended=times[index],
                evaluated=known["val_loss"][index],
                compile_s=took[1][index],
                val_compile_s=took[2][index],
                restore_s=took[3][index],
            )
            for (attempt, step, _), index in sorted(last.items(), key=lambda item: item[1])
            if known["time"][index]
        ]

    def divide(self, begun: float, ended: float, *, is_last: bool) -> Iterator[Stretch]:
        """Yield the stretches of the next allocation; ``is_last`` if no other follows."""
        at = begun
        before: _Record | None = None
        for record in self._records:
            if not begun <= record.ended <= ended:
                continue
            starts = max(at, min(record.begun, record.ended))
            in_step = min(record.compile_s, record.ended - starts)
            yield from self._between(before, record, at, starts, record.compile_s - in_step)
            lost_to = None if record.counts else self._lost_to(record)
            if in_step:
                yield Stretch("compile", in_step, lost_to or self._before[record.attempt])
            part = "lost" if lost_to is not None else "fewer" if record.attempt in self._fewer else "steps"
            yield Stretch(part, record.ended - starts - in_step, lost_to)
            at, before = record.ended, record
        yield from self._after(before, at, ended, is_last)
        self._has_stepped = self._has_stepped or before is not None

    def _between(
        self, before: _Record | None, record: _Record, at: float, until: float, compile_s: float
    ) -> Iterator[Stretch]:
        """Divide the time before a step: the save after the step before it, then starts, restore and compilation."""
        saved_s = self._saved_s(before, until - at)
        yield Stretch("saves", saved_s)
        at += saved_s
        is_same = before is not None and before.attempt == record.attempt
        backs = (back for back in self._rollbacks if back.attempt == record.attempt and back.time <= record.ended)
        back = next((back for back in backs if is_same and before and before.ended <= back.time), None)
        lost_to = self._before[record.attempt] if back is None else back.interruption
        compiled = min(compile_s, until - at)
        restored = min(record.restore_s, until - at - compiled)
        yield Stretch("compile", compiled, lost_to)
        yield Stretch("restore", restored, lost_to)
        until -= compiled + restored
        if before is None or not is_same:
            yield from self._starts(at, until, is_in_place=before is not None)
        elif back is not None:
            yield Stretch("restarts", until - at, lost_to)
        else:
            compiled = min(before.val_compile_s, until - at)
            yield Stretch("compile", compiled, self._before[before.attempt])
            yield Stretch("evaluations" if before.evaluated else "other", until - at - compiled)

    def _after(self, before: _Record | None, at: float, ended: float, is_last: bool) -> Iterator[Stretch]:
        """Divide the time after the last step of an allocation, or all of it if it has none."""
        if before is None:
            for stretch in self._starts(at, ended, is_in_place=None):
                # A program without step records ran until then: nothing followed that could have cost time.
                is_end = is_last and not self._records and stretch.lost_to is self._final
                yield replace(stretch, part="start", lost_to=None) if is_end else stretch
            return
        saved_s = self._saved_s(before, ended - at)
        yield Stretch("saves", saved_s)
        at += saved_s
        compiled = min(before.val_compile_s, ended - at)
        yield Stretch("compile", compiled, self._before[before.attempt])
        at += compiled
        for since, until, end in [(at, ended, None)] if is_last else self._slices(at, ended):
            yield Stretch("shutdown", until - since, end)

    def _starts(self, at: float, until: float, is_in_place: bool | None) -> Iterator[Stretch]:
        """Divide the time of starts, from ``at`` to ``until``; the first start of a run is lost to nothing.

        ``is_in_place`` as of ``Stretch``; None if no step follows.
        """
        slices = [*self._slices(at, until)]
        for number, (since, end, lost_to) in enumerate(slices, start=1):
            noticed = since if not is_in_place or lost_to is None else lost_to.noticed or since
            # A start after others in the same allocation says nothing about a whole start.
            is_whole = is_in_place is not None and number == len(slices) and (is_in_place or number == 1)
            restart_s = end - min(max(since, noticed), end) if is_whole else None
            part = "start" if lost_to is None else "restarts"
            yield Stretch(part, end - since, lost_to, restart_s, bool(is_in_place))

    def _slices(self, at: float, until: float) -> Iterator[tuple[float, float, Interruption | None]]:
        """Cut a time without steps at the begin of each interruption; None before the first one."""
        current = max((end for end in self._ends if end.since <= at), key=lambda end: end.since, default=None)
        if current is None and self._has_stepped:
            current = UNKNOWN
        for end in self._ends:
            if at < end.since < until:
                yield at, end.since, current
                at, current = end.since, end
        yield at, until, current

    def _lost_to(self, record: _Record) -> Interruption:
        """Return the interruption that a step was lost to."""
        back = next((back for back in self._rollbacks if back.takes(record)), None)
        if back is not None:
            return back.interruption
        end = self._end_of[record.attempt]
        return Interruption(end.since, "continued") if record.is_aside and end.cause != "continued" else end

    def _saved_s(self, before: _Record | None, gap: float) -> float:
        """Return the seconds of the saves after a step, at most the time until the next one."""
        return 0.0 if before is None else min(gap, self._save_s.get((before.attempt, before.step), 0.0))


def _cause(event: Mapping[str, Any]) -> str:
    """Return the key of ``CAUSES`` for the cause of an attempt's end."""
    cause = event.get("cause")
    return "continued" if cause == "finished" else cause if isinstance(cause, str) and cause in CAUSES else "unknown"
