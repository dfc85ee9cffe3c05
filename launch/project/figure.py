"""The picture of a projection: throughput against the ideal line, and efficiency, measured apart from projected.

Owns the drawing. Must not compute figures.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from launch.project.projection import Projection, Row
from launch.project.views import heading, lines
from launch.report.style import COLORS, GREY

MOST_TICKS = 9


def draw(found: Projection) -> bytes:
    """Draw the figure and return it as PNG."""
    figure = Figure(figsize=(11.0, 5.4), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    figure.suptitle(heading(found), fontsize=13, fontweight="bold", x=0.01, ha="left")
    told = "\n".join(line for text in lines(found)[:3] for line in textwrap.wrap(text, 170))
    figure.supxlabel(told, fontsize=8, color=GREY, x=0.01, ha="left")
    left, right = figure.subplots(1, 2)
    measured = [row for row in found.rows if row.is_measured]
    projected = [row for row in found.rows if not row.is_measured and not row.refused]
    if measured[0].throughput is not None:
        draw_throughput(left, found, measured, projected)
    else:
        draw_step_times(left, measured, projected)
    draw_efficiency(right, measured, projected)
    for axes in (left, right):
        style(axes, [*measured, *projected])
    left.legend(loc="best", framealpha=0.9, edgecolor="none", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def draw_throughput(axes: Axes, found: Projection, measured: Sequence[Row], projected: Sequence[Row]) -> None:
    """Work per second over nodes, both by factors."""
    axes.set_title("Throughput", fontsize=11)
    axes.set_ylabel(f"{found.unit} per second")
    axes.set_yscale("log")
    first = measured[0]
    assert first.throughput is not None
    each = first.throughput / first.nodes
    every = [row.nodes for row in (*measured, *projected)]
    ends = [min(every), max(every)]
    axes.plot(ends, [each * n for n in ends], linestyle=(0, (4, 3)), linewidth=1.3, color=GREY, label="ideal")
    band = [(row.nodes, row.throughput, row.step_s, row.low_s, row.high_s) for row in projected]
    axes.fill_between(
        [n for n, *_ in band],
        [t * s / high for _, t, s, _, high in band if t and s and high],
        [t * s / low for _, t, s, low, _ in band if t and s and low],
        color=COLORS[1],
        alpha=0.15,
        linewidth=0,
    )
    plot(axes, projected, [row.throughput for row in projected], is_measured=False)
    plot(axes, measured, [row.throughput for row in measured], is_measured=True)


def draw_step_times(axes: Axes, measured: Sequence[Row], projected: Sequence[Row]) -> None:
    """Seconds of a step over nodes, where no work is known."""
    axes.set_title("Step time", fontsize=11)
    axes.set_ylabel("seconds")
    plot(axes, projected, [row.step_s for row in projected], is_measured=False)
    plot(axes, measured, [row.step_s for row in measured], is_measured=True)


def draw_efficiency(axes: Axes, measured: Sequence[Row], projected: Sequence[Row]) -> None:
    """Efficiency over nodes, with the share that failures leave where that is known."""
    axes.set_title("Efficiency", fontsize=11)
    axes.set_ylabel("of the smallest point's throughput per rank, %")
    plot(axes, projected, [100 * (row.efficiency or 0) for row in projected], is_measured=False)
    plot(axes, measured, [100 * (row.efficiency or 0) for row in measured], is_measured=True)
    left = [(row.nodes, 100 * row.efficiency * row.goodput) for row in projected if row.efficiency and row.goodput]
    if left:
        axes.plot(*zip(*left, strict=True), color=COLORS[2], linestyle=":", label="with failures")
        axes.legend(loc="lower left", framealpha=0.9, edgecolor="none", fontsize=9)
    axes.set_ylim(0, max(105.0, axes.get_ylim()[1]))


def plot(axes: Axes, rows: Sequence[Row], values: Sequence[float | None], *, is_measured: bool) -> None:
    """Points of one kind: measured ones are filled, projected ones hollow and joined by dashes."""
    color = COLORS[0] if is_measured else COLORS[1]
    axes.plot(
        [row.nodes for row in rows],
        [float("nan") if value is None else value for value in values],
        color=color,
        marker="o",
        linestyle="-" if is_measured else "--",
        markerfacecolor=color if is_measured else "white",
        linewidth=1.6,
        label="measured" if is_measured else "projected",
        zorder=3 if is_measured else 2,
    )


def style(axes: Axes, rows: Sequence[Row]) -> None:
    """Nodes by factors of two, each size named as far as there is room."""
    axes.set_xscale("log", base=2)
    axes.set_xlabel("nodes")
    sizes = sorted({row.nodes for row in rows})
    every = -(-len(sizes) // MOST_TICKS)
    axes.xaxis.set_major_locator(FixedLocator(sizes[::-1][::every][::-1]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.grid(True, axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
