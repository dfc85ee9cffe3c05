"""Loss, step time and memory of AdamW and Muon.

    python -m benchmarks.speed.optimizers --text FILE --picture docs/muon.png

Trains the small model of experiment=shakespeare_char_cpu on the text for 200 steps by each optimizer, with the best of
a few learning rates, and draws the validation losses. Then two ranks (gloo) step a model of 17 million parameters under
several engines. Prints a Markdown table: median seconds in which a rank clips and updates, and bytes of the optimizer's
state on the rank with the most.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.page import cores, stamp
from benchmarks.speed.memory import MIB, SIZE
from gpt.training.step import queue_step
from launch.runs.folder import RunFolder
from launch.runs.process import Phase
from launch.runs.records import read_records
from tests.support.distributed import run_distributed
from tests.support.learning import held_bytes, start

RATES = {"adamw": ("3e-3", "6e-3", "1.2e-2"), "muon": ("4e-3", "8e-3", "1.6e-2")}
"""Optimizer -> learning rates to try."""
TRAINING = (
    *("+experiment=shakespeare_char_cpu", "optim.max_steps=200", "optim.warmup_steps=20", "optim.min_lr=1e-4"),
    *("eval.interval=20", "checkpoint.interval=0", "compile=none", "logging.tensorboard=false"),
)
ENGINES = ("ddp", "zero1", "fsdp")
STEPS = 8
COLORS = {"adamw": "#61A5C2", "muon": "#C8553D"}
Curve = tuple[list[int], list[float]]
"""Evaluated steps, and their validation losses in nats per character."""


def train(optimizer: str, rate: str, data: list[str], folder: Path) -> Curve:
    """Train one run, and return its validation losses.

    Args:
        optimizer: name of the optimizer.
        rate: learning rate.
        data: overrides for the data.
        folder: folder for the run folders.
    """
    words = [
        *TRAINING,
        *data,
        f"optim.optimizer={optimizer}",
        f"optim.lr={rate}",
        f"run_dir={folder / optimizer / rate}",
    ]
    subprocess.run([sys.executable, "-m", "gpt.train", *words], check=True, stdout=subprocess.DEVNULL)
    records = [r for r in read_records(RunFolder(folder / optimizer / rate).metrics(0)) if r.get("val_loss")]
    return [r["step"] for r in records], [r["val_loss"] for r in records]


def draw(curves: dict[tuple[str, str], Curve], file: Path) -> None:
    """Draw the validation losses. The best learning rate of each optimizer has a strong line, other rates have faint
    lines.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for optimizer, color in COLORS.items():
        mine = {rate: curve for (name, rate), curve in curves.items() if name == optimizer}
        best = min(mine, key=lambda rate: mine[rate][1][-1])
        for rate, (steps, losses) in mine.items():
            label = f"{optimizer}, lr {rate}: {losses[-1]:.3f}" if rate == best else None
            axes.plot(steps, losses, color=color, label=label, linewidth=2, alpha=1 if rate == best else 0.25)
    axes.set_xlabel("step")
    axes.set_ylabel("validation loss, nats a character")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, title="best of the learning rates")
    figure.savefig(file, dpi=110)


def cost(rank: int, size: int, folder: Path) -> dict[str, tuple[float, int]]:
    """Return ``engine | optimizer`` -> the median seconds in which this rank clips and updates, and the bytes of
    optimizer state on this rank."""
    found = {}
    for engine in ENGINES:
        for optimizer in RATES:
            words = [*SIZE, f"parallel={engine}", f"optim.optimizer={optimizer}"]
            run = start(rank, size, folder / engine / optimizer, *words)
            times = [queue_step(run, None, Phase.training).finish(0.0)[0].optimizer_s for _ in range(STEPS)]
            seconds = statistics.median([t for t in times[2:] if t is not None])
            found[f"{engine} | {optimizer}"] = seconds, held_bytes(run)[2]
    return found


def main() -> int:
    """Run all measurements and print the table. Returns 0."""
    parser = argparse.ArgumentParser(description="Loss, step time and memory of AdamW and Muon.")
    parser.add_argument("--text", type=Path, metavar="FILE", help="text to train on; default: only time and memory")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw the validation losses")
    words = parser.parse_args()
    print(f"{stamp(cores())}\n")
    with tempfile.TemporaryDirectory() as place:
        if words.text is not None:
            data = [f"data.path={words.text}", f"data.cache_dir={place}"]
            prepare = [sys.executable, "-m", "gpt.prepare", "data=shakespeare", "data.tokenizer=char", *data]
            subprocess.run(prepare, check=True, stdout=subprocess.DEVNULL)
            curves = {(o, rate): train(o, rate, data, Path(place)) for o, rates in RATES.items() for rate in rates}
            print("| optimizer | learning rate | validation loss |\n|---|---|---|")
            print(*(f"| {o} | {rate} | {curve[1][-1]:.4f} |" for (o, rate), curve in curves.items()), sep="\n")
            if words.picture:
                draw(curves, words.picture)
        found = run_distributed(cost, 2, Path(place) / "runs", timeout_s=500)
    print("\n| engine | optimizer | clip and update | optimizer's state |\n|---|---|---|---|")
    for name, (seconds, _) in found[0].items():
        held = max(of_rank[name][1] for of_rank in found)
        print(f"| {name} | {1000 * seconds:.0f} ms | {held / MIB:.1f} MiB |")
    return 0


if __name__ == "__main__":
    from benchmarks.speed import optimizers  # ranks import what they call by the name of its module

    sys.exit(optimizers.main())
