"""A run in the making: what the command line asks for, and everything the loop works with.

Owns the way from words to a run folder that all ranks agree on, and the record of what an attempt runs on. Must not
know how a step is made.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from gpt.accounting.flops import training_flops_per_token
from gpt.accounting.hardware import peak_flops
from gpt.accounting.parameters import count
from gpt.checkpoint import CheckpointStore
from gpt.checkpoint.copies import Copies
from gpt.config import AttentionBackend, Strategy, TrainConfig
from gpt.data.corpus import check_fit, describe, describe_tokens, prepare
from gpt.data.formats.prepared import Tokens
from gpt.data.loader import Samples
from gpt.data.prefetch import BatchPrefetcher
from gpt.metrics.environment import describe_rank, software
from gpt.metrics.startup_summary import render_summary
from gpt.model.attention import find_flash_obstacle
from gpt.model.loss import COMPUTE_DTYPES
from gpt.parallel.distributed import World
from gpt.parallel.engine import Engine
from gpt.planning import memory
from gpt.planning.advice import execution_warnings
from gpt.topology.batch import Batch
from gpt.topology.deepspeed_config import ds_config
from gpt.topology.dims import ParallelDims
from gpt.training import determinism as reproducibility
from gpt.training.divergence import DivergenceGuard
from gpt.training.early_stop import EarlyStop
from gpt.training.execution import best_precision
from launch import worker
from launch.errors import ConfigError
from launch.runs.environment import changed_since, code_state, describe_code, describe_environment, refuse_change
from launch.runs.files import write_json
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import Phase


@dataclass
class Run:
    """Everything the loop works with. Letters of shapes: B sequences, T tokens of one, V vocabulary."""

    config: TrainConfig
    folder: RunFolder
    world: World
    attempt: int
    batch: Batch
    dims: ParallelDims
    engine: Engine
    tokens: Tokens
    samples: Samples
    batches: BatchPrefetcher
    """The training batches of this rank, read ahead."""
    store: CheckpointStore
    guard: DivergenceGuard
    """The judge of the steps."""
    worker: worker.Run
    copies: Copies
    """Of its checkpoints, elsewhere."""
    early_stop: EarlyStop
    """The judge of the validation losses."""
    initialised_from: dict[str, Any] | None = None
    """Source of the first weights of this attempt; None where it drew them, or went on from a checkpoint."""
    step: int = 0
    """Steps done."""
    hosts: tuple[str, ...] = ()
    """Host of each rank; empty before the attempt is described."""
    restore_s: float | None = None
    """Seconds that the last load of a checkpoint took, until a step record tells it."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of the global batch."""
        return self.batch.global_batch * self.config.model.block_size

    def take_restore_s(self) -> float | None:
        """Return the seconds of a load that no step record has told yet; None where there is none."""
        seconds, self.restore_s = self.restore_s, None
        return seconds

    def evaluating(self) -> None:
        """Show that an evaluation goes on."""
        self.worker.phase(Phase.evaluating, self.step)


def prepare_tokens(config: TrainConfig) -> Tokens:
    """The tokens of the corpus, refused where they do not fit the model or are too few."""
    check_fit(describe(config.data, config.data_cache), config.model, config.eval.sequences)
    return prepare(config.data, config.data_cache)


def open_attempt(folder: RunFolder, world: World, launched: worker.Run) -> int:
    """Number this attempt, as the launcher did or as the next free one, and have the rank write into the run folder."""
    attempt = launched.attempt if launched.folder is not None else world.on_first(folder.create_attempt)
    launched.open_folder(folder.path, attempt)
    return attempt


def look_for_changes(folder: RunFolder, attempt: int, strict: bool) -> None:
    """Warn where this attempt does not run what the one before it ran.

    Raises:
        ConfigError: it does not, and ``strict`` forbids that.
    """
    now = {"code": describe_code(), "git": code_state(), "software": software()}
    changed = changed_since(folder, now, attempt)
    if changed is None:
        return
    since, what = changed
    folder.record_event("code_changed", attempt=attempt, since=since, cause=what)
    if strict:
        refuse_change(folder, since, what)
    print(f"warning: changed since attempt {since}: {what} (require_same_code=true refuses that)", flush=True)


