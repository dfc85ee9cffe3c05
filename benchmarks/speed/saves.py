"""Delay that a checkpoint causes in the steps around it, saved in the background and saved with waiting.

    python -m benchmarks.speed.saves                      # prints
    python -m benchmarks.speed.saves --threads 1 --write  # leaves a core to the writer; its rows into saves.md
    python -m benchmarks.speed.saves --threads 2 --write  # leaves no core

A GPT with more than 1 GB of weights and moments takes steps on this machine's two cores and saves in between, by the
parts of our loop, onto the disk of the temporary folder (TMPDIR). There are three ways to save: the loop waits for the
writer; the writer writes in the background; the writer writes in the background after a sleep of ten seconds. The three
ways take turns. `stall` is the time of the steps from a save to its commit, the save included, minus the time of as
many undisturbed steps. The time of an undisturbed step is the median of eight steps before the save and eight after its
commit. `held` is the time for which the loop waits inside the save. With one thread a step leaves a core to the writer,
as a rank does that computes on a GPU. With two threads it leaves none, and the checksums of the writer take time from
the steps. The demand, with one thread: the stall of the second way is at most a tenth of the first, and the stall of
the third is at most 0.3 s.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch

from benchmarks.page import commit, cores, keep, merged, stamp
from gpt.accounting import count
from gpt.checkpoint import part
from gpt.checkpoint.writer import ProcessWriter, Writer
from gpt.config import TrainConfig
from gpt.parallel.distributed import World
from gpt.train import build
from gpt.training.checkpoints import CheckpointSchedule
from gpt.training.run import Run
from gpt.training.step import queue_step
from launch.runs.folder import RunFolder
from launch.runs.process import Phase
from launch.worker import Run as Rank
from tests.support.distributed import run_distributed
from tests.support.learning import compose, control_group

WORDS = [
    *("model.n_layer=13", "model.n_embd=768", "model.n_head=12", "model.block_size=16", "optim.global_batch=2"),
    *("optim.max_micro_batch=2", "optim.max_steps=1000000", "checkpoint.interval=0", "checkpoint.keep_last=1"),
]
WAYS = ("waited for", "in the background", "in the background, 10 s late")
LATE_S = 10.0
QUIET = 8
"""Number of undisturbed steps before each save, and after its commit."""
SHARE, LATE_LIMIT_S = 0.1, 0.3


@dataclass(frozen=True)
class Stall:
    """Cost of one save, in seconds, except ``steps``: the number of steps from the save to its commit."""

    way: str
    held_s: float
    stall_s: float
    write_s: float
    steps: int
    quiet_s: float


def write_late(content: part.RankPart, folder: Path) -> None:
    """Write the file with this rank's part of a checkpoint ten seconds late."""
    time.sleep(LATE_S)
    part.write_part(content, folder)


def writer_of(way: str) -> Writer:
    """Return the checkpoint writer for the way ``way`` to save, one of ``WAYS``."""
    if way == WAYS[0]:
        return Writer()
    with mock.patch("gpt.checkpoint.writer.write_part", write_late if way == WAYS[2] else part.write_part):
        return ProcessWriter()


def step(run: Run, saving: CheckpointSchedule) -> float:
    """Make one step, and return its time in seconds."""
    started = time.perf_counter()
    queued = queue_step(run, None, Phase.training, saving.poll())
    queued.finish(started)
    saving.advance(queued.votes.phase, queued.votes_of_all())
    return time.perf_counter() - started


def measure(run: Run, saving: CheckpointSchedule, way: str) -> Stall:
    """Make undisturbed steps, save once in the way ``way``, make steps until the save is committed, and make
    undisturbed steps again. Return the cost of the save."""
    quiet = [step(run, saving) for _ in range(QUIET)]
    started = time.perf_counter()
    held = saving.save(None, is_last=False, is_stop=False)
    steps = 0
    while run.checkpoints.is_pending or not steps:
        step(run, saving)
        steps += 1
    took = time.perf_counter() - started
    quiet_s = statistics.median([*quiet, *(step(run, saving) for _ in range(QUIET))])
    written = next(e["write_s"] for e in reversed(run.folder.read_events()) if e["event"] == "saved")
    return Stall(way, held, took - steps * quiet_s, written, steps, quiet_s)


