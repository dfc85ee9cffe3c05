"""The files of a report: Markdown, CSV, figure, and the Scaling run for TensorBoard.

Owns which files belong to the report, and that making it again replaces these and nothing else. Must not compute
figures.
"""

from __future__ import annotations

from pathlib import Path

from launch.report.table import ScalingTable
from launch.report.views import csv_text, markdown
from launch.runs.files import write_atomically


def write(table: ScalingTable) -> list[Path]:
    """Write the report where it belongs; what an earlier one left there is replaced. Returns what was written.

    A sweep's report is ``scaling.*`` beside its points, as long as no other sweep was typed, and in the folder of its
    record for good; that of one run is ``summary.*`` in its folder, and that of all runs of a folder ``all_runs.*``.
    """
    # matplotlib and tensorboard take a second to import, which neither --help nor a refusal should wait for.
    from launch.report.dashboard import write_dashboard
    from launch.report.figure import draw

    selection, png = table.selection, draw(table)
    figure = f"{selection.stem}.png"
    contents = {
        f"{selection.stem}.md": f"{markdown(table)}\n![{table.title}]({figure})\n".encode(),
        f"{selection.stem}.csv": csv_text(table).encode(),
        figure: png,
    }
    for folder in selection.folders:
        for name, content in contents.items():
            write_atomically(folder / name, content)
    written = [selection.folders[0] / name for name in contents] + selection.folders[1:]
    return written if selection.dashboard is None else [*written, write_dashboard(table, png, selection.dashboard)]
