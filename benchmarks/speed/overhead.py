"""Cost of our loop on several ranks: its steps compared with those of a bare loop on the same model, in turn.

    python -m torch.distributed.run --standalone --nproc-per-node 2 -m benchmarks.speed.overhead
    ... -m benchmarks.speed.overhead --engines ddp,fsdp,zero2 --rounds 30 model=llama_124m model.n_layer=2
    python -m benchmarks.speed.overhead --engines ddp optim.global_batch=16 optim.max_micro_batch=16  # one rank

The bare loop is the one that a user writes by hand: DistributedDataParallel, ``fully_shard`` or
``deepspeed.initialize`` around the model, forward, backward, clipping, AdamW, and the loss, read one step late. With
``--mean-loss`` the loss is that of all ranks, by an all-reduce in each step. Ours is the whole iteration of
``gpt.train``'s loop, with batches, figures of all ranks and records. Both run in the same processes and step in turn,
in another order each round, so that other load of the machine affects both. Figures are of rank 0. A ratio is the time
of our step over that of the bare step in the same round. The table has the median ratio over the rounds, once for wall
time and once for the processor time of the rank.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.loops import FOR_EVER, open_run, our_turn
from benchmarks.page import stamp
from gpt.config import TrainConfig
from gpt.model.gpt import GPT, initialize
from gpt.parallel.distributed import World, open_world
from gpt.training.run import Run, parse_arguments, parse_request

Step = Callable[[], None]
ENGINES = ("ddp", "fsdp", "zero2")
WARM = 3


def bare_loop(config: TrainConfig, run: Run, engine: str, mean_loss: bool) -> Step:
    """Return the training step that a user writes by hand for one engine. Its batches are in memory before the first
    step. With ``mean_loss`` it averages the loss over all ranks.
    """
    model = GPT(config.model).to(run.world.device)
    initialize(model, config.seed)
    per_rank = run.batch.global_batch // run.world.size
    first = run.world.rank * per_rank
    batches = []
    for turn in range(8):
        indices = turn * run.batch.global_batch + first + np.arange(per_rank)
        batches.append([x.to(run.world.device) for x in run.samples.batch("train", indices)])
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": config.optim.weight_decay},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    losses: list[torch.Tensor] = []

    def loss_of(module: torch.nn.Module) -> torch.Tensor:
        tokens_BT, targets_BT = batches[len(losses) % len(batches)]
        loss = F.cross_entropy(module(tokens_BT).flatten(0, 1), targets_BT.flatten())
        losses.append(loss.detach())
        if len(losses) > 1:
            if mean_loss:
                dist.all_reduce(losses[-2])
            losses[-2].item()
        return loss

    if engine == "zero2":
        import deepspeed

        settings = {
            "train_micro_batch_size_per_gpu": per_rank,
            "gradient_clipping": config.optim.grad_clip,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
        }
        optimizer = torch.optim.AdamW(groups, config.optim.lr, fused=True)
        wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)

        def deepspeed_step() -> None:
            wrapped.backward(loss_of(wrapped))
            wrapped.step()

        return deepspeed_step
    module: torch.nn.Module = model
    if engine == "fsdp":
        fully_shard_as_torchtitan(model)
        groups = [{**group, "params": []} for group in groups]
        for p in model.parameters():
            groups[p.dim() < 2]["params"].append(p)  # type: ignore[attr-defined]
    elif run.world.size > 1:  # one rank has no other rank to average with
        module = DistributedDataParallel(model, gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(groups, config.optim.lr, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss_of(module).backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), config.optim.grad_clip)
        optimizer.step()

    return step


def fully_shard_as_torchtitan(model: GPT) -> None:
    """Shard a model in torchtitan's groups: the embedding, each block, and norm with head. If the embedding is also the
    head: each block, and the rest.
    """
    *blocks, last = model.blocks
    if not model.config.tie_embeddings:
        fully_shard([module for module in (model.token_embedding, model.position) if module is not None])
    for block in blocks:
        fully_shard(block)
    fully_shard(last, reshard_after_forward=False)
    if not model.config.tie_embeddings:
        fully_shard([model.norm, model.head], reshard_after_forward=False)
    fully_shard(model)


def measure(step: Step) -> tuple[float, float]:
    """Return wall time and processor time of one step in seconds. The clock starts when all ranks have arrived."""
    dist.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(engine: str, words: list[str], rounds: int, mean_loss: bool, world: World, folder: str) -> str:
    """Run our loop and the bare loop in turns, and return a line of the Markdown table: times, and ours over bare.

    Args:
        engine: name of the engine.
        words: overrides of the run.
        rounds: number of rounds, in each of which both loops make one step.
        mean_loss: True to average the loss of the bare loop over all ranks.
        world: the ranks.
        folder: folder for the run folder.
    """
    run = open_run([*words, f"parallel={engine}", f"run_dir={folder}/{engine}", FOR_EVER], world)
    loops = {"ours": our_turn(run), "bare": bare_loop(run.config, run, engine, mean_loss)}
    for step in [*loops.values()] * WARM:
        step()
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in loops}
    for turn in range(rounds):
        for name in list(loops)[:: 1 if turn % 2 else -1]:
            spent[name].append(measure(loops[name]))
    run.batches.close()
    medians = [statistics.median(one[i] for one in spent[name]) for i in (0, 1) for name in loops]
    pairs = list(zip(spent["ours"], spent["bare"], strict=True))
    ratios = [statistics.median(ours[i] / bare[i] for ours, bare in pairs) for i in (0, 1)]
    figures = [*(f"{1e3 * s:.1f}" for s in medians), *(f"{ratio:.3f}" for ratio in ratios)]
    return f"| {engine} | {world.size} | {' | '.join(figures)} |"


def main() -> None:
    """Compare the loops for each engine, and print the table on rank 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--engines", default=",".join(ENGINES), metavar="NAME,NAME")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--mean-loss", action="store_true", help="the bare loop sums its losses over the ranks")
    parser.add_argument("words", nargs="*", help="overrides of gpt.train, the same for both loops")
    args = parser.parse_args()
    if strangers := set(args.engines.split(",")) - set(ENGINES):
        sys.exit(
            f"found: --engines {args.engines}, with {', '.join(sorted(strangers))}\n"
            f"expected: some of {', '.join(ENGINES)}\ntype next: --engines ddp"
        )
    # All micro-batches in one pass, as the bare loop has it.
    words = ["optim.global_batch=8", "optim.max_micro_batch=8", *args.words]
    config = parse_request(parse_arguments(words)).config
    lines = []
    with open_world(config.device, config.parallel.timeout_s) as world, contextlib.ExitStack() as stack:
        mine = stack.enter_context(tempfile.TemporaryDirectory()) if world.is_first else ""
        folder = world.on_first(lambda: mine)
        for engine in args.engines.split(","):
            lines.append(compare(engine, words, args.rounds, args.mean_loss, world, folder))
        if world.is_first:
            head = "engine | ranks | ours, ms | bare, ms | ours, CPU ms | bare, CPU ms | ratio | ratio of CPU time"
            print(f"| {head} |\n|{'---|' * (head.count('|') + 1)}")
            print("\n".join(lines) + f"\n\n{stamp(f'{world.size} ranks, {torch.get_num_threads()} threads each')}")
        dist.barrier()


if __name__ == "__main__":
    main()
