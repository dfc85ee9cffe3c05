"""Steps of a run over all ranks, times of each rank, and the phases in which efficiency is lost."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
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

The range does not shrink with the number of steps, as a standard error would. A disturbance lasts for many steps, so
these steps are not independent samples.
"""
MIN_STEPS = 5
"""Smallest number of steps for which quartiles and an efficiency are reported.

If step times come from readings of a log, the smallest number of readings.
"""
WAITS = ("comm_s", "bubble_s")
"""Fields of a step record with the time that a rank waited for other ranks."""
RECORDED = {
    "communication": "comm_s",
    "bubble": "bubble_s",
    "data": "data_wait_s",
    "optimizer": "optimizer_s",
}
"""Phase of a step -> field of the step records with its time.

Communication must be the first entry, because the code treats only that entry as time outside of the rank's own time.
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


PROFILED = {"compute": "computing", "exposed": "exposed communication", "copies": "copies", "idle": "idle"}
"""Part of a profiled step -> its name for people. The parts add up to the step. A CPU has no copies."""
BREAKDOWN = {part: f"breakdown_{part}_s" for part in (*PROFILED, "comm")}
"""Key of ``PROFILED``, or ``comm`` for all communication -> field of the step records with its time."""


@dataclass(frozen=True, eq=False)
class Steps:
    """Optimizer steps over all ranks, each step once and in order, as arrays of shape [steps]. NaN means unknown."""

    step: Integers
    attempt: Integers
    time_s: Floats
    """Step time of the slowest rank in seconds."""
    work: Floats
    """Work of all ranks in a step, in the unit of the run."""
    mfu_palm: Floats
    """Mean model FLOPs utilization (MFU, 0 to 1) of the ranks that recorded it."""
    recorded_by: Integers
    """Number of ranks that recorded the step."""
    resolution_s: Floats
    """Seconds between two readings of a log, if ``time_s`` is a mean over this time; 0 if the step itself was timed."""
    phases: Mapping[str, Floats]
    """Phase of ``LOSSES`` -> seconds of ``time_s`` on the rank that waits least for other ranks (longest own time).

    The phases add up to ``time_s``. The phase ``computation`` is NaN in a step whose ranks recorded different
    phases.
    """

    def __len__(self) -> int:
        return len(self.step)

    def after_warmup(self) -> Steps:
        """Return all steps except the first ``WARMUP_STEPS`` of each attempt."""
        chosen = past_warmup(self.step, self.attempt)
        kept: dict[str, Any] = {name: values[chosen] for name, values in vars(self).items() if name != "phases"}
        return Steps(**kept, phases={phase: values[chosen] for phase, values in self.phases.items()})

    def shares(self) -> dict[str, float]:
        """Return phase -> its share (0 to 1) of the time of all steps; empty if ``computation`` is NaN in a step.

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
    """Return a mask, [steps]: True for each step after the first ``WARMUP_STEPS`` of its attempt.

    ``steps`` are the numbers of the steps, ``attempts`` the numbers of their attempts, both [steps].
    """
    _, first, of = np.unique(attempts, return_index=True, return_inverse=True)
    later: Flags = steps >= steps[first][of] + WARMUP_STEPS
    return later


@dataclass(frozen=True)
class StepFigures:
    """Figures of one run over ``steps`` optimizer steps.

    ``low_s`` and ``high_s`` are quartiles of the step time, seconds.
    """

    steps: int
    step_time_s: float
    low_s: float
    high_s: float
    throughput: float | None
    """Work per second in the unit of the run; None if the work of a step is not known."""
    mfu_palm: float | None
    resolution_s: float = 0.0
    """Median length, in seconds, of the intervals over which step times are means; 0 if steps were timed one by one."""
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
    """Return how much of the lost efficiency, ``1 - efficiency``, each phase causes: phase -> share.

    The ideal step of a point takes ``efficiency`` times its real step time. In the ideal step, each phase has the same
    share as in a step of the smallest point. The loss of a phase is its real time minus its ideal time, as a share of
    the real step time. It is negative if the phase takes less than its ideal time. The losses add up to
    ``1 - efficiency``. Empty if the two points have no known phase in common.

    Args:
        point: phase -> share of the step time of the point, from ``Steps.shares``.
        base: phase -> share of the step time of the smallest point.
        efficiency: efficiency of the point relative to the smallest point.
        alone: True if the smallest point has only one rank. Its unknown waits for other ranks are then 0.
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
"""Smallest number of windows in which a rank can be found slow throughout the run."""
LEAST_SHARE = 0.02
"""Smallest excess of a slow rank, as a share of the step time. Smaller excesses may come from reading the clock."""
BEYOND_SPREAD = 3.0
"""Smallest excess of a slow rank over the median of the other ranks, as a multiple of their interquartile range."""


@dataclass(frozen=True)
class RankTime:
    """Mean times of one rank over the steps after warm-up, in seconds."""

    rank: int
    own_s: float
    """Step time without the rank's recorded waits for other ranks (``WAITS``)."""
    excess_s: float
    """``own_s`` minus the median of the other ranks."""
    is_slow: bool = False
    """True if the rank is slower than the other ranks throughout the run, by more than the spread of those ranks."""