def describe_attempt(run: Run) -> None:
    """Write ``environment.json`` of this attempt and the event ``started``, and print the startup summary."""
    ranks = run.world.gather(describe_rank(run.world))
    run.hosts = tuple(rank["host"] for rank in ranks)
    if not run.world.is_first:
        return
    on_gpus = run.world.device.type == "cuda"
    record = {
        "attempt": run.attempt,
        "time": time.time(),
        "from_step": run.step,
        "initialised_from": run.initialised_from,
        "data_sources": run.tokens.as_dict(),
        **set_up(run),
        "ranks": ranks,
        "environment": describe_environment(),
        "peak_flops_per_s": peak_flops(ranks[0]["device_name"], run.config.precision, bool(run.config.tf32)),
        "software": software(),
        "git": code_state(),
        "code": describe_code(),
        "warnings": [*execution_warnings(run.config, ranks[0]["device_name"], best_precision(run.world.device))]
        if on_gpus
        else [],
        "reproducibility": {"seed": run.config.seed, **reproducibility.state()},
    }
    write_json(run.folder.environment(run.attempt), record)
    if run.config.parallel.strategy is Strategy.deepspeed:
        write_json(run.folder.ds_config(run.attempt), ds_config(run.config, run.batch))
    if run.initialised_from is not None:
        run.folder.record_event("initialised", attempt=run.attempt, **run.initialised_from)
    run.folder.record_event(
        "started", attempt=run.attempt, world_size=run.world.size, topology=str(run.dims), from_step=run.step,
        max_steps=run.config.optim.max_steps,
    )  # fmt: skip
    where = f"attempt {run.attempt}, from step {run.step} of {run.config.optim.max_steps}"
    summary = render_summary(record, run.config, f"{run.config.name}  {where}")
    print(f"{run.folder.path}\n{summary}", flush=True)


def set_up(run: Run) -> dict[str, Any]:
    """Describe model, batch and data, with the counts that follow from the config."""
    config, batch, ranks = run.config, run.batch, run.world.size
    model = config.model
    planned = memory.per_rank(config, run.dims, batch)
    return {
        "world_size": ranks,
        "topology": run.dims.as_dict(),
        "global_batch": batch.global_batch,
        "micro_batch": batch.micro,
        "accumulation": batch.accumulation,
        "weak_scaling": config.optim.weak_scaling,
        "block_size": model.block_size,
        "precision": config.precision.name,
        "tf32": bool(config.tf32),
        "float8": config.float8.name,
        "model": model.name,
        "parameters": count(model).total,
        "counts": count(model).as_dict(),
        "flops_per_token": training_flops_per_token(model).palm,
        "memory_planned_gib": planned.total_gib,
        "max_steps": config.optim.max_steps,
        "data": str(describe_tokens(str(config.data.path or config.data.title), run.tokens)),
        "data_sha256": run.tokens.sha256,
    }


def check_flash(config: TrainConfig, world: World) -> str | None:
    """Reason for which attention=flash will not use the flash kernel on some rank; None where it will, or is not asked.

    Collective, so that all ranks end the same way.

    Raises:
        ConfigError: it cannot, and ``model.force_flash`` is set.
    """
    if config.model.attention is not AttentionBackend.flash:
        return None
    reasons = world.gather(find_flash_obstacle(config.model, world.device, COMPUTE_DTYPES[config.precision]))
    reason = next((r for r in reasons if r is not None), None)
    if reason is not None and config.model.force_flash:
        raise ConfigError(
            f"model.force_flash=true, but {reason}",
            "a device, precision and model for which torch has the flash kernel",
            "precision=bf16 on a GPU of compute capability 8.0 or more, or model.force_flash=false for another kernel",
        )
    return reason
