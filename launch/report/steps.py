"""Step records of all ranks of a run, reduced while they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from launch.report.columns import Flags, Floats, Integers, RecordColumns, read_ahead, read_columns, size_of
from launch.report.environment import Environment
from launch.runs.folder import RunFolder
from launch.runs.records import UNITS, own_work

# Figures that a report takes from the step records of one run: its steps, and the times of its ranks.


WARMUP_STEPS = 5
"""Left out at the start of each attempt: they pay for memory pools, caches, connections and DDP's second bucketing."""
LEAST_SHARE = 0.02
"""Share of the step time below which nobody is called slow: a clock read at another moment makes as much."""


@dataclass(frozen=True)
class Step:
    """One optimizer step over all ranks: the time of the slowest rank, the work of all of them."""

    step: int
    attempt: int
    time_s: float
    work: float | None
    """In the unit of the point; None where neither the ranks nor the set-up tell."""
    mfu_palm: float | None
    recorded_by: int = 1
    """Ranks whose own work was added up."""
    phases: Mapping[str, float] | None = None
    """Phase -> seconds of it in ``time_s``, on the rank with the longest own time: see ``losses``; they add up to it.
    None where the ranks did not all say the same."""


@dataclass(frozen=True)
class RankTime:
    """Times of one rank, means over the steps after warm-up, in seconds."""

    rank: int
    own_s: float
    """Its step time, less what it says it waited in collectives (``comm_s``)."""
    excess_s: float
    """``own_s`` above the median of the other ranks; below it where negative."""
    data_wait_s: float | None
    wait_excess_s: float | None
    """``data_wait_s`` above the median of the other ranks."""
    is_slow: bool = False
    """True where it takes longer than the others beyond their spread, and does so throughout the run."""
    waits_long: bool = False
    """True where it waits longer for its data than the others, in the same sense."""


@dataclass(frozen=True)
class RankTimes:
    """Times of all ranks of a run that recorded steps."""

    ranks: tuple[RankTime, ...]
    windows: tuple[tuple[int, int], ...]
    """First and last step of each window of the run."""
    excess_s: tuple[tuple[float, ...], ...]
    """[ranks, windows]: mean of a rank's own time in a window above the median of all ranks there."""
    is_net: bool = False
    """True where waiting in collectives was recorded and is taken off."""


@dataclass(frozen=True)
class UnreadLines:
    """Lines among the step records of one rank in one attempt that are no records: cut by a crash, or garbled."""

    rank: int
    attempt: int | None
    """None where nothing in the file of the rank tells it."""
    lines: int


@dataclass(frozen=True)
class StepReading:
    """Everything that a report takes from the step records of a run."""

    steps: tuple[Step, ...] = ()
    """In order, of attempts with the set-up of the last one that had all nodes of the run."""
    rank_times: RankTimes | None = None
    unit: str | None = None
    """Unit of the work, as the set-up states it or the records show it; None where nothing says."""
    last_step: int | None = None
    loss: float | None = None
    """Training loss of the last step."""
    attempt: int = 0
    """Attempt whose set-up the steps have."""
    attempt_steps: Mapping[int, int] = field(default_factory=dict)
    """Attempt -> steps that it made, and that no later one made again."""
    bf16_ratio: float | None = None
    """MFU of the bf16 peak over that of the peak in the precision of the run, by the last record."""
    attempt_times: Mapping[int, tuple[float, float]] | None = None
    """Attempt -> times of its first and its last record that count, by the first rank."""
    unread: tuple[UnreadLines, ...] = ()
    """By rank, and by attempt in the order of its file."""


# Efficiency that a point lost against the smallest one, divided among the phases of its steps.


RECORDED = {
    "communication": "comm_s",
    "bubble": "bubble_s",
    "data": "data_wait_s",
    "optimizer": "optimizer_s",
}
"""Phase -> field of the step records that tells it. Communication comes first, as the others lie in a rank's own
time."""
STRAGGLERS, REST = "stragglers", "computation"
LOSSES = {
    "communication": "exposed communication",
    "stragglers": "stragglers",
    "data": "waiting for data",
    "bubble": "pipeline bubble",
    "optimizer": "optimizer",
    "computation": "computation and the rest",
}
"""Phase -> its name for people, in the order in which they are shown."""