@dataclass(frozen=True)
class RankTimes:
    """Times of all ranks of a run that recorded steps."""

    ranks: tuple[RankTime, ...]
    windows: tuple[tuple[int, int], ...]
    """First and last step of each window. The windows divide the steps after warm-up."""
    excess_s: tuple[tuple[float, ...], ...]
    """Own time of a rank minus the median of all ranks, mean over a window, seconds, [ranks, windows]."""
    is_net: bool = False
    """True if all these ranks recorded their waits in collectives, so that the own times do not contain the waits."""


def _compare(times: Floats, sizes: Integers, step_s: float) -> tuple[Floats, Flags]:
    """Return each rank's excess over the median of the other ranks in seconds, [ranks], and a mask of the slow ranks.

    A rank is slow if its mean excess is a noticeable share of the step (``LEAST_SHARE``) and exceeds the spread of the
    other ranks (``BEYOND_SPREAD``). In three quarters of the windows, its excess must be at least half its mean excess.

    Args:
        times: mean own time of each rank in each window, [ranks, windows], seconds.
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


@dataclass(frozen=True, kw_only=True, eq=False)
class StepReading:
    """Results of reading the step records of a run."""

    steps: Steps = NO_STEPS
    """Steps of attempt number ``attempt``, and of all attempts with an equal setup (``Environment.setup``)."""
    rank_times: RankTimes | None = None
    """Times of each rank relative to the other ranks; None if fewer than two ranks recorded the same steps."""
    unit: str | None = None
    """Unit of the work: tokens, samples or images; None if unknown."""
    last_step: int | None = None
    loss: float | None = None
    """Training loss of the last step, for the GPT library in nats per token; None if unknown."""
    attempt: int = 0
    """Number of the attempt whose environment the report shows: the last attempt with steps on all nodes.

    If there is none, it is the last attempt with steps on fewer nodes. Attempts without a recorded environment count
    as attempts without steps. 0 if the run has no step records.
    """
    attempt_steps: Mapping[int, int] = field(default_factory=dict)
    """Attempt -> number of its steps that no later attempt repeated."""
    profiled: Mapping[str, float] = field(default_factory=dict)
    """Key of ``BREAKDOWN`` -> mean seconds over the profiled steps of the lowest rank with records."""
    profiled_steps: int = 0
    """Number of profiled steps of the lowest rank with records."""
    span: tuple[float, float] | None = None
    """Unix times of the first and the last step record in the last attempt with steps; None without such records."""
    unread: Mapping[int, int] = field(default_factory=dict)
    """Rank -> number of damaged lines among its records. Ranks without damaged lines are absent."""


def read_run_steps(
    run: RunFolder, setups: Mapping[int, Environment], fewer: Collection[int] = frozenset()
) -> StepReading:
    """Read the step records of all ranks of a run, and return the results for the report.

    Args:
        run: folder of the run.
        setups: attempt -> its environment.
        fewer: attempts on fewer nodes than requested. Their steps count only if there are no others.
    """
    reduction: _Reduction | None = None
    unread: dict[int, int] = {}
    for rank, columns in _read_ranks(run, setups):
        if columns.unread:
            unread[rank] = columns.unread
        if len(columns):
            reduction = reduction or _Reduction(columns, setups, fewer)
            reduction.add(rank, columns)
    return StepReading(unread=unread, **({} if reduction is None else reduction.fields()))


def _read_ranks(run: RunFolder, setups: Mapping[int, Environment]) -> Iterator[tuple[int, RecordColumns]]:
    """Yield (rank, its records) for each rank with a file, ascending.

    The lowest rank with records has all fields that a report needs. The records of higher ranks have fewer fields, and
    several processes may read their files ahead. ``setups`` is attempt -> its environment.
    """
    is_gpt = bool(setups) and all(setup.workload == "gpt" for setup in setups.values())
    stated = sorted({setup.unit for setup in setups.values() if setup.unit is not None})
    units = ("tokens",) if is_gpt else tuple(dict.fromkeys((*stated, *UNITS)))
    names = [TIME, *RECORDED.values(), *units, "mfu_palm"]
    # The GPT library never records these fields: searching for them in its files would take time.
    names += [] if is_gpt else ["work", RESOLUTION, *(f"{unit}_per_s" for unit in units)]
    ranks = iter(run.metric_ranks())
    for rank in ranks:
        first = read_columns(run.metrics(rank), [*names, "time", "loss", *BREAKDOWN.values()])
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


TIMES, WORK, MFU, READ = range(4)
"""Indices of the first figures in the arrays of ``_Reduction``.

