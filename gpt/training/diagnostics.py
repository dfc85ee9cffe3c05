"""Diagnostics of training: breakdown of a step, compile time, gradient statistics, profiler."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from gpt.config import PROFILE_FROM, ModelConfig, TrainConfig
from gpt.model.gpt import GPT
from gpt.parallel.distributed import World
from gpt.parallel.engine import shared_squares, times
from launch.runs.records import StepRecord

# Breakdown of one step in every ``logging.breakdown_interval``: the time that the device computed, communicated and
# idled.
#
# torch's profiler watches the step on every rank. Its trace is reduced to a few numbers immediately, and not stored.


Interval = tuple[float, float]
"""(begin, end) of an activity, in any unit of time; empty if end <= begin."""

MARK = "gpt.training.diagnostics: step"
WARMUP_STEPS = 2
"""Number of first steps of an attempt that are not profiled, because in them torch compiles and the ranks connect."""


def break_down(
    begin: float, end: float, compute: Iterable[Interval], communication: Iterable[Interval], copies: Iterable[Interval]
) -> dict[str, float]:
    """Divide the time of a step, from ``begin`` to ``end``, into shares of activities. Return name of a share -> time,
    in the unit of the arguments.

    The names are ``compute``; ``comm``, all time in collectives; ``exposed``, the part of ``comm`` in which nothing is
    computed or copied; ``copies``, the time of copies (between host and device, or on the device) in which nothing is
    computed; and ``idle``, the rest. The sum of ``compute``, ``copies``, ``exposed`` and ``idle`` is the whole step.
    Intervals may overlap, and reach beyond the step.
    """
    computing, communicating, copying = (
        union((max(a, begin), min(b, end)) for a, b in intervals) for intervals in (compute, communication, copies)
    )
    busy, with_copies = length(computing), length(union([*computing, *copying]))
    with_all = length(union([*computing, *copying, *communicating]))
    parts = {"compute": busy, "comm": length(communicating), "exposed": with_all - with_copies}
    return parts | {"copies": with_copies - busy, "idle": end - begin - with_all}


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Return the union of intervals, as intervals without overlap, ascending."""
    found: list[Interval] = []
    for begin, end in sorted(interval for interval in intervals if interval[1] > interval[0]):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(intervals: Sequence[Interval]) -> float:
    """Return the summed length of intervals without overlap."""
    return sum(end - begin for begin, end in intervals)


