"""Set-up of a run: what its command line requests, the objects of a run, its environment, and its first weights."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from gpt import checkpoint as folders
from gpt.accounting import count, peak_flops, training_flops_per_token
from gpt.checkpoint.manager import CheckpointManager
from gpt.checkpoint.target import check_target, saved_checkpoints
from gpt.config import (
    LENGTH,
    NOT_IN_POINT,
    RESUMABLE,
    ParallelConfig,
    Precision,
    Strategy,
    TrainConfig,
    compose_train,
    settle_parallel,
)
from gpt.conversion.source import find_source, refuse_other_model
from gpt.conversion.state_dict import State, VerifiedSource, read_source, verify_source
from gpt.data.corpus import check_fit, check_tasks, describe_corpus, describe_tokens, ensure_tokens
from gpt.data.loader import BatchPrefetcher, Samples
from gpt.data.prepared import Tokens
from gpt.metrics import render_summary
from gpt.metrics.writers import describe_rank, software
from gpt.model.gpt import GPT, Weights, initial_weights
from gpt.parallel.distributed import World
from gpt.parallel.engine import Engine
from gpt.planning import Machine, cpus, free_memory, gpus, memory
from gpt.planning.auto import choose_parallelism, choose_precision, choose_tf32, execution_warnings
from gpt.planning.search import table
from gpt.topology import Batch, ParallelDims, refuse_other_rates, settle_steps, split_batch
from gpt.topology.check_dims import check_parallel_dims, ds_config, refuse_without_deepspeed
from gpt.training import execution as reproducibility
from gpt.training.execution import CompileCache, best_precision
from gpt.training.guards import DivergenceGuard, EarlyStop
from launch import worker
from launch.errors import CommandParser, ConfigError
from launch.runs import compose
from launch.runs.compose import choose_folder, refuse_other_run
from launch.runs.environment import changed_since, code_state, describe_code, describe_environment, refuse_change
from launch.runs.events import apply_continuation, plan_continuation, refuse_alive
from launch.runs.folder import RunFolder, write_json
from launch.runs.overrides import unknown_flag, without_key

# The request of a command line: config, run folder, and ``parallel=auto`` for ranks without a plan.
#
# Rank 0 chooses for its device, with gpt/planning.


def machine_of_rank(config: TrainConfig, world: World) -> Machine:
    """Return the hardware of this rank's node, for ``parallel=auto``. All nodes are assumed to be equal.

    Raises:
        ConfigError: the peak FLOPs per second or the memory of the device is unknown.
    """
    if world.device.type != "cuda":
        return cpus(free_memory() // world.local_size, world.local_size)
    seen = torch.cuda.get_device_properties(world.device)
    found = gpus(
        seen.name,
        peak_flops(seen.name, config.precision, choose_tf32(config, on_cpus=False)),
        world.local_size,
        memory=seen.total_memory,
        host_memory=free_memory() // world.local_size,
    )
    if found is None:
        raise ConfigError(
            f"parallel.strategy=auto on a {seen.name} in precision={config.precision.name}, whose peak is not known",
            "a device of gpt/accounting/accelerators.csv, or python -m launch, where cluster.gpu_tflops says it",
            "parallel=fsdp, or python -m launch ... cluster.gpu_tflops=N",
        )
    return found


@dataclass
class Request:
    """Request of a command line of ``gpt.train``: a config, and the run folder if the command line names it."""

    config: TrainConfig
    folder: RunFolder | None
    """Folder given with ``--run``; None if the folder follows from the overrides."""
    composed: DictConfig | None = None
    """Config that Hydra has composed from the command line; None with ``--run``."""
    overrides: Sequence[str] = ()
    """Overrides of the command line; empty with ``--run``."""


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Return the parsed command line of ``gpt.train``: ``--run``, or the overrides. The config is not composed yet.

    Raises:
        ConfigError: an unknown option.
        SystemExit: ``--help`` was printed.
    """
    parser = CommandParser(prog="python -m gpt.train", description="Train a GPT, or go on with a run.")
    parser.add_argument(
        "--run", metavar="FOLDER", help="go on with the run in FOLDER, with the config it was made with"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of configs/train.yaml")
    words, unknown = parser.parse_known_intermixed_args(argv)
    if unknown:
        raise unknown_flag(unknown[0], argv, TrainConfig, ("--run", "--help"), parser.prog)
    return words


def parse_request(words: argparse.Namespace) -> Request:
    """Return what a parsed command line requests. With ``--run``, the config is that of the run folder; otherwise Hydra
    composes it from the overrides.

    Raises:
        ConfigError: the config cannot work.
    """
    if words.run:
        folder = RunFolder(Path(words.run).absolute())
        return Request(compose.read_config(folder, TrainConfig), folder)
    composed = compose_train(words.overrides)
    config = compose.to_schema(composed, TrainConfig)
    config.validate()
    return Request(config, None, composed, words.overrides)


def agree_on_folder(request: Request, world: World) -> RunFolder:
    """Return the run folder, on all ranks. With ``--run`` it is the given folder. Collective.

    Without ``--run``, rank 0 first chooses precision and parallelism, checks the request, creates the folder, and
    writes the config. Every rank then stores the chosen values in ``request.config``.

    Raises:
        ConfigError: rank 0 refuses the request; raised on every rank.
    """

    def choose() -> tuple[Path, ParallelConfig, int, Precision]:
        assert request.composed is not None
        folder = choose_folder(request.config, request.overrides, NOT_IN_POINT, LENGTH)
        refuse_other_run(folder, request.config, TrainConfig, RESUMABLE)
        gpu = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else None
        precision = choose_precision(request.config, folder, gpu is None, gpu)
        if precision is Precision.auto:
            precision = best_precision(world.device)
        config = replace(request.config, precision=precision)
        choice = choose_parallelism(
            config, request.overrides, folder, world.size, lambda: machine_of_rank(config, world)
        )
        if choice.why:
            lines = [*table([choice.as_dict() for choice in choice.best]), *choice.left_out]
            print("\n".join([f"parallel.strategy=auto: {choice.why}", *(f"  {line}" for line in lines)]), flush=True)
        config = choice.apply(config)
        if config.checkpoint.copy_to is not None:
            check_target(config.checkpoint.copy_to, folder.path)
        # Check ranks, batch, corpus and libraries before the folder is made.
        refuse_without_deepspeed(config)
        batch = split_batch(config.optim, check_parallel_dims(config, world.size).data_ranks)
        corpus = describe_corpus(config.data, config.data_cache)
        check_fit(corpus, config.model, config.eval.sequences)
        check_tasks(config.eval.tasks, corpus.tokenizer)
        if config.data.stream:
            prepare_tokens(config)  # refuses too few validation tokens, which only reading the text can count
        # Back to the checkpoint of ``resume_from``, or beyond the run's end, as the launcher does.
        config = settle_steps(config, batch)
        refuse_other_rates(config, batch, folder)
        max_steps = config.optim.max_steps
        goes_on = plan_continuation(folder, config.resume_from, max_steps, saved_checkpoints(folder.checkpoints))
        if goes_on.back_to is not None:
            refuse_alive(folder)
        if text := goes_on.text(max_steps):
            print(f"{folder.path}: {text}", flush=True)
        apply_continuation(folder, goes_on, max_steps, saved_checkpoints(folder.checkpoints))
        request.composed.resume_from = None
        settle_parallel(request.composed, vars(choice.parallel), choice.micro_batch)
        request.composed.precision = config.precision
        compose.write_config(folder, request.composed, without_key(request.overrides, "resume_from"))
        return folder.path, choice.parallel, choice.micro_batch, config.precision

    if request.folder is not None:
        return request.folder
    config = request.config
    path, config.parallel, config.optim.max_micro_batch, config.precision = world.on_first(choose)
    return RunFolder(path)


# A run in the making: all objects that the loop works with.


@dataclass
class Run:
    """A run on this rank: all objects that the training loop uses."""

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
    """The training batches of this rank, which are read in advance."""
    checkpoints: CheckpointManager
    guard: DivergenceGuard
    """Checks each step for divergence."""
    worker: worker.Run
    early_stop: EarlyStop
    """Decides whether the run ends early."""
    evaluate_tasks: Callable[..., dict[str, float]] = lambda share, on_pass: {}
    """Function that evaluates ``eval.tasks``: ``Harness.figures``; without tasks it returns an empty dict."""
    initialised_from: dict[str, Any] | None = None
    """Description of the folder ``init_from``, if this attempt has begun with its weights; None if it has begun with
    random weights or with a checkpoint."""
    compiled: CompileCache | None = None
    """Cache of torch's compiler, if this rank has to copy new files of its node to the shared filesystem; else None."""
    step: int = 0
    """Number of the step that was queued or restored last; 0 before the first step."""
    hosts: tuple[str, ...] = ()
    """Name of each rank's host; empty before ``describe_attempt``."""
    restore_s: float | None = None
    """Seconds that the last load of a checkpoint took. None if no checkpoint was loaded, or if a step record already
    has the seconds."""

    @property
    def tokens_per_step(self) -> int:
        """Number of tokens of the global batch."""
        return self.batch.global_batch * self.config.model.block_size


def prepare_tokens(config: TrainConfig) -> Tokens:
    """Return the tokens of the corpus. Prepare the corpus first if that was not done yet. Raise ConfigError if the
    tokens do not fit the model, or if there are too few of them."""
    check_fit(describe_corpus(config.data, config.data_cache), config.model, config.eval.sequences)
    return ensure_tokens(config.data, config.data_cache, config.eval.sequences * config.model.block_size + 1)


def open_attempt(folder: RunFolder, world: World, launched: worker.Run) -> int:
    """Return the number of this attempt, and open its folder for the launcher's client. Collective.

    Under the launcher, the number is the one that the launcher has given; without the launcher, it is the next free
    number. ``launched`` is the launcher's client on this rank. After this call, the client writes its records into the
    run folder.
    """
    attempt = launched.attempt if launched.folder is not None else world.on_first(folder.create_attempt)
    launched.open_folder(folder.path, attempt)
    return attempt


def look_for_changes(folder: RunFolder, attempt: int, strict: bool) -> None:
    """Print a warning, and record an event, if code or libraries have changed since the last attempt.

    Raises:
        ConfigError: they have changed, and ``strict`` is True.
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
    """Write ``environment.json`` of this attempt and the event ``started``, and print the startup summary, on rank 0.
    Collective."""
    ranks = run.world.gather(describe_rank(run.world))
    run.hosts = tuple(rank["host"] for rank in ranks)
    if not run.world.is_first:
        return
    config, batch, model, device = run.config, run.batch, run.config.model, ranks[0]["device_name"]
    on_gpus = run.world.device.type == "cuda"
    record = {
        "attempt": run.attempt,
        "time": time.time(),
        "from_step": run.step,
        "initialised_from": run.initialised_from,
        "data_sources": run.tokens.as_dict(),
        "world_size": run.world.size,
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
        "memory_planned_gib": memory.per_rank(config, run.dims, batch).total_gib,
        "max_steps": config.optim.max_steps,
        "data": str(describe_tokens(str(config.data.path or config.data.title), run.tokens)),
        "data_sha256": run.tokens.sha256,
        "ranks": ranks,
        "environment": describe_environment(),
        "peak_flops_per_s": peak_flops(device, config.precision, bool(config.tf32)),
        "software": software(),
        "git": code_state(),
        "code": describe_code(),
        "warnings": [*execution_warnings(config, device, best_precision(run.world.device))] if on_gpus else [],
        "reproducibility": {"seed": config.seed, **reproducibility.state()},
    }
    write_json(run.folder.environment(run.attempt), record)
    if config.parallel.strategy is Strategy.deepspeed:
        write_json(run.folder.ds_config(run.attempt), ds_config(config, batch))
    if run.initialised_from is not None:
        run.folder.record_event("initialised", attempt=run.attempt, **run.initialised_from)
    run.folder.record_event(
        "started", attempt=run.attempt, world_size=run.world.size, topology=str(run.dims), from_step=run.step,
        max_steps=config.optim.max_steps,
    )  # fmt: skip
    where = f"attempt {run.attempt}, from step {run.step} of {config.optim.max_steps}"
    print(f"{run.folder.path}\n{render_summary(record, config, f'{config.name}  {where}')}", flush=True)


# The first weights of a run: random, or read from a source (``init_from``).
#
# One rank reads a source through and chooses. Then each rank reads for itself, since all see the same files.


def first_weights(
    model: GPT, config: TrainConfig, folder: RunFolder, world: World
) -> tuple[Weights, dict[str, Any] | None]:
    """Return the first weights of a run: random, or those of ``init_from``. Collective.

    Args:
        model: the whole model, which may be on the meta device.
        config: config of the run.
        folder: folder of the run. If it has a checkpoint, the returned weights are zeros, because the checkpoint will
            replace them.
        world: all ranks.

    Returns:
        The weights; and the description of ``init_from`` for records, None if it was not used.

    Raises:
        ConfigError: some rank cannot use ``init_from``; raised on every rank.
    """
    if world.on_first(lambda: bool(folders.steps(folder.checkpoints))):
        return zeros, None
    if config.init_from is None:
        return initial_weights(config.model, config.seed), None
    init_from = config.init_from

    def look() -> VerifiedSource:
        source = find_source(init_from)
        refuse_other_model(config.model, source)
        return verify_source(source)

    verified = world.on_first(look)
    state: State = {}
    answer: int | ConfigError  # a refusal is gathered: an exception would leave all other ranks waiting
    shared = ("one folder that all nodes share", "init_from=FOLDER on a shared filesystem")
    try:
        state = read_source(verified, model)
        # A checksum that is equal for equal bits: the weights are summed as integers, so the order has no effect.
        answer = sum(int(t.contiguous().view(torch.int32).sum(dtype=torch.int64)) for t in state.values())
    except ConfigError as error:
        answer = error
    except OSError as error:
        answer = ConfigError(f"{verified.source.path} cannot be read on some node ({error})", *shared)
    answers = world.gather(answer)
    for found in answers:
        if isinstance(found, ConfigError):
            raise found
    if len(set(answers)) > 1:
        raise ConfigError(f"init_from={init_from} holds other weights on some rank than on the first", *shared)
    source = verified.source
    chosen = None if verified.checkpoint is None else folders.step_of(verified.checkpoint)
    kind = "run" if source.is_run else "hf" if source.adapter is None else "peft"
    about = {"path": str(source.path), "kind": kind, "step": chosen, "sha256": verified.files}
    drawn = initial_weights(config.model, config.seed)  # for the adapters, if the loaded weights have none
    return lambda name, shape: state[name] if name in state else drawn(name, shape), about


def zeros(name: str, shape: torch.Size) -> Tensor:
    """Return a tensor of zeros with the shape ``shape``, for any parameter ``name``. All its elements share the memory
    of one element."""
    return torch.zeros(()).expand(shape)
