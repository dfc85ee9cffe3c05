"""Stacked bars of where the time of each run went.

Owns the drawing. Must not compute figures.
"""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import FigureBase

from launch.report.goodput import PARTS
from launch.report.row import Row
from launch.report.style import COLORS, GREY

PART_COLORS = {
    "waiting": "#CCCCCC",
    "start": COLORS[4],
    "compile": "#8A6FB0",
    "restore": "#A0522D",
    "steps": COLORS[2],
    "fewer": "#7FC8B0",
    "lost": COLORS[1],
    "saves": COLORS[0],
    "evaluations": COLORS[5],
    "restarts": COLORS[3],
    "shutdown": "#8C8C8C",
    "other": COLORS[6],
}
LEAST_LABELLED = 0.06
"""Share of a bar from which it has room for its percentage."""
BAR_INCHES = 0.32
MAX_BARS = 24
"""Runs that get a bar; of more the first ones do, and scaling.csv has all."""


def height(rows: Sequence[Row]) -> float:
    """Inches that the bars of these rows need."""
    return max(1.7, 1.0 + BAR_INCHES * min(len(rows), MAX_BARS))  # the legend takes as much


def draw_times(figure: FigureBase, rows: Sequence[Row]) -> None:
    """Draw one bar a run: the share of each part in its time, from the submission to the end."""
    axes = figure.subplots()
    axes.set_title("Where the time went", fontsize=11)
    shown = rows[:MAX_BARS]
    left = [0.0] * len(shown)
    totals = [sum(row.part_s(part) or 0.0 for part in PARTS) for row in shown]
    for part, name in PARTS.items():
        widths = [100 * (row.part_s(part) or 0.0) / total for row, total in zip(shown, totals, strict=True)]
        if not any(widths):
            continue
        axes.barh(range(len(shown)), widths, left=left, height=0.7, color=PART_COLORS[part], label=name)
        for at, (start, width) in enumerate(zip(left, widths, strict=True)):
            if width >= 100 * LEAST_LABELLED:
                light = part in ("waiting", "start", "evaluations")
                color = "black" if light else "white"
                axes.text(start + width / 2, at, f"{width:.1f} %", ha="center", va="center", fontsize=8, color=color)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(shown)), [row.label or row.point for row in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the time since the submission", fontsize=9, color=GREY)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8)
