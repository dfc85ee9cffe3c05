"""Console of the commands, which prints text as it is, and tables. The agents on the nodes do not import it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text


def plain_console(**options: Any) -> Console:
    """Return a console that prints texts unchanged: brackets are no markup, numbers get no color, lines do not wrap.

    ``options`` are arguments of ``Console``, and may change this.
    """
    return Console(**{"soft_wrap": True, "highlight": False, "markup": False, **options})


def print_table(
    console: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Collection[str] = (),
    optional: Sequence[str] = (),
    styles: Sequence[str] = (),
) -> list[str]:
    """Print a table without its empty columns. Lines fit a terminal; in a file they may have any length.

    Args:
        console: console that prints.
        titles: titles of the columns, of one or two lines.
        rows: cells of each row.
        left: titles of columns that are aligned left, and whose cells a terminal may wrap. A wrapped number is
            unreadable, so the other columns are aligned right and stay whole.
        optional: ends of titles of columns that a narrow terminal does not show, first to be hidden first.
        styles: style of each row.

    Returns:
        The titles of the hidden columns.
    """
    shown = [index for index in range(len(titles)) if any(row[index] for row in rows)]
    hidden: list[str] = []
    for ending in (*optional, None):
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for title in (titles[index] for index in shown):
            is_left = title in left
            table.add_column(title, justify="left" if is_left else "right", no_wrap=not is_left, overflow="fold")
        for number, row in enumerate(rows):
            table.add_row(*(Text(row[index]) for index in shown), style=styles[number] if styles else None)
        width = Measurement.get(console, console.options.update(width=10_000), table)
        if ending is None or not console.is_terminal or width.maximum <= console.width:
            break
        hidden += [titles[index] for index in shown if titles[index].endswith(ending)]
        shown = [index for index in shown if not titles[index].endswith(ending)]
    # A terminal wraps a line that is too long; a cell that is cut off cannot be read.
    fits = console.is_terminal and width.minimum <= console.width
    options = console.options.update(width=console.width if fits else width.maximum)
    console.print(Segments(console.render(table, options)), soft_wrap=True, end="")
    return hidden
