"""The panels of a report: scaling, lost efficiency and time, and the ranks and step times of one run."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FixedLocator, LogLocator, NullLocator

from launch.report.goodput import PARTS
from launch.report.notes import rate, time_text
from launch.report.steps import LEAST_SHARE, LOSSES, RankTimes
from launch.report.table import Row, RunDetail, ScalingTable
from launch.report.text import efficiency

# Colors and style of every drawing of the project.


PALETTE = {
    "paper": ("#ffffff", "#0f1318"),
    "ink": ("#1b1f24", "#e6e9ed"),
    "quiet": ("#57606a", "#9aa4af"),
    "line": ("#d5dae0", "#333b45"),
    "c0": ("#0072b2", "#4aa8e0"),
    "c1": ("#d55e00", "#f0803c"),
    "c2": ("#009e73", "#2cc295"),
    "c3": ("#b4578d", "#dd8fbd"),
    "c4": ("#b87a00", "#e8b13c"),
    "c5": ("#3a94c9", "#86c8ee"),
    "c6": ("#444c56", "#c3cad2"),
    "waiting": ("#b9c0c8", "#6a737d"),
    "fewer": ("#7fc8b0", "#2f7d68"),
    "shutdown": ("#8b949e", "#7d8691"),
    "compile": ("#8a6fb0", "#b59add"),
    "restore": ("#a0522d", "#d08a62"),
}
"""Name -> color on light and on dark paper. Files use the light colors; the page has both, as variables of CSS.

