"""Train a GPT: one script, from one process to many nodes.

    python -m gpt.train model=quick_test                                  # one process, on its GPU or the CPU
    torchrun --nproc-per-node 8 -m gpt.train model=gpt2_124m parallel=fsdp  # one node
    python -m launch -m nodes=1,2,4                                       # many nodes, through Slurm where there is one

The same command again goes on from the last checkpoint. SIGTERM, SIGUSR2 or Ctrl-C finish the step, save and leave.
Owns the loop. Knows its run folder, but neither Slurm nor who started it.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn import functional as F

from gpt import compose
from gpt.accounting.flops import training_flops_per_token
from gpt.accounting.hardware import peak_flops
from gpt.batch import Batch, cut
from gpt.checkpoint import CheckpointStore
from gpt.config import TrainConfig
from gpt.data.corpus import TokenFile, check_size, describe, prepare
from gpt.data.loader import Samples, train_indices
from gpt.errors import ConfigError
from gpt.failure import record_failure
from gpt.interrupt import StopFlag, die_with_parent
from gpt.metrics.environment import code_state, describe_rank, software
from gpt.metrics.records import StepRecord
from gpt.metrics.views import Views
from gpt.model.gpt import GPT
from gpt.model.init import initialize
from gpt.optim import build_optimizer, clip_gradients, lr_at
from gpt.parallel.engine import Engine, autocast, spread
from gpt.parallel.topology import topology
from gpt.parallel.world import World, open_world
from gpt.run_folder import RunFolder, write_json


@dataclass
class Run:
    """Everything the loop works with. Letters of shapes: B sequences, T tokens of one, V vocabulary."""

    config: TrainConfig
    folder: RunFolder
    world: World
    attempt: int
    batch: Batch
    engine: Engine
    optimizer: torch.optim.Optimizer
    tokens: TokenFile
    samples: Samples
    store: CheckpointStore
    step: int = 0
    """Steps done."""


def build(config: TrainConfig, folder: RunFolder, world: World, attempt: int) -> Run:
    """Prepare the data, make the model, spread it over the ranks, and load the newest checkpoint."""
    layout = topology(config.parallel, world.size)
    batch = cut(config.optim, layout.data_ranks)
    cache = Path(config.data.cache_dir or Path(config.output_dir) / ".cache")
    tokens = world.on_first(lambda: prepare_tokens(config, cache))
    torch.manual_seed(config.seed * 1000 + world.rank)  # dropout differs by rank, and is saved with it
    model = GPT(config.model)
    initialize(model, config.seed)
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
    )
    load(run)
    return run


def prepare_tokens(config: TrainConfig, cache: Path) -> TokenFile:
    """The token file of the corpus, refused where it is too small."""
    check_size(describe(config.data), config.model.block_size, config.eval.sequences)
    return prepare(config.data, cache)


def train(run: Run, stop: StopFlag) -> str:
    """Do the steps that are left. Returns ``finished``, or ``stopped`` where a signal came first."""
    config, world = run.config, run.world
    views = Views(run.folder, world, run.attempt, config, run.step)
    outcome = "finished"
    run.engine.module.train()
    clock = time.perf_counter()
    while run.step < config.optim.max_steps:
        record, must_stop = train_step(run, stop, clock)
        last = run.step == config.optim.max_steps
        if last or due(run.step, config.eval.interval):
            record.val_loss = evaluate(run)
        if last or must_stop or due(run.step, config.checkpoint.interval):
            record.checkpoint_s = save(run)
        views.write(record)
        clock = time.perf_counter()
        if must_stop and not last:
            outcome = "stopped"
            break
    views.close()
    if world.is_first:
        run.folder.record_event(outcome, attempt=run.attempt, step=run.step, signal=stop.signal and stop.signal.name)
    return outcome


def due(step: int, interval: int) -> bool:
    """Whether ``interval`` steps have passed; 0 means never."""
    return interval > 0 and step % interval == 0


def train_step(run: Run, stop: StopFlag, started: float) -> tuple[StepRecord, bool]:
    """One optimizer step over the global batch, and whether any rank was told to stop."""
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
        part = slice(i * batch.micro, (i + 1) * batch.micro)
        with run.engine.backward_pass(last=i == batch.accumulation - 1):
            loss = summed_loss(run, tokens_BT[part], targets_BT[part])
            # The engines average over ranks, so a sum over this rank's tokens is scaled to the mean over all tokens.
            (loss * (batch.ranks / (batch.global_batch * config.model.block_size))).backward()
        loss_sum += loss.detach()
    grad_norm = clip_gradients(run.engine.module, config.optim.grad_clip)
    run.optimizer.step()
    total_loss, stops = world.sum(loss_sum.item(), float(stop.signal is not None))
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
    return record, stops > 0


def summed_loss(run: Run, tokens_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats, summed over the tokens, in fp32."""
    device = run.world.device
    with autocast(run.config, device):
        logits_BTV = run.engine.module(tokens_BT.to(device, non_blocking=True))
    targets = targets_BT.to(device, non_blocking=True).flatten()
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets, reduction="sum")


