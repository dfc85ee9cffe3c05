"""The points of a report, each read from one run folder, and the use of its GPUs by telemetry."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from launch.report.goodput import Goodput, measure_goodput
from launch.report.read import Environment, read_columns, read_environment
from launch.report.steps import MIN_STEPS, StepFigures, StepReading, measure_steps, read_run_steps
from launch.runs.environment import THROTTLE_REASONS, GpuSample, read_samples, telemetry_nodes
from launch.runs.events import fewer_nodes, last_command
from launch.runs.find import natural
from launch.runs.folder import RunFolder
from launch.runs.overrides import read_overrides, typed_value

# Use of the GPUs of a run, from the telemetry of its agents: energy, power, clocks and throttling.


THROTTLING = sum(THROTTLE_REASONS)
"""All bits of ``THROTTLE_REASONS``."""
MOST_WINDOWS = 400
"""Largest number of time windows of a curve over the run. With more, the width of the windows doubles."""


@dataclass(frozen=True)
class HostGpus:
    """The GPUs of one host over all attempts. A figure that is not known is None."""

    host: str
    gpus: int
    energy_j: float | None
    mean_power_w: float | None
    """Mean power of one GPU in watts, over the sampled time; None if unknown."""
    sm_clock_mhz: float | None
    """Mean clock of the streaming multiprocessors in MHz; None if unknown."""
    hottest_c: float | None
    """Highest temperature of a GPU in degrees Celsius; None if unknown."""
    throttled: float | None
    """Share of the samples with clocks lowered for a reason in ``THROTTLE_REASONS``; None if unknown."""
    reasons: Mapping[str, float]
    """Reason -> share of the samples, most frequent reason first. Several reasons may apply to one sample."""


@dataclass(frozen=True)
class GpuWindow:
    """One point of the curves over a run: figures over all GPUs in a window of time."""

    begun: float
    """Start of the window, Unix seconds."""
    values: Mapping[str, float]
    """Figures by name.

    power_w and sm_clock_mhz are means, sm_clock_min_mhz and temperature_max_c extremes, throttled is a share of the
    samples.
    """


@dataclass(frozen=True)
class GpuUse:
    """GPU telemetry of a run over all attempts, from the start of the ranks to their end."""

    hosts: tuple[HostGpus, ...]
    """Hosts by name; numbers in names are sorted as numbers."""
    energy_j: float | None
    """Energy of all GPUs in joules; None if some GPUs have no samples, or neither energy nor power."""
    mean_power_w: float | None
    """Mean power of one GPU in watts; None if unknown."""
    throttled: float | None
    """Share of the samples of all GPUs with lowered clocks; None if unknown."""
    unsampled: tuple[str, ...] = ()
    """Hosts with ranks on GPUs that have no samples in some attempt."""
    windows: tuple[GpuWindow, ...] = field(default=(), repr=False)
    """Curves over the run: figures over all GPUs in windows of equal length, in order of time."""


@dataclass
class _Gpu:
    """Energy of one GPU so far in joules, and its last sample: attempt, Unix time, gauges."""

    last: tuple[int, float, Mapping[str, float]] | None = None
    energy_j: float = 0.0
    seconds: float = 0.0
    is_whole: bool = True
    """False if the energy of a part of the time is unknown."""

    def add(self, sample: GpuSample, gauges: Mapping[str, float]) -> None:
        if self.last is not None and self.last[0] == sample.attempt and sample.time > self.last[1]:
            seconds = sample.time - self.last[1]
            energy_j = energy_between(self.last[2], gauges, seconds)
            if energy_j is None:
                self.is_whole = False
            else:
                self.energy_j, self.seconds = self.energy_j + energy_j, self.seconds + seconds
        self.last = sample.attempt, sample.time, gauges


def energy_between(before: Mapping[str, float], after: Mapping[str, float], seconds: float) -> float | None:
    """Return the energy of one GPU between two samples in joules; None if the samples do not show it.

    The energy counter is used if both samples have it and the driver did not reset it, else the mean power.
    """
    if "energy_j" in before and "energy_j" in after and after["energy_j"] >= before["energy_j"]:
        return after["energy_j"] - before["energy_j"]
    if "power_w" in before and "power_w" in after:
        return seconds * (before["power_w"] + after["power_w"]) / 2
    return None


def _energy(gpus: Iterable[_Gpu]) -> float | None:
    return sum(gpu.energy_j for gpu in gpus) if all(gpu.seconds > 0 and gpu.is_whole for gpu in gpus) else None


def _power(gpus: Iterable[_Gpu]) -> float | None:
    seconds = sum(gpu.seconds for gpu in gpus)
    return sum(gpu.energy_j for gpu in gpus) / seconds if seconds else None


class _Gauges(dict[str, tuple[float, int, float, float]]):
    """Gauge -> sum, count, minimum and maximum of its samples; ``throttled`` and each reason count 0 or 1."""

    def add(self, name: str, total: float, count: int, low: float, high: float) -> None:
        if name in self:
            known = self[name]
            total, count, low, high = known[0] + total, known[1] + count, min(known[2], low), max(known[3], high)
        self[name] = total, count, low, high

    def sample(self, gauges: Mapping[str, float]) -> None:
        for name in ("power_w", "sm_clock_mhz", "temperature_c"):
            if name in gauges:
                self.add(name, gauges[name], 1, gauges[name], gauges[name])
        if "throttle_reasons" in gauges:
            bits = int(gauges["throttle_reasons"]) & THROTTLING
            for name, bit in (("throttled", bits), *((text, bits & bit) for bit, text in THROTTLE_REASONS.items())):
                self.add(name, bit != 0, 1, 0, 1)

    def mean(self, name: str) -> float | None:
        return self[name][0] / self[name][1] if name in self else None


def read_gpu_use(run: RunFolder, setups: Mapping[int, Environment]) -> GpuUse | None:
    """Read the GPU telemetry of a run, with the environments of its attempts; None if no GPU was sampled.

    Only sums are kept: the samples of a long run on many GPUs do not fit into memory.
    """
    gpus: dict[str, dict[str, _Gpu]] = defaultdict(lambda: defaultdict(_Gpu))
    gauges_of: dict[str, _Gauges] = defaultdict(_Gauges)
    sampled_by: dict[tuple[int, str, str], int] = {}
    """Attempt, host, GPU address -> node. Agents on one machine may sample the same GPU."""
    windows: dict[int, _Gauges] = defaultdict(_Gauges)
    width_s = 1.0
    for node in telemetry_nodes(run):
        for sample in read_samples(run, node):
            for bus, gauges in sample.gauges.items():
                if gauges and sampled_by.setdefault((sample.attempt, sample.host, bus), node) == node:
                    gpus[sample.host][bus].add(sample, gauges)
                    gauges_of[sample.host].sample(gauges)
                    windows[int(sample.time // width_s)].sample(gauges)
            while len(windows) > MOST_WINDOWS:
                width_s *= 2
                narrow, windows = windows, defaultdict(_Gauges)
                for number, known in narrow.items():
                    for name, sums in known.items():
                        windows[number // 2].add(name, *sums)
    if not gpus:
        return None
    every = [gpu for of_host in gpus.values() for gpu in of_host.values()]
    unsampled = _unsampled(sampled_by, setups)
    counts = [of_host["throttled"] for of_host in gauges_of.values() if "throttled" in of_host]
    return GpuUse(
        hosts=tuple(_host(name, [*gpus[name].values()], gauges_of[name]) for name in sorted(gpus, key=natural)),
        energy_j=None if unsampled else _energy(every),
        mean_power_w=_power(every),
        throttled=sum(lowered for lowered, *_ in counts) / sum(count for _, count, *_ in counts) if counts else None,
        unsampled=unsampled,
        windows=tuple(GpuWindow(number * width_s, _curves(windows[number])) for number in sorted(windows)),
    )


def _host(host: str, gpus: Sequence[_Gpu], gauges: _Gauges) -> HostGpus:
    counts = {text: gauges[text][0] for text in THROTTLE_REASONS.values() if text in gauges and gauges[text][0]}
    return HostGpus(
        host=host,
        gpus=len(gpus),
        energy_j=_energy(gpus),
        mean_power_w=_power(gpus),
        sm_clock_mhz=gauges.mean("sm_clock_mhz"),
        hottest_c=gauges["temperature_c"][3] if "temperature_c" in gauges else None,
        throttled=gauges.mean("throttled"),
        reasons={text: counts[text] / gauges[text][1] for text in sorted(counts, key=lambda text: -counts[text])},
    )


def _curves(gauges: _Gauges) -> dict[str, float]:
    found = {name: gauges.mean(name) for name in ("power_w", "sm_clock_mhz", "throttled")}
    found |= {"sm_clock_min_mhz": gauges["sm_clock_mhz"][2]} if "sm_clock_mhz" in gauges else {}
    found |= {"temperature_max_c": gauges["temperature_c"][3]} if "temperature_c" in gauges else {}
    return {name: value for name, value in found.items() if value is not None}


def _unsampled(sampled_by: Mapping[tuple[int, str, str], int], setups: Mapping[int, Environment]) -> tuple[str, ...]:
    """Return the hosts on which, in some attempt, fewer GPUs were sampled than ranks ran."""
    sampled = Counter((attempt, host) for attempt, host, _ in sampled_by)
    missing = set()
    for attempt, setup in setups.items():
        devices = {(place.host, place.gpu or place.device) for place in setup.ranks if place.device != "cpu"}
        used = Counter(host for host, _ in devices)
        missing |= {host for host, count in used.items() if sampled[attempt, host] < count}
    return tuple(sorted(missing, key=natural))


# Steps that a profiler measured.


SHOWN = {"compute": "computing", "exposed": "exposed communication", "copies": "copies", "idle": "idle"}
"""Part of a profiled step -> its name for people. The parts add up to the step. A CPU has no copies."""


@dataclass(frozen=True)
class ProfiledSteps:
    """Mean seconds of each part of a step, over the profiled steps of all ranks."""

    steps: int
    """Number of profiled steps of the first rank."""
    ranks: int
    """Number of ranks with profiled steps."""
    parts_s: dict[str, float]
    """Part -> seconds: the parts of ``SHOWN``, and ``comm`` for all communication."""

    def text(self) -> str:
        """Return the share of each part in the step, in percent, as text for people."""
        step_s = sum(seconds for part, seconds in self.parts_s.items() if part in SHOWN)
        shares = {part: 100 * seconds / step_s for part, seconds in self.parts_s.items()}
        named = [f"{name} {shares[part]:.1f} %" for part, name in SHOWN.items() if part in shares]
        return f"{', '.join(named)}; communication, hidden or not, takes {shares['comm']:.1f} %"


def read_breakdown(run: RunFolder) -> ProfiledSteps | None:
    """Return the mean parts of the profiled steps. None if the first rank has none; other ranks are not read then."""
    fields = {part: f"breakdown_{part}_s" for part in (*SHOWN, "comm")}
    found: dict[str, list[float]] = {part: [] for part in fields}
    steps = ranks = 0
    for rank in run.metric_ranks():
        values = read_columns(run.metrics(rank), tuple(fields.values())).values
        profiled = int(np.count_nonzero(~np.isnan(values[fields["idle"]])))
        if not profiled and not ranks:
            return None
        steps, ranks = steps or profiled, ranks + bool(profiled)
        for part, name in fields.items():
            found[part] += values[name][~np.isnan(values[name])].tolist()
    return (
        ProfiledSteps(steps, ranks, {part: fmean(known) for part, known in found.items() if known}) if ranks else None
    )


# The point.


class PointState(StrEnum):
    """State of a point: how its run ended, or that it has not ended or started."""

    FINISHED = "finished"
    FAILED = "failed"
    STOPPED = "stopped"
    CANCELLED = "cancelled"
    BUDGET_EXCEEDED = "budget_exceeded"
    RUNNING = "running"
    NO_RECORDS = "no records"
    NOT_STARTED = "not started"


ENDS = {"finished": PointState.FINISHED, "rank_failed": PointState.FAILED, "stopped": PointState.STOPPED}
"""Event -> state of a point whose run ended with this event."""
REASONS = {"cancelled": PointState.CANCELLED, "budget_reached": PointState.BUDGET_EXCEEDED}
"""Event that requests a stop -> state of the stopped point, as in ``launch.status``."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Point(StepReading):
    """Point of a curve: the records of one run folder.

    ``environment`` is the environment of the last attempt with steps on all nodes; ``steps`` are the steps of all
    attempts with an equal environment.
    """

    path: Path
    overrides: tuple[str, ...]
    state: PointState
    environment: Environment | None
    presence: tuple[float, float] | None = None
    """Unix times of the start and end of the run's processes; includes ``span``. None if unknown."""
    label: str = ""
    """Name of the point among the points of a report, for people; empty to use the name of its folder."""
    run_time_s: float | None = None
    """Seconds that the ranks ran, from start to end, over all attempts; None while an attempt runs."""
    attempts: int = 0
    goodput: Goodput | None = None
    """Time of the run by part; None if no agent recorded its allocations."""
    gpu_use: GpuUse | None = None
    """Energy, power and throttling of the GPUs; None if no GPU was sampled."""
    breakdown: ProfiledSteps | None = None
    """Parts of the profiled steps; None if no step was profiled."""
    fewer_nodes: Mapping[int, int] = field(default_factory=dict)
    """Number of nodes, fewer than requested -> number of steps on them after a loss of nodes.

    These steps are in ``steps`` only if the run has no others.
    """
    cluster: str | None = None
    """Cluster of the last submission, ``local`` or ``slurm``; None if the run was not submitted."""
    source: str = ""
    """Label of the folder that the point is from in a comparison; empty in a report of one folder."""
    neighbours: tuple[str, ...] = ()
    """Titles of the points that shared cores or a GPU with this point while it made steps."""

    @property
    def is_gpt(self) -> bool:
        """True if the GPT library made the point. More figures are known then."""
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
        """Number of ranks that the run recorded, or else that its overrides request; None if unknown."""
        if self.environment is not None:
            return self.environment.world_size
        nodes, per_node = (self._typed(key) for key in ("nodes", "ranks_per_node"))
        return nodes * per_node if nodes is not None and per_node is not None else None

    @property
    def nodes(self) -> int | None:
        """Number of nodes that the run recorded, or else that its overrides request; None if unknown."""
        return self._typed("nodes") if self.environment is None else self.environment.nodes

    def _typed(self, key: str) -> int | None:
        value = typed_value(self.overrides, key)
        return int(value) if value is not None and value.isdigit() else None

    @property
    def run_rate(self) -> float | None:
        """Stated work of the run per second of run time; None if not stated, or not finished in one attempt."""
        environment = self.environment
        if environment is None or environment.work_per_step is None or environment.max_steps is None:
            return None
        if self.state is not PointState.FINISHED or self.attempts != 1 or not self.run_time_s:
            return None
        return environment.work_per_step * environment.max_steps / self.run_time_s

    @property
    def crowded(self) -> bool | None:
        """True if ranks shared cores or a GPU; None if the devices are not known."""
        return None if self.environment is None else bool(self.crowding())

    def crowding(self) -> list[str]:
        """Return one phrase for each way in which ranks of the point shared cores or a GPU; empty if none did."""
        own, names = [] if self.environment is None else self.environment.crowding(), self.neighbours
        few = " and ".join(names) if len(names) <= 2 else f"{names[0]} and {len(names) - 1} other points"
        return own + ([f"at the same time as {few}"] if names else [])

    @property
    def is_coarse(self) -> bool:
        """True if step times are means over fewer than ``MIN_STEPS`` intervals, too few for an efficiency."""
        return self.figures is not None and self.figures.intervals < MIN_STEPS

    @property
    def has_efficiency(self) -> bool:
        """True if an efficiency of this point, or relative to it, may be stated."""
        return self.figures is not None and not self.crowded and not self.is_coarse

    def host(self, rank: int) -> str | None:
        """Return the host of a rank; None if it was not recorded."""
        places = () if self.environment is None else self.environment.ranks
        return places[rank].host if rank < len(places) else None


