"""The report as one HTML page: no script, nothing from elsewhere, light and dark."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from launch.errors import counted
from launch.report.goodput import CAUSES, DEFINITION, PARTS
from launch.report.notes import (
    amount,
    hours_by_cause,
    loss_cells,
    percent,
    percentages,
    rate,
    run_time,
    seconds,
    told,
    units,
)
from launch.report.steps import LOSSES
from launch.report.table import Row, RunDetail, ScalingTable
from launch.report.views.charts import Mark, color, escape, grid, heat_map, histogram, line_chart, number, section
from launch.report.views.text import columns, efficiency, gpu_cells, host_cells, times_cells

# The style of the page: colors for light and dark, of which the series' are told apart by the color-blind.


CSS = """\
:root { color-scheme: light dark; --paper: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --quiet: #57606a;
  --line: #d5dae0; --bad: #b3430a; --good: #00745a;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b4578d; --c4: #b87a00; --c5: #3a94c9; --c6: #444c56;
  --waiting: #b9c0c8; --fewer: #7fc8b0; --shutdown: #8b949e; --compile: #8a6fb0; --restore: #a0522d; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #0f1318; --card: #181d24; --ink: #e6e9ed; --quiet: #9aa4af; --line: #333b45; --bad: #ff9e64;
    --good: #4fd1a5; --c0: #4aa8e0; --c1: #f0803c; --c2: #2cc295; --c3: #dd8fbd; --c4: #e8b13c; --c5: #86c8ee;
    --c6: #c3cad2; --waiting: #57606a; --fewer: #2f7d68; --shutdown: #7d8691; --compile: #b59add;
    --restore: #d08a62; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 20px 24px 48px; background: var(--paper); color: var(--ink);
  font: 15px/1.45 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 6px; } h2 { font-size: 18px; margin: 34px 0 8px; }
h3 { font-size: 15px; margin: 0 0 8px; }
.grid + h3 { margin-top: 16px; } p { margin: 4px 0; } .quiet { color: var(--quiet); font-size: 13px; }
.grid { display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 400px), 1fr)); }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; }
.card { min-width: 0; max-width: 640px; } .wide { max-width: none; grid-column: 1 / -1; }
.tiles { display: grid; gap: 12px; margin: 18px 0 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 200px), 1fr)); }
.tile b { display: block; font-size: 22px; line-height: 1.3; }
.tile small { color: var(--quiet); font-size: 13px; } .bad b { color: var(--bad); } .good b { color: var(--good); }
.tile .name { font-size: 13px; font-weight: 600; }
svg { display: block; width: 100%; height: auto; font: 12px system-ui, "Liberation Sans", sans-serif;
  fill: var(--ink); }
svg .axis { fill: var(--quiet); } svg .rule { stroke: var(--line); fill: none; }
svg .ideal { stroke: var(--quiet); stroke-dasharray: 5 4; fill: none; }
svg .heat { image-rendering: pixelated; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 16px; list-style: none; margin: 8px 0 0; padding: 0;
  font-size: 13px; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 2px; margin-right: 6px;
  vertical-align: -1px; }
.bar { display: grid; grid-template-columns: minmax(90px, 170px) 1fr; gap: 10px; align-items: center; margin: 6px 0; }
.bar > span { font-size: 13px; }
.bar > div { display: flex; height: 26px; border-radius: 4px; overflow: hidden; background: var(--line); }
.bar i { font-style: normal; font-size: 12px; font-weight: 600; color: var(--paper); overflow: hidden;
  text-align: center; line-height: 26px; white-space: nowrap; }
.bar .pale { color: var(--ink); }
.fall { display: grid; grid-template-columns: minmax(110px, 34%) 1fr 62px; gap: 2px 10px; align-items: center;
  font-size: 13px; }
.fall > div { position: relative; height: 18px; border-left: 1px solid var(--line);
  border-right: 1px dashed var(--quiet); }
