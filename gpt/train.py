"""Train a GPT: one script, from one process to many nodes.

    python -m gpt.train model=quick_test                                    # one process, on its GPU or the CPU
    torchrun --nproc-per-node 8 -m gpt.train model=gpt2_124m parallel=fsdp   # one node
    python -m launch -m nodes=1,2,4                                         # many nodes, on Slurm where it is

The same command again goes on from the last checkpoint. SIGTERM, SIGUSR2 or Ctrl-C finish the step, save and leave.
Owns the loop. Knows its run folder, but neither Slurm nor who started it.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

from launch.process import lasting_imports

with lasting_imports():
    from gpt.checkpoint import CheckpointStore
    from gpt.config import TrainConfig
    from gpt.data.corpus import keep_tokenizer
    from gpt.data.loader import Samples
    from gpt.metrics.writers import MetricWriters
    from gpt.model.gpt import GPT
    from gpt.model.init import initialize
    from gpt.parallel.compile import prepare_blocks
    from gpt.parallel.distributed import World, open_world
    from gpt.topology.batch import split_batch
    from gpt.topology.rules import check_parallel_dims
    from gpt.training.determinism import fix_hash_seed, seed_all, set_determinism
    from gpt.training.evaluation import mean_loss
    from gpt.training.gradient_stats import Gradients
    from gpt.training.init_from import load_initial
    from gpt.training.parallelize import parallelize
    from gpt.training.profiler import StepProfile
    from gpt.training.request import Request, agree_on_folder, parse_request
    from gpt.training.run import Run, check_flash, describe_attempt, look_for_changes, open_attempt, prepare_tokens
    from gpt.training.state import load, save
    from gpt.training.step import QueuedStep, queue_step
    from launch import worker
    from launch.errors import ConfigError
    from launch.process import die_with_parent
    from launch.runs.failures import record_failure
    from launch.runs.folder import RunFolder
    from launch.runs.heartbeat import Phase


def build(config: TrainConfig, folder: RunFolder, world: World, attempt: int, rank: worker.Run) -> Run:
    """Prepare the data, make the model, spread it over the ranks, and load the newest checkpoint."""
    dims = check_parallel_dims(config, world.size)
    batch = split_batch(config.optim, dims.data_ranks)
    tokens = world.on_first(lambda: prepare_tokens(config))
    world.on_first(lambda: keep_tokenizer(tokens, folder))
    seed_all(config.seed, world.rank)
    model = GPT(config.model)
    initialize(model, config.seed)
    initialised_from = load_initial(model, config, folder, world)
    without_flash = check_flash(config, world)
    if without_flash and world.is_first:
        print(f"attention=flash, but {without_flash}; torch takes another kernel", flush=True)
    prepare_blocks(model, config)
    engine = parallelize(model, config, world, dims, batch)
    kept = config.checkpoint
    run = Run(
        config=config,
        folder=folder,
        world=world,
        attempt=attempt,
        batch=batch,
        dims=dims,
        engine=engine,
        tokens=tokens,
        samples=Samples(tokens, config.model.block_size, config.seed, config.model.vocab_size),
        store=CheckpointStore(folder.checkpoints, kept.keep_last, kept.keep_every, world.control, engine.files),
        worker=rank,
        initialised_from=initialised_from,
    )
    load(run)
    return run


def train(run: Run) -> str:
    """Do the steps that are left. Returns ``finished``, or ``stopped`` where it was told to leave first."""
    config, world, rank = run.config, run.world, run.worker
    gradients = Gradients(config.model, world.device)
    writers = MetricWriters(run.folder, world, rank, config, run.step, gradients.names, run.tokens_per_step)
    profile = StepProfile(run.folder.attempt(run.attempt), config, world)
    outcome = "finished"
    queued: QueuedStep | None = None
    profile.after(run.step)
    run.engine.module.train()
    phase = Phase.starting  # the first step may compile
    clock = time.perf_counter()
    while run.step < config.optim.max_steps:
        step = queue_step(run, gradients if due(run.step + 1, config.logging.gradients_interval) else None, phase)
        phase = Phase.training
        stop, save_now = rank.stop_requested(), rank.save_requested()
        if not rank.agrees:  # no agent does it for the ranks
            stop, save_now = world.any(stop, save_now)
        if queued is not None:  # read only now, so that the device is never idle between two steps
            record, clock = queued.finish(clock)
            writers.write(record)
        queued = step
        last = run.step == config.optim.max_steps
        evaluates = last or due(run.step, config.eval.interval)
        saves = last or stop or save_now or due(run.step, config.checkpoint.interval)
        if not (evaluates or saves or profile.due(run.step)):
            continue
        record, clock = step.finish(clock)  # raises where the weights have become worthless, before they are saved
        queued = None
        if evaluates:
            record.val_loss = mean_loss(
                run.engine.module,
                run.engine.loss,
                run.samples,
                world,
                config.eval.sequences,
                run.batch.micro,
                run.dims.data_rank(world.rank),
                run.dims.data_ranks,
                run.evaluating,
            )
            record.val_bits_per_byte = run.samples.val_bits_per_byte(record.val_loss, config.eval.sequences)
        if saves:
            writers.keep(record)
            record.checkpoint_s = save(run)
        writers.write(record)
        profile.after(run.step)
        clock = time.perf_counter()
        if stop and not last:
            outcome = "stopped"
            break
    rank.phase(Phase.leaving, run.step)
    profile.close()
    if outcome == "stopped":
        rank.stopped(run.step)
    else:
        rank.finished(run.step)
    writers.close()
    return outcome


def due(step: int, interval: int) -> bool:
    """True where ``interval`` steps have passed; an interval of 0 is never due."""
    return interval > 0 and step % interval == 0


def run_ranks(request: Request, rank: worker.Run) -> str:
    """Train with the other ranks of the environment. A failure is written to the event log before it is raised."""
    config = request.config
    set_determinism(config)
    with open_world(config.device, config.parallel.timeout_s) as world:
        folder = agree_on_folder(request, world)
        attempt = open_attempt(folder, world, rank)
        run: Run | None = None
        try:
            world.on_first(lambda: look_for_changes(folder, attempt, config.require_same_code))
            run = build(config, folder, world, attempt, rank)
            describe_attempt(run)
            if run.step >= config.optim.max_steps:
                if world.is_first:
                    print(f"already finished: {folder.path} has all {run.step} steps", flush=True)
                rank.finished(run.step)
                return "finished"
            return train(run)
        except BaseException as error:
            record_failure(folder, attempt, world.rank, error, None if run is None else run.step)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished (or, under an agent, stopped), 1 failed, 2 refused, 143 stopped by a signal."""
    rank = worker.attach()
    if not rank.under_agent and "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    rank.phase(Phase.starting)
    faulthandler.register(signal.SIGQUIT)  # a rank that hangs is asked for its stacks, and writes them into its log
    try:
        request = parse_request(sys.argv[1:] if argv is None else argv)
        fix_hash_seed(request.config)
        outcome = run_ranks(request, rank)
        rank.close()
    except ConfigError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except BaseException:
        # Ranks that wait for this one must see it go, and a communicator that was given up on cannot be closed.
        traceback.print_exc()
        rank.flush()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1)
    return 0 if outcome == "finished" or rank.under_agent else 143


if __name__ == "__main__":
    sys.exit(main())
