"""The views of the step records while a run goes on: every rank's JSONL file, and what rank 0 shows beside it.

Owns what is derived from a record for showing, and which views there are. Must not know how a step is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from gpt.accounting.flops import recomputed_flops_per_token, training_flops_per_token
from gpt.accounting.hardware import peak_flops
from gpt.accounting.mfu import utilization
from gpt.config import TrainConfig
from gpt.metrics.console import Console
from gpt.metrics.environment import describe_rank
from gpt.metrics.run_json import RunJson
from gpt.metrics.steps_csv import StepsCsv
from gpt.metrics.wandb import WeightsAndBiases
from gpt.parallel.distributed import World
from launch import worker
from launch.runs.compose import plain_config
from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord, read_records
from launch.runs.tensorboard import EventWriter


class View(Protocol):
    """Something that shows records."""

    def write(self, record: StepRecord) -> None:
        """Take the next one."""

    def close(self) -> None:
        """No more will come."""


class Views:
    """Takes each record once, completes it, writes it into the rank's file, and hands it to the views."""

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
        self._peak = peak_flops(describe_rank(world)["device_name"], config.precision)
        self._folder = folder
        earlier = read_records(folder.metrics(0)) if rank.attempt > 1 and world.is_first else []
        self._lost: dict[str, Any] | None = earlier[-1] if earlier else None
        done = [record for record in earlier if record["step"] <= step]
        self.views = open_views(folder, config, step, done, layers) if world.is_first else []

    def write(self, record: StepRecord) -> None:
        """Complete ``record`` with what follows from it, and show it."""
        self._complete(record)
        self._rank.record(**record.as_dict())
        if self._lost is not None and record.step > self._lost["step"]:
            self._recovered(record, self._lost)
        # A view that shows the whole run reads it back after an evaluation; and a step that is in a checkpoint is not
        # done again after a crash, which must not take its record along.
        if record.val_loss is not None or record.checkpoint_s is not None:
            self._rank.flush()
        for view in self.views:
            view.write(record)

    def close(self) -> None:
        """After the last record, and after the ledger knows how the attempt ended."""
        self._rank.flush()
        for view in self.views:
            view.close()

    def _complete(self, record: StepRecord) -> None:
        record.tokens_per_s = self._tokens / record.step_time_s
        tokens_per_s = record.tokens_per_s / self._world.size
        used = utilization(self._flops, tokens_per_s, self._peak, self._recomputed)
        record.tflops_per_s = used.tflops_per_s
        record.mfu_palm, record.mfu_causal, record.hfu = used.mfu_palm, used.mfu_causal, used.hfu

    def _recovered(self, record: StepRecord, lost: dict[str, Any]) -> None:
        """Tell the ledger how long an interruption took, from the last step before it to the first new one."""
        down = record.time - lost["time"]
        self._folder.record_event("recovered", attempt=record.attempt, step=record.step, seconds_since_last_step=down)
        self._lost = None


def open_views(
    folder: RunFolder, config: TrainConfig, step: int, done: Sequence[dict[str, Any]], layers: Sequence[str]
) -> list[View]:
    """The views that ``config.logging`` asks for, of a run that goes on after ``step``, with the records ``done``."""
    asked = config.logging
    views: list[View] = [Console(config.optim.max_steps, asked.console_interval_s)]
    if asked.tensorboard:
        views.append(EventWriter(folder.tensorboard, purge_step=step + 1 if step else None))
    if asked.csv:
        views.append(StepsCsv(folder.steps_csv, layers, done))
    if asked.json:
        views.append(RunJson(folder))
    if asked.wandb:
        views.append(WeightsAndBiases(folder, asked.wandb_project, plain_config(config)))
    return views