The figures are the step time, the work of the rank, the MFU, and the field ``RESOLUTION`` of a step read from a log.

The figures after these are the fields of ``RECORDED``, in order.
"""


class _Reduction:
    """Figures of each step over all added ranks. The steps are those of the lowest rank with records.

    The critical rank of a step is the rank with the longest own time. The own time is the step time without the waits
    in collectives.
    """

    def __init__(self, first: RecordColumns, setups: Mapping[int, Environment], fewer: Collection[int]) -> None:
        self._first, self._setups = first, setups
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
        shape = (len(RECORDED) + 4, len(first))
        self._sums, self._counts, self._most = np.zeros(shape), np.zeros(shape), np.full(shape, np.nan)
        """Sum, number and maximum of each known figure over the ranks, [figures, steps of the first rank]."""
        self._computing = np.zeros(len(first))
        """Sum over the ranks of the own time outside of the phases of ``RECORDED``, seconds, [steps]."""
        self._own = np.full(len(first), -np.inf)
        """Longest own time of any rank in each step, seconds, [steps]."""
        self._critical = np.full((len(RECORDED) + 1, len(first)), np.nan)
        """Seconds of each phase of ``RECORDED``, then of computing, on the critical rank, [phases, steps]."""
        # Means of each rank over windows of the run, which begin after the warm-up.
        self._chosen = np.flatnonzero(
            np.isin(first.attempts, self._counting) & past_warmup(first.steps, first.attempts)
        )
        count = len(self._chosen)
        self._windows = np.array_split(first.steps[self._chosen], min(WINDOWS, count) or 1)
        self._sizes = np.array([len(window) for window in self._windows])
        self._window = np.repeat(np.arange(len(self._sizes)), self._sizes)
        self._means: dict[int, Floats] = {}
        """Rank -> its mean own time in seconds, [windows]."""
        self._is_net = True

    def add(self, rank: int, columns: RecordColumns) -> None:
        """Add the records of the next rank."""
        self._recording.update(set(columns.attempts.tolist()))
        work = unknown = np.full(len(columns), np.nan)
        for name in (*{"images": ("images", "samples"), None: ()}.get(self._unit, (self._unit,)), "work"):
            work = np.where(np.isnan(work), columns.values.get(str(name), work), work)
        named = [columns.values.get(name, unknown) for name in ("mfu_palm", RESOLUTION, *RECORDED.values())]
        figures = np.array([step_times(columns), work, *named])
        if not np.array_equal(columns.keys, self._first.keys):
            _, at, found = np.intersect1d(self._first.keys, columns.keys, assume_unique=True, return_indices=True)
            place = np.full(len(self._first), -1)
            place[at] = found
            # A step that this rank lacks takes the NaN behind the last record.
            figures = np.column_stack([figures, np.full(len(figures), np.nan)])[:, place]
        is_known = ~np.isnan(figures)
        known = np.where(is_known, figures, 0.0)
        self._counts += is_known
        self._sums += known
        self._most = np.fmax(self._most, figures)
        own = computing = figures[TIMES] - known[READ + 1]
        for seconds in known[READ + 2 :]:
            computing = computing - seconds
        self._computing += np.nan_to_num(computing)
        longest = own > self._own
        self._own[longest] = own[longest]
        self._critical[:, longest] = np.vstack([figures[READ + 1 :], computing])[:, longest]
        # The mean times of this rank in each window. A rank that lacks a step is left out.
        own, comm, bubble = figures[[[TIMES], [READ + 1], [READ + 2]], self._chosen]  # ``RECORDED`` begins with waits.
        if len(own) and not np.isnan(own).any():
            for waits in (comm, bubble):
                own = own if np.isnan(waits).any() else own - waits
            self._is_net = self._is_net and not np.isnan(comm).any()
            self._means[rank] = np.bincount(self._window, weights=own) / self._sizes

    def fields(self) -> dict[str, Any]:
        """Return the fields of ``StepReading``, except ``unread``, over all added ranks."""
        first = self._first
        times = first.values["time"][first.attempts == max(self._stepped, default=-1)]
        loss = float(first.values["loss"][-1])
        profiled = {part: first.values[name][~np.isnan(first.values[name])] for part, name in BREAKDOWN.items()}
        return {
            "steps": self._whole_steps(),
            "rank_times": self._rank_times(),
            "unit": self._unit,
            "last_step": int(first.steps[-1]),
            "loss": None if math.isnan(loss) else loss,
            "profiled": {part: float(seconds.mean()) for part, seconds in profiled.items() if len(seconds)},
            "profiled_steps": len(profiled["idle"]),
            "span": (float(times.min()), float(times.max())) if len(times) else None,
            "attempt": self._attempt,
            "attempt_steps": Counter(first.attempts.tolist()),
        }

    def _rank_times(self) -> RankTimes | None:
        """Return the times of the ranks relative to each other.

        None if fewer than two ranks recorded the same steps, or if the run has fewer than ``LEAST_WINDOWS`` windows.
        """
        if len(self._means) < 2 or len(self._windows) < LEAST_WINDOWS:
            return None
        own = np.array(list(self._means.values()))
        mean = own @ self._sizes / self._sizes.sum()
        excess, slow = _compare(own, self._sizes, float(own.mean()))
        of_ranks = zip(self._means, mean.tolist(), excess.tolist(), slow.tolist(), strict=True)
        return RankTimes(
            ranks=tuple(RankTime(*of_rank) for of_rank in of_ranks),
            windows=tuple((int(part[0]), int(part[-1])) for part in self._windows),
            excess_s=tuple(map(tuple, (own - np.median(own, axis=0)).tolist())),
            is_net=self._is_net,
        )

    def _whole_steps(self) -> Steps:
        """Return the steps that every rank recorded, in attempts with the environment of the report.

        In a GPT run every rank records. In a script, only the ranks that recorded anything in the attempt are required,
        often rank 0 alone. The work of a step is the sum of the recorded work, if every rank of the run recorded its
        work. If only some ranks recorded it, the work is the amount that the user stated, because the other ranks
        worked too. If the user stated none, it is the sum over the ranks that record. If these ranks have not recorded
        their work, it is the recorded rate of the whole run times the step time.
        """
        first = self._first
        expected = np.full(len(first), -1)
        work = first.values.get(f"{self._unit}_per_s", np.nan) * self._most[TIMES]
        for number in self._counting:
            setup, here = self._setups[number], first.attempts == number
            recorded = setup.world_size if setup.workload == "gpt" else self._recording[number]
            expected[here] = recorded
            stated = setup.work_per_step
            worked = self._counts[WORK]
            by_all = here & (worked == (recorded if stated is None else setup.world_size)) & (worked > 0)
            if stated is not None:
                work[here] = stated
            work[by_all] = self._sums[WORK, by_all]
        whole = np.flatnonzero(self._counts[TIMES] == expected)
        with np.errstate(invalid="ignore"):
            mfu = self._sums[MFU] / self._counts[MFU]  # Ranks above the first may leave out the MFU.
        return Steps(
            step=first.steps[whole],
            attempt=first.attempts[whole],
            time_s=self._most[TIMES, whole],
            work=work[whole],
            mfu_palm=mfu[whole],
            recorded_by=expected[whole],
            resolution_s=np.nan_to_num(self._most[READ, whole]),
            phases=self._phases(whole, expected[whole]),
        )

    def _phases(self, whole: Integers, ranks: Integers) -> dict[str, Floats]:
        """Return phase -> seconds, [steps]. ``computation`` is NaN in a step if only some ranks recorded a phase.

        ``whole`` are the indices of the steps; ``ranks`` is the number of ranks in each of these steps.
        """
        time_s, counts, critical = self._most[TIMES, whole], self._counts[READ + 1 :, whole], self._critical[:, whole]
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
