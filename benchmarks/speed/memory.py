"""Bytes of training state that each rank holds, measured and planned.

    python -m benchmarks.speed.memory                     # every strategy on 1, 2 and 4 ranks, minutes on two cores
    python -m benchmarks.speed.memory --only fsdp,zero3   # some of them
    python -m benchmarks.speed.memory --picture FILE.png  # and draw the result

Real processes (gloo) take a step. Then the script adds the bytes of the storages under every parameter, gradient and
tensor of the optimizer, each storage once. The figure is that of the rank that holds the most. Prints a Markdown
table; the exit status is 1 if a figure differs from the plan.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.page import chosen, stamp
from gpt.config import TrainConfig, compose_train
from gpt.planning.memory import RankMemory, per_rank
from gpt.topology import split_batch
from gpt.topology.check_dims import check_parallel_dims
from launch.runs.compose import to_schema
from tests.support.distributed import run_distributed
from tests.support.learning import TINY, held_bytes, start, step

SIZE = ("model.n_layer=4", "model.n_embd=512", "model.n_head=8", "model.vocab_size=4096", "optim.max_micro_batch=2")
"""Overrides of the model size. The matrices are so large that DeepSpeed's stage 3 shards them; it does not shard
tensors of less than 100,000 elements. A rank has several micro-batches in a step, between which stage 1 keeps whole
gradients.
"""
STRATEGIES = ("ddp", "zero1", "fsdp", "ds_zero1", "zero2", "zero3")
RANKS = (1, 2, 4)
MIB = 2**20
PARTS = {"parameters": "#2A6F97", "gradients": "#61A5C2", "optimizer": "#C9D6DF"}
Held = dict[str, list[int]]
"""Strategy -> bytes of parameters, of gradients and of optimizer state, each on the rank that holds the most of it."""


def words_of(strategy: str) -> list[str]:
    """Return the overrides of a strategy."""
    return [*SIZE, f"parallel={strategy}"]


def hold(rank: int, size: int, folder: Path, strategies: list[str]) -> dict[str, tuple[int, int, int]]:
    """Return strategy -> bytes of parameters, of gradients and of optimizer state that this rank holds after a step.
    ``size`` is the number of ranks, and ``folder`` the folder for the runs."""
    found = {}
    for strategy in strategies:
        run = start(rank, size, folder / strategy, *words_of(strategy))
        step(run)
        found[strategy] = held_bytes(run)
        del run
    return found


def planned(strategy: str, size: int) -> RankMemory:
    """Return the planned memory of one rank under ``strategy`` on ``size`` ranks."""
    config = to_schema(compose_train([*TINY, *words_of(strategy)]), TrainConfig)
    dims = check_parallel_dims(config, size)
    return per_rank(config, dims, split_batch(config.optim, dims.data_ranks))


def measured(strategies: list[str], size: int, folder: Path) -> Held:
    """Return for each strategy the bytes of parameters, of gradients and of optimizer state, each on the rank that
    holds the most of it."""
    held = run_distributed(hold, size, folder, strategies, timeout_s=1200)
    return {name: [max(rank[name][part] for rank in held) for part in range(3)] for name in strategies}


def rows(most: Held, size: int) -> tuple[list[str], bool]:
    """Return the table rows for ``size`` ranks, and True if the sum of bytes of every strategy differs from the plan by
    less than 1 %. ``most`` has the measured bytes."""
    strategies = list(most)
    lines, good = [], True
    for name in strategies:
        said = planned(name, size)
        expected = [said.parameters, said.gradients, said.optimizer]
        total, saved = sum(most[name]), 1 - sum(most[name]) / sum(most[strategies[0]])
        off = total / sum(expected) - 1
        good = good and abs(off) < 0.01
        figures = " | ".join(f"{part / MIB:.1f}" for part in [*most[name], total, sum(expected)])
        lines.append(f"| {name} | {size} | {figures} | {off:+.2%} | {saved:.1%} |")
    return lines, good


def draw(found: dict[int, Held], file: Path) -> None:
    """Draw a panel for each number of ranks, with a bar for each strategy, into ``file``. A label at each bar shows its
    difference from the bar of the first strategy, in percent."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (size, most) in zip(panels, found.items(), strict=True):
        below = [0.0] * len(most)
        for part, (label, color) in enumerate(PARTS.items()):
            heights = [held[part] / MIB for held in most.values()]
            axes.bar(list(most), heights, bottom=below, color=color, label=label, width=0.7)
            below = [low + height for low, height in zip(below, heights, strict=True)]
        for place, total in enumerate(below[1:], start=1):
            saved = f"{total / below[0] - 1:+.0%}".replace("+0%", "0%")
            axes.text(place, total, saved, ha="center", va="bottom", fontsize=8)
        axes.set_title(f"{size} rank{'s' if size > 1 else ''}", fontsize=10)
        axes.tick_params(axis="x", labelrotation=45, labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("MiB on the rank that holds most")
    handles, labels = panels[-1].get_legend_handles_labels()
    panels[-1].legend(handles[::-1], labels[::-1], frameon=False, fontsize=8, loc="upper right")
    figure.savefig(file, dpi=110)


def main() -> int:
    """Measure and print. Returns the exit status: 1 if a measured value differs from the plan."""
    parser = argparse.ArgumentParser(description="Memory of each strategy, measured and planned.")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="strategies; default: all")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw what was measured")
    words = parser.parse_args()
    strategies = list(dict.fromkeys(["ddp", *chosen(words.only, STRATEGIES)]))
    print(f"{stamp('gloo')} MiB of the rank that holds most.\n")
    print("| strategy | ranks | parameters | gradients | optimizer | together | planned | off by | saved against ddp |")
    print("|---" * 9 + "|")
    good, found = True, {}
    with tempfile.TemporaryDirectory() as place:
        for size in RANKS:
            found[size] = measured(strategies, size, Path(place) / str(size) / "runs")
            lines, right = rows(found[size], size)
            good = good and right
            print("\n".join(lines), flush=True)
    if words.picture:
        draw(found, words.picture)
    return 0 if good else 1


if __name__ == "__main__":
    from benchmarks.speed import memory  # ranks import what they call by the name of its module

    sys.exit(memory.main())
