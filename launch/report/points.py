"""The points of a report, each read from one run folder, and the figures of its GPUs from telemetry."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from typing import Any

from launch.report.goodput import Goodput, measure_goodput
from launch.report.read import Environment, read_environment
from launch.report.steps import MIN_STEPS, StepFigures, StepReading, measure_steps, read_run_steps
from launch.runs.environment import THROTTLE_REASONS, GpuSample, read_samples, telemetry_nodes
from launch.runs.events import Events, events_since_submission, fewer_nodes, select_events
from launch.runs.find import natural
from launch.runs.folder import RunFolder
from launch.runs.overrides import read_overrides, typed_value

# Use of the GPUs of a run, from the telemetry of its agents: energy, power and throttling.


THROTTLING = sum(THROTTLE_REASONS)
"""All bits of ``THROTTLE_REASONS``."""


@dataclass(frozen=True, kw_only=True)
class GpuFigures:
    """Figures of several GPUs over all attempts of a run. A figure that is not known is None."""

    gpus: int
    energy_j: float | None
    """Energy in joules; None if a GPU has fewer than two samples, or unknown energy between two of its samples."""
    mean_power_w: float | None
    """Mean power of one GPU in watts, over the sampled time."""
    throttled: float | None
    """Share (0 to 1) of the samples in which clocks were lowered for a reason in ``THROTTLE_REASONS``."""
    reasons: Mapping[str, float]
    """Reason -> share of the samples, most frequent reason first. Several reasons may apply to one sample."""


@dataclass(frozen=True, kw_only=True)
class HostGpus(GpuFigures):
    """Measurements of the GPUs of one host during a run."""

    host: str


@dataclass(frozen=True, kw_only=True)
class GpuUse(GpuFigures):
    """Figures of all GPUs of a run, while ranks ran. The energy is also None if ``unsampled`` names a host."""

    hosts: tuple[HostGpus, ...]
    """Hosts by name; numbers in names are sorted as numbers."""
    unsampled: tuple[str, ...] = ()
    """Hosts on which, in at least one attempt, some of the GPUs that ranks used were not sampled."""


@dataclass
class _Gpu:
    """Totals of one GPU over the samples that were read so far, and its last sample."""

    last: GpuSample | None = None
    gauges: Mapping[str, float] = field(default_factory=dict)
    """Name of a gauge -> value in the last sample of this GPU."""
    energy_j: float = 0.0
    seconds: float = 0.0
    is_whole: bool = True
    """False if the energy between two successive samples is unknown."""
    samples: int = 0
    """Number of samples that show whether clocks were lowered."""
    throttled: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, sample: GpuSample, gauges: Mapping[str, float]) -> None:
        if self.last is not None and self.last.attempt == sample.attempt and sample.time > self.last.time:
            seconds = sample.time - self.last.time
            energy_j = energy_between(self.gauges, gauges, seconds)
            if energy_j is None:
                self.is_whole = False
            else:
                self.energy_j, self.seconds = self.energy_j + energy_j, self.seconds + seconds
        self.last, self.gauges = sample, gauges
        if "throttle_reasons" in gauges:
            bits = int(gauges["throttle_reasons"]) & THROTTLING
            self.samples, self.throttled = self.samples + 1, self.throttled + bool(bits)
            self.reasons.update(text for bit, text in THROTTLE_REASONS.items() if bits & bit)


def energy_between(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> float | None:
    """Return the energy of one GPU between two samples in joules; None if the samples do not have the needed values.

    The energy counter is used if both samples have it and the driver did not reset it, else the mean power.

    Args:
        before: gauges of the first sample: name -> value.
        after: gauges of the second sample.
        seconds: time between the samples.
    """
    if "energy_j" in before and "energy_j" in after and after["energy_j"] >= before["energy_j"]:
        return after["energy_j"] - before["energy_j"]
    if "power_w" in before and "power_w" in after:
        return seconds * (before["power_w"] + after["power_w"]) / 2
    return None


def read_gpu_use(run: RunFolder, setups: Mapping[int, Environment]) -> GpuUse | None:
    """Return the use of a run's GPUs from their telemetry; None if no GPU was sampled.

    ``setups`` is attempt -> its environment, which names the GPUs of the ranks. Only sums are kept, because the samples
    of a long run on many GPUs do not fit into memory.
    """
    found: dict[str, dict[str, _Gpu]] = defaultdict(lambda: defaultdict(_Gpu))
    sampled_by: dict[tuple[int, str, str], int] = {}
    """(attempt, host, GPU address) -> node whose samples are used. Agents on one machine may sample the same GPU."""
    for node in telemetry_nodes(run):
        for sample in read_samples(run, node):
            for bus, gauges in sample.gauges.items():
                if gauges and sampled_by.setdefault((sample.attempt, sample.host, bus), node) == node:
                    found[sample.host][bus].add(sample, gauges)
    if not found:
        return None
    sampled = Counter((attempt, host) for attempt, host, _ in sampled_by)
    unsampled = set()
    for attempt, setup in setups.items():
        devices = {(place.host, place.gpu or place.device) for place in setup.ranks if place.device != "cpu"}
        used = Counter(host for host, _ in devices)
        unsampled |= {host for host, count in used.items() if sampled[attempt, host] < count}
    whole = _figures([gpu for of_host in found.values() for gpu in of_host.values()])
    return GpuUse(
        **whole | ({"energy_j": None} if unsampled else {}),
        hosts=tuple(HostGpus(host=host, **_figures([*found[host].values()])) for host in sorted(found, key=natural)),
        unsampled=tuple(sorted(unsampled, key=natural)),
    )


def _figures(gpus: Sequence[_Gpu]) -> dict[str, Any]:
    """Return field of ``GpuFigures`` -> its value over all of ``gpus``."""
    joules, seconds = sum(gpu.energy_j for gpu in gpus), sum(gpu.seconds for gpu in gpus)
    samples, reasons = sum(gpu.samples for gpu in gpus), sum((gpu.reasons for gpu in gpus), Counter[str]())
    return {
        "gpus": len(gpus),
        "energy_j": joules if all(gpu.seconds > 0 and gpu.is_whole for gpu in gpus) else None,
        "mean_power_w": joules / seconds if seconds else None,
        "throttled": sum(gpu.throttled for gpu in gpus) / samples if samples else None,
        "reasons": {text: count / samples for text, count in reasons.most_common()},
    }


# The point.


class PointState(StrEnum):
    """State of a point's run: how it has ended, or that it runs, has no records, or has not started."""

    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    BUDGET_EXCEEDED = "budget_exceeded"
    RUNNING = "running"
    NO_RECORDS = "no records"
    NOT_STARTED = "not started"


