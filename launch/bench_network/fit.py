"""Fit of latency and bandwidth to measured times, and the table of the links."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from launch.runs.measured import COLLECTIVES, FASTEST, TIERS, LinkFit, Network, terms

# Fit of latency and bandwidth to measured times, by least squares of relative errors. Pure arithmetic.


@dataclass(frozen=True)
class Sample:
    """The time of one collective: so many bytes over so many ranks of a tier."""

    tier: str
    collective: str
    ranks: int
    bytes: int
    seconds: float


def fit_network(samples: Sequence[Sample], ranks_per_node: int) -> Network:
    """Fit every collective of every tier that was measured."""
    tiers = {}
    for tier in TIERS:
        of_tier = [sample for sample in samples if sample.tier == tier]
        fits = {name: [sample for sample in of_tier if sample.collective == name] for name in COLLECTIVES}
        if of_tier:
            tiers[tier] = {name: fit_link(name, found) for name, found in fits.items() if found}
    return Network(ranks_per_node, tiers)


def fit_link(collective: str, samples: Sequence[Sample]) -> LinkFit:
    """Fit latency and time per byte, neither of them negative.

    Every time counts by its relative error: a small message that takes microseconds as much as a large one.
    """
    times = np.array([sample.seconds for sample in samples])
    known = [terms(collective, sample.ranks) for sample in samples]
    rows = np.array([[count, share * s.bytes] for (count, share), s in zip(known, samples, strict=True)])
    rows = rows / times[:, None]
    best, _, rank, _ = np.linalg.lstsq(rows * SCALE, np.ones(len(rows)), rcond=None)
    found = best * SCALE
    if rank < 2 or (found < 0).any():
        found = max(_alone(rows), key=lambda one: -float(((rows @ one - 1) ** 2).sum()))
    residuals = rows @ found - 1
    spread = float((residuals**2).sum()) / max(1, len(rows) - 2)
    covariance = spread * np.linalg.pinv((rows * SCALE).T @ (rows * SCALE)) * np.outer(SCALE, SCALE)
    latency, per_byte = (float(value) for value in found)
    rate = 1 / per_byte if per_byte > 0 else FASTEST
    return LinkFit(
        latency_s=latency,
        bytes_per_s=min(rate, FASTEST),
        latency_error_s=float(covariance[0, 0]) ** 0.5,
        bytes_per_s_error=rate * rate * float(covariance[1, 1]) ** 0.5 if per_byte > 0 else 0.0,
        error=float((residuals**2).mean()) ** 0.5,
    )


SCALE = np.array([1e-6, 1e-9])
"""A microsecond, and a nanosecond for a byte: the unknowns as numbers near one, by which a rank can be told."""


def _alone(rows: Any) -> list[Any]:
    """The best fits with one of the two terms alone."""
    found = []
    for column in (0, 1):
        one = np.zeros(2)
        squares = float((rows[:, column] ** 2).sum())
        one[column] = float(rows[:, column].sum()) / squares if squares else 0.0
        found.append(one)
    return found


# Measured links as a table for the terminal.


WIDE = 1000
"""Columns of a terminal on which every table fits."""
NAMES = {"intra_node": "within a node", "inter_node": "between nodes"}


def show(network: Network, samples: Sequence[Sample], measured: Mapping[str, Any], console: Console) -> None:
    """Print one line for each collective of each tier: the fit with its standard errors, and how well it fits."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for title in ("tier", "collective", "ranks", "latency, us", "bandwidth, GB/s", "misfit", "samples"):
        table.add_column(title, justify="left" if title in ("tier", "collective") else "right", no_wrap=True)
    for tier, fits in network.tiers.items():
        for name, fit in fits.items():
            rate = fit.bytes_per_s
            own = [sample for sample in samples if (sample.tier, sample.collective) == (tier, name)]
            table.add_row(
                NAMES[tier],
                name,
                ", ".join(str(count) for count in sorted({sample.ranks for sample in own})),
                f"{1e6 * fit.latency_s:.3g} ± {1e6 * fit.latency_error_s:.2g}",
                "not seen" if rate >= FASTEST else f"{rate / 1e9:.3g} ± {fit.bytes_per_s_error / 1e9:.2g}",
                f"{100 * fit.error:.0f} %",
                str(len(own)),
            )
    nodes, each = measured["nodes"], measured["ranks_per_node"]
    heading = f"{nodes} node{'s' * (nodes > 1)} x {each} rank{'s' * (each > 1)}, {measured['device']}, "
    console.print(f"{heading}{measured['backend']}, torch {measured['software']['torch']}", highlight=False)
    needed = Measurement.get(console, console.options.update(width=WIDE), table).maximum
    console.width = max(console.width, needed)  # a terminal wraps what is too wide; a cell that is cut tells nothing
    console.print(table)
    told = "latency of a message, and bandwidth of a rank's link; misfit: root mean square of predicted over measured"
    console.print(told, highlight=False, markup=False)
