"""Breakdown of one step in every ``logging.breakdown_interval``: what the device did, and when it did nothing.

torch's profiler watches the step on every rank, and its trace is reduced to a few numbers at once: nothing is kept of
it. Owns that, and the arithmetic of intervals. Must not know what a step is made of.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from gpt.parallel.distributed import World
from launch.runs.records import StepRecord

Interval = tuple[float, float]
"""Begin and end of what a device does, in one unit of time; empty where the end is not above the begin."""

MARK = "gpt.training.breakdown: step"
WARMUP_STEPS = 2
"""First steps of an attempt that are not watched: they compile and connect."""


@dataclass(frozen=True)
class Breakdown:
    """Parts of a step, in the unit of its intervals. ``compute``, ``copies``, ``exposed`` and ``idle`` add up to it."""

    compute: float
    communication: float
    """Time of collectives, hidden by computing or not."""
    exposed: float
    """Communication while nothing is computed or copied."""
    copies: float
    """Copies between host and device, and on it, while nothing is computed."""
    idle: float


def break_down(
    begin: float, end: float, compute: Iterable[Interval], communication: Iterable[Interval], copies: Iterable[Interval]
) -> Breakdown:
    """Divide a step by the intervals of what was done in it, which may overlap in any way and stand out of it."""
    computing, communicating, copying = (
        merge((max(a, begin), min(b, end)) for a, b in intervals) for intervals in (compute, communication, copies)
    )
    busy = length(computing)
    with_copies = merge([*computing, *copying])
    with_all = merge([*with_copies, *communicating])
    return Breakdown(
        compute=busy,
        communication=length(communicating),
        exposed=length(with_all) - length(with_copies),
        copies=length(with_copies) - busy,
        idle=end - begin - length(with_all),
    )


def merge(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals as separate ones in ascending order."""
    found: list[Interval] = []
    for begin, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(intervals: Sequence[Interval]) -> float:
    """Return the length of separate intervals."""
    return sum(end - begin for begin, end in intervals)


def classify(name: str, is_on_gpu: bool, on_gpus: bool) -> str:
    """Return the kind of a profiled event: ``compute``, ``communication`` or ``copies``; empty for any other.

    On a GPU its kernels are what it computes, those of NCCL aside. A CPU computes in the operations of torch, and
    copies by computing; gloo says when its collectives run.
    """
    if on_gpus:
        if not is_on_gpu:
            return ""
        if name.startswith(("Memcpy", "Memset")):
            return "copies"
        return "communication" if name.startswith("nccl") else "compute"
    if name.startswith("gloo:"):
        return "communication"
    return "compute" if name.startswith("aten::") else ""


class StepBreakdown:
    """Asked after each step whether it has something to do there, since the device must be at rest for that."""

    def __init__(self, interval: int, world: World, since: int) -> None:
        self._interval, self._first = interval, since + WARMUP_STEPS + 1
        self._on_gpus = world.device.type == "cuda"
        self._activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._on_gpus else [])]
        self._profiler: profile | None = None
        self._step = 0

    def due(self, step: int) -> bool:
        """True where the step after ``step`` is to be watched, or ``step`` was."""
        return self._profiler is not None or self._is_next(step)

    def _is_next(self, step: int) -> bool:
        return self._interval > 0 and step + 1 >= self._first and (step + 1) % self._interval == 0

    def before(self, step: int) -> None:
        """Begin to watch the step after ``step``, where it is due; the device is at rest."""
        if not self._is_next(step):
            return
        self._step, self._profiler = step + 1, profile(activities=self._activities, acc_events=True)
        self._profiler.start()
        self._mark = record_function(MARK)
        self._mark.__enter__()

    def into(self, record: StepRecord) -> None:
        """End what watches, and complete the record of the step that it has watched; the device is at rest."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        self._mark.__exit__(None, None, None)
        profiler.stop()
        if record.step != self._step:  # the run has gone back meanwhile
            return
        found = self._reduce(profiler)
        record.breakdown_compute_s, record.breakdown_comm_s = found.compute, found.communication
        record.breakdown_exposed_s, record.breakdown_idle_s = found.exposed, found.idle
        record.breakdown_copies_s = found.copies if self._on_gpus else None  # a CPU's are among what it computes

    def _reduce(self, profiler: profile) -> Breakdown:
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        spans: dict[str, list[Interval]] = {"compute": [], "communication": [], "copies": [], "step": []}
        for event in profiler.profiler.kineto_results.events():
            if event.device_type() == DeviceType.CUDA and event.is_user_annotation():
                continue  # the GPU's copy of a mark such as MARK: it lasts from the first kernel in it to the last
            name = event.name()
            kind = classify(name, event.device_type() == DeviceType.CUDA, self._on_gpus)
            if name == MARK and event.device_type() == DeviceType.CPU:
                kind = "step"
            if kind:
                start = event.start_ns()
                spans[kind].append((start / 1e9, (start + event.duration_ns()) / 1e9))
        [(begin, end)] = spans.pop("step")
        return break_down(begin, end, **spans)
