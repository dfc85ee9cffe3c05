"""The report as one HTML page: a first line of tiles with figures, and the content of ``page.html.j2`` below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from launch.errors import counted
from launch.report.figures import (
    PALETTE,
    inline_svg,
    interruption_panels,
    loss_panels,
    run_panels,
    scaling_panels,
    times_panels,
)
from launch.report.goodput import PARTS
from launch.report.notes import figure, percent, rate, time_text
from launch.report.steps import LOSSES
from launch.report.table import RankRow, Row, RunDetail, ScalingTable
from launch.report.text import LEFT, efficiency, part_tables, point_tables, slowest_table

MAX_FALLS = 6
"""Largest number of waterfall panels, one for each of the largest points. The table of losses has all points."""
MAX_RUNS = 8
"""Largest number of runs whose ranks and step times are drawn: each drawing takes some 50 ms and 20 kB."""


def page(table: ScalingTable, reload_s: float | None = None) -> str:
    """Return the HTML of a report's page. A browser reloads the page every ``reload_s`` seconds; never if None."""
    headings = [heading for heading, _ in table.sections()]
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    return templates.get_template("page.html.j2").render(
        table=table,
        reload_s=None if reload_s is None else max(1, math.ceil(reload_s)),
        headings=headings,
        title=headings[0] if len(headings) == 1 else table.title,
        palette=PALETTE,
        left=LEFT,
        tiles=tiles(table),
        scaling=scaling_panels(table),
        bars=[*loss_panels(table)[:MAX_FALLS], *times_panels(table), *interruption_panels(table)],
        runs=shown_runs(table.details),
        chosen=chosen(table.details) if table.details else None,
        run_panels=run_panels,
        slowest=slowest_table,
        inline_svg=inline_svg,
        tables=[*point_tables(table), *part_tables(table)],
    )


def slow_rank_rows(found: RunDetail) -> list[RankRow]:
    """Return the ranks of a run that are slower than the others throughout, or wait longer for data."""
    return [row for row in found.slowest if row.time.is_slow or row.time.waits_long]


def chosen(details: Sequence[RunDetail]) -> RunDetail:
    """Choose the run to show first: the run whose slow rank has the largest excess, as a share of its step time.

    Without slow ranks, it is the last run whose ranks are compared.
    """
    slow = [(row.share, found) for found in details for row in slow_rank_rows(found)]
    with_ranks = [found for found in details if found.rank_times is not None] or details
    return max(slow, key=lambda pair: pair[0])[1] if slow else with_ranks[-1]


def shown_runs(details: Sequence[RunDetail]) -> list[RunDetail]:
    """Choose at most ``MAX_RUNS`` runs to draw, first runs with slow ranks, then runs with most ranks.

    The result is in the order of ``details``.
    """

    def worth(found: RunDetail) -> tuple[bool, int]:
        return not slow_rank_rows(found), -len(found.rank_times.ranks if found.rank_times else ())

    by_worth = sorted(details, key=worth)[:MAX_RUNS]
    return [found for found in details if any(found is one for one in by_worth)]


# The first line of the page: scaling, the largest loss, slow ranks, and cost.


MAX_SERIES = 3
"""Largest number of series whose largest point gets a tile."""
GOOD, POOR = 0.9, 0.7
"""A tile is green if its efficiency or goodput is at least ``GOOD``, and red if it is below ``POOR``."""


@dataclass(frozen=True)
class Tile:
    """A figure at the top of the page, with its name and a sentence. ``kind`` is ``good``, ``bad`` or empty."""

    name: str
    value: str
    text: str
    kind: str = ""


def tiles(table: ScalingTable) -> list[Tile]:
    """Return the tiles of the first line of the page."""
    return [*_unread(table), *_scaling(table), *_losses(table), *_pace(table), *_slow_rank(table), *_money(table)]


def _unread(table: ScalingTable) -> list[Tile]:
    """Return a tile that warns about damaged records, if there are any."""
    rows = [row for row in table.rows if row.unread_lines]
    if not rows:
        return []
    more = f" and {counted(len(rows) - 1, 'other point')}" if len(rows) > 1 else ""
    lines = counted(sum(row.unread_lines for row in rows), "line")
    text = f"of step records at {rows[0].label}{more}; the figures may lack these steps: see the notes"
    return [Tile("Could not be read", lines, text, "bad")]


def _largest(table: ScalingTable) -> list[Row]:
    """Return one row for each series: its largest point with an efficiency, or with a speedup if none has one."""
    found: dict[tuple[str | None, str], Row] = {}
    for row in table.rows:
        before = found.get((row.scaling, row.series))
        if row.speedup not in (None, 1) and not (before and before.efficiency and row.efficiency is None):
            found[row.scaling, row.series] = row
    return list(found.values())


