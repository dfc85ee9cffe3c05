"""Figures of a report as texts, and the sentences below its tables, which explain the figures and their limits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from launch.errors import counted, duration_text
from launch.report.goodput import CAUSES, DEFINITION
from launch.report.points import Point, PointState
from launch.report.series import CONDITIONS, MADE_WITH, Series, made_with
from launch.report.steps import MIN_STEPS, NOISY, PROFILED, WARMUP_STEPS
from launch.runs.events import unread_text
from launch.runs.folder import RunFolder
from launch.runs.measured import usage_text
from launch.why.rules import find_verdict

if TYPE_CHECKING:
    from launch.report.table import Row

# Figures in the tables of a report: the same on the terminal, in Markdown and in HTML.


UNAVAILABLE = "unavailable"
"""Text in place of a figure that is not known."""


def figure(value: float | None, form: str = "{:,.0f}") -> str:
    """Return a figure as text in the format ``form``, by default a whole number such as 98,765.

    ``UNAVAILABLE`` for None.
    """
    return UNAVAILABLE if value is None else form.format(value)


def rate(value: float | None) -> str:
    """Return a throughput as text with at least three digits: 9.87, 98.7, 987, 98,765. ``UNAVAILABLE`` for None."""
    return figure(value, "{:,.0f}" if value is not None and value >= 100 else "{:.3g}")


def time_text(value: float | None) -> str:
    """Return a duration in seconds as text: 350 ms, 12.3 s, 4 min 05 s. ``UNAVAILABLE`` for None."""
    return UNAVAILABLE if value is None else duration_text(value)


def percent(value: float | None) -> str:
    """Return a share (0 to 1) as text in percent with one decimal; ``UNAVAILABLE`` for None."""
    return UNAVAILABLE if value is None else f"{value * 100:.1f} %"


def with_unit(value: float | None, unit: str) -> str:
    """Return a figure with its unit as text; ``UNAVAILABLE`` for None.

    Figures of at least 1,000 are rounded to whole numbers, smaller ones to four significant digits.
    """
    return figure(value, f"{{:,.0f}} {unit}" if value is not None and abs(value) >= 1000 else f"{{:.4g}} {unit}")


def hours(value: float, unit: str) -> str:
    """Return hours of GPUs or nodes with their unit as text: three significant digits, at most four decimals."""
    return with_unit(value if value >= 1000 else float(f"{round(value, 4):.3g}"), unit)


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
"""Largest number of slow ranks, throttled hosts or damaged files that a note names. The note counts the rest."""
LEAST_THROTTLED = 0.01
"""Smallest share (0 to 1) of throttled samples with which a host counts as throttled."""


def report_notes(points: Sequence[Point], every: Sequence[Series], rows: Sequence[Row]) -> Iterator[str]:
    """Yield the notes below the tables of a report, each of one or more sentences.

    ``points`` are all points of the report, ``every`` are its series, and ``rows`` are the rows of its table.
    """
    shown = [point for series in every for point in series.members]
    yield from _sources(points)
    yield from chain(*map(_unread, shown))
    yield from _steps_used(shown)
    yield from _apart(every)
    yield from chain(*map(_comparison, every))
    yield from _records(shown)
    yield from _inexact(shown, rows)
    yield from _means(shown)
    yield from chain(*map(_times, shown), *map(_gpus, shown), *map(_interruptions, rows))
    for point in shown:  # A point that used less than half of the memory or of the CPUs that it requested.
        if "next time" in (text := usage_text(RunFolder(point.path))):
            yield f"{point.title} {text}."
    yield from _ends(shown)


def _named(texts: Sequence[str]) -> str:
    """Return the first ``NAMED`` texts, and the number of the other texts, as one text."""
    return "; ".join([*texts[:NAMED], *([f"and {len(texts) - NAMED} more"] if len(texts) > NAMED else [])])


def _sources(points: Sequence[Point]) -> Iterator[str]:
    """Yield notes on the conditions that differ between the folders of a comparison."""
    sources: dict[str, dict[str, list[str]]] = {}
    """Label of a folder -> condition, such as the hardware -> its sorted values among the folder's points."""
    for source in dict.fromkeys(point.source for point in points):
        inside = [point for point in points if point.source == source]
        known = [point.environment for point in inside if point.environment is not None]
        found = {name: {condition(one) for one in known} for name, condition in CONDITIONS.items()}
        found |= {name: {value_of(point) for point in inside} for name, value_of in MADE_WITH.items()}
        sources[source] = {name: sorted(filter(None, values)) for name, values in found.items()}
    (first, there), *others = sources.items() if sources else [("", {})]
    for source, here in others:
        different = [
            f"{name} ({' / '.join(values)}, not {' / '.join(there[name])})"
            for name, values in here.items()
            if values and there[name] and values != there[name]
        ]
        if different:
            yield f"{source} differs from {first} in {'; '.join(different)}."


