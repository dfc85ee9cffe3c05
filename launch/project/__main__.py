"""``python -m launch.project``: estimate a measured sweep at sizes that were not run, or find set-ups for a goal.

    python -m launch.project outputs/scaling --nodes 8,16,...,4096 --mtbf-hours 20000
    python -m launch.project --fit "7e9 params, 1e12 tokens, 30 days" --gpu h100

The command reads run folders and starts nothing. Every figure is labelled as measured or projected.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from gpt_launch import as_typed
from launch.config import Config
from launch.config.compose import compose_launch, typed_config, workload_of
from launch.errors import CommandParser, ConfigError, check_ranges, counted, refusing
from launch.project.models import HeldOut, SweepPoints, failures_of, hold_out, read_sweep, request_for, straggler_notes
from launch.report.notes import percent, rate, time_text
from launch.report.selection import select
from launch.runs.find import print_table
from launch.runs.folder import RunFolder, deny_others_writing, write_atomically
from launch.runs.measured import read_network
from launch.runs.overrides import typed_key
from launch.workload import SetUp, TrainingGoal

if TYPE_CHECKING:
    from matplotlib.axes import Axes


from dataclasses import field

from launch.report.goodput import Failures

GIB = 2**30
DAYS = {"hour": 1 / 24, "day": 1.0, "week": 7.0, "month": 30.0}
SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kmbt]?)"
WORDS = {"params": r"param(?:eter)?s?", "tokens": r"tokens?|samples?|images?", "days": r"(hour|day|week|month)s?"}
EXAMPLE = '--fit "7e9 params, 1e12 tokens, 30 days" --gpu h100'
NODES = sorted(2**a * 3**b for a in range(13) for b in (0, 1) if 2**a * 3**b <= 4096)
"""Numbers of nodes that ``--fit`` tries by default: powers of two, and three times powers of two."""
CLUSTER = ("cluster=slurm", "cluster.gpus_per_node=8")
"""Default overrides of ``--fit``: Slurm nodes with 8 GPUs each, as in DGX and HGX systems."""
DROPPED_FIRST = ("memory a rank", "ranks", "interval", "goodput", "stragglers")
"""Columns that are left out on a narrow terminal, in the order in which they are left out.

A column is named by the last words of its title. The files have all columns.
"""


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Project a sweep, or find set-ups for a goal. Returns the exit status: 0, or 2 if this is not possible."""
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
    add("--gpu", metavar="NAME", help="GPUs for --fit, such as H100")
    add("--network", type=Path, metavar="FILE", help="measured links: the file of launch.bench_network")
    add("--mtbf-hours", type=float, metavar="H", help="mean time between failures of one node")
    typed = parser.parse_intermixed_args(arguments)
    words, sizes = typed.words, None if typed.nodes is None else parse_node_counts(typed.nodes)
    if typed.network is not None:
        read_network(typed.network, "--network")
    if typed.fit is not None:
        options = {"--sweep": typed.sweep, "--mtbf-hours": typed.mtbf_hours}
        wrong = [name for name, value in options.items() if value is not None] or [w for w in words if "=" not in w]
        if wrong:
            expected = "overrides as for python -m launch, KEY=VALUE"
            raise ConfigError(f"--fit with {', '.join(wrong)}", expected, f"python -m launch.project {EXAMPLE}")
        fit(words, typed.fit, typed.gpu, typed.network, sizes)
        return 0
    if len(words) != 1 or sizes is None or typed.gpu is not None:
        given = [*words, *(f"--{name}" for name in ("nodes", "gpu") if getattr(typed, name) is not None)]
        found, expected = shlex.join(given) or "no arguments", "the folder of one sweep, and sizes; --gpu is for --fit"
        raise ConfigError(found, expected, "python -m launch.project SWEEP --nodes 8,...,64")
    if typed.mtbf_hours is not None and not 0 < typed.mtbf_hours < math.inf:
        expected = "hours between two failures of a node, above 0"
        raise ConfigError(f"--mtbf-hours {typed.mtbf_hours:g}", expected, "--mtbf-hours 20000")
    deny_others_writing()
    selection = select(Path(words[0]), typed.sweep, command=f"python -m launch.project {{}} --nodes {typed.nodes}")
    projection = project(read_sweep(selection, typed.network), sizes, typed.mtbf_hours)
    print(projection_heading(projection))
    styles = ["bold" if row.is_measured else "dim" if row.refused else "" for row in projection.rows]
    titles, rows = projection_table(projection)
    print_table(Console(), titles, rows, left=("kind",), optional=DROPPED_FIRST, styles=styles)
    print(*sentences(projection), sep="\n")
    for ending, content in contents(projection).items():
        path = selection.folders[-1] / f"projection.{ending}"
        write_atomically(path, content)
        print(f"wrote {path}")
    return 0


