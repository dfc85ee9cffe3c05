"""The sentences below a scaling table, and the figures in them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from launch.errors import counted, how_often
from launch.report.environment import gpu_notes
from launch.report.goodput import CAUSES, DEFINITION, SAVED_DEFINITION
from launch.report.points import State
from launch.report.series import (
    MIN_STEPS,
    NOISY,
    MeasuredPoint,
    Series,
    clusters_of,
    made_with,
    resolution_note,
    straggler_notes,
    work_text,
)
from launch.report.steps import LOSSES, REST, WARMUP_STEPS, drop_warmup, phase_shares
from launch.runs.events import unread_text
from launch.runs.folder import RunFolder

if TYPE_CHECKING:
    from launch.report.table import Row


# Figures as the tables of a report write them: on the terminal, in Markdown and in HTML alike.


UNAVAILABLE = "unavailable"
"""Stands for a figure that is not known."""


def count(value: float | None) -> str:
    """A whole number, with commas between the thousands."""
    return UNAVAILABLE if value is None else f"{value:,.0f}"


def rate(value: float | None) -> str:
    """Throughput with three digits at least: 9.87, 98.7, 987, 98,765."""
    if value is None or value >= 100:
        return count(value)
    return f"{value:.3g}"


def seconds(value: float | None) -> str:
    """A duration in ms or s with three digits."""
    if value is None:
        return UNAVAILABLE
    number, unit = (value * 1000, "ms") if value < 0.9995 else (value, "s")
    return f"{number:#.3g}".rstrip(".") + f" {unit}"


def percent(value: float | None) -> str:
    """A share in percent; small ones, such as the MFU of a small model, keep a digit."""
    if value is None:
        return UNAVAILABLE
    return f"{value * 100:.1f} %"


def percentages(shares: Sequence[float]) -> list[str]:
    """Round shares to tenths of a percent so that they add up to their rounded sum: 100.0 where that is 1.

    Those whose digits behind are largest are rounded up (largest remainder method).
    """
    tenths = [1000 * share for share in shares]
    below = [math.floor(value) for value in tenths]
    order = sorted(range(len(tenths)), key=lambda index: below[index] - tenths[index])
    for index in order[: round(sum(tenths)) - sum(below)]:
        below[index] += 1
    return [f"{value / 10:.1f}" for value in below]


def run_time(value: float | None) -> str:
    """A long duration: 12.3 s, 4 min 05 s, 2 h 10 min."""
    if value is None or value < 99.95:
        return seconds(value)
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def amount(value: float | None) -> str:
    """A sum of money, or hours, with two decimals."""
    return UNAVAILABLE if value is None else f"{value:,.2f}"


def told(value: float | None, unit: str) -> str:
    """Write a figure with four digits, and its unit."""
    if value is None:
        return UNAVAILABLE
    return f"{value:,.0f} {unit}" if abs(value) >= 1000 else f"{value:.4g} {unit}"


# Advice where a GPU is used little: what the steps of a point are made of, and what to type against it.


LOW_MFU = 0.2
WORTH_NAMING = 0.1
"""Share of the step from which a phase other than computation is what to look at."""
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


def low_mfu(members: Sequence[MeasuredPoint]) -> list[str]:
    """Advise on points of the GPT library whose MFU is low, by what most of their lost time is."""
    told = []
    for member in members:
        mfu = None if member.figures is None else member.figures.mfu_palm
        if mfu is None or mfu >= LOW_MFU or not member.point.is_gpt:
            continue
        shares = phase_shares(drop_warmup(member.point.steps))
        known = {phase: share for phase, share in shares.items() if phase != REST}
        most = max(known, key=lambda phase: known[phase], default=REST)
        most = most if known.get(most, 0.0) >= WORTH_NAMING else REST
        made_of = ", ".join(f"{LOSSES[phase]} {100 * share:.1f} %" for phase, share in shares.items())
        steps = f" Its steps are {made_of}." if known else ""
        told.append(
            f"MFU at {member.point.title} is {100 * mfu:.1f} %, below {100 * LOW_MFU:.0f} %.{steps} {ADVICE[most]}"
        )
    return told


# Costs of interruptions as a table, which Markdown and the HTML page share, and as notes. Must not compute figures.


def hours_by_cause(rows: Sequence[Row]) -> dict[str, float]:
    """Add up the lost hours of several points by cause, in the order of ``CAUSES``."""
    found = {cause: [hours for row in rows if (hours := row.causes_h.get(cause))] for cause in CAUSES}
    return {cause: sum(hours) for cause, hours in found.items() if hours}


@dataclass(frozen=True)
class Sums:
    """Losses of several points together, and what restarts in place saved them."""

    by_cause: dict[str, float]
    """Hours of one unit by cause."""
    hours: float
    interruptions: int
    in_place: int
    """Restarts in place."""
    saved_h: float
    saved_wait_s: float


def add_up(rows: Sequence[Row]) -> Sums:
    """Add up what several points lost and saved; what is not known of a point counts as nothing."""
    return Sums(
        by_cause=hours_by_cause(rows),
        hours=sum(row.interrupted_h or 0.0 for row in rows),
        interruptions=sum(row.interruptions or 0 for row in rows),
        in_place=sum(row.restarts_in_place or 0 for row in rows),
        saved_h=sum(row.saved_in_place_h or 0.0 for row in rows),
        saved_wait_s=sum(row.saved_in_place_wait_s or 0.0 for row in rows),
    )


def units(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """Group the rows with interruptions by the unit of their hours: those of GPUs and of nodes are never added up."""
    found = {unit: [row for row in rows if row.hours_of == unit and row.interruptions] for unit in ("GPU", "node")}
    return [(unit, of_unit) for unit, of_unit in found.items() if of_unit]


def loss_cells(rows: Sequence[Row]) -> list[list[str]]:
    """Tell what interruptions cost each point, and all together, with a head; empty if there were none.

    Args:
        rows: with hours of one unit.
    """
    unit = f"{rows[0].hours_of}-h"
    causes = hours_by_cause(rows)
    has_saving = any(row.saved_in_place_h is not None for row in rows)
    titles = [*(CAUSES[cause] for cause in causes), "in all", "interruptions", "of them in place"]
    cells = [["point", *titles, *(["saved in place", "wait saved", "against"] if has_saving else [])]]
    for row in rows:
        by_cause = row.causes_h
        shown = [told(by_cause.get(cause, 0.0), unit) for cause in causes]
        counts = [str(row.interruptions), str(row.restarts_in_place or 0)]
        saved = [told(row.saved_in_place_h, unit), _time(row.saved_in_place_wait_s), row.saved_against or UNAVAILABLE]
        cells.append([row.label or row.point, *shown, told(row.interrupted_h, unit), *counts, *saved[: 3 * has_saving]])
    if len(rows) > 1:
        whole = add_up(rows)
        shown = [told(hours, unit) for hours in whole.by_cause.values()]
        counts = [str(whole.interruptions), str(whole.in_place)]
        saved = [told(whole.saved_h, unit), _time(whole.saved_wait_s), ""]
        cells.append(["all", *shown, told(whole.hours, unit), *counts, *saved[: 3 * has_saving]])
    return cells


def loss_notes(rows: Sequence[Row]) -> list[str]:
    """Make the sentences about interruptions: what they cost by cause, and what restarts in place saved."""
    found = []
    for unit, of_unit in units(rows):
        whole = add_up(of_unit)
        causes = ", ".join(f"{CAUSES[c]} {told(hours, f'{unit}-h')}" for c, hours in whole.by_cause.items())
        number = counted(whole.interruptions, "interruption")
        share = _share(of_unit, whole.hours)
        found.append(f"{number} cost {told(whole.hours, f'{unit}-hours')}{share} ({causes}): {DEFINITION}.")
        spared = [row for row in of_unit if row.saved_in_place_h is not None]
        if spared:
            saved = add_up(spared)
            roads = " and ".join(dict.fromkeys(row.saved_against or "" for row in spared))
            found.append(
                f"Ranks were started again in place {how_often(saved.in_place)}, which saved about "
                f"{told(saved.saved_h, f'{unit}-hours')} and {_time(saved.saved_wait_s)} of waiting for nodes, "
                f"against {roads}: {SAVED_DEFINITION}."
            )
    return found


def _share(rows: Sequence[Row], hours: float) -> str:
    """Share of the hours that the runs with interruptions used; empty if it is not known."""
    used = [row.gpu_hours for row in rows]
    if rows[0].hours_of != "GPU" or None in used:
        return ""
    share = hours / sum(filter(None, used))
    return f", {percent(share)} of what these runs used"


def _time(value: float | None) -> str:
    return "0 s" if value == 0 else run_time(value)


# The sentences below a scaling table: what its figures do and do not say.


STATE_TEXTS = {
    State.FAILED: "failed",
    State.STOPPED: "was stopped before its last step",
    State.RUNNING: "has not ended: it runs still, or was killed",
    State.CANCELLED: "was cancelled",
    State.BUDGET_EXCEEDED: "was stopped at the cap of its budget",
    State.NO_RECORDS: "has no records",
    State.NOT_STARTED: "has not started",
}

NAMED_UNREAD = 3
"""Ranks and attempts that a note about lines which could not be read names, those with most of them."""


def notes(found: Sequence[Series], rows: Sequence[Row]) -> list[str]:
    """Make the sentences that belong below the table of these series, which has these rows."""
    members = [member for series in found for member in series.members]
    candidates = [
        *map(_unread, members),
        *(unread_text(RunFolder(member.point.path)) or "" for member in members),
        _steps_used(members),
        _clusters(members),
        *_made_with(found),
        *map(_smallest, found),
        *map(_no_rates, found),
        *map(_changing_work, found),
        *map(_fewer_nodes, members),
    ]
    candidates += [_partly_recorded(members), _run_times(members), _crowding(members), *map(_crowded_base, found)]
    candidates += (_noise(series, rows) for series in found)
    candidates += map(resolution_note, members)
    candidates += [note for member in members for note in straggler_notes(member)]
    candidates += [note for member in members for note in gpu_notes(member.point.title, member.point.gpu_use)]
    candidates += loss_notes(rows)
    candidates += [_too_few_steps(members), *map(_state, members), _mfu(members), *low_mfu(members)]
    candidates += map(_breakdown, members)
    return [note for note in candidates if note]


def _unread(member: MeasuredPoint) -> str:
    """Says how many lines of which files are no step records, so that nobody takes the figures for those of all."""
    point = member.point
    found = sorted(point.unread, key=lambda one: -one.lines)
    if not found:
        return ""
    lines = sum(one.lines for one in found)
    told = [
        f"{one.lines} of rank {one.rank} in {'an unknown attempt' if one.attempt is None else f'attempt {one.attempt}'}"
        for one in found[:NAMED_UNREAD]
    ]
    left = sum(one.lines for one in found[NAMED_UNREAD:])
    told += [f"{left} of others (the JSON file has all)"] if left else []
    return (
        f"{counted(lines, 'line')} among the step records of {point.title} could not be read, as a crash, a full "
        f"disk or a power cut leaves them: {', '.join(told)}. Unless their steps were made again, the figures lack "
        f"them, and the comparison of ranks may lack these ranks; see {RunFolder(point.path).metrics(found[0].rank)}."
    )


def _steps_used(members: Sequence[MeasuredPoint]) -> str:
    used = {m.point.title: m.figures.steps for m in members if m.figures is not None}
    if not used:
        return ""
    few, many = min(used.values()), max(used.values())
    counts = f"{few} steps of each point" if few == many else ", ".join(f"{n} of {name}" for name, n in used.items())
    counts = f"{few} steps" if len(members) == 1 else counts
    return (
        "Step time is the median over the steps after warm-up, each as long as its slowest rank took; the spread is "
        f"the interquartile range. The first {WARMUP_STEPS} steps of each attempt are left out, because they pay for "
        f"memory pools, caches and connections. Used are {counts}."
    )


def _no_rates(series: Series) -> str:
    """Says that steps are compared whose work is not known."""
    measured = [member for member in series.members if member.figures is not None]
    if len(measured) < 2 or series.has_rates:
        return ""
    of = f" of {series.label}" if series.label else ""
    ideal = "1.00 would be ideal in weak scaling" if series.scaling == "weak" else "more ranks do the same work sooner"
    return (
        f"Speedup{of} is the ratio of step times ({ideal}), and no efficiency is claimed: how much work a step does is "
        "not known at every point. script.work_per_step=N with script.unit=samples says it, and so do records of "
        "tokens or samples."
    )


SAME_WORK = 1.05
"""Steps whose work differs by less than this factor do the same: the last batch of an epoch may be smaller."""


def _changing_work(series: Series) -> str:
    """Says where steps did not do the work that the kind of scaling promises, which scripts state by hand."""
    works = [
        (member, member.figures.throughput * member.figures.step_time_s)
        for member in series.members
        if member.figures is not None and member.figures.throughput is not None and not member.point.is_gpt
    ]
    if len(works) < 2 or series.scaling is None or not series.has_rates:
        return ""
    promised = [work / (m.ranks or 1) if series.scaling == "weak" else work for m, work in works]
    if max(promised) <= SAME_WORK * min(promised):
        return ""
    each = " per rank" if series.scaling == "weak" else ""
    told = ", ".join(
        f"{work_text(work, member.point.unit)}{each} at {member.point.title}"
        for (member, _), work in zip(works, promised, strict=True)
    )
    other = "false" if series.scaling == "weak" else "true"
    return (
        f"The points were started as {series.scaling} scaling, but a step did {told}. Throughput is compared all the "
        f"same; script.weak_scaling={other} says what was meant."
    )


def _fewer_nodes(member: MeasuredPoint) -> str:
    """Says which steps were made on fewer nodes than asked, as nodes were lost: they do not measure the point."""
    point = member.point
    if not point.fewer_nodes:
        return ""
    told = ", ".join(
        f"{counted(steps, 'step')} on {counted(nodes, 'node')}" for nodes, steps in point.fewer_nodes.items()
    )
    all_of_them = sum(point.fewer_nodes.values()) == point.last_step
    then = (
        "its figures are of those, and its size is theirs"
        if all_of_them
        else "step time, throughput and efficiency are without them"
    )
    return f"At {point.title} nodes were lost, and the run went on with those that were left: {told}; {then}."


def _partly_recorded(members: Sequence[MeasuredPoint]) -> str:
    """Says where throughput counts the work of some ranks only, since only these recorded it."""
    partly = []
    for member in members:
        environment, steps = member.point.environment, drop_warmup(member.point.steps)
        if environment is None or environment.work_per_step is not None or not steps or steps[-1].work is None:
            continue
        if steps[-1].recorded_by < environment.world_size:
            partly.append(f"{member.point.title} ({steps[-1].recorded_by} of {environment.world_size})")
    if not partly:
        return ""
    return (
        "Not all ranks recorded steps, and throughput counts what those said that did: "
        f"{', '.join(partly)}. script.work_per_step=N says what all ranks do together."
    )


def _run_times(members: Sequence[MeasuredPoint]) -> str:
    """Says what a run time is, for programs that record no steps."""
    if any(member.point.steps for member in members) or not any(member.point.run_time_s for member in members):
        return ""
    claim = (
        "Speedup compares the work that was stated (script.work_per_step times the number of steps) per second of it."
        if any(member.run_rate is not None for member in members)
        else "No speedup or efficiency is claimed, since nothing says that the points did the same work: "
        "script.progress, or records by launch.worker, tell steps and their times."
    )
    return (
        "No step times were recorded. Run time is from the start of the ranks to their end, added up over attempts: "
        f"it includes start-up, evaluation and saving, and work that was done again. {claim}"
    )


def _smallest(series: Series) -> str:
    """Says what the others are measured against, and when that is not the smallest point of the sweep."""
    base = series.smallest
    if base is None or not series.compares:
        return ""
    of = f" of {series.label}" if series.label else ""
    passed_over = [m.point.title for m in series.members[: series.members.index(base)]]
    instead = f", because {' and '.join(passed_over)} gave no figures" if passed_over else ""
    ranks = "1 rank" if base.ranks == 1 else f"{base.ranks} ranks"
    are = "Speedup and efficiency{} are" if series.has_rates else "Speedup{} is"
    return f"{are.format(of)} against {base.point.title} ({ranks}){instead}."


def _clusters(members: Sequence[MeasuredPoint]) -> str:
    """Says that points of different clusters are not measured against each other, and how to have them all on one."""
    found = clusters_of(members)
    if len(found) < 2:
        return ""
    where = "; ".join(f"{', '.join(names)} on {cluster}" for cluster, names in found.items())
    return (
        f"The points ran on different clusters ({where}) and are compared only with others there. The same command "
        "with name=NAME, or fresh=true, runs them all on one."
    )


def _made_with(found: Sequence[Series]) -> list[str]:
    """Say that points made with other software or code are not measured against each other."""
    told = []
    for name, values in made_with([member for series in found for member in series.members]).items():
        if len(values) < 2 or not any(set(values) & set(series.label.split(",")) for series in found):
            continue
        where = "; ".join(f"{', '.join(titles)} with {value}" for value, titles in values.items())
        told.append(
            f"The points were made with different {name} ({where}) and are compared only with others of the same. The "
            "same command with fresh=true makes them all again."
        )
    return told


def _noise(series: Series, rows: Sequence[Row]) -> str:
    """Says why an efficiency is marked, and how far off it may be."""
    titles = {member.point.title for member in series.members}
    marked = [row for row in rows if row.noisy and row.label in titles]
    noisy = [
        f"{member.point.title} ({100 * member.figures.spread_share:.0f} %)"
        for member in series.members
        if member.figures is not None and member.figures.spread_share > NOISY and not member.crowded
    ]
    if not marked or not noisy:
        return ""
    ranges = [
        f"{100 * (row.efficiency_low or 0):.1f} to {100 * (row.efficiency_high or 0):.1f} % at {row.label}"
        for row in marked
    ]
    return (
        f"~ marks an efficiency that is not exact: the middle half of the step times spans more than {100 * NOISY:.0f} "
        f"% of their median at {', '.join(noisy)}. Its 95 % interval is {', '.join(ranges)}. More "
        "steps, on machines that do nothing else, tell more."
    )


def _crowding(members: Sequence[MeasuredPoint]) -> str:
    crowded = []
    for member in members:
        if member.crowded:
            crowded.append(f"{member.point.title} ({'; '.join(member.crowding())})")
    if not crowded:
        return ""
    return f"Ranks shared cores or a GPU, so no efficiency is claimed there: {', '.join(crowded)}."


def _crowded_base(series: Series) -> str:
    base = series.smallest
    if base is None or not base.crowded or len(series.members) == 1:
        return ""
    of = f" of {series.label}" if series.label else ""
    return (
        f"The point to compare with{of}, {base.point.title}, is one of these: no efficiency is claimed for any point."
    )


def _too_few_steps(members: Sequence[MeasuredPoint]) -> str:
    few = [
        f"{m.point.title} ({len(drop_warmup(m.point.steps))} of {len(m.point.steps)})"
        for m in members
        if m.figures is None and m.point.last_step is not None and (m.point.is_gpt or m.point.steps)
    ]
    if not few:
        return ""
    return f"Too few steps for a figure, at least {MIN_STEPS} are needed after warm-up: {', '.join(few)}."


def _state(member: MeasuredPoint) -> str:
    text = STATE_TEXTS.get(member.point.state)
    if text is None:
        return ""
    at = f" (last step recorded: {member.point.last_step})" if member.point.last_step is not None else ""
    return f"{member.point.title} {text}{at}; see {member.point.path}."


def _mfu(members: Sequence[MeasuredPoint]) -> str:
    """MFU needs the peak rate of the device: without it there is none, rather than somebody else's."""
    gpt = [m for m in members if m.point.is_gpt]  # of other programs nobody expects it
    missing = [m.point.environment for m in gpt if m.figures is not None and m.figures.mfu_palm is None]
    names = dict.fromkeys(e.device_names for e in missing if e is not None)
    return f"MFU unavailable: the runs recorded none on {', '.join(names)}." if names else ""


def _breakdown(member: MeasuredPoint) -> str:
    """Tell what the steps that a profiler watched are made of."""
    found = member.point.breakdown
    if found is None:
        return ""
    ranks = f"{found.ranks} ranks" if found.ranks > 1 else "one rank"
    return f"Of {found.steps} steps of {member.point.title} that were profiled on {ranks}: {found.text()}."
