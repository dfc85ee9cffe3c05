"""Goodput of a run: its time by part over all attempts, the time that interruptions cost, and its total cost."""

from __future__ import annotations

import math
import time as clock
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from launch.plan.budget import EventLog, Rates, allocations, last_heartbeat, used
from launch.report.read import read_columns
from launch.runs.events import FEWER_NODES, Events, aside_records, best_interval_s, expected_goodput, select_events
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
"""Part of a run's time -> its name for people, in the order of display.

``waiting``: from the submission, or the end of the previous allocation, to the allocation; 0 on the local machine,
where points of a sweep only wait for each other. ``start``: from the allocation to the first step. ``compile``,
``restore``: as far as step records have these times; otherwise they are part of steps and starts. ``lost``: steps that
were lost with their attempt and done again. ``restarts``: from the last step of an attempt to the first of the next,
and starts of later allocations. ``shutdown``: from the last step, or its save, to the end of the allocation. ``other``:
time between steps for which no record has a reason.
"""
CAUSES = {
    "crashed": "crashed",
    "hung": "hung",
    "out_of_memory": "out of memory",
    "diverged": "diverged",
    "node_failed": "node failed",
    "node_sick": "sick node",
    "node_joined": "node joined",
    "preempted": "preempted",
    "timed_out": "time limit",
    "requested": "requeue requested",
    "cancelled": "cancelled",
    "budget": "budget",
    "repeated": "diverged repeatedly",
    "refused": "refused",
    "continued": "continued by a command",
    "unknown": "cause not known",
}
"""Cause of an interruption -> its name for people, in the order of display.

``continued``: a command extended a finished run, or continued a run from an earlier checkpoint (``resume_from``).
"""
DEFINITION = (
    "allocated time from the last step that counts before an interruption to the next new one: its end, the start "
    "after it, restore, compile and steps done again, without saves, evaluations and the wait for nodes"
)
CLOCK_S = 1e-5
"""Seconds below which a part of the time counts as a rounding error: Unix times have a resolution of 0.24 us."""


@dataclass(frozen=True)
class Failures:
    """Rate and cost of failures, from which ``launch.runs.events`` computes the goodput of a run on many nodes."""

    mtbf_node_h: float
    """Mean time between failures of one node in hours."""
    save_s: float
    """Seconds for which each save stops the steps."""
    restart_s: float
    """Seconds from a failure to the next step."""

    def interval_s(self, nodes: int) -> float:
        """Return the best interval between saves, in seconds, by Young's formula for nodes that fail independently."""
        return best_interval_s(self.save_s, 3600 * self.mtbf_node_h / nodes)

    def goodput(self, nodes: int) -> float:
        """Return the expected share (0 to 1) of time in steps that are not lost, with saves at Young's interval."""
        between_s = 3600 * self.mtbf_node_h / nodes
        return expected_goodput(self.save_s, self.interval_s(nodes), self.restart_s, between_s)


@dataclass
class Stretch:
    """A section of a run's wall time that belongs to one part of ``PARTS``."""

    part: str
    """Key of ``PARTS``."""
    seconds: float
    cause: str | None = None
    """Cause of the interruption that cost this time, a key of ``CAUSES``; None if the time is not lost."""
    since: float | None = None
    """Unix time at which this stretch begins; None if it begins when the stretch before it ends."""


