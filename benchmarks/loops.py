"""The training loop of ``gpt.train`` for benchmarks: build a run, then make one iteration of its loop for each call."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from gpt.metrics.writers import MetricWriters
from gpt.parallel.distributed import World
from gpt.train import build
from gpt.training.diagnostics import Gradients
from gpt.training.run import Run, agree_on_folder, open_attempt, parse_arguments, parse_request
from gpt.training.step import QueuedStep, queue_step
from launch import worker
from launch.runs.process import Phase

FOR_EVER = "optim.max_steps=1000000"
"""Override for a run without a last step."""


def open_run(words: Sequence[str], world: World) -> Run:
    """Build the run that the overrides ``words`` describe, as ``gpt.train`` does."""
    request = parse_request(parse_arguments([*words]))
    folder = agree_on_folder(request, world)
    rank = worker.Run(world.rank, world.local_rank, world.size)
    return build(request.config, folder, world, open_attempt(folder, world, rank), rank)


def our_turn(run: Run) -> Callable[[], None]:
    """Return a function that runs one iteration of ``gpt.train``'s loop: it starts a step, and then reads and records
    the figures of the step before.
    """
    run.engine.module.train()
    gradients = Gradients(run.config.model, run.world.device)
    writers = MetricWriters(run.folder, run.world, run.worker, run.config, 0, gradients.names)
    interval = run.config.logging.gradients_interval
    queued: list[QueuedStep] = []
    clock = time.perf_counter()

    def write_former() -> None:
        nonlocal clock
        if queued:
            record, clock = queued.pop().finish(clock)
            writers.write(record)

    def step() -> None:
        measured = gradients if interval > 0 and (run.step + 1) % interval == 0 else None
        queued.append(queue_step(run, measured, Phase.training, meanwhile=write_former))

    return step