def phase_shares(steps: Sequence[Step]) -> dict[str, float]:
    """Divide the step time: phase -> its share over these steps; the shares add up to 1. Empty where nothing tells.

    A phase that some steps lack counts as the rest in the others too.
    """
    divided = [step.phases for step in steps if step.phases is not None]
    total = sum(step.time_s for step in steps)
    if len(divided) < len(steps) or not total > 0:
        return {}
    told = [phase for phase in LOSSES if phase != REST and all(phase in phases for phases in divided)]
    shares = {phase: sum(phases[phase] for phases in divided) / total for phase in told}
    return {**shares, REST: 1 - sum(shares.values())}


def lost(point: Mapping[str, float], base: Mapping[str, float], efficiency: float, alone: bool) -> dict[str, float]:
    """Divide ``1 - efficiency`` of a point among phases: phase -> share of its step time; negative where it gained.

    The ideal step takes ``efficiency`` of the time of the real one, divided as at the smallest point. What a phase
    takes beyond its part of the ideal step is lost to it.

    Args:
        point: shares of the phases in its step time, as of ``phase_shares``.
        base: those of the smallest point.
        efficiency: of the point against the smallest one.
        alone: True where the smallest point is one rank, which waits for nobody.
    """
    if not point or not base:
        return {}
    none_alone = {"communication": 0.0, STRAGGLERS: 0.0, "bubble": 0.0} if alone else {}
    ideal = {**none_alone, **base}
    told = [phase for phase in LOSSES if phase != REST and phase in point and phase in ideal]
    if not told:
        return {}
    parts = {phase: point[phase] - efficiency * ideal[phase] for phase in told}
    return {**parts, REST: 1 - efficiency - sum(parts.values())}


# Times of each rank beside those of the others: who is slower, by how much, and whether the spread bears it out.


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


# Step records of all ranks of a run, reduced while they are read, one rank's file at a time.


TIME = "step_time_s"


def read_steps(
    run: RunFolder, setups: Mapping[int, Environment], fewer: Collection[int] = frozenset(), *, has_ended: bool = True
) -> StepReading:
    """Read and reduce the step records of a run, whose attempts have these set-ups.

    Args:
        fewer: attempts on fewer nodes than the run asks for; their steps count where there are no others.
        has_ended: False where ranks may be at work, and at the end of a file half a line is what is being written.
    """
    is_gpt = bool(setups) and all(setup.workload == "gpt" for setup in setups.values())
    stated = sorted({setup.unit for setup in setups.values() if setup.unit is not None})
    units = ("tokens",) if is_gpt else tuple(dict.fromkeys((*stated, *UNITS)))
    # What the GPT library never records need not be looked for in its files.
    fields = (TIME, *RECORDED.values(), *units, *(() if is_gpt else ("work",)), "mfu_palm")
    reduction: _Reduction | None = None
    unread: list[UnreadLines] = []
    for rank, columns in _read_ranks(run, fields):
        unread += _unread_lines(rank, columns, has_ended)
        if len(columns):
            reduction = reduction or _Reduction(columns, setups, units, fewer)
            reduction.add(rank, columns)
    return replace(StepReading() if reduction is None else reduction.reading(), unread=tuple(unread))


def _unread_lines(rank: int, columns: RecordColumns, has_ended: bool) -> Iterator[UnreadLines]:
    """Count the lines of a rank that are no records, by attempt, without one that may be being written."""
    settled = columns.unread if has_ended or not columns.has_open_end else columns.unread[:-1]
    for attempt, lines in Counter(settled).items():
        yield UnreadLines(rank, attempt, lines)


def _read_ranks(run: RunFolder, fields: tuple[str, ...]) -> Iterator[tuple[int, RecordColumns]]:
    """Yield what each rank has recorded, by rank; from the first one with records on a few files are read ahead."""
    ranks = run.metric_ranks()
    for at, rank in enumerate(ranks):
        columns = _read_rank(run, fields, True, rank)
        yield rank, columns
        if len(columns):
            others, size = ranks[at + 1 :], size_of(map(run.metrics, ranks[at + 1 :]))
            yield from read_ahead(partial(_read_rank, run, fields, False), others, size)
            return


