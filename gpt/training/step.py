"""One optimizer step and its figures, and settings of the host that make all steps take equally long."""

from __future__ import annotations

import ctypes
import gc
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.checkpoint import Votes
from gpt.config import Ffn
from gpt.config.optim import lr_at
from gpt.metrics.writers import memory_gib
from gpt.model.ffn import expert_counts, move_balance_bias, reset_counts
from gpt.parallel.distributed import BUBBLE, HOST, Timeline, World, recorded, total, waiting
from gpt.parallel.engine import Engine
from gpt.training.diagnostics import Gradients
from gpt.training.guards import StragglerWatch
from gpt.training.run import Run
from launch.runs.process import Phase
from launch.runs.records import StepRecord

# Phases of one step, timed without waiting: by events in the queue of a GPU, by the host's clock on other devices.
#
# The times are read together with the figures of the step, after the last event.


NO_VOTES = Votes()


def fill_in_phases(record: StepRecord, timeline: Timeline, groups: Sequence[str] | None) -> None:
    """Put the times of the parts of a step into its record, in seconds: forward and backward, optimizer, and
    communication. The device must have finished the step.

    Args:
        record: record of the step.
        timeline: times of this rank in the step, with its waits for other ranks.
        groups: kinds of parallelism, such as ``tp``, whose waits are in ``timeline``. None means that these waits are
            not known; the record then gets no time of communication.
    """
    data, reduced, updated = (timeline.seconds(moment) for moment in timeline.marks)
    spans = timeline.spans()
    timeline.give_back()
    own = [span for span in spans if span.name == HOST] if groups is None else spans
    record.forward_backward_s, record.optimizer_s = (
        end - begin - total(own, begin, end) for begin, end in ((data, reduced), (reduced, updated))
    )
    if groups is None:
        return
    waited = {name: total(spans, 0, updated, name) for name in {span.name for span in spans}}
    record.comm_s = sum(seconds for name, seconds in waited.items() if name not in (BUBBLE, HOST))
    for group in groups:
        setattr(record, f"comm_{group}_s", waited.get(group, 0.0))
    if "pp" in groups:
        record.bubble_s = waited.get(BUBBLE, 0.0)


# Python's garbage collector during training.
#
# By default the collector runs whenever a process has made enough objects. That happens in different steps on different
# ranks, and all ranks wait for the one that collects.


YOUNG = 1
"""Highest generation of objects that Python's garbage collector examines during training. Generation 2, the oldest, is
not examined."""


GC_INTERVAL = 50
"""Number of steps between two runs of Python's garbage collector. All ranks run it in the same step. If each rank ran
it in another step, all other ranks would wait each time."""


@contextmanager
def collect_together() -> Iterator[Callable[[int], None]]:
    """Return a context in which Python's garbage collector runs only in steps that ``GC_INTERVAL`` divides.

    It yields a function that must be called with the number of each step.
    """

    def collect(step: int) -> None:
        if step % GC_INTERVAL == 0:
            gc.collect(YOUNG)

    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield collect
    finally:
        if was_enabled:
            gc.enable()


# Host memory that a training process has freed is kept for its next step.
#
# The C library gives blocks of some 32 MB and more back to the kernel at once. A step that computes on a CPU needs the
# same blocks again: logits, their gradients, large activations. The kernel then has to find and zero each page anew.


TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Numbers of three parameters of glibc's ``mallopt``, from malloc.h."""
NEVER = -1
CHOSEN_BY_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "MALLOC_TOP_PAD_")


def keep_freed_memory() -> bool:
    """Make the C library keep freed memory for this process, because training needs the same memory in every step.

    Returns:
        True if this was done; False if the C library does not support it, or if the user has configured the allocator.
    """
    tuned = any(name in os.environ for name in CHOSEN_BY_USER) or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if sys.platform != "linux" or tuned or "LD_PRELOAD" in os.environ:  # LD_PRELOAD may choose another allocator
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl has no such function
        return False
    return bool(set_option(MMAP_MAX, 0)) and bool(set_option(TRIM_THRESHOLD, NEVER))


# One optimizer step, and its figures.
#
# A GPU works through its queue while this process already prepares the next step. So a step is queued first and its
# figures are read later: reading waits for the device.
#
# Shapes: N figures of a step.


