"""Measured links as a table for the terminal. Owns columns and rounding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from launch.runs.network import FASTEST, Network

if TYPE_CHECKING:
    from launch.bench_network.fit import Sample

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
