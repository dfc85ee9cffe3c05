"""The files of a report: Markdown, CSV, figure, and the Scaling run for TensorBoard.

Owns which files belong to the report, and that making it again replaces these and nothing else. Must not compute
figures.
"""

from __future__ import annotations

from pathlib import Path

from launch.report.table import ScalingTable
from launch.report.views import csv_text, markdown
from launch.runs.files import write_atomically

FIGURE = "scaling.png"


def write(table: ScalingTable, folder: Path) -> list[Path]:
    """Write the report into ``folder``; what an earlier report left there is replaced. Returns what was written."""
    # matplotlib and tensorboard take a second to import, which neither --help nor a refusal should wait for.
    from launch.report.dashboard import write_dashboard
    from launch.report.figure import draw

    png = draw(table)
    contents = {
        "scaling.md": f"{markdown(table)}\n![Scaling of {table.name}]({FIGURE})\n".encode(),
        "scaling.csv": csv_text(table).encode(),
        FIGURE: png,
    }
    for name, content in contents.items():
        write_atomically(folder / name, content)
    return [*(folder / name for name in contents), *write_dashboard(table, png, folder)]
