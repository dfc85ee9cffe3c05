"""``launch.project --fit``: the cheapest nodes and parallelism that train a model within a given time.

The workload estimates what a model costs; this module reads the goal and searches over numbers of nodes. It starts
nothing, and every figure is an estimate.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from launch.config import Config
from launch.config.cluster import InterconnectConfig
from launch.config.compose import compose_launch, typed_config, workload_of
from launch.errors import ConfigError, counted
from launch.runs.folder import RunFolder
from launch.runs.overrides import typed_key
from launch.schema import check_ranges
from launch.workload import PlanRequest, SetUp, TrainingGoal

DAYS = {"hour": 1 / 24, "day": 1.0, "week": 7.0, "month": 30.0}
SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
NUMBER = r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)\s*([kmbt]?)"
WORDS = {"parameters": r"param(?:eter)?s?", "work": r"tokens?|samples?|images?", "days": r"(hour|day|week|month)s?"}
EXAMPLE = '--fit "7e9 params, 1e12 tokens, 30 days" --gpu h100'
NODES = sorted(2**a * 3**b for a in range(13) for b in (0, 1) if 2**a * 3**b <= 4096)
"""Numbers of nodes that are tried, where none are typed: powers of two, and three times such."""
CLUSTER = ("cluster=slurm", "cluster.gpus_per_node=8")
"""The nodes of a plan of which nothing else is said: those of DGX and HGX systems."""
KEPT = 8
"""Set-ups that are shown."""


@dataclass(frozen=True)
class Goal:
    """A model, what it is trained on, and the days there are."""

    training: TrainingGoal
    days: float


@dataclass(frozen=True)
class Offer:
    """A set-up on so many nodes, and what it comes to."""

    nodes: int
    gpus: int
    set_up: SetUp
    days: float
    gpu_hours: float
    cost: float | None
    """In the currency of ``cluster.price_per_gpu_hour``; None without a price."""


def parse_goal(text: str) -> Goal:
    """Read ``7e9 params, 1e12 tokens, 30 days``; ConfigError where one of the three is missing or no number."""
    found: dict[str, float] = {}
    for part in filter(None, (part.strip().lower() for part in text.split(","))):
        for name, word in WORDS.items():
            if matched := re.fullmatch(rf"{NUMBER}\s*(?:{word})", part):
                unit = DAYS[matched[3]] if name == "days" else 1.0
                if name in found:
                    twice = f'--fit "{text}", with {part!r} beside another number of the same'
                    raise ConfigError(twice, "params, tokens and days, each once", EXAMPLE)
                found[name] = float(matched[1]) * SCALES[matched[2]] * unit
                break
        else:
            raise ConfigError(f'--fit "{text}", with {part!r} in it', "params, tokens and days, by commas", EXAMPLE)
    lacking = [name for name in WORDS if not 0 < found.get(name, 0) < math.inf]
    if lacking:
        said = ", ".join({"parameters": "params", "work": "tokens"}.get(name, name) for name in lacking)
        raise ConfigError(f'--fit "{text}", without {said} above 0', "params, tokens and days, by commas", EXAMPLE)
    return Goal(TrainingGoal(found["parameters"], found["work"]), found["days"])


def compose_goal(
    typed: Sequence[str], gpu: str | None, network: InterconnectConfig | Path | None
) -> tuple[Config, list[str]]:
    """Compose the nodes and what is trained on them, from what was typed and the workload's own words before it.

    Raises:
        ConfigError: the workload cannot size a model, or nobody said which GPUs.
    """
    given = [*typed, *([] if gpu is None else [f"cluster.gpu_name={gpu}"])]
    given += [] if network is None else link_words(network)
    first = typed_config(compose_launch([*without(CLUSTER, given), *given]))
    workload = workload_of(first)
    if not workload.goal_words:
        expected = "a workload that can size a model, such as gpt"
        raise ConfigError(f"--fit with workload={workload.name}", expected, "workload=gpt")
    if first.cluster.gpu_name is None:
        raise ConfigError("--fit without the name of the GPUs", "GPUs whose peaks are known", EXAMPLE)
    words = [*without((*CLUSTER, *workload.goal_words), given), *given]
    config = typed_config(compose_launch(words))
    check_ranges(config)
    config.cluster.validate()
    return config, words


def link_words(network: InterconnectConfig | Path) -> list[str]:
    """Return the overrides for links: the file of ``launch.bench_network``, or keys of ``cluster.interconnect``."""
    if isinstance(network, Path):
        return [f"cluster.network={network}"]
    return [
        f"cluster.interconnect.{tier}.{key}={value}"
        for tier, link in asdict(network).items()
        for key, value in link.items()
        if value is not None
    ]


def without(words: Sequence[str], given: Sequence[str]) -> list[str]:
    """Leave out the words whose key was typed."""
    keys = {typed_key(word) for word in given}
    return [word for word in words if typed_key(word) not in keys]


def offers(
    goal: Goal,
    config: Config,
    words: Sequence[str],
    sizes: Sequence[int],
    tell: Callable[[str], None] = lambda text: None,
) -> list[Offer]:
    """Return what makes it in time, the cheapest first.

    Fewer nodes wait less for each other: the sizes are tried upwards, until a few of them make it. A search takes a
    second for each, and more for many ranks: ``tell`` is handed a line on every size once it was tried.

    Raises:
        ConfigError: nothing makes it; the nearest is named.
    """
    every: list[Offer] = []
    refusal: ConfigError | None = None
    enough = 0
    for nodes in sizes:
        try:
            found = [as_offer(goal, config, nodes, one) for one in ask(goal, config, words, nodes)]
        except ConfigError as error:
            if refusal is None or error.found != refusal.found:  # what no size can change is said once
                tell(f"{counted(nodes, 'node')}: {error.found}")
            refusal = error
            continue
        every += found
        if found:
            tell(f"{counted(nodes, 'node')}: {min(one.days for one in found):.3g} days")
        enough += any(one.days <= goal.days for one in found)
        if enough == SIZES_SHOWN:
            break
    made = sorted((one for one in every if one.days <= goal.days), key=lambda one: (one.gpu_hours, one.nodes))
    if made:
        return made[:KEPT]
    if not every:
        assert refusal is not None
        raise refusal
    raise too_slow(goal, every)


SIZES_SHOWN = 4
"""Numbers of nodes in time that are tried: more of them cost more."""


def too_slow(goal: Goal, every: Sequence[Offer]) -> ConfigError:
    """Return the refusal where nothing makes it, with the nearest."""
    nearest = min(every, key=lambda one: one.days)
    training = goal.training
    again = f"{training.parameters:.3g} params, {training.work:.3g} tokens, {nearest.days * 1.01:.3g} days"
    return ConfigError(
        f"nothing trains {training.parameters:.3g} params on {training.work:.3g} tokens in {goal.days:g} days; the "
        f"nearest is {counted(nearest.nodes, 'node')} with {nearest.set_up.parallelism}, in {nearest.days:.3g} days",
        "a goal that the nodes make",
        f'--fit "{again}", faster GPUs with --gpu, or more nodes with --nodes',
    )


def ask(goal: Goal, config: Config, words: Sequence[str], nodes: int) -> Sequence[SetUp]:
    """Ask the workload for set-ups on so many nodes."""
    config = replace(config, nodes=nodes)
    request = PlanRequest(
        overrides=tuple(words),
        folder=RunFolder(Path(config.output_dir) / "fit"),
        is_local=False,
        nodes=nodes,
        ranks_per_node=config.ranks_on_node,
        cluster=config.cluster,
        local_gpus=0,
    )
    workload = workload_of(config)
    found: Sequence[SetUp] = workload.set_ups(config, request, goal.training)
    return found


def as_offer(goal: Goal, config: Config, nodes: int, set_up: SetUp) -> Offer:
    """Return time and cost of a set-up."""
    gpus = nodes * config.ranks_on_node
    hours = goal.training.work / set_up.work_per_step * set_up.step_s / 3600
    price = config.cluster.price_per_gpu_hour
    spent = gpus * hours
    return Offer(nodes, gpus, set_up, hours / 24, spent, None if price is None else price * spent)
