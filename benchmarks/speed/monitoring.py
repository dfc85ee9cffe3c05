"""Cost of the records and views of a run: steps that write all of them, compared with steps that write none.

    python -m benchmarks.speed.monitoring  # the README's model
    python -m benchmarks.speed.monitoring model=gpt2_124m device=cuda

Blocks of ten steps alternate in one process. In one block, every record is completed, appended to its file and sent to
TensorBoard, CSV, JSON and console, and one of the ten steps measures the gradients by layer. In the other block, only
the loss is read.

Prints two Markdown tables. The first has the wall time and the CPU time of a step; other users of the machine disturb
the CPU time less. The second has the CPU time of each part alone, and the sum of the parts as a share of a step of
200 ms. Two parts stand for a large run. One is 100 waits for other ranks, about as many as a step of fsdp over 30
blocks has. The other is the search for slow ranks among 1,024 ranks, which only rank 0 of a run does.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from gpt.metrics.writers import MetricWriters, memory_gib
from gpt.parallel.distributed import Timeline, open_world, recorded, waiting
from gpt.train import build
from gpt.training.diagnostics import Gradients
from gpt.training.guards import STRAGGLER_FACTOR, STRAGGLER_WINDOW, StragglerJudge
from gpt.training.run import Run, agree_on_folder, open_attempt, parse_arguments, parse_request
from gpt.training.step import QueuedStep, fill_in_phases, queue_step
from launch import worker
from launch.runs.process import Phase
from launch.runs.records import StepRecord

STEPS = 10
ROUNDS = 12
ALONE = 300
WAITS = 100
"""Number of waits for other ranks in a step; fsdp over 30 blocks has about as many."""
RANKS = 1024
STEP_S = 0.2
"""Step time in seconds that the cost of the parts is compared with."""


def block(run: Run, writers: MetricWriters | None, gradients: Gradients) -> tuple[float, float]:
    """Return wall time and CPU time of ``STEPS`` steps, in seconds. If ``writers`` is None, only the loss is read.
    Otherwise ``writers`` write all records, and the first step measures ``gradients``."""
    started, used = time.perf_counter(), time.process_time()
    queued: list[QueuedStep] = []
    since = started

    def finish_former(evaluated: bool = False) -> None:
        nonlocal since
        if queued:
            since = finish(queued.pop(), since, writers, evaluated)

    for i in range(STEPS):
        measured = gradients if writers is not None and i == 0 else None
        queued.append(queue_step(run, measured, Phase.training, meanwhile=finish_former))
    finish_former(evaluated=True)
    return time.perf_counter() - started, time.process_time() - used


def finish(queued: QueuedStep, since: float, writers: MetricWriters | None, evaluated: bool) -> float:
    """Read the figures of a step, and write them.

    Args:
        queued: the step.
        since: end of the previous step, of time.perf_counter in seconds.
        writers: writers of the figures; None writes nothing.
        evaluated: True to give the record a validation loss, too.

    Returns:
        The end of this step, of time.perf_counter in seconds.
    """
    record, ended = queued.finish(since)
    if writers is not None:
        record.val_loss = record.loss if evaluated else None  # so that run.json is written, as it would be
        writers.write(record)
    return ended


def main() -> None:
    """Measure and print the tables."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*sys.argv[1:], f"run_dir={folder}/run", f"optim.max_steps={2 * STEPS * (ROUNDS + 1)}"]
        request = parse_request(parse_arguments(words))
        with open_world(request.config.device, request.config.parallel.timeout_s) as world:
            there = agree_on_folder(request, world)
            rank = worker.Run(world.rank, world.local_rank, world.size)
            run = build(request.config, there, world, open_attempt(there, world, rank), rank)
            gradients = Gradients(request.config.model, world.device)
            writers = MetricWriters(there, world, rank, request.config, run.step, gradients.names)
            sides: dict[str, list[tuple[float, float]]] = {"none": [], "all": []}
            for turn in range(ROUNDS + 1):
                for side in ("none", "all") if turn % 2 else ("all", "none"):
                    measured = block(run, writers if side == "all" else None, gradients)
                    if turn:  # the first round warms up
                        sides[side].append(measured)
            alone = parts(run, writers, gradients)
            writers.close()
        print(f"\n{request.config.model.name}, files of {size_mb(Path(folder)):.1f} MB\n")
    print(f"| a step, median of {ROUNDS} blocks | none | all | difference |\n|---|---|---|---|")
    for name, index in (("wall time", 0), ("CPU time", 1)):
        none, every = (statistics.median(pair[index] for pair in sides[side]) / STEPS for side in ("none", "all"))
        pairs = zip(sides["none"], sides["all"], strict=True)
        extra = statistics.median((with_all[index] - with_none[index]) / STEPS for with_none, with_all in pairs)
        print(f"| {name} | {none * 1e3:.2f} ms | {every * 1e3:.2f} ms | {extra * 1e3:+.2f} ms, {extra / none:+.2%} |")
    print("\n| part | CPU time a step |\n|---|---|")
    for name, seconds in alone.items():
        print(f"| {name} | {seconds * 1e6:,.0f} us |")
    whole = sum(alone.values())
    print(f"| all of them | {whole * 1e6:,.0f} us, {whole / STEP_S:.2%} of {STEP_S * 1e3:g} ms |")


def parts(run: Run, writers: MetricWriters, gradients: Gradients) -> dict[str, float]:
    """Return the CPU time of each part for one step, in seconds. Each part runs alone and many times."""
    record, _ = queue_step(run, None, Phase.training).finish(0.0)
    judge = StragglerJudge(STRAGGLER_FACTOR, STRAGGLER_WINDOW)
    own_times = [0.1 + 1e-5 * (rank % 7) for rank in range(RANKS)]
    actions: dict[str, Callable[[], object]] = {
        "gradients by layer, every tenth step": lambda: gradients.sums(run.engine.gradients()),
        "memory": lambda: memory_gib(run.world.device),
        f"phases, {WAITS} waits among them": lambda: time_phases(run),
        f"slow ranks, among {RANKS:,}": lambda: judge.add(own_times),
        "rank_00000.jsonl": lambda: run.worker.record(**record.as_dict()),
    }

    def write_views() -> None:
        for writer in writers.writers:
            writer.write(record)

    actions["views, handed to their thread"] = write_views
    costs = {}
    for name, action in actions.items():
        started = time.process_time()
        for _ in range(ALONE):
            action()
        costs[name] = (time.process_time() - started) / ALONE / (STEPS if name.startswith("gradients") else 1)
    return costs


def time_phases(run: Run) -> None:
    """Mark and read the times of the phases of a step, as often as one step does. Used to measure the cost of this
    work."""
    timeline = Timeline(run.world.device)
    with recorded(timeline):
        for _ in range(WAITS):
            with waiting("fsdp"):
                pass
        for _ in range(2):
            timeline.mark()
    if run.world.device.type == "cuda":
        torch.cuda.synchronize()  # a step's figures are read when it is done
    fill_in_phases(StepRecord(1, 1, 0.0, 0.0, 0.0, 0, (0, 0), 1.0), timeline, run.engine.timed_groups)


def size_mb(folder: Path) -> float:
    """Return the size of all files in a folder, in MB."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    main()
