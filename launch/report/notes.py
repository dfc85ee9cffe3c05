"""Figures of a report as texts, and the sentences below its tables, which explain the figures and their limits."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from launch.errors import counted, duration_text
from launch.report.goodput import CAUSES, DEFINITION, SAVED_DEFINITION
from launch.report.points import Point, PointState
from launch.report.read import Environment
from launch.report.series import COMPARED, Series, SeriesFindings, made_with, work_text
from launch.report.steps import LOSSES, MIN_STEPS, NOISY, REST, WARMUP_STEPS
from launch.runs.events import unread_text
from launch.runs.folder import RunFolder

if TYPE_CHECKING:
    from launch.report.table import Row

# Figures in the tables of a report: the same on the terminal, in Markdown and in HTML.


UNAVAILABLE = "unavailable"
"""Text in place of a figure that is not known."""


def figure(value: float | None, form: str = "{:,.0f}") -> str:
    """Write a figure, by default a whole number with commas between the thousands; ``UNAVAILABLE`` for None."""
    return UNAVAILABLE if value is None else form.format(value)


def rate(value: float | None) -> str:
    """Write a throughput with at least three digits: 9.87, 98.7, 987, 98,765. ``UNAVAILABLE`` for None."""
    return figure(value, "{:,.0f}" if value is not None and value >= 100 else "{:.3g}")


def time_text(value: float | None) -> str:
    """Write a duration that is given in seconds: 350 ms, 12.3 s, 4 min 05 s. ``UNAVAILABLE`` for None."""
    return UNAVAILABLE if value is None else duration_text(value)


def percent(value: float | None) -> str:
    """Write a share (0 to 1) in percent with one decimal; ``UNAVAILABLE`` for None."""
    return UNAVAILABLE if value is None else f"{value * 100:.1f} %"


def percentages(shares: Sequence[float]) -> list[str]:
    """Write shares in percent with one decimal, so that the texts add up to 100.0 if the shares add up to 1.

    The shares with the largest remainders are rounded up (largest remainder method).
    """
    tenths = [1000 * share for share in shares]
    below = [math.floor(value) for value in tenths]
    order = sorted(range(len(tenths)), key=lambda index: below[index] - tenths[index])
    for index in order[: round(sum(tenths)) - sum(below)]:
        below[index] += 1
    return [f"{value / 10:.1f}" for value in below]


def with_unit(value: float | None, unit: str) -> str:
    """Write a figure with its unit, in four digits, or more from 1,000 on; ``UNAVAILABLE`` for None."""
    return figure(value, f"{{:,.0f}} {unit}" if value is not None and abs(value) >= 1000 else f"{{:.4g}} {unit}")


def hours(value: float, unit: str) -> str:
    """Write hours of GPUs or nodes with three digits and at most four decimals, and their unit."""
    return with_unit(value if value >= 1000 else float(f"{round(value, 4):.3g}"), unit)


def hours_by_cause(rows: Sequence[Row]) -> dict[str, float]:
    """Return cause -> lost hours of all rows together, in the order of ``CAUSES``. Causes without loss are absent."""
    found = {cause: sum(row.causes_h.get(cause, 0.0) for row in rows) for cause in CAUSES}
    return {cause: lost for cause, lost in found.items() if lost}


def interrupted(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Return the unit of lost hours, GPU or node, and the rows with interruptions, for each unit in use.

    Hours of GPUs and of nodes are never added.
    """
    found = {unit: [row for row in rows if row.hours_of == unit and row.interruptions] for unit in ("GPU", "node")}
    return [(unit, of_unit) for unit, of_unit in found.items() if of_unit]


# The sentences below a scaling table.


STATE_TEXTS = {
    PointState.FAILED: "failed",
    PointState.STOPPED: "was stopped before its last step",
    PointState.RUNNING: "has not ended: it runs still, or was killed",
    PointState.CANCELLED: "was cancelled",
    PointState.BUDGET_EXCEEDED: "was stopped at the cap of its budget",
    PointState.NO_RECORDS: "has no records",
    PointState.NOT_STARTED: "has not started",
}

NAMED = 3
"""Largest number of slow ranks, throttled hosts or damaged files that a note names. It counts the others."""
SAME_WORK = 1.05
"""Largest ratio of the work of two steps that counts as equal. The last batch of an epoch may be smaller."""
LEAST_THROTTLED = 0.01
"""Smallest share (0 to 1) of throttled samples with which a host counts as throttled."""


