"""Figures of a report: scaling, one run, and where the time went."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure, FigureBase
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from launch.report.goodput import PARTS
from launch.report.steps import LEAST_SHARE, RankTimes
from launch.report.table import Row, RunDetail, ScalingTable
from launch.report.views.text import efficiency

# Colors that the figures of a report share.


COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Told apart by the colour-blind (Okabe and Ito, Color Universal Design, 2008), without their yellow."""
GREY = "#595959"


# Stacked bars of where the time of each run went.


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
    totals = [sum(row.parts_s.get(part, 0.0) for part in PARTS) for row in shown]
    for part, name in PARTS.items():
        widths = [100 * (row.parts_s.get(part, 0.0)) / total for row, total in zip(shown, totals, strict=True)]
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


# The figure of one run: how its step times are distributed, and which ranks lag behind the others, when.


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
    _style_run(axes)


def _draw_over_steps(axes: Axes, found: RunDetail) -> None:
    axes.set_title("Step time over the run", fontsize=11)
    axes.set_xlabel("steps after warm-up")
    axes.set_ylabel("seconds")
    axes.plot(range(1, len(found.step_times_s) + 1), found.step_times_s, color=COLORS[0], linewidth=0.9)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)
    _style_run(axes)


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


def _style_run(axes: Axes) -> None:
    axes.grid(True, axis="y", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# The figure of a scaling report: throughput over ranks against the ideal, and what that is in efficiency.


MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
IDEAL: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.3, "zorder": 1}
LABEL: dict[str, Any] = {"fontsize": 8, "color": GREY, "ha": "center", "va": "bottom"}
LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
MAX_LABELS = 4  # more labels at points than this cover each other; the legend explains the hollow ones anyway

SeriesRows = Mapping[str, Sequence[Row]]


def draw(table: ScalingTable) -> dict[str, bytes]:
    """Draw the figure and return it as ``png`` and as ``svg``; the same table gives the same bytes."""
    timed = [row for row in table.rows if row.goodput is not None]
    inches = height(timed) if timed else 0.0
    figure = Figure(figsize=(11.0, 5.2 + inches), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    series = _with_figures(table)
    heading = "\n".join(heading for heading, _ in table.sections())
    figure.suptitle(heading, fontsize=13, fontweight="bold", x=0.01, ha="left")
    conditions = "\n".join(textwrap.wrap(table.conditions, 160))
    figure.supxlabel(conditions, fontsize=8, color=GREY, x=0.01, ha="left")
    above: FigureBase = figure
    if timed:
        panes: Any = figure.subfigures(2, 1, height_ratios=(5.2, inches))
        above, below = panes
        draw_times(below, timed)
    if len(table.rows) == 1 and table.details:
        draw_run(above, table.details[0])
    elif series:
        _draw_panels(above, table, series)
    else:
        above.text(0.5, 0.5, "no point has enough steps for a figure yet", ha="center", fontsize=12, color=GREY)
    _lay_out(figure)
    return {"png": _png(figure), "svg": _svg(figure)}


def draw_ranks(found: RunDetail) -> bytes | None:
    """Draw the heat map of one run, ranks by time, as PNG; None where fewer than two ranks are compared."""
    if found.rank_times is None:
        return None
    figure = Figure(figsize=(7.0, 4.0), dpi=120, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08))
    FigureCanvasAgg(figure)
    draw_heat_map(figure, figure.subplots(), found, found.rank_times)
    _lay_out(figure)
    return _png(figure)


def _lay_out(figure: Figure) -> None:
    """Place all there is, once for all files: ``savefig`` would do it for each, and draw each twice to that end."""
    engine = figure.get_layout_engine()
    assert engine is not None
    if figure.axes:  # matplotlib warns of a figure that is text alone
        engine.execute(figure)
    figure.set_layout_engine("none")


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    FigureCanvasAgg(figure).print_png(file, metadata={"Software": None})
    return file.getvalue()


def _svg(figure: Figure) -> bytes:
    file = io.StringIO()
    # Else identifiers inside the SVG are random; and text stays text, which a reader can search.
    with rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        FigureCanvasSVG(figure).print_svg(file, metadata={"Date": None, "Creator": None})
    return file.getvalue().encode()


def _with_figures(table: ScalingTable) -> dict[str, list[Row]]:
    """Series -> its rows that have figures."""
    series: dict[str, list[Row]] = {}
    for row in table.rows:
        if (row.run_time_s if table.compares_run_times else row.step_time_s) is not None and row.ranks is not None:
            series.setdefault(row.series, []).append(row)
    return series


