"""Cells of the tables about GPUs, which Markdown and the HTML page share. Must not compute figures."""

from __future__ import annotations

from launch.report.gpu_use import GpuUse
from launch.report.numbers import percent, told
from launch.report.table import ScalingTable

MOST_HOSTS = 16
"""Hosts that the table of one run lists, first those that were throttled most; the JSON file has all."""


def gpu_cells(table: ScalingTable) -> list[list[str]]:
    """Tell energy, power and throttling of the points, with a head; empty where no GPU was sampled."""
    known = [(row, use) for row, use in zip(table.rows, table.gpus, strict=False) if use is not None]
    if not known:
        return []
    has_work = any(row.joules_per_work is not None for row, _ in known)
    one = "unit of work" if table.unit == "work" else table.unit.removesuffix("s")
    head = ["point", "GPUs sampled", "energy", *([f"energy of a {one}"] if has_work else [])]
    cells = [[*head, "mean power of a GPU", "throttled"]]
    for row, use in known:
        energy = [told(row.energy_kwh, "kWh"), *([told(row.joules_per_work, "J")] if has_work else [])]
        gpus = str(sum(host.gpus for host in use.hosts))
        cells.append([row.label or row.point, gpus, *energy, told(use.mean_power_w, "W"), percent(use.throttled)])
    return cells


def host_cells(use: GpuUse | None) -> list[list[str]]:
    """Tell what the GPUs of each host did, with a head; empty where none was sampled."""
    if use is None:
        return []
    cells = [["host", "GPUs", "energy", "mean power of a GPU", "SM clock", "hottest", "throttled", "reasons"]]
    for host in sorted(use.hosts, key=lambda host: -(host.throttled or 0.0))[:MOST_HOSTS]:
        reasons = ", ".join(f"{reason} {percent(of)}" for reason, of in host.reasons.items())
        energy = told(None if host.energy_j is None else host.energy_j / 3.6e6, "kWh")
        power, clock = told(host.mean_power_w, "W"), told(host.sm_clock_mhz, "MHz")
        shown = [energy, power, clock, told(host.hottest_c, "°C"), percent(host.throttled), reasons]
        cells.append([host.host, str(host.gpus), *shown])
    return cells