def _read_rank(run: RunFolder, fields: tuple[str, ...], is_first: bool, rank: int) -> RecordColumns:
    """Read what is needed of one rank; what only some programs need, or one rank, is read where it is."""
    columns = read_columns(run.metrics(rank), (*fields, "time") if is_first else fields)
    if not len(columns):
        return columns
    extra = ["time"] if _is_filled_in(columns).any() else []
    if not any(columns.known[name].all() for name in fields if name in columns.known and name in (*UNITS, "work")):
        extra += [name for name in columns.last if name.endswith("_per_s")]  # the rate of the whole run
    return read_columns(run.metrics(rank), (*fields, "time", *extra)) if extra else columns


def _is_filled_in(columns: RecordColumns) -> Flags:
    """Tell the records without a step time that follow another one of their attempt."""
    follows = np.append(False, np.diff(columns.attempts) == 0)
    return ~columns.known[TIME] & follows


def step_times(columns: RecordColumns) -> tuple[Flags, Floats]:
    """Step times, known and their values; as ``records.fill_in_step_times`` where a record names none.

    One that is not finite is not known.
    """
    values = columns.values[TIME]
    known = columns.known[TIME] & np.isfinite(values)  # a script may have divided by nothing
    if known.all():
        return known, values
    missing = np.flatnonzero(_is_filled_in(columns))
    if not len(missing):
        return known, values
    known, values = known.copy(), values.copy()
    time = np.where(columns.known["time"], columns.values["time"], 0.0)
    seconds = time[missing] - time[missing - 1]
    filled = (seconds > 0) & columns.known["time"][missing - 1]
    at = missing[filled]
    known[at], values[at] = True, seconds[filled] / np.diff(columns.steps)[at - 1]
    return known, values


def _own_work(columns: RecordColumns, unit: str | None) -> tuple[Flags, Floats]:
    """A rank's own number of ``unit`` in each record, as ``records.own_work``."""
    known, values = np.zeros(len(columns), np.bool_), np.full(len(columns), np.nan)
    for name in (*{"images": ("images", "samples"), None: ()}.get(unit, (unit,)), "work"):
        if name in columns.known:
            found = columns.known[str(name)] & ~known
            known, values = known | found, np.where(found, columns.values[str(name)], values)
    return known, values


def _bf16_ratio(record: Mapping[str, Any]) -> float | None:
    """Ratio of both peaks, the same in all steps of a run; None where a record does not tell both."""
    of_bf16, of_precision = record.get("mfu_bf16"), record.get("mfu_palm")
    return of_bf16 / of_precision if of_bf16 and of_precision else None


class _Sums:
    """Per step, a sum over ranks in their order, and how many it is of."""

    def __init__(self, size: int) -> None:
        self.sum, self.count = np.zeros(size), np.zeros(size, np.int64)

    def add(self, at: Integers, known: Flags, values: Floats) -> None:
        """Add the known values of one rank at these steps."""
        if not known.all():
            at, values = at[known], values[known]
        self.sum[at] += values
        self.count[at] += 1


class _Critical:
    """Per step, the phases of the rank with the longest own time, and what the others work less on average.

    Own is what a rank does by itself: its step time less its waits in collectives, where it says these.
    """

    def __init__(self, size: int) -> None:
        self.own = np.full(size, -np.inf)
        self.work = np.full(size, np.nan)
        self.total_work = np.zeros(size)
        self.phases = np.full((len(RECORDED), size), np.nan)
        self.told = np.zeros((len(RECORDED), size), np.int64)
        """Ranks that recorded the phase."""

    def add(self, at: Integers, times: Floats, columns: Sequence[tuple[Flags, Floats]]) -> None:
        """Add the step times of one rank at these steps, NaN where it knows none, and its phases."""
        own, work = times, times
        for index, (known, values) in enumerate(columns):
            if not known.any():
                continue
            self.told[index, at] += known
            work = work - np.where(known, values, 0.0)
            if index == 0:  # communication comes first
                own = work
        self.total_work[at] += work
        longest = own > self.own[at]
        to = at[longest]
        self.own[to], self.work[to] = own[longest], work[longest]
        for index, (_, values) in enumerate(columns):
            self.phases[index, to] = values[longest]

    def forget(self, at: Integers) -> None:
        """Forget what earlier attempts said of these steps."""
        self.own[at], self.total_work[at], self.told[:, at] = -np.inf, 0.0, 0

    def keep(self, old: _Critical, at: Integers) -> None:
        """Take over what is known, with room made for steps that no rank had before."""
        self.own[at], self.work[at], self.total_work[at] = old.own, old.work, old.total_work
        self.phases[:, at], self.told[:, at] = old.phases, old.told

    def of_step(self, at: int, time_s: float, ranks: int) -> dict[str, float] | None:
        """Divide the time of a step; None where only some of the ranks recorded a phase."""
        told = {phase: int(self.told[index, at]) for index, phase in enumerate(RECORDED)}
        if any(number not in (0, ranks) for number in told.values()):
            return None
        known = {phase: float(self.phases[i, at]) for i, (phase, number) in enumerate(told.items()) if number}
        # What the critical rank waits for the others is what is left of the step beside its own time.
        known |= {phase: time_s - float(self.own[at]) for phase in known if phase == next(iter(RECORDED))}
        # Ranks that wait for each other end a step together: only what they waited tells them apart.
        mean = float(self.total_work[at]) / ranks
        late = {STRAGGLERS: float(self.work[at]) - mean} if ranks > 1 and next(iter(RECORDED)) in known else {}
        return {**known, **late, REST: time_s - sum(known.values()) - sum(late.values())}


