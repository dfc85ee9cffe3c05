"""Time of a step on packed documents, compared with the same step on the same windows unpacked, in turn.

    python -m benchmarks.speed.packing --rounds 12
    python -m benchmarks.speed.packing model.block_size=1024 model.window=256

Both runs are in one process of one rank, and step in another order each round, so that other load of the machine
affects both. Documents are the lines of the default corpus. Prints a line of Markdown: tokens per second by the median
processor time of a step, and the median of the ratios of these times in the same round.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

from benchmarks.loops import FOR_EVER, open_run, our_turn
from benchmarks.page import cores, stamp
from gpt.config import Device
from gpt.parallel.distributed import open_world

WARM = 3
SIDES = {"unpacked": ["data.pack=none"], "packed": ["data.pack=documents", "data.document_end=10"]}
WORDS = ("optim.global_batch=4", "optim.max_micro_batch=4", "device=cpu", FOR_EVER)


def main() -> None:
    """Measure steps on packed and on unpacked windows in turns, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("words", nargs="*", help="overrides of gpt.train, the same for both sides")
    args = parser.parse_args()
    spent: dict[str, list[float]] = {side: [] for side in SIDES}
    with open_world(Device.cpu, timeout_s=600) as world, tempfile.TemporaryDirectory() as folder:
        runs = {
            side: open_run([*WORDS, *words, *args.words, f"run_dir={Path(folder) / side}"], world)
            for side, words in SIDES.items()
        }
        turns = {side: our_turn(run) for side, run in runs.items()}
        for turn in range(-WARM, args.rounds):
            for side in list(turns)[:: 1 if turn % 2 else -1]:
                began = time.process_time()
                turns[side]()
                if turn >= 0:
                    spent[side].append(time.process_time() - began)
        for run in runs.values():
            run.batches.close()
        size = runs["packed"].config.model.block_size
        tokens = runs["packed"].tokens_per_step
    rates = [f"{tokens / statistics.median(times):,.0f}" for times in spent.values()]
    ratio = statistics.median(a / b for a, b in zip(spent["packed"], spent["unpacked"], strict=True))
    print("| tokens of a sequence | unpacked, tokens/s | packed, tokens/s | ratio of times |\n|---|---|---|---|")
    print(f"| {size} | {' | '.join(rates)} | {ratio:.2f} |\n\n{stamp(cores())}")


if __name__ == "__main__":
    main()
