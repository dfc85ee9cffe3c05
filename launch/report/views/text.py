"""The tables of a report as texts, once for the terminal, Markdown and the page; and its figures as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.segment import Segments
from rich.table import Table
from rich.text import Text

from launch.report.goodput import PARTS
from launch.report.notes import (
    UNAVAILABLE,
    amount,
    count,
    loss_cells,
    percent,
    percentages,
    rate,
    run_time,
    seconds,
    told,
    units,
)
from launch.report.points import GpuUse
from launch.report.steps import LOSSES
from launch.report.table import Row, RunDetail, ScalingTable

# One table of texts, and its three forms.


@dataclass(frozen=True)
class Cells:
    """A table of texts with a heading. The title of a column may have two lines."""

    heading: str
    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[bool]
    """True for each column of numbers; these columns are aligned right."""

    @staticmethod
    def of(heading: str, cells: Sequence[Sequence[str]]) -> list[Cells]:
        """Make a table of names and their numbers from titles and rows. Empty if there are no rows."""
        return [Cells(heading, cells[0], cells[1:], [False] + [True] * (len(cells[0]) - 1))] if cells[1:] else []

    def without(self, title: str) -> Cells:
        """Return the table without the columns whose title ends with ``title``."""
        kept = [index for index, name in enumerate(self.titles) if not name.endswith(title)]
        rows = [[row[index] for index in kept] for row in self.rows]
        return replace(self, titles=[self.titles[i] for i in kept], rows=rows, numbers=[self.numbers[i] for i in kept])

    def markdown(self) -> str:
        """Return the table in Markdown, without its heading."""
        titles = [title.replace("\n", " ") for title in self.titles]
        lines = [titles, ["---:" if is_number else ":---" for is_number in self.numbers], *self.rows]
        return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)

    def terminal(self) -> Table:
        """Make the table for a terminal. It may wrap names but not numbers: a wrapped number is unreadable."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
        for title, is_number in zip(self.titles, self.numbers, strict=True):
            table.add_column(title, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table


def natural_width(table: Table, console: Console) -> int:
    """Return the width of a table in characters if nothing is wrapped."""
    return Measurement.get(console, console.options.update(width=10_000), table).maximum


# The tables of a report.


NOT_CLAIMED = "not claimed"
FROM_RECORDS = ("compile", "restore")
"""Parts of the time that are known only if the step records contain them."""
MAX_HOSTS = 16
"""Largest number of hosts in the table of one run, most throttled first. The JSON file has all hosts."""


@dataclass(frozen=True)
class Column:
    """One column of the table of points."""

    title: str
    cell: Callable[[Row], str]
    number: bool = True


def efficiency(row: Row) -> str:
    """Write the efficiency in percent. An inexact efficiency is marked and has no decimals."""
    if row.noisy and row.efficiency is not None:
        return f"~{100 * row.efficiency:.0f} %"
    return NOT_CLAIMED if row.efficiency is None and row.speedup is not None else percent(row.efficiency)


def columns(table: ScalingTable) -> list[Column]:
    """Choose the columns of the table of points: those with a figure for any point."""
    rows, per_s = table.rows, f"{table.unit}/s"

    def number(value: float | None, digits: int) -> str:
        return UNAVAILABLE if value is None else f"{value:.{digits}f}"

    def throughput(row: Row) -> str:
        """Write the throughput, with its unit if a table has points of several units."""
        several = table.unit == "work" and row.unit is not None and row.throughput is not None
        return f"{rate(row.throughput)} {row.unit}/s" if several else rate(row.throughput)

    state = Column("state", lambda row: row.state, number=False)
    point = Column("point", lambda row: row.label, number=False)
    found = [
        Column("nodes", lambda row: count(row.nodes)),
        Column("ranks", lambda row: count(row.ranks)),
        Column("topology", lambda row: row.topology or UNAVAILABLE, number=False),
        Column(per_s, throughput),
        Column(f"{per_s}\nper rank", lambda row: rate(row.throughput_per_rank)),
    ]
    if table.compares_run_times:
        found.append(Column("run time", lambda row: run_time(row.run_time_s)))
        found.append(Column("attempts", lambda row: count(row.attempts)))
    else:
        found.append(Column("step time", lambda row: seconds(row.step_time_s)))
        found.append(Column("spread", lambda row: seconds(row.step_time_s_spread)))
    if table.is_scaling:
        found.append(Column("speedup", lambda row: number(row.speedup, 2)))
        found.append(Column("efficiency", efficiency))
    found.append(Column(f"times\n{rows[0].source}", lambda row: number(row.ratio_to_first, 2)))
    found.append(Column("MFU", lambda row: percent(row.mfu_palm)))
    if any(percent(row.mfu_bf16) not in (percent(row.mfu_palm), UNAVAILABLE) for row in rows):
        found.append(Column("MFU\nof bf16", lambda row: percent(row.mfu_bf16)))
    found.append(Column("loss", lambda row: number(row.loss, 4)))
    # The notes explain why a column without any figure is absent.
    found = [column for column in found if any(column.cell(row) != UNAVAILABLE for row in rows)]
    return [point, state, *found] if table.compares_run_times else [point, *found, state]


def point_tables(table: ScalingTable) -> list[Cells]:
    """Make the table of the points of each kind of scaling."""
    shown = columns(table)
    titles, numbers = [column.title for column in shown], [column.number for column in shown]
    return [
        Cells(heading, titles, [[column.cell(row) for column in shown] for row in rows], numbers)
        for heading, rows in table.sections()
    ]


def part_tables(table: ScalingTable) -> list[Cells]:
    """Make the tables of the parts of efficiency and time, of interruptions, and of GPUs, if known."""
    found = Cells.of("What efficiency was lost to", _loss_cells(table))
    found += Cells.of("Where the time went", _time_cells(table))
    for unit, rows in units(table.rows):
        found += Cells.of(f"What interruptions cost, in {unit}-hours", loss_cells(rows))
    found += Cells.of("GPUs", _gpu_cells(table))
    if len(table.gpus) == 1 and table.gpus[0] is not None:
        found.append(host_table(table.gpus[0]))
    return found


def _loss_cells(table: ScalingTable) -> list[list[str]]:
    rows = [row for row in table.rows if row.losses]
    phases = [phase for phase in LOSSES if any(phase in row.losses for row in rows)]
    cells = [["point", *(LOSSES[phase] for phase in phases), "efficiency"]]
    for row in rows:
        *lost, left = percentages([*row.losses.values(), row.efficiency or 0.0])
        texts = dict(zip(row.losses, lost, strict=True))
        cells.append([row.label, *(f"{texts[p]} %" if p in texts else UNAVAILABLE for p in phases), f"{left} %"])
    return cells


def _time_cells(table: ScalingTable) -> list[list[str]]:
    rows = [row for row in table.rows if row.goodput is not None]
    parts = [part for part in PARTS if any(row.parts_s.get(part) for row in rows)]
    money = {"gpu_hours": "GPU-hours", "cost": "cost", "cost_per_billion": f"cost of a billion {table.unit}"}
    money = {name: title for name, title in money.items() if any(getattr(row, name) is not None for row in rows)}
    cells = [["point", *(PARTS[part] for part in parts), "in all", "goodput", *money.values()]]
    for row in rows:
        spent = [row.parts_s.get(part, 0.0) for part in parts]
        texts = percentages([value / sum(spent) for value in spent])
        # A run without records of compilation or restore may still have both, inside its starts and steps.
        shares = [
            f"{run_time(value)} ({text} %)" if value or part not in FROM_RECORDS else UNAVAILABLE
            for part, value, text in zip(parts, spent, texts, strict=True)
        ]
        amounts = [amount(getattr(row, name)) for name in money]
        cells.append([row.label or row.point, *shares, run_time(sum(spent)), percent(row.goodput), *amounts])
    return cells


def _gpu_cells(table: ScalingTable) -> list[list[str]]:
    known = [(row, use) for row, use in zip(table.rows, table.gpus, strict=False) if use is not None]
    has_work = any(row.joules_per_work is not None for row, _ in known)
    one = "unit of work" if table.unit == "work" else table.unit.removesuffix("s")
    per_work = [f"energy of a {one}"] if has_work else []
    cells = [["point", "GPUs sampled", "energy", *per_work, "mean power of a GPU", "throttled"]]
    for row, use in known:
        energy = [told(row.energy_kwh, "kWh"), *([told(row.joules_per_work, "J")] if has_work else [])]
        gpus = str(sum(host.gpus for host in use.hosts))
        cells.append([row.label or row.point, gpus, *energy, told(use.mean_power_w, "W"), percent(use.throttled)])
    return cells


def host_table(use: GpuUse) -> Cells:
    """Make the table of the GPUs of each host."""
    cells = [["host", "GPUs", "energy", "mean power of a GPU", "SM clock", "hottest", "throttled", "reasons"]]
    for host in sorted(use.hosts, key=lambda host: -(host.throttled or 0.0))[:MAX_HOSTS]:
        reasons = ", ".join(f"{reason} {percent(of)}" for reason, of in host.reasons.items())
        energy = told(None if host.energy_j is None else host.energy_j / 3.6e6, "kWh")
        power, clock = told(host.mean_power_w, "W"), told(host.sm_clock_mhz, "MHz")
        shown = [energy, power, clock, told(host.hottest_c, "°C"), percent(host.throttled), reasons]
        cells.append([host.host, str(host.gpus), *shown])
    return Cells("GPUs by host", cells[0], cells[1:], [False] + [True] * 7)


def slowest_table(found: RunDetail) -> Cells:
    """Make the table of the slowest ranks of a run."""
    waits = any(row.time.data_wait_s is not None for row in found.slowest)
    titles = ["rank", "host", "own time", "above the median of the others", "of the step time", "data wait"]
    rows = [
        [
            *(str(row.time.rank), row.host or UNAVAILABLE, seconds(row.time.own_s)),
            *(f"{1000 * row.time.excess_s:.3g} ms", percent(row.share), seconds(row.time.data_wait_s)),
        ]
        for row in found.slowest
    ]
    cells = Cells("Slowest ranks", titles, rows, [True, False, True, True, True, True])
    return cells if waits else cells.without("data wait")


def _distribution_table(found: RunDetail) -> Cells:
    names, values = zip(*found.percentiles_s, strict=True)
    row = ["step time", *map(seconds, values)]
    return Cells("Distribution of step times", ["", *names], [row], [True] * len(row))


# A whole report on the terminal and in Markdown.


DROPPED_FIRST = ("topology", "per rank", "spread", "nodes", "speedup", "loss")
"""Ends of the titles of columns that a narrow terminal does not show, in this order."""


def show(table: ScalingTable, console: Console) -> None:
    """Print the tables of the points and the notes.

    On a narrow terminal, a line names the columns that are left out.
    """
    for whole in point_tables(table):
        cells = whole
        for ending in DROPPED_FIRST:
            if console.is_terminal and natural_width(cells.terminal(), console) > console.width:
                cells = cells.without(ending)
        shown = cells.terminal()
        # A log file has no width, so it gets the whole table with lines of any length.
        width = console.width if console.is_terminal else natural_width(shown, console)
        console.print(Text(f"\n{cells.heading}\n", style="bold"), soft_wrap=True)
        console.print(Segments(console.render(shown, console.options.update(width=width))), soft_wrap=True, end="")
        dropped = [title.replace("\n", " ") for title in whole.titles if title not in cells.titles]
        if dropped:
            console.print(Text(f"(too narrow for {', '.join(dropped)}: see {table.selection.stem}.md)"))
    console.print()
    for line in filter(None, (table.conditions, table.selection.text, *table.notes)):
        console.print(Text(line), soft_wrap=not console.is_terminal)


def markdown(table: ScalingTable) -> str:
    """Return the tables, conditions and notes in Markdown, with the kind of scaling as headings."""
    blocks = [f"# {cells.heading}\n\n{cells.markdown()}" for cells in point_tables(table)]
    blocks += filter(None, (table.conditions, table.selection.text, "\n".join(f"- {note}" for note in table.notes)))
    parts = part_tables(table)
    for found in table.details if len(table.rows) == 1 else ():
        parts += [_distribution_table(found), *([slowest_table(found)] if found.slowest else [])]
    blocks += [f"## {cells.heading}\n\n{cells.markdown()}" for cells in parts]
    return "\n\n".join(blocks) + "\n"


# Figures with all digits.


CSV_COLUMNS = (
    *("point", "nodes", "ranks", "topology", "throughput", "throughput_per_rank", "step_time_s", "step_time_s_spread"),
    *("speedup", "efficiency", "mfu_palm", "oversubscribed", "state", "series", "scaling", "loss", "last_step"),
    *("steps_measured", "run_time_s", "attempts", "label", "efficiency_low", "efficiency_high", "noisy", "goodput"),
    *("gpu_hours", "cost", "energy_kwh", "ratio_to_first", "unread_lines"),
)
"""Fields of a row in the CSV file, in this order. The JSON file has all fields."""


def csv_text(table: ScalingTable) -> str:
    """Return the rows as CSV with all digits. A figure that is not known or not stated is an empty cell.

    The throughput column has the name of its unit, such as tokens_per_s, or work_per_s if units differ.
    """
    names = [name.replace("throughput", f"{table.unit}_per_s") for name in CSV_COLUMNS]
    return _csv([names, *([getattr(row, name) for name in CSV_COLUMNS] for row in table.rows)])


def parts_csv_text(table: ScalingTable) -> str:
    """Return the parts of the rows as CSV, one on each line: time, interruptions by cause, lost efficiency, GPUs."""
    lines: list[list[Any]] = [["point", "label", "of", "part", "value", "unit"]]
    for row in table.rows:
        hours, one = f"{row.hours_of}-hours", table.unit.removesuffix("s")
        parts = [
            *(("time", part, value, "s") for part, value in row.parts_s.items()),
            *(("interruptions", cause, value, hours) for cause, value in row.causes_h.items()),
            *(("lost efficiency", phase, value, "share") for phase, value in row.losses.items()),
            ("interruptions", "number", row.interruptions, ""),
            ("interruptions", "restarts in place", row.restarts_in_place, ""),
            ("interruptions", "saved in place", row.saved_in_place_h, hours),
            ("interruptions", "wait saved in place", row.saved_in_place_wait_s, "s"),
            ("cost", f"a billion {table.unit}", row.cost_per_billion, ""),
            ("energy", f"a {one}", row.joules_per_work, "J"),
            ("energy", "mean power of a GPU", row.gpu_power_w, "W"),
            ("energy", "throttled", row.throttled, "share"),
        ]
        lines += [[row.point, row.label, *part] for part in parts if part[2] is not None]
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    texts = [[str(value).lower() if isinstance(value, bool) else value for value in line] for line in lines]
    csv.writer(file, lineterminator="\n").writerows(texts)
    return file.getvalue()
