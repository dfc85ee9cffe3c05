"""Writers of step records during a run: every rank's JSONL file, and rank 0's console, TensorBoard, CSV, JSON and W&B.

Owns the metrics derived from a record (throughput, utilization), and the choice of writers. Must not know how a step is
made.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from gpt.accounting.flops import recomputed_flops_per_token, training_flops_per_token
from gpt.accounting.hardware import peak_flops
from gpt.accounting.mfu import utilization
from gpt.config import Precision, TrainConfig
from gpt.metrics.console import Console
from gpt.metrics.environment import describe_rank
from gpt.metrics.run_json import RunJson
from gpt.metrics.steps_csv import StepsCsv
from gpt.metrics.view import MetricWriter, Records, View
from gpt.metrics.wandb import WeightsAndBiases
from gpt.parallel.distributed import World
from launch import worker
from launch.runs.compose import plain_config
from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord, read_records
from launch.runs.tensorboard import EventWriter

SHOWN_S = 0.5
"""Least time between two moments at which views are written. Some short steps together take the processor less time
than each by itself, whose code is out of the caches again."""


class MetricWriters:
    """Writers of one rank's step records: each record is completed, appended to the rank's file, passed to the others.

    Args:
        folder: the run folder.
        world: the ranks; rank 0 has writers beside its file.
        rank: this rank as the launcher knows it, which keeps its records.
        config: the config of the run.
        step: step after which the attempt goes on, 0 at the beginning.
        layers: names of the layers whose gradient norms are recorded.
        tokens_per_step: tokens of the global batch.
    """

    def __init__(
        self,
        folder: RunFolder,
        world: World,
        rank: worker.Run,
        config: TrainConfig,
        step: int,
        layers: Sequence[str],
        tokens_per_step: int,
    ) -> None:
        self._rank = rank
        self._tokens = tokens_per_step
        self._world = world
        self._flops = training_flops_per_token(config.model)
        self._recomputed = recomputed_flops_per_token(config.model, config.recompute)
        device = describe_rank(world)["device_name"]
        self._peak = peak_flops(device, config.precision, bool(config.tf32))
        self._bf16_peak = peak_flops(device, Precision.bf16)
        self._folder = folder
        # Records of steps after the checkpoint were lost with the crash: those steps are done again.
        earlier = read_records(folder.metrics(0)) if rank.attempt > 1 and world.is_first else []
        self._lost: dict[str, Any] | None = earlier[-1] if earlier else None
        self._open = lambda step, done: open_writers(folder, config, step, done, layers) if world.is_first else []
        self.writers: list[MetricWriter] = self._open(step, [r for r in earlier if r["step"] <= step])
        self._unshown: list[StepRecord] = []
        """Records that are written, and which the views lack yet."""
        self._shown = time.monotonic()

    def keep(self, record: StepRecord) -> None:
        """Put ``record`` on disk before its step is saved; ``write`` follows, with the time of the save.

        No later attempt does a step again that a checkpoint holds: killed between the two, the run would lack it.
        """
        self._record(record)
        self._rank.flush()

    def write(self, record: StepRecord) -> None:
        """Complete ``record`` with throughput and utilization, and write it; views of short steps follow soon."""
        self._record(record)
        if self._lost is not None and record.step > self._lost["step"]:
            self._recovered(record, self._lost)
        # run.json is made from the records on disk after an evaluation. And a step that is in a checkpoint is not done
        # again after a crash, which must not take its record along.
        if record.checkpoint_s is not None or (record.val_loss is not None and self._world.is_first):
            self._rank.flush()
        if self.writers:
            self._unshown.append(record)
            if record.val_loss is not None or time.monotonic() - self._shown >= SHOWN_S:
                self.show()

    def show(self) -> None:
        """Write to the views what they lack yet."""
        unshown, self._unshown = self._unshown, []
        for record in unshown:
            for writer in self.writers:
                writer.write(record)
        self._shown = time.monotonic()

    def go_back(self, step: int) -> None:
        """Go on after ``step``, to which the run has gone back: the views lose what came later, as after a crash."""
        self.close()
        done = [r for r in read_records(self._folder.metrics(0)) if r["step"] <= step] if self.writers else []
        self.writers = self._open(step, done)

    def close(self) -> None:
        """Close the writers, after the last record and after the event that tells how the attempt ended."""
        self._rank.flush()
        self.show()
        for writer in self.writers:
            writer.close()

    def _record(self, record: StepRecord) -> None:
        self._complete(record)
        self._rank.record(**(record.as_dict() if self._world.is_first else record.own()))

    def _complete(self, record: StepRecord) -> None:
        record.tokens_per_s = self._tokens / record.step_time_s
        tokens_per_s = record.tokens_per_s / self._world.size
        used = utilization(self._flops, tokens_per_s, self._peak, self._recomputed)
        record.tflops_per_s = used.tflops_per_s
        record.mfu_palm, record.mfu_causal, record.hfu = used.mfu_palm, used.mfu_causal, used.hfu
        record.mfu_bf16 = utilization(self._flops, tokens_per_s, self._bf16_peak).mfu_palm

    def _recovered(self, record: StepRecord, lost: dict[str, Any]) -> None:
        """Record in the event log how long an interruption took, from the last step before it to the first new one."""
        down = record.time - lost["time"]
        self._folder.record_event("recovered", attempt=record.attempt, step=record.step, seconds_since_last_step=down)
        self._lost = None


def open_writers(
    folder: RunFolder, config: TrainConfig, step: int, done: Records, layers: Sequence[str]
) -> list[MetricWriter]:
    """Open the views that ``config.logging`` asks for, for a run that goes on after ``step``."""
    logging = config.logging
    views: dict[str, Callable[[int, Records], MetricWriter]] = {
        "console": lambda step, done: Console(config.optim.max_steps, logging.console_interval_s)
    }
    if logging.tensorboard:
        views["tensorboard"] = lambda step, done: EventWriter(folder.tensorboard, purge_step=step + 1 if step else None)
    if logging.csv:
        views["steps.csv"] = lambda step, done: StepsCsv(folder.steps_csv, layers, done)
    if logging.json:
        views["run.json"] = lambda step, done: RunJson(folder)
    if logging.wandb:
        views["wandb"] = lambda step, done: WeightsAndBiases(folder, logging.wandb_project, plain_config(config))
    return [View(folder, name, opens, step, done) for name, opens in views.items()]
