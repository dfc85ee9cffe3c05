"""The tables of a report as text for terminal, Markdown and page, and its figures as CSV and JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from typing import Any

import msgspec
from rich.console import Console
from rich.text import Text

from launch.report.goodput import CAUSES, PARTS
from launch.report.notes import (
    UNAVAILABLE,
    figure,
    hours,
    percent,
    rate,
    time_text,
    with_unit,
)
from launch.report.steps import LOSSES
from launch.report.table import Row, RunDetail, ScalingTable
from launch.runs.find import print_table

# One table of texts, and its form in Markdown.


TextColumns = Mapping[str, Callable[[Any], str]]
"""Title of a column -> function that returns the text of an item in this column. A title may have two lines."""
LEFT = frozenset({"point", "host", "topology", "state", "against", "reasons"})
"""Titles of columns that are aligned left because they have names. Columns of numbers are aligned right."""


@dataclass(frozen=True)
class Cells:
    """A table of texts with a heading."""

    heading: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]

    @staticmethod
    def of(heading: str, columns: TextColumns, items: Sequence[Any], among: Sequence[Any] = ()) -> Cells:
        """Return a table with a row for each item.

        A column is left out if its value is unknown for all items. The notes of the report explain missing values.

        Args:
            heading: heading of the table.
            columns: all possible columns.
            items: objects that the rows describe, one for each row.
            among: objects that decide which columns are left out. With the same objects, several tables have the same
                columns. If empty, ``items`` decide.
        """
        known = among or items
        shown = {title: text for title, text in columns.items() if any(text(item) != UNAVAILABLE for item in known)}
        return Cells(heading, [*shown], [[text(item) for text in shown.values()] for item in items])

    def markdown(self) -> str:
        """Return the table in Markdown, without its heading."""
        titles = [title.replace("\n", " ") for title in self.titles]
        lines = [titles, [":---" if title in LEFT else "---:" for title in self.titles], *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _of(name: str, write: Callable[[Any], str] = figure) -> Callable[[Any], str]:
    """Return the function of a text column: it takes an item and returns the text of the item's field ``name``.

    ``write`` turns a value of the field into text.
    """
    return lambda item: write(getattr(item, name))


# The tables of a report.


NOT_CLAIMED = "not claimed"
FROM_RECORDS = ("compile", "restore")
"""Parts of a run's time (keys of ``PARTS``) that are known only if the step records contain their times."""
MAX_HOSTS = 16
"""Largest number of hosts in the table of one run, most throttled first. The JSON file has all hosts."""


def efficiency(row: Row) -> str:
    """Return the efficiency as text in percent; an inexact efficiency has ~ and no decimals.

    The text is ``NOT_CLAIMED`` if only a speedup is known, ``UNAVAILABLE`` if neither is known.
    """
    if row.noisy and row.efficiency is not None:
        return f"~{100 * row.efficiency:.0f} %"
    return NOT_CLAIMED if row.efficiency is None and row.speedup is not None else percent(row.efficiency)


def point_tables(table: ScalingTable) -> list[Cells]:
    """Return one table of points for each kind of scaling, all with the same columns."""
    per_s = f"{table.unit}/s"

    def throughput(row: Row) -> str:
        """Return the throughput as text, with its unit if a table has points of several units."""
        several = table.unit == "work" and row.unit is not None and row.throughput is not None
        return rate(row.throughput) + (f" {row.unit}/s" if several else "")

    is_untimed = all(row.step_time_s is None for row in table.rows) and any(row.run_time_s for row in table.rows)
    columns: TextColumns = {
        "point": attrgetter("label"),
        "nodes": _of("nodes"),
        "ranks": _of("ranks"),
        "topology": lambda row: row.topology or UNAVAILABLE,
        per_s: throughput,
        f"{per_s}\nper rank": _of("throughput_per_rank", rate),
        **({"run time": _of("run_time_s", time_text), "attempts": _of("attempts")} if is_untimed else {}),
        "step time": _of("step_time_s", time_text),
        "spread": _of("step_time_s_spread", time_text),
        "speedup": _of("speedup", lambda value: figure(value, "{:.2f}")),
        "efficiency": efficiency,
        "MFU": _of("mfu_palm", percent),
        "loss": _of("loss", lambda value: figure(value, "{:.4f}")),
        "state": attrgetter("state"),
    }
    return [Cells.of(heading, columns, rows, table.rows) for heading, rows in table.sections()]


