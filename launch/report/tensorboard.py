"""Output for TensorBoard: the Scaling dashboard, and settings, heat map and GPU curves of each point."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from launch.report.figures import draw_ranks
from launch.report.points import GpuUse
from launch.report.table import Row, ScalingTable
from launch.report.text import host_table, markdown_text
from launch.runs.event_files import Curve, EventWriter
from launch.runs.files import write_atomically
from launch.runs.overrides import NOT_IN_POINT, point_keys, point_name, typed_key

RUN, RUN_OF_ONE = "Scaling", "Summary"
IDEAL, POINTS, GPUS = "ideal", "points", "gpus"
"""Names of subfolders in the folder of a sweep's TensorBoard run."""
LEAST_DIFFERENCE = 0.02
"""Relative difference between the losses of points above which the dashboard has a chart of them."""
SUFFIX = ".scaling"  # marks the event files that a report owns


def write_dashboard(table: ScalingTable, png: bytes, folder: Path) -> Path:
    """Write the TensorBoard run of a report: Scaling for several points, Summary for one. Replaces an earlier one.

    New files are complete before the old files are removed, and each new file makes TensorBoard forget the earlier
    points. So a reader always sees a whole report, even after a crash. A TensorBoard with ``--load_fast=false`` has to
    be restarted: that reader waits forever at a removed file.

    Returns:
        The folder of the TensorBoard run.
    """
    root = folder / (RUN if len(table.rows) > 1 else RUN_OF_ONE)
    old = list(root.rglob(f"events.out.tfevents.*{SUFFIX}"))
    with tempfile.TemporaryDirectory() as scratch:
        (_write_sweep if len(table.rows) > 1 else _write_summary)(table, png, Path(scratch))
        for path in sorted(Path(scratch).rglob("events.out.tfevents.*")):
            write_atomically(root / path.relative_to(scratch), path.read_bytes())
    for path in old:
        path.unlink()
    for left in sorted({path.parent for path in old}, reverse=True):
        if not any(left.iterdir()):
            left.rmdir()
    return root


def _writer(folder: Path) -> EventWriter:
    return EventWriter(folder, suffix=SUFFIX)


def _write_summary(table: ScalingTable, png: bytes, root: Path) -> None:
    """Write the report of one run. Its picture includes the heat map of its ranks."""
    with _writer(root) as writer:
        writer.text("summary/table", markdown_text(table))
        writer.image("summary/figure", png)
        for use in filter(None, table.gpus):
            write_gpus(writer, use)


def _write_sweep(table: ScalingTable, png: bytes, root: Path) -> None:
    """Write the report of a sweep: curves over ranks, table, figure, and a TensorBoard run for each point."""
    measured = charts(table)
    tags = [tag for curve in measured.values() for tag in curve if tag is not None]
    names = dict.fromkeys([*(tag.removeprefix("scaling/") for tag in tags), "loss"])
    with _writer(root) as whole:
        whole.layout({"Scaling: measured and ideal over the number of ranks": measured})
        whole.text("scaling/table", markdown_text(table))
        whole.image("scaling/figure", png)
        for series in dict.fromkeys(row.series for row in table.rows):
            rows = [row for row in table.rows if row.series == series and row.ranks is not None]
            folder = root / point_name([series], exclude=()) if series else root
            # A second file in a folder would make TensorBoard forget the first file.
            with _writer(folder) if series else nullcontext(whole) as writer:
                for row in rows:
                    values = {name: getattr(row, name.replace(f"{table.unit}_per_s", "throughput")) for name in names}
                    _write_point(writer, row, values)
            if any(row.throughput_ideal is not None for row in rows):
                with _writer(folder / IDEAL) as writer:
                    for row in rows:
                        # The band around a line has no width, but TensorBoard requires one.
                        band = dict.fromkeys((name for name in names if "_per_s" in name), row.throughput_ideal)
                        _write_point(writer, row, band | {"efficiency": None if row.efficiency is None else 1.0})
    details = {found.label: found for found in table.details}
    for row, use, typed in zip(table.rows, table.gpus, table.typed, strict=True):
        # Not the folder's name with all overrides: TensorBoard shortens long names in its list.
        name = point_name([row.label], exclude=())
        if figures := _figures(row, table.unit):
            with _writer(root / POINTS / name) as writer:
                writer.hparams(settings(row, typed))
                for tag, value in figures.items():
                    writer.scalar(f"point/{tag}", value, row.last_step or 0)
                ranks = draw_ranks(details[row.label]) if row.label in details else None
                if ranks is not None:
                    writer.image("point/ranks over the run", ranks, row.last_step or 0)
        if use is not None:
            with _writer(root / GPUS / name) as writer:
                write_gpus(writer, use)


def _write_point(writer: EventWriter, row: Row, values: Mapping[str, float | None]) -> None:
    for name, value in values.items():
        if value is not None:
            writer.scalar(f"scaling/{name}", value, step=row.ranks or 0)


def charts(table: ScalingTable) -> dict[str, Curve]:
    """Return chart title -> curve over the number of ranks. Throughput and step time have their quartiles.

    TensorBoard's step is the number of ranks. Without throughputs, or with nearly equal losses,
    their chart is absent.
    """
    per_s = f"scaling/{table.unit}_per_s"
    found = {"Efficiency": Curve("scaling/efficiency")}
    if table.compares_run_times:
        return {"Run time in seconds": Curve("scaling/run_time_s"), **found}
    if any(row.throughput is not None for row in table.rows):
        found = {f"{table.unit.capitalize()} per second": Curve(per_s, f"{per_s}_low", f"{per_s}_high"), **found}
    found["Step time in seconds"] = Curve("scaling/step_time_s", "scaling/step_time_s_low", "scaling/step_time_s_high")
    losses = [row.loss for row in table.rows if row.loss is not None]
    # TensorBoard's axes show three digits: with a smaller difference, all marks have the same number.
    if losses and max(losses) - min(losses) > LEAST_DIFFERENCE * max(map(abs, losses)):
        found["Loss of the last step"] = Curve("scaling/loss")
    return found


def settings(row: Row, typed: Sequence[str]) -> Mapping[str, bool | float | str]:
    """Return key -> value of the overrides of a point, and its number of ranks, as TensorBoard's hyperparameters."""
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
    """Return tag -> figure of a point, such as its efficiency. A figure that is not known or not stated is absent."""
    names = {f"{unit}_per_s": "throughput", "mfu": "mfu_palm"}
    names |= {name: name for name in ("efficiency", "loss", "step_time_s", "energy_kwh")}
    return {tag: value for tag, name in names.items() if (value := getattr(row, name)) is not None}


def write_gpus(writer: EventWriter, use: GpuUse) -> None:
    """Write the GPU curves of a run, in seconds since its first sample, and the table of its hosts."""
    for window in use.windows:
        step = int(window.begun - use.windows[0].begun)
        for name, value in window.values.items():
            writer.scalar(f"gpu/{name}", value, step, window.begun)
    writer.text("gpu/hosts", host_table(use).markdown())