@torch.no_grad()
def evaluate(run: Run) -> float:
    """Mean cross-entropy over the first validation sequences, the same ones for any number of ranks."""
    world, batch = run.world, run.batch
    wanted = run.config.eval.sequences
    mine = np.arange(world.rank, wanted, world.size)
    rounds = math.ceil(math.ceil(wanted / world.size) / batch.micro)
    run.engine.module.eval()
    loss = torch.zeros((), dtype=torch.float64, device=world.device)
    for i in range(rounds):
        part = mine[i * batch.micro : (i + 1) * batch.micro]
        # Sharded ranks must all take every pass, so one that has run out repeats a sequence and does not count it.
        tokens_BT, targets_BT = run.samples.batch("val", part if len(part) else np.zeros(1, dtype=np.int64))
        if len(part):
            loss += summed_loss(run, tokens_BT, targets_BT)
        else:
            summed_loss(run, tokens_BT, targets_BT)
    run.engine.module.train()
    return world.sum(loss.item())[0] / (wanted * run.config.model.block_size)


def state_of(run: Run) -> dict[str, Any]:
    """Model and optimizer state as torch.distributed.checkpoint takes it, independent of how they are spread."""
    model, optimizer = get_state_dict(run.engine.module, run.optimizer)
    return {"model": model, "optimizer": optimizer}


def save(run: Run) -> float:
    """Write a checkpoint of the step just done. Returns the seconds it held up training."""
    started = time.perf_counter()
    meta = {
        "attempt": run.attempt,
        "samples": run.step * run.batch.global_batch,
        "data_sha256": run.tokens.sha256,
        "topology": topology(run.config.parallel, run.world.size).as_dict(),
        "world_size": run.world.size,
        "config": compose.flatten({k: v for k, v in plain_config(run.config).items()}),
    }
    run.store.save(run.step, state_of(run), rng_state(run.world), meta)
    seconds = time.perf_counter() - started
    if run.world.is_first:
        run.folder.record_event("saved", attempt=run.attempt, step=run.step, seconds=seconds)
    return seconds


