"""Step time of our training loop compared with nanoGPT, transformers and litgpt, in turn, on one machine.

    python -m benchmarks.speed.peers --nanogpt PATH --litgpt PATH   # every shape, eager and compiled, 1 and 2 threads
    python -m benchmarks.speed.peers --shapes llama --modes eager   # against transformers alone
    python -m benchmarks.speed.peers --layers 2 --width 256 --batch 2 --fused --write  # smaller; keep the table

A contestant is our training loop or the step of another library; each has its own process. The contestants take turns
of ``--steps`` steps, in another order in each of ``--rounds`` rounds; the other contestants sleep meanwhile. Ours is
the whole step of ``gpt.train``: batches, figures and records included. The step of a peer, another library, is forward,
backward, clipping and AdamW on batches that are ready. Tokens, shapes and number of parameters are the same; precision
is fp32 on CPUs and bf16 on GPUs. AdamW is fused where a peer's own training script fuses it (transformers always,
nanoGPT and litgpt on GPUs only), and everywhere with ``--fused``.

The ratio is the peer's time over ours in the same round; the table has its median over the rounds. Above 1, ours is
faster. Where other programs use the machine, the ratio of processor time is more reliable. A library that is not given,
or cannot be imported, is left out, and the page says so. The exit status is 0, or 1 if a contestant failed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks.page import cores, stamp
from benchmarks.speed.peer_models import KINDS, Shape, build_step
from benchmarks.turns import Contestant, Served, opened, ratio, serve, take_turns

OURS = "ours"
SIZES = {
    "layers": ("blocks of the model", 6),
    "width": ("of its hidden states", 384),
    "heads": ("of attention", 6),
    "block": ("tokens of a sequence", 256),
    "vocab": ("size of the vocabulary", 8192),
    "batch": ("sequences of a step", 8),
}
START_S = 900
"""Time limit in seconds for the start of the process of one library. A mixture of experts whose graph breaks at each
expert compiles for minutes."""


@dataclass(frozen=True)
class Setting:
    """One comparison: a shape, eager or compiled mode, and a number of threads."""

    shape: Shape
    mode: str
    threads: int
    fused: bool
    device: str

    def fuses(self, name: str) -> bool:
        """Return True if the library ``name`` uses fused AdamW: all do with ``--fused``, else as in its own training
        script.
        """
        return self.fused or self.device == "cuda" or name == "transformers"


# --- inside a contestant's process ---


def serve_ours(shape: Shape, compiled: bool, device: str, folder: Path) -> Served:
    """Build our run. Its step is one iteration of ``gpt.train``'s loop."""
    from benchmarks.loops import FOR_EVER, open_run, our_turn
    from gpt.config import Device
    from gpt.model.attention import prefer_fast_kernels
    from gpt.parallel.distributed import open_world

    words = [*shape.words(), f"run_dir={folder}/run", FOR_EVER, f"device={device}"]
    words += [f"compile={'default' if compiled else 'none'}", "optim.lr=6e-4", "optim.min_lr=6e-4"]
    stack = contextlib.ExitStack()
    world = stack.enter_context(open_world(Device(device), 600))
    stack.enter_context(prefer_fast_kernels(world.device))
    run = open_run(words, world)
    return Served(our_turn(run), {"parameters": parameters_of(run.engine.module)}, device)


def serve_peer(
    name: str,
    shape: Shape,
    checkout: Path | None,
    compiled: bool,
    fused: bool,
    device: str,
    data: Sequence[str] = (),
) -> Served:
    """Build the training step of another library, with the arguments of ``peer_models.build_step``. Its batches are
    read in advance, from the same ``data`` as ours."""
    from gpt.config import TrainConfig, compose_train
    from gpt.data.corpus import ensure_tokens
    from gpt.data.loader import Samples
    from launch.runs.compose import to_schema

    config = to_schema(compose_train([*shape.words(), *data]), TrainConfig)
    samples = Samples(ensure_tokens(config.data, config.data_cache), shape.block, config.seed)
    places = np.arange(16 * shape.batch).reshape(16, shape.batch)
    batches = [[x.to(device) for x in samples.batch("train", indices)] for indices in places]
    one = build_step(name, shape, checkout, compiled, fused, device)
    turns = iter(range(1 << 60))
    losses: list[torch.Tensor] = []

    def step() -> None:
        tokens_BT, targets_BT = batches[next(turns) % len(batches)]
        losses.append(one(tokens_BT, targets_BT))
        if len(losses) > 1:  # read one step late, as ours is
            losses.pop(0).item()

    return Served(step, {"parameters": parameters_of(one.model)}, device)


def parameters_of(module: torch.nn.Module) -> int:
    """Return the number of elements of all parameters."""
    return sum(p.numel() for p in module.parameters())


def serve_as_told(words: argparse.Namespace) -> None:
    """Build the training step of the library in ``--serve``, and make as many steps as each line of standard input
    says. End this process when the input ends."""
    torch.set_num_threads(words.one_thread_count)
    shape, compiled = Shape(**json.loads(words.shape)), words.mode == "compiled"
    checkout = {"nanoGPT": words.nanogpt, "litgpt": words.litgpt}.get(words.serve)
    with tempfile.TemporaryDirectory() as folder:
        if words.serve == OURS:
            serve(partial(serve_ours, shape, compiled, words.device, Path(folder)))
        else:
            serve(partial(serve_peer, words.serve, shape, checkout, compiled, words.fused, words.device))
    os._exit(0)  # threads and process group of ours are given up


# --- the referee ---


