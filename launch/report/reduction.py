"""Step records of all ranks of a run, reduced to steps and times of ranks while they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from launch.report.columns import Flags, Floats, Integers, RecordColumns, read_ahead, read_columns, size_of
from launch.report.environment import Environment
from launch.report.steps import (
    LEAST_SHARE,
    RECORDED,
    REST,
    STRAGGLERS,
    WARMUP_STEPS,
    RankTime,
    RankTimes,
    Step,
    StepReading,
    UnreadLines,
)
from launch.runs.folder import RunFolder
from launch.runs.progress import RESOLUTION
from launch.runs.records import UNITS, own_work

TIME = "step_time_s"

# Times of each rank against those of the others: which rank is slower, by how much, and whether the spread shows it.


WINDOWS = 60
"""Windows of the run over which the times of each rank are averaged."""
LEAST_WINDOWS = 4
"""Fewer windows show nothing persistent."""
WAITS = ("comm_s", "bubble_s")
"""Fields of a step record with the time that a rank waited for others."""
BEYOND_SPREAD = 3.0
"""Interquartile ranges of the other ranks by which a slow rank lies above their median."""


class OwnTimes:
    """Mean times of the ranks in windows of the run; the first rank decides which steps the windows have."""

    def __init__(self, first: RecordColumns, counts: Flags) -> None:
        for attempt in np.unique(first.attempts).tolist():
            of_attempt = first.attempts == attempt
            counts = counts & ~(of_attempt & (first.steps < first.steps[of_attempt][0] + WARMUP_STEPS))
        self._steps, self._attempts = first.steps[counts], first.attempts[counts]
        self._parts = np.array_split(np.arange(len(self._steps)), min(WINDOWS, len(self._steps)) or 1)
        self._window = np.repeat(np.arange(len(self._parts)), [len(part) for part in self._parts])
        self._sizes = np.bincount(self._window)
        self._ranks: list[int] = []
        self._own: list[Floats] = []
        self._waits: list[Floats] = []
        self._is_net = True

    def add(self, rank: int, columns: RecordColumns, known: Flags, times: Floats) -> None:
        """Add one rank with its step times; a rank that did not record all the steps is left out."""
        at = np.searchsorted(columns.steps, self._steps).clip(0, len(columns) - 1)
        same = (columns.steps[at] == self._steps) & (columns.attempts[at] == self._attempts) & known[at]
        if not len(at) or not same.all():
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
        """Compare the ranks; None if fewer than two have recorded the same steps."""
        if len(self._ranks) < 2 or len(self._parts) < LEAST_WINDOWS:
            return None
        own, waits, sizes = np.array(self._own), np.array(self._waits), self._sizes
        step_s = float(own.mean())
        excess, slow = _compare(own, sizes, step_s)
        has_waits = not bool(np.isnan(waits).any())
        wait_excess, long = _compare(waits, sizes, step_s) if has_waits else (np.zeros(len(own)), slow & False)
        mean, mean_wait = (values @ sizes / sizes.sum() for values in (own, waits))
        return RankTimes(
            ranks=tuple(
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
            ),
            windows=tuple((int(self._steps[part[0]]), int(self._steps[part[-1]])) for part in self._parts),
            excess_s=tuple(tuple(row) for row in (own - np.median(own, axis=0)).tolist()),
            is_net=self._is_net,
        )


def _compare(times: Floats, sizes: Integers, step_s: float) -> tuple[Floats, Flags]:
    """Return how far each rank lies above the median of the others, and which ranks do so beyond doubt.

    ``times`` are means of [ranks, windows], of ``sizes`` steps. Beyond doubt is an excess that is a noticeable share
    of the step, exceeds the spread of the others, and has half its size or more in three quarters of the windows.
    """
    means = times @ sizes / sizes.sum()
    ordered = np.sort(means)
    excess, slow = np.zeros(len(means)), np.zeros(len(means), np.bool_)
    for rank, mean in enumerate(means):
        others = np.delete(ordered, np.searchsorted(ordered, mean))
        excess[rank] = mean - _quantile(others, 0.5)
        if excess[rank] < LEAST_SHARE * step_s:
            continue
        if excess[rank] > BEYOND_SPREAD * (_quantile(others, 0.75) - _quantile(others, 0.25)):
            of_others = np.median(np.delete(times, rank, axis=0), axis=0)
            slow[rank] = np.quantile(times[rank] - of_others, 0.25) >= excess[rank] / 2
    return excess, slow


def _quantile(ordered: Floats, share: float) -> float:
    # numpy.quantile of one share takes 60 us, with a thousand ranks most of the time of a report.
    place = share * (len(ordered) - 1)
    below = int(place)
    low, high = float(ordered[below]), float(ordered[min(below + 1, len(ordered) - 1)])
    return low + (high - low) * (place - below)


# Reading, one rank's file at a time.


def read_steps(
    run: RunFolder, setups: Mapping[int, Environment], fewer: Collection[int] = frozenset(), *, has_ended: bool = True
) -> StepReading:
    """Read and reduce the step records of a run, whose attempts have these set-ups.

    Args:
        run: the folder.
        setups: attempt -> its set-up.
        fewer: attempts on fewer nodes than the run asks for; their steps count if there are no others.
        has_ended: False if ranks may be running, so that half a line at the end of a file is being written.
    """
    is_gpt = bool(setups) and all(setup.workload == "gpt" for setup in setups.values())
    stated = sorted({setup.unit for setup in setups.values() if setup.unit is not None})
    units = ("tokens",) if is_gpt else tuple(dict.fromkeys((*stated, *UNITS)))
    # Fields that the GPT library never records are not searched for in its files.
    fields = (TIME, *RECORDED.values(), *units, *(() if is_gpt else ("work", RESOLUTION)), "mfu_palm")
    reduction: _Reduction | None = None
    unread: list[UnreadLines] = []
    for rank, columns in _read_ranks(run, fields):
        lines = columns.unread if has_ended or not columns.has_open_end else columns.unread[:-1]
        unread += [UnreadLines(rank, attempt, count) for attempt, count in Counter(lines).items()]
        if len(columns):
            reduction = reduction or _Reduction(columns, setups, units, fewer)
            reduction.add(rank, columns)
    return replace(StepReading() if reduction is None else reduction.reading(), unread=tuple(unread))


def _read_ranks(run: RunFolder, fields: tuple[str, ...]) -> Iterator[tuple[int, RecordColumns]]:
    """Yield the records of each rank, by rank; after the first rank with records a few files are read ahead."""
    ranks = run.metric_ranks()
    for at, rank in enumerate(ranks):
        columns = _read_rank(run, fields, True, rank)
        yield rank, columns
        if len(columns):
            others = ranks[at + 1 :]
            yield from read_ahead(partial(_read_rank, run, fields, False), others, size_of(map(run.metrics, others)))
            return


def _read_rank(run: RunFolder, fields: tuple[str, ...], is_first: bool, rank: int) -> RecordColumns:
    """Return the fields of one rank, with the fields that only the first rank, or some programs, need."""
    columns = read_columns(run.metrics(rank), (*fields, "time") if is_first else fields)
    if not len(columns):
        return columns
    extra = ["time"] if _lacks_time(columns).any() else []
    if not any(columns.known[name].all() for name in fields if name in columns.known and name in (*UNITS, "work")):
        extra += [name for name in columns.last if name.endswith("_per_s")]  # the rate of the whole run
    return read_columns(run.metrics(rank), (*fields, "time", *extra)) if extra else columns


def _lacks_time(columns: RecordColumns) -> Flags:
    """Return which records without a step time follow another record of their attempt."""
    return ~columns.known[TIME] & np.append(False, np.diff(columns.attempts) == 0)


def step_times(columns: RecordColumns) -> tuple[Flags, Floats]:
    """Return which step times are known, and their values; completed as by ``records.fill_in_step_times``.

    A time that is not finite is unknown.
    """
    values = columns.values[TIME]
    known = columns.known[TIME] & np.isfinite(values)  # a script may have divided by zero
    missing = np.flatnonzero(_lacks_time(columns))
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
    """Return a rank's own number of ``unit`` in each record, as ``records.own_work``."""
    known, values = np.zeros(len(columns), np.bool_), np.full(len(columns), np.nan)
    for name in (*{"images": ("images", "samples"), None: ()}.get(unit, (unit,)), "work"):
        if name in columns.known:
            found = columns.known[str(name)] & ~known
            known, values = known | found, np.where(found, columns.values[str(name)], values)
    return known, values