def load(run: Run) -> None:
    """Go on from the newest checkpoint that is whole, if there is one."""
    state = state_of(run)
    loaded = run.store.load(state)
    if loaded is None:
        # get_state_dict filled the optimizer by a step with zero gradients, which AdamW would count as its first.
        run.optimizer.state.clear()
        return
    for line in loaded.set_aside:
        if run.world.is_first:
            run.folder.record_event("checkpoint_set_aside", attempt=run.attempt, cause=line)
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
    set_state_dict(
        run.engine.module, run.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    if loaded.rank_state is not None:
        set_rng_state(run.world, loaded.rank_state)
    run.step = loaded.step


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


def plain_config(config: TrainConfig) -> dict[str, Any]:
    """The config as plain values that JSON can hold."""
    return {k: compose.plain(v) if hasattr(v, "name") else v for k, v in compose.flatten(asdict(config)).items()}


def describe_attempt(run: Run) -> None:
    """Write ``environment.json`` of this attempt and the ledger's ``started``."""
    ranks = run.world.gather(describe_rank(run.world))
    if not run.world.is_first:
        return
    layout = topology(run.config.parallel, run.world.size)
    record = {
        "attempt": run.attempt,
        "time": time.time(),
        "world_size": run.world.size,
        "topology": layout.as_dict(),
        "global_batch": run.batch.global_batch,
        "micro_batch": run.batch.micro,
        "accumulation": run.batch.accumulation,
        "weak_scaling": run.config.optim.weak_scaling,
        "block_size": run.config.model.block_size,
        "precision": run.config.precision.name,
        "model": run.config.model.name,
        "parameters": sum(p.numel() for p in run.engine.module.parameters()),
        "max_steps": run.config.optim.max_steps,
        "data_sha256": run.tokens.sha256,
        "ranks": ranks,
        "software": software(),
        "git": code_state(),
    }
    write_json(run.folder.environment(run.attempt), record)
    run.folder.record_event(
        "started", attempt=run.attempt, world_size=run.world.size, topology=str(layout), from_step=run.step
    )
    print(banner(run, ranks), flush=True)


def banner(run: Run, ranks: list[dict[str, Any]]) -> str:
    """What is about to happen, in four lines."""
    model, batch, layout = run.config.model, run.batch, topology(run.config.parallel, run.world.size)
    hosts = sorted({r["host"] for r in ranks})
    flops = training_flops_per_token(model).palm
    peak = peak_flops(ranks[0]["device_name"], run.config.precision)
    return (
        f"{run.folder.path}  attempt {run.attempt}, from step {run.step} of {run.config.optim.max_steps}\n"
        f"model {model.name}: {sum(p.numel() for p in run.engine.module.parameters()):,} parameters, "
        f"{flops / 1e9:.3g} GFLOP a token\n"
        f"{run.world.size} ranks on {', '.join(hosts)} ({ranks[0]['device_name']}), {layout}, {run.config.precision.name}; "
        f"peak {f'{peak / 1e12:g} TFLOP/s' if peak else 'unknown, so MFU is unavailable'}\n"
        f"batch {batch.global_batch} x {model.block_size} tokens = {batch.ranks} ranks x {batch.accumulation} passes x "
        f"{batch.micro} sequences; data {run.tokens.sha256[:12]}, {run.samples.num_train} training sequences"
    )


def open_attempt(folder: RunFolder, world: World) -> int:
    """The number of this attempt: the agent's where there is one, the next free one elsewhere."""
    given = os.environ.get("GPT_ATTEMPT")
    return int(given) if given else world.on_first(folder.create_attempt)


def run_ranks(request: Request, stop: StopFlag) -> str:
    """Train with the other ranks of the environment. A failure is written to the ledger before it is raised."""
    config = request.config
    with open_world(config.device, config.parallel.timeout_s) as world:
        folder = agree_on_folder(request, world)
        attempt = open_attempt(folder, world)
        run: Run | None = None
        try:
            run = build(config, folder, world, attempt)
            describe_attempt(run)
            if run.step >= config.optim.max_steps:
                if world.is_first:
                    print(f"already finished: {folder.path} has all {run.step} steps", flush=True)
                    folder.record_event("finished", attempt=attempt, step=run.step, signal=None)
                return "finished"
            return train(run, stop)
        except BaseException as error:
            record_failure(folder, attempt, world.rank, error, run and run.step)
            raise


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
    parser.add_argument("--run", metavar="FOLDER", help="go on with the run in FOLDER, with the config it was made with")
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
    """Let rank 0 choose the folder of the run and write its config there; all ranks get the same, or the same refusal."""
    def choose() -> RunFolder:
        assert request.composed is not None
        folder = compose.choose_folder(request.config, request.overrides, compose.NOT_IN_POINT)
        compose.refuse_other_run(folder, request.config)
        compose.write_config(folder, request.composed, request.overrides)
        return folder

    return request.folder or world.on_first(choose)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 finished (or, under an agent, stopped), 1 failed, 2 refused, 143 stopped by a signal."""
    agent = os.environ.get("GPT_AGENT_PID")
    if agent or "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(int(agent) if agent else os.getppid())
    stop = StopFlag()
    stop.install()
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
