"""Scaling reports from run folders: a table, figures, and a dashboard in TensorBoard. Does not import torch.

Example: ``write(build(Path("outputs/quick_test")))``.
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
    """Show a report, write its files or some of them, and print the paths of the files and the folder's other
    reports.
    """
    show(table, console)
    for path in write(table, files=files):
        console.print(f"wrote {path}", highlight=False, markup=False)
    if len(table.rows) > 1 and table.selection.dashboard is not None and ReportFile.tensorboard in files:
        console.print(f"dashboard: tensorboard --logdir {table.selection.folder}", highlight=False, markup=False)
    for line in table.selection.others():
        console.print(line, highlight=False, markup=False)
