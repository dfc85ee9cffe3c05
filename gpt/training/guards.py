"""Health of a run: divergence, early stop, replicas that have drifted apart, and slow ranks."""

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
"""Steps over which the variance is taken: so few that a loss that falls normally adds little to the variance."""


class LossWindow:
    """Losses of the last ``WINDOW`` steps of this attempt, for their variance."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def into(self, record: StepRecord) -> None:
        """Add the loss of a step, and put the variance over the last ``WINDOW`` steps into its record.

        Steps whose loss is not finite are left out.
        """
        if record.loss is not None:
            self._losses.append(record.loss)
        if len(self._losses) == WINDOW:
            record.loss_variance = float(np.var(np.fromiter(self._losses, dtype=np.float64)))

    def clear(self) -> None:
        """Forget the losses, because the run returns to an earlier checkpoint."""
        self._losses.clear()


# Bad steps (loss or gradients are wrong): their count, and the decision to roll back.
#
# The decision is a pure function of the figures of the steps. These are the same on all ranks, so all ranks decide
# alike without a message.


@dataclass(frozen=True)
class BadSteps:
    """Bad steps that need a roll-back: the run returns to an earlier checkpoint, and leaves out the batches of these
    steps."""

    first: int
    last: int
    cause: str
    """What is wrong with these steps, as text."""


SPIKE_WINDOW = 100
"""Number of steps whose losses a spike is compared with. No spike is found before that many steps."""
MAX_ROLLBACKS = 2
"""Number of roll-backs without a newer checkpoint after which the run ends. The launcher does not restart it."""


class DivergenceGuard:
    """Check of each step for divergence, by its loss and gradients. ``judge`` must be called for every step, in
    order."""

    def __init__(self, config: DivergenceConfig) -> None:
        self._config = config
        self.skipped = 0
        """Number of steps of the run that changed no weights."""
        self.rollbacks = 0
        """Number of roll-backs in a row. A checkpoint of a later step than the failed ones resets it to 0."""
        self._failed_at = 0
        self._bad: list[int] = []
        """Consecutive steps, up to the last one, whose loss or gradients were not finite."""
        self._losses: deque[float] = deque(maxlen=SPIKE_WINDOW)

    def judge(self, record: StepRecord) -> BadSteps | None:
        """Check a finished step, and count it if it was skipped.

        Returns the bad steps if they need a roll-back, else None.
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
        """Return the bad steps for a roll-back if the validation loss after ``step`` is not finite, else None."""
        if math.isfinite(val_loss):
            return None
        self._bad = self._bad or [step]
        return self._bad_steps(f"a validation loss of {val_loss} after step {step}")

    def judge_end(self) -> BadSteps | None:
        """Return the bad steps (``is_bad``) at the end of the run, for a roll-back; None if there are none."""
        return (
            self._bad_steps("a loss or gradients that are not finite, up to the end of the run") if self._bad else None
        )

    @property
    def may_save(self) -> bool:
        """False while steps are skipped: bad weights may be the cause, and a save would replace a good checkpoint."""
        return not self._bad

    def gone_back(self, failed_at: int, rollbacks: int) -> None:
        """Record roll-back number ``rollbacks`` of the run, because of bad steps up to step ``failed_at``."""
        self._failed_at, self.rollbacks = failed_at, rollbacks

    def state(self, step: int) -> dict[str, Any]:
        """Return the state for the checkpoint of ``step``, as plain JSON.

        First resets ``rollbacks`` to 0 if ``step`` comes after the failed steps of the last roll-back.
        """
        if step > self._failed_at:
            self.rollbacks = 0
        counts = {"skipped_steps": self.skipped, "rollbacks": self.rollbacks, "failed_at": self._failed_at}
        return {**counts, "losses": list(self._losses)}

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state`` has returned."""
        self.skipped, self.rollbacks, self._failed_at = state["skipped_steps"], state["rollbacks"], state["failed_at"]
        self._bad = []
        self._losses = deque(state["losses"], maxlen=SPIKE_WINDOW)

    def _bad_steps(self, cause: str) -> BadSteps:
        return BadSteps(self._bad[0], self._bad[-1], cause)


def is_bad(record: StepRecord) -> bool:
    """Return True if loss or gradients are not finite, except for an overflow that the loss scale of fp16 handles."""
    if record.grad_norm is not None or record.loss is None:
        return record.loss is None
    return record.loss_scale is None or record.loss_scale <= MINIMUM  # at the least scale an overflow has another cause


def checkpoint_before(steps: Sequence[int], first_bad: int) -> int | None:
    """Return the step, out of ``steps``, to whose checkpoint the run rolls back; None if there is none.

    The newest checkpoint is taken whose weights gave a finite loss in the step after it. If there is none, the
    checkpoint right before the first bad step is taken.
    """
    proven = [step for step in steps if step < first_bad - 1]
    return max(proven or (step for step in steps if step < first_bad), default=None)


def last_rollback(events: Events, step: int) -> dict[str, Any] | None:
    """Return the newest event ``rolled_back`` to ``step`` after the checkpoint of ``step`` was saved; None if there is
    none.

    The event has the batches that the run skips after ``step``. An attempt that resumes from ``step`` skips them too.
    """
    found = None
    for event in events:
        if event["event"] == "saved" and event["step"] == step:
            found = None
        elif event["event"] == "rolled_back" and event["step"] == step:
            found = event
    return found


def remedy(config: TrainConfig) -> str:
    """Return a line that says what to change in a run that diverges, and how to begin from its last checkpoint.

    None of the keys that the line names may change between attempts of one run, so each change needs a new folder.
    """
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
    """Decides whether a run ends early, by its validation losses in the order of its evaluations."""

    config: OptimConfig
    best: float = math.inf
    """Lowest loss so far, nats per token."""
    best_step: int = 0
    waited: int = 0
    """Number of evaluations since the lowest loss."""
    best_per_byte: float | None = None
    """Lowest loss in nats per byte of text; None if the text is not known."""

    def add(self, step: int, loss: float, bits_per_byte: float | None = None) -> None:
        """Add the validation loss of a step, in nats per token, and in bits per byte of text if the text is known.

        Does nothing unless ``step`` is after the step of the lowest loss, because a resumed run evaluates steps again.
        """
        if step <= self.best_step:
            return
        if loss < self.best:
            self.best, self.best_step, self.waited = loss, step, 0
            self.best_per_byte = None if bits_per_byte is None else bits_per_byte * math.log(2)
        else:
            self.waited += 1

    def reason(self) -> str | None:
        """Return the reason to end the run now, as text; None if the run continues."""
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
        """Restore the state of a checkpoint; the config remains that of this attempt."""
        self.best, self.best_step = state.get("best", math.inf), state.get("best_step", 0)
        self.waited = state["waited"]
        self.best_per_byte = state.get("best_per_byte")


# Replicas with different parameters end the attempt, and the failure names rank and host.
#
# gpt/parallel/modules.py compares the replicas; the launcher decides whether the host is used again.


class ReplicaDriftError(RuntimeError):
    """Replicas of parameters that differ in some bit; the run can continue from its last checkpoint."""


def refuse_drift(run: Run, replicas: ReplicaCheck) -> None:
    """Compare the replicas of parameters after the step just done. Collective.

    Raises:
        ReplicaDriftError: some replicas differ; raised on every rank, and recorded in the event log.
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
        f"{cause}: a device or a memory has changed them; the run goes on from its last checkpoint, which was "
        "compared before it was saved"
    )


