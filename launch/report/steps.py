"""Steps of a run over all ranks, times of each rank, and the phases in which efficiency is lost."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from launch.report.read import (
    Environment,
    Flags,
    Floats,
    Integers,
    RecordColumns,
    read_ahead,
    read_columns,
    read_last,
)
from launch.runs.folder import RunFolder
from launch.runs.progress import RESOLUTION
from launch.runs.records import UNITS

TIME = "step_time_s"
WARMUP_STEPS = 5
"""Number of steps that are left out at the start of each attempt.

These steps also set up memory pools, caches, connections and DDP's second bucketing.
"""
NOISY = 0.1
"""Interquartile range, as a share of the median, above which an efficiency is marked as inexact.

The range does not shrink with the number of steps, as a standard error would. A disturbance lasts for many steps, which
are therefore no independent samples.
"""
MIN_STEPS = 5
"""Smallest number of steps, or of intervals in which a log was read, for quartiles and an efficiency."""
WAITS = ("comm_s", "bubble_s")
"""Fields of a step record with the time that a rank waited for other ranks."""
RECORDED = {
    "communication": "comm_s",
    "bubble": "bubble_s",
    "data": "data_wait_s",
    "optimizer": "optimizer_s",
}
"""Phase of a step -> field of the step records with its time.

