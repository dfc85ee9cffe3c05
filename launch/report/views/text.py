"""The scaling table as text: on the terminal, as Markdown, as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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

# Cells of the tables about GPUs, which Markdown and the HTML page share. Must not compute figures.


MOST_HOSTS = 16
"""Hosts that the table of one run lists, first those that were throttled most; the JSON file has all."""


def gpu_cells(table: ScalingTable) -> list[list[str]]:
    """Tell energy, power and throttling of the points, with a head; empty where no GPU was sampled."""
    known = [(row, use) for row, use in zip(table.rows, table.gpus, strict=False) if use is not None]
    if not known:
        return []
    has_work = any(row.joules_per_work is not None for row, _ in known)
    one = "unit of work" if table.unit == "work" else table.unit.removesuffix("s")
    head = ["point", "GPUs sampled", "energy", *([f"energy of a {one}"] if has_work else [])]
    cells = [[*head, "mean power of a GPU", "throttled"]]
    for row, use in known:
        energy = [told(row.energy_kwh, "kWh"), *([told(row.joules_per_work, "J")] if has_work else [])]
        gpus = str(sum(host.gpus for host in use.hosts))
        cells.append([row.label or row.point, gpus, *energy, told(use.mean_power_w, "W"), percent(use.throttled)])
    return cells


def host_cells(use: GpuUse | None) -> list[list[str]]:
    """Tell what the GPUs of each host did, with a head; empty where none was sampled."""
    if use is None:
        return []
    cells = [["host", "GPUs", "energy", "mean power of a GPU", "SM clock", "hottest", "throttled", "reasons"]]
    for host in sorted(use.hosts, key=lambda host: -(host.throttled or 0.0))[:MOST_HOSTS]:
        reasons = ", ".join(f"{reason} {percent(of)}" for reason, of in host.reasons.items())
        energy = told(None if host.energy_j is None else host.energy_j / 3.6e6, "kWh")
        power, clock = told(host.mean_power_w, "W"), told(host.sm_clock_mhz, "MHz")
        shown = [energy, power, clock, told(host.hottest_c, "°C"), percent(host.throttled), reasons]
        cells.append([host.host, str(host.gpus), *shown])
    return cells


# The scaling table as text: on the terminal, as Markdown, as CSV.


NOT_CLAIMED = "not claimed"
TOLD_BY_RECORDS = ("compile", "restore")
"""Parts of the time that are known only where the step records tell them."""
DROPPED_FIRST = ("topology", "per rank", "spread", "nodes", "speedup", "loss")
"""Columns, by the end of their titles, that go where a terminal is too narrow."""


@dataclass(frozen=True)
class Column:
    """One column of the table for people."""

    title: str
    cell: Callable[[Row], str]
    number: bool = True


def efficiency(row: Row) -> str:
    """Efficiency in percent; one that is not exact is marked, and has no decimals."""
    if row.noisy and row.efficiency is not None:
        return f"~{100 * row.efficiency:.0f} %"
    return NOT_CLAIMED if row.efficiency is None and row.speedup is not None else percent(row.efficiency)


def columns(table: ScalingTable) -> list[Column]:
    """Choose the columns: of throughput, step times and MFU only where a point knows them."""
    rows = table.rows
    state = Column("state", lambda row: row.state, number=False)
    has_rates = any(row.throughput is not None for row in rows)
    per_s = f"{table.unit}/s"
    found = [Column("point", lambda row: row.label, number=False)]
    found += [state] if table.compares_run_times else []
    found += [Column("nodes", lambda row: count(row.nodes)), Column("ranks", lambda row: count(row.ranks))]
    if any(row.topology for row in rows):
        found.append(Column("topology", lambda row: row.topology or UNAVAILABLE, number=False))
    if has_rates or table.is_gpt:
        found.append(Column(per_s, lambda row: _rate_of(row, row.throughput, table)))
        found.append(Column(f"{per_s}\nper rank", lambda row: rate(row.throughput_per_rank)))
    if not table.compares_run_times:
        found.append(Column("step time", lambda row: seconds(row.step_time_s)))
        found.append(Column("spread", lambda row: seconds(row.step_time_s_spread)))
    else:
        found.append(Column("run time", lambda row: run_time(row.run_time_s)))
        found.append(Column("attempts", lambda row: count(row.attempts)))
    if table.is_scaling and (not table.compares_run_times or any(row.speedup is not None for row in rows)):
        found.append(Column("speedup", lambda row: UNAVAILABLE if row.speedup is None else f"{row.speedup:.2f}"))
        found.append(Column("efficiency", efficiency))
    if any(row.ratio_to_first is not None for row in rows):
        times = f"times\n{rows[0].source}"
        found.append(
            Column(times, lambda row: UNAVAILABLE if row.ratio_to_first is None else f"{row.ratio_to_first:.2f}")
        )
    if any(row.mfu_palm is not None for row in rows):
        found.append(Column("MFU", lambda row: percent(row.mfu_palm)))
    if any(percent(row.mfu_bf16) not in (percent(row.mfu_palm), UNAVAILABLE) for row in rows):
        found.append(Column("MFU\nof bf16", lambda row: percent(row.mfu_bf16)))
    if any(row.loss is not None for row in rows) or table.is_gpt:
        found.append(Column("loss", lambda row: UNAVAILABLE if row.loss is None else f"{row.loss:.4f}"))
    # A column without a single figure tells nothing; why there are none stands in the notes.
    found = [column for column in found if any(column.cell(row) != UNAVAILABLE for row in rows)]
    return found if table.compares_run_times else [*found, state]


def _rate_of(row: Row, value: float | None, table: ScalingTable) -> str:
    """A rate, with its unit where points of several units are in one table."""
    several = table.unit == "work" and row.unit is not None and value is not None
    return f"{rate(value)} {row.unit}/s" if several else rate(value)


def show(table: ScalingTable, console: Console) -> None:
    """Print the table and its notes. A narrow terminal gets fewer columns, and is told which are left out."""
    for heading, rows in table.sections():
        shown, dropped = columns(table), []
        for ending in DROPPED_FIRST:
            leaving = [column for column in shown if column.title.endswith(ending)]
            if leaving and console.is_terminal and _natural_width(_grid(shown, rows), console) > console.width:
                dropped += [column.title for column in leaving]
                shown = [column for column in shown if column not in leaving]
        grid = _grid(shown, rows)
        # A log file has no width: what is not a terminal gets the whole table on lines as long as they need to be.
        width = console.width if console.is_terminal else _natural_width(grid, console)
        console.print(Text(f"\n{heading}\n", style="bold"), soft_wrap=True)
        console.print(Segments(console.render(grid, console.options.update(width=width))), soft_wrap=True, end="")
        if dropped:
            left_out = ", ".join(dropped).replace("\n", " ")
            console.print(Text(f"(too narrow for {left_out}: see {table.selection.stem}.md)"))
    console.print()
    for line in filter(None, (table.conditions, table.selection.text, *table.notes)):
        console.print(Text(line), soft_wrap=not console.is_terminal)


def _grid(shown: Sequence[Column], rows: Sequence[Row]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    for column in shown:
        # Only names may be folded: a folded number cannot be read.
        grid.add_column(
            column.title, justify="right" if column.number else "left", no_wrap=column.number, overflow="fold"
        )
    for row in rows:
        grid.add_row(*(Text(column.cell(row)) for column in shown))
    return grid


def _natural_width(grid: Table, console: Console) -> int:
    """Characters that the grid takes unfolded."""
    return Measurement.get(console, console.options.update(width=10_000), grid).maximum


def markdown(table: ScalingTable) -> str:
    """The table, its conditions and its notes in Markdown, headed by the kind of scaling."""
    blocks = []
    for heading, rows in table.sections():
        shown = columns(table)
        lines = [
            [column.title.replace("\n", " ") for column in shown],
            ["---:" if column.number else ":---" for column in shown],
        ]
        lines += [[_escape(column.cell(row)) for column in shown] for row in rows]
        blocks.append(f"# {heading}\n\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    blocks += filter(None, (table.conditions, table.selection.text))
    blocks.append("\n".join(f"- {note}" for note in table.notes))
    blocks.append(_table("What efficiency was lost to", losses_cells(table)))
    blocks.append(_table("Where the time went", times_cells(table)))
    blocks += [
        _table(f"What interruptions cost, in {unit}-hours", loss_cells(rows)) for unit, rows in units(table.rows)
    ]
    blocks.append(_table("GPUs", gpu_cells(table)))
    if len(table.rows) == 1:
        blocks += [block for found in table.details for block in _detail_blocks(found)]
        blocks.append(_table("GPUs by host", host_cells(next(iter(table.gpus), None))))
    return "\n\n".join(filter(None, blocks)) + "\n"


def times_cells(table: ScalingTable) -> list[list[str]]:
    """Tell where the time of the points went, and what it cost, with a head; empty where nothing is known of it."""
    rows = [row for row in table.rows if row.goodput is not None]
    if not rows:
        return []
    parts = [part for part in PARTS if any(row.parts_s.get(part) for row in rows)]
    money = {
        "gpu_hours": "GPU-hours",
        "cost": "cost",
        "cost_per_billion": f"cost of a billion {table.unit}",
    }
    money = {name: title for name, title in money.items() if any(getattr(row, name) is not None for row in rows)}
    cells = [["point", *(PARTS[part] for part in parts), "in all", "goodput", *money.values()]]
    for row in rows:
        spent = [row.parts_s.get(part, 0.0) for part in parts]
        total = sum(spent)
        texts = percentages([value / total for value in spent])
        # A run that tells no compilation, or no restore, may have had some, in its starts and steps.
        shares = [
            f"{run_time(value)} ({text} %)" if value or part not in TOLD_BY_RECORDS else UNAVAILABLE
            for part, value, text in zip(parts, spent, texts, strict=True)
        ]
        amounts = [amount(getattr(row, name)) for name in money]
        cells.append([row.label or row.point, *shares, run_time(total), percent(row.goodput), *amounts])
    return cells


def _table(heading: str, cells: list[list[str]]) -> str:
    """Write cells under a heading, numbers to the right of the names; empty if there are none."""
    if not cells:
        return ""
    return f"## {heading}\n\n" + lines([cells[0], [":---", *["---:"] * (len(cells[0]) - 1)], *cells[1:]])


def losses_cells(table: ScalingTable) -> list[list[str]]:
    """Tell what efficiency was lost to, with a head; empty where nothing is known of it."""
    rows = [row for row in table.rows if row.losses]
    phases = [phase for phase in LOSSES if any(phase in row.losses for row in rows)]
    cells = [["point", *(LOSSES[phase] for phase in phases), "efficiency"]]
    for row in rows:
        parts = row.losses
        texts = dict(zip([*parts, ""], percentages([*parts.values(), row.efficiency or 0.0]), strict=True))
        cells.append([row.label, *(f"{texts[p]} %" if p in texts else UNAVAILABLE for p in phases), f"{texts['']} %"])
    return cells if rows else []


def _detail_blocks(found: RunDetail) -> list[str]:
    """Describe one run at length: how its step times are distributed, and its slowest ranks."""
    marks = [("", *(name for name, _ in found.percentiles_s)), ("---:",) * (len(found.percentiles_s) + 1)]
    marks.append(("step time", *(seconds(value) for _, value in found.percentiles_s)))
    blocks = ["## Distribution of step times\n\n" + lines(marks)]
    if found.slowest:
        waits = any(row.time.data_wait_s is not None for row in found.slowest)
        head = ["rank", "host", "own time", "above the median of the others", "of the step time"]
        cells = [[*head, "data wait"] if waits else head]
        cells.append(["---:", ":---", *["---:"] * (len(cells[0]) - 2)])
        for row in found.slowest:
            shown = [str(row.time.rank), row.host or UNAVAILABLE, seconds(row.time.own_s)]
            shown += [f"{1000 * row.time.excess_s:.3g} ms", percent(row.share)]
            cells.append([*shown, seconds(row.time.data_wait_s)] if waits else shown)
        blocks.append("## Slowest ranks\n\n" + lines(cells))
    return blocks


def lines(cells: Sequence[Sequence[str]]) -> str:
    """Write cells as a table in Markdown; the second row aligns the columns."""
    return "\n".join(f"| {' | '.join(map(_escape, row))} |" for row in cells)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


CSV_COLUMNS = (
    *("point", "nodes", "ranks", "topology", "throughput", "throughput_per_rank", "step_time_s", "step_time_s_spread"),
    *("speedup", "efficiency", "mfu_palm", "oversubscribed", "state", "series", "scaling", "loss", "last_step"),
    *("steps_measured", "run_time_s", "attempts", "label", "efficiency_low", "efficiency_high", "noisy", "goodput"),
    *("gpu_hours", "cost", "energy_kwh", "ratio_to_first", "unread_lines"),
)
"""Fields of a row in the CSV file, in this order. The JSON file has all."""


def csv_text(table: ScalingTable) -> str:
    """Write the rows with all digits; a figure that is not known, or not claimed, is an empty cell.

    Throughput is named for its unit, such as tokens_per_s, and work_per_s if points count different things.
    """
    names = [name.replace("throughput", f"{table.unit}_per_s") for name in CSV_COLUMNS]
    return _csv([names, *([getattr(row, name) for name in CSV_COLUMNS] for row in table.rows)])


def parts_csv_text(table: ScalingTable) -> str:
    """Write what the rows divide into, one part a line: time, interruptions by cause, lost efficiency, GPUs."""
    lines: list[list[Any]] = [["point", "label", "of", "part", "value", "unit"]]
    for row in table.rows:
        hours, one = f"{row.hours_of}-hours", table.unit.removesuffix("s")
        parts: list[tuple[str, str, float | None, str]] = [
            ("time", part, value, "s") for part, value in row.parts_s.items()
        ]
        parts += [("interruptions", cause, value, hours) for cause, value in row.causes_h.items()]
        parts += [("lost efficiency", phase, value, "share") for phase, value in row.losses.items()]
        known = [
            ("interruptions", "number", row.interruptions, ""),
            ("interruptions", "restarts in place", row.restarts_in_place, ""),
            ("interruptions", "saved in place", row.saved_in_place_h, hours),
            ("interruptions", "wait saved in place", row.saved_in_place_wait_s, "s"),
            ("cost", f"a billion {table.unit}", row.cost_per_billion, ""),
            ("energy", f"a {one}", row.joules_per_work, "J"),
            ("energy", "mean power of a GPU", row.gpu_power_w, "W"),
            ("energy", "throttled", row.throttled, "share"),
        ]
        parts += [part for part in known if part[2] is not None]
        lines += [[row.point, row.label, *part] for part in parts]
    return _csv(lines)


def _csv(lines: Sequence[Sequence[Any]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([_csv_cell(value) for value in line] for line in lines)
    return file.getvalue()


def _csv_cell(value: Any) -> str:
    if value is None:
        return ""
    return str(value).lower() if isinstance(value, bool) else str(value)