def command(name: str, setting: Setting, words: argparse.Namespace) -> list[str]:
    """Return the command line that starts the process of ``name``, our loop or another library."""
    arguments = ["--serve", name, "--shape", json.dumps(vars(setting.shape)), "--mode", setting.mode]
    arguments += ["--one-thread-count", str(setting.threads), "--device", setting.device]
    arguments += ["--fused"] * setting.fuses(name)
    for option in ("nanogpt", "litgpt"):
        if getattr(words, option) is not None:
            arguments += [f"--{option}", str(getattr(words, option).absolute())]
    return [sys.executable, "-m", "benchmarks.speed.peers", *arguments]


def compare(setting: Setting, names: Sequence[str], words: argparse.Namespace) -> list[Contestant]:
    """Start a process for each of ``names`` (our loop and other libraries), let the processes step in turns, and return
    them with their times. A process that cannot build its training step makes no steps; its ``failure`` has the reason.
    """
    threads = {"OMP_NUM_THREADS": str(setting.threads)}
    with contextlib.ExitStack() as stack:
        everybody = [
            stack.enter_context(opened(name, command(name, setting, words), threads, verbose=words.verbose))
            for name in names
        ]
        for one in everybody:
            one.told = one.answer(START_S)
        sizes = {one.name: one.told["parameters"] for one in everybody if not one.failure}
        if len(set(sizes.values())) > 1:
            sys.exit(f"not the same model: {sizes} parameters")
        take_turns(everybody, words.rounds, lambda _: words.steps, lambda: START_S)
    return everybody


def rows(setting: Setting, found: Sequence[Contestant]) -> list[str]:
    """Return the lines of the table for one comparison."""
    ours = found[0]
    lines = []
    for one in found:
        who = one.name if one.name == OURS else f"{one.name}{', fused AdamW' * setting.fuses(one.name)}"
        cells = [setting.shape.kind, setting.mode, str(setting.threads), who]
        if one.failure or ours.failure or not one.wall:
            lines.append(f"| {' | '.join(cells)} | {one.failure or 'no figures'} | | | | |")
            continue
        times = [statistics.median(one.wall), min(one.wall), statistics.median(one.cpu)]
        pairs = [] if one is ours else [(one.wall, ours.wall), (one.cpu, ours.cpu)]
        cells += [f"{1e3 * seconds:.1f}" for seconds in times]
        cells += [f"{ratio(theirs, mine):.3f}" for theirs, mine in pairs] or ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def contestants(kind: str, words: argparse.Namespace) -> list[str]:
    """Return the names of what is compared in a shape of the kind ``kind``: our loop, and each other library that has
    this shape and is available."""
    given = {"nanoGPT": words.nanogpt, "litgpt": words.litgpt, "transformers": Path()}
    return [OURS, *(name for name, kinds in KINDS.items() if kind in kinds and given[name] is not None)]


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the parsed command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--nanogpt", type=Path, metavar="PATH", help="a checkout of it; else left out")
    parser.add_argument(
        "--litgpt", type=Path, metavar="PATH", help="a checkout of Lightning-AI/litgpt; left out without"
    )
    parser.add_argument("--shapes", default="gpt2,llama,mixture", metavar="NAME,NAME")
    parser.add_argument("--modes", default="eager,compiled", metavar="NAME,NAME")
    parser.add_argument("--threads", default="1,2", metavar="N,N")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--steps", type=int, default=1, help="of a turn")
    parser.add_argument("--fused", action="store_true", help="fused AdamW for every peer")
    for size, (what, _) in SIZES.items():
        parser.add_argument(f"--{size}", type=int, metavar="N", help=what)
    parser.add_argument("--write", action="store_true", help="write benchmarks/speed/peers.md")
    parser.add_argument("--verbose", action="store_true", help="show what contestants print")
    for hidden in ("--serve", "--shape", "--mode"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--one-thread-count", type=int, default=1, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main() -> int:
    """Run all comparisons and print the table. Return the exit status: 1 if our loop or a library failed, else 0."""
    words = parse()
    if words.serve:
        serve_as_told(words)
    load = os.getloadavg()[0]
    head = "shape | mode | threads | contestant | step, ms | best, ms | processor, ms | ratio | of processor time"
    lines = [f"| {head} |", "|---" * (head.count("|") + 1) + "|"]
    print("\n".join(lines), flush=True)
    missing = [f"{name} was not given" for name in ("nanoGPT", "litgpt") if getattr(words, name.lower()) is None]
    sizes = {size: getattr(words, size) or usual for size, (_, usual) in SIZES.items()}
    failed = False
    for kind in words.shapes.split(","):
        for mode in words.modes.split(","):
            for threads in map(int, words.threads.split(",")):
                shape = Shape(kind, **sizes)
                setting = Setting(shape, mode, threads, words.fused, words.device)
                found = compare(setting, contestants(kind, words), words)
                failed = failed or any(one.failure for one in found)
                added = rows(setting, found)
                print("\n".join(added), flush=True)
                lines += added
    notes = [f"load average {load:.1f} to {os.getloadavg()[0]:.1f}", cores()]
    about = f"{', '.join(f'{size} {value}' for size, value in sizes.items())}; {stamp(', '.join(notes))}"
    about = f"{about} {'; '.join(missing)}".strip()
    print(f"\n{about}")
    if words.write:
        write(about, lines)
    return int(failed)


def write(about: str, lines: Sequence[str]) -> None:
    """Write the page ``peers.md`` next to this script. ``lines`` are the lines of its table, and ``about`` is the text
    before the table, on sizes and machine."""
    said = (__doc__ or "").split("\n\n")
    typed = " ".join(["python -m benchmarks.speed.peers", *sys.argv[1:]])
    text = "\n\n".join(["# Our step beside those of others", f"`{typed}`", *said[2:], about, "\n".join(lines)])
    Path(__file__).with_suffix(".md").write_text(text.rstrip() + "\n")


if __name__ == "__main__":
    sys.exit(main())
