"""The Scaling run of TensorBoard: curves over the number of ranks, the table as text, the figure as image.

Owns the folder ``Scaling`` of a report. The only series is the run ``Scaling`` itself, several are runs below it, and
what would be ideal is a run ``ideal`` below each: all have the same tags, so that they share the charts, and each has
its own colour. Must not compute figures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from launch.report.table import Row, ScalingTable
from launch.report.views import markdown
from launch.runs.files import write_atomically
from launch.runs.overrides import point_name
from launch.runs.tensorboard import Curve, EventWriter

RUN = "Scaling"
IDEAL_RUN = "ideal"
SUFFIX = ".scaling"  # marks the event files that this report owns

CHARTS = {
    "Tokens per second": Curve("scaling/tokens_per_s", "scaling/tokens_per_s_low", "scaling/tokens_per_s_high"),
    "Efficiency": Curve("scaling/efficiency"),
    "Step time in seconds": Curve("scaling/step_time_s", "scaling/step_time_s_low", "scaling/step_time_s_high"),
    "Loss of the last step": Curve("scaling/loss"),
}
"""Title -> curve and its quartiles. The axis that TensorBoard calls step is the number of ranks."""


def write_dashboard(table: ScalingTable, png: bytes, folder: Path) -> Path:
    """Write the Scaling run and return its folder.

    New files come whole, and before the old ones go; each makes TensorBoard forget the points of those before it. So
    whoever reads in between, or after a crash in between, sees the new report, and so does a running TensorBoard
    (with ``--load_fast=false`` once it is started again: that reader waits for ever at a file that is gone).
    """
    root = folder / RUN
    old = list(root.rglob(f"events.out.tfevents.*{SUFFIX}"))
    with tempfile.TemporaryDirectory() as scratch:
        _write_events(table, png, Path(scratch))
        for path in sorted(Path(scratch).rglob("events.out.tfevents.*")):
            write_atomically(root / path.relative_to(scratch), path.read_bytes())
    for path in old:
        path.unlink()
    for left in sorted({path.parent for path in old} - {root}, reverse=True):
        if not any(left.iterdir()):
            left.rmdir()
    return root


def _write_events(table: ScalingTable, png: bytes, root: Path) -> None:
    with _writer(root) as writer:
        tags = set()
        for label in dict.fromkeys(row.series for row in table.rows):
            rows = [row for row in table.rows if row.series == label]
            folder = root / point_name([label], exclude=()) if label else root
            if label:
                with _writer(folder) as of_series:
                    tags |= _write_curves(of_series, rows, _measured)
            else:
                tags |= _write_curves(writer, rows, _measured)
            if any(row.tokens_per_s_ideal is not None for row in rows):
                with _writer(folder / IDEAL_RUN) as ideal:
                    _write_curves(ideal, rows, _ideal)
        charts = {title: curve for title, curve in CHARTS.items() if curve.value in tags}
        writer.layout({"Scaling: measured and ideal over the number of ranks": charts})
        writer.text("scaling/table", markdown(table))
        writer.image("scaling/figure", png)


def _writer(folder: Path) -> EventWriter:
    return EventWriter(folder, suffix=SUFFIX)


def _write_curves(
    writer: EventWriter, rows: Sequence[Row], values: Callable[[Row], dict[str, float | None]]
) -> set[str]:
    """Write the points of one series, smallest first; returns the tags that got a value."""
    written = set()
    for row in rows:
        for name, value in values(row).items():
            if value is not None and row.ranks is not None:
                writer.scalar(f"scaling/{name}", value, step=row.ranks)
                written.add(f"scaling/{name}")
    return written


def _measured(row: Row) -> dict[str, float | None]:
    names = [tag.removeprefix("scaling/") for curve in CHARTS.values() for tag in curve if tag is not None]
    return {name: getattr(row, name) for name in names}


def _ideal(row: Row) -> dict[str, float | None]:
    """A line: the band around it has no width, but TensorBoard wants one."""
    names = ("tokens_per_s", "tokens_per_s_low", "tokens_per_s_high")
    band: dict[str, float | None] = dict.fromkeys(names, row.tokens_per_s_ideal)
    return band if row.efficiency is None else {**band, "efficiency": 1.0}
