"""Health of a run: divergence, early stop, replicas with different parameters, and slow ranks."""

from __future__ import annotations

import math
import socket
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gpt.config import DivergenceConfig, OptimConfig, TrainConfig
from gpt.parallel.engine import MINIMUM
from gpt.parallel.modules import ReplicaCheck
from launch.runs.events import Events
from launch.runs.records import StepRecord

if TYPE_CHECKING:
    from gpt.training.run import Run

# Stability of training: how much the loss varies over the last steps.
#
# A loss that spikes, or that swings more and more, shows in this variance before it shows in a mean.


WINDOW = 100
"""Number of steps over which the variance of the loss is computed. They are so few that the normal fall of the loss
adds little to the variance."""


class LossWindow:
    """Computes the variance of the losses of the last ``WINDOW`` steps of this attempt."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def into(self, record: StepRecord) -> None:
        """Add the loss of the step of ``record``, unless the loss is not finite. When at least ``WINDOW`` losses are
        known, put the variance of the last ``WINDOW`` losses into ``record``."""
        if record.loss is not None:
            self._losses.append(record.loss)
        if len(self._losses) == WINDOW:
            record.loss_variance = float(np.var(np.fromiter(self._losses, dtype=np.float64)))

    def clear(self) -> None:
        """Delete all losses, because the run has rolled back."""
        self._losses.clear()


# Bad steps (loss or gradients are wrong): their count, and the decision to roll back.
#
# The decision is a pure function of the figures of the steps. These are the same on all ranks, so all ranks decide
# alike without a message.


@dataclass(frozen=True)
class BadSteps:
    """Consecutive steps because of which the run has to roll back: their loss or gradients are not finite, or their
    loss is a spike."""

    first: int
    """Number of the first bad step."""
    last: int
    """Number of the last bad step."""
    cause: str
    """What is wrong with the steps, as text for messages."""


SPIKE_WINDOW = 100
"""Number of losses in the search for a spike. The loss of a step is compared with the losses of this many previous
steps. While fewer losses are known, no loss counts as a spike."""
MAX_ROLLBACKS = 2
"""Largest number of roll-backs without a newer checkpoint between them. If the run has to roll back once more, it fails
instead, and the launcher does not restart it."""


class DivergenceGuard:
    """Checks each step for divergence by its loss and gradients. ``judge`` must be called for every step, in order."""

    def __init__(self, config: DivergenceConfig) -> None:
        self._config = config
        self.skipped = 0
        """Number of steps of the run in which no weights were updated."""
        self.rollbacks = 0
        """Number of consecutive roll-backs. It becomes 0 when the run saves a checkpoint of a step after the bad steps
        of the last roll-back."""
        self._failed_at = 0
        """Number of the last of the bad steps that caused the last roll-back; 0 before the first roll-back."""
        self._bad: list[int] = []
        """Numbers of the last consecutive steps whose loss or gradients were not finite; empty after a good step."""
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def judge(self, record: StepRecord) -> BadSteps | None:
        """Check the record of a step. Put into the record in how many steps so far the run has updated no weights, if
        there is such a step.

        Returns:
            The steps because of which the run has to roll back; None if it need not.
        """
        is_skipped = record.loss is None or record.grad_norm is None
        self.skipped += is_skipped
        if self.skipped or record.loss_scale is not None:
            record.skipped_steps = self.skipped
        if is_bad(record):
            self._bad.append(record.step)
            if len(self._bad) < self._config.max_skipped_steps:
                return None
            return self._bad_steps(f"{len(self._bad)} steps in a row with a loss or gradients that are not finite")
        if not is_skipped:
            self._bad.clear()
        limit, before = self._config.spike_sigmas, self._losses
        if limit is None or record.loss is None:
            return None
        if len(before) == SPIKE_WINDOW:
            mean, sigma = statistics.fmean(before), statistics.pstdev(before)
            if record.loss > mean + limit * sigma:
                cause = f"a loss of {record.loss:.4f}, beyond {mean:.4f} + {limit:g} x {sigma:.4f}"
                return BadSteps(record.step, record.step, f"{cause} (mean and deviation of {len(before)} steps)")
        before.append(record.loss)
        return None

    def judge_evaluation(self, step: int, val_loss: float) -> BadSteps | None:
        """Return the steps because of which the run has to roll back, if the validation loss after ``step`` is not
        finite; else None."""
        if math.isfinite(val_loss):
            return None
        self._bad = self._bad or [step]
        return self._bad_steps(f"a validation loss of {val_loss} after step {step}")

    def judge_end(self) -> BadSteps | None:
        """Return the steps because of which the run has to roll back, if its last steps have a loss or gradients that
        are not finite; else None."""
        return (
            self._bad_steps("a loss or gradients that are not finite, up to the end of the run") if self._bad else None
        )

    @property
    def may_save(self) -> bool:
        """True if a checkpoint may be saved now. False if the last step has a loss or gradients that are not finite:
        its weights may be wrong, and the save might replace a good checkpoint."""
        return not self._bad

    def gone_back(self, failed_at: int, rollbacks: int) -> None:
        """Record that the run has rolled back for the ``rollbacks``-th consecutive time, because of steps up to
        ``failed_at``."""
        self._failed_at, self.rollbacks = failed_at, rollbacks

    def state(self, step: int) -> dict[str, Any]:
        """Return the state for the checkpoint of ``step``, as plain JSON.

        First set ``rollbacks`` to 0 if ``step`` is after the bad steps of the last roll-back.
        """
        if step > self._failed_at:
            self.rollbacks = 0
        counts = {"skipped_steps": self.skipped, "rollbacks": self.rollbacks, "failed_at": self._failed_at}
        return {**counts, "losses": list(self._losses)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore the values that the method ``state`` has returned, and forget the newest bad steps."""
        self.skipped, self.rollbacks, self._failed_at = state["skipped_steps"], state["rollbacks"], state["failed_at"]
        self._bad = []
        self._losses = deque(state["losses"], maxlen=SPIKE_WINDOW)

    def _bad_steps(self, cause: str) -> BadSteps:
        return BadSteps(self._bad[0], self._bad[-1], cause)