Requests = frozenset[str]
"""Requests to the run from outside: ``stop`` to end the run, ``save`` to save a checkpoint. The set has
one of them, both or none."""


@dataclass
class QueuedStep:
    """A step that is queued on the device, and may not be finished."""

    record: StepRecord
    """Record of the step, with the fields that are known without waiting."""
    requests: Requests
    """Requests that this rank has received. Under the launcher these are the same on all ranks. Without the launcher
    they may differ, and ``requests_of_all`` has those of all ranks."""
    gradients: Gradients | None
    """Statistics of gradients, if the step measures them; else None."""
    sizes: dict[str, int]
    """Name of a figure -> number of its values in ``values``, in the order of ``values``."""
    values: Tensor
    """Values of all figures, on the CPU, (N,) float64; valid when the device has reached ``event``."""
    event: torch.cuda.Event | None
    """Event at the end of the step in the queue of a GPU; None on a CPU, or after it was reached."""
    ended: float
    """Time of the end of the step, of time.perf_counter, in seconds; valid if ``event`` is None."""
    tokens: int
    """Number of tokens of the global batch."""
    votes: Votes
    """Status of the save in flight on this rank. The step sums ``votes.figures`` over all ranks."""
    timeline: Timeline
    timed_groups: tuple[str, ...] | None
    """Kinds of parallelism, such as ``tp``, whose waits are in ``timeline``; None if some are not known
    (``Engine.timed_groups``)."""

    def read(self) -> dict[str, list[float]]:
        """Wait for the end of the step. Return name of a figure -> its values."""
        if self.event is not None:
            self.event.synchronize()
            self.event, self.ended = None, time.perf_counter()
        numbers = iter(self.values.tolist())
        return {name: list(islice(numbers, size)) for name, size in self.sizes.items()}

    def finish(self, since: float) -> tuple[StepRecord, float]:
        """Wait for the end of the step. Return its complete record, and the time of its end.

        ``since`` is the time of the end of the previous step. Both times are of time.perf_counter, in seconds. A loss
        or gradient norm that is not finite on some rank is None in the record; all ranks have then skipped the update.
        """
        figures, ended = self.read(), self.ended
        (grad_norm,), (flaw,), (loss_sum,) = figures["grad_norm"], figures["flaw"], figures["loss_sum"]
        record = self.record
        fill_in_phases(record, self.timeline, self.timed_groups)
        for name in ("expert_imbalance", "loss_scale"):
            if name in figures:
                setattr(record, name, figures[name][0])
        is_sound = math.isfinite(grad_norm) and math.isfinite(flaw)
        (counted,) = figures.get("counted", [self.tokens])  # the targets of the global batch
        record.loss = loss_sum / max(1, counted) if math.isfinite(loss_sum) else None
        record.grad_norm = grad_norm if is_sound else None
        record.step_time_s, record.time = ended - since, time.time()
        record.tokens_per_s = self.tokens / record.step_time_s
        if is_sound and self.gradients is not None:
            self.gradients.into(record, figures["gradients"])
        return record, ended

    def requests_of_all(self) -> Requests:
        """Wait for the end of the step. Return the requests that at least one rank had received when the step was
        queued."""
        figures = self.read()
        if "stop" not in figures:
            return self.requests
        return frozenset(name for name in ("stop", "save") if figures[name][0] > 0)

    def votes_of_all(self) -> dict[str, float]:
        """Wait for the end of the step. Return ``votes.figures``, summed over all ranks."""
        figures = self.read()
        return {name: figures[name][0] for name in self.votes.figures}


