"""Losses of efficiency, the time of a run by part, and the costs of interruptions: bars that add up to the whole."""

from __future__ import annotations

from launch.report.goodput import PARTS
from launch.report.interruptions import CAUSES, DEFINITION
from launch.report.loss_tables import hours_by_cause, units
from launch.report.losses import LOSSES
from launch.report.numbers import percentages, run_time, told
from launch.report.page.html import escape, grid, number, section
from launch.report.row import Row
from launch.report.table import ScalingTable

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
    rows = [row for row in table.rows if row.lost_to()]
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
    return 100 * (1 + sum(-share for share in row.lost_to().values() if share < 0))


def _waterfall(row: Row, most: float) -> str:
    assert row.efficiency is not None
    parts = row.lost_to()
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
    parts = [part for part in PARTS if any(row.part_s(part) for row in rows)]
    legend = "".join(f'<li><i style="background:{PART_COLORS[part]}"></i>{escape(PARTS[part])}</li>' for part in parts)
    block = f'<div class="card wide">{bars}<ul class="legend">{legend}</ul></div>'
    lead = "The time of each run from its submission to its end, over all attempts. The parts add up to 100.0 %."
    return section("Where the time went", block, lead=lead)


def _bar(row: Row) -> str:
    parts = {part: row.part_s(part) or 0.0 for part in PARTS if row.part_s(part)}
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
