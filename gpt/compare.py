"""Compare runs side by side: ``python -m gpt.compare RUN RUN ...``, where RUN is a run folder or a folder of run
folders.

    python -m gpt.compare outputs/quick_test outputs/gpt2_124m/default --output comparison

Prints a table, writes it as ``compare.csv`` and draws ``compare.png``. Reads the folders of finished and unfinished
runs. Needs no torch and no GPU.
"""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gpt.metrics.runs import Comparison, RunMetrics, compare, draw, read_metrics
from launch.errors import CommandParser, ConfigError, refusing
from launch.runs.find import find_runs, labels_inside, labels_of
from launch.runs.folder import RunFolder


@dataclass(frozen=True)
class Column:
    """Metric in the table: column title, name in the CSV, value of a run (None if unknown), and format."""

    title: str
    name: str
    value: Callable[[RunMetrics], float | int | str | None]
    text: str


COLUMNS = (
    Column("parameters", "parameters", lambda run: run.parameters, "{:,}"),
    Column("steps", "steps", lambda run: run.steps, "{:,}"),
    Column("tokens", "tokens", lambda run: run.tokens, "{:,}"),
    Column("loss*", "loss_at_equal_tokens", lambda run: run.loss_then, "{:.4f}"),
    Column("val loss*", "val_loss_at_equal_tokens", lambda run: run.val_loss_then, "{:.4f}"),
    Column("best val loss", "best_val_loss", lambda run: run.best_val_loss, "{:.4f}"),
    Column("tokens/s", "tokens_per_s", lambda run: run.tokens_per_s, "{:,.0f}"),
    Column("MFU", "mfu_palm", lambda run: run.mfu_palm, "{:.1%}"),
    Column("MFU of bf16 peak", "mfu_bf16", lambda run: run.mfu_bf16, "{:.1%}"),
    Column("peak GiB", "memory_peak_gib", lambda run: run.memory_peak_gib, "{:.2f}"),
    Column("ranks", "ranks", lambda run: run.ranks, "{}"),
    Column("device", "device", lambda run: run.device, "{}"),
    Column("state", "state", lambda run: run.state, "{}"),
)


def label_runs(runs: Sequence[Path]) -> list[str]:
    """Return a label for each run: its folder below the common parent, and its typed overrides."""
    common = Path(os.path.commonpath([run.parent for run in runs]))
    groups: dict[Path, list[Path]] = {}
    for run in runs:
        groups.setdefault(run.parent, []).append(run)
    labels: dict[Path, str] = {}
    for group, inside in groups.items():
        labels |= labels_of(inside) if len(inside) > 1 else labels_inside([group])
    return [str(run.parent.relative_to(common) / labels[run]) for run in runs]


def print_table(compared: Comparison, console: Console) -> None:
    """Print a table with a column for each run, and notes on the metrics below it."""
    grid = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    grid.add_column("", no_wrap=True)
    for run in compared.runs:
        grid.add_column(Text(run.label), justify="right", overflow="fold")
    for column in COLUMNS:
        if any(column.value(run) is not None for run in compared.runs):
            metrics = (column.value(run) for run in compared.runs)
            cells = ("-" if metric is None else column.text.format(metric) for metric in metrics)
            grid.add_row(column.title, *map(Text, cells))
    for heading, differences in compared.differences.items():
        grid.add_section()
        grid.add_row(Text(heading if differences else f"{heading}: the same", style="bold"))
        for key, values in differences.items():
            grid.add_row(f"  {key}", *(Text(value) for value in values))
    console.print(grid)
    console.print()
    for note in compared.notes:
        console.print(Text(note), soft_wrap=True)


def write_csv(compared: Comparison, path: Path) -> None:
    """Write all metrics with all digits, and every setting that differs. An unknown value is an empty cell."""
    differing = {key: values for part in compared.differences.values() for key, values in part.items()}
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["run", *(column.name for column in COLUMNS), *differing])
        for i, run in enumerate(compared.runs):
            metrics = ["" if (value := column.value(run)) is None else value for column in COLUMNS]
            writer.writerow([run.label, *metrics, *(values[i] for values in differing.values())])


WIDE = 1000


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return the exit status: 0, or 2 if there is nothing to compare."""
    parser = CommandParser(prog="python -m gpt.compare", description="A table and a plot of runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of such")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="for compare.csv and compare.png; default: above all runs"
    )
    args = parser.parse_intermixed_args(argv)
    runs = [run.path for run in find_runs(args.runs)]
    if len(runs) < 2:
        raise ConfigError(f"one run, {runs[0]}", "two or more", f"python -m gpt.compare {runs[0]} ANOTHER")
    named = zip(runs, label_runs(runs), strict=True)
    compared = compare([read_metrics(RunFolder(path), label) for path, label in named])
    output = args.output or Path(os.path.commonpath([run.parent for run in runs]))
    output.mkdir(parents=True, exist_ok=True)
    # A file or a pipe has no width, so no line is folded there.
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=WIDE)
    print_table(compared, console)
    write_csv(compared, output / "compare.csv")
    (output / "compare.png").write_bytes(draw(compared))
    console.print(Text(f"wrote {output / 'compare.csv'} and {output / 'compare.png'}"), soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
