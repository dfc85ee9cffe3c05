"""Train a GPT: one script, from one process to many nodes.

    python -m gpt.train model=quick_test                                    # one process, on its GPU or the CPU
    torchrun --nproc-per-node 8 -m gpt.train model=gpt2_124m parallel=fsdp   # one node
    python -m launch -m nodes=1,2,4                                         # many nodes, on Slurm where it is

The same command again goes on from the last checkpoint. SIGTERM, SIGUSR2 or Ctrl-C finish the step, save and leave.
Owns the loop. Knows its run folder, but neither Slurm nor who started it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial

from launch.process import lasting_imports

with lasting_imports():
    import torch

    from gpt.checkpoint import CheckpointStore
    from gpt.checkpoint.memory import open_memory
    from gpt.checkpoint.writer import Writer, open_writer
    from gpt.config import TrainConfig
    from gpt.data.corpus import keep_tokenizer
    from gpt.data.loader import Samples
    from gpt.data.prefetch import BatchPrefetcher
    from gpt.metrics.writers import MetricWriters
    from gpt.model.attention import prefer_fast_kernels
    from gpt.model.gpt import GPT
    from gpt.parallel.compile import prepare_blocks
    from gpt.parallel.distributed import World, open_world
    from gpt.parallel.float8 import convert_linears
    from gpt.topology.batch import settle_steps, split_batch
    from gpt.topology.rules import check_parallel_dims
    from gpt.training.breakdown import StepBreakdown
    from gpt.training.determinism import fix_hash_seed, seed_all, set_determinism, set_matmul_precision
    from gpt.training.divergence import BadSteps, DivergenceGuard
    from gpt.training.early_stop import EarlyStop
    from gpt.training.evaluation import mean_loss
    from gpt.training.execution import settle_execution
    from gpt.training.garbage import collect_together
    from gpt.training.gradient_stats import Gradients
    from gpt.training.host_memory import keep_freed_memory
    from gpt.training.init_from import first_weights
    from gpt.training.parallelize import parallelize
    from gpt.training.profiler import StepProfile
    from gpt.training.replica_check import ReplicaGuard
    from gpt.training.request import Request, agree_on_folder, parse_arguments, parse_request
    from gpt.training.rollback import go_back, judge_step
    from gpt.training.run import Run, check_flash, describe_attempt, look_for_changes, open_attempt, prepare_tokens
    from gpt.training.saving import Saving, tell_damage
    from gpt.training.state import load
    from gpt.training.step import QueuedStep, Requests, queue_step
    from gpt.training.stragglers import StragglerWatch
    from gpt.training.timeouts import StepTimeouts
    from launch import worker
    from launch.errors import ConfigError, refusing
    from launch.process import die_with_parent
    from launch.runs.failures import record_failure
    from launch.runs.files import deny_others_writing
    from launch.runs.folder import RunFolder
    from launch.runs.heartbeat import Phase
    from launch.runs.records import StepRecord
    from launch.runs.unwritten import say


def build(
    config: TrainConfig,
    folder: RunFolder,
    world: World,
    attempt: int,
    rank: worker.Run,
    writer: Writer | None = None,
) -> Run:
    """Prepare the data, make the model, spread it over the ranks, and load the newest checkpoint."""
    config = settle_execution(config, folder, world)
    set_matmul_precision(config)
    if world.device.type == "cpu":
        keep_freed_memory()
    dims = check_parallel_dims(config, world.size)
    batch = split_batch(config.optim, dims.data_ranks)
    config = settle_steps(config, batch)
    tokens = world.on_first(lambda: prepare_tokens(config))
    world.on_first(lambda: keep_tokenizer(tokens, folder))
    seed_all(config.seed, world.rank)
    with torch.device("meta"):
        model = GPT(config.model)
    weights, initialised_from = first_weights(model, config, folder, world)
    without_flash = check_flash(config, world)
    if without_flash and world.is_first:
        print(f"attention=flash, but {without_flash}; torch takes another kernel", flush=True)
    convert_linears(model, config)
    prepare_blocks(model, config)
    engine = parallelize(model, weights, config, world, dims, batch)
    kept = config.checkpoint
    samples = Samples(tokens, config.model.block_size, config.seed, config.model.vocab_size)
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
        store=CheckpointStore(
            folder.checkpoints,
            kept.keep_last,
            kept.keep_every,
            world.control,
            engine.files,
            keep_best=kept.keep_best,
            writer=writer,
            give_up_after_s=60 * kept.give_up_after_min,
            memory=open_memory(world.control, engine.files, writer) if kept.in_memory else None,
        ),
        worker=rank,
        early_stop=EarlyStop(config.optim),
        initialised_from=initialised_from,
    )
    if kept.scrub:
        run.store.saves.tell_damage = partial(tell_damage, folder, attempt)
    load(run)
    return run


def train(run: Run) -> str:
    """Do the steps that are left. Returns ``finished``, or ``stopped`` where it was told to leave first."""
    gradients = Gradients(run.config.model, run.world.device)
    writers = MetricWriters(
        run.folder, run.world, run.worker, run.config, run.step, gradients.names, run.tokens_per_step
    )
    profile = StepProfile(run.folder.attempt(run.attempt), run.config, run.world)
    profile.after(run.step)
    run.engine.module.train()
    try:
        with collect_together(run.config.gc_interval) as collect:
            outcome = do_steps(run, gradients, writers, profile, collect)
    finally:
        run.batches.close()
    run.worker.phase(Phase.leaving, run.step)
    profile.close()
    if outcome == "stopped":
        run.worker.stopped(run.step)
    else:
        early = run.early_stop.reason() if run.step < run.config.optim.max_steps else None
        run.worker.finished(run.step, **({} if early is None else {"early": early}))
        if early is not None and run.world.is_first:
            print(f"finished early: {early}", flush=True)
    writers.close()
    return outcome


def do_steps(
    run: Run, gradients: Gradients, writers: MetricWriters, profile: StepProfile, collect: Callable[[int], None]
) -> str:
    """Step, evaluate and save until there is nothing left to do, or somebody asks to stop."""
    config = run.config
    queued: QueuedStep | None = None
    unasked: QueuedStep | None = None
    """The step whose requests were not looked at yet. Apart from ``queued``, which a profile empties on one rank."""
    left = Requests()
    """Requests to steps that the run went back from."""
    phase = Phase.starting  # the first step may compile
    timeouts = StepTimeouts(run.world, config.parallel)
    replicas = ReplicaGuard(run)
    saving = Saving(run)
    stragglers = StragglerWatch(run)
    breakdown = StepBreakdown(config.logging.breakdown_interval, run.world, run.step)
    clock = time.perf_counter()
    while run.step < config.optim.max_steps:
        measured = gradients if due(run.step + 1, config.logging.gradients_interval) else None
        step = queue_step(run, measured, phase, saving.ballot(), stragglers)
        phase = Phase.training
        collect(run.step)  # while the device works
        if queued is not None:  # read only now, so that the device is never idle between two steps
            record, clock = queued.finish(clock)
            timeouts.after(record.step_time_s)
            stragglers.after(record, queued.own_times_of_all())
            bad = judge_step(run, record)
            writers.write(record)
            if bad is not None:
                left = step.requests_of_all() | (Requests() if unasked is None else unasked.requests_of_all())
                saving.settle()
                go_back(run, writers, bad)
                queued, unasked, clock = None, None, time.perf_counter()
                continue
        asked = left | (step.requests if run.worker.agrees else Requests())
        left = Requests()
        if unasked is not None:
            asked |= unasked.requests_of_all()
            saving.hear(unasked.ballot, unasked.ballots_of_all())
        queued = unasked = step
        last = run.step == config.optim.max_steps
        evaluates = last or due(run.step, config.eval.interval)
        compares = due(run.step, config.divergence.replica_check_interval)
        saves = last or bool(asked) or saving.is_due(run.step)
        remembers = saving.is_due_in_memory(run.step)
        pauses = evaluates or compares or saves or remembers
        if not (pauses or profile.due(run.step) or breakdown.due(run.step)):
            continue
        record, clock = step.finish(clock)
        queued = None
        timeouts.after(record.step_time_s)
        breakdown.into(record)
        stragglers.after(record, step.own_times_of_all())
        bad = judge_step(run, record) or (run.guard.judge_end() if last else None)
        if pauses:
            asked |= step.requests_of_all()
            saving.hear(step.ballot, step.ballots_of_all())
            unasked = None
        if evaluates and bad is None:
            bad = evaluate(run, record)
        if bad is not None:  # the weights may have become worthless, and are not saved
            writers.write(record)
            saving.settle()
            go_back(run, writers, bad)
            left, clock = asked, time.perf_counter()
            continue
        if evaluates and run.guard.may_save:
            last = last or run.early_stop.reason() is not None
        saves = run.guard.may_save and (saves or last or bool(asked))
        if saves or compares:
            replicas.check()
        if saves:
            writers.keep(record)
            record.checkpoint_s = saving.save(record.val_loss, is_last=last, is_stop=asked.stop)
        elif remembers and run.guard.may_save:
            record.checkpoint_s = saving.save_in_memory()
        writers.write(record)
        profile.after(run.step)
        if not asked.stop:
            breakdown.before(run.step)
        clock = time.perf_counter()
        if asked.stop and not last:
            saving.settle()
            return "stopped"
        if last:
            break
    return "finished"


def evaluate(run: Run, record: StepRecord) -> BadSteps | None:
    """Put the validation loss into ``record``, in nats per token, and in bits per byte of text where that is known.

    Collective. Returns the steps to go back for where it is not finite.
    """
    sequences, engine, ranks = run.config.eval.sequences, run.engine, run.dims.data_ranks
    loss = mean_loss(
        engine.module,
        engine.loss,
        run.samples,
        run.world,
        sequences,
        run.batch.micro,
        run.dims.data_rank(run.world.rank),
        ranks,
        run.evaluating,
    )
    bad = run.guard.judge_evaluation(record.step, loss)
    if bad is None:
        record.val_loss, record.val_bits_per_byte = loss, run.samples.val_bits_per_byte(loss, sequences)
        run.early_stop.hear(record.step, loss)
    return bad


def due(step: int, interval: int) -> bool:
    """True where ``interval`` steps have passed; an interval of 0 is never due."""
    return interval > 0 and step % interval == 0


def run_ranks(request: Request, rank: worker.Run) -> str:
    """Train with the other ranks of the environment. A failure is written to the event log before it is raised."""
    config = request.config
    set_determinism(config)
    with (
        open_writer(config.checkpoint.asynchronous) as writer,  # forked off while there are no devices, and few threads
        open_world(config.device, config.parallel.timeout_s) as world,
        prefer_fast_kernels(world.device),
    ):
        folder = agree_on_folder(request, world)
        attempt = open_attempt(folder, world, rank)
        run: Run | None = None
        try:
            world.on_first(lambda: look_for_changes(folder, attempt, config.require_same_code))
            run = build(config, folder, world, attempt, rank, writer)
            describe_attempt(run)
            early = run.early_stop.reason()
            if run.step >= run.config.optim.max_steps or early is not None:
                if world.is_first:
                    has = f"has all {run.step} steps" if early is None else f"is over at step {run.step}: {early}"
                    print(f"already finished: {folder.path} {has}", flush=True)
                rank.finished(run.step)
                return "finished"
            return train(run)
        except BaseException as error:
            record_failure(folder, attempt, world.rank, error, None if run is None else run.step)
            raise


def leave_for_agent(error: BaseException) -> None:
    """Leave the failure where torch elastic looks for it, on the node itself: the run folder's disk may be full."""
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    with contextlib.suppress(OSError):
        get_error_handler().record_exception(error)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished (or, under an agent, stopped), 1 failed, 2 refused, 143 stopped by a signal."""
    words = parse_arguments(sys.argv[1:] if argv is None else argv)  # first: --help leaves from here
    deny_others_writing()
    rank = worker.attach()
    if not rank.under_agent and "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    rank.phase(Phase.starting)
    faulthandler.register(signal.SIGQUIT)  # a rank that hangs is asked for its stacks, and writes them into its log
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
        # Ranks that wait for this one must see it go, and a communicator that was given up on cannot be closed.
        leave_for_agent(error)
        say("".join(traceback.format_exception(error)))
        rank.flush()
        os._exit(1)
    return 0 if outcome == "finished" or rank.under_agent else 143


if __name__ == "__main__":
    sys.exit(main())