class _Reduction:
    """Steps over all ranks, as far as the ranks have been added; the first one says which attempts count."""

    def __init__(
        self, first: RecordColumns, setups: Mapping[int, Environment], units: Sequence[str], fewer: Collection[int]
    ) -> None:
        self._first, self._setups = first, setups
        # An attempt that recorded no step, such as a run that was found finished, says nothing of how they were made.
        stepped = set(first.attempts.tolist()) & set(setups)
        self._wanted_attempt = max(stepped - set(fewer) or stepped or setups, default=0)
        self._wanted = setups.get(self._wanted_attempt)
        self._stepped = stepped
        self._counting = [
            attempt
            for attempt, setup in setups.items()
            if self._wanted is not None
            and setup.same_setup(self._wanted)
            and (attempt in fewer) == (self._wanted_attempt in fewer)
        ]
        self._units: dict[str | None, bool] = dict.fromkeys((*units, None), True)
        """Unit -> whether the last record of every rank so far counts it."""
        self._recording: Counter[int] = Counter()
        self._own_times = OwnTimes(first, np.isin(first.attempts, self._counting))
        self._allocate(first.steps)

    def _allocate(self, steps: Integers) -> None:
        size = len(steps)
        self._steps, self._attempts = steps, np.zeros(size, np.int64)
        self._records, self._timed = np.zeros(size, np.int64), np.zeros(size, np.int64)
        self._times = np.full(size, -np.inf)
        self._mfu = _Sums(size)
        self._critical = _Critical(size)
        self._works = {unit: _Sums(size) for unit in self._units}
        self._rates = {unit: np.full(size, np.nan) for unit in self._units}

    def add(self, rank: int, columns: RecordColumns) -> None:
        """Add the records of the next rank."""
        at = self._places(columns.steps)
        self._recording.update(set(columns.attempts.tolist()))
        self._begin_again(at[columns.attempts > self._attempts[at]])
        self._attempts[at] = np.maximum(self._attempts[at], columns.attempts)
        of_newest = columns.attempts == self._attempts[at]
        # Mostly all count, and then nothing is copied: there may be thousands of ranks.
        counts = slice(None) if of_newest.all() else of_newest
        at = at[counts]
        known, times = step_times(columns)
        self._own_times.add(rank, columns, known, times)
        self._timed[at] += known[counts]
        times = np.where(known, times, np.nan)[counts]
        self._times[at] = np.fmax(self._times[at], times)
        told = [(columns.known[name][counts], columns.values[name][counts]) for name in RECORDED.values()]
        self._critical.add(at, times, told)
        self._mfu.add(at, columns.known["mfu_palm"][counts], columns.values["mfu_palm"][counts])
        is_first = self._records[at] == 0
        for unit in self._units:
            work = _own_work(columns, unit)
            if work[0].any():
                self._works[unit].add(at, work[0][counts], work[1][counts])
            if f"{unit}_per_s" in columns.values:
                self._rates[unit][at[is_first]] = columns.values[f"{unit}_per_s"][counts][is_first]
            self._units[unit] &= unit in columns.last and own_work(columns.last, unit) is not None
        self._records[at] += 1

    def _places(self, steps: Integers) -> Integers:
        """Indices of these steps among all; those that no rank before had are made room for."""
        if len(steps) == len(self._steps) and (steps == self._steps).all():
            return np.arange(len(steps))
        if not np.isin(steps, self._steps).all():
            self._make_room(np.union1d(self._steps, steps))
        places: Integers = np.searchsorted(self._steps, steps)
        return places

    def _make_room(self, steps: Integers) -> None:
        before = self._steps, self._attempts, self._records, self._timed, self._times, self._rates
        sums, critical = [self._mfu, *self._works.values()], self._critical
        at = np.searchsorted(steps, self._steps)
        self._allocate(steps)
        self._attempts[at], self._records[at], self._timed[at], self._times[at] = before[1:5]
        for unit, rates in before[5].items():
            self._rates[unit][at] = rates
        for new, old in zip((self._mfu, *self._works.values()), sums, strict=True):
            new.sum[at], new.count[at] = old.sum, old.count
        self._critical.keep(critical, at)

    def _begin_again(self, at: Integers) -> None:
        """Forget what earlier attempts said of steps that were done again."""
        self._records[at] = self._timed[at] = 0
        self._times[at] = -np.inf
        self._critical.forget(at)
        for sums in (self._mfu, *self._works.values()):
            sums.sum[at], sums.count[at] = 0.0, 0
        for rates in self._rates.values():
            rates[at] = np.nan

    def reading(self) -> StepReading:
        """Return what is known when all ranks were added."""
        first, unit = self._first, self._unit()
        times = {}
        for attempt in sorted(self._stepped):
            of_attempt = first.values["time"][first.attempts == attempt]
            times[attempt] = (float(of_attempt.min()), float(of_attempt.max()))
        return StepReading(
            steps=tuple(sorted(self._whole_steps(unit), key=lambda step: step.step)),
            rank_times=self._own_times.result(),
            unit=unit,
            last_step=int(first.steps[-1]),
            loss=first.last.get("loss"),
            bf16_ratio=_bf16_ratio(first.last),
            attempt_times=times,
            attempt=self._wanted_attempt,
            attempt_steps=Counter(first.attempts.tolist()),
        )

    def _unit(self) -> str | None:
        """The stated unit, unless the records have no number of it, but of another one: it may be left unsaid."""
        stated = None if self._wanted is None else self._wanted.unit
        if self._wanted is not None and self._wanted.work_per_step is not None:
            return stated
        for unit in (*([] if stated is None else [stated]), *UNITS):
            if self._units.get(unit):
                return unit
        return stated

    def _whole_steps(self, unit: str | None) -> Iterator[Step]:
        """Steps that every rank that should record them did record, in attempts with the wanted set-up.

        These are all ranks of a GPT run; elsewhere those that recorded anything in that attempt, often rank 0 alone.
        """
        works, rates = self._works.get(unit), self._rates.get(unit)
        assert works is not None and rates is not None
        for attempt in self._counting:
            setup = self._setups[attempt]
            expected = setup.world_size if setup.workload == "gpt" else self._recording[attempt]
            whole = (self._attempts == attempt) & (self._records == expected) & (self._timed == expected)
            for at in np.flatnonzero(whole).tolist():
                time_s, mfu = float(self._times[at]), int(self._mfu.count[at])
                yield Step(
                    step=int(self._steps[at]),
                    attempt=attempt,
                    time_s=time_s,
                    work=_work(works, at, expected, setup, float(rates[at]) * time_s),
                    # Ranks above the first may leave it out of their records.
                    mfu_palm=float(self._mfu.sum[at]) / mfu if mfu else None,
                    recorded_by=expected,
                    phases=self._critical.of_step(at, time_s, expected),
                )


def _work(own: _Sums, at: int, recorded: int, setup: Environment, by_rate: float) -> float | None:
    """Work of one step over all ranks: what all of them recorded as their own, else what was stated beforehand.

    Where only some ranks record, what was stated goes first, because the others worked too. What is left is the rate
    of the whole run, as the rank that says it has worked it out.
    """
    count = int(own.count[at])
    if count == setup.world_size:
        return float(own.sum[at])
    if setup.work_per_step is not None:
        return setup.work_per_step
    if count and count == recorded:
        return float(own.sum[at])
    return None if np.isnan(by_rate) else by_rate
