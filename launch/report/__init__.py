"""Scaling reports from run folders: a table, figures, and a dashboard in TensorBoard. Does not import torch.

Example: ``write(build(Path("outputs/quick_test")))``.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from rich.console import Console

from launch.report.selection import Selection, select
from launch.report.table import Row, ScalingTable, build, tabulate_selection
from launch.report.text import csv_text, json_text, markdown_text, parts_csv_text, show
from launch.runs.folder import ReportFile, write_atomically

__all__ = [
    "Row",
    "ScalingTable",
    "Selection",
    "build",
    "select",
    "show",
    "show_and_write",
    "tabulate_selection",
    "write",
]

ALL_FILES = frozenset(ReportFile)


def write(table: ScalingTable, reload_s: float | None = None, files: Collection[ReportFile] = ALL_FILES) -> list[Path]:
    """Write the files of a report, in place of those of an earlier report.

    The files of a sweep's report are ``scaling.*``, in the folder of its points until the next sweep, and permanently
    in the folder of its record. The report of one run is ``summary.*``, that of all runs of a folder ``all_runs.*``.

    Args:
        table: the report.
        reload_s: seconds after which a browser reloads the page; None for never.
        files: kinds of files to write. Files of other kinds stay unchanged.

    Returns:
        Paths of the files in the first folder, then the other folders, and the folder of the TensorBoard run.
    """
    selection = table.selection
    pictures: dict[str, bytes] = {}
    # Importing matplotlib and jinja2 takes a second, which --help and refusals should not need.
    if not {ReportFile.png, ReportFile.svg, ReportFile.tensorboard}.isdisjoint(files):
        from launch.report.figures import draw_report

        pictures = draw_report(table)
    figure = f"\n![{table.title}]({selection.stem}.png)\n" if ReportFile.png in files else "\n"
    made: dict[str, str | bytes] = {".md": markdown_text(table) + figure, ".csv": csv_text(table)}
    made |= {f".{kind}": drawn for kind, drawn in pictures.items()} | {".json": json_text(table)}
    if ReportFile.html in files:
        from launch.report.page import page

        made[".html"] = page(table, reload_s)
    made["_parts.csv"] = parts_csv_text(table)
    contents = {
        selection.stem + end: text.encode() if isinstance(text, str) else text
        for end, text in made.items()
        if ReportFile(end.rpartition(".")[2]) in files
    }
    for folder in selection.folders:
        for name, content in contents.items():
            write_atomically(folder / name, content)
    written = [selection.folders[0] / name for name in contents] + selection.folders[1:]
    if ReportFile.tensorboard in files and selection.dashboard is not None:
        from launch.report.tensorboard import write_dashboard

        written.append(write_dashboard(table, pictures["png"], selection.dashboard))
    return written


def show_and_write(table: ScalingTable, console: Console, files: Collection[ReportFile] = ALL_FILES) -> None:
    """Print a report, write its files of the kinds ``files``, and print their paths.

    Also prints the commands for the other reports of the folder.
    """
    show(table, console)
    for path in write(table, files=files):
        console.print(f"wrote {path}", highlight=False, markup=False)
    if len(table.rows) > 1 and table.selection.dashboard is not None and ReportFile.tensorboard in files:
        console.print(f"dashboard: tensorboard --logdir {table.selection.folder}", highlight=False, markup=False)
    for line in table.selection.others():
        console.print(line, highlight=False, markup=False)
