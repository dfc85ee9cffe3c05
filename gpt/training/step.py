"""One optimizer step, its figures and phases, and the settings of the host that keep steps even."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.config import Ffn
from gpt.config.optim import lr_at
from gpt.metrics.startup_summary import memory_gib
from gpt.model.ffn import expert_counts, move_balance_bias, reset_counts
from gpt.parallel.distributed import World
from gpt.parallel.engine import Engine
from gpt.parallel.timeline import BUBBLE, HOST, Moment, Timeline, do_aside, recorded, total
from gpt.training.diagnostics import Gradients
from gpt.training.run import Run
from gpt.training.stragglers import StragglerWatch
from launch.runs.heartbeat import Phase
from launch.runs.records import StepRecord

# Ballots: figures by which ranks tell each other of saves; they travel with the figures of a step.


@dataclass(frozen=True)
class Ballot:
    """Figures of one rank about saves, summed over the ranks with those of a step."""

    phase: int = 0
    """Phase of the save in flight that the figures are about."""
    figures: tuple[float, ...] = ()
    """Numbers of writers that are done and that have failed; whether a save is due by rank 0's clock.

    The first two are sent while a save is in flight, the last one if time decides. All ranks send equally many.
    """


NO_BALLOT = Ballot()


# Phases of one step, timed without waiting: by events in the queue of a GPU, by the host's clock on other devices.
#
# The times are read together with the figures of the step, after the last event.


PARTS = ("data", "reduced"), ("reduced", "updated")
"""Moments between the phases of a step: computing gradients, then clipping and applying them."""


class Phases:
    """Moments of one step: ``mark`` each in its order; ``fill_in`` the record once the device has passed them.

    Args:
        device: that the step runs on.
        engine: names the groups whose communication can be timed; if some cannot be timed, no group is reported.
    """

    def __init__(self, device: torch.device, engine: Engine) -> None:
        self._timeline = Timeline(device)
        self._groups = engine.timed_groups
        self._moments: dict[str, Moment] = {"data": self._timeline.start}

    def recorded(self) -> AbstractContextManager[None]:
        """Record the waits inside the ``with`` block."""
        return recorded(self._timeline)

    def mark(self, name: str) -> None:
        """Mark the place that the step has reached; wait for nothing."""
        self._moments[name] = self._timeline.now()

    def fill_in(self, record: StepRecord) -> None:
        """Write the times of the phases into the record; the device has finished the step."""
        at = {name: self._timeline.seconds(moment) for name, moment in self._moments.items()}
        spans = self._timeline.spans()
        own = [span for span in spans if span.name == HOST] if self._groups is None else spans
        forward_backward_s, optimizer_s = (at[end] - at[begin] - total(own, at[begin], at[end]) for begin, end in PARTS)
        record.forward_backward_s, record.optimizer_s = forward_backward_s, optimizer_s
        if self._groups is None:
            return
        waited = {name: total(spans, 0, at["updated"], name) for name in {span.name for span in spans}}
        record.comm_s = sum(seconds for name, seconds in waited.items() if name not in (BUBBLE, HOST))
        for group in self._groups:
            setattr(record, f"comm_{group}_s", waited.get(group, 0.0))
        if "pp" in self._groups:
            record.bubble_s = waited.get(BUBBLE, 0.0)


# Python's garbage collector during training.
#
# By default the collector runs whenever a process has made enough objects. That happens in different steps on different
# ranks, and all ranks wait for the one that collects.


YOUNG = 1
"""Highest generation that is collected: objects that survived a collection are not looked at again."""


@contextmanager
def collect_together(interval: int) -> Iterator[Callable[[int], None]]:
    """Collect garbage only in steps that ``interval`` divides, for the length of a ``with`` block; 0 changes nothing.

    Collects all garbage once at the beginning. Yields the function to call with the number of each step.
    """
    if interval == 0:
        yield lambda step: None
        return
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield lambda step: None if step % interval else _collect_young()
    finally:
        if was_enabled:
            gc.enable()


def _collect_young() -> None:
    gc.collect(YOUNG)


# Memory of the host that a training process has freed: kept for its next step.
#
# The C library gives blocks of some 32 MB and more back to the kernel at once. A step that computes on a CPU needs the
# same blocks again: logits, their gradients, large activations. The kernel then has to find and zero each page anew.


TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Names of the settings in glibc's malloc.h."""
NEVER = -1
CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Have the C library keep the memory that this process frees; return False if it cannot, or the user has set it.

    For processes that need the same memory in every step: the process keeps the memory of its highest use.
    """
    tuned = any(name in os.environ for name in CHOSEN_BY_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or tuned or "LD_PRELOAD" in os.environ:  # the last chooses another allocator
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has none
        return False
    return bool(set_option(MMAP_MAX, 0)) and bool(set_option(TRIM_THRESHOLD, NEVER))


# One optimizer step, and its figures.
#
# A GPU works through its queue while this process already prepares the next step. So a step is queued first and its
# figures are read later: reading waits for the device.
#
# Shapes: N figures of a step.


class AsyncMetrics:
    """Numbers that the device may still compute. ``read`` waits for them."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        self._queued = time.perf_counter()

    def read(self) -> tuple[list[float], float]:
        """Return the numbers, and the time at which they were ready (time.perf_counter, seconds)."""
        if self._event is None:
            return self._values.tolist(), self._queued
        self._event.synchronize()
        return self._values.tolist(), time.perf_counter()


