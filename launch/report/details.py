"""Details of one run beyond its row: the distribution of its step times, and its slowest ranks with their hosts.

Owns the sentence that names a slow rank, and when there is none. Must not know how a report looks.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from launch.report.readings import RankTime, RankTimes
from launch.report.series import MeasuredPoint, drop_warmup

SLOWEST = 8
"""Ranks that the table of the slowest lists."""
NAMED = 3
"""Slow ranks that a note names; of more it tells the number."""
PERCENTILES = (1, 5, 25, 50, 75, 95, 99)


@dataclass(frozen=True)
class RankRow:
    """One of the slowest ranks of a run, and its share of the step time."""

    time: RankTime
    host: str | None
    share: float
    """Excess over the median of the other ranks, as a share of the median step time."""


@dataclass(frozen=True)
class RunDetail:
    """Return the passages about one measured run that its row has no room for."""

    label: str
    step_time_s: float
    step_times_s: tuple[float, ...]
    """After warm-up, in the order of the steps."""
    percentiles_s: tuple[tuple[str, float], ...]
    slowest: tuple[RankRow, ...]
    rank_times: RankTimes | None


def detail(member: MeasuredPoint) -> RunDetail | None:
    """Collect the details of a point; None where it has no figures."""
    if member.figures is None:
        return None
    times = [step.time_s for step in drop_warmup(member.point.steps)]
    cuts = statistics.quantiles(times, n=100, method="inclusive")
    marks = [("shortest", min(times)), *((f"{p} %", cuts[p - 1]) for p in PERCENTILES), ("longest", max(times))]
    ranks = () if member.point.rank_times is None else member.point.rank_times.ranks
    slowest = sorted(ranks, key=lambda rank: -rank.excess_s)[:SLOWEST]
    return RunDetail(
        label=member.point.title,
        step_time_s=member.figures.step_time_s,
        step_times_s=tuple(times),
        percentiles_s=tuple(marks),
        slowest=tuple(_rank_row(member, rank, member.figures.step_time_s) for rank in slowest),
        rank_times=member.point.rank_times,
    )


def _rank_row(member: MeasuredPoint, rank: RankTime, step_time_s: float) -> RankRow:
    return RankRow(rank, _host(member, rank.rank), rank.excess_s / step_time_s if step_time_s else 0.0)


def _host(member: MeasuredPoint, rank: int) -> str | None:
    places = () if member.point.environment is None else member.point.environment.ranks
    return places[rank].host if rank < len(places) else None


def straggler_notes(member: MeasuredPoint) -> list[str]:
    """Name the ranks that hold the others up, where the spread bears it out; nothing where it does not."""
    if member.figures is None or member.point.rank_times is None:
        return []
    ranks = member.point.rank_times.ranks
    slow = {rank.rank: rank.excess_s for rank in ranks if rank.is_slow}
    waiting = {rank.rank: rank.wait_excess_s or 0.0 for rank in ranks if rank.waits_long}
    found = []
    if slow:
        found.append(
            f"At {member.point.title}, slower than the other ranks throughout the run: {_told(member, slow)}. In each "
            "step all ranks wait for the slowest."
        )
    if waiting:
        found.append(
            f"At {member.point.title}, longer waits for data than on the other ranks: {_told(member, waiting)}."
        )
    return found


def _told(member: MeasuredPoint, ranks: Mapping[int, float]) -> str:
    """Name the slowest of some ranks, with what they take longer than the median of the others."""
    assert member.figures is not None
    told = []
    for rank, excess_s in sorted(ranks.items(), key=lambda item: -item[1])[:NAMED]:
        host, share = _host(member, rank), 100 * excess_s / member.figures.step_time_s
        on = "" if host is None else f" on {host}"
        told.append(f"rank {rank}{on} by {1000 * excess_s:.3g} ms, {share:.1f} % of the step time")
    more = f"; and {len(ranks) - NAMED} more" if len(ranks) > NAMED else ""
    return "; ".join(told) + more
