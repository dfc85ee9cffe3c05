"""The training loop, and evaluation. The loop reads the figures of a step while the device computes the next step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gpt.data.loader import Samples
from gpt.metrics.writers import MetricWriters
from gpt.parallel.distributed import World
from gpt.parallel.modules import ReplicaCheck
from gpt.training.checkpoints import CheckpointSchedule, go_back, judge_step, start_save
from gpt.training.diagnostics import CompileTime, Gradients, StepBreakdown, StepProfile
from gpt.training.execution import StepTimeouts
from gpt.training.guards import BadSteps, LossWindow, StragglerWatch, refuse_drift
from gpt.training.run import Run
from gpt.training.step import QueuedStep, Requests, collect_together, queue_step
from launch.runs.process import Phase
from launch.runs.records import StepRecord

# Mean loss over sequences of the validation split, computed by all ranks together.
#
# Shapes: B sequences, T tokens of each.


@dataclass(frozen=True)
class EvaluationShare:
    """Sequences of an evaluation, and the part of them that this rank evaluates."""

    sequences: int
    """Number of sequences of all ranks together."""
    batch: int
    """Largest number of sequences in one forward pass."""
    part: int
    """Index of the part that this rank evaluates, from 0 to ``parts`` - 1."""
    parts: int
    """Number of parts into which the sequences are divided."""


@torch.no_grad()
def mean_loss(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    samples: Samples,
    world: World,
    share: EvaluationShare,
    on_pass: Callable[[], object] = lambda: None,
) -> float:
    """Return the mean cross-entropy of the first validation sequences, in nats per target. Collective.

    Targets below 0 do not count. The sequences are the same for any number of ranks.

    Args:
        module: the model, which is in evaluation mode during the call.
        loss: takes tokens and targets, both (B, T), and returns the summed loss. If several ranks compute the loss of
            the same sequences, it returns this rank's part of the sum.
        samples: the samples of the run.
        world: all ranks.
        share: number of sequences, and this rank's part of them.
        on_pass: called before every forward pass.
    """
    mine = np.arange(share.part, share.sequences, share.parts)
    was_training = module.training
    module.eval()
    total, counted = torch.zeros((), dtype=torch.float64, device=world.device), 0
    for i in range(math.ceil(math.ceil(share.sequences / share.parts) / share.batch)):
        on_pass()
        part = mine[i * share.batch : (i + 1) * share.batch]
        # Sharded ranks must all take every pass. A rank without sequences repeats one, which does not count.
        tokens_BT, targets_BT = samples.batch("val", part if len(part) else np.zeros(1, dtype=np.int64))
        summed = loss(tokens_BT, targets_BT)
        if len(part):
            total += summed
            counted += int((targets_BT >= 0).sum())
    module.train(was_training)
    sums = world.all_reduce(torch.stack([total, torch.full_like(total, counted)]))
    summed_loss, targets = sums.tolist()
    return summed_loss / max(1, targets * share.parts / world.size)  # the other ranks have the same sequences


# The training loop: steps, and the work between them: evaluations, checkpoints, records, roll-backs, the end.
#
# The figures of a step are read while the device computes the next one, so the device is never idle between two steps.
# The figures of a step are read before the next step only if the loop pauses, for example for a checkpoint.


def train(run: Run) -> str:
    """Make the remaining steps of a run, and record its end in the event log. Return ``finished``, or ``stopped`` if a
    request to stop has ended the run before its last step. Collective."""
    run.engine.module.train()
    loop = Loop(run)
    try:
        with collect_together() as collect:
            outcome = loop.do_steps(collect)
    finally:
        loop.compile_time.close()
        run.batches.close()
        loop.writers.show()
    run.worker.phase(Phase.leaving, run.step)
    loop.profile.close()
    if outcome == "stopped":
        run.worker.stopped(run.step)
    else:
        early = run.early_stop.reason() if run.step < run.config.optim.max_steps else None
        run.worker.finished(run.step, **({} if early is None else {"early": early}))
        if early is not None and run.world.is_first:
            print(f"finished early: {early}", flush=True)
    loop.writers.close()
    return outcome


class Pause(NamedTuple):
    """Work to do after a step, before the next one is queued; the same on all ranks."""

    last: bool
    """True after the last step of the run."""
    evaluates: bool
    """True to compute the validation loss and the results of ``eval.tasks``."""
    compares: bool
    """True to compare the parameters of replicas."""
    saves: bool
    """True to save a checkpoint to disk."""
    remembers: bool
    """True to save a checkpoint to the memory of the nodes. If ``saves`` is True as well, the checkpoint is saved to
    disk only."""


class Loop:
    """The training loop of one attempt."""

    def __init__(self, run: Run) -> None:
        config, world = run.config, run.world
        self._run = run
        self._gradients = Gradients(config.model, world.device)
        self.writers = MetricWriters(run.folder, world, run.worker, config, run.step, self._gradients.names)
        self.profile = StepProfile(run.folder.attempt(run.attempt), config, world)
        self.profile.after(run.step)
        self.compile_time = CompileTime(config.compiles)
        self._timeouts = StepTimeouts(world, config.parallel)
        compares = config.divergence.replica_check_interval > 0
        self._replicas = ReplicaCheck(run.engine.module, world) if compares else None
        self._schedule = CheckpointSchedule(run)
        self._stragglers = StragglerWatch(run)
        self._stability = LossWindow()
        self._breakdown = StepBreakdown(config.logging.breakdown_interval, world, run.step)
        self._pending_metrics: QueuedStep | None = None
        """The queued step whose record is not complete yet; None if there is none."""
        self._divergence: BadSteps | None = None
        """The bad steps that were found last. Because of them, the run goes back to a checkpoint. The record of a step
        is read only after the next step was queued, so this next step is then discarded. None if no step is bad."""
        self._pending_requests: QueuedStep | None = None
        """The queued step whose requests are not read yet; None if there is none. This is mostly the step of
        ``_pending_metrics``. When the profiler starts or stops after a step, the record of the step is completed first,
        and its requests are read one step later."""
        self._carried_requests: Requests = frozenset()
        """Requests of steps that a roll-back has discarded, to be served after the next step."""
        self._clock = time.perf_counter()
        """Time of the end of the last step or pause, of time.perf_counter, in seconds."""

    def do_steps(self, collect: Callable[[int], None]) -> str:
        """Make the remaining steps, with evaluations and saves. Return ``finished``, or ``stopped`` if a request to
        stop ends the run before its last step.

        ``collect`` runs Python's garbage collector; it is called with the number of each step that was queued.
        """
        run, logging = self._run, self._run.config.logging
        phase, outcome = Phase.starting, None  # the first step may compile
        while outcome is None and run.step < run.config.optim.max_steps:
            measured = self._gradients if is_due(run.step + 1, logging.gradients_interval) else None
            step = queue_step(run, measured, phase, self._schedule.poll(), self._stragglers, self._read_former)
            phase = Phase.training
            step.record.compile_s, step.record.restore_s = self.compile_time.take(), run.restore_s
            run.restore_s = None
            collect(run.step)  # while the device works
            if self._divergence is not None:
                # The step before was found bad after this step was queued. Requests that came during the discarded
                # steps are kept.
                carried = step.requests_of_all()
                if self._pending_requests is not None:
                    carried |= self._pending_requests.requests_of_all()
                bad, self._pending_requests, self._divergence = self._divergence, None, None
                self._go_back(bad, carried)
                continue
            requests = self._collect_requests(step)
            pause = self._pause_after(requests)
            if any(pause) or self.profile.due(run.step) or self._breakdown.due(run.step):
                outcome = self._read_at_once(step, pause, requests)
        return outcome or "finished"

    def _read_former(self) -> None:
        """Complete and write the record of the previous step, while the next step is being queued. Do nothing if the
        record is already written."""
        if self._pending_metrics is not None:
            record, self._divergence = self._read(self._pending_metrics)
            self.writers.write(record)

    def _collect_requests(self, step: QueuedStep) -> Requests:
        """Return the requests to serve after ``step``.

        Under the launcher these are the requests that this rank has received, because all ranks receive the same ones.
        Without the launcher they are the requests that the previous step has summed over all ranks.
        """
        requests = self._carried_requests | (step.requests if self._run.worker.agrees else frozenset())
        self._carried_requests = frozenset()
        if self._pending_requests is not None:
            requests |= self._read_votes(self._pending_requests)
        self._pending_metrics = self._pending_requests = step
        return requests

    def _read_votes(self, step: QueuedStep) -> Requests:
        """Wait for the end of ``step``. The step has summed the status of the save in flight over all ranks; advance
        the save by this sum. Return the requests of all ranks at ``step``."""
        self._schedule.advance(step.votes.phase, step.votes_of_all())
        return step.requests_of_all()

    def _pause_after(self, requests: Requests) -> Pause:
        """Return the work to do after the step that was queued last."""
        config, step, saves = self._run.config, self._run.step, self._run.checkpoints
        last = step == config.optim.max_steps
        can_remember = saves.memory is not None and not saves.is_pending
        return Pause(
            last,
            last or is_due(step, config.eval.interval),
            is_due(step, config.divergence.replica_check_interval),
            last or bool(requests) or self._schedule.is_due(step),
            can_remember and is_due(step, config.checkpoint.memory_interval),
        )

    def _read(self, step: QueuedStep) -> tuple[StepRecord, BadSteps | None]:
        """Wait for the end of a step. Return its complete record, and the steps because of which the run has to roll
        back; None if it need not."""
        record, self._clock = step.finish(self._clock)
        self._pending_metrics = None
        self._timeouts.after(record.step_time_s)
        self._breakdown.into(record)
        self._stability.into(record)
        self._stragglers.after(record, step.read().get("own_times", []))
        return record, judge_step(self._run, record)

    def _read_at_once(self, step: QueuedStep, pause: Pause, requests: Requests) -> str | None:
        """Wait for the end of ``step``, which was queued last, and do the work of ``pause``.

        Returns:
            ``finished`` or ``stopped`` if training ends with this step; None if it continues.
        """
        run, guard = self._run, self._run.guard
        record, bad = self._read(step)
        if any(pause):
            if pause.last and bad is None:
                bad = guard.judge_end()
            self.writers.show()  # a pause may be long
            requests |= self._read_votes(step)
            self._pending_requests = None
        if pause.evaluates and bad is None:
            with self._timeouts.evaluation():
                bad = evaluate_step(run, record)
            record.val_compile_s = self.compile_time.take()
        if bad is not None:  # the weights may be worthless, and are not saved
            self.writers.write(record)
            self._go_back(bad, requests)
            return None
        is_last = pause.last or (pause.evaluates and guard.may_save and run.early_stop.reason() is not None)
        saves = guard.may_save and (pause.saves or is_last or bool(requests))
        if self._replicas is not None and (saves or pause.compares):
            refuse_drift(run, self._replicas)
        if saves:
            self.writers.keep(record)
            record.checkpoint_s = self._schedule.save(record.val_loss, is_last=is_last, is_stop="stop" in requests)
            if run.compiled is not None:
                run.compiled.share()
        elif pause.remembers and guard.may_save:
            started = time.perf_counter()
            start_save(self._run, None, in_memory=True)
            record.checkpoint_s = time.perf_counter() - started
        self.writers.write(record)
        self.profile.after(run.step)
        if not (is_last or "stop" in requests):
            self._breakdown.before(run.step)
        self._clock = time.perf_counter()
        if is_last:
            return "finished"
        if "stop" in requests:
            self._schedule.finish()
            return "stopped"
        return None

    def _go_back(self, bad: BadSteps, requests: Requests) -> None:
        """Roll the run back because of the steps ``bad``. ``requests`` of the discarded steps are served after the next
        step."""
        self._schedule.finish()
        go_back(self._run, self.writers, bad)
        self._stability.clear()
        self._carried_requests, self._clock = requests, time.perf_counter()


def evaluate_step(run: Run, record: StepRecord) -> BadSteps | None:
    """Evaluate, and put the results into ``record``: the validation loss in nats per token, in bits per byte of text if
    its size is known, and the results of ``eval.tasks``. Collective.

    Returns:
        The steps because of which the run has to roll back, if the loss is not finite; else None.
    """
    sequences, engine, dims = run.config.eval.sequences, run.engine, run.dims
    share = EvaluationShare(sequences, run.batch.micro, dims.data_rank(run.world.rank), dims.data_ranks)
    show = partial(run.worker.phase, Phase.evaluating, run.step)
    with engine.averaged_weights():
        loss = mean_loss(engine.module, engine.loss, run.samples, run.world, share, show)
        record.tasks = run.evaluate_tasks(share, show) or None
    bad = run.guard.judge_evaluation(record.step, loss)
    if bad is None:
        record.val_loss, record.val_bits_per_byte = loss, run.samples.val_bits_per_byte(loss, sequences)
        run.early_stop.add(record.step, loss, record.val_bits_per_byte)
    return bad


def is_due(step: int, interval: int) -> bool:
    """Return True if ``step`` is a multiple of ``interval``; False for an interval of 0."""
    return interval > 0 and step % interval == 0
