"""Sentences below a scaling table, the format of figures, and the tables of the cost of interruptions."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from launch.errors import counted, how_often
from launch.report.goodput import CAUSES, DEFINITION, SAVED_DEFINITION
from launch.report.points import GpuUse, Point, State
from launch.report.read import Environment
from launch.report.series import COMPARED, Series, SeriesFindings, clusters_of, made_with, work_text
from launch.report.steps import LOSSES, MIN_STEPS, NOISY, REST, WARMUP_STEPS
from launch.runs.events import unread_text
from launch.runs.folder import RunFolder

if TYPE_CHECKING:
    from launch.report.table import Row

# Figures in the tables of a report: the same on the terminal, in Markdown and in HTML.


UNAVAILABLE = "unavailable"
"""Text in place of a figure that is not known."""


def count(value: float | None) -> str:
    """Write a whole number with commas between the thousands."""
    return UNAVAILABLE if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Write a throughput with at least three digits: 9.87, 98.7, 987, 98,765."""
    if value is None or value >= 100:
        return count(value)
    return f"{value:.3g}"


def seconds(value: float | None) -> str:
    """Write a duration in ms or s with three digits."""
    if value is None:
        return UNAVAILABLE
    number, unit = (value * 1000, "ms") if value < 0.9995 else (value, "s")
    return f"{number:#.3g}".rstrip(".") + f" {unit}"


def percent(value: float | None) -> str:
    """Write a share in percent. Small shares, such as the MFU of a small model, keep a decimal."""
    if value is None:
        return UNAVAILABLE
    return f"{value * 100:.1f} %"


def percentages(shares: Sequence[float]) -> list[str]:
    """Round shares to tenths of a percent whose sum is the rounded sum: 100.0 if the shares add up to 1.

    The shares with the largest remainders are rounded up (largest remainder method).
    """
    tenths = [1000 * share for share in shares]
    below = [math.floor(value) for value in tenths]
    order = sorted(range(len(tenths)), key=lambda index: below[index] - tenths[index])
    for index in order[: round(sum(tenths)) - sum(below)]:
        below[index] += 1
    return [f"{value / 10:.1f}" for value in below]


def run_time(value: float | None) -> str:
    """Write a long duration: 12.3 s, 4 min 05 s, 2 h 10 min."""
    if value is None or value < 99.95:
        return seconds(value)
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def amount(value: float | None) -> str:
    """Write money or hours with two decimals."""
    return UNAVAILABLE if value is None else f"{value:,.2f}"


def told(value: float | None, unit: str) -> str:
    """Write a figure with four digits, and its unit."""
    if value is None:
        return UNAVAILABLE
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.4g} {unit}"


def hours(value: float | None, unit: str) -> str:
    """Write hours of GPUs or nodes with three digits and at most four decimals, and their unit."""
    return told(value if value is None or value >= 1000 else float(f"{round(value, 4):.3g}"), unit)


# The cost of interruptions as a table, for Markdown and the HTML page.


def hours_by_cause(rows: Sequence[Row]) -> dict[str, float]:
    """Return the lost hours of several points by cause, in the order of ``CAUSES``."""
    found = {cause: [lost for row in rows if (lost := row.causes_h.get(cause))] for cause in CAUSES}
    return {cause: sum(lost) for cause, lost in found.items() if lost}


