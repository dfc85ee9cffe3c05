"""The points of a report, each read from one run folder."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from launch.report.environment import Environment, GpuUse, read_environment, read_gpu_use
from launch.report.goodput import Goodput, measure_goodput
from launch.report.steps import RankTimes, Step, UnreadLines
from launch.runs.events import fewer_nodes, last_command
from launch.runs.folder import RunFolder
from launch.runs.overrides import read_overrides

SHOWN = {"compute": "computing", "exposed": "exposed communication", "copies": "copies", "idle": "idle"}
"""Part of a profiled step -> its name for people; they add up to the step. A CPU has no copies."""


@dataclass(frozen=True)
class StepBreakdown:
    """Means over the steps of all ranks that a profiler watched."""

    steps: int
    """Steps that the first rank has watched."""
    ranks: int
    parts_s: dict[str, float]
    """Part of ``SHOWN``, and ``comm``, all communication -> seconds."""

    @property
    def step_s(self) -> float:
        """Mean length of the watched steps."""
        return sum(seconds for part, seconds in self.parts_s.items() if part in SHOWN)

    def text(self) -> str:
        """Write the shares of the parts for people."""
        shares = {part: 100 * seconds / self.step_s for part, seconds in self.parts_s.items()}
        named = [f"{name} {shares[part]:.1f} %" for part, name in SHOWN.items() if part in shares]
        return f"{', '.join(named)}; communication, hidden or not, takes {shares['comm']:.1f} %"


def read_breakdown(run: RunFolder) -> StepBreakdown | None:
    """Return the means of the watched steps; None if the first rank has none: the other files are not read then."""
    from launch.report.columns import read_columns  # numpy, which only reading needs

    fields = {part: f"breakdown_{part}_s" for part in (*SHOWN, "comm")}
    sums, counts = dict.fromkeys(fields, 0.0), dict.fromkeys(fields, 0)
    steps = ranks = 0
    for rank in run.metric_ranks():
        columns = read_columns(run.metrics(rank), tuple(fields.values()))
        watched = int(columns.known[fields["idle"]].sum())
        if not watched and not ranks:
            return None
        steps, ranks = steps or watched, ranks + bool(watched)
        for part, name in fields.items() if watched else ():
            known = columns.known[name]
            sums[part] += float(columns.values[name][known].sum())
            counts[part] += int(known.sum())
    means = {part: sums[part] / counts[part] for part in fields if counts[part]}
    return StepBreakdown(steps, ranks, means) if ranks else None


class State(StrEnum):
    """State of a point."""

    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    BUDGET_EXCEEDED = "budget_exceeded"
    RUNNING = "running"
    NO_RECORDS = "no records"
    NOT_STARTED = "not started"


ENDS = {"finished": State.FINISHED, "rank_failed": State.FAILED, "stopped": State.STOPPED}
"""Event -> state of the point after it."""
REASONS = {"cancelled": State.CANCELLED, "budget_reached": State.BUDGET_EXCEEDED}
"""Event -> state of a point that was stopped for it, as ``launch.status`` calls it."""


@dataclass(frozen=True)
class Point:
    """Point of a curve, from one run folder.

    ``environment`` is that of the last attempt with steps, and on all nodes; ``steps`` were made in it.
    """

    path: Path
    overrides: tuple[str, ...]
    state: State
    environment: Environment | None
    steps: tuple[Step, ...]
    last_step: int | None
    loss: float | None
    """Training loss of the last step, nats per token."""
    span: tuple[float, float] | None = None
    """Unix times of the first and the last record of the attempt."""
    presence: tuple[float, float] | None = None
    """Unix times between which its processes were alive; at least ``span``."""
    label: str = ""
    """Label that sets it apart from the other points of a report, for people; empty if that is its name."""
    unit: str | None = None
    """Unit of its work: tokens, samples, images; None if nothing says."""
    run_time_s: float | None = None
    """Time that its ranks ran, from the start to the end of each attempt, added up; None while an attempt runs."""
    attempts: int = 0
    goodput: Goodput | None = None
    """Its time by part; None if no agent recorded its allocations."""
    bf16_ratio: float | None = None
    """MFU of the bf16 peak over that of the peak in the precision of the run; None if the records do not say."""
    gpu_use: GpuUse | None = None
    """Energy, power and throttling of its GPUs; None if none was sampled."""
    breakdown: StepBreakdown | None = None
    """Parts of the steps that a profiler watched; None if it watched none."""
    rank_times: RankTimes | None = None
    """Times of each rank against those of the others; None if fewer than two recorded the same steps."""
    fewer_nodes: Mapping[int, int] = field(default_factory=dict)
    """Smaller number of nodes -> steps that were made on them after nodes were lost. They are in ``steps`` only if
    there are no others."""
    cluster: str | None = None
    """Cluster of the last submission: local, slurm, or slurm with the name of another one; None if not submitted."""
    unread: tuple[UnreadLines, ...] = ()
    """Lines among its step records that are no records, without half a line that is being written."""
    source: str = ""
    """Folder of a comparison that it belongs to; empty in a report of one."""

    @property
    def is_gpt(self) -> bool:
        """True if the GPT library made it, of which more is known than of other programs."""
        return self.environment is not None and self.environment.workload == "gpt"

    @property
    def name(self) -> str:
        """Name of its folder, which is cut if it would be too long."""
        return self.path.name

    @property
    def title(self) -> str:
        """Name of the point for people."""
        return self.label or self.name


def read_point(path: Path) -> Point:
    """Read one run folder; one that is empty or does not exist is a point without records."""
    from launch.report.reduction import read_steps  # numpy, which only reading needs

    run = RunFolder(path)
    setups = {number: read_environment(run, number) for number in run.attempts()}
    known = {number: setup for number, setup in setups.items() if setup is not None}
    last_attempt = max(setups, default=0)
    events = run.read_events()
    times = _attempt_times(events)
    ended = [until - since for since, until in times.values() if until is not None]
    end, fewer = _end(events, last_attempt), fewer_nodes(events)
    reading = read_steps(run, known, fewer, has_ended=end is not None)
    environment = known[reading.attempt or max(known)] if known else None
    span: tuple[float, float] | None = None
    if reading.attempt_times:
        span = reading.attempt_times[max(reading.attempt_times)]
    elif (until := times.get(last_attempt, (0.0, None))[1]) is not None:
        span = (times[last_attempt][0], until)
    # A program other than gpt need not record any step.
    needs_none = environment is not None and environment.workload != "gpt" and bool(times)
    without_end = State.RUNNING if reading.last_step is not None or needs_none else None
    on_fewer = Counter[int]()
    for attempt, event in fewer.items():
        on_fewer[int(event["nodes"])] += reading.attempt_steps.get(attempt, 0)
    submitted: dict[str, Any] = next((event for event in reversed(events) if event.get("event") == "submitted"), {})
    cluster = (str(submitted[key]) for key in ("cluster", "slurm_cluster") if submitted.get(key))
    return Point(
        path=path,
        overrides=read_overrides(run),
        state=end or without_end or (State.NO_RECORDS if last_attempt else State.NOT_STARTED),
        environment=environment,
        steps=reading.steps,
        last_step=reading.last_step,
        loss=reading.loss,
        span=span,
        presence=span and _presence(events, span),
        unit=reading.unit if reading.last_step is not None or environment is None else environment.unit,
        run_time_s=sum(ended) if ended and len(ended) == len(times) else None,
        attempts=len(setups),
        rank_times=reading.rank_times,
        bf16_ratio=reading.bf16_ratio,
        breakdown=read_breakdown(run) if reading.steps else None,
        cluster=" ".join(cluster) or None,
        fewer_nodes={nodes: on_fewer[nodes] for nodes in sorted(on_fewer, reverse=True) if on_fewer[nodes]},
        unread=reading.unread,
        goodput=measure_goodput(run, events),
        gpu_use=read_gpu_use(run, known),
    )


def _attempt_times(events: Sequence[dict[str, Any]]) -> dict[int, tuple[float, float | None]]:
    """Return the times at which the ranks of each attempt started and ended; None if they have not ended."""
    times: dict[int, tuple[float, float | None]] = {}
    for event in events:
        name, attempt = event.get("event"), event.get("attempt")
        if name == "started" and attempt is not None:
            times.setdefault(attempt, (event["time"], None))
        elif name in (*ENDS, "attempt_ended") and attempt in times and times[attempt][1] is None:
            times[attempt] = (times[attempt][0], event["time"])
    return times


def _presence(events: Sequence[dict[str, Any]], span: tuple[float, float]) -> tuple[float, float]:
    """Return the time from the start of the agent, or of the ranks without agent, to their end, around ``span``."""
    before = {event["event"]: event["time"] for event in events if event["time"] <= span[0]}
    ends = [event["time"] for event in events if event["event"] == "agent_ended" and event["time"] >= span[1]]
    return before.get("agent_started", before.get("started", span[0])), ends[0] if ends else span[1]


def _end(event_log: Sequence[dict[str, Any]], last: int) -> State | None:
    """Return the state after the last attempt; None if it has not ended. An end without attempt belongs to any."""
    ends = [event for event in event_log if event.get("event") in ENDS and event.get("attempt", last) >= last]
    reason = next((event for event in event_log[last_command(event_log) :] if event.get("event") in REASONS), None)
    failures = [event["time"] for event in ends if event["event"] == "rank_failed" and "time" in event]
    # What fails after a cancel, or at the cap, failed because of it; what finished all the same has finished.
    has_finished = any(event["event"] == "finished" for event in ends)
    if reason is not None and not has_finished and all(time >= reason.get("time", 0.0) for time in failures):
        return REASONS[reason["event"]]
    # A rank that failed fails the attempt, whatever the others wrote after it.
    if any(event["event"] == "rank_failed" and event.get("attempt") is not None for event in ends):
        return State.FAILED
    return ENDS[ends[-1]["event"]] if ends else None


def neighbours(points: Sequence[Point]) -> list[list[str]]:
    """Return for each point the names of those it had to share cores or a GPU with while it made steps.

    A point that starts takes as much of a machine as one that makes steps: its ranks import libraries.
    """
    return [
        [other.title for other in points if other.path != point.path and _disturbs(other, point)] for point in points
    ]


def _disturbs(other: Point, point: Point) -> bool:
    if point.environment is None or other.environment is None or point.span is None or other.presence is None:
        return False
    if point.span[0] >= other.presence[1] or other.presence[0] >= point.span[1]:
        return False
    sides = (point.environment.ranks, other.environment.ranks)
    gpus = [{place.gpu for place in side if place.gpu is not None} for side in sides]
    if gpus[0] & gpus[1]:
        return True
    cores: dict[str, int] = defaultdict(int)
    threads = [Counter[str](), Counter[str]()]
    for side, counts in zip(sides, threads, strict=True):
        for place in side:
            cores[place.machine] = max(cores[place.machine], place.cores)
            if place.device == "cpu":
                counts[place.machine] += place.threads
    shared = threads[0].keys() & threads[1].keys()
    return any(threads[0][machine] + threads[1][machine] > cores[machine] for machine in shared)
