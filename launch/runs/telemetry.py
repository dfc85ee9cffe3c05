"""GPU telemetry: samples of the GPUs of a node, a file for each node in the run folder.

Owns the fields of ``telemetry/node_00000.jsonl``. A line has one sample of all GPUs of the node: their addresses under
``bus``, and under the name of each gauge a list with a value for each of them, null where that GPU does not tell it.
Must not know who takes samples, nor what is made of them. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from launch.runs.files import read_json_lines
from launch.runs.folder import RunFolder
from launch.runs.unwritten import append_lines

GAUGES = {
    "power_w": 1,
    "energy_j": 3,
    "sm_clock_mhz": 0,
    "memory_clock_mhz": 0,
    "temperature_c": 0,
    "throttle_reasons": 0,
}
"""Gauge -> decimals that are kept. Energy is a counter: joules since the driver was loaded, so that differences count.
Throttle reasons are the bits of NVML's clocks event reasons."""
THROTTLE_REASONS = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "driver's thermal limit",
    0x40: "too hot",
    0x80: "power brake",
}
"""Bit -> reason for which clocks are lower than asked for (nvml.h, nvmlClocksEventReasons). Idle clocks (0x01), clocks
set by an administrator (0x02, 0x10, 0x100) are none."""


@dataclass(frozen=True)
class GpuSample:
    """Sample of all GPUs that one node has for the run."""

    time: float
    """Unix time, seconds."""
    attempt: int
    host: str
    gauges: Mapping[str, Mapping[str, float]]
    """Address of a GPU on the PCI bus -> gauge -> value; one that it does not tell is absent."""

    def as_dict(self) -> dict[str, Any]:
        """The line of the file."""
        line: dict[str, Any] = {"time": round(self.time, 3), "attempt": self.attempt, "host": self.host}
        line["bus"] = list(self.gauges)
        for name, decimals in GAUGES.items():
            values = [of_gpu.get(name) for of_gpu in self.gauges.values()]
            if any(value is not None for value in values):
                line[name] = [_rounded(value, decimals) for value in values]
        return line


def _rounded(value: float | None, decimals: int) -> float | int | None:
    return None if value is None else round(value, decimals) if decimals else int(value)


def append_samples(folder: RunFolder, node: int, samples: Iterable[GpuSample]) -> None:
    """Append samples to the file of a node."""
    append_lines(folder.telemetry(node), [sample.as_dict() for sample in samples])


def telemetry_nodes(folder: RunFolder) -> list[int]:
    """Nodes that have samples, in order."""
    names = (path.stem.removeprefix("node_") for path in (folder.path / "telemetry").glob("node_*.jsonl"))
    return sorted(int(name) for name in names if name.isdigit())


def read_samples(folder: RunFolder, node: int) -> Iterator[GpuSample]:
    """Yield the samples of a node in the order in which they were taken; other lines are passed over."""
    for line in read_json_lines(folder.telemetry(node)):
        sample = _parse(line)
        if sample is not None:
            yield sample


def _parse(line: Mapping[str, Any]) -> GpuSample | None:
    time, attempt, host, buses = (line.get(name) for name in ("time", "attempt", "host", "bus"))
    if not (isinstance(time, int | float) and isinstance(attempt, int) and isinstance(host, str)):
        return None
    if not isinstance(buses, list):
        return None
    lists = {name: line[name] for name in GAUGES if isinstance(line.get(name), list) and len(line[name]) == len(buses)}
    gauges = {
        str(bus): {name: values[index] for name, values in lists.items() if isinstance(values[index], int | float)}
        for index, bus in enumerate(buses)
    }
    return GpuSample(float(time), attempt, host, gauges)