def _panels(table: ScalingTable, series: SeriesRows) -> list[Callable[[Axes], None]]:
    """Choose one or two panels: what was measured, and what follows from it."""
    rows = [row for of_series in series.values() for row in of_series]
    rates = partial(_draw_rates, series=series, unit=table.unit)
    speedups = partial(_draw_speedups, series=series, of="run times" if table.compares_run_times else "step times")
    efficiencies = partial(_draw_efficiency, series=series, unit=table.unit)
    # The smallest point's own 100 % is no finding.
    has_speedup = any(row.speedup not in (None, 1) for row in rows)
    has_efficiency = has_speedup and any(row.efficiency is not None and row.speedup != 1 for row in rows)
    if table.compares_run_times:
        further = [efficiencies] if has_efficiency else [speedups] if has_speedup else []
        return [partial(_draw_run_times, series=series), *further]
    first = [rates] if any(row.throughput is not None for row in rows) else [speedups] if has_speedup else []
    return [*first, efficiencies if has_efficiency else partial(_draw_step_times, series=series)]


def _draw_panels(figure: FigureBase, table: ScalingTable, series: SeriesRows) -> None:
    panels = _panels(table, series)
    rows = [row for of_series in series.values() for row in of_series]
    every = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(every, panels, strict=True):
        panel(axes)
    left = every[0]
    for axes in every:
        _style(axes, rows)
    handles = _legend(series, table.compares_run_times)
    if len(series) <= MAX_LABELS:
        left.legend(handles=handles, loc="upper left", framealpha=0.9, edgecolor="none", fontsize=9)
    else:
        figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def _draw_rates(axes: Axes, series: SeriesRows, unit: str) -> None:
    axes.set_title("Throughput", fontsize=11)
    axes.set_ylabel(f"{unit} per second")
    for index, rows in enumerate(series.values()):
        ideal = [(row.ranks, row.throughput_ideal) for row in rows if row.throughput_ideal is not None]
        if len(ideal) > 1:
            axes.plot(*zip(*ideal), color=_color(index), alpha=0.8, **IDEAL)
        known = [row for row in rows if row.throughput is not None]
        _plot(axes, index, known, lambda row: (row.throughput_low, row.throughput, row.throughput_high))
    axes.set_yscale("log", base=10)
    low, high = axes.get_ylim()
    # A factor of 4 at least, or noise between two points looks like a cliff; the room above is for the legend.
    margin = max(1.1, (4 * low / high) ** 0.5)
    axes.set_ylim(low / margin, high * margin * 1.25)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axes.yaxis.set_minor_locator(NullLocator())
    _label_crowded(axes, series)


def _draw_speedups(axes: Axes, series: SeriesRows, of: str) -> None:
    axes.set_title("Speedup (no efficiency is claimed)", fontsize=11)
    axes.set_ylabel(f"ratio of {of} to the smallest point")
    for index, rows in enumerate(series.values()):
        _plot(axes, index, [row for row in rows if row.speedup is not None], lambda row: (row.speedup,) * 3)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)


def _draw_run_times(axes: Axes, series: SeriesRows) -> None:
    axes.set_title("Run time, start-up included", fontsize=11)
    axes.set_ylabel("seconds")
    for index, rows in enumerate(series.values()):
        _plot(axes, index, rows, lambda row: (row.run_time_s,) * 3)
    axes.set_ylim(0, axes.get_ylim()[1] * 1.25)  # the room above is for the legend


def _draw_efficiency(axes: Axes, series: SeriesRows, unit: str) -> None:
    axes.set_title("Efficiency against the smallest point", fontsize=11)
    axes.set_ylabel(f"% of its {unit} per second and rank")
    axes.axhline(100, color=GREY, **IDEAL)
    for index, rows in enumerate(series.values()):
        _plot(axes, index, [row for row in rows if row.efficiency is not None], _efficiency_band)
    axes.set_ylim(0, max(115, axes.get_ylim()[1]))
    noisy = [row for rows in series.values() for row in rows if row.noisy and row.efficiency is not None]
    for row in noisy if len(noisy) <= MAX_LABELS else []:
        place = (row.ranks or 0, 100 * (row.efficiency or 0))
        style = {**LABEL, "ha": "left"}
        axes.annotate(efficiency(row), place, xytext=(8, -13), textcoords="offset points", bbox=LABEL_BOX, **style)
    unclaimed = {row.ranks for rows in series.values() for row in rows if row.efficiency is None}
    for ranks in sorted(rank for rank in unclaimed if rank is not None):
        axes.annotate("not claimed", (ranks, 3), rotation=90, bbox=LABEL_BOX, **LABEL)