def report_notes(
    points: Sequence[Point], found: Sequence[tuple[Series, SeriesFindings]], rows: Sequence[Row]
) -> Iterator[str]:
    """Yield the notes below the tables of a report, each of one or more sentences."""
    every = [series for series, _ in found]
    shown = [point for series in every for point in series.members]
    yield from _sources(points)
    yield from chain(*map(_unread, shown))
    yield from _steps_used(shown)
    yield from _apart(every)
    yield from chain(*map(_comparison, every))
    yield from _records(shown)
    yield from chain(*(_noise(series, rows) for series in every))
    yield from chain(*map(_times, shown), *map(_gpus, shown))
    yield from _interruptions(rows)
    yield from _ends(shown)
    yield from chain(*map(_parts_of_steps, shown))
    for series, finding in found:
        yield from _findings(series, finding)


def _named(texts: Sequence[str]) -> str:
    """Return one text with the first ``NAMED`` texts and the number of the others."""
    return "; ".join([*texts[:NAMED], *([f"and {len(texts) - NAMED} more"] if len(texts) > NAMED else [])])


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _sources(points: Sequence[Point]) -> Iterator[str]:
    """Explain ratios between the folders of a comparison, and name the conditions that differ between the folders."""
    sources: dict[str, list[Environment]] = defaultdict(list)
    for point in points:
        sources[point.source] += [] if point.environment is None else [point.environment]
    (first, of_first), *others = sources.items() if sources else [("", [])]
    if others:
        yield (
            f"Speedup and efficiency are against the smallest point of the same folder. Times {first} is the "
            f"throughput over that of the point of {first} with as many ranks."
        )
    for source, environments in others:
        different = []
        for name, condition in COMPARED.items():
            here, there = (sorted({*map(condition, which)} - {None}, key=str) for which in (environments, of_first))
            if here and there and here != there:
                different.append(f"{name} ({' / '.join(map(str, here))}, not {' / '.join(map(str, there))})")
        if different:
            yield f"{source} differs from {first} in {'; '.join(different)}: a ratio is of all of it together."


def _unread(point: Point) -> Iterator[str]:
    """Report unreadable lines among the step records and in the event log, with their number."""
    if found := sorted(point.unread, key=lambda one: -one.lines):
        files = [f"{one.lines} of rank {one.rank} in attempt {one.attempt or 'unknown'}" for one in found]
        yield (
            f"{counted(sum(one.lines for one in found), 'line')} among the step records of {point.title} could not be "
            f"read, as a crash, a full disk or a power cut leaves them: {_named(files)}. Unless their steps were "
            "made again, the figures lack them, and the comparison of ranks may lack these ranks; see "
            f"{RunFolder(point.path).metrics(found[0].rank)}."
        )
    if text := unread_text(RunFolder(point.path)):
        yield text


def _steps_used(points: Sequence[Point]) -> Iterator[str]:
    used = {point.title: point.figures.steps for point in points if point.figures is not None}
    if used:
        few, many = min(used.values()), max(used.values())
        same = f"{few} steps" if len(points) == 1 else f"{few} steps of each point"
        counts = same if few == many else ", ".join(f"{n} of {title}" for title, n in used.items())
        yield (
            "Step time is the median over the steps after warm-up, each as long as its slowest rank took; the spread "
            f"is the interquartile range. The first {WARMUP_STEPS} steps of each attempt are left out, because they "
            f"pay for memory pools, caches and connections. Used are {counts}."
        )


def _apart(every: Sequence[Series]) -> Iterator[str]:
    """Explain why points of different clusters, software or code are not compared, and how to make them comparable."""
    for name, values in made_with([point for series in every for point in series.members]).items():
        if len(values) > 1 and any(set(values) & set(series.label.split(",")) for series in every):
            where = "; ".join(f"{', '.join(titles)} with {value}" for value, titles in values.items())
            yield (
                f"The points were made with different {name} ({where}) and are compared only with points of the same. "
                "The same command with fresh=true makes them all again."
            )