def queue_step(
    run: Run,
    gradients: Gradients | None,
    phase: Phase,
    votes: Votes = NO_VOTES,
    stragglers: StragglerWatch | None = None,
    meanwhile: Callable[[], None] = lambda: None,
) -> QueuedStep:
    """Queue the next optimizer step on the device, and return it without waiting. Collective.

        host    | queue step n | read step n - 1, write its record | queue step n + 1 | read step n, ...
        device  ... step n - 1 | step n                                               | step n + 1 ...

    Args:
        run: the run.
        gradients: statistics of gradients to measure in this step; None for none.
        phase: phase of the run that is reported to the launcher.
        votes: status of the save in flight on this rank, to be summed over all ranks.
        stragglers: collects the times of all ranks; None for none.
        meanwhile: called while the ranks sum the figures of the step.
    """
    config, world, engine = run.config, run.world, run.engine
    step = run.step + 1
    lr = lr_at(config.optim, step)
    data = run.batches.take(step)
    timeline = Timeline(world.device)
    has_experts = config.model.ffn is Ffn.moe
    if has_experts:
        reset_counts(engine.module)
    with recorded(timeline):
        loss_sum = engine.backward(data.tokens, data.targets, lambda: run.worker.phase(phase, step - 1))
        timeline.mark()
    asked = {"stop": run.worker.stop_requested(), "save": run.worker.save_requested()}
    run.worker.phase(phase, step - 1)  # the poll looked like training, which allows less silence than a start
    # Figures of this rank that are summed over all ranks. As fills: the host would wait for a copy of its own tensor.
    told: dict[str, float] = dict(votes.figures)
    if not run.worker.agrees:  # under torchrun alone only the ranks can agree
        told = asked | told
    own = {"loss_sum": loss_sum[None]} | {name: loss_sum.new_full((1,), figure) for name, figure in told.items()}
    if stragglers is not None and stragglers.size:
        own["own_times"] = stragglers.own_times(loss_sum)
    if gradients is not None:
        own["gradients"] = gradients.sums(engine.gradients())

    loss_scale = None if engine.loss_scale is None else engine.loss_scale.scale.double()  # before the update adapts it
    with recorded(timeline):
        norm, sums_N, flaw = engine.clip(torch.cat([*own.values()]), waiting(HOST)(meanwhile))
        # Decided before the update, so that either all ranks skip it or none, even if only one replica computed other
        # numbers. Decided on the device, so that no rank waits.
        skip = (sums_N[0] + flaw).isfinite().logical_not()
        own_norm = engine.update(lr, skip)
        timeline.mark()
    grad_norm = norm if own_norm is None else own_norm
    assert grad_norm is not None
    after = {"grad_norm": grad_norm.double(), "flaw": flaw}
    if has_experts:
        after["expert_imbalance"] = balance_experts(engine, world, skip | grad_norm.isfinite().logical_not())
    if loss_scale is not None:
        after["loss_scale"] = loss_scale
    if engine.counted is not None:
        after["counted"] = engine.counted
    run.step = step
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
    sizes = {name: len(figures) for name, figures in own.items()} | dict.fromkeys(after, 1)
    values_N = torch.cat([sums_N, *(figure[None] for figure in after.values())])
    event = torch.cuda.Event() if values_N.is_cuda else None
    values_N = values_N.to("cpu", non_blocking=True)
    if event is not None:
        event.record()
    requests = frozenset(name for name, is_asked in asked.items() if is_asked)
    ended = time.perf_counter()
    return QueuedStep(
        record, requests, gradients, sizes, values_N, event, ended, tokens, votes, timeline, engine.timed_groups
    )


def balance_experts(engine: Engine, world: World, skip: Tensor) -> Tensor:
    """Adapt the balance bias of each expert to its number of tokens in this step, over all ranks. An expert with fewer
    tokens than the mean gets a larger bias, an expert with more tokens a smaller one. Collective. The host does not
    wait for the device.

    No bias changes if ``skip``, a bool tensor (), is true.

    Returns:
        The imbalance of the experts, () float64: the largest excess of an expert's number of tokens over an even share,
        relative to this share. 0 is even, 1 is twice the share (MaxVio, arXiv 2408.15664, section 4.1). Tensor-parallel
        ranks count the same tokens, which does not change the ratios.
    """
    mine_LE = expert_counts(engine.module)
    most = torch.zeros((), dtype=torch.float64, device=world.device)
    if mine_LE is not None:  # a stage of a pipeline may have only the output matrix
        counts_LE = world.all_reduce(mine_LE.double(), engine.layer_group)
        move_balance_bias(engine.module, counts_LE * skip.logical_not())
        most = (counts_LE / counts_LE.mean(1, keepdim=True)).max() - 1
    if engine.layer_group is not None:  # other ranks have the other layers
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most