Communication comes first: all other phases are part of the rank's own time.
"""
STRAGGLERS, REST = "stragglers", "computation"
LOSSES = {
    "communication": "exposed communication",
    "stragglers": "slowest rank of each step",
    "data": "waiting for data",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "computation": "computation and the rest",
}
"""Phase in which efficiency is lost -> its name for people, in the order of display."""


@dataclass(frozen=True, eq=False)
class Steps:
    """Optimizer steps over all ranks in order, each once, as arrays of shape [steps]. An unknown number is NaN."""

    step: Integers
    attempt: Integers
    time_s: Floats
    """Step time of the slowest rank in seconds."""
    work: Floats
    """Work of all ranks in a step, in the unit of the point."""
    mfu_palm: Floats
    recorded_by: Integers
    """Number of ranks that recorded the step."""
    resolution_s: Floats
    """Seconds between two readings of a log, over which ``time_s`` is a mean; 0 if the step itself was timed."""
    phases: Mapping[str, Floats]
    """Phase of ``LOSSES`` -> seconds of ``time_s`` on the rank with the longest own time.

    The phases add up to ``time_s``. The phase ``computation`` is NaN in a step whose ranks recorded different
    phases.
    """

    def __len__(self) -> int:
        return len(self.step)

    def after_warmup(self) -> Steps:
        """Return all steps except the first ``WARMUP_STEPS`` of each attempt."""
        chosen = past_warmup(self.step, self.attempt)
        arrays = {one.name: getattr(self, one.name) for one in fields(self) if one.name != "phases"}
        phases = {phase: values[chosen] for phase, values in self.phases.items()}
        return Steps(**{name: values[chosen] for name, values in arrays.items()}, phases=phases)

    def shares(self) -> dict[str, float]:
        """Return the share of each phase in the time of all steps; empty if a step has no phases.

        The shares add up to 1. A phase that some steps lack is added to ``computation`` in all steps.
        """
        total = sum(self.time_s.tolist())
        rest = self.phases.get(REST)
        if rest is None or np.isnan(rest).any() or not total > 0:
            return {}
        divided = {phase: self.phases[phase] for phase in LOSSES if phase != REST and phase in self.phases}
        shares = {phase: sum(s.tolist()) / total for phase, s in divided.items() if not np.isnan(s).any()}
        return {**shares, REST: 1 - sum(shares.values())}


NO_STEPS = Steps(*(np.empty(0, np.int64),) * 2, *(np.empty(0),) * 3, np.empty(0, np.int64), np.empty(0), {})


def past_warmup(steps: Integers, attempts: Integers) -> Flags:
    """Return a mask, [steps], of the steps after the first ``WARMUP_STEPS`` of their attempt."""
    _, first, of = np.unique(attempts, return_index=True, return_inverse=True)
    later: Flags = steps >= steps[first][of] + WARMUP_STEPS
    return later


@dataclass(frozen=True)
class StepFigures:
    """Figures of one point over ``steps`` optimizer steps: median step time and its quartiles, in seconds."""

    steps: int
    step_time_s: float
    low_s: float
    high_s: float
    throughput: float | None
    """Work per second in the unit of the point; None if the work of a step is not known."""
    mfu_palm: float | None
    resolution_s: float = 0.0
    """Seconds over which most step times are means; 0 if most steps were timed one by one."""
    intervals: float = math.inf
    """Number of intervals over which step times are means; infinite if steps were timed one by one."""

    @property
    def spread_share(self) -> float:
        """Interquartile range as a share of the median."""
        return (self.high_s - self.low_s) / self.step_time_s if self.step_time_s else 0.0

    @property
    def is_noisy(self) -> bool:
        """True if the steps differ too much, or are timed too coarsely, for an exact efficiency."""
        return self.spread_share > NOISY or NOISY * self.intervals < 1


def measure_steps(steps: Steps) -> StepFigures | None:
    """Return the figures of the steps after warm-up; None if fewer than ``MIN_STEPS`` are left."""
    used = steps.after_warmup()
    if len(used) < MIN_STEPS:
        return None
    low, median, high = statistics.quantiles(used.time_s.tolist(), n=4, method="inclusive")
    mfu = used.mfu_palm[~np.isnan(used.mfu_palm)]
    resolution_s = float(np.median(used.resolution_s))
    length_s = median * int(used.step[-1] - used.step[0] + 1)  # Some programs print every tenth step.
    has_work = not np.isnan(used.work).any() and median > 0
    return StepFigures(
        steps=len(used),
        step_time_s=median,
        low_s=low,
        high_s=high,
        throughput=float(np.median(used.work)) / median if has_work else None,
        mfu_palm=float(np.median(mfu)) if len(mfu) else None,
        resolution_s=resolution_s,
        intervals=length_s / resolution_s if resolution_s else math.inf,
    )


def lost(point: Mapping[str, float], base: Mapping[str, float], efficiency: float, alone: bool) -> dict[str, float]:
    """Divide the loss ``1 - efficiency`` of a point among the phases: phase -> share, negative if the phase got
    shorter.

    The ideal step takes ``efficiency`` of the real step's time, divided as at the smallest point. The loss of a phase
    is its time beyond its part of the ideal step. Empty if the two points have no known phase in common.

    Args:
        point: shares of the phases in its step time, from ``Steps.shares``.
        base: shares of the smallest point.
        efficiency: efficiency of the point relative to the smallest one.
        alone: True if the smallest point is one rank, which waits for no other.
    """
    if not point or not base:
        return {}
    ideal = {**({"communication": 0.0, STRAGGLERS: 0.0, "bubble": 0.0} if alone else {}), **base}
    known = [phase for phase in LOSSES if phase != REST and phase in point and phase in ideal]
    if not known:
        return {}
    parts = {phase: point[phase] - efficiency * ideal[phase] for phase in known}
    return {**parts, REST: 1 - efficiency - sum(parts.values())}


# Times of each rank relative to the other ranks: slow ranks, beyond the usual spread.


WINDOWS = 60
"""Number of windows of the run over which the times of each rank are averaged."""
LEAST_WINDOWS = 4
"""Smallest number of windows that can show a persistent difference."""
LEAST_SHARE = 0.02
"""Smallest excess of a slow rank, as a share of the step time. The time of reading the clock varies as much."""
BEYOND_SPREAD = 3.0
"""A slow rank's excess is above this multiple of the interquartile range of the other ranks."""


@dataclass(frozen=True)
class RankTime:
    """Mean times of one rank over the steps after warm-up, in seconds."""

    rank: int
    own_s: float
    """Step time without the rank's waits for other ranks (``WAITS``), as far as these are recorded."""
    excess_s: float
    """``own_s`` minus the median of the other ranks."""
    data_wait_s: float | None
    wait_excess_s: float | None
    """``data_wait_s`` minus the median of the other ranks; None if not recorded."""
    is_slow: bool = False
    """True if the rank is slower than the others throughout the run, beyond their spread."""
    waits_long: bool = False
    """True if the rank waits longer for data than the others throughout the run, beyond their spread."""


