"""Measured rates of matrix products by size: the file that ``cluster.matmul_rates`` names, and what lies between.

A product of (m, k) and (k, n) matrices counts 2 m k n FLOPs. Owns the file and the interpolation. Must not know who
measures or asks.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.runs.measured import read_measured

FORMAT = 1
COMMAND = "python -m gpt.bench_matmul"


@dataclass(frozen=True, eq=False)
class MatmulRates:
    """Rates of one device in one precision on a grid of sizes, FLOP/s."""

    axes: tuple[tuple[int, ...], ...]
    """Ascending sizes of m, n and k."""
    flops_per_s: Mapping[tuple[int, ...], float]
    """(m, n, k) -> rate, for all of the grid."""

    @property
    def best(self) -> float:
        """The fastest rate of all."""
        return max(self.flops_per_s.values())

    def rate(self, m: float, n: float, k: float) -> float:
        """Return the rate of a product: linear in the logarithms of sizes and rate between the nearest measured ones.

        Beyond the grid it is that of the nearest size on its edge.
        """
        corners = [between(axis, size) for axis, size in zip(self.axes, (m, n, k), strict=True)]
        total = 0.0
        for chosen in itertools.product(*corners):
            weight = math.prod(share for _, share in chosen)
            if weight:
                total += weight * math.log(self.flops_per_s[tuple(size for size, _ in chosen)])
        return math.exp(total)

    def times(self, factor: float) -> MatmulRates:
        """Return rates that are higher by a factor."""
        return replace(self, flops_per_s={shape: factor * rate for shape, rate in self.flops_per_s.items()})


def between(axis: Sequence[int], size: float) -> list[tuple[int, float]]:
    """Return the two sizes of an axis around one, each with its weight by the distance of logarithms."""
    above = bisect_right(axis, size)
    if above in (0, len(axis)):
        return [(axis[max(0, above - 1)], 1.0)]
    low, high = axis[above - 1], axis[above]
    share = math.log(size / low) / math.log(high / low)
    return [(low, 1 - share), (high, share)]


@dataclass(frozen=True)
class MatmulFile:
    """Measured rates of matrix products, as the file holds them."""

    device: str
    """Name as ``torch.cuda.get_device_name()`` gives it, or CPU."""
    precisions: Mapping[str, MatmulRates]
    """fp32, tf32, bf16 or fp16 -> rates."""


def as_document(device: str, samples: Sequence[Mapping[str, Any]], measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the file holds: samples of precision, m, n, k and seconds, and how they were measured."""
    return {"format": FORMAT, "device": device, "measured": dict(measured), "samples": [*map(dict, samples)]}


def read_matmul_rates(path: Path, key: str = "cluster.matmul_rates") -> MatmulFile:
    """Read measured rates.

    Raises:
        ConfigError: no such file, or something else in it.
    """
    return read_measured(path, key, _parse, FORMAT, COMMAND)


def _parse(document: Any) -> MatmulFile:
    found: dict[str, dict[tuple[int, ...], float]] = {}
    for sample in document["samples"]:
        shape = tuple(int(sample[name]) for name in "mnk")
        seconds = float(sample["seconds"])
        if min(shape) < 1 or not 0 < seconds < math.inf:
            raise ValueError(f"a product of m, n, k = {shape} in {seconds:g} s")
        found.setdefault(str(sample["precision"]), {})[shape] = 2 * math.prod(shape) / seconds
    if not found:
        raise ValueError("no samples")
    return MatmulFile(str(document["device"]), {name: _on_grid(name, rates) for name, rates in found.items()})


def _on_grid(precision: str, rates: Mapping[tuple[int, ...], float]) -> MatmulRates:
    axes = tuple(tuple(sorted({shape[axis] for shape in rates})) for axis in range(3))
    if missing := next((shape for shape in itertools.product(*axes) if shape not in rates), None):
        raise ValueError(f"no sample of m, n, k = {missing} in {precision}")
    return MatmulRates(axes, rates)