def read_point(path: Path) -> Point:
    """Read one run folder. An empty or missing folder gives a point without records."""
    run = RunFolder(path)
    setups = {number: read_environment(run, number) for number in run.attempts()}
    known = {number: setup for number, setup in setups.items() if setup is not None}
    last_attempt = max(setups, default=0)
    events = run.read_events()
    times = _attempt_times(events)
    ended = [until - since for since, until in times.values() if until is not None]
    end, fewer = _end(events, last_attempt), fewer_nodes(events)
    reading = read_run_steps(run, known, fewer, has_ended=end is not None)
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
    submitted: dict[str, Any] = next((event for event in reversed(events) if event.get("event") == "submitted"), {})
    unit = reading.unit if reading.last_step is not None or environment is None else environment.unit
    return Point(
        **{**vars(reading), "span": span, "unit": unit},
        path=path,
        overrides=read_overrides(run),
        state=end or without_end or (PointState.NO_RECORDS if last_attempt else PointState.NOT_STARTED),
        environment=environment,
        presence=span and _presence(events, span),
        run_time_s=sum(ended) if ended and len(ended) == len(times) else None,
        attempts=len(setups),
        breakdown=read_breakdown(run) if len(reading.steps) else None,
        cluster=submitted.get("cluster"),
        fewer_nodes={nodes: on_fewer[nodes] for nodes in sorted(on_fewer, reverse=True) if on_fewer[nodes]},
        goodput=measure_goodput(run, events),
        gpu_use=read_gpu_use(run, known),
    )