@dataclass(frozen=True)
class RankTimes:
    """Times of all ranks of a run that recorded steps."""

    ranks: tuple[RankTime, ...]
    windows: tuple[tuple[int, int], ...]
    """First and last step of each window of the run."""
    excess_s: tuple[tuple[float, ...], ...]
    """Mean own time of a rank minus the median of all ranks in the window, seconds, [ranks, windows]."""
    is_net: bool = False
    """True if waiting in collectives was recorded and is subtracted."""


def _compare(times: Floats, sizes: Integers, step_s: float) -> tuple[Floats, Flags]:
    """Return each rank's excess over the median of the other ranks in seconds, and a mask of the slow ranks.

    The excess of a slow rank is a noticeable share of the step and exceeds the spread of the other ranks. It is also
    at least half as large in three quarters of the windows.

    Args:
        times: means of shape [ranks, windows], seconds.
        sizes: number of steps in each window.
        step_s: step time in seconds.
    """
    means = times @ sizes / sizes.sum()
    ordered = np.sort(means)
    own_place = np.searchsorted(ordered, means)

    def of_others(share: float) -> Floats:
        """Return for each rank the quantile ``share`` of the other ranks' means, seconds, [ranks]."""
        place = share * (len(means) - 2)
        below = int(place)
        low, high = (ordered[at + (own_place <= at)] for at in (below, min(below + 1, len(means) - 2)))
        found: Floats = low + (high - low) * (place - below)
        return found

    excess = means - of_others(0.5)
    slow = (excess >= LEAST_SHARE * step_s) & (excess > BEYOND_SPREAD * (of_others(0.75) - of_others(0.25)))
    for rank in np.flatnonzero(slow).tolist():
        median_s = np.median(np.delete(times, rank, axis=0), axis=0)
        slow[rank] = np.quantile(times[rank] - median_s, 0.25) >= excess[rank] / 2
    return excess, slow


# Reading and reducing the records of all ranks, one file at a time.


@dataclass(frozen=True)
class UnreadLines:
    """Unreadable lines in the step records of one rank and attempt: cut off by a crash, or damaged."""

    rank: int
    attempt: int | None
    """Attempt of the lines; None if the file does not name it."""
    lines: int


@dataclass(frozen=True, kw_only=True, eq=False)
class StepReading:
    """Everything that a report needs from the step records of a run."""

    steps: Steps = NO_STEPS
    """Steps of attempts with the same environment as the last attempt on all nodes."""
    rank_times: RankTimes | None = None
    """Times of each rank against the other ranks; None if fewer than two recorded the same steps."""
    unit: str | None = None
    """Unit of the work: tokens, samples or images; None if unknown."""
    last_step: int | None = None
    loss: float | None = None
    """Training loss of the last step in nats per token; None if unknown."""
    attempt: int = 0
    """Attempt whose environment the steps have."""
    attempt_steps: Mapping[int, int] = field(default_factory=dict)
    """Attempt -> number of its steps that no later attempt repeated."""
    bf16_ratio: float | None = None
    """MFU by the bf16 peak divided by MFU by the peak in the run's precision; None if not recorded."""
    span: tuple[float, float] | None = None
    """Unix times of the first and the last record of the last attempt with steps."""
    unread: tuple[UnreadLines, ...] = ()
    """Lines that are no records, by rank and by attempt in file order. A line that is being written does not count."""


def read_run_steps(
    run: RunFolder, setups: Mapping[int, Environment], fewer: Collection[int] = frozenset(), *, has_ended: bool = True
) -> StepReading:
    """Read and reduce the step records of a run.

    Args:
        run: folder of the run.
        setups: attempt -> its environment.
        fewer: attempts on fewer nodes than requested. Their steps count only if there are no others.
        has_ended: False if ranks may be running, so that half a line at the end of a file is being written.
    """
    reduction: _Reduction | None = None
    unread: list[UnreadLines] = []
    for rank, columns in _read_ranks(run, setups):
        lines = columns.unread if has_ended or not columns.has_open_end else columns.unread[:-1]
        unread += [UnreadLines(rank, attempt, count) for attempt, count in Counter(lines).items()]
        if len(columns):
            reduction = reduction or _Reduction(run.metrics(rank), columns, setups, fewer)
            reduction.add(rank, columns)
    return StepReading(unread=tuple(unread), **({} if reduction is None else reduction.fields()))


