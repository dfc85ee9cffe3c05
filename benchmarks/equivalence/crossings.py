"""Losses of runs that resume a checkpoint under another parallelism.

    python -m benchmarks.equivalence.crossings                 # all rows, about a quarter of an hour on two cores
    python -m benchmarks.equivalence.crossings --only fsdp,pp  # some rows
    python -m benchmarks.equivalence.crossings --write         # and keep the page

Every row trains two steps on four real processes (gloo) under its parallelism, saves a checkpoint, and trains two
more steps. Every column starts new ranks under its own parallelism, loads that checkpoint, and trains the same two
steps. The figure is the largest relative difference between the two losses; `=` means that all bits are equal. The
exit status is 1 if a figure exceeds 1e-5, or if a run fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import chosen, keep, stamp
from tests.support.distributed import RankFailedError, run_distributed
from tests.support.learning import MODELS, save, start, step

TOLERANCE = 1e-5
RANKS = 4
AT_ONCE = 8
"""Runs of one process: the groups of each keep threads awake, and later ones get slower and slower."""
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
    """A model, how it is saved on four ranks, and on which other numbers of ranks it goes on as well."""

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
)


def losses(rank: int, size: int, folder: Path, model: str, layouts: Sequence[str], saves: bool) -> list[list[float]]:
    """Of two steps under each layout: the first two, which are followed by a checkpoint, are not among them."""
    found = []
    for name in layouts:
        run = start(rank, size, folder, *SIZE, *MODELS[model], *LAYOUTS[name].split())
        assert run.step == (0 if saves else 2), "the checkpoint was not found"
        if saves:
            for _ in range(2):
                step(run)
            save(run)
        found.append([step(run)[0] for _ in range(2)])
    return found


def row(name: str, table: Table, folder: Path) -> list[str]:
    """The cells of a row."""
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
    """The largest relative difference, in bold where it is too much."""
    error = max(abs(a - b) / abs(b) for a, b in zip(found, expected, strict=True))
    if error == 0:
        return "="
    return f"{error:.0e}" if error < TOLERANCE else f"**{error:.0e}**"


def lines_of(table: Table, names: Sequence[str]) -> list[str]:
    """The table in Markdown."""
    heads = [name if ranks == RANKS else f"{name}, {ranks}" for name, ranks in table.columns]
    lines = [f"| {table.model} | {' | '.join(heads)} |", "|---" * (1 + len(heads)) + "|"]
    with tempfile.TemporaryDirectory() as place:
        for name in names:
            began = time.monotonic()
            lines.append(f"| {name} | {' | '.join(row(name, table, Path(place) / name.replace(' ', '_') / 'runs'))} |")
            print(f"{lines[-1]}  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return lines


def main() -> int:
    """Exit status: 0, or 1 where a checkpoint does not go on as it should."""
    parser = argparse.ArgumentParser(description="Checkpoints between layouts.")
    parser.add_argument("--only", default="", metavar="ROW,ROW", help="names of layouts; default: all")
    parser.add_argument("--write", action="store_true", help="keep the result in benchmarks/equivalence/crossings.md")
    words = parser.parse_args()
    wanted = chosen(words.only, list(LAYOUTS))
    lines = [stamp("gloo, one thread a rank")]
    for table in TABLES:
        lines += ["", *lines_of(table, [name for name in table.layouts if name in wanted])]
    text = "\n".join(lines)
    print(text)
    if words.write:
        keep(Path(__file__), "Checkpoints between layouts", __doc__, text)
    return 1 if "**" in text else 0


if __name__ == "__main__":
    from benchmarks.equivalence import (
        crossings,  # ranks import what they run, and find nothing of a script in their own __main__
    )

    sys.exit(crossings.main())
