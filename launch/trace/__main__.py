"""``python -m launch.trace RUN``: write the times of a run as one file for Perfetto (https://ui.perfetto.dev).

    python -m launch.trace outputs/scaling/nodes=2
    python -m launch.trace outputs/scaling/nodes=2 --ranks 0 5 -o part.json

The file has the steps of the ranks with their phases, the samples of their GPUs, and the goodput and events of the run.
The command changes nothing else.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from shlex import quote
from typing import Any

import gpt_launch.own_names  # noqa: F401
from launch.errors import CommandParser, ConfigError, ranges, refusing
from launch.logs import add_run, find_run
from launch.report.goodput import PARTS, Goodput, measure_goodput
from launch.report.read import Environment, read_environment
from launch.runs.environment import read_samples, telemetry_nodes
from launch.runs.events import Events, aside_records, select_events
from launch.runs.folder import RunFolder, deny_others_writing, read_json_lines
from launch.runs.records import is_number, is_record

MOST_RANKS, MOST_STEPS = 16, 200_000
"""Largest numbers of ranks and of steps in the file.

MOST_RANKS is the number of ranks without ``--ranks``; slow ranks are added to these. MOST_STEPS is for all ranks
together. Perfetto loads the whole file into memory. A step takes about 1 kB.
"""
HOUR_US = 3_600_000_000
"""Time in microseconds that the first event of the run gets in the file.