def _read_ranks(run: RunFolder, setups: Mapping[int, Environment]) -> Iterator[tuple[int, RecordColumns]]:
    """Yield each rank and its records, in order. After the first rank with records, files are read ahead."""
    is_gpt = bool(setups) and all(setup.workload == "gpt" for setup in setups.values())
    stated = sorted({setup.unit for setup in setups.values() if setup.unit is not None})
    units = ("tokens",) if is_gpt else tuple(dict.fromkeys((*stated, *UNITS)))
    names = [TIME, *RECORDED.values(), *units, "mfu_palm"]
    # The GPT library never records these fields: searching for them in its files would take time.
    names += [] if is_gpt else ["work", RESOLUTION, *(f"{unit}_per_s" for unit in units)]
    ranks = iter(run.metric_ranks())
    for rank in ranks:
        first = read_columns(run.metrics(rank), [*names, "time"])
        yield rank, first
        if len(first):
            names += ["time"] if not is_gpt or np.isnan(first.values[TIME]).any() else []
            others = list(ranks)
            paths = [run.metrics(other) for other in others]
            size = sum(path.stat().st_size for path in paths if path.exists())
            yield from zip(others, read_ahead(partial(read_columns, fields=names), paths, size), strict=True)


def step_times(columns: RecordColumns) -> Floats:
    """Return the step time of each record in seconds, NaN if unknown or not finite.

    A missing step time is computed from the times of the record and its predecessor in the attempt.
    """
    values = columns.values[TIME]
    values = np.where(np.isfinite(values), values, np.nan)  # A script may have divided by zero.
    missing = np.flatnonzero(np.isnan(columns.values[TIME]) & np.append(False, np.diff(columns.attempts) == 0))
    if len(missing) and "time" in columns.values:
        time = columns.values["time"]
        seconds = np.nan_to_num(time)[missing] - time[missing - 1]
        values[missing] = np.where(seconds > 0, seconds / np.diff(columns.steps)[missing - 1], np.nan)
    return values


def _own_work(columns: RecordColumns, unit: str | None) -> Floats:
    """Return the work of the rank itself in each record, in ``unit``; NaN if unknown."""
    work = np.full(len(columns), np.nan)
    for name in (*{"images": ("images", "samples"), None: ()}.get(unit, (unit,)), "work"):
        work = np.where(np.isnan(work), columns.values.get(str(name), work), work)
    return work