def activities(on_gpus: bool) -> list[ProfilerActivity]:
    """Return the activities that torch's profiler shall record: those of the host. If the run is on GPUs (``on_gpus``),
    those of the GPU are recorded, too."""
    return [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpus else [ProfilerActivity.CPU]


def classify(name: str, is_on_gpu: bool, on_gpus: bool) -> str:
    """Return the kind of an event of torch's profiler: ``compute``, ``communication`` or ``copies``; an empty text for
    events that do not count.

    If the run is on GPUs, only events on the GPU count: kernels of NCCL are communication, Memcpy and Memset are
    copies, and other kernels are compute. On CPUs, torch's operations are compute, also those that copy; gloo's events
    are communication.

    Args:
        name: name of the event.
        is_on_gpu: True if the event is on a GPU.
        on_gpus: True if the run is on GPUs.
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
    """Profiles every ``interval``-th step. Puts the times of ``break_down``, in seconds, into the record of the step.

    The first ``WARMUP_STEPS`` steps of an attempt are not profiled. The training loop calls ``due`` after each step,
    and the other methods only while the device is idle.

    Args:
        interval: steps whose number is a multiple of it are profiled; 0 profiles no step.
        world: all ranks.
        since: step after which the attempt begins.
    """

    def __init__(self, interval: int, world: World, since: int) -> None:
        self._interval, self._first = interval, since + WARMUP_STEPS + 1
        self._on_gpus = world.device.type == "cuda"
        self._profiler: profile | None = None
        self._step = 0

    def due(self, step: int) -> bool:
        """Return True if the profiler has to start or to stop after ``step``."""
        is_next = self._interval > 0 and step + 1 >= self._first and (step + 1) % self._interval == 0
        return is_next or self._profiler is not None

    def before(self, step: int) -> None:
        """Start the profiler for the step after ``step``, if that is due. The device must be idle."""
        if not self.due(step):
            return
        self._step, self._profiler = step + 1, profile(activities=activities(self._on_gpus), acc_events=True)
        self._profiler.start()
        self._mark = record_function(MARK)
        self._mark.__enter__()

    def into(self, record: StepRecord) -> None:
        """Stop the profiler if it runs, and put the times into ``record``. Put nothing if ``record`` is not that of the
        profiled step, because the run has rolled back. The device must be idle."""
        profiler, self._profiler = self._profiler, None
        if profiler is None:
            return
        self._mark.__exit__(None, None, None)
        profiler.stop()
        if record.step != self._step:  # the run has rolled back since
            return
        for name, seconds in self._reduce(profiler).items():
            if name != "copies" or self._on_gpus:  # a CPU copies by computing
                setattr(record, f"breakdown_{name}_s", seconds)

    def _reduce(self, profiler: profile) -> dict[str, float]:
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        spans: dict[str, list[Interval]] = {"compute": [], "communication": [], "copies": [], "step": []}
        for event in profiler.profiler.kineto_results.events():
            if event.device_type() == DeviceType.CUDA and event.is_user_annotation():
                continue  # the GPU's copy of a mark such as MARK: it lasts from its first kernel to its last
            name = event.name()
            kind = classify(name, event.device_type() == DeviceType.CUDA, self._on_gpus)
            if name == MARK and event.device_type() == DeviceType.CPU:
                kind = "step"
            if kind:
                start = event.start_ns()
                spans[kind].append((start / 1e9, (start + event.duration_ns()) / 1e9))
        [(begin, end)] = spans.pop("step")
        return break_down(begin, end, **spans)


# Time that torch takes to compile, as torch's callbacks report it: from the begin to the end of the outermost phase.


class CompileTime:
    """Measures the time for which torch compiles in this process.

    Args:
        compiles: True if the run compiles; otherwise the compiler is not imported, and ``take`` returns None.
    """

    def __init__(self, compiles: bool) -> None:
        self._began = 0.0
        self._spent_s = 0.0
        self._handler: Any = None
        if compiles:
            # The counters of torch._dynamo.utils add up nested phases and threads; these callbacks give wall time.
            from torch._dynamo.callback import callback_handler

            self._handler = callback_handler
            callback_handler.register_start_callback(self._begin)
            callback_handler.register_end_callback(self._end)

    def take(self) -> float | None:
        """Return the seconds for which torch has compiled since the last call of this method; None if it has compiled
        nothing."""
        if not self._spent_s:
            return None
        seconds, self._spent_s = self._spent_s, 0.0
        return seconds

    def close(self) -> None:
        """End the measurement."""
        if self._handler is not None:
            with contextlib.suppress(ValueError):  # torch._dynamo.reset() has dropped them
                self._handler.remove_start_callback(self._begin)
                self._handler.remove_end_callback(self._end)

    def _begin(self, *_: object) -> None:
        self._began = time.perf_counter()

    def _end(self, *_: object) -> None:
        self._spent_s += time.perf_counter() - self._began


# Gradient statistics: mean, standard deviation, and the norm of each layer.
#
# Every rank sums its own part on its device. The sums travel with the loss, so they need no collective of their own and
# no rank waits for them.


class Gradients:
    """Statistics of gradients: mean, standard deviation, and the norm of each layer."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        with torch.device("meta"):
            whole = GPT(model)
        self._device = device
        trained = {name: p.numel() for name, p in whole.named_parameters() if p.requires_grad}
        self.names = list(dict.fromkeys(map(layer_of, trained)))
        """Names of the layers, in the order of the model."""
        self._elements = sum(trained.values())

    def sums(self, parts: Iterable[tuple[str, Tensor, float]]) -> Tensor:
        """Return sums over the gradients of this rank, (N + 1,) float64, for N layers.

        The first N numbers are the sums of the squares of each layer, and the last one is the sum of all elements.
        Summed over all ranks, these tensors have the sums of the whole model.

        Args:
            parts: for each gradient the name of its parameter, this rank's shard, and 1 / (number of ranks that have
                the same shard).
        """
        named = list(parts)
        held = [(part, share) for _, part, share in named]
        layers: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for (name, *_), squares in zip(named, shared_squares(held), strict=True):
            layers[layer_of(name)].append(squares)
        nothing = torch.zeros((), dtype=torch.float64, device=held[0][0].device)
        sums = [torch.stack(squares).sum() if squares else nothing for squares in layers.values()]
        totals = torch.stack([part.sum() for part, _ in held]).double()
        return torch.stack([*sums, torch.stack(times(totals, [share for _, share in held])).sum()]).to(self._device)

    def into(self, record: StepRecord, sums: list[float]) -> None:
        """Put three figures of the gradients before clipping into a record: mean, standard deviation, and the norm of
        each layer.

        ``sums`` is the result of the method ``sums``, summed over all ranks.
        """
        *squares, total = sums
        mean = total / self._elements
        record.grad_mean, record.grad_std = mean, math.sqrt(max(0.0, sum(squares) / self._elements - mean**2))
        record.layer_grad_norms = {n: math.sqrt(s) for n, s in zip(self.names, squares, strict=True)}


def layer_of(parameter: str) -> str:
    """Return the name of the layer of a parameter: ``blocks.3`` for ``blocks.3.ffn.up.weight``; outside of blocks the
    first word of its name."""
    words = parameter.split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]


