"""The sentences below a scaling table: what its figures do and do not say.

Owns the wording. Must not know how a table is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from launch.report.advice import low_mfu
from launch.report.details import straggler_notes
from launch.report.gpu_use import gpu_notes
from launch.report.loss_tables import loss_notes
from launch.report.points import State
from launch.report.readings import WARMUP_STEPS
from launch.report.series import (
    MIN_STEPS,
    NOISY,
    MeasuredPoint,
    Series,
    clusters_of,
    drop_warmup,
    made_with,
    work_text,
)
from launch.runs.events import unread_text
from launch.runs.folder import RunFolder
from launch.runs.wording import counted

if TYPE_CHECKING:
    from launch.report.row import Row

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
    if not marked:
        return ""
    noisy = [
        f"{member.point.title} ({100 * member.figures.spread_share:.0f} %)"
        for member in series.members
        if member.figures is not None and member.figures.is_noisy and not member.crowded
    ]
    ranges = [
        f"{100 * (row.efficiency_low or 0):.0f} to {100 * (row.efficiency_high or 0):.0f} % at {row.label}"
        for row in marked
    ]
    return (
        f"~ marks an efficiency that is not exact: the middle half of the step times spans more than {100 * NOISY:.0f} "
        f"% of their median at {', '.join(noisy)}. By the quartiles of both points it is {', '.join(ranges)}. More "
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