@dataclass(frozen=True)
class Goodput:
    """Wall time of a run, divided into ``PARTS``, and the use and cost of its allocations. None means not known."""

    seconds: Mapping[str, float]
    """Key of ``PARTS`` -> seconds of wall time. Parts of at most ``CLOCK_S`` seconds are absent."""
    gpu_hours: float | None
    cost: float | None
    """Cost in the currency of cluster.price_per_gpu_hour; None if unknown."""
    lost_s: Mapping[str, float] = field(default_factory=dict)
    """Cause of interruptions -> seconds of allocated time that these interruptions cost."""
    lost_h: Mapping[str, float] = field(default_factory=dict)
    """Cause of interruptions -> hours that these interruptions cost, in the unit ``hours_of``."""
    interruptions: Mapping[str, int] = field(default_factory=dict)
    """Cause -> number of interruptions."""
    hours_of: str = "node"
    """Unit of ``lost_h``: ``GPU`` for GPU-hours; ``node`` for node-hours if the run has no GPUs."""
    stretches: Sequence[Stretch] = ()
    """Sections of the time in ``seconds``, in the order in which they happened.

    Some sections are joined: successive steps are one section, and the unexplained times between these steps
    (``other``) are one section after it. The save of a step is always placed before the evaluation of the step.
    """

    @property
    def goodput(self) -> float:
        """Share of the allocated time, 0 to 1, in steps that were not lost, including steps on fewer nodes."""
        allocated = sum(self.seconds.values()) - self.seconds.get("waiting", 0.0)
        steps_s = self.seconds.get("steps", 0.0) + self.seconds.get("fewer", 0.0)
        return steps_s / allocated if allocated else 0.0


def measure_goodput(run: RunFolder, events: Events) -> Goodput | None:
    """Return the time of a run by part, and its cost. None if the event log does not describe all its allocations."""
    agents = select_events(events, "agent_started")
    if not all({"job", "nodes", "allocated_at"} <= event.keys() for event in agents):
        return None  # The log was written by hand, or cut off: the rest of the time would be missing.
    log, rates = EventLog(list(events), last_heartbeat(run)), Rates()
    found = allocations(log, clock.time(), rates.poll_s)
    if not found:
        return None
    size_of = "gpus" if all(started.get("gpus") for started, _ in found) else "nodes"
    division = _Division(run, events)
    submitted = select_events(events, "submitted")
    since = min((event["time"] for event in submitted), default=found[0][0]["allocated_at"])
    for number, (started, ended) in enumerate(found):
        begun = float(started["allocated_at"])
        before = [event for event in submitted if event["time"] <= begun]
        is_local = bool(before) and before[-1].get("cluster") != "slurm"
        # The run does not wait between the end of an allocation and the command that requests the next one.
        requested = max([since, *(event["time"] for event in before if not event.get("moved"))])
        waited_s = 0.0 if is_local else max(0.0, begun - requested)
        since = max(ended, begun)
        division.seconds["waiting"] += waited_s
        division.stretches.append(Stretch("waiting", waited_s, since=begun - waited_s))
        division.add(begun, since, int(started[size_of]), is_last=number == len(found) - 1)
    use = used([log], clock.time(), rates)
    return Goodput(
        seconds={part: value for part, value in division.seconds.items() if value > CLOCK_S},
        gpu_hours=use.gpu_hours or None,
        cost=use.cost or None,
        lost_s=division.lost_s,
        lost_h=division.lost_h,
        interruptions=Counter(division.causes.values()),
        hours_of="GPU" if size_of == "gpus" else "node",
        stretches=division.stretches,
    )


# Division of an allocation: each stretch of its time belongs to one part, and to one interruption if the time is lost.


@dataclass(frozen=True)
class RunInterruption:
    """An interruption: an attempt ended, a start ended before an attempt began, or an attempt rolled back."""

    since: float
    """Unix time from which lost time counts as caused by this interruption.

    For the end of an attempt, this is the start of its first step, or of the attempt if it made no step. For a start
    without an attempt, and for a roll-back, this is the time of the recorded event.
    """
    cause: str
    """Cause of the interruption, a key of ``CAUSES``."""
    attempt: int | None = None
    """Attempt that rolled back to the checkpoint of ``step``; None if this is no roll-back."""
    step: int = 0