.fall i { position: absolute; top: 1px; bottom: 1px; border-radius: 2px; min-width: 1px; }
.fall b { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; } .total { font-weight: 700; }
.causes { grid-template-columns: minmax(110px, 34%) 1fr 116px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 13px; }
th, td { padding: 5px 10px; text-align: left; border-bottom: 1px solid var(--line); vertical-align: bottom;
  overflow-wrap: normal; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
td:first-child { font-weight: 600; }
td:first-child:not(.n) { min-width: 130px; overflow-wrap: anywhere; } ul { padding-left: 20px; } li { margin: 4px 0; }
.tabs > input { position: absolute; opacity: 0; }
.tabs > label { display: inline-block; max-width: 100%; padding: 5px 12px; margin: 0 6px 8px 0;
  border: 1px solid var(--line); border-radius: 16px; font-size: 13px; cursor: pointer; }
.tabs > input:checked + label { background: var(--c0); border-color: var(--c0); color: var(--paper); font-weight: 600; }
.tabs > input:focus-visible + label { outline: 2px solid var(--c1); outline-offset: 2px; }
.tabs > .pane { display: none; } details summary { cursor: pointer; margin: 10px 0; }
"""


# Tables and notes of the page, with the same cells as in Markdown.


def html_table(head: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[bool]) -> str:
    """Write a table; on a narrow screen it scrolls by itself."""
    kinds = [' class="n"' if is_number else "" for is_number in numbers]
    top = "".join(f"<th{kind}>{escape(cell)}</th>" for cell, kind in zip(head, kinds, strict=False))
    body = "".join(
        f"<tr>{''.join(f'<td{kind}>{escape(cell)}</td>' for cell, kind in zip(row, kinds, strict=False))}</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def table_sections(table: ScalingTable) -> list[str]:
    """Write the table of each kind of scaling, and that of times and costs."""
    shown = columns(table)
    head, numbers = [column.title.replace("\n", " ") for column in shown], [column.number for column in shown]
    found = [
        section(heading, html_table(head, [[column.cell(row) for column in shown] for row in rows], numbers))
        for heading, rows in table.sections()
    ]
    cells = times_cells(table)
    if cells:
        found.append(section("Time and cost", html_table(cells[0], cells[1:], [False] + [True] * (len(cells[0]) - 1))))
    for unit, rows in units(table.rows):
        cells = loss_cells(rows)
        heading = f"Interruptions, in {unit}-hours"
        found.append(section(heading, html_table(cells[0], cells[1:], [False] + [True] * (len(cells[0]) - 1))))
    gpus, hosts = gpu_cells(table), host_cells(table.gpus[0]) if len(table.gpus) == 1 else []
    for heading, cells in (("GPUs", gpus), ("GPUs by host", hosts)):
        if cells:
            found.append(section(heading, html_table(cells[0], cells[1:], [False] + [True] * (len(cells[0]) - 1))))
    return found


def notes_section(table: ScalingTable) -> str:
    """Write what the figures do and do not say."""
    items = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return section("Notes", f"<ul>{items}</ul>" if items else "")


# Ranks and step times of each point, one at a time: a reader chooses by radio buttons, which need no script.


MAX_BINS = 40
MARKED = ("50 %", "95 %", "99 %")
SHOWN_WITHOUT = "Fewer than two ranks recorded the same steps, so none is compared with the others."


def points_section(table: ScalingTable) -> str:
    """Show the ranks and the step times of one point at once, first of the one with the slowest rank."""
    if not table.details:
        return ""
    first = chosen(table.details)
    inputs, panes, rules = [], [], []
    for index, found in enumerate(table.details):
        checked = " checked" if found is first else ""
        inputs.append(
            f'<input type="radio" name="point" id="p{index}"{checked}><label for="p{index}">'
            f"{escape(found.label)}</label>"
        )
        panes.append(f'<div class="pane" id="d{index}">{_pane(found)}</div>')
        rules.append(f"#p{index}:checked ~ #d{index} {{ display: block; }}")
    style = f"<style>{' '.join(rules)}</style>"
    return section("Ranks and step times", style, f'<div class="tabs">{"".join(inputs)}{"".join(panes)}</div>')


def chosen(details: tuple[RunDetail, ...]) -> RunDetail:
    """Choose the point that is shown first: with the slow rank that costs most, else the last one with ranks."""
    slow = [(row.share, found) for found in details for row in found.slowest if row.time.is_slow or row.time.waits_long]
    with_ranks = [found for found in details if found.rank_times is not None] or list(details)
    return max(slow, key=lambda pair: pair[0])[1] if slow else with_ranks[-1]


def _pane(found: RunDetail) -> str:
    ranks = f'<p class="quiet">{SHOWN_WITHOUT}</p>'
    if found.rank_times is not None:
        net = "" if found.rank_times.is_net else " Waiting in collectives was not recorded, and hides a slow rank."
        lead = f'<p class="quiet">Own time of each rank above the median of all, over the run.{net}</p>'
        ranks = f"<h3>Ranks over the run</h3>{lead}{heat_map(found, found.rank_times)}"
    marks = dict(found.percentiles_s)
    bins = min(MAX_BINS, max(5, len(found.step_times_s) // 5))
    drawn = histogram(found.step_times_s, [(f"{name}: {seconds(marks[name])}", marks[name]) for name in MARKED], bins)
    times = f'<div class="card"><h3>Step times after warm-up</h3>{drawn}</div>'
    return grid([f'<div class="card">{ranks}</div>', times]) + _slowest(found)


def _slowest(found: RunDetail) -> str:
    if not found.slowest:
        return ""
    waits = any(row.time.data_wait_s is not None for row in found.slowest)
    head = ["rank", "host", "own time", "above the median of the others", "of the step time"]
    cells = [
        [str(row.time.rank), row.host or "unavailable", seconds(row.time.own_s)]
        + [f"{1000 * row.time.excess_s:.3g} ms", percent(row.share)]
        + ([seconds(row.time.data_wait_s)] if waits else [])
        for row in found.slowest
    ]
    numbers = [True, False, True, True, True, True]
    return "<h3>Slowest ranks</h3>" + html_table([*head, "data wait"] if waits else head, cells, numbers)


# The first line of the page: how well it scaled, what was lost to what, which rank is slow, and what it cost.


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
        if row.efficiency_low is not None and row.efficiency_high is not None:
            ends = f"{100 * row.efficiency_low:.1f} to {100 * row.efficiency_high:.1f} %"
            speedup = f"{speedup}; 95 % interval {ends}"
        text = speedup + _unclaimed(table, row)
        found.append(Tile(f"Efficiency at {row.label}", efficiency(row), text, _kind(row.efficiency)))
    return found


def _losses(table: ScalingTable) -> list[Tile]:
    rows = [row for row in _largest(table) if row.losses]
    if not rows:
        return []
    row = max(rows, key=lambda row: row.ranks or 0)
    parts = sorted(row.losses.items(), key=lambda part: -part[1])
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
        return [Tile("Ranks slow throughout", "none", how, "good")]
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
    spent = {part: worst.parts_s.get(part, 0.0) for part in PARTS if part not in ("steps", "fewer", "waiting")}
    part = max(spent, key=lambda name: spent[name])
    whole = sum(worst.parts_s.values())  # as the bars: the wait for nodes included
    most = f"{PARTS[part]} {percent(spent[part] / whole)} of the whole time" if whole else ""
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


# Losses of efficiency, the time of a run by part, and the costs of interruptions: bars that add up to the whole.


LOSS_COLORS = {
    "communication": "var(--c0)",
    "stragglers": "var(--c1)",
    "data": "var(--c3)",
    "bubble": "var(--c4)",
    "optimizer": "var(--c5)",
    "computation": "var(--c6)",
}
PART_COLORS = {
    "waiting": "var(--waiting)",
    "start": "var(--c4)",
    "compile": "var(--compile)",
    "restore": "var(--restore)",
    "steps": "var(--c2)",
    "fewer": "var(--fewer)",
    "lost": "var(--c1)",
    "saves": "var(--c0)",
    "evaluations": "var(--c5)",
    "restarts": "var(--c3)",
    "shutdown": "var(--shutdown)",
    "other": "var(--c6)",
}
SHOWN = 6
"""Waterfalls that are open at once: of the largest points."""
LEAST_LABELLED = 7.0
"""Percent of a bar from which a part has room for its number."""


def losses_section(table: ScalingTable) -> str:
    """Draw the waterfall of each point from the ideal to its efficiency, the largest points first."""
    rows = [row for row in table.rows if row.losses]
    rows.sort(key=lambda row: -(row.ranks or 0))
    most = max((_most(row) for row in rows), default=100.0)  # of all: bars of two points can be held side by side
    falls = [_waterfall(row, most) for row in rows]
    more = f"<details><summary>{len(falls) - SHOWN} more points</summary>{grid(falls[SHOWN:])}</details>"
    lead = (
        "From 100 % at the smallest point down to the efficiency of each: what every phase of a step takes beyond its "
        "part of the ideal step. The parts add up; + is what was gained."
    )
    return section("What was lost to what", grid(falls[:SHOWN]), more if len(falls) > SHOWN else "", lead=lead)


def _most(row: Row) -> float:
    """Return the percentage that no bar of a waterfall passes: the ideal with all that was gained."""
    return 100 * (1 + sum(-share for share in row.losses.values() if share < 0))


def _waterfall(row: Row, most: float) -> str:
    assert row.efficiency is not None
    parts = row.losses
    texts = percentages([*parts.values(), row.efficiency])
    lines, at = [_line("ideal", 0, 100, most, "var(--line)", "100.0 %", total=True)], 100.0
    for (phase, share), text in zip(parts.items(), texts, strict=False):
        to = at - 100 * share
        sign = "" if float(text) == 0 else "+" if share < 0 else "−"  # noqa: RUF001 - a minus sign for readers
        told = f"{sign}{text.removeprefix('-')} %"
        lines.append(_line(LOSSES[phase], min(at, to), max(at, to), most, LOSS_COLORS[phase], told))
        at = to
    lines.append(_line("efficiency", 0, 100 * row.efficiency, most, "var(--c2)", f"{texts[-1]} %", total=True))
    head = f"<h3>{escape(row.label)}</h3>"
    return f'<div class="card">{head}<div class="fall">{"".join(lines)}</div></div>'


def _line(name: str, low: float, high: float, most: float, color: str, text: str, total: bool = False) -> str:
    kind = ' class="total"' if total else ""
    place = f"left:{number(100 * max(low, 0) / most)}%;width:{number(100 * (high - max(low, 0)) / most)}%"
    bar = f'<div><i style="{place};background:{color}"></i></div>'
    return f"<span{kind}>{escape(name)}</span>{bar}<b>{escape(text)}</b>"


def times_section(table: ScalingTable) -> str:
    """Draw one bar a run: the share of each part in its time, from the submission to the end."""
    rows = [row for row in table.rows if row.goodput is not None]
    if not rows:
        return ""
    bars = "".join(map(_bar, rows))
    parts = [part for part in PARTS if any(row.parts_s.get(part) for row in rows)]
    legend = "".join(f'<li><i style="background:{PART_COLORS[part]}"></i>{escape(PARTS[part])}</li>' for part in parts)
    block = f'<div class="card wide">{bars}<ul class="legend">{legend}</ul></div>'
    lead = "The time of each run from its submission to its end, over all attempts. The parts add up to 100.0 %."
    return section("Where the time went", block, lead=lead)


def _bar(row: Row) -> str:
    parts = {part: row.parts_s.get(part, 0.0) for part in PARTS if row.parts_s.get(part)}
    total = sum(parts.values())
    pieces = []
    for (part, spent), text in zip(parts.items(), percentages([v / total for v in parts.values()]), strict=True):
        share = 100 * spent / total
        told = f"{text} %" if share >= LEAST_LABELLED else ""
        style = f"width:{share:.4f}%;background:{PART_COLORS[part]}"
        title = f"{PARTS[part]}: {run_time(spent)}, {text} %"
        quiet = ' class="pale"' if part == "waiting" else ""
        pieces.append(f'<i{quiet} style="{style}" title="{escape(title)}" data-share="{text}">{told}</i>')
    return f'<div class="bar"><span>{escape(row.label)}</span><div>{"".join(pieces)}</div></div>'


def interruptions_section(table: ScalingTable) -> str:
    """Draw a bar for each cause of interruptions: what it cost all runs of the report together."""
    cards = []
    for unit, rows in units(table.rows):
        causes = hours_by_cause(rows)
        saved = sum(row.saved_in_place_h or 0.0 for row in rows)
        most = max(saved, *causes.values())
        whole = sum(row.interrupted_h or 0.0 for row in rows)
        lines = [
            _line(CAUSES[cause], 0, hours, most, "var(--c1)", told(hours, f"{unit}-h"))
            for cause, hours in sorted(causes.items(), key=lambda cause: -cause[1])
        ]
        lines.append(f'<span class="total">in all</span><div></div><b class="total">{told(whole, f"{unit}-h")}</b>')
        if any(row.saved_in_place_h is not None for row in rows):
            text = told(saved, f"{unit}-h")
            lines.append(_line("saved in place, estimate", 0, max(saved, 0.0), most, "var(--c2)", text))
        cards.append(f'<div class="card"><div class="fall causes">{"".join(lines)}</div></div>')
    lead = f"Lost to each cause, over all runs of this report: {DEFINITION}."
    return section("What interruptions cost", grid(cards), lead=lead)


# Throughput and efficiency over the number of ranks, or what a program tells instead.


Triple = tuple[float | None, float | None, float | None]


def scaling_section(table: ScalingTable) -> str:
    """Draw what was measured and what follows from it; empty for one point, which scales nothing."""
    if not table.is_scaling:
        return ""
    unit = table.unit
    charts = [
        _chart(table, f"{unit} per second", lambda r: (r.throughput_low, r.throughput, r.throughput_high), _rate, True),
        _chart(table, "efficiency, %", _efficiency, lambda row: efficiency(row), False),
    ]
    if not any(charts):
        charts = [
            _chart(table, "step time, s", _step_times, lambda row: seconds(row.step_time_s), True),
            _chart(table, "run time, s", lambda r: (r.run_time_s,) * 3, lambda r: run_time(r.run_time_s), True),
            _chart(table, "speedup", lambda r: (r.speedup,) * 3, lambda row: f"{row.speedup:.2f}", False),
        ]
        charts = charts[1:] if table.compares_run_times else [charts[0], charts[2]]
    return section("How well it scales", grid(charts), _legend(table))


def _rate(row: Row) -> str:
    return f"{rate(row.throughput)} {row.unit or 'units'}/s"


def _step_times(row: Row) -> Triple:
    return row.step_time_s_low, row.step_time_s, row.step_time_s_high


def _efficiency(row: Row) -> Triple:
    """Return the efficiency in percent, and its 95 % interval."""
    if row.efficiency is None:
        return None, None, None
    ends = (row.efficiency_low, row.efficiency, row.efficiency_high)
    low, middle, high = (100 * (row.efficiency if end is None else end) for end in ends)
    return low, middle, high


def _chart(
    table: ScalingTable, name: str, values: Callable[[Row], Triple], text: Callable[[Row], str], log: bool
) -> str:
    """Draw one figure of all series; empty where no two points of a series have it."""
    found = [_marks(rows, values, text) for rows in _by_series(table).values()]
    if not any(len(marks) > 1 for marks in found):
        return ""
    is_efficiency = name.startswith("efficiency")
    ideal: list[list[tuple[float, float]]] = []
    if is_efficiency:
        sizes = [mark.x for marks in found for mark in marks]
        ideal = [[(min(sizes), 100.0), (max(sizes), 100.0)]]
    elif name.endswith("per second"):
        lines = [
            [(float(row.ranks or 0), row.throughput_ideal) for row in rows if row.throughput_ideal is not None]
            for rows in _by_series(table).values()
        ]
        ideal = [line for line in lines if len(line) > 1]
    drawn = line_chart(found, ideal, ("ranks", name), lambda value: _short(value), log)
    return f'<div class="card">{drawn}</div>'


def _marks(rows: Sequence[Row], values: Callable[[Row], Triple], text: Callable[[Row], str]) -> list[Mark]:
    marks = []
    for row in rows:
        low, value, high = values(row)
        if row.ranks is not None and value is not None:
            ends = (value if low is None else low, value, value if high is None else high)
            marks.append(Mark(row.ranks, *ends, text=f"{row.label}: {text(row)}", hollow=bool(row.oversubscribed)))
    return marks


def _by_series(table: ScalingTable) -> dict[tuple[str | None, str], list[Row]]:
    """Rows of each curve, in the order of their colors."""
    found: dict[tuple[str | None, str], list[Row]] = {}
    for row in table.rows:
        found.setdefault((row.scaling, row.series), []).append(row)
    return found


def _legend(table: ScalingTable) -> str:
    curves = _by_series(table)
    kinds = {kind for kind, _ in curves}
    lines = []
    for index, (kind, series) in enumerate(curves):
        name = " ".join(filter(None, (series or "measured", f"({kind} scaling)" if len(kinds) > 1 and kind else "")))
        lines.append(f'<li><i style="background:{color(index)}"></i>{escape(name)}</li>')
    told = ["bars: between the quartiles", "dashed: ideal, from the smallest point"]
    if any(row.oversubscribed for row in table.rows):
        told.append("hollow: ranks shared cores or a GPU, and no efficiency is claimed")
    lines += [f'<li class="quiet">{escape(line)}</li>' for line in told]
    return f'<ul class="legend">{"".join(lines)}</ul>'


def _short(value: float) -> str:
    """Write a value of an axis: 500, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


# The report as one HTML page: no script, nothing from elsewhere, light and dark.


__all__ = ["page"]


def page(table: ScalingTable, reload_s: float | None = None) -> str:
    """Write the whole page of a report; with ``reload_s`` a browser loads it again after so many seconds."""
    reload = "" if reload_s is None else f'<meta http-equiv="refresh" content="{max(1, math.ceil(reload_s))}">\n'
    headings = [heading for heading, _ in table.sections()]
    title = headings[0] if len(headings) == 1 else table.title
    also = "".join(f"<p>{escape(heading)}</p>" for heading in headings) if len(headings) > 1 else ""
    chosen = f"<p>{escape(table.selection.text)}</p>" if table.selection.text else ""
    sections = [
        tiles(table),
        scaling_section(table),
        losses_section(table),
        times_section(table),
        interruptions_section(table),
        points_section(table),
        *table_sections(table),
        notes_section(table),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"{reload}"
        f"<title>{escape(title)}</title>\n<style>\n{CSS}</style>\n</head>\n<body>\n"
        f'<header><h1>{escape(title)}</h1>{also}<p class="quiet">{escape(table.conditions)}</p>{chosen}</header>\n'
        + "\n".join(section for section in sections if section)
        + "\n</body>\n</html>\n"
    )
