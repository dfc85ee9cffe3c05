"""The verdict of a drill: final state, samples, leftovers, and goodput beside the prediction of Young and Daly.

Pure functions over two run folders.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.config.compose import workload_of_run
from launch.report.goodput import measure_goodput
from launch.runs.events import FEWER_NODES, best_interval_s, expected_goodput
from launch.runs.folder import RunFolder
from launch.runs.records import read_records

BOOKKEEPING = "manifest.json"
"""File in a checkpoint that tells when, and by which attempt, it was written: the state is in the others."""
SAME = ("loss", "samples", "tokens", "images")
"""Figures of a step that follow from the state and the samples alone."""


def checkpoints(folder: RunFolder) -> list[Path]:
    """Checkpoints that a run could go on from, newest first; hidden names are unfinished ones."""
    listed = workload_of_run(folder).checkpoints(folder)
    if listed is not None:
        return [each.path for each in listed if each.step is not None]
    there = [path for path in folder.checkpoints.glob("*") if not path.name.startswith(".")]
    return sorted(there, key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)


def files_of(checkpoint: Path) -> list[Path]:
    """Files of a checkpoint with its state; hidden ones, and its manifest, are bookkeeping."""
    if checkpoint.is_file():
        return [checkpoint]
    found = (path for path in checkpoint.rglob("*") if path.is_file())
    return sorted(path for path in found if not path.name.startswith(".") and path.name != BOOKKEEPING)


def sums_of(checkpoint: Path) -> dict[str, str]:
    """The SHA-256 sum of each file of a checkpoint with its state."""
    sums = {}
    for path in files_of(checkpoint):
        with path.open("rb") as file:
            sums[str(path.relative_to(checkpoint.parent))] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def differing_state(quiet: RunFolder, stormy: RunFolder) -> Iterator[str]:
    """Yield what differs between the final checkpoints of two runs."""
    last = [next(iter(checkpoints(run)), None) for run in (quiet, stormy)]
    if last[0] is None or last[1] is None:
        yield "no final checkpoint"
        return
    one, other = sums_of(last[0]), sums_of(last[1])
    if not one:
        yield f"{last[0]} has no file to compare"
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield f"{name} differs" if name in one and name in other else f"{name} is not in both"


def differing_steps(quiet: RunFolder, stormy: RunFolder) -> Iterator[str]:
    """Yield the steps, rank by rank, that are missing, too many, or that used other samples than the quiet run's."""
    for rank in sorted({*quiet.metric_ranks(), *stormy.metric_ranks()}):
        one, other = ({r["step"]: r for r in read_records(run.metrics(rank))} for run in (quiet, stormy))
        missing, more = sorted(one.keys() - other), sorted(other.keys() - one)
        if missing or more:
            yield f"rank {rank}: steps {missing[:3] or more[:3]} are {'missing' if missing else 'too many'}"
        wrong = [step for step in sorted(one.keys() & other) if _differ(one[step], other[step])]
        if wrong:
            yield f"rank {rank}: {len(wrong)} steps with another loss or other samples, the first is {wrong[0]}"
    if not quiet.metric_ranks():
        yield "no step records: the program tells nothing of its steps (run.record of launch.worker)"


