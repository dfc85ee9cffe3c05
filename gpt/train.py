"""Train a GPT: one script, from one process to many nodes.

    python -m gpt.train model=quick_test                                    # one process, on its GPU or the CPU
    torchrun --nproc-per-node 8 -m gpt.train model=gpt2_124m parallel=fsdp   # one node
    python -m launch -m nodes=1,2,4                                         # many nodes, on Slurm if installed

The same command again resumes from the last checkpoint. SIGTERM, SIGUSR2 or Ctrl-C finish the step, save and exit. The
script uses its run folder only, and is independent of Slurm and of its caller.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from functools import partial

from launch.runs.process import lasting_imports

with lasting_imports():
    import torch

    from gpt.checkpoint import Retention
    from gpt.checkpoint.manager import CheckpointManager
    from gpt.checkpoint.memory import open_memory
    from gpt.checkpoint.target import target_of
    from gpt.checkpoint.upkeep import FINISHED_S, UpkeepPlan
    from gpt.checkpoint.writer import CLOSING_S, Writer, open_writer
    from gpt.config import CheckpointConfig, Strategy, TrainConfig
    from gpt.data.corpus import keep_tokenizer
    from gpt.data.loader import BatchPrefetcher, Samples
    from gpt.data.order import Stream, stream_spec
    from gpt.data.prepared import find_document_end
    from gpt.data.tokenizers import load_tokenizer
    from gpt.model.attention import prefer_fast_kernels
    from gpt.model.gpt import GPT, Weights
    from gpt.parallel.distributed import World, load_deepspeed, open_world, set_timeouts
    from gpt.parallel.engine import Engine, RunLayout
    from gpt.parallel.modules import convert_linears, materialize, prepare_blocks
    from gpt.topology import settle_steps, split_batch
    from gpt.topology.check_dims import check_parallel_dims
    from gpt.training.checkpoints import load
    from gpt.training.execution import (
        fix_hash_seed,
        keep_compiled,
        seed_all,
        set_determinism,
        set_matmul_precision,
        settle_execution,
    )
    from gpt.training.guards import DivergenceGuard, EarlyStop
    from gpt.training.loop import train
    from gpt.training.run import (
        Request,
        Run,
        agree_on_folder,
        describe_attempt,
        first_weights,
        look_for_changes,
        open_attempt,
        parse_arguments,
        parse_request,
        prepare_tokens,
    )
    from gpt.training.step import keep_freed_memory
    from launch import worker
    from launch.errors import ConfigError, refusing
    from launch.runs.environment import raise_open_files, set_defaults, set_dump_file
    from launch.runs.events import record_failure
    from launch.runs.folder import RunFolder, deny_others_writing, say
    from launch.runs.process import Phase, die_with_parent


def build(
    config: TrainConfig,
    folder: RunFolder,
    world: World,
    attempt: int,
    rank: worker.Run,
    writer: Writer | None = None,
) -> Run:
    """Return a run that is ready to train, with data and parallelized model. Its newest checkpoint is loaded.
    Collective.

    Args:
        config: config of the run; precision, TF32 and compilation may still be open.
        folder: folder of the run.
        world: all ranks.
        attempt: number of this attempt.
        rank: connection of this rank to the launcher.
        writer: object that writes checkpoints, in this process or in another one; None means in this process.
    """
    config = settle_execution(config, folder, world)
    compiled = keep_compiled(config, world)
    set_matmul_precision(config)
    if world.device.type == "cpu":
        keep_freed_memory()
    dims = check_parallel_dims(config, world.size)
    batch = split_batch(config.optim, dims.data_ranks)
    config = settle_steps(config, batch)

    tokens = world.on_first(lambda: prepare_tokens(config))
    world.on_first(lambda: keep_tokenizer(tokens, folder))
    seed_all(config.seed, world.rank)
    end = find_document_end(config.data, tokens)
    samples = Samples(tokens, config.model.block_size, config.seed, config.model.vocab_size, end)
    if config.data.stream:
        assert tokens.tokenizer_folder is not None
        spec, tokenizer = stream_spec(config.data, config.data_cache), load_tokenizer(tokens.tokenizer_folder)
        samples.stream = Stream(spec, tokenizer, config.model.block_size, config.seed)

    with torch.device("meta"):
        model = GPT(config.model)
    weights, initialised_from = first_weights(model, config, folder, world)
    engine = parallelize(model, weights, RunLayout(config, world, dims, batch))
    engine.has_answers = tokens.are_conversations
    set_timeouts(config.parallel.timeout_s)  # new groups have the timeout of torch

    run = Run(
        config=config,
        folder=folder,
        world=world,
        attempt=attempt,
        batch=batch,
        dims=dims,
        engine=engine,
        tokens=tokens,
        samples=samples,
        batches=BatchPrefetcher(samples, batch, dims.data_rank(world.rank), config.optim.max_steps, world.device),
        guard=DivergenceGuard(config.divergence),
        checkpoints=open_checkpoints(config.checkpoint, folder, world, engine, writer),
        worker=rank,
        early_stop=EarlyStop(config.optim),
        initialised_from=initialised_from,
        compiled=compiled,
    )
    kept = config.checkpoint
    if kept.scrub or kept.copy_to is not None:
        run.checkpoints.upkeep = UpkeepPlan(folder, attempt, run.checkpoints.keeps, kept.scrub, kept.copy_to)
    run.checkpoints.beat = partial(rank.phase, Phase.starting)
    load(run)
    if config.eval.tasks:
        from gpt.training.harness import Harness  # slow to import

        assert tokens.tokenizer_folder is not None, "tokens without a tokenizer are refused before"
        tokenizer = load_tokenizer(tokens.tokenizer_folder)
        run.evaluate_tasks = Harness(engine.module, config, tokenizer, world).figures
    return run


def parallelize(model: GPT, weights: Weights, layout: RunLayout) -> Engine:
    """Apply float8, recomputation, compilation and parallelism to a model, in this order. Return the engine with this
    rank's part of the model on its device. Collective.

    Args:
        model: the whole model, on the meta device.
        weights: returns the first values of a whole parameter, from its name and shape.
        layout: config, ranks, dimensions and batch of the run.
    """
    config, world, dims = layout.config, layout.world, layout.dims
    strategy = config.parallel.strategy
    model.pads_logits = True
    convert_linears(model, config)
    prepare_blocks(model, config)  # recomputation and compilation of each block, inside the hooks of the next
    if strategy is Strategy.deepspeed:
        load_deepspeed(world)  # before the module that imports it at its top
        from gpt.parallel.zero import ZeroEngine, ZeroPipelineEngine

        materialize([model], weights, torch.device("cpu") if dims.pp > 1 else world.device)
        return (ZeroPipelineEngine if dims.pp > 1 else ZeroEngine)(model, layout)
    if dims.pp > 1 or strategy is Strategy.fsdp or dims.model_ranks * dims.ep > 1:
        from gpt.parallel.nd import NDEngine  # context, pipeline, expert and tensor parallelism, then FSDP or replicas
        from gpt.parallel.pipeline import PipelineEngine

        return (PipelineEngine if dims.pp > 1 else NDEngine)(model, weights, layout)
    from gpt.parallel.ddp import DDPEngine, Zero1Engine

    materialize([model], weights, world.device)
    return (Zero1Engine if strategy is Strategy.zero1 else DDPEngine)(model, layout)


def open_checkpoints(
    kept: CheckpointConfig, folder: RunFolder, world: World, engine: Engine, writer: Writer | None
) -> CheckpointManager:
    """Return the object that saves and loads the checkpoints of a run. It also keeps checkpoints in memory, and copies
    checkpoints to another place, if the config requests this. Collective.

    Args:
        kept: config of the checkpoints.
        folder: folder of the run.
        world: all ranks.
        engine: engine of this rank, which determines the format of the files.
        writer: object that writes checkpoints, in this process or in another one; None means in this process.
    """
    keeps = Retention(kept.keep_last, kept.keep_best)
    give_up_after_s = 60 * kept.give_up_after_min
    manager = CheckpointManager(folder.checkpoints, keeps, world.control, engine.files, writer, give_up_after_s)
    if kept.in_memory:
        manager.memory = open_memory(world.control, writer)
    if kept.copy_to is not None:
        manager.connect = partial(target_of, kept.copy_to, folder.path)
    return manager


def run_ranks(request: Request, rank: worker.Run) -> str:
    """Train together with the other ranks. Return ``finished``, or ``stopped`` if a request to stop ended the run
    before its last step. An error of the training is written into the event log before it is raised.

    ``request`` has the config and the folder that the command line requests. ``rank`` is the connection of this rank to
    the launcher.
    """
    config = request.config
    set_determinism(config)
    with (
        # The outermost context: no rank waits for the end of copies. Forked while there are no devices and few threads.
        open_writer(config.checkpoint.asynchronous, partial(rank.phase, Phase.leaving)) as writer,
        open_world(config.device, config.parallel.timeout_s) as world,
        prefer_fast_kernels(world.device),
    ):
        folder = agree_on_folder(request, world)
        attempt = open_attempt(folder, world, rank)
        if not rank.under_agent:
            set_dump_file(folder.path, folder.attempt(attempt))
        run: Run | None = None
        try:
            world.on_first(lambda: look_for_changes(folder, attempt, config.require_same_code))
            run = build(config, folder, world, attempt, rank, writer)
            if config.checkpoint.copy_to is not None:
                # The loaded checkpoint if it has no copy; the run makes later steps again.
                run.checkpoints.tend(committed=run.step or None, back_to=run.step)
            describe_attempt(run)
            early = run.early_stop.reason()
            if config.checkpoint.copy_to is not None:
                writer.patience_s = FINISHED_S
            if run.step >= run.config.optim.max_steps or early is not None:
                if world.is_first:
                    has = f"has all {run.step} steps" if early is None else f"is over at step {run.step}: {early}"
                    print(f"already finished: {folder.path} {has}", flush=True)
                rank.finished(run.step)
                return "finished"
            outcome = train(run)
            if outcome == "stopped":
                writer.patience_s = CLOSING_S
            return outcome
        except BaseException as error:
            record_failure(folder, attempt, world.rank, error, None if run is None else run.step)
            raise


def leave_for_agent(error: BaseException) -> None:
    """Write an error into the error file of torch elastic. torchrun prints this file. An OSError in this is ignored.

    The file is on this node, so it can be written even if the disk of the run folder is full.

    torch elastic stores the traceback of the exception that is being handled. For a ConfigError this function raises
    and catches an equal error, so that the stored traceback has no frames of Hydra.
    """
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    handler = get_error_handler()
    with contextlib.suppress(OSError):
        if not isinstance(error, ConfigError):
            handler.record_exception(error)
            return
        try:
            raise ConfigError(error.found, error.expected, error.fix) from None
        except ConfigError as refusal:
            handler.record_exception(refusal)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0 if the run is finished, 1 if it failed, 2 if the command was refused,
    143 if a signal stopped the run. Under the launcher's agent, a stopped run also returns 0."""
    words = parse_arguments(sys.argv[1:] if argv is None else argv)  # first, because --help exits here
    deny_others_writing()
    rank = worker.attach()
    if not rank.under_agent and "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    if not rank.under_agent:  # an agent has done this already
        raise_open_files()
        set_defaults()
    rank.phase(Phase.starting)
    faulthandler.register(signal.SIGQUIT)  # SIGQUIT makes a rank that hangs write its stacks into its log
    try:
        request = parse_request(words)
        fix_hash_seed(request.config)
        outcome = run_ranks(request, rank)
        rank.close()
    except ConfigError as error:
        leave_for_agent(error)
        say(str(error))
        return 2
    except BaseException as error:
        # Exit at once: waiting ranks must notice the death of this one, and an aborted communicator cannot be closed.
        leave_for_agent(error)
        say("".join(traceback.format_exception(error)))
        rank.flush()
        os._exit(1)
    return 0 if outcome == "finished" or rank.under_agent else 143


if __name__ == "__main__":
    sys.exit(main())
