"""Growth with the number of ranks, and waits in a step: measured without many machines or a GPU.

    python -m benchmarks.scale.growth               # all rows, about a quarter of an hour on two quiet cores
    python -m benchmarks.scale.growth --only A6,A9  # some rows
    python -m benchmarks.scale.growth --write       # and write growth.md

Every row is measured by its own process. A row uses torch's fake process group with one real rank, fake GPU tensors
with shapes but no values, a few real processes over gloo, strace, or records that were written for the purpose. The
column "before" has the values of commit c045bd7 on two quiet cores. A row is reached if its value meets the demand. A
row that could not be measured counts as not reached. The exit status is 1 if a row is not reached. The numbers of the
rows have gaps: tests measure A10, A16 and A17, which are about asynchronous saves, cost and breakdown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import chosen, cores, keep, stamp
from benchmarks.scale import engines, launcher, records
from benchmarks.turns import ROOT

LIMIT_S = 900.0
"""Time limit of a row, in seconds. A row that takes longer counts as not measured."""


@dataclass(frozen=True)
class Row:
    """One row of the table: what is measured, the value of an earlier commit, the demanded value, and a function. The
    function returns the measured value as text, and True if the value meets the demand."""

    what: str
    before: str
    demanded: str
    measure: Callable[[], tuple[str, bool]]


ROWS = {
    "A1": Row(
        "waits of the host for a GPU: clipping, gradient statistics of 24 layers, plan of a dispatch to experts",
        "1, 28, 2",
        "0, 0, 1",
        engines.host_waits_of_a_step,
    ),
    "A2": Row(
        "FSDP, n blocks: all-gathers of a backward pass; what the first one of a forward pass holds",
        "n + 1; embedding, norm and head",
        "at most n - 1; the embedding",
        engines.fsdp_gathers,
    ),
    "A3": Row(
        "loss, for each logit: bytes moved, allocated; largest fp32 tensor; difference from torch's loss and gradient",
        "50, 20; all logits",
        "20, 8; less than all; 1e-6",
        engines.loss_traffic,
    ),
    "A4": Row(
        "messages between 2 ranks in 100 steps, beside the gradients; steps until a stop that one was asked for",
        "100; 1",
        "0; at most 2",
        engines.messages_of_steps,
    ),
    "A5": Row(
        "16 gloo ranks in a process that may open 256 files; soft limit that ranks get where the user's is 256",
        "aborts; 256",
        "starts; the hard limit",
        launcher.open_files,
    ),
    "A6": Row(
        "1,000 steps of one rank: opens of its records, locks, writes",
        "1,000, 1,000, 1,000",
        "1, 0, at most 100",
        records.system_calls,
    ),
    "A6 killed": Row(
        "seconds of records lost by kill -9, of a rank above 0", "0", "at most 10", records.lost_by_a_kill
    ),
    "A6 locks": Row("a run of 3 steps where lockf raises ENOSYS", "fails", "finishes", records.no_locks),
    "A6 hung": Row(
        "time that 1,000 records take from their steps while writing hangs for 5 s: 99 % take at most, all together",
        "5 s",
        "1 ms; less than 5 s",
        records.hung_filesystem,
    ),
    "A7": Row(
        "report on 1,024 ranks x 2,000 steps: CPU seconds; memory, and against 64 ranks; step time",
        "42 s; 5.5 GB",
        "4 s; 200 MB, 1.2 x; 503.4 ms",
        records.report_of_many,
    ),
    "A8": Row(
        "what a report says where rank 17 of 256 takes 30 ms longer in every step",
        "nothing",
        "rank 17, its host, 30 ms, 5.6 %",
        records.slow_rank,
    ),
    "A9": Row(
        "planning of a checkpoint on rank 0 of 256, 219 parameters: first and second save, CPU seconds",
        "9.8 s; 9.8 s",
        "second at most 0.2 s",
        engines.checkpoint_plans,
    ),
    "A11": Row(
        "growth of a rank's peak memory while it builds llama_124m, fsdp over 4; weights of 15 layouts",
        "1.0 GB",
        "0.3 GB; the same bits",
        engines.memory_of_a_start,
    ),
    "A12": Row(
        "median data_wait_s, reading slowed to 5 ms a window, 100 ms of computing",
        "5 ms a window",
        "below 1 ms",
        engines.data_wait,
    ),
    "A13": Row(
        "README's command for GPUs, dry run: precision; with precision=fp32 on H100s",
        "fp32; nothing",
        "bf16; the factor, and what to type",
        launcher.precision_of_the_readme,
    ),
    "A14": Row(
        "garbage collections in 200 steps that Python began by itself",
        "227 in 150",
        "0, others on multiples of the interval",
        engines.collections,
    ),
    "A15": Row("files opened by a command of 8 local ranks against one of 1", "8 x", "1.5 x", launcher.opened_files),
    "A18": Row("zero1, 219 parameters: all-gathers of a step", "219", "at most 10", engines.zero1_gathers),
    "A19": Row("dry run of 100 points, CPU seconds", "22.7 s", "8 s", launcher.dry_run_of_100),
}


def measured(name: str) -> tuple[str, bool]:
    """Return the value of a row, measured in a process of its own, and True if it meets the demand. If the process
    fails, the value is the reason.
    """
    command = [sys.executable, "-m", "benchmarks.scale.growth", "--row", name]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    try:
        ended = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=LIMIT_S)
        found, reached = json.loads(ended.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        return f"not measured: more than {LIMIT_S:.0f} s", False
    except (IndexError, ValueError):
        lines = ended.stderr.strip().splitlines() or [f"exit status {ended.returncode}"]
        return f"not measured: {lines[-1][:160]}", False
    return str(found), bool(reached)


def main() -> int:
    """Measure the rows of the table (``ROWS``), and print them. Returns the exit status: 0 if every measured value
    meets the demanded value, else 1."""
    parser = argparse.ArgumentParser(description="Acceptance measures of scale, measured on this machine.")
    parser.add_argument("--only", default="", metavar="ROW,ROW", help="rows; default: all")
    parser.add_argument("--write", action="store_true", help="keep the page, benchmarks/scale/growth.md")
    parser.add_argument("--row", metavar="ROW", help=argparse.SUPPRESS)
    typed = parser.parse_args()
    if typed.row:
        print(json.dumps(ROWS[typed.row].measure()))
        return 0
    names = chosen(typed.only, list(ROWS))
    lines = ["| row | measure | before | demanded | found | reached |", "|---|---|---|---|---|---|"]
    print("\n".join(lines))
    all_reached, began = True, os.getloadavg()[0]
    for name in names:
        row = ROWS[name]
        started = time.perf_counter()
        found, reached = measured(name)
        all_reached = all_reached and reached
        lines.append(
            f"| {name} | {row.what} | {row.before} | {row.demanded} | {found} | {'yes' if reached else 'no'} |"
        )
        print(lines[-1], flush=True)
        print(f"{name}: {time.perf_counter() - started:.0f} s", file=sys.stderr)
    machine = f"{cores()}, load {began:.0f} before and {os.getloadavg()[0]:.0f} after"
    text = f"{stamp(machine)}\n\n" + "\n".join(lines)
    if typed.write:
        keep(Path(__file__), "What grows with the number of ranks", __doc__, text)
    return 0 if all_reached else 1


if __name__ == "__main__":
    sys.exit(main())