ENDS = {"finished": PointState.FINISHED, "rank_failed": PointState.FAILED, "stopped": PointState.STOPPED}
"""Event that ends a run -> state of its point."""
REASONS = {"cancelled": PointState.CANCELLED, "budget_reached": PointState.BUDGET_EXCEEDED}
"""Event that requests a stop -> state of a point that was stopped by this request, as in ``launch.status``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Point(StepReading):
    """Point of a scaling curve: what a report reads from one run folder.

    The attempts of a run may have different environments. ``environment`` is that of the last attempt with steps on all
    nodes. ``steps`` are the steps of all attempts with an environment equal to this one.
    """

    path: Path
    overrides: tuple[str, ...]
    state: PointState
    environment: Environment | None
    label: str = ""
    """Name of the point among the points of a report, for people; empty to use the name of its folder."""
    run_time_s: float | None = None
    """Seconds that the ranks ran, from start to end, over all attempts; None if the end of one is unknown."""
    attempts: int = 0
    goodput: Goodput | None = None
    """Wall time of the run, divided into parts such as steps, starts and saves, and the cost of its allocations.

    None if the event log does not describe all allocations of the run.
    """
    gpu_use: GpuUse | None = None
    """Energy, power and throttling of the GPUs; None if no GPU was sampled."""
    fewer_nodes: Mapping[int, int] = field(default_factory=dict)
    """Number of nodes below the requested number -> number of steps that the run made on this number of nodes.

    Nodes that were lost and not replaced leave fewer nodes. ``steps`` contains these steps only if the run has no
    others.
    """
    cluster: str | None = None
    """Name of the ``ClusterKind`` of the last submission, such as ``slurm``; None if the run was not submitted."""
    shared_job: str | None = None
    """Id of the job that other points of the sweep shared; None if the point had a job of its own."""
    source: str = ""
    """In a comparison of folders, label of the folder of this point; empty in a report of one folder."""
    neighbours: tuple[str, ...] = ()
    """Titles of the points that shared cores, a GPU or a job with this point while it made steps."""

    @property
    def is_gpt(self) -> bool:
        """True if the GPT library made the records of the point. More figures are known then."""
        return self.environment is not None and self.environment.workload == "gpt"

    @property
    def name(self) -> str:
        """Name of the run folder."""
        return self.path.name

    @property
    def title(self) -> str:
        """Label of the point; without a label, the name of its folder."""
        return self.label or self.name

    @cached_property
    def figures(self) -> StepFigures | None:
        """Figures of the steps; None if too few steps are left after warm-up."""
        return measure_steps(self.steps)

    @property
    def ranks(self) -> int | None:
        """Number of ranks that the run recorded; if it recorded none, the number that its overrides request.

        None if unknown.
        """
        if self.environment is not None:
            return self.environment.world_size
        nodes, per_node = self._typed("nodes"), self._typed("ranks_per_node")
        return None if nodes is None or per_node is None else nodes * per_node

    @property
    def nodes(self) -> int | None:
        """Number of nodes that the run recorded; if it recorded none, the number that its overrides request.

        None if unknown.
        """
        return self._typed("nodes") if self.environment is None else self.environment.nodes

    def _typed(self, key: str) -> int | None:
        value = typed_value(self.overrides, key)
        return int(value) if value is not None and value.isdigit() else None

    @property
    def crowded(self) -> bool | None:
        """True if ranks shared cores or a GPU; None if the devices are not known."""
        return None if self.environment is None else bool(self.crowding())

    def crowding(self) -> list[str]:
        """Return one phrase for each way in which ranks of the point shared cores or a GPU; empty if none did."""
        own = [] if self.environment is None else self.environment.crowding()
        return own + ([f"on a node at the same time as {' and '.join(self.neighbours)}"] if self.neighbours else [])

    @property
    def is_coarse(self) -> bool:
        """True if step times are means between two readings of a log, and the readings are fewer than ``MIN_STEPS``.

        A point with so few readings gets no efficiency.
        """
        return self.figures is not None and self.figures.intervals < MIN_STEPS

    @property
    def has_efficiency(self) -> bool:
        """True if the point is measured well enough for its own efficiency, and as the baseline of other points.

        The point must have figures, its steps must be timed finely enough, and its ranks must not have shared cores or
        a GPU.
        """
        return self.figures is not None and not self.crowded and not self.is_coarse

    def host(self, rank: int) -> str | None:
        """Return the host name of a rank; None if it was not recorded."""
        places = () if self.environment is None else self.environment.ranks
        return places[rank].host if rank < len(places) else None


def read_point(path: Path) -> Point:
    """Return the point that a run folder describes. An empty or missing folder gives a point without records."""
    run = RunFolder(path)
    setups = {number: read_environment(run, number) for number in run.attempts()}
    known = {number: setup for number, setup in setups.items() if setup is not None}
    last_attempt = max(setups, default=0)
    events = run.read_events()
    times = _attempt_times(events)
    ended = [until - since for since, until in times.values() if until is not None]
    end, fewer = _end(events, last_attempt), fewer_nodes(events)
    reading = read_run_steps(run, known, fewer)
    environment = known[reading.attempt or max(known)] if known else None
    span = reading.span
    if span is None and (until := times.get(last_attempt, (0.0, None))[1]) is not None:
        span = (times[last_attempt][0], until)
    # A program other than gpt may record no steps.
    needs_none = environment is not None and environment.workload != "gpt" and bool(times)
    without_end = PointState.RUNNING if reading.last_step is not None or needs_none else None
    on_fewer = Counter[int]()
    for attempt, event in fewer.items():
        on_fewer[int(event["nodes"])] += reading.attempt_steps.get(attempt, 0)
    submitted = [{}, *select_events(events, "submitted")][-1]
    unit = reading.unit if reading.last_step is not None or environment is None else environment.unit
    return Point(
        **{**vars(reading), "span": span, "unit": unit},
        path=path,
        overrides=read_overrides(run),
        state=end or without_end or (PointState.NO_RECORDS if last_attempt else PointState.NOT_STARTED),
        environment=environment,
        run_time_s=sum(ended) if ended and len(ended) == len(times) else None,
        attempts=len(setups),
        cluster=submitted.get("cluster"),
        shared_job=submitted.get("job_id") if "points" in submitted else None,
        fewer_nodes={nodes: on_fewer[nodes] for nodes in sorted(on_fewer, reverse=True) if on_fewer[nodes]},
        goodput=measure_goodput(run, events),
        gpu_use=read_gpu_use(run, known),
    )


def _attempt_times(events: Events) -> dict[int, tuple[float, float | None]]:
    """Return attempt -> Unix times at which its ranks started and ended.

    The end is None if no event records it.
    """
    times: dict[int, tuple[float, float | None]] = {}
    for event in events:
        name, attempt = event["event"], event.get("attempt")
        if name == "started" and attempt is not None:
            times.setdefault(attempt, (event["time"], None))
        elif name in (*ENDS, "attempt_ended") and attempt in times and times[attempt][1] is None:
            times[attempt] = (times[attempt][0], event["time"])
    return times


def _end(event_log: Events, last: int) -> PointState | None:
    """Return the state of a point from the events that ended attempt number ``last``; None if there are none.

    An event that names no attempt counts as an event of attempt ``last``.
    """
    ends = [event for event in select_events(event_log, *ENDS) if event.get("attempt", last) >= last]
    failures, reasons = select_events(ends, "rank_failed"), select_events(events_since_submission(event_log), *REASONS)
    # A failure after a cancel, or at a cap of the budget, is its consequence. A run that finished nevertheless has
    # finished.
    was_first = bool(reasons) and all(event["time"] >= reasons[0]["time"] for event in failures)
    if was_first and not select_events(ends, "finished"):
        return REASONS[reasons[0]["event"]]
    # A failed rank fails the attempt, even if other ranks record more afterwards.
    if any(event.get("attempt") is not None for event in failures):
        return PointState.FAILED
    return ENDS[ends[-1]["event"]] if ends else None


def disturbs(other: Point, point: Point) -> bool:
    """Return whether ``other`` shared cores, a GPU or a job with ``point`` while both made steps."""
    if other.path == point.path or point.environment is None or other.environment is None:
        return False
    if point.span is None or other.span is None or point.span[0] >= other.span[1] or other.span[0] >= point.span[1]:
        return False
    if point.shared_job is not None and point.shared_job == other.shared_job:
        return True
    sides = (point.environment.ranks, other.environment.ranks)
    gpus = [{place.gpu for place in side if place.gpu is not None} for side in sides]
    if gpus[0] & gpus[1]:
        return True
    cores, threads = Counter[str](), [Counter[str](), Counter[str]()]
    for side, counts in zip(sides, threads, strict=True):
        for place in side:
            cores[place.machine] = max(cores[place.machine], place.cores)
            counts[place.machine] += place.threads if place.device == "cpu" else 0
    mine, other_threads = threads
    return any(mine[at] and other_threads[at] and mine[at] + other_threads[at] > cores[at] for at in cores)
