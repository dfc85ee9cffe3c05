"""State of a run: first weights, the content of a checkpoint, resume, and roll-back."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gpt.checkpoint import CheckpointError, LoadedCheckpoint, folders
from gpt.checkpoint.folders import VALIDATION_LOSS
from gpt.checkpoint.memory import MemorySaves
from gpt.checkpoint.saving import FailedWrite
from gpt.config import TrainConfig
from gpt.config.train import RESUMABLE
from gpt.conversion.source import find_source, refuse_other_model
from gpt.conversion.state_dict import State, VerifiedSource, read_source, verify_source
from gpt.data.order import PassedOver
from gpt.metrics.writers import MetricWriters
from gpt.model.gpt import GPT, Weights, initial_weights
from gpt.parallel.distributed import World
from gpt.training.divergence import BadSteps, checkpoint_before, is_bad, last_rollback, remedy
from gpt.training.run import Run
from launch.errors import ConfigError, RepeatedFailureError
from launch.runs import compose
from launch.runs.folder import RunFolder, is_newest_attempt
from launch.runs.heartbeat import Phase
from launch.runs.overrides import is_within
from launch.runs.records import StepRecord

# The first weights of a run: drawn, or read from elsewhere (``init_from``).
#
# One rank reads a source through and chooses. Then each rank reads for itself, since all see the same files.


def first_weights(
    model: GPT, config: TrainConfig, folder: RunFolder, world: World
) -> tuple[Weights, dict[str, Any] | None]:
    """Choose the weights that a run begins with; collective.

    Args:
        model: whole, maybe on the meta device.
        config: of the run.
        folder: of the run; if it holds a checkpoint, no weights are drawn or read, since the checkpoint replaces them.
        world: all ranks.

    Returns:
        The weights, and the description of their source for the records; None if they were not read from a source.

    Raises:
        ConfigError: on every rank, if any of them cannot use the source.
    """
    if world.on_first(lambda: bool(folders.steps(folder.checkpoints))):
        return zeros, None
    if config.init_from is None:
        return initial_weights(config.model, config.seed), None
    verified = world.on_first(lambda: look(config))
    outcome = attempt(verified, model)
    answers = world.gather(outcome if isinstance(outcome, ConfigError) else fingerprint(outcome))
    for answer in answers:
        if isinstance(answer, ConfigError):
            raise answer
    if isinstance(outcome, ConfigError) or len(set(map(str, answers))) > 1:
        raise ConfigError(
            f"init_from={config.init_from} holds other weights on some rank than on the first",
            "one folder that all nodes share",
            "init_from=FOLDER on a shared filesystem",
        )
    state = outcome
    return lambda name, shape: state[name], record(verified)


def zeros(name: str, shape: torch.Size) -> Tensor:
    """Return zeros for a tensor that a checkpoint is about to fill, without the memory of all its elements."""
    return torch.zeros(()).expand(shape)


def look(config: TrainConfig) -> VerifiedSource:
    """Find the source, compare its model with the run's, and read the source through."""
    assert config.init_from is not None
    source = find_source(config.init_from)
    refuse_other_model(config.model, source)
    return verify_source(source)


def attempt(verified: VerifiedSource, model: GPT) -> State | ConfigError:
    """Return the weights, or the reason why this rank has none: an exception would leave all other ranks waiting."""
    try:
        return read_source(verified, model)
    except ConfigError as error:
        return error
    except OSError as error:
        return ConfigError(
            f"{verified.source.path} cannot be read on some node ({error})",
            "one folder that all nodes share",
            "init_from=FOLDER on a shared filesystem",
        )


def fingerprint(state: State) -> int:
    """Return a checksum, equal for equal bits: the weights are summed as integers, in any order."""
    return sum(int(tensor.contiguous().view(torch.int32).sum(dtype=torch.int64)) for tensor in state.values())


def record(verified: VerifiedSource) -> dict[str, Any]:
    """Describe where the weights come from, in plain values."""
    source = verified.source
    chosen = None if verified.checkpoint is None else folders.step_of(verified.checkpoint)
    return {"path": str(source.path), "kind": source.kind.name, "step": chosen, "sha256": verified.files}