def part_tables(table: ScalingTable) -> list[Cells]:
    """Return the tables that divide a figure of the runs into parts. A table without rows is left out.

    The tables show where efficiency and time were lost, what interruptions cost, and how the GPUs were used.
    """
    one = "unit of work" if table.unit == "work" else table.unit.removesuffix("s")
    label = attrgetter("label")
    timed = [row for row in table.rows if row.goodput is not None]
    interrupted = [row for row in table.rows if row.interruptions]
    hosts = table.gpus[0].hosts if len(table.gpus) == 1 and table.gpus[0] is not None else ()
    found = [
        Cells.of(
            "What efficiency was lost to",
            {
                "point": label,
                **{name: partial(_share_lost, phase) for phase, name in LOSSES.items()},
                "efficiency": _of("efficiency", percent),
            },
            [row for row in table.rows if row.losses],
        ),
        Cells.of(
            "Where the time went",
            {
                "point": label,
                **{
                    PARTS[part]: partial(_time_spent, part)
                    for part in PARTS
                    if any(part in row.parts_s for row in timed)
                },
                "in all": lambda row: time_text(sum(row.parts_s.values())),
                "goodput": _of("goodput", percent),
                "GPU-hours": _of("gpu_hours", _amount),
                "cost": _of("cost", _amount),
                f"cost of a billion {table.unit}": _of("cost_per_billion", _amount),
            },
            timed,
        ),
        Cells.of(
            "What interruptions cost",
            {
                "point": label,
                **{CAUSES[c]: partial(_hours_lost, c) for c in CAUSES if any(c in row.causes_h for row in interrupted)},
                "in all": lambda row: hours(sum(row.causes_h.values()), f"{row.hours_of}-h"),
                "interruptions": _of("interruptions"),
            },
            interrupted,
        ),
        Cells.of(
            "GPUs",
            {
                "point": lambda pair: pair[0].label,
                "GPUs sampled": lambda pair: str(pair[1].gpus),
                "energy": lambda pair: with_unit(pair[0].energy_kwh, "kWh"),
                f"energy of a {one}": lambda pair: with_unit(pair[0].joules_per_work, "J"),
                "mean power of a GPU": lambda pair: with_unit(pair[1].mean_power_w, "W"),
                "throttled": lambda pair: percent(pair[1].throttled),
            },
            [pair for pair in zip(table.rows, table.gpus, strict=False) if pair[1] is not None],
        ),
        Cells.of(
            "GPUs by host",
            {
                "host": attrgetter("host"),
                "GPUs": _of("gpus"),
                "energy": lambda host: with_unit(None if host.energy_j is None else host.energy_j / 3.6e6, "kWh"),
                "mean power of a GPU": lambda host: with_unit(host.mean_power_w, "W"),
                "throttled": _of("throttled", percent),
                "reasons": lambda host: ", ".join(f"{reason} {percent(of)}" for reason, of in host.reasons.items()),
            },
            sorted(hosts, key=lambda host: -(host.throttled or 0.0))[:MAX_HOSTS],
        ),
    ]
    return [cells for cells in found if cells.rows]


def _share_lost(phase: str, row: Row) -> str:
    return percent(row.losses.get(phase))


def _time_spent(part: str, row: Row) -> str:
    spent_s = row.parts_s.get(part, 0.0)
    # A run without records of compilation or restore may still have both, inside its starts and steps.
    if not spent_s and part in FROM_RECORDS:
        return UNAVAILABLE
    return f"{time_text(spent_s)} ({percent(spent_s / sum(row.parts_s.values()))})"


def _hours_lost(cause: str, row: Row) -> str:
    return hours(row.causes_h.get(cause, 0.0), f"{row.hours_of}-h")


def _amount(value: float | None) -> str:
    return figure(value, "{:,.2f}")


def slowest_table(found: RunDetail) -> Cells:
    """Return the table of the slowest ranks of a run."""
    columns: TextColumns = {
        "rank": lambda row: str(row.time.rank),
        "host": lambda row: row.host or UNAVAILABLE,
        "own time": lambda row: time_text(row.time.own_s),
        "above the median of the others": lambda row: f"{1000 * row.time.excess_s:.3g} ms",
        "of the step time": _of("share", percent),
    }
    return Cells.of("Slowest ranks", columns, found.slowest)


# A whole report on the terminal and in Markdown.


DROPPED_FIRST = ("topology", "per rank", "spread", "nodes", "speedup", "loss")
"""Columns that are left out on a narrow terminal, in the order in which they are left out.

A column is named by the last words of its title.
"""


