"""The files of a report: Markdown, CSV, figures, JSON, one HTML page, and the Scaling or Summary run for TensorBoard.

Owns which files belong to the report, and that making it again replaces these and nothing else. Must not compute
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from launch.report.gpu_use import GpuUse
from launch.report.page import page
from launch.report.table import ScalingTable
from launch.report.views import csv_text, markdown
from launch.runs.files import write_atomically
from launch.runs.report_files import ReportFile

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
        from launch.report.figure import draw

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
    for folder in selection.folders:
        for name, content in contents.items():
            write_atomically(folder / name, content)
    written = [selection.folders[0] / name for name in contents] + selection.folders[1:]
    if has_dashboard:
        from launch.report.dashboard import write_dashboard

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