def _unread(point: Point) -> Iterator[str]:
    """Yield notes on damaged lines of a point's step records and event log. A point without such lines has no note."""
    if point.unread:
        found = sorted(point.unread, key=lambda rank: -point.unread[rank])
        files = [f"{point.unread[rank]} of rank {rank}" for rank in found]
        yield (
            f"{counted(sum(point.unread.values()), 'line')} among the step records of {point.title} could not be "
            f"read, as a crash, a full disk or a power cut leaves them: {_named(files)}. Unless their steps were "
            f"made again, the figures lack them; see {RunFolder(point.path).metrics(found[0])}."
        )
    if text := unread_text(RunFolder(point.path)):
        yield text


def _steps_used(points: Sequence[Point]) -> Iterator[str]:
    used = [point.figures.steps for point in points if point.figures is not None]
    if used:
        steps = f"{min(used)}" if min(used) == max(used) else f"{min(used)} to {max(used)}"
        yield (
            "Step time is the median over the steps after warm-up, each as long as its slowest rank took; the spread "
            f"is the interquartile range. The first {WARMUP_STEPS} steps of each attempt are left out, because they "
            f"pay for memory pools, caches and connections. {steps} steps of each point are used."
        )


def _apart(every: Sequence[Series]) -> Iterator[str]:
    """Yield notes on why series with different cluster, software or code are not compared, and how to compare them.

    ``every`` are all series of the report.
    """
    for name, values in made_with([point for series in every for point in series.members]).items():
        if len(values) > 1 and any(set(values) & set(series.label.split(",")) for series in every):
            where = "; ".join(f"{', '.join(titles)} with {value}" for value, titles in values.items())
            yield (
                f"The points were made with different {name} ({where}) and are compared only with points of the same. "
                "The same command with fresh=true makes them all again."
            )


def _comparison(series: Series) -> Iterator[str]:
    """Yield notes on the baseline of a series, and on a speedup that is only a ratio of step times.

    The baseline is the point to which the other points of the series are compared.
    """
    base, measured = series.smallest, [point for point in series.members if point.figures is not None]
    if base is not None and series.compares:
        passed_over = [point.title for point in series.members[: series.members.index(base)]]
        instead = f", because {' and '.join(passed_over)} gave no figures" if passed_over else ""
        are = f"Speedup and efficiency{series.of} are" if series.has_rates else f"Speedup{series.of} is"
        yield f"{are} against {base.title} ({counted(base.ranks or 0, 'rank')}){instead}."
        if base.crowded:
            yield f"Ranks of {base.title} shared cores or a GPU: no efficiency is claimed for any point{series.of}."
    if len(measured) > 1 and not series.has_rates:
        yield (
            f"Speedup{series.of} is the ratio of step times, and no efficiency is claimed: the work of a step is not "
            "known at every point. script.work_per_step=N with script.unit=samples states it, and so do records of "
            "tokens or samples."
        )


def _records(points: Sequence[Point]) -> Iterator[str]:
    """Yield notes on missing step records, on steps on fewer nodes, and on ranks that shared cores or a GPU."""
    partly = []
    for point in points:
        if fewer := point.fewer_nodes:
            made = ", ".join(f"{counted(n, 'step')} on {counted(nodes, 'node')}" for nodes, n in fewer.items())
            are = (
                "figures and size are those of" if sum(fewer.values()) == point.last_step else "its figures are without"
            )
            where = f"At {point.title} nodes were lost, and the run continued on the remaining nodes"
            yield f"{where}: {made}; {are} these steps."
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
        yield (
            "No step times were recorded, so no speedup or efficiency is claimed. Run time is from the start of the "
            "ranks to their end, over all attempts. script.progress, or records by launch.worker, give step times."
        )
    if crowded := [f"{point.title} ({'; '.join(point.crowding())})" for point in points if point.crowded]:
        yield f"Ranks shared cores or a GPU, so no efficiency is claimed there: {', '.join(crowded)}."