class _Reduction:
    """Figures of each step over the ranks that were added; the first rank decides which attempts count.

    The critical rank of a step has the longest own time: its step time without its waits in collectives.
    """

    def __init__(
        self, first: RecordColumns, setups: Mapping[int, Environment], units: Sequence[str], fewer: Collection[int]
    ) -> None:
        self._first, self._setups = first, setups
        # An attempt without steps, such as a start of a run that was finished, says nothing of how they were made.
        self._stepped = stepped = set(first.attempts.tolist()) & set(setups)
        self._attempt = max(stepped - set(fewer) or stepped or setups, default=0)
        self._setup = setups.get(self._attempt)
        self._counting = [
            attempt
            for attempt, setup in setups.items()
            if self._setup is not None
            and setup.same_setup(self._setup)
            and (attempt in fewer) == (self._attempt in fewer)
        ]
        self._units: dict[str | None, bool] = dict.fromkeys((*units, None), True)
        """Unit -> True if the last record of every rank so far counts it."""
        self._recording: Counter[int] = Counter()
        """Attempt -> ranks that recorded steps in it."""
        self._own_times = OwnTimes(first, np.isin(first.attempts, self._counting))
        phases = {f"{phase} on critical": np.nan for phase in RECORDED}
        sums = ("attempt", "records", "timed", "computing", "mfu", "mfu count", *(f"{name} count" for name in RECORDED))
        works = (f"{unit}{count}" for unit in self._units for count in ("", " count"))
        self._start = {
            **{"time": -np.inf, "own": -np.inf, "computing on critical": np.nan, **phases, "resolution": 0.0},
            **{**dict.fromkeys((*sums, *works), 0.0), **{f"{unit} per s": np.nan for unit in self._units}},
        }
        """Figure -> its value before any rank is added."""
        self._steps: Integers = np.empty(0, np.int64)
        self._of: dict[str, Floats] = {name: np.empty(0) for name in self._start}
        """Figure -> array of [steps]."""

    def add(self, rank: int, columns: RecordColumns) -> None:
        """Add the records of the next rank."""
        self._recording.update(set(columns.attempts.tolist()))
        known, times = step_times(columns)
        self._own_times.add(rank, columns, known, times)
        at, of = self._places(columns.steps), self._of
        again = at[columns.attempts > of["attempt"][at]]
        for name, start in self._start.items() if len(again) else ():
            of[name][again] = start  # of a repeated step only the latest attempt counts
        of["attempt"][at] = np.maximum(of["attempt"][at], columns.attempts)
        is_newest = columns.attempts == of["attempt"][at]
        # Mostly all records count, and then nothing is copied: there may be thousands of ranks.
        counts = slice(None) if is_newest.all() else is_newest
        at, known = at[counts], known[counts]
        times = np.where(known, times[counts], np.nan)
        of["timed"][at] += known
        of["time"][at] = np.fmax(of["time"][at], times)
        if RESOLUTION in columns.values:
            of["resolution"][at] = np.fmax(of["resolution"][at], columns.values[RESOLUTION][counts])
        self._add_phases(at, times, columns, counts)
        self._add_to("mfu", at, columns.known["mfu_palm"][counts], columns.values["mfu_palm"][counts])
        is_first = of["records"][at] == 0
        for unit in self._units:
            has_work, work = _own_work(columns, unit)
            if has_work.any():
                self._add_to(str(unit), at, has_work[counts], work[counts])
            if f"{unit}_per_s" in columns.values:
                of[f"{unit} per s"][at[is_first]] = columns.values[f"{unit}_per_s"][counts][is_first]
            self._units[unit] &= unit in columns.last and own_work(columns.last, unit) is not None
        of["records"][at] += 1

    def _places(self, steps: Integers) -> Integers:
        """Return the indices of these steps; steps that no rank had before are inserted."""
        if np.array_equal(steps, self._steps):
            return np.arange(len(steps))
        if not np.isin(steps, self._steps).all():
            every = np.union1d(self._steps, steps)
            before, at = self._of, np.searchsorted(every, self._steps)
            self._steps, self._of = every, {name: np.full(len(every), start) for name, start in self._start.items()}
            for name, values in before.items():
                self._of[name][at] = values
        places: Integers = np.searchsorted(self._steps, steps)
        return places

    def _add_to(self, name: str, at: Integers, known: Flags, values: Floats) -> None:
        if not known.all():
            at, values = at[known], values[known]
        self._of[name][at] += values
        self._of[f"{name} count"][at] += 1

    def _add_phases(self, at: Integers, times: Floats, columns: RecordColumns, counts: Any) -> None:
        """Add the phases of one rank; ``times`` are its step times, NaN if unknown."""
        of, own, computing = self._of, times, times
        for phase, name in RECORDED.items():
            known = columns.known[name][counts]
            if known.any():
                of[f"{phase} count"][at] += known
                computing = computing - np.where(known, columns.values[name][counts], 0.0)
                own = computing if phase == "communication" else own
        of["computing"][at] += computing
        longest = own > of["own"][at]
        to = at[longest]
        of["own"][to], of["computing on critical"][to] = own[longest], computing[longest]
        for phase, name in RECORDED.items():
            of[f"{phase} on critical"][to] = columns.values[name][counts][longest]

    def reading(self) -> StepReading:
        """Return the figures of the ranks that were added."""
        first, unit = self._first, self._unit()
        times = {attempt: first.values["time"][first.attempts == attempt] for attempt in sorted(self._stepped)}
        of_bf16, of_precision = first.last.get("mfu_bf16"), first.last.get("mfu_palm")
        return StepReading(
            steps=tuple(sorted(self._whole_steps(unit), key=lambda step: step.step)),
            rank_times=self._own_times.result(),
            unit=unit,
            last_step=int(first.steps[-1]),
            loss=first.last.get("loss"),
            bf16_ratio=of_bf16 / of_precision if of_bf16 and of_precision else None,
            attempt_times={attempt: (float(of.min()), float(of.max())) for attempt, of in times.items()},
            attempt=self._attempt,
            attempt_steps=Counter(first.attempts.tolist()),
        )

    def _unit(self) -> str | None:
        """Return the stated unit, or another unit if the records count only that one."""
        stated = None if self._setup is None else self._setup.unit
        if self._setup is not None and self._setup.work_per_step is not None:
            return stated
        candidates = (*([] if stated is None else [stated]), *UNITS)
        return next((unit for unit in candidates if self._units.get(unit)), stated)

    def _whole_steps(self, unit: str | None) -> Iterator[Step]:
        """Yield the steps that every rank recorded, in attempts with the set-up of the report.

        Of a GPT run every rank records; of a script the ranks that recorded anything in the attempt, often only rank 0.
        """
        of = self._of
        for attempt in self._counting:
            setup = self._setups[attempt]
            expected = setup.world_size if setup.workload == "gpt" else self._recording[attempt]
            whole = (of["attempt"] == attempt) & (of["records"] == expected) & (of["timed"] == expected)
            for at in np.flatnonzero(whole).tolist():
                time_s = float(of["time"][at])
                yield Step(
                    step=int(self._steps[at]),
                    attempt=attempt,
                    time_s=time_s,
                    work=self._work(unit, at, expected, setup),
                    # Ranks above the first may leave it out of their records.
                    mfu_palm=float(of["mfu"][at]) / int(of["mfu count"][at]) if of["mfu count"][at] else None,
                    recorded_by=expected,
                    phases=self._phases(at, time_s, expected),
                    resolution_s=float(of["resolution"][at]),
                )

    def _work(self, unit: str | None, at: int, recorded: int, setup: Environment) -> float | None:
        """Return the work of one step over all ranks: the sum of their records, or what was stated.

        If only some ranks record, the stated work comes first, because the others worked too. Last comes the rate of
        the whole run, if the first rank recorded one.
        """
        count, of = int(self._of[f"{unit} count"][at]), self._of
        if setup.work_per_step is not None and count != setup.world_size:
            return setup.work_per_step
        if count and count in (recorded, setup.world_size):
            return float(of[str(unit)][at])
        by_rate = float(of[f"{unit} per s"][at]) * float(of["time"][at])
        return None if np.isnan(by_rate) else by_rate

    def _phases(self, at: int, time_s: float, ranks: int) -> dict[str, float] | None:
        """Divide the time of a step; None if only some of the ranks recorded a phase."""
        counts = {phase: int(self._of[f"{phase} count"][at]) for phase in RECORDED}
        if any(count not in (0, ranks) for count in counts.values()):
            return None
        known = {phase: float(self._of[f"{phase} on critical"][at]) for phase, count in counts.items() if count}
        late: dict[str, float] = {}
        if "communication" in known:
            # The critical rank waits for the others in the rest of the step beside its own time.
            known["communication"] = time_s - float(self._of["own"][at])
            # Ranks that wait for each other end a step together: only their waits tell them apart.
            mean = float(self._of["computing"][at]) / ranks
            late = {STRAGGLERS: float(self._of["computing on critical"][at]) - mean} if ranks > 1 else {}
        return {**known, **late, REST: time_s - sum(known.values()) - sum(late.values())}
