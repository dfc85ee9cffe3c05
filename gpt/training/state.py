"""The state of a run that a checkpoint holds, and resuming from one.

Owns the state: model, optimizer, loss scale, the random generators of every rank, and the position in the data, which
is a number.
The files themselves are ``gpt.checkpoint``'s.
"""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch

from gpt.checkpoint import CheckpointError, LoadedCheckpoint
from gpt.checkpoint.folders import VALIDATION_LOSS
from gpt.checkpoint.in_flight import FailedWrite
from gpt.checkpoint.memory import MemorySaves
from gpt.config.compose import RESUMABLE
from gpt.data.order import PassedOver
from gpt.parallel.distributed import World
from gpt.training.divergence import last_rollback
from gpt.training.run import Run
from launch.errors import ConfigError
from launch.runs import compose
from launch.runs.folder import is_newest_attempt
from launch.runs.heartbeat import Phase
from launch.runs.identity import may_change


def save(run: Run) -> float:
    """Write a checkpoint of the step just done, and wait for it. Returns the seconds that took."""
    started = time.perf_counter()
    begin_save(run, None)
    found = run.store.saves.finish()
    if isinstance(found, FailedWrite):
        run.store.saves.give_up()
        raise CheckpointError(found.cause)
    seconds = time.perf_counter() - started
    run.worker.saved(run.step, seconds)
    return seconds


def begin_save(run: Run, val_loss: float | None) -> None:
    """Take over the state after the step just done, and begin to write it.

    Args:
        run: the run, none of whose saves is in flight, unless it is failing.
        val_loss: validation loss of the step, nats per token, where it was evaluated.
    """
    run.worker.phase(Phase.saving, run.step)
    # The fence goes to the writer's process, and so without the run.
    may_commit = partial(is_newest_attempt, run.folder, run.attempt)
    run.store.saves.start(run.step, run.engine.state(), rng_state(run.world), describe(run, val_loss), may_commit)


def begin_save_in_memory(run: Run, memory: MemorySaves) -> None:
    """Take over the state after the step just done, and begin to send it into the memory of the nodes."""
    run.worker.phase(Phase.saving, run.step)
    memory.start(run.step, run.engine.state(), rng_state(run.world), describe(run, None))


def describe(run: Run, val_loss: float | None) -> dict[str, Any]:
    """Return what a checkpoint tells of the run, as plain JSON."""
    meta = {
        "attempt": run.attempt,
        "samples": run.step * run.batch.global_batch,
        "data_sha256": run.tokens.sha256,
        "topology": run.dims.as_dict(),
        "world_size": run.world.size,
        "config": compose.plain_config(run.config),
    }
    meta |= divergence_state(run)
    meta["early_stop"] = run.early_stop.state()
    if run.engine.loss_scale is not None:
        meta["loss_scale"] = run.engine.loss_scale.state()
    if val_loss is not None:
        meta[VALIDATION_LOSS] = val_loss
    return meta


def load(run: Run) -> None:
    """Go on from the newest checkpoint that is whole, if there is one."""
    if run.store.is_new():  # the optimizer's state need not be made yet, which takes torch a step
        run.engine.begin()
        return
    began = time.perf_counter()
    state = run.engine.state()
    if run.config.checkpoint.in_memory and run.store.memory is None and run.world.is_first:
        run.folder.record_event("memory_passed_over", attempt=run.attempt, cause="a node has no memory store")
    loaded = run.store.load(state)
    if loaded is None:
        run.engine.begin()
        return
    for line in loaded.set_aside:
        if run.world.is_first:
            run.folder.record_event("checkpoint_set_aside", attempt=run.attempt, cause=line)
    if run.world.is_first and (loaded.is_from_memory or loaded.memory_damage is not None):
        name = "loaded_from_memory" if loaded.is_from_memory else "memory_passed_over"
        run.folder.record_event(name, attempt=run.attempt, step=loaded.step, cause=loaded.memory_damage)
    if loaded.fetched_for is not None:
        refuse_other_config(run, loaded)
        if run.world.is_first:
            run.folder.record_event("loaded_from_copy", attempt=run.attempt, step=loaded.step, cause=loaded.fetched_for)
    if loaded.meta["samples"] != loaded.step * run.batch.global_batch:
        raise ConfigError(
            f"{loaded.meta['samples']} samples in the {loaded.step} steps of the checkpoint, but now "
            f"{run.batch.global_batch} sequences a step",
            "the batch of the first attempt: with optim.weak_scaling=true it follows from the number of ranks",
            f"{loaded.meta['world_size']} ranks, or fresh=true for a new folder",
        )
    if loaded.meta["data_sha256"] != run.tokens.sha256:
        raise ConfigError(
            f"a checkpoint at step {loaded.step} made with other data (sha256 {loaded.meta['data_sha256'][:12]}...)",
            f"the corpus it was made with, now it is {run.tokens.sha256[:12]}...",
            "fresh=true, to start over with this corpus in a new folder",
        )
    run.engine.load(state)
    if run.engine.loss_scale is not None:
        run.engine.loss_scale.load(loaded.meta["loss_scale"])
    if loaded.rank_state is not None:
        set_rng_state(run.world, loaded.rank_state)
    run.step = loaded.step
    load_divergence(run, loaded)
    run.early_stop.load(loaded.meta.get("early_stop", {}))
    run.restore_s = time.perf_counter() - began


def refuse_other_config(run: Run, loaded: LoadedCheckpoint) -> None:
    """Raise ConfigError where a copy that was fetched is of a run with other settings, whose folder was named alike."""
    there, here = loaded.meta["config"], compose.plain_config(run.config)
    changed = [key for key in here if key in there and here[key] != there[key] and not may_change(key, RESUMABLE)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"copies in {run.config.checkpoint.copy_to} of a run with {key}={there[key]}, and now {key}={here[key]}",
            "the same settings, to go on with that run, or copies of each in a place of its own",
            f"{key}={there[key]}, or another checkpoint.copy_to, and fresh=true for a new folder",
        )


def divergence_state(run: Run) -> dict[str, Any]:
    """Return what a checkpoint tells of steps that were skipped and of batches that were passed over, as plain JSON."""
    passed_over = [list(batches) for batches in run.batches.passed_over.ranges]
    return {"divergence": run.guard.state(run.step), "passed_over": passed_over}


def load_divergence(run: Run, loaded: LoadedCheckpoint) -> None:
    """Take over what a checkpoint tells, and the event log of roll-backs to it, which came after it was saved."""
    meta = loaded.meta
    former = {"skipped_steps": meta.get("loss_scale", {}).get("skipped", 0)}
    run.guard.load(former | meta.get("divergence", {}))
    event = run.world.on_first(lambda: last_rollback(run.folder.read_events(), loaded.step))
    run.batches.passed_over = PassedOver.of(meta.get("passed_over", []) if event is None else event["passed_over"])
    if event is not None:
        run.guard.gone_back(event["last"], event["rollbacks"])


def rng_state(world: World) -> dict[str, Any]:
    """State of the random generators of this rank."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def set_rng_state(world: World, state: dict[str, Any]) -> None:
    """Put the random generators of this rank back."""
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)