def _efficiency_band(row: Row) -> tuple[float, float, float]:
    """Efficiency with what the quartiles of both points leave of it, percent; of run times there are none."""
    assert row.efficiency
    middle = 100 * row.efficiency
    if row.efficiency_low is None or row.efficiency_high is None:
        return (middle,) * 3
    return 100 * row.efficiency_low, middle, 100 * row.efficiency_high


def _draw_step_times(axes: Axes, series: SeriesRows) -> None:
    crowded = any(row.oversubscribed for rows in series.values() for row in rows)
    axes.set_title("Step time (no efficiency is claimed)" if crowded else "Step time", fontsize=11)
    axes.set_ylabel("seconds")
    for index, rows in enumerate(series.values()):
        _plot(axes, index, rows, lambda row: (row.step_time_s_low, row.step_time_s, row.step_time_s_high))
    axes.set_ylim(0, axes.get_ylim()[1] * 1.1)


def _plot(axes: Axes, index: int, rows: Sequence[Row], band: Callable[[Row], tuple[Any, Any, Any]]) -> None:
    """Draw one series: a line, bars between the quartiles, hollow markers where ranks were crowded."""
    if not rows:
        return
    ranks, bands = [row.ranks or 0 for row in rows], [band(row) for row in rows]
    below, above = ([abs(end - middle) for end, middle in zip(ends, [b[1] for b in bands])] for ends in _ends(bands))
    color = _color(index)
    axes.errorbar(
        ranks,
        [b[1] for b in bands],
        yerr=[below, above],
        color=color,
        linewidth=1.8,
        elinewidth=1.2,
        capsize=3,
        zorder=2,
    )
    for row, (_, middle, _) in zip(rows, bands):
        axes.plot(row.ranks or 0, middle, markerfacecolor="white" if row.oversubscribed else color, **_marker(index))


def _ends(bands: Sequence[tuple[float, float, float]]) -> tuple[list[float], list[float]]:
    return [band[0] for band in bands], [band[2] for band in bands]


def _label_crowded(axes: Axes, series: SeriesRows) -> None:
    crowded = [row for rows in series.values() for row in rows if row.oversubscribed and row.throughput is not None]
    for row in crowded if len(crowded) <= MAX_LABELS else []:
        place = (row.ranks or 0, row.throughput or 0)
        axes.annotate("shared", place, xytext=(8, -13), textcoords="offset points", **{**LABEL, "ha": "left"})


def _style(axes: Axes, rows: Sequence[Row]) -> None:
    ranks = sorted({row.ranks for row in rows if row.ranks is not None})
    axes.set_xscale("log", base=2)
    axes.set_xlabel("ranks")
    axes.set_xlim(ranks[0] / 2**0.4, ranks[-1] * 2**0.4)
    axes.xaxis.set_major_locator(FixedLocator([float(rank) for rank in _spaced(ranks)]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(True, which="major", color="#E3E3E3", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _spaced(ranks: Sequence[int]) -> list[int]:
    """The ranks that get a tick: those too close to the one before would print over it."""
    gap = max(ranks[-1] / ranks[0], 2) ** (1 / 14)
    kept = [ranks[0]]
    for rank in ranks[1:]:
        if rank >= kept[-1] * gap:
            kept.append(rank)
    return kept


def _legend(series: SeriesRows, compares_run_times: bool) -> list[Line2D]:
    handles = [
        Line2D(
            [],
            [],
            linewidth=1.8,
            markerfacecolor=_color(index),
            label=label or ("measured" if compares_run_times else "measured, with quartiles"),
            **_marker(index),
        )
        for index, label in enumerate(series)
    ]
    rows = [row for of_series in series.values() for row in of_series]
    if any(row.speedup != 1 and row.throughput_ideal is not None for row in rows):
        handles.append(Line2D([], [], color=GREY, label="ideal, from the smallest point", **IDEAL))
    if any(row.oversubscribed for row in rows):
        hollow = {**_marker(0), "color": GREY, "markeredgecolor": GREY}
        handles.append(
            Line2D([], [], linewidth=0, markerfacecolor="white", label="ranks shared cores or a GPU", **hollow)
        )
    return handles


def _marker(index: int) -> dict[str, Any]:
    color = _color(index)
    return {
        "color": color,
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 7,
        "markeredgecolor": color,
        "markeredgewidth": 1.6,
        "zorder": 3,
    }


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _short(value: float) -> str:
    """Axis label: 500, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