def parse_node_counts(text: str) -> list[int]:
    """Return the numbers of nodes in a text such as ``8,16,32`` or ``8,16,...,4096``, ascending, each once.

    An ellipsis continues with the ratio of the two numbers before it. After a single number it doubles.

    Raises:
        ConfigError: the text is not such a list.
    """
    head, ellipsis, last = text.partition("...,")
    try:
        sizes = [int(word) for word in head.removesuffix("," if ellipsis else "").split(",")]
        ratio = sizes[-1] // sizes[-2] if len(sizes) > 1 else 2
        if min(sizes) < 1 or (ellipsis and (ratio < 2 or int(last) <= sizes[-1])):
            raise ValueError("a number that is too small")
        while ellipsis and sizes[-1] < int(last):
            sizes.append(min(sizes[-1] * ratio, int(last)))
    except ValueError as error:
        expected = "numbers of nodes: 8,16,32, or with an ellipsis 8,16,...,4096"
        raise ConfigError(f"--nodes {text}", expected, "--nodes 8,16,...,4096") from error
    return sorted(set(sizes))


# From measured to projected points: a row for each size.


@dataclass(frozen=True)
class ProjectedRow:
    """One measured or projected size: a row of ``projection.csv``. Times are in seconds; None means not known."""

    nodes: int
    ranks: int
    is_measured: bool
    step_s: float | None = None
    low_s: float | None = None
    """Lower end of the interval of ``step_s``; the first quartile for a measured size."""
    high_s: float | None = None
    """Upper end of the interval of ``step_s``; the third quartile for a measured size."""
    throughput: float | None = None
    """Work per second in the unit of the sweep; None if unknown."""
    efficiency: float | None = None
    """Throughput per rank divided by the throughput per rank of the smallest measured point; None if unknown."""
    memory_bytes: int | None = None
    """Planned memory of one rank in bytes; None if unknown."""
    goodput: float | None = None
    """Expected share (0 to 1) of the time in steps that are not lost to failures; None without ``--mtbf-hours``."""
    gpu_hours_per_giga: float | None = None
    """GPU-hours for 10^9 units of work. With ``--mtbf-hours``, they include the time that failures cost."""
    cost_per_giga: float | None = None
    """Cost of ``gpu_hours_per_giga`` in the currency of ``cluster.price_per_gpu_hour``."""
    stragglers_s: float | None = None
    """Seconds by which the slowest rank exceeds the mean rank in a step, measured or expected; None if unknown."""
    parts: dict[str, float] = field(default_factory=dict)
    """Cause -> seconds of a step, by the model; empty for a measured size."""
    refused: str = ""
    """Reason why a run of this size cannot work; empty if it can work."""


@dataclass(frozen=True)
class Projection:
    """All measured and projected sizes of one sweep: the content of ``projection.json``."""

    rows: tuple[ProjectedRow, ...]
    held_out: HeldOut
    interval: float
    """Half width of the interval of each projected step time, as a natural logarithm.

    The interval is from ``step_s`` / e^``interval`` to ``step_s`` * e^``interval``. The half width is the larger of two
    figures: the error of the held-out point, and half the distance of its quartiles as a share of its step time.
    """
    model: str
    unit: str
    weak_scaling: bool
    notes: tuple[str, ...]
    label: str


