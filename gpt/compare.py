"""Compare runs side by side: ``python -m gpt.compare RUN RUN ...``, where RUN is a run folder or a folder of run
folders.

    python -m gpt.compare outputs/quick_test outputs/gpt2_124m/default --output comparison
    python -m gpt.compare --presets model=gpt2_124m model=llama_124m 'model=gpt2_124m model.position=rope'

Prints a table with a column for each run, and writes it as ``compare.csv``. Reads the folders of finished and
unfinished runs. With ``--presets`` no run is read: each argument has the overrides of a model, and the table has its
sizes and FLOPs. ``compare.csv`` is then written only with ``--output``. Needs no torch and no GPU. TensorBoard shows
the curves: ``tensorboard --logdir outputs``.
"""

from __future__ import annotations

import csv
import os
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt.accounting import GIB, count, training_flops_per_token
from gpt.config import TrainConfig, compose_train
from gpt.metrics import describe_run
from gpt.planning.auto import assume_precision
from gpt.planning.memory import per_rank
from gpt.topology import Batch
from gpt.topology.check_dims import check_parallel_dims
from launch.errors import CommandParser, ConfigError, refusing
from launch.runs.compose import flatten, plain, plain_config, to_schema
from launch.runs.find import find_runs, labels_inside, labels_of
from launch.runs.folder import RunFolder

# Metrics of several runs: the loss at equal tokens, speed, and the settings in which they differ.


WINDOW = 0.05
"""The training loss of a run is the mean over the last steps before the compared number of tokens, because single steps
are noisy. These steps have this share of the tokens, 0 to 1."""
SETTINGS = ("data", "optim", "parallel", "precision", "seed", "compile", "recompute", "init_from")
"""Parts of the config whose differences are listed, in addition to the model."""
COLUMNS = {
    "parameters": ("parameters", "{:,}"),
    "non_embedding": ("without embeddings", "{:,}"),
    "active": ("active for a token", "{:,}"),
    "gflop_per_token": ("GFLOP a token", "{:.4f}"),
    "planned_gib": ("GiB to train", "{:.2f}"),
    "steps": ("steps", "{:,}"),
    "tokens": ("tokens", "{:,}"),
    "loss_at_equal_tokens": ("loss*", "{:.4f}"),
    "val_loss_at_equal_tokens": ("val loss*", "{:.4f}"),
    "best_val_loss": ("best val loss", "{:.4f}"),
    "tokens_per_s": ("tokens/s", "{:,.0f}"),
    "mfu_palm": ("MFU", "{:.1%}"),
    "mfu_bf16": ("MFU of bf16 peak", "{:.1%}"),
    "memory_peak_gib": ("peak GiB", "{:.2f}"),
    "ranks": ("ranks", "{}"),
    "device": ("device", "{}"),
    "state": ("state", "{}"),
}
"""Name of a metric in the CSV -> its title and its format in the table."""

Curve = npt.NDArray[np.float64]
"""Points of a curve of losses: number of tokens trained on, and loss in nats per token, ascending, (points, 2)."""


Differences = dict[str, dict[str, list[str]]]
"""Heading of a section of the table (``architecture`` or ``settings``) -> dotted key of the config -> its value in each
run, as text."""


@dataclass
class RunMetrics:
    """Metrics of one run, or of a model that was not run."""

    label: str
    """Name of the run in the table."""
    losses: Curve
    """Training losses, a point for each step."""
    val_losses: Curve
    """Validation losses, a point for each evaluation."""
    data_sha256: str | None
    """Checksum of the tokens of the run's corpus; None if unknown."""
    config: dict[str, Any]
    """Config of the run: dotted key -> value."""
    values: dict[str, Any]
    """Name in ``COLUMNS`` -> value; unknown values are left out."""


