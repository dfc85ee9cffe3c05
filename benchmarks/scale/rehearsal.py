"""Rehearsals of one step in 24 set-ups: memory compared with the plan, hangs, waits of the host, and their cost.

    python -m benchmarks.scale.rehearsal                          # all: about 25 minutes on two cores
    python -m benchmarks.scale.rehearsal --only fsdp-8,ep-8       # some
    python -m benchmarks.scale.rehearsal --write                  # and write rehearsal.md

The set-ups are eight layouts on 8, 64 and 512 ranks, in bf16, for H100 GPUs of 80 GB. A rehearsal makes training steps
of a rank on tensors that have shapes but no values (`python -m gpt.rehearse`). One rank of each kind is rehearsed; the
column "taken" has their number. The column "plan" has the difference (planned peak) / (rehearsed peak) - 1, from the
rank where it is smallest to the rank where it is largest. The column "s" has the seconds of the rehearsal. Other
programs shared the cores, so the seconds are upper bounds. The last column has the memory of the largest process that
the script has used so far. A rehearsal counts tensors and no more: no workspace of a kernel, no fragment of an
allocator, no buffer of NCCL. Nothing here was measured on a GPU.
"""

from __future__ import annotations

import argparse
import os
import resource
import shlex
import sys
import time
from pathlib import Path

import torch

from benchmarks.page import chosen, cores, keep, merged, stamp
from gpt.accounting import GIB
from gpt.rehearse import parse_words, rehearse, settle

SIZES = {8: "gpt2_124m", 64: "llama_1p36b", 512: "llama_1p36b"}
"""Number of ranks -> model. The layout with experts uses the mixture-of-experts model at each size."""
LAYOUTS = {
    "ddp": "parallel=ddp",
    "fsdp": "parallel=fsdp",
    "hsdp": "parallel=hsdp parallel.dp_shard=4",
    "tp": "parallel=fsdp_tp parallel.tp=4",
    "pp": "parallel=pp parallel.pp=4 optim.max_micro_batch=1",
    "cp": "parallel=fsdp_cp parallel.cp=4",
    "ep": "parallel=fsdp_ep parallel.ep=4",
    "3d": "parallel=3d optim.max_micro_batch=1",
}
SEQUENCES = 4
"""Number of sequences in a step for each rank."""
TITLES = ("layout and ranks", "model", "taken", "peak GiB", "plan", "hangs", "waits", "s", "GiB here")


def command(layout: str, ranks: int) -> str:
    """Return the arguments of ``gpt.rehearse`` for a layout on ``ranks`` ranks."""
    model = "moe_200m" if layout == "ep" else SIZES[ranks]
    batch = f"optim.global_batch={SEQUENCES * ranks} optim.max_micro_batch={SEQUENCES}"
    return f"--ranks {ranks} model={model} precision=bf16 {batch} {LAYOUTS[layout]}"


def row(name: str, processes: int) -> list[str]:
    """Rehearse a training step of the set-up ``name`` (LAYOUT-RANKS, such as ``fsdp-8``), and return its row of the
    table. ``processes`` ranks are rehearsed at the same time."""
    layout, _, ranks = name.partition("-")
    began = time.monotonic()
    config, _ = settle(parse_words(shlex.split(command(layout, int(ranks)))))
    found = rehearse(config, int(ranks), processes)
    took = time.monotonic() - began
    off = [found.difference(rank) for rank in found.ranks]
    return [
        name,
        config.model.name,
        str(len(found.ranks)),
        f"{max(rank.peak for rank in found.ranks) / GIB:.2f}",
        f"{min(off):+.1%} to {max(off):+.1%}",
        str(len(found.hangs())),
        str(len(found.waits())),
        f"{took:.0f}",
        f"{resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20:.2f}",
    ]


def main() -> int:
    """Print the table. With ``--write``, also write the page. Returns the exit status 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--only", default="", metavar="LAYOUT-RANKS,...", help="some set-ups")
    parser.add_argument("--write", action="store_true", help="keep the result beside this program")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for name in chosen(given.only, [f"{layout}-{ranks}" for ranks in SIZES for layout in LAYOUTS]):
        rows.append(row(name, len(os.sched_getaffinity(0))))
        print(" | ".join(rows[-1]), flush=True)
    words = {f"{layout}-8": command(layout, 8) for layout in LAYOUTS}
    lines = "\n".join(f"- {name}: `python -m gpt.rehearse {text}`" for name, text in words.items())
    text = f"{stamp(cores())}\n\n{merged(Path(__file__), TITLES, rows)}\n\nThe commands of 8 ranks:\n\n{lines}"
    if given.write:
        keep(Path(__file__), "Rehearsals of one step", __doc__, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