def project(sweep: SweepPoints, sizes: Sequence[int], mtbf_node_h: float | None) -> Projection:
    """Predict the largest measured point from the other points, then extrapolate from all points to ``sizes``.

    Args:
        sweep: two points or more.
        sizes: numbers of nodes.
        mtbf_node_h: mean time between failures of one node, hours; None for a projection without goodput.
    """
    held_out, model = hold_out(sweep), sweep.fit(sweep.measured)
    first, last = sweep.measured[0], held_out.point
    spread = (last.high_s - last.low_s) / 2 / last.step_s
    interval = max(abs(math.log(held_out.predicted_s / last.step_s)), spread)
    failures, notes = failures_of(sweep, mtbf_node_h)
    rows = []
    for one, throughput in zip(sweep.measured, sweep.rates, strict=True):
        row = ProjectedRow(one.nodes, one.ranks, True, one.step_s, one.low_s, one.high_s, throughput)
        rows.append(with_derived(replace(row, stragglers_s=sweep.stragglers_s(one)), sweep, failures))
    known = {row.nodes for row in rows}
    for nodes in (size for size in sizes if size not in known):
        row = ProjectedRow(nodes, nodes * sweep.ranks_per_node, False)
        try:
            config, request = sweep.request(nodes)
            memory, step = workload_of(config).plan(config, request).facts.get("memory_bytes"), model.at(nodes)
        except ConfigError as refusal:
            rows.append(replace(row, refused=refusal.found))
            continue
        growth = nodes / first.nodes if sweep.is_weak else 1
        projected = replace(
            row,
            step_s=step.step_s,
            low_s=step.step_s * math.exp(-interval),
            high_s=step.step_s * math.exp(interval),
            throughput=None if sweep.rates[0] is None else sweep.rates[0] * first.step_s * growth / step.step_s,
            parts=step.by_cause,
            memory_bytes=memory.get("total") if isinstance(memory, dict) else None,
            stragglers_s=step.by_cause.get("stragglers"),
        )
        rows.append(with_derived(projected, sweep, failures))
    if sweep.left_out:
        notes.append(f"left out: {', '.join(sweep.left_out)}, whose ranks shared cores or a GPU")
    beyond = max(sizes) / last.nodes
    if beyond > 16:
        notes.append(f"{max(sizes)} nodes are {beyond:.0f} times what was measured: the interval knows nothing of that")
    return Projection(
        rows=tuple(sorted(rows, key=lambda row: (row.nodes, not row.is_measured))),
        held_out=held_out,
        interval=interval,
        model=model.text,
        unit=sweep.base.unit or "units",
        weak_scaling=sweep.is_weak,
        notes=(*notes, *straggler_notes(sweep)),
        label=sweep.series.label,
    )


def with_derived(row: ProjectedRow, sweep: SweepPoints, failures: Failures | None) -> ProjectedRow:
    """Return the row with the figures that follow from its step time: efficiency, goodput, GPU-hours and cost.

    ``sweep`` has the measured points. ``failures`` has the rate and cost of failures; None for a row without goodput.
    """
    assert row.step_s is not None
    first, gpus, price = sweep.measured[0], sweep.config.cluster.gpus_per_node, sweep.config.cluster.price_per_gpu_hour
    shrink = first.step_s / row.step_s
    goodput = None if failures is None else failures.goodput(row.nodes)
    hours = None
    if gpus and row.throughput and goodput != 0:
        hours = row.nodes * gpus * 1e9 / row.throughput / 3600 / (1.0 if goodput is None else goodput)
    return replace(
        row,
        efficiency=shrink if sweep.is_weak else shrink * first.ranks / row.ranks,
        goodput=goodput,
        gpu_hours_per_giga=hours,
        cost_per_giga=None if hours is None or price is None else hours * price,
    )


# A projection as text: terminal, CSV, JSON.


