"""The files of a report, written once, or repeatedly while runs continue."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path

import msgspec
from rich.console import Console

from launch.report.points import GpuUse, State
from launch.report.table import ScalingTable
from launch.report.views.text import csv_text, markdown, parts_csv_text, show
from launch.runs.files import ReportFile, write_atomically

ALL_FILES = frozenset(ReportFile)
DRAWN = frozenset((ReportFile.png, ReportFile.svg, ReportFile.tensorboard))


def write(table: ScalingTable, reload_s: float | None = None, files: Collection[ReportFile] = ALL_FILES) -> list[Path]:
    """Write the files of a report and return their paths. Files of an earlier report are replaced.

    A sweep's report is ``scaling.*``: next to its points until the next sweep, and permanently in the folder of its
    record. The report of one run is ``summary.*`` in its folder. The report of all runs of a folder is ``all_runs.*``.

    Args:
        table: the report.
        reload_s: seconds after which a browser reloads the page; None for never.
        files: kinds of files to write. Files of other kinds stay unchanged.
    """
    selection = table.selection
    pictures: dict[str, bytes] = {}
    # Importing matplotlib and jinja2 takes a second, which --help and refusals should not need.
    if not DRAWN.isdisjoint(files):
        from launch.report.views.figures import draw

        pictures = draw(table)

    def html() -> str:
        from launch.report.views.page import page

        return page(table, reload_s)

    figure = f"\n![{table.title}]({selection.stem}.png)\n" if ReportFile.png in files else "\n"
    makers: dict[str, Callable[[], str | bytes]] = {
        ".md": lambda: markdown(table) + figure,
        ".csv": lambda: csv_text(table),
        ".png": lambda: pictures["png"],
        ".svg": lambda: pictures["svg"],
        ".json": lambda: json_text(table),
        ".html": html,
        "_parts.csv": lambda: parts_csv_text(table),
    }
    contents = {
        selection.stem + end: content.encode() if isinstance(content := make(), str) else content
        for end, make in makers.items()
        if ReportFile(end.rpartition(".")[2]) in files
    }
    for folder in selection.folders:
        for name, content in contents.items():
            write_atomically(folder / name, content)
    written = [selection.folders[0] / name for name in contents] + selection.folders[1:]
    if ReportFile.tensorboard in files and selection.dashboard is not None:
        from launch.report.views.tensorboard import write_dashboard

        written.append(write_dashboard(table, pictures["png"], selection.dashboard))
    return written


def json_text(table: ScalingTable) -> str:
    """Return the whole report as JSON with all digits: rows, notes, step times and ranks of each measured point.

    ``gpus`` and ``unread`` (damaged lines by rank and attempt) are in the order of the rows. A figure is null if it is
    not known or not stated, or not finite, such as the loss of a diverged run.
    """
    content = {
        "title": table.title,
        "headings": [heading for heading, _ in table.sections()],
        **{name: getattr(table, name) for name in ("conditions", "unit", "notes", "rows", "laws", "repeats")},
        "gpus": [use and {one.name: getattr(use, one.name) for one in GPU_FIELDS} for use in table.gpus],
        "unread": table.unread,
        "details": table.details,
    }
    # A thousand ranks give two megabytes, for which dataclasses.asdict and json.dumps take a second.
    return msgspec.json.format(msgspec.json.encode(content), indent=1).decode() + "\n"


GPU_FIELDS = [one for one in fields(GpuUse) if one.name != "windows"]
"""Fields of GPU use in the JSON file, which has no curves over the run."""


# A report that is repeated while its runs continue.


WATCH_S = 30.0
ENDED = frozenset(map(str, (State.FINISHED, State.FAILED, State.STOPPED, State.CANCELLED, State.BUDGET_EXCEEDED)))


def watch(
    make: Callable[[], ScalingTable], interval_s: float, console: Console, files: Collection[ReportFile] = ALL_FILES
) -> None:
    """Show and write a report every ``interval_s`` seconds until all its runs have ended or the user interrupts.

    A browser reloads the page at the same interval. A run that was killed without an event counts as running.
    """
    try:
        while True:
            table = make()
            is_over = all(row.state in ENDED for row in table.rows)
            if console.is_terminal:
                console.clear()
            show(table, console)
            written = write(table, reload_s=None if is_over else interval_s, files=files)
            names = f"wrote {', '.join(path.name for path in written)} in {table.selection.folders[0]}"
            console.print(names, highlight=False, markup=False)  # Brackets in a path are not markup.
            if is_over:
                return
            console.print(f"again in {interval_s:g} s; Ctrl-C ends this, and the runs continue")
            time.sleep(interval_s)
    except KeyboardInterrupt:
        write(make(), reload_s=None, files=files)