# Profile of a few steps: ``profile=true``. Only rank 0 is profiled.


PROFILED = 3
"""Number of steps that ``profile=true`` profiles. A trace has megabytes for each step."""
TRACE = "trace_rank_00000.json.gz"
TABLE = "profile_rank_00000.txt"
ROWS = 40


class StepProfile:
    """Profiles ``PROFILED`` steps on rank 0, from the step ``PROFILE_FROM`` on, if the config requests a profile.

    After each step the training loop calls ``due``; if the result is True, it waits for the device, and calls
    ``after``. All ranks do this, not only rank 0, because all of them must read the results of a step at the same
    point: before they queue the next step.
    """

    def __init__(self, folder: Path, config: TrainConfig, world: World) -> None:
        self._folder = folder
        self._first, self._last = PROFILE_FROM, PROFILE_FROM + PROFILED - 1
        self._wanted, self._is_profiled = config.profile, world.is_first
        self._is_on = False
        self._on_gpus = world.device.type == "cuda"
        self._profiler: profile | None = None

    def due(self, step: int) -> bool:
        """Return True if the profiler has to start or to stop after ``step``; the same on all ranks.

        A run that resumes within these steps profiles the rest of them.
        """
        starts = not self._is_on and self._first <= step + 1 <= self._last
        return self._wanted and (starts or (self._is_on and step >= self._last))

    def after(self, step: int) -> None:
        """Start or stop the profiler, if that is due after ``step``. The device must be idle."""
        if not self.due(step):
            return
        if self._is_on:
            self.close()
            return
        self._first, self._is_on = step + 1, True
        if self._is_profiled:
            self._profiler = profile(activities=activities(self._on_gpus), record_shapes=True)
            self._profiler.start()

    def close(self) -> None:
        """Stop the profiler if it runs, and write trace and table."""
        self._is_on = self._wanted = False
        if self._profiler is None:
            return
        self._profiler.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self._folder / TRACE))
        sort_by = f"self_{'cuda' if self._on_gpus else 'cpu'}_time_total"
        (self._folder / TABLE).write_text(self._profiler.key_averages().table(sort_by=sort_by, row_limit=ROWS))
        print(f"profiled from step {self._first}: {self._folder / TRACE}, {TABLE} beside it", flush=True)
        self._profiler = None