# The state of a run in a checkpoint, and resuming from it. The files themselves are in ``gpt.checkpoint``.


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
        run: the run; none of its saves is in flight, unless that save is failing.
        val_loss: validation loss of the step, nats per token; None if it was not evaluated.
    """
    run.worker.phase(Phase.saving, run.step)
    # The fence is sent to the writer's process, so it must not hold the run.
    may_commit = partial(is_newest_attempt, run.folder, run.attempt)
    run.store.saves.start(run.step, run.engine.state(), rng_state(run.world), describe(run, val_loss), may_commit)


def begin_save_in_memory(run: Run, memory: MemorySaves) -> None:
    """Take over the state after the step just done, and begin to send it into the memory of the nodes."""
    run.worker.phase(Phase.saving, run.step)
    memory.start(run.step, run.engine.state(), rng_state(run.world), describe(run, None))


def describe(run: Run, val_loss: float | None) -> dict[str, Any]:
    """Return the description of the run for a checkpoint, as plain JSON."""
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
    """Continue from the newest checkpoint that is whole, if there is one."""
    if run.store.is_new():  # the optimizer's state need not be made yet, which would cost a step of torch's optimizer
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
    """Raise ConfigError if a fetched copy is of a run with other settings, whose folder had the same name."""
    there, here = loaded.meta["config"], compose.plain_config(run.config)
    changed = [key for key in here if key in there and here[key] != there[key] and not is_within(key, RESUMABLE)]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"copies in {run.config.checkpoint.copy_to} of a run with {key}={there[key]}, and now {key}={here[key]}",
            "the same settings, to go on with that run, or copies of each in a place of its own",
            f"{key}={there[key]}, or another checkpoint.copy_to, and fresh=true for a new folder",
        )


def divergence_state(run: Run) -> dict[str, Any]:
    """Return the skipped steps and the left-out batches for a checkpoint, as plain JSON."""
    passed_over = [list(batches) for batches in run.batches.passed_over.ranges]
    return {"divergence": run.guard.state(run.step), "passed_over": passed_over}


def load_divergence(run: Run, loaded: LoadedCheckpoint) -> None:
    """Take over that state from a checkpoint, and later roll-backs to this checkpoint from the event log."""
    meta = loaded.meta
    former = {"skipped_steps": meta.get("loss_scale", {}).get("skipped", 0)}
    run.guard.load(former | meta.get("divergence", {}))
    event = run.world.on_first(lambda: last_rollback(run.folder.read_events(), loaded.step))
    run.batches.passed_over = PassedOver.of(meta.get("passed_over", []) if event is None else event["passed_over"])
    if event is not None:
        run.guard.gone_back(event["last"], event["rollbacks"])


def rng_state(world: World) -> dict[str, Any]:
    """Return the state of the random generators of this rank."""
    state = {"cpu": torch.get_rng_state()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(world.device)
    return state


def set_rng_state(world: World, state: dict[str, Any]) -> None:
    """Restore the random generators of this rank."""
    torch.set_rng_state(state["cpu"])
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], world.device)


# Going back: from steps whose numbers went wrong to the last good checkpoint, and on without their batches.
#
# gpt/training/divergence.py decides when a run has to go back.


def judge_step(run: Run, record: StepRecord) -> BadSteps | None:
    """Judge a finished step, and enter it in the event log if it was skipped."""
    bad = run.guard.judge(record)
    if run.world.is_first and is_bad(record):
        what = "loss" if record.loss is None else "gradients"
        where = locate(run, record.step, record.step)
        run.folder.record_event(
            "step_skipped", attempt=run.attempt, step=record.step, cause=f"{what} not finite", **where
        )
    return bad


def go_back(run: Run, writers: MetricWriters, bad: BadSteps) -> None:
    """Load the last good checkpoint before the ``bad`` steps; from there on their batches are left out. Collective.

    Raises:
        RepeatedFailureError: the run has gone back as often as it may, and has saved no newer checkpoint.
        FloatingPointError: there is no checkpoint to go back to.
    """
    run.worker.phase(Phase.starting, run.step)  # loading takes as long as at the start
    target = run.world.on_first(lambda: checkpoint_before(run.store.steps(), bad.first))
    where = locate(run, bad.first, bad.last)
    if target is None or run.guard.rollbacks >= run.config.divergence.max_rollbacks:
        raise failure(run, bad, target, where)
    rollbacks = run.guard.rollbacks + 1
    passed_over = run.batches.passed_over.including(batches_of(run, bad))
    if run.world.is_first:
        # Before the load, which reads these batches from the event log.
        run.folder.record_event(
            "rolled_back", attempt=run.attempt, step=target, first=bad.first, last=bad.last, cause=bad.cause,
            rollbacks=rollbacks, passed_over=passed_over.ranges, **where,
        )  # fmt: skip
        print(
            f"step {bad.last}: {bad.cause}; back to step {target}, and on without {place_text(where)}",
            flush=True,
        )
    run.store.discard_after(target)
    run.copies.discard_after(target)
    load(run)
    writers.go_back(run.step)


def batches_of(run: Run, bad: BadSteps) -> list[int]:
    """List the numbers of the batches of bad steps."""
    return [run.batches.passed_over.batch_of(step) for step in range(bad.first, bad.last + 1)]


def locate(run: Run, first: int, last: int) -> dict[str, list[tuple[int, int]]]:
    """Return the batches of steps ``first`` to ``last``, and their samples, as ranges with their last number."""
    batches = PassedOver().including(batches_of(run, BadSteps(first, last, ""))).ranges
    each = run.batch.global_batch
    return {"batches": list(batches), "samples": [((a - 1) * each, b * each - 1) for a, b in batches]}


def place_text(where: dict[str, list[tuple[int, int]]]) -> str:
    """Name batches and their samples, for people."""
    parts = (
        f"{what} {', '.join(str(a) if a == b else f'{a} to {b}' for a, b in where[what])}"
        for what in ("batches", "samples")
    )
    return "{} ({})".format(*parts)


def failure(
    run: Run, bad: BadSteps, target: int | None, where: dict[str, list[tuple[int, int]]]
) -> RepeatedFailureError | FloatingPointError:
    """Return the failure of a run that cannot go back for ``bad`` steps, with what to change."""
    steps = f"step {bad.first}" if bad.first == bad.last else f"steps {bad.first} to {bad.last}"
    found = f"found: {steps}: {bad.cause}; {place_text(where)}"
    if target is None:
        return FloatingPointError(
            f"{found}; no checkpoint to go back to\nexpected: finite numbers, or a checkpoint before them "
            f"(checkpoint.interval={run.config.checkpoint.interval})\n{remedy(run.config)}"
        )
    limit = run.config.divergence.max_rollbacks
    return RepeatedFailureError(
        f"{found}; gone back {run.guard.rollbacks} times since the last checkpoint (divergence.max_rollbacks={limit}), "
        f"and other batches end alike\nexpected: steps that a checkpoint and other batches mend; another start would "
        f"compute the same\n{remedy(run.config)}"
    )