def _comparison(series: Series) -> Iterator[str]:
    """Name the baseline of a series. Explain a speedup without known work, and work that does not fit the kind of
    scaling.
    """
    base, is_weak = series.smallest, series.scaling == "weak"
    measured = [point for point in series.members if point.figures is not None]
    if base is not None and series.compares:
        passed_over = [point.title for point in series.members[: series.members.index(base)]]
        instead = f", because {' and '.join(passed_over)} gave no figures" if passed_over else ""
        are = f"Speedup and efficiency{series.of} are" if series.has_rates else f"Speedup{series.of} is"
        yield f"{are} against {base.title} ({counted(base.ranks or 0, 'rank')}){instead}."
        if base.crowded:
            yield f"Ranks of {base.title} shared cores or a GPU: no efficiency is claimed for any point{series.of}."
    if len(measured) > 1 and not series.has_rates:
        ideal = "1.00 would be ideal in weak scaling" if is_weak else "more ranks do the same work sooner"
        yield (
            f"Speedup{series.of} is the ratio of step times ({ideal}), and no efficiency is claimed: the work of a "
            "step is not known at every point. script.work_per_step=N with script.unit=samples states it, and so do "
            "records of tokens or samples."
        )
    works: dict[Point, float] = {}
    # Only scripts are checked: their users state the work by hand.
    for point in measured if series.scaling is not None and series.has_rates else ():
        if point.figures is not None and point.figures.throughput is not None and not point.is_gpt:
            works[point] = point.figures.throughput * point.figures.step_time_s / (point.ranks or 1 if is_weak else 1)
    if works and max(works.values()) > SAME_WORK * min(works.values()):
        each, other = (" per rank", "false") if is_weak else ("", "true")
        did = ", ".join(f"{work_text(work, point.unit)}{each} at {point.title}" for point, work in works.items())
        yield (
            f"The points were started as {series.scaling} scaling, but a step did {did}. Throughput is compared all "
            f"the same; script.weak_scaling={other} corrects the kind of scaling."
        )


def _records(points: Sequence[Point]) -> Iterator[str]:
    """Report steps on fewer nodes than requested, ranks without records, run times in place of steps, and ranks that
    shared cores or a GPU.
    """
    for point in points:
        if point.fewer_nodes:
            made = ", ".join(
                f"{counted(n, 'step')} on {counted(nodes, 'node')}" for nodes, n in point.fewer_nodes.items()
            )
            all_of_them = sum(point.fewer_nodes.values()) == point.last_step
            then = "figures and size are those of these steps" if all_of_them else "its figures are without these steps"
            yield f"At {point.title} nodes were lost, and the run continued on the remaining nodes: {made}; {then}."
    partly = []
    for point in points:
        environment, steps = point.environment, point.steps.after_warmup()
        if environment is None or environment.work_per_step is not None or np.isnan(steps.work[-1:]).all():
            continue
        if steps.recorded_by[-1] < environment.world_size:
            partly.append(f"{point.title} ({steps.recorded_by[-1]} of {environment.world_size})")
    if partly:
        yield (
            "Not all ranks recorded steps, and throughput counts only the ranks that did: "
            f"{', '.join(partly)}. script.work_per_step=N states the work of all ranks together."
        )
    if not any(len(point.steps) for point in points) and any(point.run_time_s for point in points):
        basis = (
            "Speedup compares the stated work (script.work_per_step times the number of steps) per second of it."
            if any(point.run_rate is not None for point in points)
            else "No speedup or efficiency is claimed, since nothing says that the points did the same work: "
            "script.progress, or records by launch.worker, give steps and their times."
        )
        yield (
            "No step times were recorded. Run time is from the start of the ranks to their end, added up over "
            f"attempts: it includes start-up, evaluation and saving, and work that was done again. {basis}"
        )
    if crowded := [f"{point.title} ({'; '.join(point.crowding())})" for point in points if point.crowded]:
        yield f"Ranks shared cores or a GPU, so no efficiency is claimed there: {', '.join(crowded)}."


def _noise(series: Series, rows: Sequence[Row]) -> Iterator[str]:
    """Explain why an efficiency is marked with ~, and give its 95 % interval."""
    titles = {point.title for point in series.members}
    marked = [row for row in rows if row.noisy and row.label in titles]
    noisy = [
        f"{point.title} ({100 * point.figures.spread_share:.0f} %)"
        for point in series.members
        if point.figures is not None and point.figures.spread_share > NOISY and not point.crowded
    ]
    if marked and noisy:
        ranges = [
            f"{_range(row.efficiency_low, row.efficiency_high)} at {row.label}"
            for row in marked
            if row.efficiency_low is not None and row.efficiency_high is not None
        ]
        interval = f" Its 95 % interval is {', '.join(ranges)}." if ranges else ""
        yield (
            "~ marks an efficiency that is not exact: the middle half of the step times spans more than "
            f"{100 * NOISY:.0f} % of their median at {', '.join(noisy)}.{interval} "
            "More steps, on machines that do nothing else, narrow the interval."
        )


