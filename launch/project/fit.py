"""``launch.project --fit``: the cheapest nodes and parallelism that train a model within a given time.

The workload estimates what a model costs. This module reads the goal and searches over numbers of nodes. It starts
nothing, and every figure is an estimate.
"""

from __future__ import annotations

import math
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from launch.config import Config
from launch.config.compose import compose_launch, typed_config, workload_of
from launch.errors import ConfigError, counted
from launch.plan.preflight import print_table
from launch.project.projection import read_links, request_for
from launch.report.notes import percent
from launch.runs.folder import RunFolder
from launch.runs.overrides import typed_key
from launch.schema import check_ranges
from launch.workload import SetUp, TrainingGoal

DAYS = {"hour": 1 / 24, "day": 1.0, "week": 7.0, "month": 30.0}
SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kmbt]?)"
WORDS = {"params": r"param(?:eter)?s?", "tokens": r"tokens?|samples?|images?", "days": r"(hour|day|week|month)s?"}
EXAMPLE = '--fit "7e9 params, 1e12 tokens, 30 days" --gpu h100'
NODES = sorted(2**a * 3**b for a in range(13) for b in (0, 1) if 2**a * 3**b <= 4096)
"""Numbers of nodes to try by default: powers of two, and three times powers of two."""
CLUSTER = ("cluster=slurm", "cluster.gpus_per_node=8")
"""Overrides for the default nodes: DGX and HGX systems."""


@dataclass(frozen=True)
class Goal:
    """A model, its training data, and the days for the training."""

    training: TrainingGoal
    days: float


@dataclass(frozen=True)
class Offer:
    """A set-up on a number of nodes, with time and cost of the whole training."""

    nodes: int
    gpus: int
    set_up: SetUp
    days: float
    gpu_hours: float
    cost: float | None
    """Cost in the currency of ``cluster.price_per_gpu_hour``; None without a price."""


def parse_goal(text: str) -> Goal:
    """Read a goal such as ``7e9 params, 1e12 tokens, 30 days``.

    Raises ConfigError if one of the three is missing or no number.
    """
    expected, found = "params, tokens and days, by commas", dict[str, float]()
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        matches = {name: re.fullmatch(rf"{NUMBER}\s*(?:{word})", part) for name, word in WORDS.items()}
        name, matched = next(((name, match) for name, match in matches.items() if match), ("", None))
        if matched is None or name in found:
            wrong = "in it" if matched is None else "beside another number of the same"
            raise ConfigError(f'--fit "{text}", with {part!r} {wrong}', expected, EXAMPLE)
        found[name] = float(matched[1]) * SCALES[matched[2]] * (DAYS[matched[3]] if name == "days" else 1.0)
    lacking = [name for name in WORDS if not 0 < found.get(name, 0) < math.inf]
    if lacking:
        raise ConfigError(f'--fit "{text}", without {", ".join(lacking)} above 0', expected, EXAMPLE)
    return Goal(TrainingGoal(found["params"], found["tokens"]), found["days"])


def compose_goal(typed: Sequence[str], gpu: str | None, network: Path | None) -> tuple[Config, list[str]]:
    """Compose the config of nodes and model. Returns the config and its overrides.

    Args:
        typed: overrides as typed.
        gpu: name of the GPUs; None to read it from the config.
        network: file of measured links; None if there is none.

    Raises:
        ConfigError: the workload cannot size a model, or the GPUs have no name.
    """
    given = [*typed, *([] if gpu is None else [f"cluster.gpu_name={gpu}"])]
    for key, value in ({} if network is None else read_links(network)).items():
        if key == "network" and value is not None:
            given.append(f"cluster.network={value}")
        for tier, link in asdict(value).items() if key == "interconnect" else ():
            given += [f"cluster.{key}.{tier}.{name}={number}" for name, number in link.items() if number is not None]
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
    """Return the set-ups that reach a goal, cheapest first. Prints a line about each size on standard error.

    Few nodes are most efficient, so sizes are tried upwards until four of them reach the goal. Each size takes a
    second, and more with many ranks.

    Args:
        goal: goal of all set-ups.
        config: config of the nodes and the model.
        words: overrides of the config.
        sizes: numbers of nodes, ascending.

    Raises:
        ConfigError: no set-up reaches the goal; the error names the nearest.
    """
    every: list[Offer] = []
    refusal: ConfigError | None = None
    for nodes in sizes:
        there = replace(config, nodes=nodes)
        request = request_for(there, words, RunFolder(Path(config.output_dir) / "fit"))
        try:
            found = [as_offer(goal, there, one) for one in workload_of(there).set_ups(there, request, goal.training)]
            said = f"{min(one.days for one in found):.3g} days" if found else ""
        except ConfigError as error:
            found = []
            said = error.found if refusal is None or error.found != refusal.found else ""  # Printed once for all sizes.
            refusal = error
        every += found
        if said:
            print(f"{counted(nodes, 'node')}: {said}", file=sys.stderr, flush=True)
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
    """Return time and cost of a set-up on the nodes of a config."""
    gpus = config.nodes * config.ranks_on_node
    hours = goal.training.work / set_up.work_per_step * set_up.step_s / 3600
    price, spent = config.cluster.price_per_gpu_hour, gpus * hours
    return Offer(config.nodes, gpus, set_up, hours / 24, spent, None if price is None else price * spent)


def fit(typed: Sequence[str], text: str, gpu: str | None, network: Path | None, sizes: Sequence[int] | None) -> None:
    """Print the cheapest set-ups that reach a goal, and the command for the first one. ConfigError if none does."""
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
    print(f"the cheapest: python -m launch nodes={found[0].nodes} {cluster} {found[0].set_up.command} dry_run=true")
