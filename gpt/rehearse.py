"""Rehearse a training step at its true number of ranks, on a machine without a GPU, in minutes.

    python -m gpt.rehearse --ranks 64 model=llama_1p36b optim=gpt2 parallel=fsdp
    python -m launch nodes=8 cluster=slurm cluster.gpus_per_node=8 parallel=fsdp dry_run=deep

One rank of each kind builds its model, engine and optimizer and takes two steps. Each has a process of its own, and
tensors with shapes and no values. The second step is compared with the plan, and the ranks with each other. The exit
status is 0, or 2 if the run would hang, wait for its GPUs, or need more memory than they have.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch

from gpt.accounting import GIB, expand, memory_bytes, peak_flops
from gpt.config import CompileMode, Precision, Strategy, TrainConfig
from gpt.planning import Machine, gpus
from gpt.planning.auto import choose_parallelism, choose_precision
from gpt.planning.cost import estimate
from gpt.rehearsal import RankRehearsal, Rehearsal, kinds_of_ranks, rehearsal_lines
from gpt.rehearsal.rank import rehearse_rank
from gpt.topology import settle_steps, split_batch
from gpt.topology.check_dims import check_parallel_dims
from gpt.training.run import parse_request
from launch.errors import CommandParser, ConfigError, refusing
from launch.runs.folder import RunFolder


def rehearse(config: TrainConfig, ranks: int, processes: int = 1) -> Rehearsal:
    """Rehearse one rank of each kind, ``processes`` of them at a time. ``config`` has no ``auto`` for precision or
    parallelism.

    Raises:
        ConfigError: the config does not fit the ranks, or cannot be rehearsed.
    """
    refuse_unknown_engines(config)
    # Compiled code is not rehearsed: without values nothing can run that code.
    config = replace(config, compile=CompileMode["none"])
    dims = check_parallel_dims(config, ranks)
    batch = split_batch(config.optim, dims.data_ranks)
    config = settle_steps(config, batch)
    work = [(config, dims, batch, rank, kind) for rank, kind in kinds_of_ranks(dims).items()]
    # Forked, since a fresh process would need seconds for its imports. Each process rehearses one rank.
    with multiprocessing.get_context("fork").Pool(processes, maxtasksperchild=1) as pool:
        found: list[RankRehearsal] = pool.starmap(rehearse_rank, work, chunksize=1)
    return Rehearsal(config, dims, batch, found)


def refuse_unknown_engines(config: TrainConfig) -> None:
    """Raise ConfigError for a run whose steps need values of tensors, a GPU or another engine's library."""
    reasons = {
        "parallel.strategy=deepspeed": config.parallel.strategy is Strategy.deepspeed,
        "parallel.cpu_offload=true": config.parallel.cpu_offload,
        f"float8={config.float8.name}": config.float8.name != "none",
        f"optim.optimizer={config.optim.optimizer}": config.optim.optimizer != "adamw",
    }
    for found, applies in reasons.items():
        if applies:
            raise ConfigError(
                f"{found}, which cannot be rehearsed",
                "ddp, zero1, fsdp, tp, pp, cp or ep with AdamW, in fp32, bf16 or fp16",
                "dry_run=true, which plans without a rehearsal",
            )


def parse_words(argv: Sequence[str]) -> argparse.Namespace:
    """Read the command line.

    Raises:
        ConfigError: an unknown option, or no number of ranks.
    """
    parser = CommandParser(prog="python -m gpt.rehearse", description="Rehearse a training step without GPUs.")
    parser.add_argument("--ranks", type=int, required=True, metavar="N", help="ranks of the run, 1 to 4096")
    parser.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="for the time of a step (8)")
    parser.add_argument("--gpu", default="H100", metavar="NAME", help="GPU of the ranks (H100); empty if unknown")
    parser.add_argument("--gpu-gib", type=float, metavar="X", help="memory of the GPU; by default that of its table")
    parser.add_argument("--run", metavar="FOLDER", help="take the config from a run folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="overrides of configs/train.yaml")
    return parser.parse_args(argv)


def settle(words: argparse.Namespace) -> tuple[TrainConfig, Machine | None]:
    """Return the config with precision and parallelism chosen for the GPUs of the command line, and these GPUs; None if
    no GPU is named.

    Raises:
        ConfigError: the config or the GPU is not known.
    """
    config, folder = parse_request(words).config, RunFolder(Path("rehearsal"))
    known = expand(words.gpu) if words.gpu else []
    if not known and (words.gpu or config.parallel.strategy is Strategy.auto):
        raise ConfigError(f"--gpu {words.gpu or None}", "a GPU of gpt/accounting/accelerators.csv", "--gpu H100")
    name = min(known, key=lambda one: memory_bytes(one) or 0, default="")
    precision = choose_precision(config, folder, False, name)
    config = replace(config, precision=Precision.bf16 if precision is Precision.auto else precision)
    machine = gpus(name, peak_flops(name, config.precision), words.ranks_per_node)
    choice = choose_parallelism(config, words.overrides, folder, words.ranks, lambda: cast(Machine, machine))
    return choice.apply(config), machine


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0, or 2 if the command was refused or the rehearsal has found a fault."""
    words = parse_words(sys.argv[1:] if argv is None else argv)
    config, machine = settle(words)
    torch.set_num_threads(1)
    found = rehearse(config, words.ranks, len(os.sched_getaffinity(0)))
    gpu_bytes, step_s = None, None
    if machine is not None:
        gpu_bytes = memory_bytes(machine.device)
        step_s = estimate(found.config, found.dims, found.batch, machine).step_s
    if words.gpu_gib is not None:
        gpu_bytes = int(words.gpu_gib * GIB)
    found = replace(found, gpu_bytes=gpu_bytes, step_s=step_s)
    print("\n".join(rehearsal_lines(found)), flush=True)
    found.refuse_faults()
    return 0


if __name__ == "__main__":
    sys.exit(main())
