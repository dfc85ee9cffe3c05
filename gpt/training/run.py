"""A run in the making: what the command line asks for, and everything the loop works with.

Owns the way from words to a run folder that all ranks agree on, and the record of what an attempt runs on. Must not
know how a step is made.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from gpt.accounting.flops import training_flops_per_token
from gpt.accounting.hardware import peak_flops
from gpt.accounting.parameters import count
from gpt.checkpoint import CheckpointStore
from gpt.config import Strategy, TrainConfig
from gpt.data.corpus import check_fit, describe, described, prepare
from gpt.data.formats.prepared import Tokens
from gpt.data.loader import Samples
from gpt.metrics.environment import describe_rank, software
from gpt.metrics.startup_panel import show
from gpt.parallel.engine import Engine
from gpt.parallel.world import World
from gpt.planning import memory
from gpt.planning.settle import Settled
from gpt.topology.batch import Batch, cut
from gpt.topology.composition import lay_out
from gpt.topology.deepspeed_config import ds_config
from gpt.topology.dims import Topology
from gpt.training import determinism as reproducibility
from gpt.training.request import settle_here
from launch.runs import compose
from launch.runs.folder import RunFolder, write_json
from launch.runs.heartbeat import Phase, Pulse
from launch.runs.provenance import changed_since, code_state, describe_code, refuse_change


@dataclass
class Request:
    """What the command line asks for."""

    config: TrainConfig
    folder: RunFolder | None
    """Given with ``--run``; otherwise it follows from the overrides."""
    composed: DictConfig | None = None
    overrides: Sequence[str] = ()


def parse_request(argv: Sequence[str]) -> Request:
    """Read ``--run FOLDER``, or overrides of ``configs/train.yaml``."""
    parser = argparse.ArgumentParser(prog="python -m gpt.train", description="Train a GPT, or go on with a run.")
    parser.add_argument(
        "--run", metavar="FOLDER", help="go on with the run in FOLDER, with the config it was made with"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of configs/train.yaml")
    words = parser.parse_args(argv)
    if words.run:
        folder = RunFolder(Path(words.run).absolute())
        return Request(compose.read_config(folder, TrainConfig), folder)
    composed = compose.compose_train(words.overrides)
    config = compose.to_schema(composed, TrainConfig)
    config.validate()
    return Request(config, None, composed, words.overrides)


def agree_on_folder(request: Request, world: World) -> RunFolder:
    """Let rank 0 choose the folder and write the config there; all ranks get the same, or the same refusal."""

    def choose() -> tuple[RunFolder, Settled]:
        assert request.composed is not None
        folder = compose.choose_folder(request.config, request.overrides, compose.NOT_IN_POINT)
        settled = settle_here(request.config, request.overrides, folder, world)
        config = settled.apply(request.config)
        refuse_what_cannot_run(config, world.size)
        compose.refuse_other_run(folder, config)
        compose.settle_parallel(request.composed, vars(settled.parallel), settled.micro_batch)
        compose.write_config(folder, request.composed, request.overrides)
        return folder, settled

    if request.folder is not None:
        return request.folder
    folder, settled = world.on_first(choose)
    request.config.parallel, request.config.optim.micro_batch = settled.parallel, settled.micro_batch
    return folder


def refuse_what_cannot_run(config: TrainConfig, world_size: int) -> None:
    """Raise ConfigError, before there is a folder, where ranks, batch and corpus do not go together."""
    cut(config.optim, lay_out(config, world_size).data_ranks)
    check_fit(describe(config.data, config.data_cache), config.model, config.eval.sequences)


@dataclass
class Run:
    """Everything the loop works with. Letters of shapes: B sequences, T tokens of one, V vocabulary."""

    config: TrainConfig
    folder: RunFolder
    world: World
    attempt: int
    batch: Batch
    layout: Topology
    engine: Engine
    tokens: Tokens
    samples: Samples
    store: CheckpointStore
    pulse: Pulse
    initialised_from: dict[str, Any] | None = None
    """Where this attempt took its first weights from; None where it drew them, or went on from a checkpoint."""
    step: int = 0
    """Steps done."""

    @property
    def tokens_per_step(self) -> int:
        """Of the global batch."""
        return self.batch.global_batch * self.config.model.block_size

    def evaluating(self) -> None:
        """Show that an evaluation goes on."""
        self.pulse.at(self.step, Phase.evaluating)


def prepare_tokens(config: TrainConfig) -> Tokens:
    """The tokens of the corpus, refused where they do not fit the model or are too few."""
    check_fit(describe(config.data, config.data_cache), config.model, config.eval.sequences)
    return prepare(config.data, config.data_cache)


def open_attempt(folder: RunFolder, world: World) -> int:
    """The number of this attempt: the agent's where there is one, the next free one elsewhere."""
    given = os.environ.get("GPT_ATTEMPT")
    return int(given) if given else world.on_first(folder.create_attempt)


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
    print(f"warning: changed since attempt {since}: {what} (strict=true refuses that)", flush=True)


def describe_attempt(run: Run) -> None:
    """Write ``environment.json`` of this attempt and the ledger's ``started``, and show the start-up panel."""
    ranks = run.world.gather(describe_rank(run.world))
    if not run.world.is_first:
        return
    record = {
        "attempt": run.attempt,
        "time": time.time(),
        "from_step": run.step,
        "initialised_from": run.initialised_from,
        "data_sources": run.tokens.as_dict(),
        **set_up(run),
        "ranks": ranks,
        "peak_flops_per_s": peak_flops(ranks[0]["device_name"], run.config.precision),
        "software": software(),
        "git": code_state(),
        "code": describe_code(),
        "reproducibility": {"seed": run.config.seed, **reproducibility.state()},
    }
    write_json(run.folder.environment(run.attempt), record)
    if run.config.parallel.strategy is Strategy.deepspeed:
        write_json(run.folder.ds_config(run.attempt), ds_config(run.config, run.batch))
    if run.initialised_from is not None:
        run.folder.record_event("initialised", attempt=run.attempt, **run.initialised_from)
    run.folder.record_event(
        "started", attempt=run.attempt, world_size=run.world.size, topology=str(run.layout), from_step=run.step
    )
    where = f"attempt {run.attempt}, from step {run.step} of {run.config.optim.max_steps}"
    panel = show(record, run.config, f"{run.config.name}  {where}")
    print(f"{run.folder.path}\n{panel}", flush=True)


def set_up(run: Run) -> dict[str, Any]:
    """What is trained and how, with the counts that follow from the config."""
    config, batch, ranks = run.config, run.batch, run.world.size
    model = config.model
    planned = memory.per_rank(config, run.layout, batch)
    return {
        "world_size": ranks,
        "topology": run.layout.as_dict(),
        "global_batch": batch.global_batch,
        "micro_batch": batch.micro,
        "accumulation": batch.accumulation,
        "weak_scaling": config.optim.weak_scaling,
        "block_size": model.block_size,
        "precision": config.precision.name,
        "model": model.name,
        "parameters": count(model).total,
        "counts": count(model).as_dict(),
        "flops_per_token": training_flops_per_token(model).palm,
        "memory_planned_gib": planned.total_gib,
        "max_steps": config.optim.max_steps,
        "data": str(described(str(config.data.path or config.data.title), run.tokens)),
        "data_sha256": run.tokens.sha256,
    }
