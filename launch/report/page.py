"""The report as one HTML page: a first line of tiles with figures, and the content of ``page.html.j2`` below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import StrictUndefined, Template

from launch.report.figures import (
    PALETTE,
    inline_svg,
    loss_panels,
    run_panels,
    scaling_panels,
    times_panels,
)
from launch.report.goodput import PARTS
from launch.report.notes import percent
from launch.report.steps import LOSSES
from launch.report.table import Row, RunDetail, ScalingTable
from launch.report.text import LEFT, efficiency, part_tables, point_tables, slowest_table

MAX_FALLS = 6
"""Largest number of waterfall panels, one for each of the largest points. The table of losses has all points."""
MAX_RUNS = 8
"""Largest number of runs whose ranks and step times are drawn, because each drawing takes some 50 ms and 20 kB."""


def page(table: ScalingTable, reload_s: float | None = None) -> str:
    """Return the HTML of a report's page. A browser reloads the page every ``reload_s`` seconds; never if None."""
    points = point_tables(table)
    text = Path(__file__).with_suffix(".html.j2").read_text()
    template = Template(text, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined)
    return template.render(
        table=table,
        reload_s=None if reload_s is None else max(1, math.ceil(reload_s)),
        title=points[0].heading if len(points) == 1 else table.title,
        palette=PALETTE,
        left=LEFT,
        tiles=tiles(table),
        scaling=scaling_panels(table),
        bars=[*loss_panels(table)[:MAX_FALLS], *times_panels(table)],
        runs=shown_runs(table.details),
        run_panels=run_panels,
        slowest=slowest_table,
        inline_svg=inline_svg,
        points=points,
        parts=part_tables(table),
    )


def shown_runs(details: Sequence[RunDetail]) -> list[RunDetail]:
    """Choose at most ``MAX_RUNS`` runs to draw: first the runs with the slowest ranks, then those with most ranks."""

    def worth(found: RunDetail) -> tuple[float, int]:
        slow = [row.share for row in found.slowest if row.time.is_slow]
        return max(slow, default=0.0), len(found.rank_times.ranks if found.rank_times else ())

    return sorted(details, key=worth, reverse=True)[:MAX_RUNS]


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
    return [*_scaling(table), *_losses(table), *_slow_rank(table), *_goodput(table)]


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
        if row.efficiency_low is not None and row.efficiency_high is not None:
            text += f"; 95 % interval {100 * row.efficiency_low:.1f} to {100 * row.efficiency_high:.1f} %"
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


def _slow_rank(table: ScalingTable) -> list[Tile]:
    worst = shown_runs(table.details)[:1]
    if not worst or (times := worst[0].rank_times) is None:
        return []
    slow = [row for row in worst[0].slowest if row.time.is_slow]
    if not slow:
        how = "own times agree within their spread" if times.is_net else "as far as step times show it"
        return [Tile("Ranks slow throughout", "none", how, "good")]
    row, on = slow[0], "" if slow[0].host is None else f"on {slow[0].host}, "
    more = f"; {len(slow) - 1} more" if len(slow) > 1 else ""
    text = f"{on}+{1000 * row.time.excess_s:.3g} ms, {percent(row.share)} of the step time, {worst[0].label}{more}"
    return [Tile("Slow rank", f"rank {row.time.rank}", text, "bad")]


def _goodput(table: ScalingTable) -> list[Tile]:
    rows = [row for row in table.rows if row.goodput is not None]
    if not rows:
        return []
    worst = min(rows, key=lambda row: row.goodput or 0.0)
    spent = {part: worst.parts_s.get(part, 0.0) for part in PARTS if part not in ("steps", "fewer", "waiting")}
    part = max(spent, key=lambda name: spent[name])
    whole = sum(worst.parts_s.values())  # As in the bars, the wait for nodes is included.
    most = f"{PARTS[part]} {percent(spent[part] / whole)} of the whole time" if whole else ""
    of = f" at {worst.label}" if len(rows) > 1 else ""
    return [Tile(f"Goodput{of}", percent(worst.goodput), most, _kind(worst.goodput or 0.0))]


def _kind(share: float) -> str:
    return "good" if share >= GOOD else "bad" if share < POOR else ""
