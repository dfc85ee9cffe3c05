"""Output for TensorBoard: the dashboard of a sweep, and the summary of one run."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

from launch.report.table import Row, ScalingTable
from launch.report.text import markdown_text
from launch.runs.event_files import Curve, EventWriter
from launch.runs.folder import write_atomically
from launch.runs.overrides import point_name

RUN, RUN_OF_ONE = "Scaling", "Summary"
IDEAL = "ideal"
"""Name of the subfolder with the ideal curves."""
SUFFIX = ".scaling"  # marks the event files that a report owns


def write_dashboard(table: ScalingTable, png: bytes, folder: Path) -> Path:
    """Write the TensorBoard run of a report, named Scaling for several points and Summary for one point. An earlier
    TensorBoard run of the report is replaced.

    The new files are complete before the old files are removed, and TensorBoard drops the values of the old files when
    it reads a new file. So a reader always sees a whole report, even after a crash. Restart a TensorBoard that has
    ``--load_fast=false``, because it waits forever at a removed file.

    Returns:
        The folder of the TensorBoard run.
    """
    root = folder / (RUN if len(table.rows) > 1 else RUN_OF_ONE)
    old = list(root.rglob(f"events.out.tfevents.*{SUFFIX}"))
    with tempfile.TemporaryDirectory() as scratch:
        name = "scaling" if len(table.rows) > 1 else "summary"
        with EventWriter(Path(scratch), suffix=SUFFIX) as whole:
            whole.text(f"{name}/table", markdown_text(table))
            whole.image(f"{name}/figure", png)  # The picture of one run includes the heat map of its ranks.
            if len(table.rows) > 1:
                _write_curves(table, whole, Path(scratch))
        for path in sorted(Path(scratch).rglob("events.out.tfevents.*")):
            write_atomically(root / path.relative_to(scratch), path.read_bytes())
    for path in old:
        path.unlink()
    for left in sorted({path.parent for path in old}, reverse=True):
        if not any(left.iterdir()):
            left.rmdir()
    return root


def _write_curves(table: ScalingTable, whole: EventWriter, root: Path) -> None:
    """Write charts over the number of ranks. Each series has its own curves.

    TensorBoard's step is the number of ranks. Without throughputs, their chart is absent.

    Args:
        table: report of several points.
        whole: writer of the files in ``root``.
        root: folder of the TensorBoard run.
    """
    per_s = f"{table.unit}_per_s"
    shown = {
        f"{table.unit.capitalize()} per second": (per_s, f"{per_s}_low", f"{per_s}_high"),
        "Efficiency": ("efficiency",),
        "Step time in seconds": ("step_time_s", "step_time_s_low", "step_time_s_high"),
    }
    if all(row.throughput is None for row in table.rows):
        del shown[f"{table.unit.capitalize()} per second"]
    charts = {title: Curve(*(f"scaling/{name}" for name in names)) for title, names in shown.items()}
    names = [*chain(*shown.values()), "loss"]
    whole.layout({"Scaling: measured and ideal over the number of ranks": charts})
    for series in dict.fromkeys(row.series for row in table.rows):
        rows = [row for row in table.rows if row.series == series and row.ranks is not None]
        folder = root / point_name([series], exclude=()) if series else root
        # A second file in a folder would make TensorBoard forget the first file.
        with EventWriter(folder, suffix=SUFFIX) if series else nullcontext(whole) as writer:
            for row in rows:
                values = {name: getattr(row, name.replace(per_s, "throughput")) for name in names}
                _write_point(writer, row, values)
        if any(row.throughput_ideal is not None for row in rows):
            with EventWriter(folder / IDEAL, suffix=SUFFIX) as writer:
                for row in rows:
                    # The band around a line has no width, but TensorBoard requires one.
                    band = dict.fromkeys((name for name in names if "_per_s" in name), row.throughput_ideal)
                    _write_point(writer, row, band | {"efficiency": None if row.efficiency is None else 1.0})


def _write_point(writer: EventWriter, row: Row, values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None:
            writer.scalar(f"scaling/{name}", value, step=row.ranks or 0)