def units(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Group the rows with interruptions by the unit of their hours. Hours of GPUs and of nodes are never added."""
    found = {unit: [row for row in rows if row.hours_of == unit and row.interruptions] for unit in ("GPU", "node")}
    return [(unit, of_unit) for unit, of_unit in found.items() if of_unit]


def loss_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Return the table of the cost of interruptions for each point and for all points, with a head.

    Args:
        rows: rows whose hours have the same unit.
    """
    unit, causes = f"{rows[0].hours_of}-h", hours_by_cause(rows)
    has_saving = any(row.saved_in_place_h is not None for row in rows)
    titles = [*(CAUSES[cause] for cause in causes), "in all", "interruptions", "of them in place"]
    cells = [["point", *titles, *(["saved in place", "wait saved", "against"] if has_saving else [])]]

    def add(name: str, of: Sequence[Row], against: str) -> None:
        by_cause = hours_by_cause(of)
        saved = [row for row in of if row.saved_in_place_h is not None]
        line = [name, *(hours(by_cause.get(cause, 0.0), unit) for cause in causes)]
        line += [hours(sum(row.interrupted_h or 0.0 for row in of), unit)]
        line += [str(sum(row.interruptions or 0 for row in of)), str(sum(row.restarts_in_place or 0 for row in of))]
        if has_saving:
            saved_h, wait_s = _saved(saved)
            line += [hours(saved_h, unit), _time(wait_s), against] if saved else [UNAVAILABLE] * 3
        cells.append(line)

    for row in rows:
        add(row.label or row.point, [row], row.saved_against or UNAVAILABLE)
    if len(rows) > 1:
        add("all", rows, "")
    return cells


def _saved(rows: Sequence[Row]) -> tuple[float, float]:
    """Return the hours, and the seconds of waiting, that restarts in place saved in several points."""
    return sum(row.saved_in_place_h or 0.0 for row in rows), sum(row.saved_in_place_wait_s or 0.0 for row in rows)


def _time(value: float | None) -> str:
    return "0 s" if value == 0 else run_time(value)


# The sentences below a scaling table, which explain the figures and their limits.


STATE_TEXTS = {
    State.FAILED: "failed",
    State.STOPPED: "was stopped before its last step",
    State.RUNNING: "has not ended: it runs still, or was killed",
    State.CANCELLED: "was cancelled",
    State.BUDGET_EXCEEDED: "was stopped at the cap of its budget",
    State.NO_RECORDS: "has no records",
    State.NOT_STARTED: "has not started",
}

NAMED = 3
"""Number of slow ranks, throttled hosts or unread files that a note names. It counts the rest."""
SAME_WORK = 1.05
"""Ratio of work below which steps count as equal work. The last batch of an epoch may be smaller."""
LEAST_THROTTLED = 0.01
"""Share of the samples below which no host counts as throttled."""


def notes(
    points: Sequence[Point], found: Sequence[tuple[Series, SeriesFindings]], rows: Sequence[Row]
) -> Iterator[str]:
    """Yield the notes below the table of these series and rows."""
    every = [series for series, _ in found]
    shown = [point for series in every for point in series.members]
    yield from _sources(points)
    yield from chain(*map(_unread, shown))
    yield from _steps_used(shown)
    yield from _apart(every)
    yield from chain(*map(_smallest, every), *map(_unknown_work, every), *map(_changing_work, every))
    yield from chain(*map(_fewer_nodes, shown))
    yield from _whole(shown)
    for series in every:
        base = series.smallest
        if base is not None and base.crowded and series.compares:
            yield (
                f"The point to compare with{series.of}, {base.title}, is one of these: no efficiency is claimed for "
                "any point."
            )
    yield from chain(*(_noise(series, rows) for series in every))
    yield from chain(*map(_resolution, shown), *map(_stragglers, shown), *map(_gpus, shown))
    yield from _interruptions(rows)
    yield from _ends(shown)
    yield from chain(*map(_low_mfu, shown))
    for point in shown:
        if (profiled := point.breakdown) is not None:
            ranks = counted(profiled.ranks, "rank") if profiled.ranks > 1 else "one rank"
            yield f"Of {profiled.steps} steps of {point.title} that were profiled on {ranks}: {profiled.text()}."
    for series, finding in found:
        yield from _findings(series, finding)


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
    """Count the lines that are no step records, and the lines of the event log that are unreadable."""
    found = sorted(point.unread, key=lambda one: -one.lines)
    if found:
        named = [
            f"{one.lines} of rank {one.rank} in {f'attempt {one.attempt}' if one.attempt else 'an unknown attempt'}"
            for one in found[:NAMED]
        ]
        left = sum(one.lines for one in found[NAMED:])
        named += [f"{left} of other ranks or attempts (the JSON file has all)"] if left else []
        yield (
            f"{counted(sum(one.lines for one in found), 'line')} among the step records of {point.title} could not be "
            f"read, as a crash, a full disk or a power cut leaves them: {', '.join(named)}. Unless their steps were "
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
    points = [point for series in every for point in series.members]
    if len(clusters := clusters_of(points)) > 1:
        where = "; ".join(f"{', '.join(titles)} on {cluster}" for cluster, titles in clusters.items())
        yield (
            f"The points ran on different clusters ({where}) and are compared only within a cluster. The same command "
            "with name=NAME, or fresh=true, runs them all on one."
        )
    for name, values in made_with(points).items():
        if len(values) > 1 and any(set(values) & set(series.label.split(",")) for series in every):
            where = "; ".join(f"{', '.join(titles)} with {value}" for value, titles in values.items())
            yield (
                f"The points were made with different {name} ({where}) and are compared only with points of the same. "
                "The same command with fresh=true makes them all again."
            )


def _smallest(series: Series) -> Iterator[str]:
    """Name the point that is the baseline of the others, and why a smaller point is not."""
    base = series.smallest
    if base is not None and series.compares:
        passed_over = [point.title for point in series.members[: series.members.index(base)]]
        instead = f", because {' and '.join(passed_over)} gave no figures" if passed_over else ""
        are = f"Speedup and efficiency{series.of} are" if series.has_rates else f"Speedup{series.of} is"
        yield f"{are} against {base.title} ({counted(base.ranks or 0, 'rank')}){instead}."


def _unknown_work(series: Series) -> Iterator[str]:
    """Explain a speedup between steps with unknown work."""
    if sum(point.figures is not None for point in series.members) > 1 and not series.has_rates:
        is_weak = series.scaling == "weak"
        ideal = "1.00 would be ideal in weak scaling" if is_weak else "more ranks do the same work sooner"
        yield (
            f"Speedup{series.of} is the ratio of step times ({ideal}), and no efficiency is claimed: the work of a "
            "step is not known at every point. script.work_per_step=N with script.unit=samples states it, and so do "
            "records of tokens or samples."
        )


def _changing_work(series: Series) -> Iterator[str]:
    """Report steps whose work does not fit the kind of scaling. Scripts state that work by hand."""
    works = {
        point: point.figures.throughput * point.figures.step_time_s
        for point in series.members
        if point.figures is not None and point.figures.throughput is not None and not point.is_gpt
    }
    if len(works) < 2 or series.scaling is None or not series.has_rates:
        return
    is_weak = series.scaling == "weak"
    stated = {point: work / (point.ranks or 1) if is_weak else work for point, work in works.items()}
    if max(stated.values()) > SAME_WORK * min(stated.values()):
        each, other = (" per rank", "false") if is_weak else ("", "true")
        did = ", ".join(f"{work_text(work, point.unit)}{each} at {point.title}" for point, work in stated.items())
        yield (
            f"The points were started as {series.scaling} scaling, but a step did {did}. Throughput is compared all "
            f"the same; script.weak_scaling={other} corrects the kind of scaling."
        )


def _fewer_nodes(point: Point) -> Iterator[str]:
    """Count the steps on fewer nodes than requested after a loss of nodes: they do not measure the point."""
    if point.fewer_nodes:
        made = ", ".join(f"{counted(n, 'step')} on {counted(nodes, 'node')}" for nodes, n in point.fewer_nodes.items())
        all_of_them = sum(point.fewer_nodes.values()) == point.last_step
        then = "its figures are of these steps, and its size is that of these nodes"
        then = then if all_of_them else "step time, throughput and efficiency are without these steps"
        yield f"At {point.title} nodes were lost, and the run continued on the remaining nodes: {made}; {then}."


def _whole(points: Sequence[Point]) -> Iterator[str]:
    """Report ranks without records, run times in place of steps, and ranks that shared cores or a GPU."""
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
    """Explain why an efficiency is marked, and how large its error may be."""
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


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def _resolution(point: Point) -> Iterator[str]:
    """Report step times that are means over lines of a log that were read together."""
    figures = point.figures
    if figures is None or not figures.resolution_s:
        return
    together = round(figures.resolution_s / figures.step_time_s) if figures.step_time_s else 0
    claim = f"an efficiency is exact to about {100 / figures.intervals:.0f} %"
    if point.is_coarse:
        claim = f"no efficiency is claimed: they took less than {MIN_STEPS} such readings"
    yield (
        f"At {point.title} a step time is a mean over about {counted(together, 'step')}, whose lines were read "
        f"together ({figures.resolution_s:.2g} s): their spread is not known, and {claim}. A step time in the line "
        "(script.progress with a group step_time_s), or launch.worker, gives the time of each step."
    )


def _stragglers(point: Point) -> Iterator[str]:
    """Name slow ranks and ranks that wait for data; none if their excess is within the spread."""
    figures = point.figures
    if figures is None or point.rank_times is None:
        return

    def named(excesses: Mapping[int, float]) -> str:
        found = []
        for rank, excess_s in sorted(excesses.items(), key=lambda item: -item[1])[:NAMED]:
            on = "" if (host := point.host(rank)) is None else f" on {host}"
            share = f"{100 * excess_s / figures.step_time_s:.1f} % of the step time"
            found.append(f"rank {rank}{on} by {1000 * excess_s:.3g} ms, {share}")
        more = f"; and {len(excesses) - NAMED} more" if len(excesses) > NAMED else ""
        return "; ".join(found) + more

    ranks = point.rank_times.ranks
    if slow := {rank.rank: rank.excess_s for rank in ranks if rank.is_slow}:
        yield (
            f"At {point.title}, slower than the other ranks throughout the run: {named(slow)}. In each step all ranks "
            "wait for the slowest."
        )
    if waiting := {rank.rank: rank.wait_excess_s or 0.0 for rank in ranks if rank.waits_long}:
        yield f"At {point.title}, longer waits for data than on the other ranks: {named(waiting)}."


def _gpus(point: Point) -> Iterator[str]:
    """Name throttled hosts, and explain why the energy is unknown."""
    use = point.gpu_use or GpuUse((), None, None, None)
    throttled = [host for host in use.hosts if (host.throttled or 0.0) >= LEAST_THROTTLED]
    if throttled:
        throttled.sort(key=lambda host: -(host.throttled or 0.0))
        named = "; ".join(
            f"host {host.host} {100 * (host.throttled or 0.0):.0f} % of samples ({', '.join(host.reasons)})"
            for host in throttled[:NAMED]
        )
        more = f"; and {len(throttled) - NAMED} more of {len(use.hosts)}" if len(throttled) > NAMED else ""
        yield f"At {point.title}, throttled: {named}{more}. Clocks lower than requested make steps longer."
    if use.unsampled:
        named = ", ".join(use.unsampled[:NAMED]) + (" and others" if len(use.unsampled) > NAMED else "")
        yield (
            f"The energy of {point.title} is not known: GPUs of {named} were not sampled in every attempt "
            "(nvidia-ml-py has to be installed: pip install '.[gpu]')."
        )


def _interruptions(rows: Sequence[Row]) -> Iterator[str]:
    """Write the cost of interruptions by cause, and the time that restarts in place saved."""
    for unit, of_unit in units(rows):
        lost_h, used = sum(row.interrupted_h or 0.0 for row in of_unit), [row.gpu_hours for row in of_unit]
        causes = ", ".join(f"{CAUSES[c]} {hours(lost, f'{unit}-h')}" for c, lost in hours_by_cause(of_unit).items())
        is_known = unit == "GPU" and None not in used
        share = f", {percent(lost_h / sum(filter(None, used)))} of the use of these runs" if is_known else ""
        number = counted(sum(row.interruptions or 0 for row in of_unit), "interruption")
        yield f"{number} cost {hours(lost_h, f'{unit}-hours')}{share} ({causes}): {DEFINITION}."
        spared = [row for row in of_unit if row.saved_in_place_h is not None]
        if spared:
            saved_h, wait_s = _saved(spared)
            amounts = f"about {hours(saved_h, f'{unit}-hours')} and {_time(wait_s)} of waiting for nodes"
            yield (
                f"Ranks were started again in place {how_often(sum(row.restarts_in_place or 0 for row in spared))}, "
                f"which saved {amounts if saved_h or wait_s else 'nothing'}, against "
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
"""Share of the step from which a note names a phase other than computation."""
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


def _low_mfu(point: Point) -> Iterator[str]:
    """Advise on a point of the GPT library with a low MFU, by the phase that loses most time."""
    mfu = None if point.figures is None else point.figures.mfu_palm
    if mfu is None or mfu >= LOW_MFU or not point.is_gpt:
        return
    shares = point.steps.after_warmup().shares()
    known = {phase: share for phase, share in shares.items() if phase != REST and share >= WORTH_NAMING}
    most = max(known, key=lambda phase: known[phase], default=REST)
    made_of = ", ".join(f"{LOSSES[phase]} {100 * share:.1f} %" for phase, share in shares.items())
    steps = f" Its steps are {made_of}." if len(shares) > 1 else ""
    yield f"MFU at {point.title} is {100 * mfu:.1f} %, below {100 * LOW_MFU:.0f} %.{steps} {ADVICE[most]}"


def _findings(series: Series, found: SeriesFindings) -> Iterator[str]:
    """Write the intervals, repeats and law of a series."""
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
