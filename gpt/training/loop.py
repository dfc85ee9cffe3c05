"""The training loop, and evaluation. The loop reads the figures of a step while the device computes the next step."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gpt.data.loader import Samples
from gpt.metrics.writers import MetricWriters
from gpt.parallel.distributed import World
from gpt.training.diagnostics import CompileTime, Gradients, StepBreakdown, StepProfile
from gpt.training.divergence import BadSteps, LossWindow
from gpt.training.execution import StepTimeouts
from gpt.training.run import Run
from gpt.training.saving import Saving
from gpt.training.state import go_back, judge_step
from gpt.training.step import QueuedStep, Requests, collect_together, queue_step
from gpt.training.stragglers import ReplicaGuard, StragglerWatch
from launch.runs.heartbeat import Phase
from launch.runs.records import StepRecord

# Mean loss over sequences of the validation split, computed by all ranks together.
#
# Shapes: B sequences, T tokens of each.


@torch.no_grad()
def mean_loss(
    module: nn.Module,
    loss: Callable[[Tensor, Tensor], Tensor],
    samples: Samples,
    world: World,
    sequences: int,
    batch: int,
    data_rank: int,
    data_ranks: int,
    on_round: Callable[[], object] = lambda: None,
) -> float:
    """Return the mean cross-entropy of the first validation sequences, nats per token. Collective.

    The sequences are the same for any number of ranks. Every rank takes those of its ``data_rank``, ``batch`` at a
    time, and calls ``on_round`` before each pass.

    Args:
        module: the model, in evaluation mode during the call.
        loss: takes tokens and targets, both (B, T); returns the summed loss. Returns this rank's share of it if several
            ranks compute the loss of the same sequences.
        samples: the validation sequences.
        world: all ranks.
        sequences: number of sequences.
        batch: most sequences in one pass.
        data_rank: the part of the sequences, out of ``data_ranks``, that this rank computes.
        data_ranks: number of parts.
        on_round: called before every pass.
    """
    mine = np.arange(data_rank, sequences, data_ranks)
    rounds = math.ceil(math.ceil(sequences / data_ranks) / batch)
    was_training = module.training
    module.eval()
    total = torch.zeros((), dtype=torch.float64, device=world.device)
    for i in range(rounds):
        on_round()
        part = mine[i * batch : (i + 1) * batch]
        # Sharded ranks must all take every pass. A rank without sequences repeats one and does not count it.
        tokens_BT, targets_BT = samples.batch("val", part if len(part) else np.zeros(1, dtype=np.int64))
        summed = loss(tokens_BT, targets_BT)
        if len(part):
            total += summed
    module.train(was_training)
    return world.sum(total.item())[0] / (sequences * samples.block_size)


# The training loop: steps, and the work between them: evaluations, checkpoints, records, roll-backs, the end.
#
# The figures of a step are read while the device computes the next one, so the device is never idle between two steps.
# A step is read at once only if the loop pauses, say for a checkpoint.


def train(run: Run) -> str:
    """Do the steps that are left. Returns ``finished``, or ``stopped`` if a request ended the run first."""
    gradients = Gradients(run.config.model, run.world.device)
    writers = MetricWriters(
        run.folder, run.world, run.worker, run.config, run.step, gradients.names, run.tokens_per_step
    )
    profile = StepProfile(run.folder.attempt(run.attempt), run.config, run.world)
    profile.after(run.step)
    compile_time = CompileTime(run.config.compiles)
    run.engine.module.train()
    try:
        with collect_together(run.config.gc_interval) as collect:
            outcome = Loop(run, gradients, writers, profile, collect, compile_time).do_steps()
    finally:
        compile_time.close()
        run.batches.close()
        writers.show()
    run.worker.phase(Phase.leaving, run.step)
    profile.close()
    if outcome == "stopped":
        run.worker.stopped(run.step)
    else:
        early = run.early_stop.reason() if run.step < run.config.optim.max_steps else None
        run.worker.finished(run.step, **({} if early is None else {"early": early}))
        if early is not None and run.world.is_first:
            print(f"finished early: {early}", flush=True)
    writers.close()
    return outcome


@dataclass(frozen=True)
class Pause:
    """Reasons to read a step at once, the same on all ranks."""

    last: bool
    evaluates: bool
    compares: bool
    """The replicas' parameters are compared."""
    saves: bool
    remembers: bool
    """The step is saved in memory, and not on the disk."""

    @property
    def is_due(self) -> bool:
        """True if there is any reason."""
        return self.last or self.evaluates or self.compares or self.saves or self.remembers