@dataclass(frozen=True)
class Requests:
    """Requests to a run from outside, between two steps."""

    stop: bool = False
    save: bool = False

    def __or__(self, other: Requests) -> Requests:
        return Requests(self.stop or other.stop, self.save or other.save)

    def __bool__(self) -> bool:
        return self.stop or self.save


@dataclass(frozen=True)
class QueuedStep:
    """A step that the device works on, or has finished."""

    record: StepRecord
    """Fields that are known without waiting; ``finish`` fills in the rest."""
    requests: Requests
    """Requests to this rank. Under an agent all ranks have the same; else see ``requests_of_all``."""
    gradients: Gradients | None
    """Statistics of the gradients, in a step that measures them."""
    figures: AsyncMetrics
    tokens: int
    """Tokens of the global batch."""
    with_requests: bool
    """True if the figures hold the requests as well, summed over the ranks."""
    ballot: Ballot
    """This rank's figures about saves; the figures hold their sums over the ranks, after the requests."""
    own_times: int
    """Figures after those of the ballot: own time of each rank in an earlier step (``gpt.training.stragglers``)."""
    with_experts: bool
    """True if the figures hold the experts' imbalance."""
    with_loss_scale: bool
    """True if the last figure is the loss scale."""
    phases: Phases

    def finish(self, since: float) -> tuple[StepRecord, float]:
        """Wait for the step; return its record, with the time from ``since``, and its end (time.perf_counter, seconds).

        If loss or gradients were not finite on some rank, all ranks skipped the step, and both are None.
        """
        (grad_norm, flaw, loss_sum, *sums), ended = self.figures.read()
        sums = sums[2 * self.with_requests + len(self.ballot.figures) + self.own_times :]
        record = self.record
        self.phases.fill_in(record)
        if self.with_loss_scale:
            *sums, record.loss_scale = sums
        if self.with_experts:
            record.expert_imbalance = sums.pop()
        is_sound = math.isfinite(grad_norm) and math.isfinite(flaw)
        record.loss = loss_sum / self.tokens if math.isfinite(loss_sum) else None
        record.grad_norm = grad_norm if is_sound else None
        record.step_time_s, record.time = ended - since, time.time()
        if is_sound and self.gradients is not None:
            found = self.gradients.figures(sums)
            record.grad_mean, record.grad_std = found.mean, found.std
            record.layer_grad_norms = found.layer_norms
        return record, ended

    def requests_of_all(self) -> Requests:
        """Wait for the step; return the requests to any rank before its end."""
        if not self.with_requests:
            return self.requests
        (_, _, _, stop, save, *_), _ = self.figures.read()
        return Requests(stop > 0, save > 0)

    def ballots_of_all(self) -> list[float]:
        """Wait for the step; return the ballots of all ranks, summed."""
        if not self.ballot.figures:
            return []
        (_, _, _, *sums), _ = self.figures.read()
        first = 2 * self.with_requests
        return sums[first : first + len(self.ballot.figures)]

    def own_times_of_all(self) -> list[float]:
        """Wait for the step; return the own times of the ranks in it, seconds, by rank."""
        (_, _, _, *sums), _ = self.figures.read()
        first = 2 * self.with_requests + len(self.ballot.figures)
        return sums[first : first + self.own_times]


