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

# Breakdown of the steps that a profiler watched, over all ranks of a run: computing, communication, copies, idle
# time.


SHOWN = {"compute": "computing", "exposed": "exposed communication", "copies": "copies", "idle": "idle"}
"""Part -> its name for people; these make the whole step. A CPU tells no copies."""
FIELDS = {part: f"breakdown_{part}_s" for part in (*SHOWN, "comm")}


@dataclass(frozen=True)
class StepBreakdown:
    """Means over the watched steps of all ranks."""

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
        """Name the shares of the parts, for people."""
        shares = {part: 100 * seconds / self.step_s for part, seconds in self.parts_s.items()}
        told = [f"{name} {shares[part]:.1f} %" for part, name in SHOWN.items() if part in shares]
        return f"{', '.join(told)}; communication, hidden or not, takes {shares['comm']:.1f} %"


def read_breakdown(run: RunFolder) -> StepBreakdown | None:
    """Read the watched steps of a run; None if there is none. Only the first rank's file is read to see that."""
    from launch.report.columns import read_columns  # numpy, which only reading needs

    sums, counts = dict.fromkeys(FIELDS, 0.0), dict.fromkeys(FIELDS, 0)
    steps = ranks = 0
    for rank in run.metric_ranks():
        columns = read_columns(run.metrics(rank), tuple(FIELDS.values()))
        watched = int(columns.known[FIELDS["idle"]].sum())
        if not watched:
            if not ranks:
                return None
            continue
        steps, ranks = steps or watched, ranks + 1
        for part, name in FIELDS.items():
            known = columns.known[name]
            sums[part] += float(columns.values[name][known].sum())
            counts[part] += int(known.sum())
    if not ranks:
        return None
    return StepBreakdown(steps, ranks, {part: sums[part] / counts[part] for part in FIELDS if counts[part]})


# The points of a report, each read from one run folder.


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
"""Event -> state of a point that was stopped for it, in the words of ``launch.status``."""