def _inexact(points: Sequence[Point], rows: Sequence[Row]) -> Iterator[str]:
    """Yield notes with the 95 % intervals of efficiency, and on why an efficiency is marked with ~."""
    ends = [
        f"{row.label} {100 * row.efficiency_low:.1f} to {100 * row.efficiency_high:.1f} %"
        for row in rows
        if row.efficiency_low is not None and row.efficiency_high is not None
    ]
    if ends:
        yield (
            f"95 % intervals of efficiency, by a block bootstrap over the steps of both points: {', '.join(ends)}. "
            "They describe these runs; another run may be outside of them."
        )
    noisy = [
        f"{point.title} ({100 * point.figures.spread_share:.0f} %)"
        for point in points
        if point.figures is not None and point.figures.spread_share > NOISY and not point.crowded
    ]
    if noisy and any(row.noisy for row in rows):
        yield (
            "~ marks an efficiency that is not exact: the middle half of the step times spans more than "
            f"{100 * NOISY:.0f} % of their median at {', '.join(noisy)}. "
            "More steps, on machines that do nothing else, narrow the interval."
        )


def _means(points: Sequence[Point]) -> Iterator[str]:
    """Yield notes on points whose step times are means over several steps, and how exact their efficiency is."""
    each = []
    for point in points:
        figures = point.figures
        if figures is None or not figures.resolution_s:
            continue
        together = round(figures.resolution_s / figures.step_time_s) if figures.step_time_s else 0
        claim = f"an efficiency is exact to about {100 / figures.intervals:.0f} %"
        if point.is_coarse:
            claim = f"no efficiency is claimed: the steps took less than {MIN_STEPS} such readings"
        each.append(f"{point.title} ({counted(together, 'step')} in {figures.resolution_s:.2g} s; {claim})")
    if each:
        yield (
            f"A step time is a mean over the steps whose lines were read together, and their spread is not known: at "
            f"{', '.join(each)}. A step time in the line (script.progress with a group step_time_s), or launch.worker, "
            "gives the time of each step."
        )


def _times(point: Point) -> Iterator[str]:
    """Yield notes on the slow ranks of a point, and on the parts of its profiled steps."""
    figures = point.figures
    if figures is None:
        return
    ranks = point.rank_times.ranks if point.rank_times else ()
    texts = []
    for rank in sorted((rank for rank in ranks if rank.is_slow), key=lambda rank: -rank.excess_s):
        on = "" if (host := point.host(rank.rank)) is None else f" on {host}"
        share = f"{100 * rank.excess_s / figures.step_time_s:.1f} % of the step time"
        texts.append(f"rank {rank.rank}{on} by {1000 * rank.excess_s:.3g} ms, {share}")
    if texts:
        yield (
            f"At {point.title}, slower than the other ranks throughout the run: {_named(texts)}. In each step all "
            "ranks wait for the slowest."
        )
    if point.profiled:
        step_s = sum(seconds for part, seconds in point.profiled.items() if part in PROFILED)
        shares = {part: f"{100 * seconds / step_s:.1f} %" for part, seconds in point.profiled.items()}
        parts = ", ".join(f"{name} {shares[part]}" for part, name in PROFILED.items() if part in shares)
        yield (
            f"Of {point.profiled_steps} steps of {point.title} that were profiled: {parts}; communication, hidden or "
            f"not, takes {shares['comm']}."
        )


def _gpus(point: Point) -> Iterator[str]:
    """Yield notes on the throttled hosts of a point, and on why its energy is unknown."""
    if (use := point.gpu_use) is None:
        return
    throttled = [
        f"host {host.host} {100 * (host.throttled or 0.0):.0f} % of samples ({', '.join(host.reasons)})"
        for host in sorted(use.hosts, key=lambda host: -(host.throttled or 0.0))
        if (host.throttled or 0.0) >= LEAST_THROTTLED
    ]
    if throttled:
        yield f"At {point.title}, throttled: {_named(throttled)}. Clocks lower than requested make steps longer."
    if use.unsampled:
        yield (
            f"The energy of {point.title} is not known: GPUs of {_named(use.unsampled)} were not sampled in every "
            "attempt (nvidia-ml-py has to be installed: pip install '.[gpu]')."
        )


def _interruptions(row: Row) -> Iterator[str]:
    """Yield a note on the hours that interruptions of a point cost, by cause."""
    if not row.interruptions:
        return
    causes = ", ".join(f"{CAUSES[cause]} {hours(lost, f'{row.hours_of}-h')}" for cause, lost in row.causes_h.items())
    lost_h = sum(row.causes_h.values())
    share = f", {percent(lost_h / row.gpu_hours)} of its use" if row.gpu_hours else ""
    number = counted(row.interruptions, "interruption")
    yield f"{number} of {row.label} cost {hours(lost_h, f'{row.hours_of}-hours')}{share} ({causes}): {DEFINITION}."


def _ends(points: Sequence[Point]) -> Iterator[str]:
    """Yield notes on points with too few steps for figures, and on points that have not finished."""
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
            verdict = find_verdict(RunFolder(point.path))
            why = f": {verdict.sentence}" if verdict else ""
            yield f"{point.title} {text}{at}{why}; see {point.path}."