def queue_step(
    run: Run,
    gradients: Gradients | None,
    phase: Phase,
    ballot: Ballot = NO_BALLOT,
    stragglers: StragglerWatch | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> QueuedStep:
    """Queue one optimizer step over the global batch on the device; measure ``gradients`` if given.

    ``meanwhile`` is called while the ranks sum the figures of the step; a CPU waits for this sum.
    """
    config, world, engine = run.config, run.world, run.engine
    step = run.step + 1
    lr = lr_at(config.optim, step)
    data = run.batches.take(step)
    phases = Phases(world.device, engine)
    if is_mixture(run):
        reset_counts(engine.module)
    with phases.recorded():
        loss_sum = engine.backward(data.tokens, data.targets, lambda: run.worker.phase(phase, step - 1))
        phases.mark("reduced")
    measured = [] if gradients is None else [gradients.sums(engine.gradients())]
    requests = Requests(run.worker.stop_requested(), run.worker.save_requested())
    run.worker.phase(phase, step - 1)  # the poll looked like training, which may be silent for less time than a start
    # Under torchrun alone only the ranks can agree. As fills: the host would wait for a copy of its own tensor.
    told = [] if run.worker.agrees else [loss_sum.new_full((1,), flag) for flag in (requests.stop, requests.save)]
    votes = [loss_sum.new_full((1,), figure) for figure in ballot.figures]
    own_times = [] if stragglers is None else stragglers.own_times(loss_sum)
    figures_N = torch.cat([loss_sum[None], *told, *votes, *own_times, *measured])
    with phases.recorded():
        norm, sums_N, flaw = engine.clip(figures_N, partial(do_aside, meanwhile))
        # Before the update, so that all ranks skip it or none, even if one replica alone computed other numbers. On the
        # device, so that no rank waits for the decision.
        skip = (sums_N[0] + flaw).isfinite().logical_not()
        own_norm = engine.update(lr, skip)
        phases.mark("updated")
    grad_norm = norm if own_norm is None else own_norm
    assert grad_norm is not None
    imbalance = balance_experts(engine, world, skip | grad_norm.isfinite().logical_not()) if is_mixture(run) else None
    run.step = step
    scale = [] if engine.loss_scale is None else [engine.loss_scale.used()[None]]
    tokens = run.tokens_per_step
    record = StepRecord(
        step=step,
        attempt=run.attempt,
        loss=math.nan,
        lr=lr,
        grad_norm=math.nan,
        tokens=tokens * (world.rank + 1) // world.size - tokens * world.rank // world.size,
        samples=(data.first, data.last),
        step_time_s=math.nan,
        data_wait_s=data.waited_s,
    )
    record.memory_allocated_gib, record.memory_peak_gib, record.memory_reserved_gib = memory_gib(world.device)
    uneven = [] if imbalance is None else [imbalance[None]]
    numbers = AsyncMetrics(torch.cat([grad_norm.double()[None], flaw[None], sums_N, *uneven, *scale]))
    parts = bool(told), ballot, sum(map(len, own_times)), bool(uneven), bool(scale)
    return QueuedStep(record, requests, gradients, numbers, tokens, *parts, phases)


def is_mixture(run: Run) -> bool:
    """True for a model with a mixture of experts."""
    return run.config.model.ffn is Ffn.moe


def balance_experts(engine: Engine, world: World, skip: Tensor) -> Tensor:
    """Move the experts' biases by the tokens of this step, over all ranks; wait for no device. Collective.

    If ``skip``, a bool (), is true the biases stay: even counts move none.

    Returns the imbalance of the tokens, () float64: the largest excess of an expert over its even share, in units of
    that share. 0 is even, 1 is twice the share (MaxVio, arXiv 2408.15664, section 4.1). Ranks that share matrices all
    count the same tokens, so every count is multiplied alike; only the ratios matter.
    """
    mine_LE = expert_counts(engine.module)
    most = torch.zeros((), dtype=torch.float64, device=world.device)
    if mine_LE is not None:  # a stage of a pipeline may hold only the output matrix
        counts_LE = world.all_reduce(mine_LE.double(), engine.layer_group)
        move_balance_bias(engine.module, counts_LE * skip.logical_not())
        most = (counts_LE / counts_LE.mean(1, keepdim=True)).max() - 1
    if engine.layer_group is not None:  # other ranks hold the other layers
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most
