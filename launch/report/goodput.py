"""Goodput of a run: its time by part, from its submission to its end over all attempts, and what it cost.

Owns the parts, which add up to the whole because each stretch of the clock is given to one of them: the event log says
when nodes were allocated and attempts started, the records of the first rank when steps were made. Must not know how a
report shows it.
"""

from __future__ import annotations

import time as clock
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.plan.budget import EventLog, Rates, allocations, last_heartbeat, used
from launch.runs.events import fewer_nodes
from launch.runs.folder import RunFolder
from launch.runs.rollback import aside_records

PARTS = {
    "waiting": "waiting for nodes",
    "start": "start",
    "steps": "steps that count",
    "fewer": "on fewer nodes",
    "lost": "steps done again",
    "saves": "saves",
    "evaluations": "evaluations",
    "restarts": "restarts",
    "shutdown": "shutdown",
    "other": "between steps",
}
"""Part -> its name for people, in the order in which they are shown."""
SUBMISSION = ("submitted",)


@dataclass(frozen=True)
class Goodput:
    """Seconds of a run by part, and what its allocations amount to; what is not known is None."""

    seconds: Mapping[str, float]
    """Part -> seconds of wall time; all parts of ``PARTS`` that are not zero."""
    gpu_hours: float | None
    cost: float | None
    """In the currency of cluster.price_per_gpu_hour."""
    gpus: int | None
    """GPUs of the allocations, where all have the same number."""

    @property
    def total_s(self) -> float:
        """From the submission to the end, or until now."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """Share of the allocated time in steps that count, those on fewer nodes too."""
        allocated = self.total_s - self.seconds.get("waiting", 0.0)
        steps_s = self.seconds.get("steps", 0.0) + self.seconds.get("fewer", 0.0)
        return steps_s / allocated if allocated else 0.0


@dataclass(frozen=True)
class _Record:
    """One step record of the first rank: when its step began and ended, and what was done after it."""

    attempt: int
    step: int
    begun: float
    ended: float
    counts: bool
    evaluated: bool


def measure_goodput(run: RunFolder, events: Sequence[dict[str, Any]]) -> Goodput | None:
    """Divide the time of a run; None where no agent entered what was allocated."""
    agents = [event for event in events if event["event"] == "agent_started"]
    if not all({"job", "nodes", "allocated_at"} <= event.keys() for event in agents):
        return None  # entered by another hand, or cut: half of the time would be none of the run's
    log, rates = EventLog(list(events), last_heartbeat(run)), Rates()
    found = allocations(log, clock.time(), rates.poll_s)
    if not found:
        return None
    records = _read_first_rank(run)
    saves = [(e["attempt"], e["step"], e["time"], float(e["seconds"])) for e in events if _is_save(e)]
    seconds = dict.fromkeys(PARTS, 0.0)
    since = min((e["time"] for e in events if e["event"] in SUBMISSION), default=found[0][0]["allocated_at"])
    is_first = True
    for started, ended in found:
        begun = float(started["allocated_at"])
        # Between the end of an allocation and the command that asks for the next one, nobody waits.
        asked = [e["time"] for e in events if e["event"] in SUBMISSION and not e.get("moved") and e["time"] <= begun]
        seconds["waiting"] += max(0.0, begun - max([since, *asked]))
        since = max(ended, begun)
        inside = [record for record in records if begun <= record.ended <= ended]
        _divide(seconds, inside, saves, (begun, since), is_first, fewer_nodes(events))
        is_first = is_first and not inside
    use = used([log], clock.time(), rates)
    gpus = {started.get("gpus") for started, _ in found}
    return Goodput(
        seconds={part: value for part, value in seconds.items() if value > 0},
        gpu_hours=use.gpu_hours or None,
        cost=use.cost or None,
        gpus=gpus.pop() if len(gpus) == 1 else None,
    )


def _is_save(event: Mapping[str, Any]) -> bool:
    return event["event"] == "saved" and isinstance(event.get("seconds"), int | float) and "attempt" in event


def _divide(
    seconds: dict[str, float],
    records: Sequence[_Record],
    saves: Sequence[tuple[int, int, float, float]],
    allocation: tuple[float, float],
    is_first: bool,
    fewer: Collection[int],
) -> None:
    """Give every second of one allocation to a part. ``records`` are its steps, in the order of their end.

    ``fewer`` are the attempts on fewer nodes than the run asks for.
    """
    at, end = allocation
    before: _Record | None = None
    for record in records:
        begun = max(at, min(record.begun, record.ended))
        gap = begun - at
        if before is None:
            seconds["start" if is_first else "restarts"] += gap
        else:
            gap -= _give_saves(seconds, saves, before, gap)
            if before.attempt != record.attempt:
                seconds["restarts"] += gap
            else:
                seconds["evaluations" if before.evaluated else "other"] += gap
        made = "fewer" if record.attempt in fewer else "steps"
        seconds[made if record.counts else "lost"] += record.ended - begun
        at, before = record.ended, record
    rest = end - at
    if before is None:
        seconds["start" if is_first else "restarts"] += rest
    else:
        rest -= _give_saves(seconds, saves, before, rest)
        seconds["shutdown"] += rest


def _give_saves(
    seconds: dict[str, float], saves: Sequence[tuple[int, int, float, float]], after: _Record, gap: float
) -> float:
    """Give what the saves behind a step took to them, at most the gap until the next step; returns how much."""
    told = sum(took for attempt, step, _, took in saves if (attempt, step) == (after.attempt, after.step))
    given = min(gap, told)
    seconds["saves"] += given
    return given


def _read_first_rank(run: RunFolder) -> list[_Record]:
    """All records of the first rank, those of steps done again too, in the order of their time."""
    for rank in run.metric_ranks():
        found = list(_records_in(run.metrics(rank)))
        if found:
            for path in aside_records(run, rank):  # of steps that the run was taken back from
                found += [replace(record, counts=False) for record in _records_in(path)]
            return sorted(found, key=lambda record: record.ended)
    return []


def _records_in(path: Path) -> Iterator[_Record]:
    """Yield the records of one file, with the last line of each step of an attempt."""
    from launch.runs.columns import latest_records, read_columns  # numpy: see launch.report.points

    columns = read_columns(path, ("step_time_s", "time", "val_loss"), every=True)
    if columns is None:
        return
    steps, attempts = columns.values["step"], columns.values["attempt"]
    latest = set(latest_records(steps, attempts).tolist())
    # A step that is saved is recorded before its save and once more after it, with what that took: one step.
    last_line = {(attempt, step): index for index, (attempt, step) in enumerate(zip(attempts, steps, strict=True))}
    for index in range(len(columns)):
        if not columns.known["time"][index] or last_line[attempts[index], steps[index]] != index:
            continue
        ended = float(columns.values["time"][index])
        took = float(columns.values["step_time_s"][index]) if columns.known["step_time_s"][index] else 0.0
        yield _Record(
            attempt=int(columns.attempts[index]),
            step=int(columns.steps[index]),
            begun=ended - took,
            ended=ended,
            counts=index in latest,
            evaluated=bool(columns.known["val_loss"][index]),
        )
