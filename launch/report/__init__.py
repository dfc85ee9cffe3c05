"""From run folders to a scaling report: a table, a figure, and a dashboard in TensorBoard.

A report reads run folders only, so it can be repeated at any time. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Collection

from rich.console import Console

from launch.report.selection import Selection, select
from launch.report.table import Row, ScalingTable, build, tabulate_selection
from launch.report.views.text import show
from launch.report.views.write import ALL_FILES, write
from launch.runs.files import ReportFile

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


def show_and_write(table: ScalingTable, console: Console, files: Collection[ReportFile] = ALL_FILES) -> None:
    """Show a report, write its files, or some of them, and say where they are and what else there is to see."""
    show(table, console)
    for path in write(table, files=files):
        console.print(f"wrote {path}", highlight=False, markup=False)
    if len(table.rows) > 1 and table.selection.dashboard is not None and ReportFile.tensorboard in files:
        console.print(f"dashboard: tensorboard --logdir {table.selection.folder}", highlight=False, markup=False)
    for line in table.selection.others():
        console.print(line, highlight=False, markup=False)
