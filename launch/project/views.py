"""A projection as text: terminal and Markdown, CSV, JSON. Owns columns and rounding. Must not compute figures."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Callable, Mapping

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from launch.project.projection import Projection, Row
from launch.report.numbers import percent, rate, seconds

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
