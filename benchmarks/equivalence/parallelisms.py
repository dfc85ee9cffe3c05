"""Difference of a training run under each parallelism from a run on one process.

    python -m benchmarks.equivalence.parallelisms                        # all rows, about an hour on two cores
    python -m benchmarks.equivalence.parallelisms --only 'tp,fsdp x tp'  # some rows
    python -m benchmarks.equivalence.parallelisms --tables options       # some tables
    python -m benchmarks.equivalence.parallelisms --write                # and write parallelisms.md

Every cell is a run of five steps on real processes (gloo). The script compares it with a run on one process that takes
the same global batch in one fp32 pass. It compares losses and gradient norms of all steps, every gradient of the first
step, and every parameter after the last step. The figure is the largest relative error; tests demand 1e-5. The second
table shows the same for blocks that are compiled, or recomputed in the backward pass. The third table has other
optimizers, adapters (LoRA), data and attention. There the run on one process has the same option as the cell; only the
chunked loss is compared with the usual loss. The script clips DeepSpeed's gradients itself, by DeepSpeed's norm,
because DeepSpeed shows gradients before clipping. Schedule-free AdamW overwrites gradients, so these are not compared.
AdamW's eps is 1e-6, because with a smaller eps AdamW makes a whole step of a gradient that is nothing but rounding.
With LoRA, eps is 1e-5, because adapters begin at zero. In the third table Muon orthogonalizes in fp32, because one
rounding to bf16 that differs changes a weight by 0.4 %. The exit status is 1 if a cell fails.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.page import chosen, cores, keep_parts, stamp
from launch.errors import ConfigError
from tests.support.distributed import RankFailedError, run_distributed
from tests.support.learning import MODELS, Case, learn, start_case

TOLERANCE = 1e-5
STEPS = 5
FAILED = "failed"
SIZE = ("model.n_layer=4", "model.n_head=8", "model.n_embd=64")
PROPERTIES = {
    "tied": MODELS["tied"],
    "untied, GQA": ["model.tie_embeddings=false", "model.n_kv_head=4"],
    "experts": MODELS["experts"],
}
GQA = PROPERTIES["untied, GQA"]
OPTIONS = {
    "Muon": [*GQA, "optim.optimizer=muon"],
    "schedule-free": [*GQA, "optim.optimizer=adamw_schedule_free", "optim.schedule=constant"],
    "LoRA": [*GQA, "model.lora.rank=4", "model.lora.targets=[query,value,output,gate,down]", "optim.eps=1e-5"],
    "windows": [*GQA, "model.window=5", "model.global_every=2"],
    "packed": [*GQA, "data.pack=documents", "data.document_end=10"],
    "stream": [
        *GQA,
        *f"data=text data.path={argparse.__file__} data.max_bytes=null data.stream=true eval.sequences=7".split(),
    ],
}
"""Column of the third table -> overrides of the runs in this column, and overrides of the one-process run that they are
compared with.
"""


@dataclass(frozen=True)
class Column:
    """Column of a table: a model and training options."""

    name: str
    model: str
    accumulation: int = 4
    words: str = ""


COLUMNS = [
    Column(f"{model}, {count} {'pass' if count == 1 else 'passes'}", model, count)
    for model in PROPERTIES
    for count in (1, 4)
]
MODELS_ALONE = PROPERTIES | OPTIONS
OF_OPTIONS = [*(Column(name, name) for name in OPTIONS), Column("chunked loss", "untied, GQA", 4, "chunked_loss=true")]
EXECUTIONS = ("recompute=selective", "recompute=full", "compile=default", "compile=default recompute=full")


@dataclass(frozen=True)
class Row:
    """A topology, and the numbers of ranks on which this topology is tried."""

    name: str
    words: str
    ranks: tuple[int, ...] = (2, 4)
    executed: bool = False
    """True if the second table (compiled and recomputed blocks) also has this row, on the smallest of the numbers of
    ranks.
    """


Line = tuple[Row, int, list[Column]]
"""Line of a table: a topology, a number of ranks, and the columns to try."""
Cell = dict[str, Any] | str
"""Result of a run, or the reason why there is no result."""


ROWS = (
    Row("ddp", "parallel=ddp", executed=True),
    Row("zero1", "parallel=zero1", executed=True),
    Row("fsdp", "parallel=fsdp", executed=True),
    Row("fsdp kept whole", "parallel=fsdp parallel.reshard_after_forward=false"),
    Row("hsdp 2 x 2", "parallel=hsdp parallel.dp_shard=2", (4,), executed=True),
    Row("pp 1f1b", "parallel=pp", executed=True),
    Row("pp gpipe", "parallel=pp parallel.schedule=gpipe", (2,)),
    Row("pp interleaved", "parallel=pp parallel.schedule=interleaved", executed=True),
    Row("pp zbv", "parallel=pp parallel.schedule=zbv", executed=True),
    Row("pp dualpipev", "parallel=pp parallel.schedule=dualpipev", (2,)),
    Row("pp 4", "parallel=pp parallel.pp=4", (4,)),
    Row("pp 1f1b x fsdp", "parallel=pp_fsdp", (4,), executed=True),
    Row("pp zbv x fsdp", "parallel=pp_fsdp parallel.schedule=zbv", (4,)),
    Row("pp 1f1b x tp", "parallel=pp parallel.tp=2", (4,)),
    Row("pp zbv x tp", "parallel=pp parallel.schedule=zbv parallel.tp=2", (4,)),
    Row("3d: fsdp 2 x pp 2 x tp 2", "parallel=3d", (8,), executed=True),
    Row("3d zbv", "parallel=3d parallel.schedule=zbv", (8,)),
    Row("hsdp 2 x 2 x pp 2", "parallel=pp_fsdp parallel.dp_shard=2", (8,)),
    Row("ep", "parallel=ep parallel.ep=2", executed=True),
    Row("ep 4", "parallel=ep parallel.ep=4", (4,)),
    Row("fsdp x ep", "parallel=fsdp_ep parallel.ep=2", executed=True),
    Row("fsdp x ep 4", "parallel=fsdp_ep parallel.ep=4", (4,)),
    Row("hsdp 2 x 2 x ep", "parallel=hsdp parallel.dp_shard=2 parallel.ep=2", (4,)),
    Row("cp", "parallel=cp", executed=True),
    Row("cp ring", "parallel=cp parallel.cp_method=ring", executed=True),
    Row("cp 4", "parallel=cp parallel.cp=4", (4,)),
    Row("cp 4 ring", "parallel=cp parallel.cp=4 parallel.cp_method=ring", (4,)),
    Row("fsdp x cp", "parallel=fsdp_cp", executed=True),
    Row("hsdp 2 x cp", "parallel=fsdp_cp parallel.dp_shard=1", (4,)),
    Row("tp x cp", "parallel=tp parallel.tp=2 parallel.cp=2", (4,)),
    Row("pp x cp", "parallel=pp parallel.cp=2", (4,)),
    Row("fsdp x ep x cp", "parallel=fsdp_cp parallel.ep=2", (4,)),
    Row("tp", "parallel=tp", executed=True),
    Row("tp 4", "parallel=tp parallel.tp=4", (4,)),
    Row("tp without slices", "parallel=tp parallel.sequence_parallel=false"),
    Row("fsdp x tp", "parallel=fsdp_tp", (4,), executed=True),
    Row("hsdp x tp", "parallel=fsdp_tp parallel.dp_shard=1", (4,)),
    Row("ep x tp", "parallel=ep parallel.ep=2 parallel.tp=2", (4,)),
    Row("fsdp x ep x tp", "parallel=fsdp_ep parallel.ep=2 parallel.tp=2", (4,)),
    Row("pp x ep x tp", "parallel=pp parallel.ep=2 parallel.tp=2", (8,)),
    Row("pp x cp x tp", "parallel=pp parallel.cp=2 parallel.tp=2", (8,)),
    Row("fsdp x cp x tp", "parallel=fsdp_cp parallel.tp=2", (8,)),
    *(
        Row(f"DeepSpeed zero{stage}", f"parallel=ds_zero0 parallel.zero_stage={stage}", executed=True)
        for stage in range(4)
    ),
    Row("DeepSpeed pp", "parallel=ds_pp", executed=True),
    Row("DeepSpeed pp x zero1", "parallel=ds_pp_zero1"),
    Row("DeepSpeed pp 4", "parallel=ds_pp parallel.pp=4", (4,)),
    Row("DeepSpeed pp 4 x zero1", "parallel=ds_pp_zero1 parallel.pp=4", (4,)),
)


def cell(rank: int, size: int, folder: Path, words: str, column: Column) -> Cell:
    """Return the result of one run on rank 0: losses, gradient norms, gradients and weights. If the config is refused,
    return the reason as text. Ranks other than 0 return an empty result.

    Args:
        rank: number of this rank.
        size: number of ranks.
        folder: run folder.
        words: overrides for the topology.
        column: model and training options.
    """
    case = Case(f"{words} {column.words}", column.model, column.accumulation)
    try:
        with in_fp32(column.model == "Muon"):
            learned = learn(start_case(rank, size, folder, case, [*SIZE, *MODELS_ALONE[case.model]]), STEPS)
    except ConfigError as error:
        return f"{error.found}; expected {error.expected}"
    if column.model == "schedule-free":
        learned["gradients"] = {}
    return learned if rank == 0 else {}


@contextmanager
def in_fp32(is_muon: bool) -> Iterator[None]:
    """Context in which Muon computes in fp32 instead of bf16, if ``is_muon`` is True. Nothing else in an fp32 run uses
    bf16.
    """
    with ExitStack() as stack:
        if is_muon:
            stack.enter_context(patch.object(torch, "bfloat16", torch.float32))
            stack.enter_context(patch.object(torch.Tensor, "bfloat16", torch.Tensor.clone))
        yield


def cells(rank: int, size: int, folder: Path, words: str, columns: Sequence[Column]) -> list[Cell]:
    """Return this rank's results of all columns for the topology with the overrides ``words``."""
    return [cell(rank, size, folder / str(place), words, column) for place, column in enumerate(columns)]