def read_metrics(folder: RunFolder, label: str) -> RunMetrics:
    """Return the metrics of the run in a folder. ``label`` is its name in the table.

    Raises:
        ConfigError: the folder has no config.
    """
    run = describe_run(folder)
    if run["config"] is None:
        raise ConfigError(f"no {folder.config}", "the folder of a run", "python -m gpt.train, to make one")
    start, summary = run["startup"] or {}, run["summary"]
    per_step = start.get("global_batch", 0) * start.get("block_size", 0)
    devices = {rank["device_name"] for rank in start.get("ranks", [])}
    values = summary | {
        "parameters": start.get("parameters"),
        "tokens": summary["steps"] * per_step,
        "ranks": start.get("world_size"),
        "device": " and ".join(sorted(devices)) or None,
    }
    return RunMetrics(
        label=label,
        losses=curve([(record["step"] * per_step, record["loss"]) for record in run["steps"] if "loss" in record]),
        val_losses=curve([(e["step"] * per_step, e["val_loss"]) for e in run["evaluations"]]),
        data_sha256=start.get("data_sha256"),
        config=flatten(run["config"]),
        values={name: values[name] for name in COLUMNS if values.get(name) is not None},
    )


NOTE_OF_PRESETS = (
    "GFLOP a token: of training, by the convention of PaLM. GiB to train: planned for one rank and one sequence at a "
    "time, in bf16 unless the precision is typed."
)


def plan_metrics(words: str) -> RunMetrics:
    """Return the metrics of a model that was not run: its sizes, with empty curves. ``words`` are the overrides of the
    model, and also its name in the table.

    Raises:
        ConfigError: an override is wrong, or the parts of the model do not fit each other.
    """
    config = to_schema(compose_train(shlex.split(words)), TrainConfig)
    config.validate()
    counts, dims = count(config.model), check_parallel_dims(config, 1)
    config = assume_precision(config, config.precision)
    values = {
        "parameters": counts.total,
        "non_embedding": counts.non_embedding,
        **({"active": counts.active} if counts.idle else {}),
        "gflop_per_token": training_flops_per_token(config.model).palm / 1e9,
        "planned_gib": per_rank(config, dims, Batch(1, 1, 1, 1, 1)).total / GIB,
    }
    return RunMetrics(words, curve([]), curve([]), None, plain_config(config), values)


def curve(points: Sequence[tuple[int, float]]) -> Curve:
    """Return pairs of a number of tokens and a loss as an array, (points, 2)."""
    return np.array(points, dtype=np.float64).reshape(-1, 2)


def add_equal_losses(runs: Sequence[RunMetrics]) -> str | None:
    """Add to ``values`` of each run its training loss and its validation loss at the same number of tokens: the largest
    number that all runs have reached. Runs without a step do not count. Add nothing if the runs were trained on
    different data.

    Returns:
        A note for the table: the number of tokens, or the reason why losses are not compared. None if fewer than two
        runs have made a step.
    """
    begun = [run for run in runs if run.values["tokens"]]
    # The checksum covers the tokens: losses per token are not comparable between tokenizers.
    if len({run.data_sha256 for run in begun}) > 1:
        return "Losses are not compared: the runs were trained on different data, or tokens of another kind."
    if len(begun) < 2:
        return None
    equal = min(run.values["tokens"] for run in begun)
    for run in begun:
        window = run.losses[(run.losses[:, 0] > (1 - WINDOW) * equal) & (run.losses[:, 0] <= equal), 1]
        loss = window.mean() if len(window) else interpolate(run.losses, equal)
        then = {"loss_at_equal_tokens": loss, "val_loss_at_equal_tokens": interpolate(run.val_losses, equal)}
        run.values |= {name: float(value) for name, value in then.items() if value is not None}
    return (
        f"* at {equal:,} tokens, the most that all runs have seen. The training loss is the mean over the last "
        f"{WINDOW:.0%} of them, the validation loss is interpolated between the evaluations around."
    )


def interpolate(losses: Curve, tokens: int) -> float | None:
    """Return the loss of a curve after ``tokens`` tokens, linearly interpolated, in nats per token. None if
    ``tokens`` is below the first or above the last number of tokens of the curve."""
    if not len(losses) or not losses[0, 0] <= tokens <= losses[-1, 0]:
        return None
    return float(np.interp(tokens, *losses.T))