class Loop:
    """The steps of an attempt.

    Args:
        run: the run.
        gradients: measures gradients in the steps that need it.
        writers: of the step records.
        profile: of some steps of the first rank.
        collect: collects garbage, called after each step that was begun.
        compile_time: clock of torch's compiler.
    """

    def __init__(
        self,
        run: Run,
        gradients: Gradients,
        writers: MetricWriters,
        profile: StepProfile,
        collect: Callable[[int], None],
        compile_time: CompileTime,
    ) -> None:
        self._run, self._gradients, self._writers, self._profile, self._collect, self._compile_time = (
            run, gradients, writers, profile, collect, compile_time
        )  # fmt: skip
        self._timeouts = StepTimeouts(run.world, run.config.parallel)
        self._replicas = ReplicaGuard(run)
        self._saving = Saving(run)
        self._stragglers = StragglerWatch(run)
        self._stability = LossWindow()
        self._breakdown = StepBreakdown(run.config.logging.breakdown_interval, run.world, run.step)
        self._unread: QueuedStep | None = None
        """The step whose figures were not read yet."""
        self._bad: BadSteps | None = None
        """Steps to go back for, found in the former step while another one was queued."""
        self._unasked: QueuedStep | None = None
        """The step whose requests were not read yet. Differs from the one above, read at once for a profile."""
        self._left = Requests()
        """Requests that arrived in steps that the run went back from."""
        self._clock = time.perf_counter()

    def do_steps(self) -> str:
        """Step, evaluate and save until no step is left, or a request ends the run."""
        run, logging = self._run, self._run.config.logging
        phase, outcome = Phase.starting, None  # the first step may compile
        while outcome is None and run.step < run.config.optim.max_steps:
            measured = self._gradients if is_due(run.step + 1, logging.gradients_interval) else None
            step = queue_step(run, measured, phase, self._saving.ballot(), self._stragglers, self._read_former)
            phase = Phase.training
            step.record.compile_s, step.record.restore_s = self._compile_time.take(), run.take_restore_s()
            self._collect(run.step)  # while the device works
            if self._bad is not None:
                self._go_back_from_former(step, self._bad)
                continue
            asked = self._hear(step)
            pause = self._pause_after(asked)
            if pause.is_due or self._profile.due(run.step) or self._breakdown.due(run.step):
                outcome = self._read_at_once(step, pause, asked)
        return outcome or "finished"

    def _read_former(self) -> None:
        """Read the step before the one that is being queued, if that was not done, and write its record."""
        if self._unread is not None:
            record, self._bad = self._read(self._unread)
            self._writers.write(record)

    def _go_back_from_former(self, step: QueuedStep, bad: BadSteps) -> None:
        """Go back for the step before ``step``. ``step`` was queued before the figures of that one were known."""
        asked = step.requests_of_all()
        if self._unasked is not None:
            asked |= self._unasked.requests_of_all()
        self._unasked = self._bad = None
        self._go_back(bad, asked)

    def _hear(self, step: QueuedStep) -> Requests:
        """Return the requests after ``step``.

        If the ranks do not agree on requests beforehand, the figures of the step before carry them.
        """
        asked = self._left | (step.requests if self._run.worker.agrees else Requests())
        self._left = Requests()
        if self._unasked is not None:
            asked |= self._hear_all(self._unasked)
        self._unread = self._unasked = step
        return asked

    def _hear_all(self, step: QueuedStep) -> Requests:
        """Return the requests of all ranks in a step, and pass the ranks' ballots to the checkpoints."""
        self._saving.hear(step.ballot, step.ballots_of_all())
        return step.requests_of_all()

    def _pause_after(self, asked: Requests) -> Pause:
        """Return the reasons to pause after the step just begun."""
        config, step = self._run.config, self._run.step
        last = step == config.optim.max_steps
        return Pause(
            last,
            last or is_due(step, config.eval.interval),
            is_due(step, config.divergence.replica_check_interval),
            last or bool(asked) or self._saving.is_due(step),
            self._saving.is_due_in_memory(step),
        )

    def _read(self, step: QueuedStep) -> tuple[StepRecord, BadSteps | None]:
        """Read a step's figures; return its record, and the steps to go back for, None if there are none."""
        record, self._clock = step.finish(self._clock)
        self._unread = None
        self._timeouts.after(record.step_time_s)
        self._breakdown.into(record)
        self._stability.into(record)
        self._stragglers.after(record, step.own_times_of_all())
        return record, judge_step(self._run, record)

    def _read_at_once(self, step: QueuedStep, pause: Pause, asked: Requests) -> str | None:
        """Read the step just begun and do the work after it; return the outcome, None if the loop continues."""
        run, guard = self._run, self._run.guard
        record, bad = self._read(step)
        if bad is None and pause.last:
            bad = guard.judge_end()
        if pause.is_due:
            self._writers.show()  # a pause may be long
            asked |= self._hear_all(step)
            self._unasked = None
        if pause.evaluates and bad is None:
            bad = evaluate(run, record)
            record.val_compile_s = self._compile_time.take()
        if bad is not None:  # the weights may be worthless, and are not saved
            self._writers.write(record)
            self._go_back(bad, asked)
            return None
        is_last = pause.last or (pause.evaluates and guard.may_save and run.early_stop.reason() is not None)
        saves = guard.may_save and (pause.saves or is_last or bool(asked))
        if saves or pause.compares:
            self._replicas.check()
        if saves:
            self._writers.keep(record)
            record.checkpoint_s = self._saving.save(record.val_loss, is_last=is_last, is_stop=asked.stop)
        elif pause.remembers and guard.may_save:
            record.checkpoint_s = self._saving.save_in_memory()
        self._writers.write(record)
        self._profile.after(run.step)
        if not (is_last or asked.stop):
            self._breakdown.before(run.step)
        self._clock = time.perf_counter()
        if is_last:
            return "finished"
        if asked.stop:
            self._saving.settle()
            return "stopped"
        return None

    def _go_back(self, bad: BadSteps, asked: Requests) -> None:
        """Go back to a checkpoint before ``bad``; requests in the meantime are served after the next step."""
        self._saving.settle()
        go_back(self._run, self._writers, bad)
        self._stability.clear()
        self._left, self._clock = asked, time.perf_counter()


def evaluate(run: Run, record: StepRecord) -> BadSteps | None:
    """Put the validation loss into ``record``, in nats per token, and in bits per byte of text if the text is known.

    Collective. Returns the steps to go back for if the loss is not finite, else None.
    """
    sequences, engine, ranks = run.config.eval.sequences, run.engine, run.dims.data_ranks
    loss = mean_loss(
        engine.module,
        engine.loss,
        run.samples,
        run.world,
        sequences,
        run.batch.micro,
        run.dims.data_rank(run.world.rank),
        ranks,
        run.evaluating,
    )
    bad = run.guard.judge_evaluation(record.step, loss)
    if bad is None:
        record.val_loss, record.val_bits_per_byte = loss, run.samples.val_bits_per_byte(loss, sequences)
        run.early_stop.hear(record.step, loss, record.val_bits_per_byte)
    return bad


def is_due(step: int, interval: int) -> bool:
    """True if ``step`` is a multiple of ``interval``; an interval of 0 is never due."""
    return interval > 0 and step % interval == 0