def show(table: ScalingTable, console: Console) -> None:
    """Print the tables of the points and the notes.

    On a narrow terminal, a line names the columns that are left out.
    """
    for cells in point_tables(table):
        console.print(Text(f"\n{cells.heading}\n", style="bold"), soft_wrap=True)
        hidden = print_table(console, cells.titles, cells.rows, left=LEFT, optional=DROPPED_FIRST)
        if hidden:
            names = ", ".join(hidden).replace("\n", " ")
            console.print(Text(f"(too narrow for {names}: see {table.selection.stem}.md)"))
    console.print()
    for line in filter(None, (table.conditions, table.selection.text, *table.notes)):
        console.print(Text(line), soft_wrap=not console.is_terminal)


def markdown_text(table: ScalingTable) -> str:
    """Return the tables, conditions and notes in Markdown, with the kind of scaling as headings."""
    blocks = [f"# {cells.heading}\n\n{cells.markdown()}" for cells in point_tables(table)]
    blocks += filter(None, (table.conditions, table.selection.text, "\n".join(f"- {note}" for note in table.notes)))
    parts = part_tables(table)
    parts += [slowest_table(found) for found in table.details if len(table.rows) == 1 and found.slowest]
    blocks += [f"## {cells.heading}\n\n{cells.markdown()}" for cells in parts]
    return "\n\n".join(blocks) + "\n"


# Figures with all digits.


CSV_COLUMNS = (
    *("point", "nodes", "ranks", "topology", "throughput", "throughput_per_rank", "step_time_s", "step_time_s_spread"),
    *("speedup", "efficiency", "mfu_palm", "oversubscribed", "state", "series", "scaling", "loss", "last_step"),
    *("steps_measured", "run_time_s", "attempts", "label", "efficiency_low", "efficiency_high", "noisy", "goodput"),
    *("gpu_hours", "cost", "energy_kwh", "unread_lines"),
)
"""Fields of a row in the CSV file, in order. The JSON file has all fields."""


def csv_text(table: ScalingTable) -> str:
    """Return the rows as CSV with all digits. A figure that is not known or not claimed is an empty cell.

    The throughput column has the name of its unit, such as tokens_per_s, or work_per_s if units differ.
    """
    names = [name.replace("throughput", f"{table.unit}_per_s") for name in CSV_COLUMNS]
    return _csv([names, *([getattr(row, name) for name in CSV_COLUMNS] for row in table.rows)])


def parts_csv_text(table: ScalingTable) -> str:
    """Return CSV with a line for each part of a point's time, interruptions, lost efficiency, cost and energy.

    Columns: ``point`` (name of the run folder), ``label``, ``of`` (the quantity that is divided), ``part``, ``value``
    and ``unit``. Unknown values have no line.
    """
    lines: list[Sequence[Any]] = [("point", "label", "of", "part", "value", "unit")]
    for row in table.rows:
        of_hours, one = f"{row.hours_of}-hours", table.unit.removesuffix("s")
        parts = [
            *(("time", part, value, "s") for part, value in row.parts_s.items()),
            *(("interruptions", cause, value, of_hours) for cause, value in row.causes_h.items()),
            *(("lost efficiency", phase, value, "share") for phase, value in row.losses.items()),
            ("interruptions", "number", row.interruptions, ""),
            ("cost", f"a billion {table.unit}", row.cost_per_billion, ""),
            ("energy", f"a {one}", row.joules_per_work, "J"),
            ("energy", "mean power of a GPU", row.gpu_power_w, "W"),
            ("energy", "throttled", row.throttled, "share"),
        ]
        lines += [(row.point, row.label, *part) for part in parts if part[2] is not None]
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    texts = [[str(value).lower() if isinstance(value, bool) else value for value in line] for line in lines]
    csv.writer(file, lineterminator="\n").writerows(texts)
    return file.getvalue()


def json_text(table: ScalingTable) -> str:
    """Return the whole report as JSON with all digits: rows, notes, step times and ranks of each measured point.

    The entries of ``gpus`` are in the order of the rows. A figure is null if it is not known, not claimed, or not
    finite.
    """
    names = ("title", "conditions", "unit", "notes", "rows", "gpus", "details")
    content = {"headings": [heading for heading, _ in table.sections()]} | {
        name: getattr(table, name) for name in names
    }
    # A thousand ranks give two megabytes, for which dataclasses.asdict and json.dumps take a second.
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n"
