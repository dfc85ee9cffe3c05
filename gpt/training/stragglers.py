"""Ranks that are slower than the others, found while a run goes on.

Each rank tells its own time, without its waits for others, at its place in a vector that is summed with the figures of
a step: nothing more is exchanged. Owns that vector and the judgement, which only rank 0 passes. Must not know how a
rank is made faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from torch import Tensor

from gpt.config.train import LoggingConfig
from gpt.training.run import Run
from launch.runs.records import StepRecord

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