def _scaling(table: ScalingTable) -> list[Tile]:
    found = []
    for row in _largest(table)[:MAX_SERIES]:
        text = f"speedup {row.speedup:.2f} on {row.ranks} ranks"
        unclaimed = [row]
        if row.efficiency is not None:
            series = [other for other in table.rows if (other.scaling, other.series) == (row.scaling, row.series)]
            unclaimed = [other for other in series[series.index(row) + 1 :] if other.speedup is not None]
            if row.efficiency_low is not None and row.efficiency_high is not None:
                text += f"; 95 % interval {100 * row.efficiency_low:.1f} to {100 * row.efficiency_high:.1f} %"
        if unclaimed:
            why = "ranks shared cores or a GPU" if unclaimed[-1].oversubscribed else "see the notes"
            text += f"; not claimed at {', '.join(other.label for other in unclaimed)}: {why}"
        kind = "" if row.efficiency is None else _kind(row.efficiency)
        found.append(Tile(f"Efficiency at {row.label}", efficiency(row), text, kind))
    return found


def _losses(table: ScalingTable) -> list[Tile]:
    rows = [row for row in _largest(table) if row.losses]
    if not rows:
        return []
    row = max(rows, key=lambda row: row.ranks or 0)
    (phase, share), *others = sorted(row.losses.items(), key=lambda part: -part[1])
    name = f"Most lost at {row.label}"
    if share <= 0:
        return [Tile(name, "nothing", "no phase takes more than its part", "good")]
    more = "".join(f"; {LOSSES[other]} {100 * lost:.1f} %" for other, lost in others[:2])
    return [Tile(name, LOSSES[phase], f"{100 * share:.1f} % of the step{more}")]


def _pace(table: ScalingTable) -> list[Tile]:
    """Return the tiles with throughput and step time of one run; empty for several runs."""
    row = table.rows[0]
    if len(table.rows) > 1 or row.step_time_s is None:
        return []
    found = [Tile("Step time", time_text(row.step_time_s), f"spread {time_text(row.step_time_s_spread)}")]
    if row.throughput is not None:
        used = "" if row.mfu_palm is None else f"; MFU {percent(row.mfu_palm)}"
        per_rank = f"{rate(row.throughput_per_rank)} per rank{used}"
        found.insert(0, Tile("Throughput", f"{rate(row.throughput)} {table.unit}/s", per_rank))
    return found


def _slow_rank(table: ScalingTable) -> list[Tile]:
    if not any(found.rank_times is not None for found in table.details):
        return []
    found = chosen(table.details)
    slow = slow_rank_rows(found)
    if not slow:
        net = found.rank_times is not None and found.rank_times.is_net
        how = "own times agree within their spread" if net else "as far as step times and waits for data show it"
        return [Tile("Ranks slow throughout", "none", how, "good")]
    row = slow[0]
    excess_s, cause = row.time.excess_s, ""
    if not row.time.is_slow:
        excess_s, cause = row.time.wait_excess_s or 0.0, ", waiting for data"
    on = "" if row.host is None else f"on {row.host}, "
    text = f"{on}+{1000 * excess_s:.3g} ms, {percent(excess_s / found.step_time_s)} of the step time{cause}"
    more = f"; {len(slow) - 1} more" if len(slow) > 1 else ""
    return [Tile("Slow rank", f"rank {row.time.rank}", f"{text}, {found.label}{more}", "bad")]


def _money(table: ScalingTable) -> list[Tile]:
    rows = [row for row in table.rows if row.goodput is not None]
    if not rows:
        return []
    worst = min(rows, key=lambda row: row.goodput or 0.0)
    spent = {part: worst.parts_s.get(part, 0.0) for part in PARTS if part not in ("steps", "fewer", "waiting")}
    part = max(spent, key=lambda name: spent[name])
    whole = sum(worst.parts_s.values())  # As in the bars, the wait for nodes is included.
    most = f"{PARTS[part]} {percent(spent[part] / whole)} of the whole time" if whole else ""
    of = f" at {worst.label}" if len(rows) > 1 else ""
    found = [Tile(f"Goodput{of}", percent(worst.goodput), most, _kind(worst.goodput or 0.0))]
    hours = [row.gpu_hours for row in rows if row.gpu_hours is not None]
    costs = [row.cost for row in rows if row.cost is not None]
    if costs:
        found.append(Tile("Cost", figure(sum(costs), "{:,.2f}"), f"{sum(hours):,.2f} GPU-hours"))
    elif hours:
        found.append(Tile("GPU-hours", figure(sum(hours), "{:,.2f}"), ""))
    return found


def _kind(share: float) -> str:
    return "good" if share >= GOOD else "bad" if share < POOR else ""
