"""Costs of interruptions as a table, which Markdown and the HTML page share, and as notes. Must not compute figures."""

from __future__ import annotations

from collections.abc import Sequence

from launch.report.interruptions import CAUSES, DEFINITION, SAVED_DEFINITION
from launch.report.numbers import UNAVAILABLE, percent, run_time, told
from launch.report.row import Row
from launch.runs.wording import counted, how_often


def hours_by_cause(rows: Sequence[Row]) -> dict[str, float]:
    """Add up the lost hours of several points by cause, in the order of ``CAUSES``."""
    found = {cause: [hours for row in rows if (hours := row.interrupted().get(cause))] for cause in CAUSES}
    return {cause: sum(hours) for cause, hours in found.items() if hours}


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
        shown = [told(hours, unit) for hours in causes.values()]
        counts = [
            str(sum(row.interruptions or 0 for row in rows)),
            str(sum(row.restarts_in_place or 0 for row in rows)),
        ]
        whole = sum(row.interrupted_h or 0.0 for row in rows)
        spared = sum(row.saved_in_place_h or 0.0 for row in rows)
        waits = sum(row.saved_in_place_wait_s or 0.0 for row in rows)
        saved = [told(spared, unit), _time(waits), ""]
        cells.append(["all", *shown, told(whole, unit), *counts, *saved[: 3 * has_saving]])
    return cells


def loss_notes(rows: Sequence[Row]) -> list[str]:
    """Make the sentences about interruptions: what they cost by cause, and what restarts in place saved."""
    found = []
    for unit, of_unit in units(rows):
        whole = sum(row.interrupted_h or 0.0 for row in of_unit)
        causes = ", ".join(f"{CAUSES[c]} {told(hours, f'{unit}-h')}" for c, hours in hours_by_cause(of_unit).items())
        number = counted(sum(row.interruptions or 0 for row in of_unit), "interruption")
        share = _share(of_unit)
        found.append(f"{number} cost {told(whole, f'{unit}-hours')}{share} ({causes}): {DEFINITION}.")
        spared = [row for row in of_unit if row.saved_in_place_h is not None]
        if spared:
            hours = sum(row.saved_in_place_h or 0.0 for row in spared)
            waited = sum(row.saved_in_place_wait_s or 0.0 for row in spared)
            times = sum(row.restarts_in_place or 0 for row in spared)
            roads = " and ".join(dict.fromkeys(row.saved_against or "" for row in spared))
            found.append(
                f"Ranks were started again in place {how_often(times)}, which saved about "
                f"{told(hours, f'{unit}-hours')} and {_time(waited)} of waiting for nodes, against {roads}: "
                f"{SAVED_DEFINITION}."
            )
    return found


def _share(rows: Sequence[Row]) -> str:
    """Share of the hours that the runs with interruptions used; empty where it is not known."""
    used = [row.gpu_hours for row in rows]
    if rows[0].hours_of != "GPU" or None in used:
        return ""
    share = sum(row.interrupted_h or 0.0 for row in rows) / sum(filter(None, used))
    return f", {percent(share)} of what these runs used"


def _time(value: float | None) -> str:
    return "0 s" if value == 0 else run_time(value)