def is_bad(record: StepRecord) -> bool:
    """Return True if the loss or the gradients of a step are not finite. Gradients that overflow in fp16 do not count,
    unless the loss scale is at its minimum."""
    if record.grad_norm is not None or record.loss is None:
        return record.loss is None
    return record.loss_scale is None or record.loss_scale <= MINIMUM  # at the least scale an overflow has another cause


def checkpoint_before(steps: Sequence[int], first_bad: int) -> int | None:
    """Return the step of the checkpoint to which the run rolls back; None if no checkpoint is old enough.

    The checkpoint is the newest one after which the run has made at least one good step. If there is no such
    checkpoint, it is the checkpoint of the step just before ``first_bad``.

    Args:
        steps: steps of which a checkpoint exists.
        first_bad: number of the first bad step.
    """
    proven = [step for step in steps if step < first_bad - 1]
    return max(proven or (step for step in steps if step < first_bad), default=None)


def last_rollback(events: Events, step: int) -> dict[str, Any] | None:
    """Return the newest event ``rolled_back`` that names ``step`` as the step to which the run rolled back; None if
    there is none. An event before the newest save of the checkpoint of ``step`` does not count.

    The event names the batches that the roll-back has skipped. An attempt that resumes from ``step`` must skip them,
    too.
    """
    found = None
    for event in events:
        if event["event"] == "saved" and event["step"] == step:
            found = None
        elif event["event"] == "rolled_back" and event["step"] == step:
            found = event
    return found


def remedy(config: TrainConfig) -> str:
    """Return a line of text for the error message of a run that diverges. The text proposes overrides with which the
    user starts the run again from the beginning, in a new run folder."""
    optim = config.optim
    clip = f"optim.grad_clip={optim.grad_clip / 2:g}" if optim.grad_clip else "optim.grad_clip=1"
    exact = "precision=fp32, or " if config.precision.is_half else ""
    return (
        f"type next: optim.lr={optim.lr / 3:.2g} optim.min_lr={optim.min_lr / 3:.2g}, or {clip}, or {exact}a longer "
        "optim.warmup_steps, with fresh=true; init_from=RUN_FOLDER then begins with the weights of its last checkpoint"
    )


# Early stop: the end of a run before its last step, because the validation loss is low enough or no longer falls.
#
# Every rank has the same losses, so all ranks decide alike without a message. Checkpoints keep the state, so that a
# resumed run continues the count.