``c0`` to ``c6`` follow Okabe and Ito (Color Universal Design, 2008): color-blind readers can distinguish them.
"""
LIGHT = {name: light for name, (light, _) in PALETTE.items()}
PAPER, INK, GREY, LINE = (LIGHT[name] for name in ("paper", "ink", "quiet", "line"))
COLORS = [LIGHT[f"c{index}"] for index in range(7)]
MARKERS = "os^DvPX*"
STYLE: Any = {
    **{"font.size": 9, "axes.titlesize": 11, "figure.titlesize": 13, "figure.titleweight": "bold"},
    **{"text.color": INK, "axes.labelcolor": GREY, "xtick.color": GREY, "ytick.color": GREY, "axes.edgecolor": GREY},
    **{"axes.spines.top": False, "axes.spines.right": False, "legend.fontsize": 8, "legend.frameon": False},
    **{"axes.facecolor": "none", "axes.axisbelow": True, "grid.color": LINE, "grid.linewidth": 0.8},
    # Text stays text, so that a reader can search it.
    "svg.fonttype": "none",
}
HOLLOW: dict[str, Any] = {"c": PAPER, "s": 42, "linewidths": 1.6, "zorder": 3}
BELOW: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "borderaxespad": 4.2}
"""Keyword arguments of ``Axes.legend`` for a legend below the axes and the label of the x axis."""
IDEAL: dict[str, Any] = {"linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 1}


# Panels: each alone for the page, or all together in one picture file.


@dataclass(frozen=True)
class Panel:
    """One drawing with its title. ``draw`` draws into the given axes; ``inches`` is the height of the drawing."""

    title: str
    draw: Callable[[Axes], None]
    inches: float = 3.1
    lead: str = ""
    """Sentence that the page shows under the title; empty for none."""


WIDE = 5.4
"""Width of one panel in inches."""


def draw_report(table: ScalingTable) -> dict[str, bytes]:
    """Draw the picture of a report. Returns file format -> content of the file, for ``png`` and ``svg``.

    Equal tables give equal bytes.
    """
    one_run = len(table.rows) == 1 and table.details
    panels = run_panels(table.details[0]) if one_run else scaling_panels(table)
    headings = "\n".join(heading for heading, _ in table.sections())
    return picture([*panels, *loss_panels(table)[:1], *times_panels(table)], headings, table.conditions)


@rc_context(STYLE)
def picture(panels: Sequence[Panel], heading: str, conditions: str) -> dict[str, bytes]:
    """Draw panels in rows of two, a heading above them, and the text ``conditions`` below them.

    Returns file format -> content of the file, for ``png`` and ``svg``.
    """
    panels = panels or [Panel("", _draw_nothing)]
    rows = [panels[start : start + 2] for start in range(0, len(panels), 2)]
    inches = [max(panel.inches for panel in row) for row in rows]
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.08)
    whole = Figure(figsize=(2 * WIDE + 0.2, sum(inches) + 1.0), dpi=150, layout=layout)
    whole.suptitle(heading, x=0.01, ha="left")
    whole.supxlabel("\n".join(textwrap.wrap(conditions, 160)), fontsize=8, color=GREY, x=0.01, ha="left")
    for below, row in zip(whole.subfigures(len(rows), 1, height_ratios=inches, squeeze=False)[:, 0], rows):
        for axes, panel in zip(below.subplots(1, len(row), squeeze=False)[0], row):
            axes.set_title(panel.title)
            panel.draw(axes)
    png = _file(whole, "png", ("Software",))
    whole.set_layout_engine("none")  # The PNG file has computed the layout, which takes a third of the time.
    return {"png": png, "svg": _file(whole, "svg", UNTIMED, "report")}


@rc_context(STYLE)
def inline_svg(panel: Panel, salt: str) -> str:
    """Return one panel as an SVG element for the page, with CSS variables as colors.

    The identifiers inside the element are made from the text ``salt``, which must differ for each panel of a page.
    """
    whole = Figure(figsize=(WIDE, panel.inches), layout="constrained", facecolor="none")
    panel.draw(whole.subplots())
    text = _file(whole, "svg", UNTIMED, salt).decode()
    for name, color in LIGHT.items():
        text = text.replace(color, f"var(--{name})")
    return text[text.index("<svg") :]


UNTIMED = ("Date", "Creator", "Format", "Type")
"""Metadata that an SVG file does not get, so that equal drawings give equal bytes."""


def _file(whole: Figure, kind: str, left_out: Sequence[str], salt: str = "") -> bytes:
    """Return the content of a drawing's file in the format ``kind``, without the metadata that ``left_out`` names.

    The identifiers inside an SVG file are made from the text ``salt``.
    """
    file = io.BytesIO()
    with rc_context({"svg.hashsalt": salt}):  # Without a salt, identifiers inside the SVG are random.
        whole.savefig(file, format=kind, metadata=dict.fromkeys(left_out))
    return file.getvalue()


def _draw_nothing(axes: Axes) -> None:
    axes.axis("off")
    axes.text(0.5, 0.5, "no point has enough steps for a figure yet", ha="center", fontsize=12, color=GREY)


def scale_values(axes: Axes, name: str, log: bool = False) -> None:
    """Set up the y axis with the label ``name``. The axis begins at 0; with ``log`` it spans at least a factor of 4."""
    axes.set_ylabel(f"{name}, log scale" if log else name)
    axes.grid(True, axis="y")
    if not log:
        axes.set_ylim(0, axes.get_ylim()[1] * 1.15)
        return
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # With a factor below 4, noise between two points would look like a cliff. The space above is for the legend.
    margin = max(1.1, (4 * low / high) ** 0.5)
    axes.set_ylim(low / margin, high * margin * 1.25)
    axes.yaxis.set_major_locator(LogLocator(base=10, subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.yaxis.set_minor_locator(NullLocator())


def scale_sizes(axes: Axes, sizes: Sequence[int], name: str) -> None:
    """Set up a logarithmic x axis with the label ``name`` for ``sizes``, ascending numbers of ranks or nodes.

    At most nine of the sizes are written at the axis.
    """
    axes.set_xscale("log", base=2)
    axes.set_xlabel(name)
    axes.set_xlim(sizes[0] / 2**0.4, sizes[-1] * 2**0.4)
    axes.xaxis.set_major_locator(FixedLocator(sizes[:: -math.ceil(len(sizes) / 9)]))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.xaxis.set_minor_locator(NullLocator())


LONGEST_LABEL = 26


def _short(label: str) -> str:
    """Return the label. A label longer than ``LONGEST_LABEL`` characters loses its middle."""
    half = LONGEST_LABEL // 2
    return label if len(label) <= LONGEST_LABEL else f"{label[:half]}…{label[-half:]}"


# Figures over the number of ranks: throughput against the ideal and efficiency, or other figures that a program
# records.


MAX_LABELS = 6
"""Largest number of points in a drawing whose values are written as text; more texts would overlap."""
MAX_INSIDE = 4
"""Largest number of lines of a legend inside the axes. A longer legend is below the axes."""


@dataclass(frozen=True)
class DrawnFigure:
    """A field of ``Row`` to draw over the number of ranks.

    The interval of the figure is in two other fields of ``Row``: the same name with the ending ``_low`` or ``_high``.
    """

    title: str
    axis: str
    field: str
    text: Callable[[Row], str]
    factor: float = 1.0


RATE = DrawnFigure("Throughput", "{unit} per second", "throughput", lambda row: rate(row.throughput))
EFFICIENCY = DrawnFigure("Efficiency against the smallest point", "%", "efficiency", efficiency, factor=100)
STEP_TIME = DrawnFigure("Step time", "seconds", "step_time_s", lambda row: time_text(row.step_time_s))


def scaling_panels(table: ScalingTable) -> list[Panel]:
    """Return at most two panels, each with one figure over the number of ranks.

    The figures are the first two of throughput, efficiency and step time that are known for at least one point. Empty
    if the report has only one run, or no point with a step time.
    """
    rows = [row for row in table.rows if row.ranks is not None and row.step_time_s is not None]
    if len(table.rows) < 2 or not rows:
        return []
    # The smallest point's own 100 % is not informative.
    larger = [row for row in rows if row.speedup not in (None, 1)]
    claimed = any(row.efficiency is not None for row in larger)
    wanted = {RATE: any(row.throughput is not None for row in rows), EFFICIENCY: claimed, STEP_TIME: True}
    chosen = [drawn for drawn, is_wanted in wanted.items() if is_wanted][:2]
    lead = "No efficiency is claimed: see the notes." if larger and not claimed else ""
    lines = len({(row.scaling, row.series) for row in rows}) + 2
    inches = 3.1 if lines <= MAX_INSIDE else 3.1 + 0.17 * math.ceil(lines / 2)
    return [
        Panel(one.title, partial(_draw_figure, rows=rows, drawn=one, unit=table.unit), inches, lead * at)
        for at, one in enumerate(chosen)
    ]


def _draw_figure(axes: Axes, rows: Sequence[Row], drawn: DrawnFigure, unit: str) -> None:
    """Draw ``drawn`` as a line for each series, with intervals; a marker is hollow if ranks shared cores or a GPU.

    ``unit`` is the unit of the throughput, for the label of the axis.
    """
    names = (f"{drawn.field}_low", drawn.field, f"{drawn.field}_high")
    lines = list(dict.fromkeys((row.scaling, row.series) for row in rows))
    kinds, is_rate = {kind for kind, _ in lines}, drawn is RATE
    for index, (kind, name) in enumerate(lines):
        of_series = [row for row in rows if (row.scaling, row.series) == (kind, name)]
        label = ", ".join(filter(None, (_short(name), kind if len(kinds) > 1 else ""))) or "measured"
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        sizes = [row.ranks or 0 for row in of_series]
        found = drawn.factor * np.array([[getattr(row, name) for row in of_series] for name in names], np.float64)
        low, middle, high = np.where(np.isnan(found), found[1], found)  # The value replaces an unknown end.
        axes.errorbar(sizes, middle, [middle - low, high - middle], fmt="none", ecolor=color, elinewidth=1.2, capsize=3)
        axes.plot(sizes, middle, color=color, linewidth=1.8, marker=marker, markersize=6.5, label=label)
        if hollow := [(row.ranks, value) for row, value in zip(of_series, middle) if row.oversubscribed]:
            axes.scatter(*zip(*hollow), marker=marker, edgecolors=color, **HOLLOW)
        ideal = [(row.ranks, row.throughput_ideal) for row in of_series if row.throughput_ideal is not None]
        if is_rate and len(ideal) > 1:
            axes.plot(*zip(*ideal), color=color, alpha=0.8, **IDEAL)
        for row, value in zip(of_series, middle) if len(rows) <= MAX_LABELS else ():
            if not np.isnan(value):
                # The text is where the line does not cover it.
                above, side = (
                    (6, "left") if row is of_series[0] and not is_rate else (-12, "left" if is_rate else "right")
                )
                at = (7 if side == "left" else -7, above)
                axes.annotate(drawn.text(row), (row.ranks, value), at, textcoords="offset points", ha=side, fontsize=8)
    scale_sizes(axes, sorted({row.ranks or 0 for row in rows}), "ranks")
    scale_values(axes, drawn.axis.format(unit=unit), is_rate)
    if drawn is EFFICIENCY:
        axes.axhline(100, color=GREY, **IDEAL)
        axes.set_ylim(0, max(115, axes.get_ylim()[1]))
        for size in {row.ranks for row in rows if row.efficiency is None}:
            axes.annotate("not claimed", (size, 4), rotation=90, ha="center", va="bottom", fontsize=8, color=GREY)
        return
    if is_rate and any(row.speedup != 1 and row.throughput_ideal is not None for row in rows):
        axes.plot([], [], color=GREY, label="ideal, from the smallest point", **IDEAL)
    if any(row.oversubscribed for row in rows):
        axes.scatter([], [], edgecolors=GREY, label="ranks shared cores or a GPU", **HOLLOW)
    axes.legend(**({"loc": "upper left"} if len(lines) + 2 <= MAX_INSIDE else BELOW | {"ncols": 2}))


# Bars of lost efficiency and time.


LOSS_COLORS = dict(zip(LOSSES, ("c0", "c1", "c3", "c4", "c5", "c6"), strict=True))
PART_COLORS = {
    "steps": "c2",
    "start": "c4",
    "lost": "c1",
    "saves": "c0",
    "evaluations": "c5",
    "restarts": "c3",
    "other": "c6",
}
"""Part of the time -> name of its color in ``PALETTE``. For a part that is absent here, both names are the same."""
MAX_BARS = 16
"""Largest number of runs in the bar chart of ``times_panels``. The table and scaling.csv have all runs."""
LEAST_LABELLED = 0.09
"""Smallest share (0 to 1) of a bar in which the percentage is written as text."""


def loss_panels(table: ScalingTable) -> list[Panel]:
    """Return a panel for each point with known losses of efficiency, the point with the most ranks first.

    A panel is a waterfall chart from the ideal, 100 %, down to the efficiency.
    """
    rows = sorted((row for row in table.rows if row.losses), key=lambda row: -(row.ranks or 0))
    # All axes end at the longest bar, so that a reader can compare bars of two points.
    most = max((100 * (1 + sum(-share for share in row.losses.values() if share < 0)) for row in rows), default=0.0)
    lead = "Time that each phase of a step takes beyond its part of the ideal step. The parts add up; + is a gain."
    return [
        Panel(
            f"What was lost to what at {_short(row.label)}",
            partial(_draw_losses, row=row, most=most),
            0.35 + 0.27 * (len(row.losses) + 2),
            lead,
        )
        for row in rows
    ]


def _draw_losses(axes: Axes, row: Row, most: float) -> None:
    """Draw a bar for each cause of lost efficiency, from the ideal, 100 %, down to the efficiency of the point.

    ``most`` is the upper end of the axis in percent.
    """
    bars, at, left = [("ideal", 0.0, 100.0, LINE, "100.0 %")], 100.0, 100 * (row.efficiency or 0.0)
    for phase, share in row.losses.items():
        to, text = at - 100 * share, f"{100 * abs(share):.1f} %"
        sign = "" if text == "0.0 %" else "+" if share < 0 else "−"  # noqa: RUF001 - a minus sign for readers
        bars.append((LOSSES[phase], max(min(at, to), 0.0), max(at, to), LIGHT[LOSS_COLORS[phase]], f"{sign}{text}"))
        at = to
    bars.append(("efficiency", 0.0, left, LIGHT["c2"], f"{left:.1f} %"))
    names, lows, highs, colors, texts = zip(*bars, strict=True)
    axes.barh(range(len(bars)), np.subtract(highs, lows), left=lows, color=colors)
    axes.axvline(100, color=GREY, **IDEAL)
    axes.set_yticks(range(len(bars)), names, color=INK)
    place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
    for number, (text, name) in enumerate(zip(texts, axes.get_yticklabels(), strict=True)):
        weight = "bold" if number in (0, len(bars) - 1) else "normal"
        name.set_fontweight(weight)
        axes.annotate(text, (1, number), (62, 0), ha="right", va="center", fontweight=weight, **place)
    axes.set_xlim(0, most)
    axes.xaxis.set_visible(False)
    _style_bars(axes)


def times_panels(table: ScalingTable) -> list[Panel]:
    """Return one panel with the time of each run by part, in percent from its submission to its end.

    Empty if no run has a goodput.
    """
    rows = [row for row in table.rows if row.goodput is not None]
    lead = "Time of each run from its submission to its end, over all attempts. The parts add up to the whole."
    if len(rows) > MAX_BARS:
        lead += f" The first {MAX_BARS} of {len(rows)} runs; the table below has all."
    rows = rows[:MAX_BARS]
    inches = 1.25 + max(0.3 * len(rows), 0.6)
    return [Panel("Where the time went", partial(_draw_times, rows=rows), inches, lead)] if rows else []


def _draw_times(axes: Axes, rows: Sequence[Row]) -> None:
    left = [0.0] * len(rows)
    totals = [sum(row.parts_s.values()) for row in rows]
    for part, name in PARTS.items():
        widths = [100 * row.parts_s.get(part, 0.0) / total for row, total in zip(rows, totals, strict=True)]
        if not any(widths):
            continue
        color = LIGHT[PART_COLORS.get(part, part)]
        bars = axes.barh(range(len(rows)), widths, left=left, height=0.75, color=color, label=name)
        texts = [f"{width:.1f} %" if width >= 100 * LEAST_LABELLED else "" for width in widths]
        dark = INK if part in ("waiting", "fewer") else PAPER
        axes.bar_label(bars, texts, label_type="center", fontsize=8, color=dark)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [_short(row.label or row.point) for row in rows], color=INK)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of the time since the submission")
    axes.legend(ncols=3, **BELOW)
    _style_bars(axes)


def _style_bars(axes: Axes) -> None:
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["left", "bottom"]].set_visible(False)


# One run: the distribution of its step times, and its slow ranks over time.


BINS = 40
NAMED_RANKS = 4
"""Largest number of slow ranks with a label in the heat map; more labels would overlap."""
# Orange above the median, blue below it, transparent in between.
SLOW_AND_FAST = LinearSegmentedColormap.from_list(
    "slow", [(0, COLORS[0]), (0.5, f"{COLORS[0]}00"), (0.5, f"{COLORS[1]}00"), (1, COLORS[1])], N=41
)


def run_panels(found: RunDetail) -> list[Panel]:
    """Return two panels of one run: the heat map of its ranks, and the distribution of its step times.

    The heat map is absent if fewer than two ranks are compared.
    """
    panels = [Panel("Step times after warm-up", partial(_draw_distribution, found=found))]
    if (times := found.rank_times) is not None:
        net = "" if times.is_net else " Waiting in collectives was not recorded, and hides a slow rank."
        lead = f"Own time of each rank above the median of all ranks.{net}"
        panels.insert(0, Panel("Ranks over the run", partial(_draw_heat_map, found=found, times=times), lead=lead))
    return panels


def _draw_distribution(axes: Axes, found: RunDetail) -> None:
    axes.hist(found.step_times_s, bins=min(BINS, max(5, len(found.step_times_s) // 5)), color=COLORS[0], alpha=0.85)
    for share, color, style in ((0.5, COLORS[1], "-"), (0.95, COLORS[2], "--"), (0.99, COLORS[3], ":")):
        mark_s = float(np.quantile(found.step_times_s, share))
        label = f"{100 * share:.0f} %: {time_text(mark_s)}"
        axes.axvline(mark_s, color=color, linestyle=style, linewidth=1.6, label=label)
    axes.set_xlabel("seconds")
    scale_values(axes, "steps")
    axes.legend(ncols=3, **BELOW)


def _draw_heat_map(axes: Axes, found: RunDetail, times: RankTimes) -> None:
    """Draw ranks from top to bottom and steps from left to right.

    The color shows the milliseconds by which the own time of a rank exceeds that of the median rank.
    """
    in_ms = 1000 * np.array(times.excess_s)
    # The color scale has a minimum range. Otherwise the noise of a healthy run looks like a finding.
    limit = max(1000 * LEAST_SHARE * found.step_time_s, np.abs(in_ms).max())
    first = times.windows[0][0]
    image = axes.imshow(
        in_ms,
        aspect="auto",
        cmap=SLOW_AND_FAST,
        vmin=-limit,
        vmax=limit,
        extent=(first, times.windows[-1][1], len(in_ms) - 0.5, -0.5),
        interpolation="none",
        # Values are resampled before they become colors. For rows thinner than three pixels, matplotlib would do the
        # reverse, which gives the same picture and takes 17 MB more.
        interpolation_stage="data",
    )
    axes.figure.colorbar(image, ax=axes, label="ms above the median")
    axes.spines[:].set_visible(True)
    axes.set_xlabel("step")
    axes.set_ylabel("rank")
    ranks = [one.rank for one in times.ranks]
    shown = range(0, len(ranks), math.ceil(len(ranks) / 8))
    axes.set_yticks(shown, [str(ranks[row]) for row in shown])
    for row in [row for row in found.slowest if row.time.is_slow][:NAMED_RANKS]:
        at = ranks.index(row.time.rank)
        # With a thousand ranks, a row is thinner than a pixel, so a marker shows where it is.
        axes.plot(first, at, marker=">", color=COLORS[1], markersize=6, clip_on=False)
        axes.annotate(
            f"rank {row.time.rank}" + ("" if row.host is None else f", {row.host}"),
            (first, at),
            xytext=(6, -11 if at < len(ranks) / 2 else 9),
            textcoords="offset points",
            va="center",
            fontweight="bold",
            bbox={"facecolor": PAPER, "edgecolor": LINE, "pad": 1.5, "alpha": 0.9},
        )
