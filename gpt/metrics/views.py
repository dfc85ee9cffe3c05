"""The views of the step records while a run goes on: every rank's JSONL file, rank 0's console and TensorBoard.

Owns what is derived from a record for showing. Must not know how a step is made.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from gpt.accounting.flops import training_flops_per_token
from gpt.accounting.hardware import peak_flops
from gpt.accounting.mfu import utilization
from gpt.config import TrainConfig
from gpt.metrics.environment import describe_rank
from gpt.metrics.records import StepRecord, append_record, read_records
from gpt.metrics.tensorboard import EventWriter, record_scalars
from gpt.parallel.world import World
from gpt.run_folder import RunFolder


class Views:
    """Takes each record once, completes it, and writes it everywhere."""

    def __init__(self, folder: RunFolder, world: World, attempt: int, config: TrainConfig, step: int) -> None:
        self._path = folder.metrics(world.rank)
        self._world = world
        self._config = config
        self._flops = training_flops_per_token(config.model)
        self._peak = peak_flops(describe_rank(world)["device_name"], config.precision)
        self._printed = 0.0
        self._folder = folder
        earlier = read_records(self._path) if attempt > 1 and world.is_first else []
        self._lost: dict[str, Any] | None = earlier[-1] if earlier else None
        self._board = (
            EventWriter(folder.tensorboard, purge_step=step + 1 if step else None)
            if world.is_first and config.logging.tensorboard
            else None
        )

    def write(self, record: StepRecord) -> None:
        """Complete ``record`` with what follows from it, and show it."""
        self._complete(record)
        append_record(self._path, record)
        if self._lost is not None and record.step > self._lost["step"]:
            self._recovered(record, self._lost)
        if self._board is not None:
            for tag, value in record_scalars(record.as_dict()).items():
                self._board.scalar(tag, value, record.step, record.time)
        last = record.step == self._config.optim.max_steps
        if self._world.is_first and (last or time.time() - self._printed >= self._config.logging.console_interval_s):
            self._printed = time.time()
            print(console_line(record, self._config.optim.max_steps), flush=True)

    def _complete(self, record: StepRecord) -> None:
        tokens_per_s = record.tokens / record.step_time_s
        record.tokens_per_s = tokens_per_s * self._world.size
        used = utilization(self._flops, tokens_per_s, self._peak)
        record.tflops_per_s = used.tflops_per_s
        record.mfu_palm, record.mfu_causal, record.hfu = used.mfu_palm, used.mfu_causal, used.hfu
        if self._world.device.type == "cuda":
            record.memory_peak_gib = torch.cuda.max_memory_allocated(self._world.device) / 2**30

    def _recovered(self, record: StepRecord, lost: dict[str, Any]) -> None:
        """Tell the ledger how long an interruption took, from the last step before it to the first new one."""
        down = record.time - lost["time"]
        self._folder.record_event("recovered", attempt=record.attempt, step=record.step, seconds_since_last_step=down)
        self._lost = None

    def close(self) -> None:
        """Flush the event file."""
        if self._board is not None:
            self._board.close()


def console_line(record: StepRecord, max_steps: int) -> str:
    """One record as a line of text."""
    parts = [
        f"step {record.step}/{max_steps}",
        f"loss {record.loss:.4f}",
        f"lr {record.lr:.2e}",
        f"grad_norm {record.grad_norm:.3f}",
        f"{record.step_time_s * 1000:.0f} ms",
        f"{record.tokens_per_s or 0:,.0f} tokens/s",
    ]
    if record.mfu_palm is not None:
        parts.append(f"MFU {record.mfu_palm:.1%}")
    if record.val_loss is not None:
        parts.append(f"val_loss {record.val_loss:.4f}")
    if record.checkpoint_s is not None:
        parts.append(f"saved in {record.checkpoint_s:.2f} s")
    return "  ".join(parts)
