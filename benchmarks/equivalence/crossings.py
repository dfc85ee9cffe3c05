"""Losses of runs that resume a checkpoint under another parallelism.

    python -m benchmarks.equivalence.crossings                 # all rows, about a quarter of an hour on two cores
    python -m benchmarks.equivalence.crossings --only fsdp,pp  # some rows
    python -m benchmarks.equivalence.crossings --tables Muon   # some tables
    python -m benchmarks.equivalence.crossings --write         # and write crossings.md

Each row is a parallelism in which a run trains two steps on four real processes (gloo), saves a checkpoint, and trains
two more steps. Each column is a parallelism in which new ranks load that checkpoint and train the same two steps. The
figure is the largest relative difference between the losses of the column and those of the row in these two steps; `=`
means that all bits are equal. Muon orthogonalizes in bf16, so a rounding that differs in its first step shows in the
second loss. The exit status is 1 if a figure exceeds 1e-5, or if a run fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.equivalence.parallelisms import OPTIONS
from benchmarks.page import chosen, cores, keep_parts, stamp
from tests.support.distributed import RankFailedError, run_distributed
from tests.support.learning import MODELS, save, start, step

TOLERANCE = 1e-5
RANKS = 4
AT_ONCE = 8
"""Largest number of runs that one group of processes makes, one after another. The process groups of each run keep
their threads, which slow later runs down."""
LAYOUTS = {
    "ddp": "parallel=ddp",
    "zero1": "parallel=zero1",
    "fsdp": "parallel=fsdp",
    "hsdp": "parallel=hsdp parallel.dp_shard=2",
    "tp": "parallel=tp",
    "fsdp x tp": "parallel=fsdp_tp",
    "pp": "parallel=pp",
    "pp zbv": "parallel=pp parallel.schedule=zbv",
    "pp x fsdp": "parallel=pp_fsdp",
    "pp x tp": "parallel=pp parallel.tp=2",
    "cp": "parallel=cp",
    "fsdp x cp": "parallel=fsdp_cp",
    "ep": "parallel=ep parallel.ep=2",
    "fsdp x ep": "parallel=fsdp_ep parallel.ep=2",
    "ep x tp": "parallel=ep parallel.ep=2 parallel.tp=2",
    "ds_zero0": "parallel=ds_zero0",
    "ds_zero1": "parallel=ds_zero1",
    "zero2": "parallel=zero2",
    "zero3": "parallel=zero3",
    "ds_pp": "parallel=ds_pp",
    "ds_pp_zero1": "parallel=ds_pp_zero1",
}
SIZE = ("model.n_layer=4", "optim.max_micro_batch=2")


@dataclass(frozen=True)
class Table:
    """A model, and the layouts of its checkpoints. ``layouts`` save and resume a checkpoint on four ranks.
    ``elsewhere`` has pairs of a layout and another number of ranks; these only resume the checkpoint."""

    model: str
    layouts: Sequence[str]
    elsewhere: Sequence[tuple[str, int]]

    @property
    def columns(self) -> list[tuple[str, int]]:
        return [*((name, RANKS) for name in self.layouts), *self.elsewhere]


TABLES = (
    Table(
        "tied",
        [name for name in LAYOUTS if "ep" not in name.split()],
        [(name, 2) for name in ("ddp", "fsdp", "tp", "pp", "ds_zero1", "zero3", "ds_pp")] + [("ddp", 1)],
    ),
    Table(
        "experts",
        ["ddp", "fsdp", "fsdp x tp", "pp x fsdp", "fsdp x cp", "ep", "fsdp x ep", "ep x tp", "zero2", "zero3", "ds_pp"],
        [("ep", 2), ("fsdp", 2), ("ddp", 1)],
    ),
    Table("stream", ["ddp", "fsdp", "pp"], [("ddp", 1)]),
    Table("schedule-free", ["ddp", "zero1", "fsdp"], [("ddp", 1)]),
    Table("LoRA", ["ddp", "zero1", "fsdp", "cp"], [("ddp", 1)]),
    Table("Muon", ["ddp", "fsdp", "fsdp x tp", "pp x fsdp"], [("ddp", 1)]),
)


def losses(rank: int, size: int, folder: Path, model: str, layouts: Sequence[str], saves: bool) -> list[list[float]]:
    """Return the losses of two steps under each layout of ``layouts``: a list of two losses for each layout.

    Args:
        rank: number of this rank.
        size: number of ranks.
        folder: run folder.
        model: key of ``MODELS`` or ``OPTIONS``: a model, or training options.
        layouts: keys of ``LAYOUTS``.
        saves: True to make two steps and save a checkpoint before the two steps; False to resume from the checkpoint in
            ``folder``.
    """
    found = []
    for name in layouts:
        run = start(rank, size, folder, *SIZE, *(MODELS | OPTIONS)[model], *LAYOUTS[name].split())
        assert run.step == (0 if saves else 2), "the checkpoint was not found"
        if saves:
            for _ in range(2):
                step(run)
            save(run)
        found.append([step(run)[0] for _ in range(2)])
    return found


def row(name: str, table: Table, folder: Path) -> list[str]:
    """Save a checkpoint under the layout ``name``, resume it under each layout of the table, and return the cells of
    the row. A cell is a text of ``shown``, or ``**failed**``. ``folder`` is the run folder."""
    cells: dict[tuple[str, int], str] = {}
    try:
        to_come = run_distributed(losses, RANKS, folder, table.model, [name], True, timeout_s=600)[0][0]
        for size in sorted({size for _, size in table.columns}, reverse=True):
            every = [other for other, ranks in table.columns if ranks == size]
            for names in (every[i : i + AT_ONCE] for i in range(0, len(every), AT_ONCE)):
                found = run_distributed(losses, size, folder, table.model, names, False, timeout_s=600)[0]
                cells |= {(other, size): shown(each, to_come) for other, each in zip(names, found, strict=True)}
    except RankFailedError as failure:
        print(failure, file=sys.stderr)
    return [cells.get(column, "**failed**") for column in table.columns]


def shown(found: Sequence[float], expected: Sequence[float]) -> str:
    """Return the largest relative difference between two lists of losses as text, in bold if the difference exceeds
    ``TOLERANCE``.
    """
    error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    if error == 0:
        return "="
    return f"{error:.0e}" if error < TOLERANCE else f"**{error:.0e}**"


def lines_of(table: Table, names: Sequence[str]) -> list[str]:
    """Return the lines of a Markdown table: the head, and a row for each layout in ``names``."""
    heads = [name if ranks == RANKS else f"{name}, {ranks}" for name, ranks in table.columns]
    lines = [f"| {table.model} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            began = time.monotonic()
            lines.append(f"| {name} | {' | '.join(row(name, table, Path(place) / name.replace(' ', '_') / 'runs'))} |")
            print(f"{lines[-1]}  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return lines


def main() -> int:
    """Print the tables. Return the exit status, 1 if a run fails or a difference is too large."""
    parser = argparse.ArgumentParser(description="Checkpoints between layouts.")
    parser.add_argument("--only", default="", metavar="ROW,ROW", help="names of layouts; default: all")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/equivalence/crossings.md")
    models = [table.model for table in TABLES]
    parser.add_argument("--tables", default="", metavar="MODEL", help=f"some of {', '.join(models)}; default: all")
    words = parser.parse_args()
    wanted, tables = chosen(words.only, list(LAYOUTS)), chosen(words.tables, models)
    parts = {}
    for table in TABLES:
        if table.model in tables:
            lines = lines_of(table, [name for name in table.layouts if name in wanted])
            stamped = stamp(f"gloo, one thread a rank, {cores()}")
            parts[table.model[0].upper() + table.model[1:]] = "\n".join([stamped, "", *lines])
    print("\n\n".join(parts.values()))
    if words.write:
        keep_parts(Path(__file__), "Checkpoints between layouts", __doc__, parts)
    return 1 if "**" in "".join(parts.values()) else 0


if __name__ == "__main__":
    from benchmarks.equivalence import (
        crossings,  # ranks import what they run, and find nothing of a script in their own __main__
    )

    sys.exit(crossings.main())
