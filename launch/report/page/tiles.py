"""The first line of the page: how well it scaled, what was lost to what, which rank is slow, and what it cost."""

from __future__ import annotations

from dataclasses import dataclass

from launch.report.goodput import PARTS
from launch.report.losses import LOSSES
from launch.report.numbers import amount, percent, rate, seconds
from launch.report.page.html import escape
from launch.report.page.points import chosen
from launch.report.row import Row
from launch.report.table import ScalingTable
from launch.report.views import efficiency
from launch.runs.wording import counted

MAX_SERIES = 3
"""Series whose largest point gets a tile."""
GOOD, POOR = 0.9, 0.7
"""Efficiency or goodput from which a tile is green, and below which it is red."""


@dataclass(frozen=True)
class Tile:
    """A figure with its name and what else belongs to it."""

    name: str
    value: str
    text: str
    kind: str = ""


def tiles(table: ScalingTable) -> str:
    """Write the first line of the page."""
    found = [*_unread(table), *_scaling(table), *_losses(table), *_pace(table), *_slow_rank(table), *_money(table)]
    drawn = "".join(
        f'<div class="tile {tile.kind}"><span class="name">{escape(tile.name)}</span><b>{escape(tile.value)}</b>'
        f"<small>{escape(tile.text)}</small></div>"
        for tile in found
    )
    return f'<div class="tiles">{drawn}</div>'


def _unread(table: ScalingTable) -> list[Tile]:
    """Warn that records are lacking, before any figure."""
    rows = [row for row in table.rows if row.unread_lines]
    if not rows:
        return []
    more = f" and {counted(len(rows) - 1, 'other point')}" if len(rows) > 1 else ""
    lines = counted(sum(row.unread_lines for row in rows), "line")
    text = f"of step records at {rows[0].label}{more}; the figures may lack what they told: see the notes"
    return [Tile("Could not be read", lines, text, "bad")]


def _largest(table: ScalingTable) -> list[Row]:
    """The largest point of each series that claims an efficiency; where none does, that has anything to compare."""
    found: dict[tuple[str | None, str], Row] = {}
    for row in table.rows:
        if row.speedup is None or row.speedup == 1:
            continue
        before = found.get((row.scaling, row.series))
        if before is None or before.efficiency is None or row.efficiency is not None:
            found[row.scaling, row.series] = row
    return list(found.values())


def _unclaimed(table: ScalingTable, row: Row) -> str:
    """Say which larger points of the series of ``row`` claim no efficiency; empty where all do."""
    series = [other for other in table.rows if (other.scaling, other.series) == (row.scaling, row.series)]
    larger = [other for other in series[series.index(row) + 1 :] if other.speedup is not None]
    return f"; not claimed at {', '.join(other.label for other in larger)}: {_why(larger[-1])}" if larger else ""


def _why(row: Row) -> str:
    return "ranks shared cores or a GPU" if row.oversubscribed else "see the notes"


def _scaling(table: ScalingTable) -> list[Tile]:
    found = []
    for row in _largest(table)[:MAX_SERIES]:
        speedup = f"speedup {row.speedup:.2f} on {row.ranks} ranks"
        if row.efficiency is None:
            found.append(Tile(f"Efficiency at {row.label}", "not claimed", f"{speedup}; {_why(row)}"))
            continue
        if row.efficiency_ci_low is not None and row.efficiency_ci_high is not None:
            ends = f"{100 * row.efficiency_ci_low:.1f} to {100 * row.efficiency_ci_high:.1f} %"
            speedup = f"{speedup}; 95 % interval {ends}"
        text = speedup + _unclaimed(table, row)
        found.append(Tile(f"Efficiency at {row.label}", efficiency(row), text, _kind(row.efficiency)))
    return found


def _losses(table: ScalingTable) -> list[Tile]:
    rows = [row for row in _largest(table) if row.lost_to()]
    if not rows:
        return []
    row = max(rows, key=lambda row: row.ranks or 0)
    parts = sorted(row.lost_to().items(), key=lambda part: -part[1])
    phase, share = parts[0]
    others = ", ".join(f"{LOSSES[name]} {100 * other:.1f} %" for name, other in parts[1:3])
    name = f"Most lost at {row.label}"
    if share <= 0:
        return [Tile(name, "nothing", "no phase takes more than its part", "good")]
    return [Tile(name, LOSSES[phase], f"{100 * share:.1f} % of the step" + (f"; {others}" if others else ""))]


def _pace(table: ScalingTable) -> list[Tile]:
    """Tell the pace of a run alone."""
    row = table.rows[0]
    if len(table.rows) > 1 or row.step_time_s is None:
        return []
    found = [Tile("Step time", seconds(row.step_time_s), f"spread {seconds(row.step_time_s_spread)}")]
    if row.throughput is not None:
        used = "" if row.mfu_palm is None else f"; MFU {percent(row.mfu_palm)}"
        per_rank = f"{rate(row.throughput_per_rank)} per rank{used}"
        found.insert(0, Tile("Throughput", f"{rate(row.throughput)} {table.unit}/s", per_rank))
    return found


def _slow_rank(table: ScalingTable) -> list[Tile]:
    if not any(found.rank_times is not None for found in table.details):
        return []
    found = chosen(table.details)
    slow = [row for row in found.slowest if row.time.is_slow or row.time.waits_long]
    if not slow:
        net = found.rank_times is not None and found.rank_times.is_net
        how = "own times agree within their spread" if net else "as far as step times and waits for data show it"
        return [Tile("Slow ranks", "none", how, "good")]
    row = slow[0]
    more = f"; {len(slow) - 1} more" if len(slow) > 1 else ""
    excess_s, what = row.time.excess_s, "of the step time"
    if not row.time.is_slow:
        excess_s, what = row.time.wait_excess_s or 0.0, "of the step time, waiting for data"
    share = percent(excess_s / found.step_time_s)
    text = f"{'' if row.host is None else f'on {row.host}, '}+{1000 * excess_s:.3g} ms, {share} {what}, {found.label}"
    return [Tile("Slow rank", f"rank {row.time.rank}", text + more, "bad")]


def _money(table: ScalingTable) -> list[Tile]:
    rows = [row for row in table.rows if row.goodput is not None]
    if not rows:
        return []
    worst = min(rows, key=lambda row: row.goodput or 0.0)
    spent = {part: worst.part_s(part) or 0.0 for part in PARTS if part not in ("steps", "fewer", "waiting")}
    part = max(spent, key=lambda name: spent[name])
    allocated = sum(spent.values()) + (worst.steps_s or 0.0) + (worst.fewer_s or 0.0)
    most = f"{PARTS[part]} {percent(spent[part] / allocated)}" if allocated else ""
    of = f" at {worst.label}" if len(rows) > 1 else ""
    found = [Tile(f"Goodput{of}", percent(worst.goodput), most, _kind(worst.goodput or 0.0))]
    hours = [row.gpu_hours for row in rows if row.gpu_hours is not None]
    costs = [row.cost for row in rows if row.cost is not None]
    if hours:
        told = f"{amount(sum(hours))} GPU-hours"
        found.append(Tile("Cost", amount(sum(costs)), told) if costs else Tile("GPU-hours", amount(sum(hours)), ""))
    return found


def _kind(share: float) -> str:
    return "good" if share >= GOOD else "bad" if share < POOR else ""