def projection_table(found: Projection) -> tuple[list[str], list[list[str]]]:
    """Return the titles of the columns, and the cells of each row; a cell is empty if its figure is not known."""

    def known(value: Any, text: Callable[[Any], str]) -> str:
        return "" if value is None else text(value)

    per_giga = f"/ 10^9 {found.unit}"
    titles = ["nodes", "ranks", "step time", "interval", f"{found.unit}/s", "efficiency", "stragglers", "memory a rank"]
    titles += ["goodput", f"GPU-hours {per_giga}", f"cost {per_giga}", "kind"]
    return titles, [
        [
            *(f"{row.nodes:,}", f"{row.ranks:,}", known(row.step_s, time_text)),
            "" if row.low_s is None else f"{time_text(row.low_s)} to {time_text(row.high_s)}",
            *(known(row.throughput, rate), known(row.efficiency, percent), known(row.stragglers_s, time_text)),
            known(row.memory_bytes, lambda value: f"{value / GIB:.2f} GiB"),
            *(known(row.goodput, percent), known(row.gpu_hours_per_giga, "{:,.3g}".format)),
            known(row.cost_per_giga, "{:,.2f}".format),
            "measured" if row.is_measured else "refused" if row.refused else "projected",
        ]
        for row in found.rows
    ]


def projection_heading(found: Projection) -> str:
    """Return the heading above the table of a projection."""
    of = f" of {found.label}" if found.label else ""
    kind = "weak" if found.weak_scaling else "strong"
    return f"Projection of {kind} scaling{of}; projected figures were not measured"


def sentences(found: Projection) -> list[str]:
    """Return the sentences below the table of a projection: held-out point, model, interval, refused sizes, notes."""
    held, fitted_to = found.held_out, ", ".join(map(str, found.held_out.fitted_to))
    said = [
        f"held out: {held.point.nodes} nodes, predicted from nodes={fitted_to}: {held.predicted_s:.4g} s a step, "
        f"measured {held.point.step_s:.4g} s: {100 * held.error:+.1f} %",
        f"model: {found.model}",
        f"interval: a factor of {math.exp(found.interval):.3g} to either side, by the error of the held-out point "
        "or by its spread",
    ]
    said += [f"refused: nodes={row.nodes}: {row.refused}" for row in found.rows if row.refused]
    return [*said, *found.notes]


def contents(found: Projection) -> dict[str, bytes]:
    """Return file extension without its dot -> content of the file, for each file of a projection."""
    document, file = asdict(found), io.StringIO()
    del document["label"]
    names = [name for name in document["rows"][0] if name != "parts"]
    writer = csv.DictWriter(file, names, extrasaction="ignore")
    writer.writeheader()
    writer.writerows(document["rows"])
    return {
        "csv": file.getvalue().encode(),
        "json": f"{json.dumps(document, indent=2)}\n".encode(),
        "png": draw_projection(found),
    }


def draw_projection(found: Projection) -> bytes:
    """Return a PNG file: throughput, or step time if the work is unknown, over the number of nodes.

    Measured points are filled. Projected points are hollow, with a dashed line and their interval.
    """
    # matplotlib takes a second, which a refusal should not need.
    from launch.report.figures import COLORS, GREY, IDEAL, Panel, picture, scale_sizes, scale_values

    shown = [row for row in found.rows if not row.refused]
    is_known = all(row.throughput is not None for row in shown)
    name, title = ("throughput", "Throughput") if is_known else ("step_s", "Step time")

    def plot(axes: Axes) -> None:
        for label, color, inside, line in (("projected", COLORS[1], "white", "--"), ("measured", COLORS[0], None, "-")):
            rows = [row for row in shown if row.is_measured is (label == "measured")]
            nodes, values = [row.nodes for row in rows], [getattr(row, name) for row in rows]
            axes.plot(nodes, values, line, marker="o", color=color, mfc=inside, label=label)
            if label == "projected":
                low, high = ([value * math.exp(sign * found.interval) for value in values] for sign in (-1, 1))
                axes.fill_between(nodes, low, high, color=color, alpha=0.15, linewidth=0)
        sizes = sorted({row.nodes for row in shown})
        if is_known:
            first = next(row for row in shown if row.is_measured)
            ideal = [(first.throughput or math.nan) / first.nodes * nodes for nodes in sizes]
            axes.plot(sizes, ideal, color=GREY, label="ideal", **IDEAL)
        scale_sizes(axes, sizes, "nodes")
        scale_values(axes, f"{found.unit} per second" if is_known else "seconds", log=is_known)
        axes.legend()

    return picture([Panel(title, plot)], projection_heading(found), "; ".join(sentences(found)[:3]))["png"]


