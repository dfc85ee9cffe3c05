"""Slow ranks, and replicas that have drifted apart."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gpt.config.train import LoggingConfig
from gpt.parallel.replicas import Drift, ReplicaCheck
from gpt.training.run import Run
from launch.runs.records import StepRecord

# Replicas that have drifted apart end the attempt, and the failure names rank and host.
#
# gpt/parallel/replicas.py compares the replicas; the launcher decides about the host.


class ReplicaDriftError(RuntimeError):
    """Replicas of parameters that differ in some bit; the run can continue from its last checkpoint."""


class ReplicaGuard:
    """The comparison of the replicas of a run, if the config asks for it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._check = ReplicaCheck(run.engine.module, run.world) if self.is_on else None
        if self._check is not None and not self._check.compares and run.world.is_first:
            print("divergence.replica_check_interval: each parameter is on one rank, nothing is compared", flush=True)

    @property
    def is_on(self) -> bool:
        """True if the config asks for comparisons."""
        return self._run.config.divergence.replica_check_interval > 0

    def check(self) -> None:
        """Compare the replicas after the step just done. Collective.

        Raises:
            ReplicaDriftError: some differ; raised on every rank, and entered in the event log.
        """
        drift = None if self._check is None or not self._check.compares else self._check.find_drift()
        if drift is not None:
            raise self._failure(drift)

    def _failure(self, drift: Drift) -> ReplicaDriftError:
        run = self._run
        host_of = run.world.gather(socket.gethostname())
        hosts = sorted({host_of[rank] for rank in drift.ranks})
        where = ", ".join(f"rank {rank} on {host_of[rank]}" for rank in drift.ranks)
        whom = "the other replicas of them" if drift.is_certain else "each other"
        cause = f"after step {run.step} the parameters of {where} differ from {whom}"
        told = {"ranks": drift.ranks, "hosts": hosts, "certain": drift.is_certain, "cause": cause}
        # All ranks wait for the entry: an agent ends all ranks as soon as one has failed.
        run.world.on_first(
            lambda: run.folder.record_event("replicas_differ", attempt=run.attempt, step=run.step, **told)
        )
        return ReplicaDriftError(
            f"{cause}: a device or a memory has changed them; the run goes on from its last checkpoint, which was "
            "compared before it was saved"
        )


# Ranks that are slower than the rest, found during the run.
#
# Each rank puts its own time, without its waits for other ranks, at its place in a vector. The figures of a step carry
# this vector in their sum, so no other message is needed.


WARMUP_STEPS = 5
"""First steps of an attempt that are left out: they compile, connect, and fill caches."""
ENDS_AT = 0.5
"""Share of the excess below which a slow rank counts as recovered, so that no rank is named again and again."""


@dataclass(frozen=True)
class Finding:
    """A rank that has become slow, or has recovered."""

    rank: int
    is_slow: bool
    own_s: float
    """Mean of the rank's own time per step over the window, seconds."""
    median_s: float
    """Median of that mean over all other ranks, seconds."""


class StragglerJudge:
    """Judge of the own times of all ranks, step by step.

    Args:
        factor: multiple of the median of all other ranks, above which a rank is slow.
        window: steps over which times are averaged.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._window = factor, window
        self._times: deque[npt.NDArray[np.float64]] = deque(maxlen=window)
        self._slow: set[int] = set()

    def add(self, times: Sequence[float]) -> list[Finding]:
        """Take the own times of one step, seconds by rank; return the ranks whose state has changed."""
        self._times.append(np.asarray(times, dtype=np.float64))
        if len(self._times) < self._window:
            return []
        means = np.mean(self._times, axis=0)
        # The lower median of all ranks is at most a slow rank's median of the rest, so no slow rank is missed here.
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
    """The own times of the ranks of a run, passed from the steps that were read to the steps that are queued."""

    def __init__(self, run: Run) -> None:
        self._run = run
        logging: LoggingConfig = run.config.logging
        # If the waits are unknown, a step takes equally long on every rank, which shows no difference.
        is_known = run.engine.timed_groups is not None and run.world.size > 1
        self.size = run.world.size if is_known and logging.straggler_factor else 0
        """Numbers that a step sums for the watch: one for each rank, or none."""
        self._judge = StragglerJudge(logging.straggler_factor, logging.straggler_window)
        self._since = run.step
        self._own_s = 0.0

    def own_times(self, like: Tensor) -> list[Tensor]:
        """Return this rank's own time of the last step that was read, at its place in (size,); 0 before there is one.

        The tensor is a fill on the device of ``like``, so the host does not wait. The list is empty if no times are
        summed.
        """
        if not self.size:
            return []
        times = like.new_zeros(self.size)
        times[self._run.world.rank].fill_(self._own_s)
        return [times]

    def after(self, record: StepRecord, times: Sequence[float]) -> None:
        """Take a step that was read, with its summed own times, seconds by rank; complete the record of rank 0."""
        if not self.size:
            return
        self._own_s = record.step_time_s - (record.comm_s or 0.0) - (record.bubble_s or 0.0)
        if not self._run.world.is_first or record.step <= self._since + WARMUP_STEPS or min(times) <= 0:
            return
        record.own_min_s, record.own_max_s = min(times), max(times)
        record.slowest_rank = int(np.argmax(times))
        texts = [self._tell(finding, record) for finding in self._judge.add(times)]
        record.straggler = "; ".join(texts) or None

    def _tell(self, finding: Finding, record: StepRecord) -> str:
        """Enter a finding into the event log; return it as a text."""
        host = self._run.hosts[finding.rank] if self._run.hosts else None
        self._run.folder.record_event(
            "straggler" if finding.is_slow else "straggler_ended",
            attempt=record.attempt, step=record.step, rank=finding.rank, host=host,
            own_s=finding.own_s, median_s=finding.median_s, steps=self._run.config.logging.straggler_window,
        )  # fmt: skip
        state = "is slow" if finding.is_slow else "is slow no more"
        place = f"rank {finding.rank}" + (f" on {host}" if host else "")
        return f"{place} {state}: {finding.own_s:.3g} s of its own a step, and the median {finding.median_s:.3g} s"
