"""The figure of one run: how its step times are distributed, and which ranks lag behind the others, when.

Owns the drawing. Must not compute figures.
"""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import FigureBase

from launch.report.details import RunDetail
from launch.report.readings import LEAST_SHARE, RankTimes
from launch.report.style import COLORS, GREY

BINS = 40
NAMED_RANKS = 4
"""Slow ranks whose rows get a label: more would cover each other."""


def draw_run(figure: FigureBase, found: RunDetail) -> None:
    """Draw the panels of one run: the distribution of step times and, with several ranks, the heat map."""
    if found.rank_times is None:
        axes = figure.subplots(1, 2)
        _draw_distribution(axes[0], found)
        _draw_over_steps(axes[1], found)
    else:
        axes = figure.subplots(1, 2, width_ratios=(2, 3))
        _draw_distribution(axes[0], found)
        draw_heat_map(figure, axes[1], found, found.rank_times)


def _draw_distribution(axes: Axes, found: RunDetail) -> None:
    axes.set_title("Step times after warm-up", fontsize=11)
    axes.set_xlabel("seconds")
    axes.set_ylabel("steps")
    axes.hist(found.step_times_s, bins=min(BINS, max(5, len(found.step_times_s) // 5)), color=COLORS[0], alpha=0.85)
    marks = dict(found.percentiles_s)
    for name, style in (("50 %", "-"), ("95 %", "--")):
        axes.axvline(marks[name], color=COLORS[1], linestyle=style, linewidth=1.4, label=f"{name}: {marks[name]:.4g} s")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.2)  # room for the legend
    axes.legend(loc="upper right", framealpha=0.9, edgecolor="none", fontsize=9)
    _style(axes)


def _draw_over_steps(axes: Axes, found: RunDetail) -> None:
    axes.set_title("Step time over the run", fontsize=11)
    axes.set_xlabel("steps after warm-up")
    axes.set_ylabel("seconds")
    axes.plot(range(1, len(found.step_times_s) + 1), found.step_times_s, color=COLORS[0], linewidth=0.9)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    _style(axes)


def draw_heat_map(figure: FigureBase, axes: Axes, found: RunDetail, times: RankTimes) -> None:
    """Ranks from top to bottom, the run from left to right; the color is the time above the median of all ranks."""
    axes.set_title("Own time of each rank above the median of all", fontsize=11)
    axes.set_xlabel("step")
    axes.set_ylabel("rank")
    in_ms = [[1000 * value for value in row] for row in times.excess_s]
    # Not less than what is worth naming, or the noise of a healthy run looks like a finding.
    limit = max(1000 * LEAST_SHARE * found.step_time_s, *(abs(value) for row in in_ms for value in row))
    extent = (times.windows[0][0], times.windows[-1][1], len(in_ms) - 0.5, -0.5)
    image = axes.imshow(
        in_ms,
        aspect="auto",
        cmap="RdBu_r",
        vmin=-limit,
        vmax=limit,
        extent=extent,
        interpolation="nearest",
        # The pixels take values, and then colors. Where rows are thinner than three pixels matplotlib would look up
        # colors first: with the nearest value it is the same picture, and takes 17 MB more.
        interpolation_stage="data",
    )
    figure.colorbar(image, ax=axes, label="ms")
    places = {rank.rank: row for row, rank in enumerate(times.ranks)}
    labels = axes.get_yticks()
    shown = [row for row in labels if 0 <= row < len(in_ms) and row == int(row)]
    axes.set_yticks(shown, [str(times.ranks[int(row)].rank) for row in shown])
    slow = [row for row in found.slowest if row.time.is_slow or row.time.waits_long][:NAMED_RANKS]
    for row in slow:
        # A row of a thousand is thinner than a pixel.
        axes.plot(extent[0], places[row.time.rank], marker=">", color=COLORS[1], markersize=6, clip_on=False)
        on = "" if row.host is None else f", {row.host}"
        axes.annotate(
            f"rank {row.time.rank}{on}",
            (extent[0], places[row.time.rank]),
            xytext=(6, -10 if places[row.time.rank] < len(in_ms) / 2 else 8),
            textcoords="offset points",
            va="center",
            fontsize=9,
            bbox={"facecolor": "white", "edgecolor": GREY, "pad": 1.5, "alpha": 0.9},
        )


def _style(axes: Axes) -> None:
    axes.grid(True, axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
