"""One optimizer step, and its figures.

Owns the order of what a step does. A GPU works off its queue while this process already prepares the next step, so a
step is queued first and its figures are read later: reading waits for the device. Must not know how the model is
spread, nor what is done with the figures.

Shapes: N figures of a step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.config import Ffn
from gpt.config.optim import lr_at
from gpt.metrics.environment import memory_gib
from gpt.model.moe import expert_counts, move_balance_bias, reset_counts
from gpt.parallel.distributed import World
from gpt.parallel.engine import Engine
from gpt.parallel.timeline import do_aside
from gpt.training.ballot import NO_BALLOT, Ballot
from gpt.training.gradient_stats import Gradients
from gpt.training.phases import Phases
from gpt.training.run import Run
from gpt.training.stragglers import StragglerWatch
from launch.runs.heartbeat import Phase
from launch.runs.records import StepRecord


class AsyncMetrics:
    """Numbers that the device may still be working on. ``read`` waits for them."""

    def __init__(self, values: Tensor) -> None:
        self._values = values.to("cpu", non_blocking=True)
        self._event: torch.cuda.Event | None = None
        if values.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record()
        self._queued = time.perf_counter()

    def read(self) -> tuple[list[float], float]:
        """The numbers, and when they were there (time.perf_counter)."""
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
    """Requests to this rank. All ranks were asked the same where an agent sees to that; else ``requests_of_all``
    tells what was asked of any."""
    gradients: Gradients | None
    """Statistics of the gradients, in a step that measures them."""
    figures: AsyncMetrics
    tokens: int
    """Tokens of the global batch."""
    with_requests: bool
    """True where the figures tell of the requests as well, summed over the ranks."""
    ballot: Ballot
    """Figures by which this rank tells of saves; the figures hold the sums over the ranks, behind the requests."""
    own_times: int
    """Figures behind those of the ballot: own time of each rank in an earlier step (``gpt.training.stragglers``)."""
    with_experts: bool
    """True where the figures tell of the experts' imbalance."""
    with_loss_scale: bool
    """True where the last figure is the loss scale."""
    phases: Phases

    def finish(self, since: float) -> tuple[StepRecord, float]:
        """Wait for the step; its record, with the time from ``since``, and when it was done (time.perf_counter).

        Where loss or gradients were not finite on some rank, the step was skipped on all, and they are None.
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
        """Wait for the step; what was asked of any rank before it ended."""
        if not self.with_requests:
            return self.requests
        (_, _, _, stop, save, *_), _ = self.figures.read()
        return Requests(stop > 0, save > 0)

    def ballots_of_all(self) -> list[float]:
        """Wait for the step; the ballots of all ranks, summed."""
        if not self.ballot.figures:
            return []
        (_, _, _, *sums), _ = self.figures.read()
        first = 2 * self.with_requests
        return sums[first : first + len(self.ballot.figures)]

    def own_times_of_all(self) -> list[float]:
        """Wait for the step; the own times that the ranks told with it, by rank."""
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
    """Put one optimizer step over the global batch into the device's queue; ``gradients`` are measured where given.

    ``meanwhile`` is called while the ranks sum the figures of the step, which a CPU waits for.
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
    run.worker.phase(phase, step - 1)  # being asked looked like training, which is allowed less silence than a start
    # Under torchrun alone nobody but the ranks can agree. As fills, since a tensor of the host would be waited for.
    told = [] if run.worker.agrees else [loss_sum.new_full((1,), flag) for flag in (requests.stop, requests.save)]
    votes = [loss_sum.new_full((1,), figure) for figure in ballot.figures]
    own_times = [] if stragglers is None else stragglers.own_times(loss_sum)
    figures_N = torch.cat([loss_sum[None], *told, *votes, *own_times, *measured])
    with phases.recorded():
        norm, sums_N, flaw = engine.clip(figures_N, partial(do_aside, meanwhile))
        # Before the update, so that all ranks skip it or none, also where one replica alone has computed something
        # else; and on the device, so that none waits for it.
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
    """Move the experts' biases by the tokens of this step, over all ranks; waits for no device.

    Collective. Where ``skip``, a bool (), is true they stay: even counts move none.

    Returns how uneven the tokens were, () float64: the most that any expert was chosen beyond its even share, in units
    of that share: 0 is even, 1 twice (MaxVio, arXiv 2408.15664, section 4.1). Ranks that share matrices all count the
    same tokens, so that every count is as many times too high; only their ratios matter.
    """
    mine_LE = expert_counts(engine.module)
    most = torch.zeros((), dtype=torch.float64, device=world.device)
    if mine_LE is not None:  # a stage of a pipeline may hold nothing but the output matrix
        counts_LE = world.all_reduce(mine_LE.double(), engine.layer_group)
        move_balance_bias(engine.module, counts_LE * skip.logical_not())
        most = (counts_LE / counts_LE.mean(1, keepdim=True)).max() - 1
    if engine.layer_group is not None:  # others hold the other layers
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most
