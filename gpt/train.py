"""Train a GPT: one script, from one process to many nodes.

    python -m gpt.train model=quick_test                                    # one process, on its GPU or the CPU
    torchrun --nproc-per-node 8 -m gpt.train model=gpt2_124m parallel=fsdp   # one node
    python -m launch -m nodes=1,2,4                                         # many nodes, on Slurm where it is

The same command again goes on from the last checkpoint. SIGTERM, SIGUSR2 or Ctrl-C finish the step, save and leave.
Owns the loop. Knows its run folder, but neither Slurm nor who started it.
"""

from __future__ import annotations

import faulthandler
import math
import os
import signal
import sys
import time
import traceback
from collections.abc import Sequence

import torch

from gpt.batch import cut
from gpt.checkpoint import CheckpointStore
from gpt.config import TrainConfig
from gpt.data.loader import Samples, train_indices
from gpt.data.tokenizer import ByteTokenizer, save_tokenizer
from gpt.errors import ConfigError
from gpt.evaluation import mean_loss, summed_loss
from gpt.failure import record_failure
from gpt.initial import load_initial
from gpt.interrupt import StopFlag, die_with_parent
from gpt.metrics.records import StepRecord
from gpt.metrics.views import Views
from gpt.model.gpt import GPT
from gpt.model.init import initialize
from gpt.optim import build_optimizer, clip_gradients, lr_at
from gpt.parallel.engine import spread
from gpt.parallel.topology import topology
from gpt.parallel.world import World, open_world
from gpt.pulse import Phase, Pulse
from gpt.requests import Requests
from gpt.resume import load, save
from gpt.run import Request, Run, agree_on_folder, describe_attempt, open_attempt, parse_request, prepare_tokens
from gpt.run_folder import RunFolder


def build(config: TrainConfig, folder: RunFolder, world: World, attempt: int, pulse: Pulse) -> Run:
    """Prepare the data, make the model, spread it over the ranks, and load the newest checkpoint."""
    layout = topology(config.parallel, world.size)
    batch = cut(config.optim, layout.data_ranks)
    tokens = world.on_first(lambda: prepare_tokens(config))
    world.on_first(lambda: save_tokenizer(ByteTokenizer(), folder.tokenizer))
    torch.manual_seed(config.seed * 1000 + world.rank)  # dropout differs by rank, and is saved with it
    model = GPT(config.model)
    initialize(model, config.seed)
    initialised_from = load_initial(model, config, folder, world)
    engine = spread(model.to(world.device), config, world, batch.micro)
    run = Run(
        config=config,
        folder=folder,
        world=world,
        attempt=attempt,
        batch=batch,
        engine=engine,
        optimizer=build_optimizer(engine.module, config.optim),
        tokens=tokens,
        samples=Samples(tokens, config.model.block_size, config.data.val_fraction, config.seed),
        store=CheckpointStore(
            folder.checkpoints, config.checkpoint.keep_last, config.checkpoint.keep_every, group=world.control
        ),
        pulse=pulse,
        initialised_from=initialised_from,
    )
    load(run)
    return run


def train(run: Run, flag: StopFlag) -> str:
    """Do the steps that are left. Returns ``finished``, or ``stopped`` where it was told to leave first."""
    config, world = run.config, run.world
    requests = Requests(run.folder, world, run.attempt, flag)
    views = Views(run.folder, world, run.attempt, config, run.step)
    outcome = "finished"
    run.engine.module.train()
    phase = Phase.starting  # the first step may compile
    clock = time.perf_counter()
    while run.step < config.optim.max_steps:
        requests.look()
        record, stop, save_now = train_step(run, requests, clock, phase)
        phase = Phase.training
        last = run.step == config.optim.max_steps
        if last or due(run.step, config.eval.interval):
            record.val_loss = mean_loss(
                run.engine.module, config, run.samples, world, config.eval.sequences, run.batch.micro, run.evaluating
            )
        if last or stop or save_now or due(run.step, config.checkpoint.interval):
            run.pulse.at(run.step, Phase.saving)
            record.checkpoint_s = save(run, requests.is_current)
            requests.done(save_now, stop)
        views.write(record)
        clock = time.perf_counter()
        if stop and not last:
            outcome = "stopped"
            break
    run.pulse.at(run.step, Phase.leaving)
    views.close()
    if world.is_first:
        told = {"signal": requests.signal_name, "file": "STOP" if requests.stop_file else None}
        run.folder.record_event(outcome, attempt=run.attempt, step=run.step, **told)
    return outcome


