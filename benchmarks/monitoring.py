"""What watching a run costs: steps with every record and view against steps with none, in turn, in one process.

    python benchmarks/monitoring.py                          # the README's model
    python benchmarks/monitoring.py model=gpt2_124m device=cuda

Blocks of ten steps alternate: with one, every record is completed, appended to its file and handed to TensorBoard, CSV,
JSON and console, and one step of the ten measures the gradients by layer; with the other, only the loss is read. Prints
a Markdown table: wall time, and CPU time of the whole process, which other users of the machine disturb less.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from pathlib import Path

from gpt.gradients import Gradients
from gpt.metrics.views import Views
from gpt.parallel.world import open_world
from gpt.pulse import Phase, Pulse
from gpt.run import Run, agree_on_folder, open_attempt, parse_request
from gpt.step import QueuedStep, queue_step
from gpt.train import build

STEPS = 10
ROUNDS = 12


def block(run: Run, views: Views | None, gradients: Gradients) -> tuple[float, float]:
    """Wall and CPU seconds of ``STEPS`` steps, with or without being watched."""
    started, used = time.perf_counter(), time.process_time()
    queued: QueuedStep | None = None
    since = started
    for i in range(STEPS):
        step = queue_step(run, gradients if views is not None and i == 0 else None, Phase.training)
        if queued is not None:
            since = finish(queued, since, views, evaluated=False)
        queued = step
    assert queued is not None
    finish(queued, since, views, evaluated=True)
    return time.perf_counter() - started, time.process_time() - used


def finish(queued: QueuedStep, since: float, views: Views | None, evaluated: bool) -> float:
    """Read the figures of a step and show them, if somebody watches."""
    record, ended = queued.finish(since)
    if views is not None:
        record.val_loss = record.loss if evaluated else None  # so that run.json is written, as it would be
        views.write(record)
    return ended


def main() -> None:
    """Measure, and print the table."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*sys.argv[1:], f"run_dir={folder}/run", f"optim.max_steps={2 * STEPS * (ROUNDS + 1)}"]
        request = parse_request([*words, "logging.console_interval_s=0"])
        with open_world(request.config.device, request.config.parallel.timeout_s) as world:
            there = agree_on_folder(request, world)
            run = build(request.config, there, world, open_attempt(there, world), Pulse(None))
            gradients = Gradients(run.engine.module, world.size)
            views = Views(there, world, run.attempt, request.config, run.step, gradients.names)
            sides: dict[str, list[tuple[float, float]]] = {"none": [], "all": []}
            for turn in range(ROUNDS + 1):
                for side in ("none", "all") if turn % 2 else ("all", "none"):
                    measured = block(run, views if side == "all" else None, gradients)
                    if turn:  # the first round warms up
                        sides[side].append(measured)
            views.close()
        print(f"\n{request.config.model.name}, files of {size_mb(Path(folder)):.1f} MB\n")
    print(f"| a step, median of {ROUNDS} blocks | none | all | difference |\n|---|---|---|---|")
    for name, index in (("wall time", 0), ("CPU time", 1)):
        none, every = (statistics.median(pair[index] for pair in sides[side]) / STEPS for side in ("none", "all"))
        pairs = zip(sides["none"], sides["all"], strict=True)
        extra = statistics.median((with_all[index] - with_none[index]) / STEPS for with_none, with_all in pairs)
        print(f"| {name} | {none * 1e3:.2f} ms | {every * 1e3:.2f} ms | {extra * 1e3:+.2f} ms, {extra / none:+.2%} |")


def size_mb(folder: Path) -> float:
    """Megabytes of all files but the corpus."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


if __name__ == "__main__":
    main()