It is not 0, because clocks of hosts differ, and Perfetto drops times below 0. It is not the Unix time of the event,
because Perfetto reads times as doubles, and would round this time.
"""
PHASES = {
    "data_wait_s": "waiting for data",
    "forward_backward_s": "forward and backward",
    "bubble_s": "pipeline bubble",
    "comm_s": "exposed communication",
    "optimizer_s": "optimizer",
}
"""Field of a step record -> name of the phase, in the order in which a step is drawn."""
Fields = dict[str, Any]


def event_of(process: str, track: str, name: str, since: float, until: float, **fields: Any) -> Fields:
    """Return one event of the file, from ``since`` to ``until``, Unix seconds.

    The format is Chromium's Trace Event Format (Duca and Sinclair, 2016). Its times are whole microseconds here, since
    slices that overlap by a rounding error would be lost.

    Args:
        process: name of the process in Perfetto. The event has this name where the format has the number of a process.
            The traces of torch's profiler do the same.
        track: name of the row below this process. The event has this name where the format has the number of a thread.
        name: name of the event.
        since: begin.
        until: end.
        fields: further fields of the event. Without a type ``ph``, the event is a slice.
    """
    begin, end = round(1e6 * since), round(1e6 * until)
    ids = {"pid": process, "tid": track, "cat": track}
    return {"ph": "X", "name": name, **ids, "ts": begin, "dur": end - begin, **fields}


def run_events(run: RunFolder, events: Events, measured: Goodput | None) -> Iterator[Fields]:
    """Yield a slice for each section of the run's wall time, and a mark for each event of the event log.

    A section belongs to one part of the goodput, such as start, steps or saves. ``measured`` has the sections; if it is
    None, only the marks are yielded.
    """
    process, at = f"run {run.point}", 0.0
    for stretch in () if measured is None else measured.stretches:
        since = at if stretch.since is None else stretch.since
        at = since + stretch.seconds
        yield event_of(process, "goodput", PARTS[stretch.part], since, at, args={"lost to": stretch.cause})
    for event in events:
        # JSON has no NaN.
        args = {name: value for name, value in event.items() if not isinstance(value, float) or is_number(value)}
        yield event_of(process, "events", event["event"], event["time"], event["time"], ph="i", s="t", args=args)


def read_timeline(run: RunFolder, rank: int) -> list[Fields]:
    """Return the step records of a rank in the order of their times, each with its numeric fields only.

    Records of steps that were lost and done again are included.
    """
    found = {}
    for path in (*aside_records(run, rank), run.metrics(rank)):
        for line in read_json_lines(path):
            record = {name: value for name, value in line.items() if is_number(value)}
            if is_record(record) and "time" in record:
                # A step that is saved is recorded before its save and again after it, with the same time.
                found[record["time"], record["step"]] = record
    return [found[key] for key in sorted(found)]


def rank_events(rank: int, records: Sequence[Fields], setups: Mapping[int, Environment | None]) -> Iterator[Fields]:
    """Yield the events of one rank, latest step first.

    For each step: slices of the step, of its phases, of its evaluation and of its checkpoint; and its memory as a
    curve.

    Args:
        rank: number of the rank.
        records: step records of the rank in the order of their times.
        setups: attempt -> its environment, which names the host of the rank; None if it was not recorded.
    """
    # A record may be written while the next step runs: a step has ended before its time, and before the next begins.
    limit, attempt = math.inf, 0
    for record in reversed(records):
        setup, saved = setups.get(record["attempt"]), record.get("checkpoint_s", 0.0)
        track = setup.ranks[rank].host if setup else "host not recorded", f"rank {rank}"
        ended = min(record["time"], limit - saved)
        at = begun = ended - record.get("step_time_s", 0.0)
        yield event_of(*track, f"step {record['step']}", begun, ended, args=record)
        for field, phase in PHASES.items():
            since, at = at, min(at + record.get(field, 0.0), ended)
            yield event_of(*track, phase, since, at)
        memory = {name: value for name, value in record.items() if name.startswith("memory")}
        yield event_of(*track, track[1], ended, ended, ph="C", args=memory)
        # A step is evaluated before it is saved. No record has the time of an evaluation.
        evaluated = "val_loss" in record and record["attempt"] == attempt
        until = limit if evaluated else min(ended + saved, limit)
        since = max(ended, until - saved)
        yield event_of(*track, "evaluation", ended, since)
        yield event_of(*track, "checkpoint", since, until)
        limit, attempt = begun, record["attempt"]


def gpu_events(run: RunFolder, hosts: Collection[str]) -> Iterator[Fields]:
    """Yield the samples of the GPUs on these hosts as curves."""
    for node in telemetry_nodes(run):
        for sample in read_samples(run, node):
            if sample.host in hosts:
                for bus, gauges in sample.gauges.items():
                    yield event_of(sample.host, "GPUs", f"GPU {bus}", sample.time, sample.time, ph="C", args=gauges)


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Write the times of a run to ``trace.json`` in its folder, or to the file after ``-o``.

    Returns the exit status: 0, or 2 if there is no such run, or no such rank with step records.
    """
    parser = CommandParser(prog="python -m launch.trace", description="The times of a run as a file for Perfetto.")
    add_run(parser)
    parser.add_argument("-o", "--out", type=Path, metavar="FILE", help="default: trace.json in the run folder")
    which = f"ranks to show; default: at most {MOST_RANKS} at equal distances, and those that events name as slow"
    parser.add_argument("--ranks", type=int, nargs="+", metavar="RANK", help=which)
    typed = parser.parse_args(arguments)
    deny_others_writing()
    run = find_run(typed.path).folder
    every, events = run.metric_ranks(), run.read_events()
    slow = {event.get("rank") for event in select_events(events, "straggler")} & {*every}
    ranks = sorted({*(typed.ranks or (*every[:: math.ceil(len(every) / MOST_RANKS) or 1], *slow))})
    absent = sorted({*ranks} - {*every})
    if absent or not every:
        raise ConfigError(
            f"{f'--ranks {ranges(absent)}, with ' if absent else ''}no step records in {run.path}",
            f"records of steps of ranks {ranges(every)}" if every else "a run that has made steps",
            f"--ranks {every[0]}" if every else f"python -m launch.status {quote(str(run.path))}",
        )
    setups = {attempt: read_environment(run, attempt) for attempt in run.attempts()}
    most, hosts = MOST_STEPS // len(ranks), set[str]()
    steps = chain.from_iterable(rank_events(rank, read_timeline(run, rank)[-most:], setups) for rank in ranks)
    measured = measure_goodput(run, events)
    path = typed.out or run.path / "trace.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        separator, origin = b"[\n", 0
        for event in chain(run_events(run, events, measured), steps, gpu_events(run, hosts)):
            hosts.add(event["pid"])  # before the samples of the GPUs are read
            origin = origin or event["ts"] - HOUR_US
            event["ts"] -= origin
            if event["ph"] != "X" or event["dur"] > 0:
                file.write(separator + json.dumps(event).encode())
                separator = b",\n"
        file.write(b"\n]\n")
    goodput = "unknown" if measured is None else f"{measured.goodput:.1%}"
    print(
        f"{path}: ranks {ranges(ranks)} of {len(every)}, of each at most the newest {most} steps; goodput {goodput}; "
        "open it in https://ui.perfetto.dev"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
