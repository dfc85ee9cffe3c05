"""Goodput of a run: its time by part over all attempts, its cost, and the best interval between checkpoints."""

from __future__ import annotations

import math
import time as clock
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from launch.plan.budget import EventLog, Rates, allocations, last_heartbeat, used
from launch.report.interruptions import Division, Losses, Record, Restart, Rollback, Stretch, read_rollbacks
from launch.runs.events import best_interval_s, expected_goodput
from launch.runs.folder import RunFolder
from launch.runs.identity import aside_records

# Cost of failing nodes for a run of so many of them. The arithmetic is ``launch.runs.events``'s.


@dataclass(frozen=True)
class Failures:
    """Cost of failures: seconds that each save holds the steps up, seconds of a restart, hours between failures."""

    mtbf_node_h: float
    """Mean time between failures of one node, hours."""
    save_s: float
    restart_s: float

    def interval_s(self, nodes: int) -> float:
        """Return Young's interval between saves, seconds."""
        return best_interval_s(self.save_s, self.mtbf_s(nodes))

    def mtbf_s(self, nodes: int) -> float:
        """Return the mean time between failures of any of the nodes, seconds: they fail independently."""
        return 3600 * self.mtbf_node_h / nodes

    def goodput(self, nodes: int) -> float:
        """Return the share of the time in steps that count, 0 to 1, where saves are made at Young's interval."""
        return expected_goodput(self.save_s, self.interval_s(nodes), self.restart_s, self.mtbf_s(nodes))


# Goodput of a run: its time by part, from its submission to its end over all attempts, and what it cost.


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
    losses: Losses = field(default_factory=Losses)
    """Part of the time that was lost to interruptions."""

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


def measure_goodput(run: RunFolder, events: Sequence[dict[str, Any]]) -> Goodput | None:
    """Divide the time of a run; None where no agent entered what was allocated."""
    agents = [event for event in events if event["event"] == "agent_started"]
    if not all({"job", "nodes", "allocated_at"} <= event.keys() for event in agents):
        return None  # entered by another hand, or cut: half of the time would be none of the run's
    log, rates = EventLog(list(events), last_heartbeat(run)), Rates()
    found = allocations(log, clock.time(), rates.poll_s)
    if not found:
        return None
    rollbacks = read_rollbacks(events)
    division = Division(events, _read_first_rank(run, rollbacks), rollbacks)
    seconds = dict.fromkeys(PARTS, 0.0)
    losses = _LossCounter(all(started.get("gpus") for started, _ in found))
    since = min((e["time"] for e in events if e["event"] in SUBMISSION), default=found[0][0]["allocated_at"])
    for number, (started, ended) in enumerate(found, start=1):
        begun = float(started["allocated_at"])
        # Between the end of an allocation and the command that asks for the next one, nobody waits.
        asked = [e["time"] for e in events if e["event"] in SUBMISSION and not e.get("moved") and e["time"] <= begun]
        waited_s = max(0.0, begun - max([since, *asked]))
        seconds["waiting"] += waited_s
        since = max(ended, begun)
        stretches = [*division.divide(begun, since, is_last=number == len(found))]
        for stretch in stretches:
            seconds[stretch.part] += stretch.seconds
        losses.add(stretches, waited_s, started)
    use = used([log], clock.time(), rates)
    gpus = {started.get("gpus") for started, _ in found}
    return Goodput(
        seconds={part: value for part, value in seconds.items() if value > 0},
        gpu_hours=use.gpu_hours or None,
        cost=use.cost or None,
        gpus=gpus.pop() if len(gpus) == 1 else None,
        losses=losses.total(),
    )


