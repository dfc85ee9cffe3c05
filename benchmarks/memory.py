"""Memory falls as promised: bytes of training state that each rank holds, measured, against what the plan says.

    python benchmarks/memory.py                     # every strategy on 1, 2 and 4 ranks, some minutes on two cores
    python benchmarks/memory.py --only fsdp,zero3   # some of them

Real processes (gloo) take a step; then the bytes of the storages under every parameter, gradient and tensor of the
optimizer are added up, each once. Of the ranks the one that holds most counts. Prints a Markdown table; exit status 1
where a figure is not the plan's.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from benchmarks.page import stamp
from gpt.accounting.memory import Memory, per_rank
from gpt.batch import cut
from gpt.compose import compose_train, to_schema
from gpt.composition import lay_out
from gpt.config import TrainConfig
from tests.distributed import run_distributed
from tests.parallel.holding import held_bytes
from tests.parallel.learning import TINY, start, step

SIZE = ("model.n_layer=4", "model.n_embd=512", "model.n_head=8", "model.vocab_size=4096", "optim.micro_batch=2")
"""Wide enough that DeepSpeed's stage 3 shares the matrices: it leaves those of less than 100,000 elements whole. Each
rank takes its part of the 16 sequences of a step in several passes, between which stage 1 keeps whole gradients."""
STRATEGIES = ("ddp", "zero1", "fsdp", "ds_zero1", "zero2", "zero3")
RANKS = (1, 2, 4)
MIB = 2**20


def words_of(strategy: str) -> list[str]:
    """What is typed for a row."""
    return [*SIZE, f"parallel={strategy}"]


def hold(rank: int, size: int, folder: Path, strategies: list[str]) -> dict[str, tuple[int, int, int]]:
    """Bytes that this rank holds under each strategy."""
    found = {}
    for strategy in strategies:
        run = start(rank, size, folder / strategy, *words_of(strategy))
        step(run)
        found[strategy] = held_bytes(run)
        del run
    return found


def planned(strategy: str, size: int) -> Memory:
    """What the plan says of it."""
    config = to_schema(compose_train([*TINY, *words_of(strategy)]), TrainConfig)
    layout = lay_out(config, size)
    return per_rank(config, layout, cut(config.optim, layout.data_ranks))


def rows(strategies: list[str], size: int, folder: Path) -> tuple[list[str], bool]:
    """The rows of one number of ranks, and whether the plan is right in all of them."""
    held = run_distributed(hold, size, folder, strategies, timeout_s=1200)
    most = {name: [max(rank[name][part] for rank in held) for part in range(3)] for name in strategies}
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


def main() -> int:
    """Exit status: 0, or 1 where a figure is not the plan's."""
    parser = argparse.ArgumentParser(description="Memory of each strategy, measured and planned.")
    parser.add_argument("--only", default=",".join(STRATEGIES), metavar="NAME,NAME", help="strategies; default: all")
    chosen = parser.parse_args().only.split(",")
    strategies = ["ddp", *(name for name in chosen if name != "ddp")]
    print(f"{stamp('gloo')} MiB of the rank that holds most.\n")
    print("| strategy | ranks | parameters | gradients | optimizer | together | planned | off by | saved against ddp |")
    print("|---" * 9 + "|")
    good = True
    with tempfile.TemporaryDirectory() as place:
        for size in RANKS:
            lines, right = rows(strategies, size, Path(place) / str(size) / "runs")
            good = good and right
            print("\n".join(lines), flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