def _times(point: Point) -> Iterator[str]:
    """Report step times that are means over lines of a log, slow ranks, and ranks that wait longer for data."""
    figures = point.figures
    if figures is None:
        return
    if figures.resolution_s:
        together = round(figures.resolution_s / figures.step_time_s) if figures.step_time_s else 0
        claim = f"an efficiency is exact to about {100 / figures.intervals:.0f} %"
        if point.is_coarse:
            claim = f"no efficiency is claimed: they took less than {MIN_STEPS} such readings"
        yield (
            f"At {point.title} a step time is a mean over about {counted(together, 'step')}, whose lines were read "
            f"together ({figures.resolution_s:.2g} s): their spread is not known, and {claim}. A step time in the "
            "line (script.progress with a group step_time_s), or launch.worker, gives the time of each step."
        )

    def by_excess(excesses: Mapping[int, float]) -> str:
        texts = []
        for rank, excess_s in sorted(excesses.items(), key=lambda item: -item[1]):
            on = "" if (host := point.host(rank)) is None else f" on {host}"
            share = f"{100 * excess_s / figures.step_time_s:.1f} % of the step time"
            texts.append(f"rank {rank}{on} by {1000 * excess_s:.3g} ms, {share}")
        return _named(texts)

    ranks = point.rank_times.ranks if point.rank_times else ()
    if slow := {rank.rank: rank.excess_s for rank in ranks if rank.is_slow}:
        yield (
            f"At {point.title}, slower than the other ranks throughout the run: {by_excess(slow)}. In each step all "
            "ranks wait for the slowest."
        )
    if waiting := {rank.rank: rank.wait_excess_s or 0.0 for rank in ranks if rank.waits_long}:
        yield f"At {point.title}, longer waits for data than on the other ranks: {by_excess(waiting)}."


def _gpus(point: Point) -> Iterator[str]:
    """Name throttled hosts, and explain why the energy is unknown."""
    if (use := point.gpu_use) is None:
        return
    shares = {host.host: (host.throttled or 0.0, host.reasons) for host in use.hosts}
    throttled = [
        f"host {host} {100 * share:.0f} % of samples ({', '.join(reasons)})"
        for host, (share, reasons) in sorted(shares.items(), key=lambda item: -item[1][0])
        if share >= LEAST_THROTTLED
    ]
    if throttled:
        yield f"At {point.title}, throttled: {_named(throttled)}. Clocks lower than requested make steps longer."
    if use.unsampled:
        yield (
            f"The energy of {point.title} is not known: GPUs of {_named(use.unsampled)} were not sampled in every "
            "attempt (nvidia-ml-py has to be installed: pip install '.[gpu]')."
        )


def _interruptions(rows: Sequence[Row]) -> Iterator[str]:
    """Write the cost of interruptions by cause, and the time that restarts in place saved."""
    for unit, of_unit in interrupted(rows):
        lost_h, used = sum(row.interrupted_h or 0.0 for row in of_unit), [row.gpu_hours for row in of_unit]
        causes = ", ".join(f"{CAUSES[c]} {hours(lost, f'{unit}-h')}" for c, lost in hours_by_cause(of_unit).items())
        is_known = unit == "GPU" and None not in used
        share = f", {percent(lost_h / sum(filter(None, used)))} of the use of these runs" if is_known else ""
        number = counted(sum(row.interruptions or 0 for row in of_unit), "interruption")
        yield f"{number} cost {hours(lost_h, f'{unit}-hours')}{share} ({causes}): {DEFINITION}."
        if spared := [row for row in of_unit if row.saved_in_place_h is not None]:
            saved = hours(sum(row.saved_in_place_h or 0.0 for row in spared), f"{unit}-hours")
            wait = time_text(sum(row.saved_in_place_wait_s or 0.0 for row in spared))
            yield (
                f"{counted(sum(row.restarts_in_place or 0 for row in spared), 'restart')} in place saved about "
                f"{saved} and {wait} of waiting for nodes, against "
                f"{' and '.join(dict.fromkeys(row.saved_against or '' for row in spared))}: {SAVED_DEFINITION}."
            )