def _differ(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return any(one.get(name) != other.get(name) for name in SAME)


@dataclass(frozen=True)
class Prediction:
    """Goodput by Young and Daly's first-order model, and the figures that it follows from, all in seconds."""

    save_s: float
    interval_s: float
    """Between two saves, computing."""
    restart_s: float
    """From a fault to the next step."""
    between_faults_s: float
    goodput: float
    best_interval_s: float
    """Interval with the best goodput (Young 1974)."""


def predict(save_s: float, interval_s: float, restart_s: float, between_faults_s: float) -> Prediction:
    """Predict the share of the time that goes into steps that count."""
    goodput = expected_goodput(save_s, interval_s, restart_s, between_faults_s)
    best = best_interval_s(save_s, between_faults_s)
    return Prediction(save_s, interval_s, restart_s, between_faults_s, goodput, best)


@dataclass(frozen=True)
class Measurement:
    """Goodput of a stormy run, and the prediction from its own figures."""

    goodput: float
    after_start: float
    """The same without the first start, of which the model knows nothing."""
    seconds: Mapping[str, float]
    """Seconds by part of ``launch.report.goodput.PARTS``."""
    predicted: Prediction


def measure(stormy: RunFolder, faults: Sequence[Mapping[str, Any]]) -> Measurement | None:
    """Measure the goodput of the stormy run; None if it has too few figures.

    The prediction is for the time of the faults: of saves and steps it takes those up to the last one, as a run may go
    on for long, and at another pace, after it.
    """
    events = stormy.read_events()
    goodput = measure_goodput(stormy, events)
    until = max((fault["time"] for fault in faults), default=0.0)
    saved = [event for event in events if event["event"] == "saved" and event["time"] <= until]
    records = [record for record in read_records(stormy.metrics(0)) if record.get("time", math.inf) <= until]
    times = [record["step_time_s"] for record in records if "step_time_s" in record]
    if goodput is None or not times or len(saved) < 2 or not faults:
        return None
    seconds = goodput.seconds
    allocated = goodput.total_s - seconds.get("waiting", 0.0)
    if allocated <= 0:
        return None
    saves = [float(event.get("seconds", 0.0)) for event in saved]
    steps = sorted({int(event["step"]) for event in saved})
    apart = statistics.median([b - a for a, b in itertools.pairwise(steps)] or [steps[-1]])
    restart_s = sum(seconds.get(part, 0.0) for part in ("restarts", "restore", "shutdown")) / len(faults)
    interval_s = apart * statistics.median(times)
    predicted = predict(statistics.mean(saves), interval_s, restart_s, allocated / len(faults))
    steps_s, start_s = seconds.get("steps", 0.0), seconds.get("start", 0.0)
    return Measurement(goodput.goodput, steps_s / (allocated - start_s), seconds, predicted)


@dataclass(frozen=True)
class Recovery:
    """Cost of one fault, in seconds from it to the first step that had not been made before, and its parts.

    Where no attempt ended by it, the longest pause between two steps from then to the next fault, as of ranks that wait
    for a link.
    """

    kind: str
    road: str
    """Road on which the run went on: undisturbed, in place, spare, fewer nodes, requeue, or typed again."""
    total_s: float
    noticed_s: float = 0.0
    """From the fault to the end of the attempt in the event log, or until the command was typed again."""
    started_s: float = 0.0
    """From there to the start of the ranks."""
    first_step_s: float = 0.0
    """From there to the first step."""
    again_s: float = 0.0
    """In steps done again."""


def recoveries(
    faults: Sequence[Mapping[str, Any]], events: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> list[Recovery]:
    """List what each fault cost, as far as the run made a new step after it and before the next one.

    Args:
        faults: ``kind`` and ``time`` of each, oldest first.
        events: the event log.
        records: all step records of rank 0, those of steps done again too, with their ``time``.
    """
    found = []
    for number, fault in enumerate(faults):
        at = fault["time"]
        until = faults[number + 1]["time"] if number + 1 < len(faults) else math.inf
        done = max((r["step"] for r in records if r["time"] <= at), default=0)
        last = max((r["attempt"] for r in records if r["time"] <= at), default=0)
        # Of an attempt whose agents were all killed nobody enters the end: the command that is typed again tells of it.
        ends = [e for e in events if e["event"] in ("attempt_ended", "submitted") and at <= e["time"] < until]
        ends = [e for e in ends if e.get("cause") != "finished"]
        newer = [r for r in records if at < r["time"] < until and r["step"] > done]
        if ends:
            newer = [r for r in newer if r["attempt"] > last]
        if not newer:
            continue
        first_new = min(r["time"] for r in newer)
        if not ends or ends[0]["time"] > first_new:
            times = [at, *sorted(r["time"] for r in newer if not ends or r["time"] < ends[0]["time"])]
            pause = max(later - earlier for earlier, later in itertools.pairwise(times))
            found.append(Recovery(fault["kind"], "undisturbed", pause))
            continue
        begun = [e["time"] for e in events if e["event"] == "started" and ends[0]["time"] <= e["time"] <= first_new]
        first = min(r["time"] for r in records if r["time"] > ends[0]["time"] and r["attempt"] > last)
        start = begun[-1] if begun else first
        parts = (ends[0]["time"] - at, start - ends[0]["time"], max(0.0, first - start), max(0.0, first_new - first))
        found.append(Recovery(fault["kind"], _road(events, ends[0], first_new), first_new - at, *parts))
    return found


def _road(events: Sequence[Mapping[str, Any]], end: Mapping[str, Any], until: float) -> str:
    """Tell on which road the run went on after the end of an attempt."""
    after = [e for e in events if end["time"] <= e["time"] <= until]
    if any(e["event"] == "submitted" for e in after):
        return "typed again"
    if any(e["event"] == "requeued" for e in after):
        return "requeue"
    if any(e["event"] == FEWER_NODES for e in after):
        return "fewer nodes"
    hosts = [e["hosts"] for e in events if e["event"] == "members" and e["time"] <= until][-2:]
    return "spare" if len(hosts) == 2 and hosts[0] != hosts[1] else "in place"