@dataclass
class EarlyStop:
    """Decides whether a run ends early, by its validation losses."""

    config: OptimConfig
    best: float = math.inf
    """Lowest validation loss so far, in nats per token."""
    best_step: int = 0
    """Step of the loss ``best``; 0 before the first evaluation."""
    waited: int = 0
    """Number of evaluations since ``best_step``, all with a higher or equal loss."""
    best_per_byte: float | None = None
    """The loss ``best`` in nats per byte of text; None if the size of the text is unknown."""

    def add(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        """Add the validation loss of a step.

        Does nothing unless ``step`` is after ``best_step``, because a resumed run evaluates some steps again.

        Args:
            step: step after which the loss was measured.
            loss: the loss in nats per token.
            bits_per_byte: the same loss in bits per byte of text; None if the size of the text is unknown.
        """
        if step <= self.best_step:
            return
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            self.best_per_byte = None if bits_per_byte is None else bits_per_byte * math.log(2)
        else:
            self.waited += 1

    def reason(self) -> str | None:
        """Return the reason why the run ends early, as text; None if it continues."""
        target, patience = self.config.target_val_loss, self.config.patience
        per_byte = self.best_per_byte
        told = f"val_loss {self.best:.4f} at step {self.best_step}"
        told += "" if per_byte is None else f" ({per_byte:.4f} nats per byte)"
        if target is not None and self.best <= target:
            return f"{told} reached optim.target_val_loss={target:g}"
        if patience is not None and self.waited >= patience:
            return (
                f"val_loss did not fall below {self.best:.4f}, that of step {self.best_step}, in {self.waited} "
                f"evaluations (optim.patience={patience})"
            )
        return None

    def state(self) -> dict[str, Any]:
        """Return the state for a checkpoint, as plain JSON."""
        best = {"best": self.best, "best_step": self.best_step, "best_per_byte": self.best_per_byte}
        return {"waited": self.waited, **(best if self.best_step else {})}  # JSON has no infinity

    def load(self, state: dict[str, Any]) -> None:
        """Restore the values that the method ``state`` has returned. The attribute ``config`` does not change."""
        self.best, self.best_step = state.get("best", math.inf), state.get("best_step", 0)
        self.waited = state["waited"]
        self.best_per_byte = state.get("best_per_byte")


# Replicas with different parameters end the attempt, and the failure names rank and host.
#
# gpt/parallel/modules.py compares the replicas; the launcher decides whether the host is used again.


class ReplicaDriftError(RuntimeError):
    """Raised if ranks that have the same shards have different parameters. After a restart, the run can continue from
    its last checkpoint."""


def refuse_drift(run: Run, replicas: ReplicaCheck) -> None:
    """Compare the parameters of ranks that have the same shards. Collective.

    Raises:
        ReplicaDriftError: they differ; raised on every rank, and recorded in the event log.
    """
    drift = replicas.find_drift()
    if drift is None:
        return
    host_of = run.world.gather(socket.gethostname())
    hosts = sorted({host_of[rank] for rank in drift.ranks})
    where = ", ".join(f"rank {rank} on {host_of[rank]}" for rank in drift.ranks)
    whom = "the other replicas of them" if drift.is_certain else "each other"
    cause = f"after step {run.step} the parameters of {where} differ from {whom}"
    told = {"ranks": drift.ranks, "hosts": hosts, "certain": drift.is_certain, "cause": cause}
    # All ranks wait until the event is written, because an agent ends all ranks as soon as one has failed.
    run.world.on_first(lambda: run.folder.record_event("replicas_differ", attempt=run.attempt, step=run.step, **told))
    raise ReplicaDriftError(
        f"{cause}: a device or a memory has changed them; the run continues from its last checkpoint, which was "
        "compared before it was saved"
    )


# Ranks that are slower than the rest, found during the run.
#
# The own time of a rank is the time of a step without waits for other ranks. Each rank puts it at its place in a
# vector. The figures of a step carry this vector in their sum, so no other message is needed.


WARMUP_STEPS = 5
"""Number of first steps of an attempt whose times do not count in the search for slow ranks, because these steps
compile, connect and fill caches."""
STRAGGLER_FACTOR = 1.2
"""A rank is slow if its time per step, without waits for other ranks, is more than this factor times the median of the
other ranks."""
STRAGGLER_WINDOW = 20
"""Number of steps over which the times of ranks are averaged to find slow ones."""
ENDS_AT = 0.5
"""A slow rank has recovered if its time per step, without waits for other ranks, is below 1 + ``ENDS_AT`` *
(``STRAGGLER_FACTOR`` - 1) times the median of the other ranks. ``ENDS_AT`` is below 1, so that a rank near the limit is
not reported again and again."""


@dataclass(frozen=True)
class Finding:
    """A rank that has become slow, or has recovered."""

    rank: int
    is_slow: bool
    """True if the rank has become slow, False if it has recovered."""
    own_s: float
    """Mean seconds of the rank's last steps, without waits for other ranks. ``STRAGGLER_WINDOW`` is the number of
    steps."""
    median_s: float
    """Median over all other ranks of their mean seconds per step, without waits for other ranks."""


class StragglerJudge:
    """Finds slow ranks by the own times of all ranks: the seconds of a step without waits for other ranks.

    Args:
        factor: a rank is slow if its own time is more than ``factor`` times the median of the own times of all other
            ranks.
        window: number of steps over which own times are averaged.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._window = factor, window
        self._times: deque[npt.NDArray[np.float64]] = deque(maxlen=window)
        self._slow: set[int] = set()

    def add(self, times: Sequence[float]) -> list[Finding]:
        """Add the own times of all ranks in one step, in seconds, in the order of ranks. Return a finding for each rank
        that has become slow or recovered with this step; empty if there is none."""
        self._times.append(np.asarray(times, dtype=np.float64))
        if len(self._times) < self._window:
            return []
        means = np.mean(self._times, axis=0)
        # The lower median of all ranks is at most the median of the ranks without the slow one, so no slow rank is
        # missed.
        lower = float(np.partition(means, (len(means) - 1) // 2)[(len(means) - 1) // 2])
        ends = 1 + ENDS_AT * (self._factor - 1)
        found = []
        for rank in sorted({*np.flatnonzero(means > self._factor * lower).tolist(), *self._slow}):
            median = float(np.median(np.delete(means, rank)))
            was_slow, ratio = rank in self._slow, means[rank] / median
            if ratio > self._factor if not was_slow else ratio < ends:
                self._slow ^= {rank}
                found.append(Finding(rank, not was_slow, float(means[rank]), median))
        return found


class StragglerWatch:
    """Collects the own times of all ranks (the seconds of a step without waits for other ranks), and reports slow
    ranks.

    The all-reduce of each step also sums own times over the ranks. These are the own times of an earlier step: the
    newest step whose figures the host has read.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        # If the waits are unknown, a step takes equally long on every rank, which shows no difference.
        is_known = run.engine.timed_groups is not None and run.world.size > 1
        self.size = run.world.size if is_known else 0
        """Number of values that each step sums over the ranks: the number of ranks. It is 0 if slow ranks are not
        searched: on a single rank, and if the waits in a step are unknown."""
        self._judge = StragglerJudge(STRAGGLER_FACTOR, STRAGGLER_WINDOW)
        self._since = run.step
        self._own_s = 0.0

    def own_times(self, like: Tensor) -> Tensor:
        """Return what this rank adds to the sum of a step: a tensor, (size,), that is 0 except at the index of this
        rank. There it is the own time in seconds of the newest step whose figures this rank has read. So the sum over
        the ranks contains the own time of every rank.

        The tensor has the dtype and device of ``like``. The host does not wait for the device.
        """
        times = like.new_zeros(self.size)
        times[self._run.world.rank].fill_(self._own_s)
        return times

    def after(self, record: StepRecord, times: Sequence[float]) -> None:
        """Store the own time of this rank for the next call of ``own_times``. On rank 0, put the shortest and the
        longest of ``times`` into the record, and report ranks that have become slow or recovered.

        Args:
            record: record of a step on this rank, after the end of the step.
            times: own times of all ranks in seconds, in the order of the ranks, as this step has summed them.
        """
        if not self.size:
            return
        self._own_s = record.step_time_s - (record.comm_s or 0.0) - (record.bubble_s or 0.0)
        if not self._run.world.is_first or record.step <= self._since + WARMUP_STEPS or min(times) <= 0:
            return
        record.own_min_s, record.own_max_s = min(times), max(times)
        record.slowest_rank = int(np.argmax(times))
        texts = []
        for found in self._judge.add(times):
            host = self._run.hosts[found.rank] if self._run.hosts else None
            self._run.folder.record_event(
                "straggler" if found.is_slow else "straggler_ended",
                attempt=record.attempt, step=record.step, rank=found.rank, host=host,
                own_s=found.own_s, median_s=found.median_s, steps=STRAGGLER_WINDOW,
            )  # fmt: skip
            place = f"rank {found.rank}" + (f" on {host}" if host else "")
            state = f"is slow{'' if found.is_slow else ' no more'}: {found.own_s:.3g} s of its own a step"
            texts.append(f"{place} {state}, and the median {found.median_s:.3g} s")
        record.straggler = "; ".join(texts) or None