# Ranks that are slower than the rest, found during the run.
#
# The own time of a rank is the time of a step without waits for other ranks. Each rank puts it at its place in a
# vector. The figures of a step carry this vector in their sum, so no other message is needed.


WARMUP_STEPS = 5
"""First steps of an attempt that are left out: they compile, connect, and fill caches."""
STRAGGLER_FACTOR = 1.2
"""Factor above the median of the other ranks' own times per step at which a rank is slow, and named with its host."""
STRAGGLER_WINDOW = 20
"""Number of steps over which the own times of the ranks are averaged."""
ENDS_AT = 0.5
"""A slow rank has recovered if its relative excess over the median is below this share of ``factor - 1``.

A share below 1 keeps a rank near the limit from being reported again and again.
"""


@dataclass(frozen=True)
class Finding:
    """A rank that has become slow, or has recovered."""

    rank: int
    is_slow: bool
    own_s: float
    """Mean of the rank's own time per step over the window, seconds."""
    median_s: float
    """Median of this mean over all other ranks, seconds."""


class StragglerJudge:
    """Finds slow ranks by the own times of all ranks: the seconds of a step without waits for other ranks.

    Args:
        factor: multiple of the median of all other ranks, above which a rank is slow.
        window: steps over which times are averaged.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._window = factor, window
        self._times: deque[npt.NDArray[np.float64]] = deque(maxlen=window)
        self._slow: set[int] = set()

    def add(self, times: Sequence[float]) -> list[Finding]:
        """Add the own times of one step, seconds by rank; return the ranks that have become slow or recovered."""
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
    """Collects the own times of all ranks, which are the seconds of a step without waits for other ranks.

    The all-reduce of each step also sums the own times of an earlier step: the last step whose figures were read.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        # If the waits are unknown, a step takes equally long on every rank, which shows no difference.
        is_known = run.engine.timed_groups is not None and run.world.size > 1
        self.size = run.world.size if is_known else 0
        """Numbers that a step sums for the watch: one for each rank, or none."""
        self._judge = StragglerJudge(STRAGGLER_FACTOR, STRAGGLER_WINDOW)
        self._since = run.step
        self._own_s = 0.0

    def own_times(self, like: Tensor) -> Tensor:
        """Return a tensor (size,) with this rank's own time of the last step that was read, in seconds, at the rank's
        index.

        Other elements are 0; this rank's element is 0 before a step was read. The tensor is filled on the device of
        ``like``, so the host does not wait.
        """
        times = like.new_zeros(self.size)
        times[self._run.world.rank].fill_(self._own_s)
        return times

    def after(self, record: StepRecord, times: Sequence[float]) -> None:
        """Evaluate the own times that a step has summed, seconds by rank. On rank 0 put times and slow ranks into its
        record."""
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
