"""What the figures of a scaling table do and do not say, in plain words.

Owns the sentences below the table. Must not compute figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from launch.report.measure import MIN_STEPS, WARMUP_STEPS, after_warmup
from launch.report.points import State
from launch.report.series import Measured, Series

STATE_WORDS = {
    State.FAILED: "failed",
    State.STOPPED: "was stopped before its last step",
    State.RUNNING: "has not ended: it runs still, or was killed",
    State.NO_RECORDS: "has no records",
}


def notes(found: Sequence[Series]) -> list[str]:
    """The sentences that belong below the table of these series."""
    members = [member for series in found for member in series.members]
    candidates = [_steps_used(members), *map(_smallest, found), _crowding(members), *map(_crowded_base, found)]
    candidates += [_too_few_steps(members), *map(_state, members), _mfu(members)]
    return [note for note in candidates if note]


def _steps_used(members: Sequence[Measured]) -> str:
    used = {m.point.title: m.figures.steps for m in members if m.figures is not None}
    if not used:
        return ""
    few, many = min(used.values()), max(used.values())
    counts = f"{few} steps of each point" if few == many else ", ".join(f"{n} of {name}" for name, n in used.items())
    return (
        "Step time is the median over the steps after warm-up, each as long as its slowest rank took; the spread is "
        f"the interquartile range. The first {WARMUP_STEPS} steps of each attempt are left out, because they pay for "
        f"memory pools, caches and connections. Used are {counts}."
    )


def _smallest(series: Series) -> str:
    """Says what the others are measured against, and when that is not the smallest point of the sweep."""
    base = series.smallest
    if base is None or len(series.members) == 1:
        return ""
    of = f" of {series.label}" if series.label else ""
    passed_over = [m.point.title for m in series.members[: series.members.index(base)]]
    instead = f", because {' and '.join(passed_over)} gave no figures" if passed_over else ""
    ranks = "1 rank" if base.ranks == 1 else f"{base.ranks} ranks"
    return f"Speedup and efficiency{of} are against {base.point.title} ({ranks}){instead}."


def _crowding(members: Sequence[Measured]) -> str:
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


def _too_few_steps(members: Sequence[Measured]) -> str:
    few = [
        f"{m.point.title} ({len(after_warmup(m.point.steps))} of {len(m.point.steps)})"
        for m in members
        if m.figures is None and m.point.last_step is not None
    ]
    if not few:
        return ""
    return f"Too few steps for a figure, at least {MIN_STEPS} are needed after warm-up: {', '.join(few)}."


def _state(member: Measured) -> str:
    words = STATE_WORDS.get(member.point.state)
    if words is None:
        return ""
    at = f" (last step recorded: {member.point.last_step})" if member.point.last_step is not None else ""
    return f"{member.point.title} {words}{at}; see {member.point.path}."


def _mfu(members: Sequence[Measured]) -> str:
    """MFU needs the peak rate of the device: without it there is none, rather than somebody else's."""
    missing = [m.point.environment for m in members if m.figures is not None and m.figures.mfu_palm is None]
    names = dict.fromkeys(e.device_names for e in missing if e is not None)
    return f"MFU unavailable: the runs recorded none on {', '.join(names)}." if names else ""
