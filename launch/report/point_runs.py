"""Runs of TensorBoard for single points: settings and figures for its HParams tab, the heat map, curves of the GPUs.

Owns what such a run holds. Below a sweep's Scaling run each point with figures is ``points/NAME``, and one whose GPUs
were sampled ``gpus/NAME``, apart so that the HParams tab takes no curve over time for a result. Must not compute
figures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from launch.report.figure import draw_ranks
from launch.report.gpu_tables import host_cells
from launch.report.gpu_use import GpuUse
from launch.report.row import Row
from launch.report.table import ScalingTable
from launch.report.views import lines
from launch.runs.overrides import NOT_IN_POINT, point_keys, typed_key
from launch.runs.tensorboard import EventWriter

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