# ``--fit``: the cheapest nodes and parallelism that train a model within a given time. The workload estimates costs.


@dataclass(frozen=True)
class Goal:
    """Goal of ``--fit``: a model, its training data, and the days for the training."""

    training: TrainingGoal
    days: float


@dataclass(frozen=True)
class Offer:
    """A set-up that trains the model on a number of nodes, with the time and the cost of the whole training."""

    nodes: int
    gpus: int
    set_up: SetUp
    days: float
    """Days of the whole training."""
    gpu_hours: float
    """GPU-hours of the whole training."""
    cost: float | None
    """Cost in the currency of ``cluster.price_per_gpu_hour``; None without a price."""


def parse_goal(text: str) -> Goal:
    """Return the goal that a text such as ``7e9 params, 1e12 tokens, 30 days`` states.

    Raises:
        ConfigError: one of the three is missing, stated twice, or not a positive number.
    """
    parts, found = text.lower().split(","), dict[str, float]()
    for part, (name, word) in itertools.product(parts, WORDS.items()):
        if matched := re.fullmatch(rf"\s*{NUMBER}\s*(?:{word})\s*", part):
            found[name] = float(matched[1]) * SCALES[matched[2]] * (DAYS[matched[3]] if name == "days" else 1.0)
    if len(parts) != len(WORDS) or not all(0 < found.get(name, 0) < math.inf for name in WORDS):
        expected = "params, tokens and days, each once and above 0, separated by commas"
        raise ConfigError(f'--fit "{text}"', expected, EXAMPLE)
    return Goal(TrainingGoal(found["params"], found["tokens"]), found["days"])


def compose_goal(typed: Sequence[str], gpu: str | None, network: Path | None) -> tuple[Config, list[str]]:
    """Return the config of the nodes and the model for ``--fit``, and the overrides from which it was composed.

    Args:
        typed: overrides as typed.
        gpu: name of the GPUs; None to read it from the config.
        network: file of measured links; None if there is none.

    Raises:
        ConfigError: the workload cannot size a model, or the GPUs have no name.
    """
    given = [*typed, *([] if gpu is None else [f"cluster.gpu_name={gpu}"])]
    given += [] if network is None else [f"cluster.network={network.absolute()}"]
    keys = {typed_key(word) for word in given}
    cluster = [word for word in CLUSTER if typed_key(word) not in keys]
    first = typed_config(compose_launch([*cluster, *given]))
    workload = workload_of(first)
    if not workload.goal_words:
        expected = "a workload that can size a model, such as gpt"
        raise ConfigError(f"--fit with workload={workload.name}", expected, "workload=gpt")
    if first.cluster.gpu_name is None:
        raise ConfigError("--fit without the name of the GPUs", "GPUs whose peaks are known", EXAMPLE)
    words = [*cluster, *(word for word in workload.goal_words if typed_key(word) not in keys), *given]
    config = typed_config(compose_launch(words))
    check_ranges(config)
    config.cluster.validate()
    return config, words


