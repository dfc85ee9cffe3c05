"""One optimizer step, and its figures.

Owns the order of what a step does. A GPU works off its queue while this process already prepares the next step, so a
step is queued first and its figures are read later: reading waits for the device. Must not know how the model is
spread, nor what is done with the figures.

Shapes: B sequences, T tokens of one.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from gpt.config import Ffn, OptimConfig, TrainConfig
from gpt.metrics.environment import memory_gib
from gpt.model.moe import expert_counts, move_balance_bias, reset_counts
from gpt.parallel.distributed import World
from gpt.parallel.engine import Engine
from gpt.parallel.loss_scale import MINIMUM
from gpt.training.gradient_stats import Gradients
from gpt.training.phases import Phases
from gpt.training.run import Run
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
    """Where this step measures them."""
    figures: AsyncMetrics
    tokens: int
    """Tokens of the global batch."""
    with_requests: bool
    """True where the figures tell of the requests as well, summed over the ranks."""
    with_experts: bool
    """True where the figures tell of the experts' imbalance."""
    with_loss_scale: bool
    """True where the last two figures are the loss scale and the number of skipped steps."""
    config: TrainConfig
    phases: Phases

    def finish(self, since: float) -> tuple[StepRecord, float]:
        """Wait for the step; its record, with the time from ``since``, and when it was done (time.perf_counter).

        Raises:
            FloatingPointError: loss or gradient norm is not a number, so the weights are none either; with a loss scale
                the step was skipped, unless it is the loss, or the scale is at its least.
        """
        (grad_norm, loss_sum, *sums), ended = self.figures.read()
        sums = sums[2:] if self.with_requests else sums
        record = self.record
        self.phases.fill_in(record)
        if self.with_loss_scale:
            *sums, record.loss_scale, skipped = sums
            record.skipped_steps = int(skipped)
        if self.with_experts:
            record.expert_imbalance = sums.pop()
        record.loss, record.grad_norm, record.step_time_s = loss_sum / self.tokens, grad_norm, ended - since
        record.time = time.time()
        is_finite = math.isfinite(grad_norm)
        if not math.isfinite(record.loss) or not (is_finite or may_skip(record.loss_scale)):
            raise FloatingPointError(divergence_text(record, self.config))
        if not is_finite:
            record.grad_norm = None
        elif self.gradients is not None:
            found = self.gradients.figures(sums)
            record.grad_mean, record.grad_std = found.mean, found.std
            record.layer_grad_norms = found.layer_norms
        return record, ended

    def requests_of_all(self) -> Requests:
        """Wait for the step; what was asked of any rank before it ended."""
        if not self.with_requests:
            return self.requests
        (_, _, stop, save, *_), _ = self.figures.read()
        return Requests(stop > 0, save > 0)


def may_skip(loss_scale: float | None) -> bool:
    """Tell whether gradients may overflow at a loss scale: at the least one it is not the scale that makes them."""
    return loss_scale is not None and loss_scale > MINIMUM


def divergence_text(record: StepRecord, config: TrainConfig) -> str:
    """Say which step has diverged, what to change, and how to begin from the last checkpoint, whose numbers are sound.

    None of the keys may change between the attempts of one run, so each of them means a new folder.
    """
    optim = config.optim
    clip = f"optim.grad_clip={optim.grad_clip / 2:g}" if optim.grad_clip else "optim.grad_clip=1"
    exact = "precision=fp32, or " if config.precision.is_half else ""
    return (
        f"found: the loss of step {record.step} is {record.loss}, with gradient norm {record.grad_norm} and "
        f"lr {record.lr:g}\n"
        "expected: finite numbers; the weights of this step are worthless, and are not saved\n"
        f"type next: optim.lr={optim.lr / 3:.2g} optim.min_lr={optim.min_lr / 3:.2g}, or {clip}, or {exact}a longer "
        "optim.warmup_steps, with fresh=true; init_from=RUN_FOLDER then begins with the weights of its last checkpoint"
    )


def queue_step(run: Run, gradients: Gradients | None, phase: Phase) -> QueuedStep:
    """Put one optimizer step over the global batch into the device's queue; ``gradients`` are measured where given."""
    config, world, engine = run.config, run.world, run.engine
    step = run.step + 1
    lr = lr_at(config.optim, step)
    data = run.batches.take(step)
    phases = Phases(world.device, engine)
    phases.mark("data")
    reset_counts(engine.module)
    loss_sum = engine.backward(data.tokens, data.targets, lambda: run.worker.phase(phase, step - 1))
    phases.mark("reduced")
    measured = [] if gradients is None else [gradients.sums(engine.gradients())]
    requests = Requests(run.worker.stop_requested(), run.worker.save_requested())
    run.worker.phase(phase, step - 1)  # being asked looked like training, which is allowed less silence than a start
    # Under torchrun alone nobody but the ranks can agree. As fills, since a tensor of the host would be waited for.
    told = [] if run.worker.agrees else [loss_sum.new_full((1,), flag) for flag in (requests.stop, requests.save)]
    sums = torch.cat([loss_sum[None], *told, *measured])
    grad_norm = engine.update(lr)
    phases.mark("updated")
    imbalance = balance_experts(engine, world) if config.model.ffn is Ffn.moe else None
    run.step = step
    scale = [] if engine.loss_scale is None else [engine.loss_scale.figures()]
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
    total = world.all_reduce(sums)
    phases.mark("summed")
    numbers = AsyncMetrics(torch.cat([grad_norm.double()[None], total, *uneven, *scale]))
    parts = bool(told), bool(uneven), bool(scale)
    return QueuedStep(record, requests, gradients, numbers, tokens, *parts, config, phases)


def balance_experts(engine: Engine, world: World) -> Tensor:
    """Move the experts' biases by the tokens of this step, over all ranks; waits for no device.

    Collective. Returns how uneven the tokens were, () float64: the most that any expert was chosen beyond its even
    share, in units of that share: 0 is even, 1 twice (MaxVio, arXiv 2408.15664, section 4.1). Ranks that share matrices
    all count the same tokens, so that every count is as many times too high; only their ratios matter.
    """
    mine_LE = expert_counts(engine.module)
    most = torch.zeros((), dtype=torch.float64, device=world.device)
    if mine_LE is not None:  # a stage of a pipeline may hold nothing but the output matrix
        counts_LE = world.all_reduce(mine_LE.double(), engine.layer_group)
        move_balance_bias(engine.module, counts_LE)
        most = (counts_LE / counts_LE.mean(1, keepdim=True)).max() - 1
    if engine.layer_group is not None:  # others hold the other layers
        dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return most


def lr_at(config: OptimConfig, step: int) -> float:
    """Learning rate of step ``step`` (counted from 1): linear warm-up, then a cosine down to ``min_lr``.

    A pure function of the step, so a resumed run needs no schedule state.
    """
    if step <= config.warmup_steps:
        return config.lr * step / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(1.0, done)))