class _LossCounter:
    """Sums of what interruptions cost, over the allocations of a run in their order."""

    def __init__(self, has_gpus: bool) -> None:
        self._size_of = "gpus" if has_gpus else "nodes"
        self._seconds, self._hours = defaultdict[str, float](float), defaultdict[str, float](float)
        self._found: dict[object, str] = {}
        self._in_place: list[Restart] = []
        self._starts: list[Restart] = []
        self._number = 0
        self._has_first = False

    def add(self, stretches: Sequence[Stretch], waited_s: float, started: Mapping[str, Any]) -> None:
        """Take in the next allocation, with the event that tells its size."""
        size = int(started[self._size_of])
        for stretch in stretches:
            if stretch.lost_to is not None and stretch.seconds > 0:
                self._seconds[stretch.lost_to.cause] += stretch.seconds
                self._hours[stretch.lost_to.cause] += stretch.seconds / 3600 * size
                self._found[stretch.lost_to] = stretch.lost_to.cause
            if stretch.restart_s is not None and stretch.is_in_place:
                self._in_place.append(Restart(stretch.restart_s, size))
            elif stretch.restart_s is not None:
                self._has_first = self._has_first or not self._number
                self._starts.append(Restart(stretch.restart_s, size, waited_s))
        self._number += 1

    def total(self) -> Losses:
        """Return the sums."""
        counts = defaultdict[str, int](int)
        for cause in self._found.values():
            counts[cause] += 1
        return Losses(
            dict(self._seconds),
            dict(self._hours),
            dict(counts),
            "GPU" if self._size_of == "gpus" else "node",
            tuple(self._in_place),
            tuple(self._starts[self._has_first :]),
            self._starts[0] if self._has_first else None,
        )


def _read_first_rank(run: RunFolder, rollbacks: Sequence[Rollback]) -> list[Record]:
    """All records of the first rank, those of steps done again too, in the order of their time."""
    for rank in run.metric_ranks():
        found = list(_records_in(run.metrics(rank), rollbacks))
        if found:
            found = _without_lost(found, rollbacks)
            for path in aside_records(run, rank):  # of steps that the run was taken back from
                found += [replace(record, counts=False, is_aside=True) for record in _records_in(path, rollbacks)]
            return sorted(found, key=lambda record: record.ended)
    return []


def _without_lost(records: Sequence[Record], rollbacks: Sequence[Rollback]) -> list[Record]:
    """Tell the records of steps that were lost: a later attempt, or the same one after a roll-back, began before them.

    They are lost whether they were done again or not: an attempt may end before it comes so far.
    """
    first: dict[int, int] = {}
    for record in records:
        first[record.attempt] = min(record.step, first.get(record.attempt, record.step))
    kept_until, next_one = dict[int, float](), math.inf
    for attempt in sorted(first, reverse=True):
        kept_until[attempt] = next_one
        next_one = min(next_one, first[attempt])
    return [
        replace(
            record,
            counts=record.step < kept_until[record.attempt]
            and not any(back.takes(record.attempt, record.step, record.ended) for back in rollbacks),
        )
        for record in records
    ]


TIMES = ("step_time_s", "compile_s", "val_compile_s", "restore_s")


def _records_in(path: Path, rollbacks: Sequence[Rollback]) -> Iterator[Record]:
    """Yield the records of one file, with the last line of each step of an attempt between two roll-backs."""
    from launch.report.columns import read_columns  # numpy: see launch.report.points

    columns = read_columns(path, (*TIMES, "time", "val_loss"), every=True)
    steps, attempts, times = (columns.values[name].tolist() for name in ("step", "attempt", "time"))
    # A step that is saved is recorded before its save and once more after it, with what that took: one step. One that
    # the run went back from is another.
    keys = [
        (attempt, step, sum(back.attempt == attempt and back.time < time for back in rollbacks))
        for attempt, step, time in zip(attempts, steps, times, strict=True)
    ]
    last_line = {key: index for index, key in enumerate(keys)}
    known = {name: columns.known[name].tolist() for name in (*TIMES, "time", "val_loss")}
    values = {name: columns.values[name].tolist() for name in TIMES}
    for index, key in enumerate(keys):
        if not known["time"][index] or last_line[key] != index:
            continue
        took = {name: values[name][index] if known[name][index] else 0.0 for name in TIMES}
        yield Record(
            attempt=int(attempts[index]),
            step=int(steps[index]),
            begun=times[index] - took["step_time_s"],
            ended=times[index],
            counts=True,
            evaluated=known["val_loss"][index],
            compile_s=took["compile_s"],
            val_compile_s=took["val_compile_s"],
            restore_s=took["restore_s"],
        )