def error_of(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """Return the largest relative error of ``found`` against ``expected``, two results of ``cell``: over losses,
    gradient norms, gradients and parameters."""
    errors = [
        abs(a - b) / abs(b) for what in ("losses", "norms") for a, b in zip(found[what], expected[what], strict=True)
    ]
    for what in ("gradients", "weights"):
        assert found[what].keys() == expected[what].keys(), what
        # The gradient of an adapter's first matrix is exactly zero while the second one is.
        errors += [float((found[what][n] - t).norm() / (t.norm() or 1.0)) for n, t in expected[what].items()]
    return max(errors)


def table(lines: Sequence[Line], heads: Sequence[str], alone: dict[str, dict[str, Any]]) -> tuple[list[str], bool]:
    """Return the Markdown lines of a table with its footnotes, and True if all runs end and no error is too large.

    Args:
        lines: topology, number of ranks and columns for each line of the table.
        heads: titles of the columns.
        alone: name of a model -> result of one process, with which the runs are compared.
    """
    text = [f"| topology | ranks | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    notes: dict[str, int] = {}
    good = True
    with tempfile.TemporaryDirectory() as place:
        for number, (row, size, columns) in enumerate(lines):
            began = time.monotonic()
            shown = []
            found = measured(row, size, Path(place) / str(number) / "runs", columns)
            for result, column in zip(found, columns, strict=True):
                if isinstance(result, str):
                    good = good and not result.startswith(FAILED)
                    shown.append(f"[{notes.setdefault(result, len(notes) + 1)}]")
                else:
                    error = error_of(result, alone[column.model])
                    good = good and error < TOLERANCE
                    shown.append(f"{error:.0e}" if error < TOLERANCE else f"**{error:.0e}**")
            text.append(f"| {row.name} | {size} | {' | '.join(shown)} |")
            print(f"{text[-1]}  {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    return [*text, "", *(f"[{number}] {note}\n" for note, number in notes.items())], good


def measured(row: Row, size: int, folder: Path, columns: Sequence[Column]) -> list[Cell]:
    """Return rank 0's results of a row on ``size`` ranks, one for each column. If a rank fails, every result is the
    reason as text."""
    try:
        found: list[Cell] = run_distributed(cells, size, folder, row.words, columns, timeout_s=1800)[0]
    except RankFailedError as failure:
        print(failure, file=sys.stderr)
        return [f"{FAILED}: {str(failure).strip().splitlines()[-1]}"] * len(columns)
    return found


HEADINGS = {"models": "Models", "execution": "Compiled and recomputed", "options": "Optimizers, adapters, data"}
"""Name of a table -> heading of the table on the page."""


def tables(rows: Sequence[Row], names: Sequence[str]) -> tuple[dict[str, str], bool]:
    """Return heading -> text for the tables in ``names``, and True if no run fails and no error is too large. ``rows``
    are the topologies to try."""
    columns = [Column(name, name, 1) for name in MODELS_ALONE]
    with tempfile.TemporaryDirectory() as place:
        found = run_distributed(cells, 1, Path(place) / "alone" / "runs", "parallel=ddp", columns, timeout_s=600)[0]
    alone = dict(zip(MODELS_ALONE, found, strict=True))
    once = [row for row in rows if row.executed]
    lines: dict[str, list[Line]] = {
        "models": [(row, size, COLUMNS) for row in rows for size in row.ranks],
        "execution": [
            (row, row.ranks[0], [Column(words, model_of(row), 4, words) for words in EXECUTIONS]) for row in once
        ],
        "options": [(row, row.ranks[0], OF_OPTIONS) for row in once if "parallel.ep=" not in row.words],
    }
    made = {name: table(lines[name], [column.name for column in lines[name][0][2]], alone) for name in names}
    stamped = stamp(f"gloo, one thread a rank, {cores()}")
    return {HEADINGS[name]: "\n".join([stamped, "", *text]) for name, (text, _) in made.items()}, all(
        holds for _, holds in made.values()
    )


def model_of(row: Row) -> str:
    """Return the model for the table of compiled and recomputed blocks: a mixture of experts if the row distributes
    experts, else a dense model.
    """
    return "experts" if "parallel.ep=" in row.words else "untied, GQA"


def main() -> int:
    """Print the tables. Return the exit status, 1 if a cell fails."""
    parser = argparse.ArgumentParser(description="The equivalence matrix.")
    parser.add_argument("--only", default="", metavar="ROW,ROW", help="names of topologies; default: all")
    parser.add_argument("--tables", default="", metavar="TABLE", help=f"some of {', '.join(HEADINGS)}; default: all")
    parser.add_argument("--write", action="store_true", help="keep the tables in the page, parallelisms.md")
    words = parser.parse_args()
    names = chosen(words.only, [row.name for row in ROWS])
    parts, good = tables([row for row in ROWS if row.name in names], chosen(words.tables, list(HEADINGS)))
    print("\n\n".join(parts.values()))
    if words.write:
        keep_parts(Path(__file__), "The equivalence matrix", __doc__, parts)
    return 0 if good else 1


if __name__ == "__main__":
    from benchmarks.equivalence import (
        parallelisms,  # ranks import what they run, and find nothing of a script in their own __main__
    )

    sys.exit(parallelisms.main())
