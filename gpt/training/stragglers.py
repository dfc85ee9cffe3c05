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

# The end of an attempt whose replicas have drifted apart, with rank and host named.
#
# How replicas are compared is gpt/parallel/replicas.py's; what follows for the host is the launcher's.


class ReplicaDriftError(RuntimeError):
    """Replicas of parameters that are not the same to the bit; the run can go on from its last checkpoint."""


class ReplicaGuard:
    """The comparison of the replicas of a run, where the config asks for it."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._check = ReplicaCheck(run.engine.module, run.world) if self.is_on else None
        if self._check is not None and not self._check.compares and run.world.is_first:
            print("divergence.replica_check_interval: each parameter is on one rank, nothing is compared", flush=True)

    @property
    def is_on(self) -> bool:
        """True where the config asks for comparisons."""
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
        # All wait for it: an agent ends the others as soon as one rank has failed.
        run.world.on_first(
            lambda: run.folder.record_event("replicas_differ", attempt=run.attempt, step=run.step, **told)
        )
        return ReplicaDriftError(
            f"{cause}: a device or a memory has changed them; the run goes on from its last checkpoint, which was "
            "compared before it was saved"
        )


# Ranks that are slower than the others, found while a run goes on.
#
# Each rank tells its own time, without its waits for others, at its place in a vector that is summed with the figures
# of a step: nothing more is exchanged.


WARMUP_STEPS = 5
"""First steps of an attempt that say nothing: they compile, connect, and fill caches."""
ENDS_AT = 0.5
"""Share of its excess below which a rank that was named is slow no more, so that none is named again and again."""


@dataclass(frozen=True)
class Finding:
    """A rank that has become slow, or is so no longer."""

    rank: int
    is_slow: bool
    own_s: float
    """Mean of its own time a step over the window."""
    median_s: float
    """Median of that mean over the other ranks."""


class StragglerJudge:
    """Judge of the own times of all ranks, step by step.

    Args:
        factor: of the median of the other ranks, above which a rank is slow.
        window: steps over which times are averaged.
    """

    def __init__(self, factor: float, window: int) -> None:
        self._factor, self._window = factor, window
        self._times: deque[npt.NDArray[np.float64]] = deque(maxlen=window)
        self._slow: set[int] = set()

    def add(self, times: Sequence[float]) -> list[Finding]:
        """Take the own times of one step, seconds by rank; return what has changed."""
        self._times.append(np.asarray(times, dtype=np.float64))
        if len(self._times) < self._window:
            return []
        means = np.mean(self._times, axis=0)
        # Not above the median of the other ranks, for whoever is above it: nobody slow is missed by looking here first.
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
    """The own times of the ranks of a run, from the steps that were read to those that are queued."""

    def __init__(self, run: Run) -> None:
        self._run = run
        logging: LoggingConfig = run.config.logging
        # Without its waits a step takes as long on every rank, and tells nothing.
        is_known = run.engine.timed_groups is not None and run.world.size > 1
        self.size = run.world.size if is_known and logging.straggler_factor else 0
        """Numbers that a step sums for it: one for each rank, or none."""
        self._judge = StragglerJudge(logging.straggler_factor, logging.straggler_window)
        self._since = run.step
        self._own_s = 0.0

    def own_times(self, like: Tensor) -> list[Tensor]:
        """Return this rank's own time of the last step that was read, 0 before there is one, at its place in (size,).

        As a fill of the device of ``like``, which need not be waited for; an empty list where nothing is summed.
        """
        if not self.size:
            return []
        times = like.new_zeros(self.size)
        times[self._run.world.rank].fill_(self._own_s)
        return [times]

    def after(self, record: StepRecord, times: Sequence[float]) -> None:
        """Take a step that was read, with the own times that it has summed; complete the record of rank 0."""
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
