"""A projection as text and as a picture."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import shlex
import textwrap
from collections.abc import Callable, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from launch.project.goal import Goal, Offer
from launch.project.projection import Projection, Row
from launch.report.notes import percent, rate, seconds
from launch.report.views.figures import COLORS, GREY
from launch.runs.overrides import typed_key

# A projection as text: terminal and Markdown, CSV, JSON.


Cell = Callable[[Row], str]
GIB = 2**30
WIDE = 1000
"""Columns of a terminal on which every table fits."""
DROPPED_FIRST = ("memory a rank", "ranks", "interval", "goodput", "stragglers")
"""Columns that go where a terminal is too narrow; the files have them all."""


def kind(row: Row) -> str:
    """Tell a measured row from a projected one, and from a size that cannot work."""
    return "measured" if row.is_measured else "refused" if row.refused else "projected"


def interval(row: Row) -> str:
    """The interval of a projected time, or the quartiles of a measured one."""
    return "" if row.low_s is None else f"{seconds(row.low_s)} to {seconds(row.high_s)}"


def columns(found: Projection) -> dict[str, Cell]:
    """Title -> cell, of what any row knows."""
    shown: dict[str, Cell] = {
        "nodes": lambda row: f"{row.nodes:,}",
        "ranks": lambda row: f"{row.ranks:,}",
        "step time": lambda row: "" if row.step_s is None else seconds(row.step_s),
        "interval": interval,
    }
    optional: dict[str, tuple[Callable[[Row], float | None], Callable[[float], str]]] = {
        f"{found.unit}/s": (lambda row: row.throughput, rate),
        "efficiency": (lambda row: row.efficiency, percent),
        "stragglers": (lambda row: row.stragglers_s, seconds),
        "memory a rank": (lambda row: row.memory_bytes, lambda value: f"{value / GIB:.2f} GiB"),
        "goodput": (lambda row: row.goodput, percent),
        f"GPU-hours / 10^9 {found.unit}": (lambda row: row.gpu_hours_per_giga, lambda value: f"{value:,.3g}"),
        f"cost / 10^9 {found.unit}": (lambda row: row.cost_per_giga, lambda value: f"{value:,.2f}"),
    }
    for title, (of, text) in optional.items():
        if any(of(row) is not None for row in found.rows):
            shown[title] = lambda row, of=of, text=text: "" if of(row) is None else text(of(row))  # type: ignore
    shown["kind"] = kind
    return shown


def lines(found: Projection) -> list[str]:
    """Sentences below the table: the held-out point first."""
    wide = f"a factor of {math.exp(found.error):.3g} to either side"
    interval_text = f"interval: {wide}, by the error of the held-out point or its spread"
    refused = [row for row in found.rows if row.refused]
    others = f"; likewise nodes={', '.join(str(row.nodes) for row in refused[1:])}" if len(refused) > 1 else ""
    first = [f"refused: {refused[0].refused}{others}"] if refused else []
    return [found.held_out.text, f"model: {found.model.text}", interval_text, *first, *found.notes]


def heading(found: Projection) -> str:
    """One line above the table."""
    of = f" of {found.label}" if found.label else ""
    return f"Projection of {'weak' if found.is_weak else 'strong'} scaling{of}; projected figures were not measured"


def show(found: Projection, console: Console) -> None:
    """Print the table and its sentences; where the terminal is too narrow, some columns go."""
    shown = columns(found)
    for title in DROPPED_FIRST:
        if (
            Measurement.get(console, console.options.update(width=WIDE), as_table(found, shown)).maximum
            <= console.width
        ):
            break
        shown.pop(title, None)
    console.print(heading(found), highlight=False, markup=False)
    console.print(as_table(found, shown))
    for line in lines(found):
        console.print(line, highlight=False, markup=False)


def as_table(found: Projection, shown: Mapping[str, Cell]) -> Table:
    """The table for a terminal; cells stay in one line."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in shown:
        table.add_column(title, justify="left" if title == "kind" else "right", no_wrap=True)
    for row in found.rows:
        style = "bold" if row.is_measured else "dim" if row.refused else ""
        table.add_row(*(cell(row) for cell in shown.values()), style=style)
    return table


def markdown(found: Projection) -> str:
    """The table and its sentences as Markdown."""
    shown = columns(found)
    rows = [list(shown), ["---"] * len(shown), *([cell(row) for cell in shown.values()] for row in found.rows)]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in rows)
    return f"# {heading(found)}\n\n{table}\n\n" + "\n".join(f"- {line}" for line in lines(found)) + "\n"


def csv_text(found: Projection) -> str:
    """All figures in full, a line a size."""
    names = [name.name for name in dataclasses.fields(Row) if name.name != "parts"]
    file = io.StringIO()
    writer = csv.writer(file)
    writer.writerow(names)
    writer.writerows([getattr(row, name) for name in names] for row in found.rows)
    return file.getvalue()


def json_text(found: Projection) -> str:
    """All figures in full, with the parts of each step."""
    held_out = {**dataclasses.asdict(found.held_out), "error": found.held_out.error}
    document = {
        "rows": [dataclasses.asdict(row) for row in found.rows],
        "held_out": held_out,
        "interval": found.error,
        "model": found.model.text,
        "unit": found.unit,
        "weak_scaling": found.is_weak,
        "notes": found.notes,
    }
    return json.dumps(document, indent=2) + "\n"


# Offers of ``launch.project --fit`` as a table for the terminal.


GIB = 2**30
WIDE = 1000
"""Columns of a terminal on which every table fits."""


def show_offers(goal: Goal, found: Sequence[Offer], device: str | None, words: Sequence[str], console: Console) -> None:
    """Print the set-ups that make it, the cheapest first, and the command for that one on the nodes of ``words``."""
    training = goal.training
    title = f"{training.parameters:.3g} params on {training.work:.3g} tokens in {goal.days:.3g} days, on {device}"
    console.print(f"{title}; estimated figures, none was measured", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    has_cost = any(one.cost is not None for one in found)
    for name in ("nodes", "GPUs", "parallelism", "micro", "memory", "MFU", "days", "GPU-hours"):
        table.add_column(name, justify="left" if name == "parallelism" else "right", no_wrap=True)
    if has_cost:
        table.add_column("cost", justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            *(str(one.nodes), str(one.gpus), one.set_up.parallelism, str(one.set_up.micro_batch)),
            f"{one.set_up.memory_bytes / GIB:.1f} GiB",
            "" if one.set_up.mfu is None else percent(one.set_up.mfu),
            *(f"{one.days:.3g}", f"{one.gpu_hours:,.0f}"),
            *([f"{one.cost:,.0f}"] if one.cost is not None else []),
        )
    needed = Measurement.get(console, console.options.update(width=WIDE), table).maximum
    console.width = max(console.width, needed)  # a terminal wraps what is too wide; a cell that is cut tells nothing
    console.print(table)
    told = "no failures, slow ranks or evaluations in it; links as assumed, or as measured with --network"
    console.print(told, highlight=False, markup=False)
    nodes = [word for word in words if typed_key(word).partition(".")[0] == "cluster"]
    command = f"python -m launch nodes={found[0].nodes} {shlex.join(nodes)} {found[0].set_up.command} dry_run=true"
    console.print(f"the cheapest: {command}", highlight=False, markup=False)


# The picture of a projection: throughput against the ideal line, and efficiency, measured apart from projected.


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
