"""``python -m launch.project``: estimate a measured sweep at sizes that were not run.

    python -m launch.project outputs/scaling --nodes 8,16,...,4096 --mtbf-hours 20000
    python -m launch.project --fit "7e9 params, 1e12 tokens, 30 days" --gpu h100

The command reads run folders and starts nothing. Every figure is labelled as measured or projected.
"""

from __future__ import annotations

import csv
import io
import json
import math
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from launch.errors import CommandParser, ConfigError, refusing
from launch.plan.preflight import print_table
from launch.project.fit import EXAMPLE, fit
from launch.project.projection import ProjectedRow, Projection, project, read_sweep
from launch.report.notes import percent, rate, seconds
from launch.report.selection import select
from launch.runs.files import deny_others_writing, write_atomically
from launch.runs.find import runs_labelled

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GIB = 2**30
MOST_SIZES = 64
"""Largest number of sizes of one projection. More sizes are probably a typing mistake."""
DROPPED_FIRST = ("memory a rank", "ranks", "interval", "goodput", "stragglers")
"""Columns that a narrow terminal does not show, in this order. The files have all columns."""


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Project a sweep. Returns the exit status: 0, or 2 if the sweep cannot be projected."""
    parser = CommandParser(
        prog="python -m launch.project",
        description="What a measured sweep would be at sizes that were not run: step time, throughput, efficiency, "
        "memory, and with --mtbf-hours goodput. The largest measured point is predicted first, and the error printed.",
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="SWEEP", help="a folder with the runs of a sweep over nodes; with --fit KEY=VALUE")
    add("--nodes", metavar="LIST", help="sizes: 8,16,32, or 8,16,...,4096")
    add("--fit", metavar="GOAL", help='the cheapest set-ups, without a sweep: "7e9 params, 1e12 tokens, 30 days"')
    add("--sweep", type=int, metavar="N", help="an earlier sweep of the folder")
    add("--gpu", metavar="NAME", help="other GPUs than those of the sweep, such as H100")
    links = "measured links: the file of launch.bench_network, or the keys of cluster.interconnect in YAML"
    add("--network", type=Path, metavar="FILE", help=links)
    add("--matmul-rates", type=Path, metavar="FILE", help="rates that the workload has measured")
    add("--mtbf-hours", type=float, metavar="H", help="mean time between failures of one node")
    typed = parser.parse_intermixed_args(arguments)
    words, sizes = typed.words, None if typed.nodes is None else parse_sizes(typed.nodes)
    if typed.fit is not None:
        options = {"--sweep": typed.sweep, "--mtbf-hours": typed.mtbf_hours, "--matmul-rates": typed.matmul_rates}
        wrong = [name for name, value in options.items() if value is not None] or [w for w in words if "=" not in w]
        if wrong:
            expected = "overrides as for python -m launch, KEY=VALUE"
            raise ConfigError(f"--fit with {', '.join(wrong)}", expected, f"python -m launch.project {EXAMPLE}")
        fit(words, typed.fit, typed.gpu, typed.network, sizes)
        return 0
    if len(words) != 1 or sizes is None:
        found = f"{len(words)} folders: {' '.join(words)}" if len(words) > 1 else "no --nodes"
        example = "python -m launch.project SWEEP --nodes 8,...,64"
        raise ConfigError(found if words else "no folder of a sweep", "the folder of one sweep, and sizes", example)
    if typed.mtbf_hours is not None and not 0 < typed.mtbf_hours < math.inf:
        expected = "hours between two failures of a node, above 0"
        raise ConfigError(f"--mtbf-hours {typed.mtbf_hours:g}", expected, "--mtbf-hours 20000")
    deny_others_writing()
    folder = Path(words[0])
    folder = folder if folder.exists() else next(iter(runs_labelled(folder)), folder)
    selection = select(folder, typed.sweep, command="python -m launch.project", options=f"--nodes {typed.nodes}")
    if typed.matmul_rates is not None and typed.gpu is not None:
        strange = f"--matmul-rates {typed.matmul_rates} with --gpu {typed.gpu}"
        expected = "rates of the GPUs of the sweep, for a projection onto these"
        raise ConfigError(strange, expected, "--matmul-rates without --gpu")
    projection = project(read_sweep(selection, typed.network, typed.matmul_rates), sizes, typed.mtbf_hours, typed.gpu)
    show(projection)
    for ending, content in contents(projection).items():
        path = selection.folders[-1] / f"projection.{ending}"
        write_atomically(path, content)
        print(f"wrote {path}")
    return 0


def parse_sizes(text: str) -> list[int]:
    """Return numbers of nodes, ascending, each once, from ``8,16,32`` or with an ellipsis ``8,16,...,4096``.

    An ellipsis continues with the ratio of the two numbers before it if the ratio is whole, else with their difference.
    After a single number it doubles.

    Raises:
        ConfigError: the text is not such a list.
    """
    sizes: list[int] = []
    continues = False
    for word in map(str.strip, text.split(",")):
        if word in ("...", "…") and sizes and not continues:
            continues = True
            continue
        last = int(word) if word.isdecimal() else 0
        if last <= (sizes[-1] if continues else 0):
            continues = True
            break
        before, after = sizes[-2:] if len(sizes) > 1 and sizes[-1] > sizes[-2] else (1, 2)
        ratio, rest = divmod(after, before)
        while continues and len(sizes) <= MOST_SIZES:
            size = sizes[-1] + after - before if rest else sizes[-1] * ratio
            continues = size < last
            sizes.append(min(size, last))
        if not sizes or sizes[-1] != last:
            sizes.append(last)
    if continues or len(sizes) > MOST_SIZES:
        expected = f"at most {MOST_SIZES} numbers of nodes: 8,16,32, or with an ellipsis 8,16,...,4096"
        raise ConfigError(f"--nodes {text}", expected, "--nodes 8,16,...,4096")
    return sorted(set(sizes))


# A projection as text: terminal, Markdown, CSV, JSON.


def columns(found: Projection) -> dict[str, list[str]]:
    """Return title of a column -> cells of all rows. A column without any figure is left out."""

    def cells(name: str, text: Callable[[Any], str]) -> list[str]:
        values = [getattr(row, name) for row in found.rows]
        return ["" if value is None else text(value) for value in values]

    shown = {
        "nodes": cells("nodes", "{:,}".format),
        "ranks": cells("ranks", "{:,}".format),
        "step time": cells("step_s", seconds),
        "interval": [
            "" if row.low_s is None else f"{seconds(row.low_s)} to {seconds(row.high_s)}" for row in found.rows
        ],
        f"{found.unit}/s": cells("throughput", rate),
        "efficiency": cells("efficiency", percent),
        "stragglers": cells("stragglers_s", seconds),
        "memory a rank": cells("memory_bytes", lambda value: f"{value / GIB:.2f} GiB"),
        "goodput": cells("goodput", percent),
        f"GPU-hours / 10^9 {found.unit}": cells("gpu_hours_per_giga", "{:,.3g}".format),
        f"cost / 10^9 {found.unit}": cells("cost_per_giga", "{:,.2f}".format),
        "kind": ["measured" if row.is_measured else "refused" if row.refused else "projected" for row in found.rows],
    }
    return {title: column for title, column in shown.items() if any(column)}


def heading(found: Projection) -> str:
    """Return the line above the table."""
    of = f" of {found.label}" if found.label else ""
    kind = "weak" if found.weak_scaling else "strong"
    return f"Projection of {kind} scaling{of}; projected figures were not measured"


def sentences(found: Projection) -> list[str]:
    """Return the sentences below the table: first the held-out point, the model, and the interval."""
    wide = f"a factor of {math.exp(found.interval):.3g} to either side"
    said = [found.held_out.text, f"model: {found.model}"]
    said.append(f"interval: {wide}, by the error of the held-out point or its spread")
    refused = [row for row in found.rows if row.refused]
    if refused:
        others = f"; likewise nodes={', '.join(str(row.nodes) for row in refused[1:])}" if len(refused) > 1 else ""
        said.append(f"refused: {refused[0].refused}{others}")
    return [*said, *found.notes]


def show(found: Projection) -> None:
    """Print the table and the sentences. A narrow terminal shows fewer columns."""
    print(heading(found))
    styles = ["bold" if row.is_measured else "dim" if row.refused else "" for row in found.rows]
    shown = columns(found)
    rows = list(zip(*shown.values(), strict=True))
    print_table(Console(), list(shown), rows, left=("kind",), optional=DROPPED_FIRST, styles=styles)
    print(*sentences(found), sep="\n")


def contents(found: Projection) -> dict[str, bytes]:
    """Return file extension -> content, for the files of a projection."""
    shown = columns(found)
    cells = [list(shown), ["---"] * len(shown), *map(list, zip(*shown.values(), strict=True))]
    table = "\n".join(f"| {' | '.join(row)} |" for row in cells)
    below = "\n".join(f"- {line}" for line in sentences(found))
    rows = [{name: value for name, value in asdict(row).items() if name != "parts"} for row in found.rows]
    file = io.StringIO()
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    document = asdict(found)
    document["held_out"]["error"] = found.held_out.error
    del document["label"]
    return {
        "md": f"# {heading(found)}\n\n{table}\n\n{below}\n\n![projection](projection.png)\n".encode(),
        "csv": file.getvalue().encode(),
        "json": f"{json.dumps(document, indent=2)}\n".encode(),
        "png": draw(found),
    }


# The picture of a projection: throughput compared with the ideal line, and efficiency.


def draw(found: Projection) -> bytes:
    """Draw efficiency, and throughput (or step time if the work is unknown), over the number of nodes.

    Returns a PNG.
    """
    from matplotlib.figure import Figure  # This import takes a second, which a refusal should not need.

    from launch.report.views.figures import COLORS, GREY

    figure = Figure(figsize=(11.0, 5.4), dpi=150, layout="constrained")
    figure.suptitle(heading(found), fontsize=13, fontweight="bold", x=0.01, ha="left")
    below = "\n".join(line for text in sentences(found)[:3] for line in textwrap.wrap(text, 170))
    figure.supxlabel(below, fontsize=8, color=GREY, x=0.01, ha="left")
    left, right = figure.subplots(1, 2)
    shown = [row for row in found.rows if not row.refused]
    projected = [row for row in shown if not row.is_measured]
    first = next(row for row in shown if row.is_measured)
    if first.throughput is None:
        plot(left, shown, "step_s")
        left.set(title="Step time", ylabel="seconds")
    else:
        ends = [min(row.nodes for row in shown), max(row.nodes for row in shown)]
        ideal = [first.throughput / first.nodes * nodes for nodes in ends]
        left.plot(ends, ideal, linestyle="--", color=GREY, label="ideal")
        wide = math.exp(found.interval)
        middle = [row.throughput or math.nan for row in projected]
        low, high = [value / wide for value in middle], [value * wide for value in middle]
        left.fill_between([row.nodes for row in projected], low, high, color=COLORS[1], alpha=0.15, linewidth=0)
        plot(left, shown, "throughput")
        left.set(title="Throughput", ylabel=f"{found.unit} per second", yscale="log")
    plot(right, shown, "efficiency")
    lost = [row.efficiency * row.goodput for row in projected if row.efficiency and row.goodput]
    if lost:
        right.plot([row.nodes for row in projected], lost, color=COLORS[2], linestyle=":", label="with failures")
    right.set(title="Efficiency", ylabel="of the smallest point's throughput per rank")
    right.set_ylim(0, max(1.05, right.get_ylim()[1]))
    right.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    for axes in (left, right):
        axes.legend(framealpha=0.9, edgecolor="none", fontsize=9)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def plot(axes: Axes, rows: Sequence[ProjectedRow], name: str) -> None:
    """Plot one figure over the number of nodes: measured points filled, projected points hollow with a dashed line."""
    from launch.report.views.figures import COLORS

    for label, color, inside, line in (("projected", COLORS[1], "white", "--"), ("measured", COLORS[0], None, "-")):
        kind = [row for row in rows if row.is_measured is (label == "measured")]
        values = [getattr(row, name) for row in kind]
        axes.plot([row.nodes for row in kind], values, line, marker="o", color=color, mfc=inside, label=label)
    sizes = sorted({row.nodes for row in rows}, reverse=True)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sizes[:: -(-len(sizes) // 9)])  # Labels of more sizes would overlap.
    axes.set_xticks([], minor=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("nodes")
    axes.grid(True, axis="y", color="#E3E3E3", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    sys.exit(main())