def _attempt_times(events: Sequence[dict[str, Any]]) -> dict[int, tuple[float, float | None]]:
    """Return attempt -> Unix times at which its ranks started and ended.

    The end is None if no event records it.
    """
    times: dict[int, tuple[float, float | None]] = {}
    for event in events:
        name, attempt = event.get("event"), event.get("attempt")
        if name == "started" and attempt is not None:
            times.setdefault(attempt, (event["time"], None))
        elif name in (*ENDS, "attempt_ended") and attempt in times and times[attempt][1] is None:
            times[attempt] = (times[attempt][0], event["time"])
    return times


def _presence(events: Sequence[dict[str, Any]], span: tuple[float, float]) -> tuple[float, float]:
    """Return the Unix times at which the agent started and ended.

    Without such events, they are the start of the ranks, else of ``span``, and the end of ``span``.
    """
    before = {event["event"]: event["time"] for event in events if event["time"] <= span[0]}
    ends = [event["time"] for event in events if event["event"] == "agent_ended" and event["time"] >= span[1]]
    return before.get("agent_started", before.get("started", span[0])), ends[0] if ends else span[1]


def _end(event_log: Sequence[dict[str, Any]], last: int) -> PointState | None:
    """Return the state of a point by the end of attempt ``last``; None if no event records an end.

    An event without attempt counts for every attempt.
    """
    ends = [event for event in event_log if event.get("event") in ENDS and event.get("attempt", last) >= last]
    reason = next((event for event in event_log[last_command(event_log) :] if event.get("event") in REASONS), None)
    failures = [event["time"] for event in ends if event["event"] == "rank_failed" and "time" in event]
    # A failure after a cancel, or at a cap of the budget, is its consequence. A run that finished nevertheless has
    # finished.
    has_finished = any(event["event"] == "finished" for event in ends)
    if reason is not None and not has_finished and all(time >= reason.get("time", 0.0) for time in failures):
        return REASONS[reason["event"]]
    # A failed rank fails the attempt, even if other ranks record more afterwards.
    if any(event["event"] == "rank_failed" and event.get("attempt") is not None for event in ends):
        return PointState.FAILED
    return ENDS[ends[-1]["event"]] if ends else None


def disturbs(other: Point, point: Point) -> bool:
    """Return True if ``other`` shared cores or a GPU with ``point`` while ``point`` made steps.

    A point that starts loads a machine as much as one that makes steps: its ranks import libraries.
    """
    if other.path == point.path or point.environment is None or other.environment is None:
        return False
    if point.span is None or other.presence is None:
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
