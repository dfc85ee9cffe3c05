"""Throughput and efficiency over the number of ranks, or what a program tells instead."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launch.report.numbers import rate, run_time, seconds
from launch.report.page.chart import Mark, line_chart
from launch.report.page.html import color, escape, grid, section
from launch.report.row import Row
from launch.report.table import ScalingTable
from launch.report.views import efficiency

Triple = tuple[float | None, float | None, float | None]


def scaling_section(table: ScalingTable) -> str:
    """Draw what was measured and what follows from it; empty for one point, which scales nothing."""
    if not table.is_scaling:
        return ""
    unit = table.unit
    charts = [
        _chart(table, f"{unit} per second", lambda r: (r.throughput_low, r.throughput, r.throughput_high), _rate, True),
        _chart(table, "efficiency, %", _efficiency, lambda row: efficiency(row), False),
    ]
    if not any(charts):
        charts = [
            _chart(table, "step time, s", _step_times, lambda row: seconds(row.step_time_s), True),
            _chart(table, "run time, s", lambda r: (r.run_time_s,) * 3, lambda r: run_time(r.run_time_s), True),
            _chart(table, "speedup", lambda r: (r.speedup,) * 3, lambda row: f"{row.speedup:.2f}", False),
        ]
        charts = charts[1:] if table.compares_run_times else [charts[0], charts[2]]
    return section("How well it scales", grid(charts), _legend(table))


def _rate(row: Row) -> str:
    return f"{rate(row.throughput)} {row.unit or 'units'}/s"


def _step_times(row: Row) -> Triple:
    return row.step_time_s_low, row.step_time_s, row.step_time_s_high


def _efficiency(row: Row) -> Triple:
    """Efficiency in percent with what is left of it by the quartiles of both points."""
    if row.efficiency is None:
        return None, None, None
    ends = (row.efficiency_low, row.efficiency, row.efficiency_high)
    low, middle, high = (100 * (row.efficiency if end is None else end) for end in ends)
    return low, middle, high


def _chart(
    table: ScalingTable, name: str, values: Callable[[Row], Triple], text: Callable[[Row], str], log: bool
) -> str:
    """Draw one figure of all series; empty where no two points of a series have it."""
    found = [_marks(rows, values, text) for rows in _by_series(table).values()]
    if not any(len(marks) > 1 for marks in found):
        return ""
    is_efficiency = name.startswith("efficiency")
    ideal: list[list[tuple[float, float]]] = []
    if is_efficiency:
        sizes = [mark.x for marks in found for mark in marks]
        ideal = [[(min(sizes), 100.0), (max(sizes), 100.0)]]
    elif name.endswith("per second"):
        lines = [
            [(float(row.ranks or 0), row.throughput_ideal) for row in rows if row.throughput_ideal is not None]
            for rows in _by_series(table).values()
        ]
        ideal = [line for line in lines if len(line) > 1]
    drawn = line_chart(found, ideal, ("ranks", name), lambda value: _short(value), log)
    return f'<div class="card">{drawn}</div>'


def _marks(rows: Sequence[Row], values: Callable[[Row], Triple], text: Callable[[Row], str]) -> list[Mark]:
    marks = []
    for row in rows:
        low, value, high = values(row)
        if row.ranks is not None and value is not None:
            ends = (value if low is None else low, value, value if high is None else high)
            marks.append(Mark(row.ranks, *ends, text=f"{row.label}: {text(row)}", hollow=bool(row.oversubscribed)))
    return marks


def _by_series(table: ScalingTable) -> dict[tuple[str | None, str], list[Row]]:
    """Rows of each curve, in the order of their colors."""
    found: dict[tuple[str | None, str], list[Row]] = {}
    for row in table.rows:
        found.setdefault((row.scaling, row.series), []).append(row)
    return found


def _legend(table: ScalingTable) -> str:
    curves = _by_series(table)
    kinds = {kind for kind, _ in curves}
    lines = []
    for index, (kind, series) in enumerate(curves):
        name = " ".join(filter(None, (series or "measured", f"({kind} scaling)" if len(kinds) > 1 and kind else "")))
        lines.append(f'<li><i style="background:{color(index)}"></i>{escape(name)}</li>')
    told = ["bars: between the quartiles", "dashed: ideal, from the smallest point"]
    if any(row.oversubscribed for row in table.rows):
        told.append("hollow: ranks shared cores or a GPU, and no efficiency is claimed")
    lines += [f'<li class="quiet">{escape(line)}</li>' for line in told]
    return f'<ul class="legend">{"".join(lines)}</ul>'


def _short(value: float) -> str:
    """Write a value of an axis: 500, 20k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