class _Reduction:
    """Figures of each step over all added ranks. Steps and unit are those of the first rank with records.

    The critical rank of a step has the longest own time: its step time without its waits in collectives.
    """

    def __init__(
        self, path: Path, first: RecordColumns, setups: Mapping[int, Environment], fewer: Collection[int]
    ) -> None:
        self._first, self._setups, self._last = first, setups, read_last(path, first)
        # An attempt without steps, such as a start of a finished run, does not show how the steps were made.
        self._stepped = stepped = set(first.attempts.tolist()) & set(setups)
        self._attempt = max(stepped - set(fewer) or stepped or setups, default=0)
        setup = setups.get(self._attempt)
        self._counting = [
            attempt
            for attempt, other in setups.items()
            if setup is not None and other.setup() == setup.setup() and (attempt in fewer) == (self._attempt in fewer)
        ]
        self._unit = None if setup is None else setup.unit
        if setup is None or setup.work_per_step is None:
            # Records whose unit differs from the stated one have precedence.
            for unit in (*UNITS[::-1], self._unit or ""):
                if unit in first.values and not np.isnan(first.values[unit][-1]):
                    self._unit = unit
        self._recording: Counter[int] = Counter()
        """Attempt -> number of ranks that recorded steps in it."""
        # Arrays of figures have the shape [steps of the first rank].
        size = len(first)
        self._records, self._resolution, self._computing = np.zeros((3, size))
        self._sums = {name: np.zeros(size) for name in ("time", "mfu", "work")}
        self._counts = {name: np.zeros(size) for name in self._sums}
        """Figure -> number of ranks that recorded the figure."""
        self._time, self._own = np.full((2, size), -np.inf)
        """Longest step time and longest own time of any rank in each step, seconds."""
        self._phase_counts = np.zeros((len(RECORDED), size))
        self._critical = np.full((len(RECORDED) + 1, size), np.nan)
        """Seconds of each phase of ``RECORDED``, then of computing, on the critical rank, [phases, steps]."""
        # Means of each rank over windows of the run, which begin after the warm-up.
        chosen = np.isin(first.attempts, self._counting) & past_warmup(first.steps, first.attempts)
        self._keys, self._steps = first.keys[chosen], first.steps[chosen]
        self._windows = np.array_split(np.arange(len(self._keys)), min(WINDOWS, len(self._keys)) or 1)
        self._sizes = np.array([len(window) for window in self._windows])
        self._ranks: list[int] = []
        self._means: list[list[Floats]] = []
        """Own time and wait for data of each rank, seconds, each of shape [windows]."""
        self._is_net = True

    def add(self, rank: int, columns: RecordColumns) -> None:
        """Add the records of the next rank."""
        self._recording.update(set(columns.attempts.tolist()))
        times, work = step_times(columns), _own_work(columns, self._unit)
        self._add_windows(rank, columns, times)
        values, at = columns.values, np.arange(len(self._first))
        if not np.array_equal(columns.keys, self._first.keys):  # Otherwise nothing is copied: there may be many ranks.
            _, at, found = np.intersect1d(self._first.keys, columns.keys, assume_unique=True, return_indices=True)
            values = {name: column[found] for name, column in values.items()}
            times, work = times[found], work[found]
        self._records[at] += 1
        self._time[at] = np.fmax(self._time[at], times)
        if RESOLUTION in values:
            self._resolution[at] = np.fmax(self._resolution[at], values[RESOLUTION])
        for name, numbers in (("time", times), ("mfu", values["mfu_palm"]), ("work", work)):
            self._sums[name][at] += np.nan_to_num(numbers)
            self._counts[name][at] += ~np.isnan(numbers)
        phases = np.array([values[name] for name in RECORDED.values()])
        is_known = ~np.isnan(phases)
        self._phase_counts[:, at] += is_known
        waits, *others = np.where(is_known, phases, 0.0)
        computing = own = times - waits
        for seconds in others:
            computing = computing - seconds
        self._computing[at] += computing
        longest = own > self._own[at]
        self._own[at[longest]] = own[longest]
        self._critical[:, at[longest]] = np.vstack([phases, computing])[:, longest]

    def _add_windows(self, rank: int, columns: RecordColumns, times: Floats) -> None:
        """Add the mean times of one rank in each window. A rank that lacks a step is left out."""
        at = np.searchsorted(columns.keys, self._keys).clip(0, len(columns) - 1)
        own = times[at]
        if not len(at) or (columns.keys[at] != self._keys).any() or np.isnan(own).any():
            return
        for name in WAITS:
            waits = columns.values[name][at]
            own = own if np.isnan(waits).any() else own - waits
        self._is_net = self._is_net and not np.isnan(columns.values["comm_s"][at]).any()
        self._ranks.append(rank)
        window = np.repeat(np.arange(len(self._sizes)), self._sizes)
        every = (own, columns.values["data_wait_s"][at])
        self._means.append([np.bincount(window, weights=of) / self._sizes for of in every])

    def fields(self) -> dict[str, Any]:
        """Return the fields of ``StepReading``, except ``unread``, over all added ranks."""
        first, last = self._first, self._last
        times = first.values["time"][first.attempts == max(self._stepped, default=-1)]
        of_bf16, of_precision = last.get("mfu_bf16"), last.get("mfu_palm")
        return {
            "steps": self._whole_steps(),
            "rank_times": self._rank_times(),
            "unit": self._unit,
            "last_step": int(first.steps[-1]),
            "loss": last.get("loss"),
            "bf16_ratio": of_bf16 / of_precision if of_bf16 and of_precision else None,
            "span": (float(times.min()), float(times.max())) if len(times) else None,
            "attempt": self._attempt,
            "attempt_steps": Counter(first.attempts.tolist()),
        }

    def _rank_times(self) -> RankTimes | None:
        """Compare the ranks. None if fewer than two recorded the same steps, or steps are too few for windows."""
        if len(self._ranks) < 2 or len(self._windows) < LEAST_WINDOWS:
            return None
        own, waits = np.moveaxis(np.array(self._means), 1, 0)
        step_s = float(own.mean())

        def compared(times: Floats) -> list[list[Any]]:
            """Return three lists over the ranks: mean in seconds, excess in seconds, and True if the rank is slow."""
            mean = times @ self._sizes / self._sizes.sum()
            return [of.tolist() for of in (mean, *_compare(times, self._sizes, step_s))]

        unknown = [[None] * len(own), [None] * len(own), [False] * len(own)]
        by_waits = unknown if np.isnan(waits).any() else compared(waits)
        of_ranks = zip(self._ranks, *compared(own), *by_waits, strict=True)
        return RankTimes(
            ranks=tuple(
                RankTime(rank, own_s, excess_s, wait_s, wait_excess_s, is_slow, is_long)
                for rank, own_s, excess_s, is_slow, wait_s, wait_excess_s, is_long in of_ranks
            ),
            windows=tuple((int(self._steps[part[0]]), int(self._steps[part[-1]])) for part in self._windows),
            excess_s=tuple(map(tuple, (own - np.median(own, axis=0)).tolist())),
            is_net=self._is_net,
        )

    def _whole_steps(self) -> Steps:
        """Return the steps that every rank recorded, in attempts with the environment of the report.

        In a GPT run every rank records. In a script, the ranks that recorded anything in the attempt count, often only
        rank 0. The work of a step is the sum over all ranks, or the stated work. If only some ranks record, the stated
        work has precedence, because the other ranks worked too. Without both, it is the
        recorded rate of the whole run times the step time.
        """
        first, counts = self._first, self._counts
        expected = np.full(len(first), -1)
        work = first.values.get(f"{self._unit}_per_s", np.nan) * self._time
        for number in self._counting:
            setup, here = self._setups[number], first.attempts == number
            recorded = setup.world_size if setup.workload == "gpt" else self._recording[number]
            expected[here] = recorded
            by_all = here & np.isin(counts["work"], (recorded or -1, setup.world_size or -1))
            work[by_all] = self._sums["work"][by_all]
            if setup.work_per_step is not None:
                work[here & (counts["work"] != setup.world_size)] = setup.work_per_step
        whole = np.flatnonzero((self._records == expected) & (counts["time"] == expected))
        with np.errstate(invalid="ignore"):
            mfu = self._sums["mfu"] / counts["mfu"]  # Ranks above the first may leave out the MFU.
        return Steps(
            step=first.steps[whole],
            attempt=first.attempts[whole],
            time_s=self._time[whole],
            work=work[whole],
            mfu_palm=mfu[whole],
            recorded_by=expected[whole],
            resolution_s=self._resolution[whole],
            phases=self._phases(whole, expected[whole]),
        )

    def _phases(self, whole: Integers, ranks: Integers) -> dict[str, Floats]:
        """Return phase -> seconds of each step. ``computation`` is NaN if only some of the ranks recorded a phase."""
        time_s, counts, critical = self._time[whole], self._phase_counts[:, whole], self._critical[:, whole]
        found = dict(zip(RECORDED, np.where(counts > 0, critical[:-1], np.nan), strict=True))
        # The critical rank waits for the other ranks outside of its own time.
        found["communication"] = np.where(counts[0] > 0, time_s - self._own[whole], np.nan)
        known_s = sum(map(np.nan_to_num, found.values()), np.zeros(len(ranks)))
        # Ranks that wait for each other end a step together: only their waits show a difference.
        late = critical[-1] - self._computing[whole] / ranks
        found[STRAGGLERS] = np.where((counts[0] > 0) & (ranks > 1), late, np.nan)
        is_divided = ((counts == 0) | (counts == ranks)).all(axis=0)
        found[REST] = np.where(is_divided, time_s - known_s - np.nan_to_num(found[STRAGGLERS]), np.nan)
        return {phase: values for phase, values in found.items() if not np.isnan(values).all()}