@dataclass(frozen=True)
class Point:
    """Point of a curve, from one run folder.

    ``environment`` is that of the last attempt with steps, and with all nodes; ``steps`` were made in it.
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
    """Span of its steps: Unix times of the first and the last record of the attempt."""
    presence: tuple[float, float] | None = None
    """Span of its processes, starting and ending included; at least that of its steps."""
    label: str = ""
    """Label that sets it apart from the other points of a report, for people; empty where that is its name."""
    unit: str | None = None
    """Unit of its work: tokens, samples, images; None where nothing says."""
    run_time_s: float | None = None
    """Time that its ranks ran, from the start to the end of each attempt, added up; None while they still do."""
    attempts: int = 0
    goodput: Goodput | None = None
    """Its time by part; None where no agent entered what was allocated."""
    bf16_ratio: float | None = None
    """MFU of the bf16 peak over that of the peak in the precision of the run; None where the records do not tell."""
    gpu_use: GpuUse | None = None
    """Energy, power and throttling of its GPUs; None where none was sampled."""
    breakdown: StepBreakdown | None = None
    """Parts of the steps that a profiler watched; None if it watched none."""
    rank_times: RankTimes | None = None
    """Times of each rank beside those of the others; None where fewer than two recorded the same steps."""
    fewer_nodes: Mapping[int, int] = field(default_factory=dict)
    """Smaller number of nodes -> steps that were made on them, as nodes were lost; none of them are in ``steps``,
    unless there are no others."""
    cluster: str | None = None
    """Kind of cluster it was submitted to, local or slurm, with the name of another one; None where nobody did."""
    unread: tuple[UnreadLines, ...] = ()
    """Lines among its step records that are none; half a line that is being written is not among them."""
    source: str = ""
    """Folder that it belongs to, among those of a comparison; empty in a report of one."""

    @property
    def is_gpt(self) -> bool:
        """Return whether the GPT library made it, of which more is known than of other programs."""
        return self.environment is not None and self.environment.workload == "gpt"

    @property
    def name(self) -> str:
        """The name of its folder, which is cut where it would be too long."""
        return self.path.name

    @property
    def title(self) -> str:
        """Name of the point for people."""
        return self.label or self.name


def read_point(path: Path) -> Point:
    """Read one run folder; one that is empty or does not exist is a point without records."""
    # Both need numpy, which a launch that only prints a plan should not wait for.
    from launch.report.steps import read_steps

    run = RunFolder(path)
    setups = {number: read_environment(run, number) for number in run.attempts()}
    known = {number: setup for number, setup in setups.items() if setup is not None}
    events = run.read_events()
    fewer = fewer_nodes(events)
    last_attempt = max(setups, default=0)
    end = _end(events, last_attempt)
    reading = read_steps(run, known, fewer, has_ended=end is not None)
    stepped = reading.attempt_times or {}
    environment = known[reading.attempt or max(known)] if known else None
    span = stepped[max(stepped)] if stepped else _started_and_ended(events, last_attempt)
    has_records = reading.last_step is not None or _runs_without(events, environment)
    return Point(
        path=path,
        overrides=read_overrides(run),
        state=end or _without_end(last_attempt, has_records=has_records),
        environment=environment,
        steps=reading.steps,
        last_step=reading.last_step,
        loss=reading.loss,
        span=span,
        presence=span and _presence(events, span),
        unit=reading.unit if reading.last_step is not None or environment is None else environment.unit,
        run_time_s=_run_time(events),
        attempts=len(setups),
        rank_times=reading.rank_times,
        bf16_ratio=reading.bf16_ratio,
        breakdown=read_breakdown(run) if reading.steps else None,
        cluster=_cluster(events),
        fewer_nodes=_by_nodes(fewer, reading.attempt_steps),
        unread=reading.unread,
        goodput=measure_goodput(run, events),
        gpu_use=read_gpu_use(run, known),
    )


def _by_nodes(fewer: Mapping[int, Mapping[str, Any]], steps: Mapping[int, int]) -> dict[int, int]:
    """Count the steps that were made on each smaller number of nodes, from the largest."""
    counts = Counter[int]()
    for attempt, event in fewer.items():
        counts[int(event["nodes"])] += steps.get(attempt, 0)
    return {nodes: counts[nodes] for nodes in sorted(counts, reverse=True) if counts[nodes]}


def _cluster(events: Sequence[dict[str, Any]]) -> str | None:
    """The cluster of the last submission."""
    last = next((event for event in reversed(events) if event.get("event") == "submitted"), None)
    if last is None or "cluster" not in last:
        return None
    return f"{last['cluster']} {last['slurm_cluster']}" if last.get("slurm_cluster") else str(last["cluster"])


def _runs_without(events: Sequence[dict[str, Any]], environment: Environment | None) -> bool:
    """Tell a program that has started and need not record any step."""
    return environment is not None and environment.workload != "gpt" and bool(_attempt_times(events))


LEFT = ("finished", "stopped", "rank_failed", "attempt_ended")
"""Events after which the ranks of an attempt are no longer at work."""


def _attempt_times(events: Sequence[dict[str, Any]]) -> dict[int, tuple[float, float | None]]:
    """Times at which the ranks of each attempt started and, if they have, ended."""
    times: dict[int, tuple[float, float | None]] = {}
    for event in events:
        attempt = event.get("attempt")
        if event.get("event") == "started" and attempt is not None:
            times.setdefault(attempt, (event["time"], None))
        elif event.get("event") in LEFT and attempt in times and times[attempt][1] is None:
            times[attempt] = (times[attempt][0], event["time"])
    return times


def _run_time(events: Sequence[dict[str, Any]]) -> float | None:
    """Seconds from ``started`` to the end, over all attempts; None if there was none, or one has not ended."""
    times = _attempt_times(events)
    ended = [end - start for start, end in times.values() if end is not None]
    return sum(ended) if ended and len(ended) == len(times) else None


def _started_and_ended(events: Sequence[dict[str, Any]], attempt: int) -> tuple[float, float] | None:
    start, end = _attempt_times(events).get(attempt, (0.0, None))
    return None if end is None else (start, end)


def _presence(events: Sequence[dict[str, Any]], span: tuple[float, float]) -> tuple[float, float]:
    """From the start of the agent, or if there was none of the ranks, to their end, around ``span``."""
    before = {event["event"]: event["time"] for event in events if event["time"] <= span[0]}
    ends = [event["time"] for event in events if event["event"] == "agent_ended" and event["time"] >= span[1]]
    return before.get("agent_started", before.get("started", span[0])), ends[0] if ends else span[1]


def _end(event_log: Sequence[dict[str, Any]], last: int) -> State | None:
    """State by the ends that the event log knows of the last attempt; one without an attempt belongs to any."""
    events = [e for e in event_log if e.get("event") in ENDS and e.get("attempt", last) >= last]
    told = [e for e in event_log[last_command(event_log) :] if e.get("event") in REASONS]
    failures = [e["time"] for e in events if e["event"] == "rank_failed" and "time" in e]
    # What fails after a cancel, or at the cap, failed because of it; what finished all the same has finished.
    because = not failures or (told and min(failures) >= told[0].get("time", 0.0))
    if told and because and not any(e["event"] == "finished" for e in events):
        return REASONS[told[0]["event"]]
    # A rank that failed fails the attempt, whatever the others wrote after it.
    if any(e["event"] == "rank_failed" and e.get("attempt") is not None for e in events):
        return State.FAILED
    return ENDS[events[-1]["event"]] if events else None


def _without_end(last: int, has_records: bool) -> State:
    """State of a run whose last attempt has not ended."""
    if has_records:
        return State.RUNNING
    return State.NO_RECORDS if last else State.NOT_STARTED


def neighbours(points: Sequence[Point]) -> list[list[str]]:
    """For each point, the names of those it had to share cores or a GPU with while it made steps.

    A point that starts takes as much of a machine as one that makes steps: its ranks import libraries.
    """
    return [
        [other.title for other in points if other.path != point.path and _disturb(point, other)] for point in points
    ]


def _disturb(one: Point, other: Point) -> bool:
    if one.environment is None or other.environment is None or one.span is None or other.presence is None:
        return False
    at_the_same_time = one.span[0] < other.presence[1] and other.presence[0] < one.span[1]
    return at_the_same_time and _share(one.environment, other.environment)


def _share(one: Environment, other: Environment) -> bool:
    """Return whether both had ranks on one GPU, or together more threads on a machine than it has cores."""
    gpus = [{place.gpu for place in side.ranks if place.gpu is not None} for side in (one, other)]
    if gpus[0] & gpus[1]:
        return True
    threads = [_threads(one), _threads(other)]
    cores: dict[str, int] = defaultdict(int)
    for place in (*one.ranks, *other.ranks):
        cores[place.machine] = max(cores[place.machine], place.cores)
    return any(
        threads[0][machine] + threads[1][machine] > cores[machine] for machine in threads[0] if machine in threads[1]
    )


def _threads(environment: Environment) -> dict[str, int]:
    """Threads of the ranks that compute on the CPU, by machine."""
    counts: dict[str, int] = defaultdict(int)
    for place in environment.ranks:
        if place.device == "cpu":
            counts[place.machine] += place.threads
    return counts
