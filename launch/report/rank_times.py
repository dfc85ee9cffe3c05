"""Times of each rank beside those of the others: who is slower, by how much, and whether the spread bears it out.

In synchronous training all ranks end a step together, because each waits for the slowest in a collective. Their step
times then say nothing, unless waiting is recorded (``comm_s``, and ``bubble_s`` of a pipeline's stage) and taken off;
the wait for data is told apart anyway.
Must not know how a report shows it.
"""

from __future__ import annotations

import numpy as np

from launch.report.readings import LEAST_SHARE, WARMUP_STEPS, RankTime, RankTimes
from launch.runs.columns import Flags, Floats, RecordColumns

WINDOWS = 60
"""Windows of the run over which the times of each rank are averaged."""
LEAST_WINDOWS = 4
"""Of at least this many steps each window has one: nothing is called persistent that was seen in fewer."""
WAITS = ("comm_s", "bubble_s")
"""Fields of a step record that tell how long a rank waited for others."""
BEYOND_SPREAD = 3.0
"""Interquartile ranges of the other ranks by which a slow one lies above their median."""


class OwnTimes:
    """Mean times of the ranks in windows of the run; the first rank says which steps these are made of."""

    def __init__(self, first: RecordColumns, counts: Flags) -> None:
        for attempt in np.unique(first.attempts).tolist():
            of_attempt = first.steps[first.attempts == attempt]
            counts = counts & ~((first.attempts == attempt) & (first.steps < of_attempt[0] + WARMUP_STEPS))
        self._steps, self._attempts = first.steps[counts], first.attempts[counts]
        self._parts = np.array_split(np.arange(len(self._steps)), min(WINDOWS, len(self._steps)) or 1)
        self._window = np.repeat(np.arange(len(self._parts)), [len(part) for part in self._parts])
        self._sizes = np.bincount(self._window)
        self._sought = np.empty(0, np.int64), np.empty(0, np.int64)
        """Steps of the rank that was added last, and where the steps of the first rank are among them."""
        self._ranks: list[int] = []
        self._own: list[Floats] = []
        self._waits: list[Floats] = []
        self._is_net = True

    def add(self, rank: int, columns: RecordColumns, known: Flags, times: Floats) -> None:
        """Add one rank, with its step times; one that did not record all the steps is left out."""
        if not np.array_equal(columns.steps, self._sought[0]):  # mostly all ranks recorded the same
            places = np.searchsorted(columns.steps, self._steps).clip(0, len(columns) - 1)
            self._sought = columns.steps, places
        at = self._sought[1]
        if not (columns.steps[at] == self._steps).all():
            return
        if not len(at) or not known[at].all() or not (columns.attempts[at] == self._attempts).all():
            return
        own = times[at]
        for name in (name for name in WAITS if name in columns.known and columns.known[name][at].all()):
            own = own - columns.values[name][at]
        self._is_net = self._is_net and "comm_s" in columns.known and bool(columns.known["comm_s"][at].all())
        self._ranks.append(rank)
        self._own.append(self._averages(own))
        self._waits.append(self._averages(columns.values["data_wait_s"][at]))

    def _averages(self, values: Floats) -> Floats:
        return np.bincount(self._window, weights=values) / self._sizes

    def result(self) -> RankTimes | None:
        """Compare the ranks; None where fewer than two have recorded the same steps."""
        if len(self._ranks) < 2 or len(self._parts) < LEAST_WINDOWS:
            return None
        own, waits = np.array(self._own), np.array(self._waits)
        sizes = self._sizes
        step_s = float(own.mean())
        excess, slow = _compare(own, sizes, step_s)
        has_waits = not bool(np.isnan(waits).any())
        wait_excess, long = _compare(waits, sizes, step_s) if has_waits else (np.zeros(len(own)), slow & False)
        mean, mean_wait = (values @ sizes / sizes.sum() for values in (own, waits))
        ranks = tuple(
            RankTime(
                rank=rank,
                own_s=float(mean[index]),
                excess_s=float(excess[index]),
                data_wait_s=float(mean_wait[index]) if has_waits else None,
                wait_excess_s=float(wait_excess[index]) if has_waits else None,
                is_slow=bool(slow[index]),
                waits_long=bool(long[index]),
            )
            for index, rank in enumerate(self._ranks)
        )
        map_s = own - np.median(own, axis=0)
        return RankTimes(
            ranks=ranks,
            windows=tuple((int(self._steps[part[0]]), int(self._steps[part[-1]])) for part in self._parts),
            excess_s=tuple(tuple(row) for row in map_s.tolist()),
            is_net=self._is_net,
        )


def _compare(times: Floats, sizes: np.ndarray, step_s: float) -> tuple[Floats, Flags]:
    """Return how far each rank lies above the median of the others, and which ones do so beyond doubt.

    ``times`` are means of [ranks, windows], of ``sizes`` steps. Beyond doubt is what is worth naming, exceeds the
    spread of the others, and holds in three quarters of the windows at half its size or more.
    """
    means = times @ sizes / sizes.sum()
    order = np.argsort(means, kind="stable")
    excess, slow = np.zeros(len(means)), np.zeros(len(means), np.bool_)
    for place, rank in enumerate(order.tolist()):
        excess[rank] = means[rank] - _quantile_without(means[order], place, 0.5)
    for rank in np.flatnonzero(excess >= LEAST_SHARE * step_s).tolist():
        place = int(np.flatnonzero(order == rank)[0])
        low, high = (_quantile_without(means[order], place, share) for share in (0.25, 0.75))
        if excess[rank] <= BEYOND_SPREAD * (high - low):
            continue
        others = np.median(np.delete(times, rank, axis=0), axis=0)
        slow[rank] = np.quantile(times[rank] - others, 0.25) >= excess[rank] / 2
    return excess, slow


def _quantile_without(ordered: Floats, left_out: int, share: float) -> float:
    """A quantile of ascending values without one of them, with linear interpolation as in ``numpy.quantile``."""
    last = len(ordered) - 2
    below = int(share * last)
    pair = [float(ordered[i if i < left_out else i + 1]) for i in (below, min(below + 1, last))]
    return pair[0] + (pair[1] - pair[0]) * (share * last - below)
