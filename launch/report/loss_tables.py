"""Costs of interruptions as a table, which Markdown and the HTML page share, and as notes. Must not compute figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from launch.report.interruptions import CAUSES, DEFINITION, SAVED_DEFINITION
from launch.report.numbers import UNAVAILABLE, percent, run_time, told
from launch.report.row import Row
from launch.runs.wording import counted, how_often


def hours_by_cause(rows: Sequence[Row]) -> dict[str, float]:
    """Add up the lost hours of several points by cause, in the order of ``CAUSES``."""
    found = {cause: [hours for row in rows if (hours := row.interrupted().get(cause))] for cause in CAUSES}
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
    """Tell what interruptions cost each point, and all together, with a head; empty where there were none.

    Args:
        rows: with hours of one unit.
    """
    unit = f"{rows[0].hours_of}-h"
    causes = hours_by_cause(rows)
    has_saving = any(row.saved_in_place_h is not None for row in rows)
    titles = [*(CAUSES[cause] for cause in causes), "in all", "interruptions", "of them in place"]
    cells = [["point", *titles, *(["saved in place", "wait saved", "against"] if has_saving else [])]]
    for row in rows:
        by_cause = row.interrupted()
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
    """Share of the hours that the runs with interruptions used; empty where it is not known."""
    used = [row.gpu_hours for row in rows]
    if rows[0].hours_of != "GPU" or None in used:
        return ""
    share = hours / sum(filter(None, used))
    return f", {percent(share)} of what these runs used"


def _time(value: float | None) -> str:
    return "0 s" if value == 0 else run_time(value)
