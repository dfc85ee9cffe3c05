"""Runs for TensorBoard: the Scaling dashboard, and settings, heat map and GPU curves of each point."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

from launch.report.points import GpuUse
from launch.report.table import Row, ScalingTable
from launch.report.views.figures import draw_ranks
from launch.report.views.text import host_cells, lines, markdown
from launch.runs.files import write_atomically
from launch.runs.overrides import NOT_IN_POINT, point_keys, point_name, typed_key
from launch.runs.tensorboard import Curve, EventWriter

# Runs of TensorBoard for single points: settings and figures for its HParams tab, the heat map, curves of the GPUs.


POINTS, GPUS = "points", "gpus"

Opener = Callable[[Path], AbstractContextManager[EventWriter]]


def write_point_runs(table: ScalingTable, root: Path, opener: Opener) -> None:
    """Write the runs of all points of a sweep below ``root``; ``opener`` opens the writer of a folder."""
    details = {found.label: found for found in table.details}
    for row, use, typed in zip(table.rows, table.gpus, table.typed, strict=True):
        figures = _figures(row, table.unit)
        if figures:
            with opener(root / POINTS / row.point) as writer:
                writer.hparams(settings(row, typed))
                for tag, value in figures.items():
                    writer.scalar(f"point/{tag}", value, row.last_step or 0)
                found = details.get(row.label)
                ranks = None if found is None else draw_ranks(found)
                if ranks is not None:
                    writer.image("point/ranks over the run", ranks, row.last_step or 0)
        if use is not None:
            with opener(root / GPUS / row.point) as writer:
                write_gpus(writer, use)


def settings(row: Row, typed: Sequence[str]) -> Mapping[str, bool | float | str]:
    """Settings that make the point what it is: what was typed for it, and how many ranks it had."""
    named = [one for one in sorted(point_keys(typed, NOT_IN_POINT)) if "=" in one]
    found = {typed_key(one): _value(one.split("=", 1)[1]) for one in named}
    return found if row.ranks is None else {**found, "ranks": float(row.ranks)}


def _value(text: str) -> bool | float | str:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return float(text)
    except ValueError:
        return text


def _figures(row: Row, unit: str) -> dict[str, float]:
    """Figures by which points are compared; what is not known, or not claimed, is absent."""
    figures = {
        f"{unit}_per_s": row.throughput,
        "efficiency": row.efficiency,
        "loss": row.loss,
        "step_time_s": row.step_time_s,
        "mfu": row.mfu_palm,
        "energy_kwh": row.energy_kwh,
    }
    return {name: value for name, value in figures.items() if value is not None}


def write_gpus(writer: EventWriter, use: GpuUse) -> None:
    """Write the curves of the GPUs over the run, by seconds since its first sample, and the table of the hosts."""
    for window in use.windows:
        step = int(window.begun - use.windows[0].begun)
        for name, value in window.values.items():
            writer.scalar(f"gpu/{name}", value, step, window.begun)
    cells = host_cells(use)
    writer.text("gpu/hosts", lines([cells[0], ["---"] * len(cells[0]), *cells[1:]]))


# The Scaling run of TensorBoard: curves over the number of ranks, the table as text, the figure as image.


RUN = "Scaling"
RUN_OF_ONE = "Summary"
IDEAL_RUN = "ideal"
SUFFIX = ".scaling"  # marks the event files that this report owns


def charts(table: ScalingTable) -> dict[str, Curve]:
    """Name the charts: title -> curve and its quartiles. The axis that TensorBoard calls step counts the ranks."""
    per_s = f"scaling/{table.unit}_per_s"
    if table.compares_run_times:
        return {"Run time in seconds": Curve("scaling/run_time_s"), "Efficiency": Curve("scaling/efficiency")}
    return {
        f"{table.unit.capitalize()} per second": Curve(per_s, f"{per_s}_low", f"{per_s}_high"),
        "Efficiency": Curve("scaling/efficiency"),
        "Step time in seconds": Curve("scaling/step_time_s", "scaling/step_time_s_low", "scaling/step_time_s_high"),
        "Loss of the last step": Curve("scaling/loss"),
    }


def write_dashboard(table: ScalingTable, png: bytes, folder: Path) -> Path:
    """Write the Scaling run of several points, or the Summary run of one, and return its folder.

    What an earlier report left there goes.

    New files come whole, and before the old ones go; each makes TensorBoard forget the points of those before it. So
    whoever reads in between, or after a crash in between, sees the new report, and so does a running TensorBoard
    (with ``--load_fast=false`` once it is started again: that reader waits for ever at a file that is gone).
    """
    root = folder / (RUN if len(table.rows) > 1 else RUN_OF_ONE)
    old = list(root.rglob(f"events.out.tfevents.*{SUFFIX}"))
    with tempfile.TemporaryDirectory() as scratch:
        (_write_events if len(table.rows) > 1 else _write_summary)(table, png, Path(scratch))
        for path in sorted(Path(scratch).rglob("events.out.tfevents.*")):
            write_atomically(root / path.relative_to(scratch), path.read_bytes())
    for path in old:
        path.unlink()
    for left in sorted({path.parent for path in old}, reverse=True):
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
                    tags |= _write_curves(of_series, rows, partial(_measured, table))
            else:
                tags |= _write_curves(writer, rows, partial(_measured, table))
            if any(row.throughput_ideal is not None for row in rows):
                with _writer(folder / IDEAL_RUN) as ideal:
                    _write_curves(ideal, rows, partial(_ideal, table.unit))
        shown = {title: curve for title, curve in charts(table).items() if curve.value in tags}
        writer.layout({"Scaling: measured and ideal over the number of ranks": shown})
        writer.text("scaling/table", markdown(table))
        writer.image("scaling/figure", png)

    write_point_runs(table, root, _writer)


def _write_summary(table: ScalingTable, png: bytes, root: Path) -> None:
    """Write the report of one run: its figure has the heat map of its ranks."""
    with _writer(root) as writer:
        writer.text("summary/table", markdown(table))
        writer.image("summary/figure", png)
        for use in filter(None, table.gpus):
            write_gpus(writer, use)


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


def _measured(table: ScalingTable, row: Row) -> dict[str, float | None]:
    names = [tag.removeprefix("scaling/") for curve in charts(table).values() for tag in curve if tag is not None]
    return {name: getattr(row, name.replace(f"{table.unit}_per_s", "throughput")) for name in names}


def _ideal(unit: str, row: Row) -> dict[str, float | None]:
    """A line: the band around it has no width, but TensorBoard wants one."""
    names = (f"{unit}_per_s", f"{unit}_per_s_low", f"{unit}_per_s_high")
    band: dict[str, float | None] = dict.fromkeys(names, row.throughput_ideal)
    return band if row.efficiency is None else {**band, "efficiency": 1.0}
