"""Offers of ``launch.project --fit`` as a table for the terminal. Owns columns and rounding."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from launch.project.goal import Goal, Offer
from launch.report.numbers import percent
from launch.runs.overrides import typed_key

GIB = 2**30
WIDE = 1000
"""Columns of a terminal on which every table fits."""


def show_offers(goal: Goal, found: Sequence[Offer], device: str | None, words: Sequence[str], console: Console) -> None:
    """Print the set-ups that make it, the cheapest first, and the command for that one on the nodes of ``words``."""
    training = goal.training
    title = f"{training.parameters:.3g} params on {training.work:.3g} tokens in {goal.days:.3g} days, on {device}"
    console.print(f"{title}; estimated figures, none was measured", highlight=False, markup=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    has_cost = any(one.cost is not None for one in found)
    for name in ("nodes", "GPUs", "parallelism", "micro", "memory", "MFU", "days", "GPU-hours"):
        table.add_column(name, justify="left" if name == "parallelism" else "right", no_wrap=True)
    if has_cost:
        table.add_column("cost", justify="right", no_wrap=True)
    for one in found:
        table.add_row(
            *(str(one.nodes), str(one.gpus), one.set_up.parallelism, str(one.set_up.micro_batch)),
            f"{one.set_up.memory_bytes / GIB:.1f} GiB",
            "" if one.set_up.mfu is None else percent(one.set_up.mfu),
            *(f"{one.days:.3g}", f"{one.gpu_hours:,.0f}"),
            *([f"{one.cost:,.0f}"] if one.cost is not None else []),
        )
    needed = Measurement.get(console, console.options.update(width=WIDE), table).maximum
    console.width = max(console.width, needed)  # a terminal wraps what is too wide; a cell that is cut tells nothing
    console.print(table)
    told = "no failures, slow ranks or evaluations in it; links as assumed, or as measured with --network"
    console.print(told, highlight=False, markup=False)
    nodes = [word for word in words if typed_key(word).partition(".")[0] == "cluster"]
    command = f"python -m launch nodes={found[0].nodes} {shlex.join(nodes)} {found[0].set_up.command} dry_run=true"
    console.print(f"the cheapest: {command}", highlight=False, markup=False)