@dataclass
class _Record:
    """One step record of the first rank. ``begun`` and ``ended`` are the Unix times of the step, in seconds."""

    attempt: int
    step: int
    ended: float
    begun: float
    compile_s: float
    """Seconds of compilation inside the step. If the record has no step time, they count as time before the step."""
    val_compile_s: float
    """Seconds of compilation inside the evaluation after the step."""
    restore_s: float
    """Seconds of loading a checkpoint before the step."""
    evaluated: bool
    lost_to: RunInterruption | None = None
    """Interruption because of which the step was lost; None if the step counts."""


UNKNOWN = RunInterruption(0.0, "unknown")


class _Division:
    """Totals of a run's time by part and by interruption. ``add`` divides one allocation after another."""

    def __init__(self, run: RunFolder, events: Events) -> None:
        self.seconds = dict.fromkeys(PARTS, 0.0)
        """Key of ``PARTS`` -> seconds."""
        self.stretches: list[Stretch] = []
        """The time in ``seconds`` as sections, in the order in which they happened.

        When ``add`` begins, the last section is the wait for the allocation that ``add`` divides.
        """
        self.lost_s = defaultdict[str, float](float)
        self.lost_h = defaultdict[str, float](float)
        self.causes: dict[float, str] = {}
        """``RunInterruption.since`` of each interruption that cost time -> cause of this interruption."""
        self._size = 0
        self._has_stepped = False
        self._rollbacks: list[RunInterruption] = []
        self._save_s = defaultdict[tuple[int, int], float](float)
        self._fewer: set[int] = set()
        self._read_interruptions(run, events)

    def _read_interruptions(self, run: RunFolder, events: Events) -> None:
        ended: dict[int, dict[str, Any]] = {}
        started: dict[int, float] = {}
        without_attempt: list[RunInterruption] = []
        is_sick = is_entered = False
        for event in events:
            name, attempt = event["event"], event.get("attempt")
            if name == "agent_started":
                is_sick = is_entered = False
            elif name == "node_sick":
                is_sick = True
            elif attempt is None:
                if name == "attempt_ended" or (name == "decided" and not is_entered):
                    is_entered = name == "attempt_ended"  # The decision that follows is not another interruption.
                    is_of_node = is_sick and event.get("cause") == "node_failed"
                    cause = "node_sick" if is_of_node else _cause(event)
                    without_attempt.append(RunInterruption(event["time"], cause))
            elif name == "started":
                started.setdefault(attempt, event["time"])
            elif name == "attempt_ended":
                ended.setdefault(attempt, event)  # The first of several interruptions counts.
            elif name == "rolled_back":
                self._rollbacks.append(RunInterruption(event["time"], "diverged", attempt, event["step"]))
            elif name == "saved" and isinstance(event.get("seconds"), int | float):
                self._save_s[attempt, event["step"]] += float(event["seconds"])
            elif name == FEWER_NODES:
                self._fewer.add(attempt)
        records: list[_Record] = []
        aside: list[_Record] = []
        """Records of steps after the checkpoint that a ``resume_from`` named; ``resume_from`` has moved them aside."""
        for rank in run.metric_ranks():
            if records := self._records_in(run.metrics(rank)):
                aside = [record for path in aside_records(run, rank) for record in self._records_in(path)]
                break
        begun: dict[int, float] = {}
        for record in sorted([*records, *aside], key=_end):  # The first of several records with the same time counts.
            begun.setdefault(record.attempt, record.begun)
        ends: dict[int, RunInterruption] = {}
        for attempt in sorted({*ended, *started, *begun}):
            end = ended.get(attempt, {})
            ends[attempt] = RunInterruption(begun.get(attempt) or started.get(attempt) or end["time"], _cause(end))
        self._final = ends[max(ends)] if ends else None
        self._ends = sorted([*ends.values(), *without_attempt], key=_since)
        self._before = {
            attempt: max((end for end in self._ends if end.since < at), key=_since, default=None)
            for attempt, at in begun.items()
        }
        """Attempt -> the last interruption before its first step."""
        self._mark_lost(records, aside, ends)
        self._records = sorted([*records, *aside], key=_end)

    def _records_in(self, path: Path) -> list[_Record]:
        """Return the last record of each step in the file ``path``.

        A step that the same attempt repeated after a roll-back has two records in the result: one from before the
        roll-back, and one from after it.
        """
        names = ("time", "step_time_s", "compile_s", "val_compile_s", "restore_s")
        columns = read_columns(path, (*names, "val_loss"), every=True)
        evaluated = ~np.isnan(columns.values["val_loss"])
        times = columns.values["time"]
        took = [times - np.nan_to_num(columns.values["step_time_s"])]
        took += [np.nan_to_num(columns.values[name]) for name in names[2:]]
        arrays = (columns.attempts, columns.steps, times, *took, evaluated)
        last: dict[tuple[int, int, int], _Record] = {}
        for values in zip(*(array.tolist() for array in arrays), strict=True):
            record = _Record(*values)
            # A step that is saved is recorded before its save and again after it, as one step. A discarded step and its
            # repetition are two steps.
            gone_back = sum(back.attempt == record.attempt and back.since < record.ended for back in self._rollbacks)
            key = (record.attempt, record.step, gone_back)
            last.pop(key, None)
            last[key] = record
        return [record for record in last.values() if not math.isnan(record.ended)]

    def _mark_lost(self, records: list[_Record], aside: list[_Record], ends: Mapping[int, RunInterruption]) -> None:
        """Set ``lost_to`` in the record of each lost step.

        Args:
            records: records of the run.
            aside: records that a ``resume_from`` moved aside.
            ends: attempt -> the interruption that ended it.
        """
        first: dict[int, int] = {}
        for record in records:
            first[record.attempt] = min(record.step, first.get(record.attempt, record.step))
        for record in (*records, *aside):
            backs = (one for one in self._rollbacks if one.attempt == record.attempt and one.step < record.step)
            back = next((one for one in backs if record.ended <= one.since), None)
            # A step is lost if a roll-back discarded it, or if a later attempt began at or before it. It is lost even
            # if it was not repeated, because the later attempt may have ended before it.
            again = min((step for attempt, step in first.items() if attempt > record.attempt), default=math.inf)
            if back is not None or record.step >= again:
                record.lost_to = back or ends[record.attempt]
        for record in aside:
            end = ends[record.attempt]
            if record.lost_to in (None, end):
                record.lost_to = end if end.cause == "continued" else RunInterruption(end.since, "continued")

    def _spend(self, part: str, seconds: float, lost_to: RunInterruption | None = None) -> float:
        """Add ``seconds`` to the part ``part`` of ``PARTS``. Returns ``seconds``.

        If ``lost_to`` is given, the seconds also count as lost by the cause of this interruption.
        """
        self.seconds[part] += seconds
        if seconds <= 0:
            return seconds
        cause = None if lost_to is None else lost_to.cause
        recent = self.stretches[-2 if "other" in (part, self.stretches[-1].part) else -1 :]
        same = next((one for one in recent if (one.part, one.cause) == (part, cause)), None)
        if same is None:
            self.stretches.append(Stretch(part, seconds, cause))
        else:
            same.seconds += seconds
        if lost_to is not None:
            self.lost_s[lost_to.cause] += seconds
            self.lost_h[lost_to.cause] += seconds / 3600 * self._size
            # A command that discards steps of an interrupted run is not a second interruption.
            if self.causes.get(lost_to.since, "continued") == "continued":
                self.causes[lost_to.since] = lost_to.cause
        return seconds

    def add(self, begun: float, ended: float, size: int, *, is_last: bool) -> None:
        """Divide the time of the next allocation among the parts of ``PARTS``, and add it to ``seconds``.

        Args:
            begun: start of the allocation, Unix seconds.
            ended: end of the allocation, Unix seconds.
            size: number of GPUs of the allocation; number of its nodes if the run has no GPUs.
            is_last: True if no other allocation follows.
        """
        self._size = size
        at = begun
        before: _Record | None = None
        for record in self._records:
            if not begun <= record.ended <= ended:
                continue
            starts = max(at, min(record.begun, record.ended))
            in_step = min(record.compile_s, record.ended - starts)
            self._divide_gap(before, record, at, starts, record.compile_s - in_step)
            self._spend("compile", in_step, record.lost_to or self._before[record.attempt])
            part = "lost" if record.lost_to else "fewer" if record.attempt in self._fewer else "steps"
            self._spend(part, record.ended - starts - in_step, record.lost_to)
            at, before = record.ended, record
        if before is None:
            self._divide_starts(at, ended, is_last=is_last)
            return
        self._has_stepped = True
        at += self._spend("saves", min(self._save_s[before.attempt, before.step], ended - at))
        at += self._spend("compile", min(before.val_compile_s, ended - at), self._before[before.attempt])
        for since, until, end in [(at, ended, None)] if is_last else self._slices(at, ended):
            self._spend("shutdown", until - since, end)

    def _divide_gap(self, before: _Record | None, record: _Record, at: float, until: float, compile_s: float) -> None:
        """Divide the time from ``at`` to ``until`` into save, evaluation, starts, restore and compilation.

        Args:
            before: step that ended at ``at``; None if the time begins with the allocation.
            record: step that began at ``until``.
            at: begin of the time, Unix seconds.
            until: end of the time, Unix seconds.
            compile_s: seconds of compilation in this time.
        """
        back = None
        if before is not None:
            at += self._spend("saves", min(self._save_s[before.attempt, before.step], until - at))
            backs = (back for back in self._rollbacks if before.attempt == back.attempt == record.attempt)
            back = next((back for back in backs if before.ended <= back.since <= record.ended), None)
        lost_to = back or self._before[record.attempt]
        compiled = min(compile_s, until - at)
        restored = min(record.restore_s, until - at - compiled)
        until -= compiled + restored
        if before is None or before.attempt != record.attempt:
            self._divide_starts(at, until)
        elif back is not None:
            self._spend("restarts", until - at, lost_to)
        else:
            at += self._spend("compile", min(before.val_compile_s, until - at), lost_to)
            self._spend("evaluations" if before.evaluated else "other", until - at)
        self._spend("restore", restored, lost_to)
        self._spend("compile", compiled, lost_to)

    def _divide_starts(self, at: float, until: float, is_last: bool = False) -> None:
        """Add the time from ``at`` to ``until``, in which ranks start, to the parts ``start`` and ``restarts``.

        Time before the first interruption of the run counts as ``start``, which is not lost. Later time counts as
        ``restarts``. Times are Unix seconds. ``is_last`` is True if the run ends at ``until``.
        """
        for since, end, lost_to in self._slices(at, until):
            if is_last and not self._records and lost_to is self._final:
                lost_to = None  # A program without step records ran until its end: this time is not lost.
            self._spend("start" if lost_to is None else "restarts", end - since, lost_to)

    def _slices(self, at: float, until: float) -> Iterator[tuple[float, float, RunInterruption | None]]:
        """Yield (begin, end, interruption) of each section of a time without steps, from ``at`` to ``until``.

        A section ends at the next interruption. The yielded interruption is the last one before the section; None if
        there was none. Times are Unix seconds.
        """
        current = max((end for end in self._ends if end.since <= at), key=_since, default=None)
        if current is None and self._has_stepped:
            current = UNKNOWN
        for end in self._ends:
            if at < end.since < until:
                yield at, end.since, current
                at, current = end.since, end
        yield at, until, current


_since, _end = attrgetter("since"), attrgetter("ended")


def _cause(event: Mapping[str, Any]) -> str:
    """Return the key of ``CAUSES`` that an event has as its cause; ``unknown`` if it has no cause, or another one.

    The cause ``finished`` gives ``continued``: a finished run loses time only if a later command continues the run.
    """
    cause = event.get("cause")
    return "continued" if cause == "finished" else cause if isinstance(cause, str) and cause in CAUSES else "unknown"