def offers(goal: Goal, config: Config, words: Sequence[str], sizes: Sequence[int]) -> list[Offer]:
    """Return up to eight set-ups that reach a goal, cheapest first. Prints a line for each size on standard error.

    Few nodes are most efficient, so sizes are tried upwards until four of them reach the goal. Each size takes a
    second, and more with many ranks.

    Args:
        goal: goal of all set-ups.
        config: config of the nodes and the model.
        words: overrides of the config.
        sizes: numbers of nodes, ascending.

    Raises:
        ConfigError: no set-up reaches the goal; the error names the fastest set-up.
    """
    every: list[Offer] = []
    in_time: list[Offer] = []
    refusal: ConfigError | None = None
    for nodes in sizes:
        there = replace(config, nodes=nodes)
        request = request_for(there, words, RunFolder(Path(config.output_dir) / "fit"))
        try:
            found = [as_offer(goal, there, one) for one in workload_of(there).set_ups(there, request, goal.training)]
        except ConfigError as error:
            refusal = error
            continue
        every += found
        print(f"{counted(nodes, 'node')}: {min(one.days for one in found):.3g} days", file=sys.stderr, flush=True)
        in_time = [one for one in every if one.days <= goal.days]
        if len({one.nodes for one in in_time}) == 4:
            break
    if in_time:
        return sorted(in_time, key=lambda one: (one.gpu_hours, one.nodes))[:8]
    if not every:
        assert refusal is not None
        raise refusal
    nearest, training = min(every, key=lambda one: one.days), goal.training
    size, work = f"{training.parameters:.3g} params", f"{training.work:.3g} tokens"
    raise ConfigError(
        f"nothing trains {size} on {work} in {goal.days:g} days; the nearest is {counted(nearest.nodes, 'node')} with "
        f"{nearest.set_up.parallelism}, in {nearest.days:.3g} days",
        "a goal that the nodes make",
        f'--fit "{size}, {work}, {nearest.days * 1.01:.3g} days", faster GPUs with --gpu, or more nodes with --nodes',
    )


def as_offer(goal: Goal, config: Config, set_up: SetUp) -> Offer:
    """Return the offer of a set-up on the nodes of ``config``, with time and cost of the whole training."""
    gpus = config.nodes * config.ranks_on_node
    hours = goal.training.work / set_up.work_per_step * set_up.step_s / 3600
    price, spent = config.cluster.price_per_gpu_hour, gpus * hours
    return Offer(config.nodes, gpus, set_up, hours / 24, spent, None if price is None else price * spent)


def fit(typed: Sequence[str], text: str, gpu: str | None, network: Path | None, sizes: Sequence[int] | None) -> None:
    """Print the cheapest set-ups that reach a goal, and the command for the first one.

    Args:
        typed: overrides as typed.
        text: the goal, as typed after ``--fit``.
        gpu: name of the GPUs; None to read it from the config.
        network: file of measured links; None if there is none.
        sizes: numbers of nodes to try; None for ``NODES``.

    Raises:
        ConfigError: no set-up reaches the goal, or the arguments are invalid.
    """
    goal = parse_goal(text)
    config, words = compose_goal(typed, gpu, network)
    found = offers(goal, config, words, sizes or NODES)
    of = f"{goal.training.parameters:.3g} params on {goal.training.work:.3g} tokens in {goal.days:.3g} days"
    print(f"{of}, on {config.cluster.gpu_name}; estimated figures, none was measured")
    rows = [
        [
            *(str(one.nodes), str(one.gpus), one.set_up.parallelism, str(one.set_up.micro_batch)),
            f"{one.set_up.memory_bytes / 2**30:.1f} GiB",
            "" if one.set_up.mfu is None else percent(one.set_up.mfu),
            *(f"{one.days:.3g}", f"{one.gpu_hours:,.0f}", "" if one.cost is None else f"{one.cost:,.0f}"),
        ]
        for one in found
    ]
    titles = ("nodes", "GPUs", "parallelism", "micro", "memory", "MFU", "days", "GPU-hours", "cost")
    print_table(Console(), titles, rows, left=("parallelism",))
    print("no failures, slow ranks or evaluations in it; links as assumed, or as measured with --network")
    cluster = shlex.join(word for word in words if typed_key(word).partition(".")[0] == "cluster")
    cheapest = f"python -m launch nodes={found[0].nodes} {cluster} {found[0].set_up.command} dry_run=true"
    print(as_typed(f"the cheapest: {cheapest}"))


if __name__ == "__main__":
    sys.exit(main())
