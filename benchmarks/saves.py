"""What a checkpoint costs the steps around it: saved in the background, and waited for.

    python benchmarks/saves.py            # prints
    python benchmarks/saves.py --write    # and writes saves.md

A GPT whose weights and moments are more than 1 GB takes steps on this machine's CPUs and saves in between, by the
loop's own parts, onto the disk of the temporary folder (TMPDIR). The stall of a save is what the steps from it to its
commit took beyond as many undisturbed ones, the save itself included; `held` is the part that the loop waits inside the
save. The three ways take turns, so that a machine with other work slows all of them. In the third the writer sleeps ten
seconds before it writes. Exit status 1 where saving in the background costs more than a tenth of waiting, or more than
0.3 s with the slow writer.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from page import keep, stamp

from gpt.accounting.parameters import count
from gpt.checkpoint import part
from gpt.checkpoint.writer import InlineWriter, ProcessWriter, Writer
from gpt.config import TrainConfig
from gpt.parallel.distributed import World
from gpt.train import build
from gpt.training.run import Run
from gpt.training.saving import Saving
from gpt.training.step import queue_step
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import Phase
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
"""Undisturbed steps before each save."""
SHARE, LATE_LIMIT_S = 0.1, 0.3


@dataclass(frozen=True)
class Stall:
    """What one save cost, seconds."""

    way: str
    held_s: float
    stall_s: float
    write_s: float
    steps: int
    quiet_s: float


def write_late(content: part.Part, folder: Path) -> None:
    """Write as always, ten seconds later."""
    time.sleep(LATE_S)
    part.write_part(content, folder)


def writer_of(way: str) -> Writer:
    """Make the writer of one way to save."""
    if way == WAYS[0]:
        return InlineWriter()
    with mock.patch("gpt.checkpoint.jobs.write_part", write_late if way == WAYS[2] else part.write_part):
        return ProcessWriter()


def step(run: Run, saving: Saving) -> float:
    """Take one step; returns its seconds."""
    started = time.perf_counter()
    queued = queue_step(run, None, Phase.training, saving.ballot())
    queued.finish(started)
    saving.hear(queued.ballot, queued.ballots_of_all())
    return time.perf_counter() - started


def measure(run: Run, saving: Saving, way: str) -> Stall:
    """Save once between steps."""
    saves = run.store.saves
    quiet = statistics.median(step(run, saving) for _ in range(QUIET))
    started = time.perf_counter()
    held = saving.save(None, is_last=False, is_stop=False)
    steps = 0
    while saves.is_pending or not steps:
        step(run, saving)
        steps += 1
    stall = time.perf_counter() - started - steps * quiet
    written = next(e["write_s"] for e in reversed(run.folder.read_events()) if e["event"] == "saved")
    return Stall(way, held, stall, written, steps, quiet)


def run_of(rank: int, size: int, folder: Path, config: TrainConfig, writer: Writer) -> Run:
    """Build a run that saves with ``writer``."""
    world = World(rank, size, rank, size, 0, torch.device("cpu"), control_group())
    worker = Rank(rank, rank, size)
    run = build(config, RunFolder(folder), world, 1, worker, writer)
    worker.open_folder(run.folder.path, 1)
    return run


def measure_ways(rank: int, size: int, root: Path, rounds: int) -> tuple[int, list[Stall]]:
    """Measure every way in turns, after a first save of each; returns bytes of the state, and the stalls."""
    config = compose(*WORDS)
    config.data.cache_dir = str(root / "cache")
    bytes_of_state = count(config.model).total * 12
    torch.set_num_threads(2)
    found: list[Stall] = []
    made: list[tuple[str, Run, Saving]] = []
    for number, way in enumerate(WAYS):
        run = run_of(rank, size, root / str(number), config, writer_of(way))
        step(run, saving := Saving(run))
        saving.save(None, is_last=True, is_stop=False)
        made.append((way, run, saving))
    for _ in range(rounds):
        found += [measure(run, saving, way) for way, run, saving in made]
    for _, run, _ in made:
        run.batches.close()
        run.store.saves.writer.close()
    return bytes_of_state, found


def table(size: int, found: list[Stall]) -> tuple[str, bool]:
    """Return the result as Markdown, and whether it is what is promised."""
    rows: list[str] = []
    median: dict[str, float] = {}
    for way in WAYS:
        of_way = [stall for stall in found if stall.way == way]

        def middle(name: str, of_way: list[Any] = of_way) -> float:
            return statistics.median(getattr(stall, name) for stall in of_way)

        median[way] = middle("stall_s")
        every = ", ".join(f"{stall.stall_s:.2f}" for stall in of_way)
        rows.append(
            f"| {way} | {middle('held_s'):.3f} | {middle('stall_s'):.2f} | {every} | {middle('write_s'):.2f} | "
            f"{middle('steps'):.0f} | {middle('quiet_s'):.2f} |"
        )
    held = statistics.median(stall.held_s for stall in found if stall.way == WAYS[1])
    waited = statistics.median(stall.held_s for stall in found if stall.way == WAYS[0])
    late = statistics.median(stall.held_s for stall in found if stall.way == WAYS[2])
    text = [
        f"State of {size / 1e9:.2f} GB; medians of {len(found) // len(WAYS)} saves each, seconds.",
        "",
        "| saved | held | stall | stall of each | to the commit | steps until then | an undisturbed step |",
        "|---|---|---|---|---|---|---|",
        *rows,
        "",
        f"In the background the loop is held for {held / waited:.1%} of the time that it waits otherwise, and with the "
        f"late writer for {late:.2f} s. The stall with all steps until the commit is "
        f"{median[WAYS[1]] / median[WAYS[0]]:.0%}, for the writer takes CPU time "
        "from steps that compute on CPUs.",
    ]
    return "\n".join(text), held <= SHARE * waited and late <= LATE_LIMIT_S


def main() -> int:
    """Measure, print, and write the page where that is asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="saves_") as root:
        ((size, found),) = run_distributed(measure_ways, 1, Path(root), args.rounds, timeout_s=3000)
    text, holds = table(size, found)
    print(text)
    if args.write:
        keep(
            Path(__file__), "What a checkpoint costs the steps around it", __doc__, f"{stamp('2 CPU cores')}\n\n{text}"
        )
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
