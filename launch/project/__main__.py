"""``python -m launch.project SWEEP --nodes 8,16,...,4096``: what a sweep would be at sizes that were not run."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from launch.errors import CommandParser, ConfigError, refusing
from launch.project.goal import EXAMPLE, NODES, compose_goal, offers, parse_goal
from launch.project.projection import project, read_links, read_sweep, with_matmul_rates
from launch.project.text import csv_text, json_text, markdown, show, show_offers
from launch.report.selection import Selection, select
from launch.runs.files import deny_others_writing, write_atomically
from launch.runs.find import runs_labelled

# Sizes as they are typed: ``8,16,32``, or with an ellipsis ``8,16,...,4096``.


MOST = 64
"""Sizes of one projection: more rows than anybody reads are a mistyped step."""


def parse_sizes(text: str) -> list[int]:
    """Numbers of nodes, ascending, without doubles.

    An ellipsis continues as the two numbers before it: by their ratio where the second is a multiple of the first, else
    by their difference. After one number it doubles.

    Raises:
        ConfigError: no such list.
    """
    words = [word.strip() for word in text.split(",")]
    sizes: list[int] = []
    for index, word in enumerate(words):
        if word in ("...", "…"):
            last = words[index + 1] if index + 1 < len(words) else ""
            if not sizes or not last.isdecimal() or int(last) <= sizes[-1]:
                raise refuse(text)
            sizes += between(sizes, int(last))
        elif word.isdecimal() and int(word) > 0:
            sizes.append(int(word))
        else:
            raise refuse(text)
        if len(sizes) > MOST:
            raise refuse(text, f"at most {MOST} sizes")
    return sorted(set(sizes))


def between(before: list[int], last: int) -> list[int]:
    """The sizes that an ellipsis stands for, without ``last``."""
    factor, step = 2, 0
    if len(before) > 1 and before[-1] > before[-2]:
        factor, rest = divmod(before[-1], before[-2])
        step = before[-1] - before[-2] if rest else 0
    found: list[int] = []
    size = before[-1]
    while len(found) <= MOST:
        size = size + step if step else size * factor
        if size >= last:
            break
        found.append(size)
    return found


def refuse(text: str, expected: str = "numbers of nodes: 8,16,32, or with an ellipsis 8,16,...,4096") -> ConfigError:
    """Return the refusal of what is no list of sizes."""
    return ConfigError(f"--nodes {text}", expected, "--nodes 8,16,...,4096")


# ``python -m launch.project SWEEP --nodes 8,16,...,4096``: what a sweep would be at sizes that were not run.


STEM = "projection"


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Project a sweep; returns the exit status: 0, or 2 where it cannot be projected."""
    parser = CommandParser(
        prog="python -m launch.project",
        description="What a measured sweep would be at sizes that were not run: step time, throughput, efficiency, "
        "memory, and with --mtbf-hours goodput. The largest measured point is predicted first, and the error printed.",
    )
    parser.add_argument(
        "words", nargs="*", metavar="SWEEP", help="a folder with the runs of a sweep over nodes; with --fit KEY=VALUE"
    )
    parser.add_argument("--nodes", metavar="LIST", help="sizes: 8,16,32, or 8,16,...,4096")
    parser.add_argument(
        "--fit", metavar="GOAL", help='no sweep, but the cheapest that make it: "7e9 params, 1e12 tokens, 30 days"'
    )
    parser.add_argument("--sweep", type=int, metavar="N", help="an earlier sweep of the folder")
    parser.add_argument("--gpu", metavar="NAME", help="other GPUs than those of the sweep, such as H100")
    parser.add_argument(
        "--network",
        type=Path,
        metavar="FILE",
        help="links as measured: the file of launch.bench_network, or the keys of cluster.interconnect in YAML",
    )
    parser.add_argument("--matmul-rates", type=Path, metavar="FILE", help="rates that the workload has measured")
    parser.add_argument("--mtbf-hours", type=float, metavar="H", help="mean time between failures of one node")
    typed = parser.parse_intermixed_args(arguments)
    if typed.fit is not None:
        return fit(typed)
    if len(typed.words) != 1 or typed.nodes is None:
        lacking = f"{len(typed.words)} folders: {' '.join(typed.words)}" if typed.words else "no folder of a sweep"
        raise ConfigError(
            lacking if len(typed.words) != 1 else "no --nodes",
            "the folder of one sweep, and sizes",
            "python -m launch.project SWEEP --nodes 8,...,64",
        )
    sizes = parse_sizes(typed.nodes)
    if typed.mtbf_hours is not None and not 0 < typed.mtbf_hours < math.inf:
        expected = "hours between two failures of a node, above 0"
        raise ConfigError(f"--mtbf-hours {typed.mtbf_hours:g}", expected, "--mtbf-hours 20000")
    deny_others_writing()
    folder = Path(typed.words[0])
    folder = folder if folder.exists() else next(iter(runs_labelled(folder)), folder)
    selection = select(folder, typed.sweep, command="python -m launch.project", options=f"--nodes {typed.nodes}")
    network = None if typed.network is None else read_links(typed.network)
    sweep = read_sweep(selection, network)
    if typed.matmul_rates is not None:
        sweep = with_matmul_rates(sweep, typed.matmul_rates, typed.gpu)
    found = project(sweep, sizes, typed.mtbf_hours, typed.gpu)
    console = Console(soft_wrap=True)
    show(found, console)
    from launch.project.text import draw  # matplotlib takes a second, which no refusal should wait for

    contents = {
        "md": f"{markdown(found)}\n![projection]({STEM}.png)\n".encode(),
        "csv": csv_text(found).encode(),
        "json": json_text(found).encode(),
        "png": draw(found),
    }
    for path in write(selection, contents):
        console.print(f"wrote {path}", highlight=False, markup=False)
    return 0


def fit(typed: argparse.Namespace) -> int:
    """Show the cheapest set-ups that make a goal; ConfigError where nothing does."""
    options = {"--sweep": typed.sweep, "--mtbf-hours": typed.mtbf_hours, "--matmul-rates": typed.matmul_rates}
    refused = [name for name, value in options.items() if value is not None]
    if refused or (wrong := [word for word in typed.words if "=" not in word]):
        strange = f"--fit with {', '.join(refused or wrong)}"
        raise ConfigError(
            strange, "overrides as for python -m launch, KEY=VALUE", f"python -m launch.project {EXAMPLE}"
        )
    goal = parse_goal(typed.fit)
    links = None if typed.network is None else read_links(typed.network)
    sizes = NODES if typed.nodes is None else parse_sizes(typed.nodes)
    config, words = compose_goal(typed.words, typed.gpu, links)
    found = offers(goal, config, words, sizes, lambda text: print(text, file=sys.stderr, flush=True))
    show_offers(goal, found, config.cluster.gpu_name, words, Console(soft_wrap=True))
    return 0


def write(selection: Selection, contents: dict[str, bytes]) -> list[Path]:
    """Write the files beside those of the sweep's report, and return their paths."""
    folder = selection.folders[-1]
    paths = {folder / f"{STEM}.{ending}": content for ending, content in contents.items()}
    for path, content in paths.items():
        write_atomically(path, content)
    return list(paths)


if __name__ == "__main__":
    sys.exit(main())