def run_of(rank: int, size: int, folder: Path, config: TrainConfig, writer: Writer) -> Run:
    """Build a run with the run folder ``folder``, on the rank ``rank`` of ``size`` ranks. The checkpoints of the run
    are written by ``writer``."""
    world = World(rank, size, rank, size, 0, torch.device("cpu"), control_group())
    worker = Rank(rank, rank, size)
    run = build(config, RunFolder(folder), world, 1, worker, writer)
    worker.open_folder(run.folder.path, 1)
    return run


def measure_ways(rank: int, size: int, root: Path, rounds: int, threads: int) -> tuple[int, list[Stall]]:
    """Measure all ways to save in turns. Returns the bytes of the training state, and the costs. The first save of each
    way does not count.
    """
    config = compose(*WORDS)
    config.data.cache_dir = str(root / "cache")
    bytes_of_state = count(config.model).total * 12
    torch.set_num_threads(threads)
    found: list[Stall] = []
    made: list[tuple[str, Run, CheckpointSchedule]] = []
    for number, way in enumerate(WAYS):
        run = run_of(rank, size, root / str(number), config, writer_of(way))
        step(run, saving := CheckpointSchedule(run))
        saving.save(None, is_last=True, is_stop=False)
        made.append((way, run, saving))
    for _ in range(rounds):
        found += [measure(run, saving, way) for way, run, saving in made]
    for _, run, _ in made:
        run.batches.close()
        run.checkpoints.writer.close()
    return bytes_of_state, found


TITLES = (
    "saved",
    "stall",
    "stall of each",
    "held",
    "to the commit",
    "steps until then",
    "undisturbed step",
    "measured",
)


def rows_of(found: list[Stall], threads: int) -> tuple[list[list[str]], dict[str, float]]:
    """Return a table row for each way to save, and way -> median stall in seconds."""
    rows, stalls = [], {}
    for way in WAYS:
        own = [stall for stall in found if stall.way == way]
        held, stall, written, steps, quiet = (
            statistics.median(getattr(one, name) for one in own)
            for name in ("held_s", "stall_s", "write_s", "steps", "quiet_s")
        )
        every = ", ".join(f"{one.stall_s:.2f}" for one in own)
        cells = [f"{stall:.2f}", every, f"{held:.2f}", f"{written:.2f}", f"{steps:.0f}", f"{quiet:.3f}"]
        rows.append([f"{way}; {threads} of 2 cores compute", *cells, commit()])
        stalls[way] = stall
    return rows, stalls


def main() -> int:
    """Measure and print. Returns the exit status: 1 if a stall exceeds its demand. With ``--write``, also write the
    page.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--rounds", type=int, default=3, help="saves of each way (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="with which steps compute (%(default)s)")
    parser.add_argument("--write", action="store_true", help="keep the rows in saves.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saves_") as root:
        ((size, found),) = run_distributed(measure_ways, 1, Path(root), args.rounds, args.threads, timeout_s=3000)
    rows, stalls = rows_of(found, args.threads)
    table = merged(Path(__file__), TITLES, rows)
    share = stalls[WAYS[1]] / stalls[WAYS[0]]
    print(f"{table}\n\nin the background {share:.1%} of waiting; late {stalls[WAYS[2]]:.2f} s")
    if args.write:
        machine = stamp(cores())
        about = f"State of {size / 1e9:.2f} GB; medians, in seconds."
        keep(Path(__file__), "What a checkpoint costs the steps around it", __doc__, f"{machine} {about}\n\n{table}")
    return 0 if args.threads > 1 or (share <= SHARE and stalls[WAYS[2]] <= LATE_LIMIT_S) else 1


if __name__ == "__main__":
    from benchmarks.speed import saves  # ranks import what they call by the name of its module

    sys.exit(saves.main())