def find_differences(runs: Sequence[RunMetrics], parts: Sequence[str]) -> dict[str, list[str]]:
    """Return the keys of the config whose values differ between runs: dotted key -> value of each run, as text.

    A run without the key has the text ``-``. A key that some runs lack is returned only if its value differs between
    runs that have it. ``model.name`` is not compared.

    Args:
        runs: the runs.
        parts: first words of the keys that are compared, such as ``optim``.
    """
    keys = dict.fromkeys(key for run in runs for key in run.config if key.split(".")[0] in parts)
    found = {}
    for key in keys:
        values = [plain(run.config[key]) if key in run.config else "-" for run in runs]
        # A run made before the key existed has no value for it.
        if key != "model.name" and len(set(values) - {"-"}) > 1:
            found[key] = values
    return found


# The command: labels, table and CSV.


def label_runs(runs: Sequence[Path]) -> list[str]:
    """Return a name for each run folder: the parent folder of the run, relative to the common parent of all runs, and
    then the label of the run, which is made of its overrides."""
    common = Path(os.path.commonpath([run.parent for run in runs]))
    groups: dict[Path, list[Path]] = {}
    for run in runs:
        groups.setdefault(run.parent, []).append(run)
    labels: dict[Path, str] = {}
    for group, inside in groups.items():
        labels |= labels_of(inside) if len(inside) > 1 else labels_inside([group])
    return [str(run.parent.relative_to(common) / labels[run]) for run in runs]


def print_table(runs: Sequence[RunMetrics], compared: Differences, console: Console) -> None:
    """Print a table with a column for each run: its metrics, and below them the settings that differ between the
    runs."""
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    grid.add_column("", no_wrap=True)
    for run in runs:
        grid.add_column(Text(run.label), justify="right", overflow="fold")
    for name, (title, shape) in COLUMNS.items():
        if any(name in run.values for run in runs):
            grid.add_row(title, *(Text(shape.format(run.values[name]) if name in run.values else "-") for run in runs))
    for heading, differences in compared.items():
        grid.add_section()
        grid.add_row(Text(heading if differences else f"{heading}: the same", style="bold"))
        for key, values in differences.items():
            grid.add_row(f"  {key}", *map(Text, values))
    console.print(grid)
    console.print()


def write_csv(runs: Sequence[RunMetrics], compared: Differences, path: Path) -> None:
    """Write a CSV file with a row for each run: all metrics with all digits, and the settings that differ. An unknown
    value is an empty cell."""
    differing = {key: values for part in compared.values() for key, values in part.items()}
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", *COLUMNS, *differing], lineterminator="\n")
        writer.writeheader()
        for i, run in enumerate(runs):
            writer.writerow({"run": run.label, **run.values, **{key: values[i] for key, values in differing.items()}})


WIDE = 1000


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 if there is nothing to compare."""
    parser = CommandParser(prog="python -m gpt.compare", description="A table of runs, or of presets, side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folders, or folders of such; or overrides")
    parser.add_argument("--presets", action="store_true", help="each RUN is overrides of a model that was not run")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="for compare.csv; default: above all runs")
    args = parser.parse_intermixed_args(argv)
    note: str | None = NOTE_OF_PRESETS
    if args.presets:
        metrics, output = [plan_metrics(words) for words in args.runs], args.output
    else:
        runs = [run.path for run in find_runs([Path(run) for run in args.runs])]
        if len(runs) < 2:
            raise ConfigError(f"one run, {runs[0]}", "two or more", f"python -m gpt.compare {runs[0]} ANOTHER")
        metrics = [read_metrics(RunFolder(run), label) for run, label in zip(runs, label_runs(runs), strict=True)]
        note = add_equal_losses(metrics)
        output = args.output or Path(os.path.commonpath([run.parent for run in runs]))
    compared = {"architecture": find_differences(metrics, ("model",)), "settings": find_differences(metrics, SETTINGS)}
    # A file or a pipe has no width, so lines in it are not folded.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    print_table(metrics, compared, console)
    if note is not None:
        console.print(Text(note), soft_wrap=True)
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        write_csv(metrics, compared, output / "compare.csv")
        console.print(Text(f"wrote {output / 'compare.csv'}"), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