def due(step: int, interval: int) -> bool:
    """Whether ``interval`` steps have passed; 0 means never."""
    return interval > 0 and step % interval == 0


def train_step(run: Run, requests: Requests, started: float, phase: Phase) -> tuple[StepRecord, bool, bool]:
    """One optimizer step over the global batch, and whether any rank was asked to stop, or to save."""
    config, world, batch = run.config, run.world, run.batch
    step = run.step + 1
    lr = lr_at(config.optim, step)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    indices = train_indices(step, world.rank, batch)
    waited = time.perf_counter()
    tokens_BT, targets_BT = run.samples.batch("train", indices)
    waited = time.perf_counter() - waited
    run.optimizer.zero_grad(set_to_none=True)
    loss_sum = torch.zeros((), dtype=torch.float64, device=world.device)
    for i in range(batch.accumulation):
        run.pulse.at(run.step, phase)
        part = slice(i * batch.micro, (i + 1) * batch.micro)
        with run.engine.backward_pass(last=i == batch.accumulation - 1):
            loss = summed_loss(run.engine.module, config, tokens_BT[part], targets_BT[part], world)
            # The engines average over ranks, so a sum over this rank's tokens is scaled to the mean over all tokens.
            (loss * (batch.ranks / (batch.global_batch * config.model.block_size))).backward()
        loss_sum += loss.detach()
    grad_norm = clip_gradients(run.engine.module, config.optim.grad_clip)
    run.optimizer.step()
    total_loss, stops, saves = world.sum(loss_sum.item(), float(requests.stop), float(requests.save))
    run.step = step
    mean = total_loss / (batch.global_batch * config.model.block_size)
    if not math.isfinite(mean):
        raise FloatingPointError(f"the loss of step {step} is {mean}, with gradient norm {grad_norm} and lr {lr}")
    record = StepRecord(
        step=step,
        attempt=run.attempt,
        loss=mean,
        lr=lr,
        grad_norm=grad_norm,
        tokens=tokens_BT.numel(),
        samples=(int(indices[0]), int(indices[-1])),
        step_time_s=time.perf_counter() - started,
        data_wait_s=waited,
    )
    return record, stops > 0, saves > 0


def run_ranks(request: Request, stop: StopFlag) -> str:
    """Train with the other ranks of the environment. A failure is written to the ledger before it is raised."""
    config = request.config
    with open_world(config.device, config.parallel.timeout_s) as world:
        folder = agree_on_folder(request, world)
        attempt = open_attempt(folder, world)
        pulse = Pulse.from_env(world.rank)
        run: Run | None = None
        try:
            run = build(config, folder, world, attempt, pulse)
            describe_attempt(run)
            if run.step >= config.optim.max_steps:
                if world.is_first:
                    print(f"already finished: {folder.path} has all {run.step} steps", flush=True)
                    folder.record_event("finished", attempt=attempt, step=run.step, signal=None)
                return "finished"
            return train(run, stop)
        except BaseException as error:
            record_failure(folder, attempt, world.rank, error, None if run is None else run.step)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished (or, under an agent, stopped), 1 failed, 2 refused, 143 stopped by a signal."""
    agent = os.environ.get("GPT_AGENT_PID")
    if agent or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(int(agent) if agent else os.getppid())
    stop = StopFlag()
    stop.install()
    faulthandler.register(signal.SIGQUIT)  # a rank that hangs is asked for its stacks, and writes them into its log
    try:
        outcome = run_ranks(parse_request(sys.argv[1:] if argv is None else argv), stop)
    except ConfigError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except BaseException:
        # Ranks that wait for this one must see it go, and a communicator that was given up on cannot be closed.
        traceback.print_exc()
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(1)
    return 0 if outcome == "finished" or agent else 143


if __name__ == "__main__":
    sys.exit(main())
