"""The files of a report, written once or again while runs continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console

from launch.report.points import GpuUse, State
from launch.report.table import ScalingTable
from launch.report.views.page import page
from launch.report.views.text import csv_text, markdown, parts_csv_text, show
from launch.runs.files import ReportFile, write_atomically

# The files of a report: Markdown, CSV, figures, JSON, one HTML page, and the Scaling or Summary run for TensorBoard.


ALL_FILES = frozenset(ReportFile)


def write(table: ScalingTable, reload_s: float | None = None, files: Collection[ReportFile] = ALL_FILES) -> list[Path]:
    """Write the report where it belongs; what an earlier one left there is replaced. Returns what was written.

    Of the ``files`` only those that are named are written; others that are there already stay as they are.
    With ``reload_s`` a browser that shows the page loads it again after so many seconds.
    A sweep's report is ``scaling.*`` beside its points, as long as no other sweep was typed, and in the folder of its
    record for good; that of one run is ``summary.*`` in its folder, and that of all runs of a folder ``all_runs.*``.
    """
    selection = table.selection
    has_dashboard = ReportFile.tensorboard in files and selection.dashboard is not None
    pictures: dict[str, bytes] = {}
    if has_dashboard or not {ReportFile.png, ReportFile.svg}.isdisjoint(files):
        # A second to import and half a one to draw, which neither --help nor a refusal should wait for.
        from launch.report.views.figures import draw

        pictures = draw(table)
    figure = f"\n![{table.title}]({selection.stem}.png)\n" if ReportFile.png in files else "\n"
    made: dict[ReportFile, Callable[[], bytes]] = {
        ReportFile.md: lambda: f"{markdown(table)}{figure}".encode(),
        ReportFile.csv: lambda: csv_text(table).encode(),
        ReportFile.png: lambda: pictures["png"],
        ReportFile.svg: lambda: pictures["svg"],
        ReportFile.json: lambda: json_text(table).encode(),
        ReportFile.html: lambda: page(table, reload_s).encode(),
    }
    contents = {f"{selection.stem}.{file.value}": make() for file, make in made.items() if file in files}
    if ReportFile.csv in files:
        contents[f"{selection.stem}_parts.csv"] = parts_csv_text(table).encode()
    for folder in selection.folders:
        for name, content in contents.items():
            write_atomically(folder / name, content)
    written = [selection.folders[0] / name for name in contents] + selection.folders[1:]
    if has_dashboard:
        from launch.report.views.tensorboard import write_dashboard

        assert selection.dashboard is not None
        written.append(write_dashboard(table, pictures["png"], selection.dashboard))
    return written


def json_text(table: ScalingTable) -> str:
    """Write the whole report with all digits: rows, notes, and of each measured point its step times and ranks.

    ``gpus`` and ``unread``, lines that could not be read by rank and attempt, are in the order of the rows.

    What is not known, or not claimed, is null; so is a number that is none, such as the loss of a run that diverged.
    """
    content = {
        "title": table.title,
        "headings": [heading for heading, _ in table.sections()],
        "conditions": table.conditions,
        "unit": table.unit,
        "notes": table.notes,
        "rows": table.rows,
        "laws": table.laws,
        "repeats": table.repeats,
        "gpus": [None if use is None else _gpu_use(use) for use in table.gpus],
        "unread": table.unread,
        "details": table.details,
    }
    # Of a thousand ranks it is two megabytes, over which dataclasses.asdict and an indenting json.dumps take a second.
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n"


def _gpu_use(use: GpuUse) -> dict[str, Any]:
    """Use of a point's GPUs as JSON has it, without the curves over the run."""
    return {one.name: getattr(use, one.name) for one in fields(use) if one.name != "windows"}


# A report that is made again while its runs go on.


WATCH_S = 30.0
ENDED = frozenset(map(str, (State.FINISHED, State.FAILED, State.STOPPED, State.CANCELLED, State.BUDGET_EXCEEDED)))


def watch(
    make: Callable[[], ScalingTable], interval_s: float, console: Console, files: Collection[ReportFile] = ALL_FILES
) -> None:
    """Show and write a report every ``interval_s`` seconds, until all its runs have ended or the user interrupts.

    A run that was killed without a word looks as if it went on. While the report is watched its page asks the browser
    to load it again as often.
    """
    try:
        while True:
            table = make()
            is_over = all(row.state in ENDED for row in table.rows)
            if console.is_terminal:
                console.clear()
            show(table, console)
            written = write(table, reload_s=None if is_over else interval_s, files=files)
            told = f"wrote {', '.join(path.name for path in written)} in {table.selection.folders[0]}"
            console.print(told, highlight=False, markup=False)  # brackets in a path are no markup
            if is_over:
                return
            console.print(f"again in {interval_s:g} s; Ctrl-C ends this, and leaves the runs alone")
            time.sleep(interval_s)
    except KeyboardInterrupt:
        write(make(), reload_s=None, files=files)
