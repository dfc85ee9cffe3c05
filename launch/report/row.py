"""One row of the scaling table, and the details of its run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from launch.report.goodput import CAUSES
from launch.report.series import MeasuredPoint, drop_warmup
from launch.report.steps import LOSSES, RankTime, RankTimes

# One row of the scaling table: what is known and what is claimed of one point.


@dataclass(frozen=True, kw_only=True)
class Row:
    """One point. The fields are the columns of ``scaling.csv``, in this order; None is what is not known or claimed."""

    point: str
    nodes: int | None
    ranks: int | None
    topology: str | None
    throughput: float | None = None
    """Work per second in ``unit``; its columns in ``scaling.csv`` are named for it: tokens_per_s, samples_per_s."""
    throughput_per_rank: float | None = None
    step_time_s: float | None = None
    """Median over the steps after warm-up, of the slowest rank."""
    step_time_s_spread: float | None = None
    """Interquartile range."""
    speedup: float | None = None
    """Throughput over that of the smallest point of the series: a measured ratio. Where the work of a step is not
    known, the ratio of step times; where there are no steps, and the same work was stated, that of run times."""
    efficiency: float | None = None
    """speedup over the ratio of ranks; None where ranks of either point shared cores or a GPU."""
    mfu_palm: float | None = None
    oversubscribed: bool | None
    state: str
    series: str
    scaling: str | None
    loss: float | None
    """Training loss of the last step, nats per token in the GPT library."""
    last_step: int | None
    steps_measured: int = 0
    step_time_s_low: float | None = None
    """First quartile."""
    step_time_s_high: float | None = None
    """Third quartile."""
    throughput_low: float | None = None
    """At the third quartile of the step time."""
    throughput_high: float | None = None
    """At the first quartile of the step time."""
    throughput_ideal: float | None = None
    """Of as many ranks as fast as those of the smallest point; None where these shared cores or a GPU."""
    unit: str | None = None
    """Unit of the throughput: tokens, samples, images; None where nothing says."""
    run_time_s: float | None = None
    """Time that the ranks ran, start-up included, over all attempts."""
    attempts: int = 0
    label: str = ""
    """Label that sets the point apart from the others of this table: the overrides that not all of them share."""
    efficiency_low: float | None = None
    """By the third quartile of the point's step times and the first of those of the smallest point."""
    efficiency_high: float | None = None
    """By the first quartile of the point's step times and the third of those of the smallest point."""
    noisy: bool | None = None
    """True where the step times of the point, or of the smallest one, differ too much for an exact efficiency; None
    where none is claimed."""
    efficiency_ci_low: float | None = None
    """95 % interval of the efficiency, by a block bootstrap over the steps of both points: see ``intervals``."""
    efficiency_ci_high: float | None = None
    mfu_bf16: float | None = None
    """MFU of the peak in bf16, whatever the precision, so that points in two precisions compare."""
    goodput: float | None = None
    """Share of the allocated time in steps that count."""
    gpu_hours: float | None = None
    """Of all allocations, from the start of each to its end."""
    cost: float | None = None
    """In the currency of cluster.price_per_gpu_hour."""
    energy_kwh: float | None = None
    """Of all GPUs, from the start of the ranks to their end over all attempts; None where some were not sampled."""
    joules_per_work: float | None = None
    """Energy of one unit of work, such as a token; of a run whose steps are all known."""
    gpu_power_w: float | None = None
    """Mean power of one GPU."""
    throttled: float | None = None
    """Share of the samples of all GPUs in which clocks were lower than asked for: see ``runs.telemetry``."""
    cost_per_billion: float | None = None
    """Cost of a billion units of work, such as tokens; of a run whose steps are all known."""
    waiting_s: float | None = None
    """Waiting for nodes, from the submission or the end of the allocation before. This and the next eleven add up to
    the time from the submission to the end; one that is zero is None."""
    start_s: float | None = None
    """From the allocation to the first step."""
    compile_s: float | None = None
    """In which torch compiled, as far as the records tell; else it lies in steps and starts."""
    restore_s: float | None = None
    """In loading checkpoints, as far as the records tell; else it lies in starts and restarts."""
    steps_s: float | None = None
    """In steps that count."""
    fewer_s: float | None = None
    """In steps that count, and were made on fewer nodes than asked, as some were lost."""
    lost_s: float | None = None
    """In steps that were lost with their attempt and done again."""
    saves_s: float | None = None
    evaluations_s: float | None = None
    restarts_s: float | None = None
    """From the last step of an attempt to the first of the next, and the starts of later allocations."""
    shutdown_s: float | None = None
    """From the last step, or its save, to the end of the allocation."""
    other_s: float | None = None
    """Between steps, for a reason that no record tells."""
    hours_of: str | None = None
    """Unit of the hours that follow: GPU, or node where the run has no GPUs."""
    interruptions: int | None = None
    """Interruptions that cost time, roll-backs too."""
    interrupted_s: float | None = None
    """Allocated time that was lost to them, from the last step that counts before each to the next new one, without
    saves and evaluations: steps done again, restarts, the shutdown of all allocations but the last, and the restore and
    compilation that followed."""
    interrupted_h: float | None = None
    """GPU-hours that interruptions cost in all. The next ones, by cause, add up to it."""
    interrupted_crashed_h: float | None = None
    interrupted_hung_h: float | None = None
    interrupted_out_of_memory_h: float | None = None
    interrupted_diverged_h: float | None = None
    """Roll-backs of an attempt by itself, too."""
    interrupted_node_failed_h: float | None = None
    interrupted_node_sick_h: float | None = None
    interrupted_preempted_h: float | None = None
    interrupted_timed_out_h: float | None = None
    interrupted_requested_h: float | None = None
    interrupted_cancelled_h: float | None = None
    interrupted_budget_h: float | None = None
    interrupted_repeated_h: float | None = None
    interrupted_refused_h: float | None = None
    interrupted_continued_h: float | None = None
    """To a command that extended a run which had finished, or took one back."""
    interrupted_unknown_h: float | None = None
    restarts_in_place: int | None = None
    """Restarts inside of an allocation that came to a step."""
    saved_in_place_h: float | None = None
    """Hours of GPUs that these spared, an estimate: see ``goodput.SAVED_DEFINITION``; negative where they took
    longer."""
    saved_in_place_wait_s: float | None = None
    """Waiting in the queue that they spared, an estimate."""
    saved_against: str | None = None
    """Road that the two are estimated by: requeues of this run, of other points, or its own first start."""

    lost_to_communication: float | None = None
    """Efficiency that was lost to communication which no work hides, as a share; negative where it takes less of the
    step than at the smallest point. This and the next five add up to 1 - efficiency; a phase that was not recorded at
    both points is None and lies in the last one."""
    lost_to_stragglers: float | None = None
    """To the slowest rank of each step, above the mean of the ranks."""
    lost_to_data: float | None = None
    lost_to_bubble: float | None = None
    lost_to_optimizer: float | None = None
    lost_to_computation: float | None = None
    source: str = ""
    """Folder of a comparison that the point belongs to; empty in a report of one."""
    ratio_to_first: float | None = None
    """Throughput over that of the point with as many ranks in the first folder of a comparison."""
    unread_lines: int = 0
    """Lines among the step records of all ranks that could not be read as records."""

    def lost_to(self) -> dict[str, float]:
        """Return the lost efficiency by phase, of ``losses.LOSSES`` those that are known."""
        parts = {phase: getattr(self, f"lost_to_{phase}") for phase in LOSSES}
        return {phase: share for phase, share in parts.items() if share is not None}

    def part_s(self, part: str) -> float | None:
        """Seconds of one of ``goodput.PARTS``."""
        value: float | None = getattr(self, f"{part}_s")
        return value

    def interrupted(self) -> dict[str, float]:
        """Return the lost hours by cause, of ``goodput.CAUSES`` those that cost any."""
        hours = {cause: getattr(self, f"interrupted_{cause}_h") for cause in CAUSES}
        return {cause: value for cause, value in hours.items() if value is not None}


# Details of one run beyond its row: the distribution of its step times, and its slowest ranks with their hosts.


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