def _ends(points: Sequence[Point]) -> Iterator[str]:
    """Report points without figures, unfinished points, and an unknown MFU."""
    few = [
        f"{point.title} ({len(point.steps.after_warmup())} of {len(point.steps)})"
        for point in points
        if point.figures is None and point.last_step is not None and (point.is_gpt or len(point.steps))
    ]
    if few:
        yield f"Too few steps for a figure, at least {MIN_STEPS} are needed after warm-up: {', '.join(few)}."
    for point in points:
        if text := STATE_TEXTS.get(point.state):
            at = f" (last step recorded: {point.last_step})" if point.last_step is not None else ""
            yield f"{point.title} {text}{at}; see {point.path}."
    # The MFU needs the peak rate of the device. Users expect an MFU only of gpt.
    lacking = [p for p in points if p.is_gpt and p.figures is not None and p.figures.mfu_palm is None]
    if names := dict.fromkeys(p.environment.device_names for p in lacking if p.environment is not None):
        yield f"MFU unavailable: the runs recorded none on {', '.join(names)}."


LOW_MFU = 0.2
WORTH_NAMING = 0.1
"""Smallest share (0 to 1) of the step with which a note names a phase other than computation."""
ADVICE = {
    "communication": "More work between two reductions hides it: a larger optim.global_batch, or fewer nodes; "
    "python -m launch.doctor measures the links.",
    "stragglers": "All ranks wait for the slowest: scaling.html shows which one, and on which host.",
    "data": "Token files on a filesystem that is nearer (data.path), prepared by python -m gpt.prepare.",
    "bubble": "More micro-batches fill the pipeline: a smaller optim.max_micro_batch.",
    "optimizer": "parallel=zero1 divides the optimizer among the ranks.",
    REST: "Larger matrices use a GPU better: a larger optim.max_micro_batch, as far as memory goes, and "
    "precision=bf16.",
}


def _parts_of_steps(point: Point) -> Iterator[str]:
    """Yield advice for a point of the GPT library with a low MFU, by the phase that loses most time.

    Then yield the parts of the profiled steps, if the point has any.
    """
    mfu = None if point.figures is None else point.figures.mfu_palm
    if mfu is not None and mfu < LOW_MFU and point.is_gpt:
        shares = point.steps.after_warmup().shares()
        known = {phase: share for phase, share in shares.items() if phase != REST and share >= WORTH_NAMING}
        most = max(known, key=lambda phase: known[phase], default=REST)
        made_of = ", ".join(f"{LOSSES[phase]} {100 * share:.1f} %" for phase, share in shares.items())
        steps = f" Its steps are {made_of}." if len(shares) > 1 else ""
        yield f"MFU at {point.title} is {100 * mfu:.1f} %, below {100 * LOW_MFU:.0f} %.{steps} {ADVICE[most]}"
    if (profiled := point.breakdown) is not None:
        ranks = counted(profiled.ranks, "rank")
        yield f"Of {profiled.steps} steps of {point.title} that were profiled on {ranks}: {profiled.text()}."


def _findings(series: Series, found: SeriesFindings) -> Iterator[str]:
    """Report the 95 % intervals, the repeated sizes and the fitted scaling law of a series."""
    titles = {point.name: point.title for point in series.members}
    if found.intervals:
        ends = ", ".join(f"{titles[name]} {_range(*pair)}" for name, pair in found.intervals.items())
        yield (
            f"95 % intervals of efficiency{series.of}, by a block bootstrap over the steps of both points: {ends}. "
            "They describe these runs; another run may be outside of them."
        )
    for size in found.repeats:
        yield (
            f"{size.count} runs of {size.ranks} ranks{series.of} have together an efficiency of "
            f"{100 * size.efficiency:.1f} % (95 % interval {_range(size.low, size.high)}, over steps and runs)."
        )
    if (law := found.law) is not None:
        limit = ""
        if law.name == "Amdahl" and law.low > 0:
            limit = f" By it, no number of ranks is more than {1 / law.serial_share:.3g} times as fast as {law.base}."
        yield (
            f"{law.name}'s law fits the speedups{series.of} with a serial share of {100 * law.serial_share:.2f} % "
            f"(95 % interval {100 * law.low:.2f} to {100 * law.high:.2f} %); no measured speedup is farther from it "
            f"than {100 * law.largest_error:.1f} %.{limit}"
        )
