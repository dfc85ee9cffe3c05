"""The choice of a way to spread a model: of those that fit, the one that an estimate says is fastest.

Owns the order. gpt/planning/search.py knows what fits, gpt/planning/explain.py what to say of the others, and
gpt/planning/explain.py what to say where there is no choice.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from gpt.config import ParallelConfig, Strategy, TrainConfig
from gpt.planning.cost import Estimate, estimate
from gpt.planning.explain import describe, explain_search, no_layout_error, out_of_memory_error
from gpt.planning.hardware import Machine
from gpt.planning.memory import Memory
from gpt.planning.search import (
    MICRO_BATCH,
    Candidate,
    CandidateMemory,
    Relaxation,
    SearchResult,
    search_layouts,
    with_micro_batch,
)
from gpt.topology.batch import Batch, split_batch
from gpt.topology.dims import ParallelDims
from gpt.topology.rules import check_parallel_dims
from launch.errors import ConfigError
from launch.runs.compose import read_config
from launch.runs.folder import RunFolder
from launch.runs.overrides import read_overrides, typed_key, typed_value

NO_DIFFERENCE = 1.03
"""Estimates whose ratio is less are equal: the plainer layout goes before."""


@dataclass(frozen=True)
class LayoutChoice:
    """A layout that fits, and what is expected of it."""

    parallel: ParallelConfig
    dims: ParallelDims
    batch: Batch
    micro_batch: int
    """``optim.micro_batch``: as it was typed, or smaller."""
    memory: Memory
    estimate: Estimate

    def as_dict(self) -> dict[str, object]:
        """What ``plan.json`` holds of it."""
        found = self.estimate
        return {
            "layout": describe(self.parallel, self.dims),
            "micro_batch": self.batch.micro,
            "accumulation": self.batch.accumulation,
            "memory_bytes": self.memory.total,
            "host_bytes": self.memory.host,
            "step_s": found.step_s,
            "tokens_per_s": found.tokens_per_s,
            "compute_s": found.compute_s,
            "idle_s": found.bubble_s,
            "communication_s": found.communication_s,
        }


@dataclass(frozen=True)
class RankedLayouts:
    """What there was to choose from."""

    choices: tuple[LayoutChoice, ...]
    """The layouts that fit, best first."""
    left_out: tuple[str, ...]
    """Of the others, and of what it took to fit, in words: a line each."""


def rank_layouts(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str] = ()) -> RankedLayouts:
    """The layouts that fit, best first: as typed, or where nothing does with more freedom.

    Args:
        config: of the run, with ``parallel.strategy=auto``.
        world_size: ranks.
        machine: what they run on.
        fixed: keys of ``parallel`` that were typed, and are kept; ``optim.micro_batch``, where it was typed too.

    Raises:
        ConfigError: none is possible, or none fits.
    """
    tried: list[SearchResult] = []
    for found in search_layouts(config, world_size, machine, fixed):
        tried.append(found)
        if found.fitting:
            pairs = [
                (one.candidate, evaluate_candidate(config, found.relaxation, one, machine)) for one in found.fitting
            ]
            return RankedLayouts(sort_layouts(pairs), tuple(explain_search(config, world_size, machine, fixed, tried)))
    if all(not found.too_large for found in tried):
        raise no_layout_error(config, world_size, fixed)
    raise out_of_memory_error(config, world_size, machine, fixed, tried)


def evaluate_candidate(
    config: TrainConfig, relaxation: Relaxation, sized: CandidateMemory, machine: Machine
) -> LayoutChoice:
    """What is expected of a candidate that fits with some freedom."""
    one = sized.candidate
    micro_batch = one.batch.micro if relaxation.smaller_micro_batch else config.optim.micro_batch
    chosen = replace(with_micro_batch(config, micro_batch), parallel=one.parallel)
    expected = estimate(chosen, one.dims, one.batch, machine)
    return LayoutChoice(one.parallel, one.dims, one.batch, micro_batch, sized.memory, expected)


def sort_layouts(found: Sequence[tuple[Candidate, LayoutChoice]]) -> tuple[LayoutChoice, ...]:
    """Fastest first; but of those that are hardly slower than the fastest, plainest first. Each layout once, with the
    passes that are best for it."""
    limit = NO_DIFFERENCE * min(choice.estimate.step_s for _, choice in found)

    def key(pair: tuple[Candidate, LayoutChoice]) -> tuple[object, ...]:
        one, choice = pair
        step_s = choice.estimate.step_s
        return (step_s > limit, *((step_s,) if step_s > limit else ()), one.plainness, step_s, str(choice))

    ordered = [choice for _, choice in sorted(found, key=key)]
    first = {str(choice.parallel): choice for choice in reversed(ordered)}
    return tuple(choice for choice in ordered if first[str(choice.parallel)] is choice)


Config = TypeVar("Config", bound=TrainConfig)
SHOWN = 5


@dataclass(frozen=True)
class ParallelChoice:
    """How a run is spread, and why so."""

    parallel: ParallelConfig
    micro_batch: int
    """``optim.micro_batch``: as it was typed, or smaller."""
    best: tuple[LayoutChoice, ...] = ()
    """The first of the layouts there were to choose from, where there was a choice."""
    why: str = ""
    """In words; empty where nobody had to choose."""
    left_out: tuple[str, ...] = ()
    """Why not another, and what it took to fit, in words: a line each."""

    def apply(self, config: Config) -> Config:
        """The config with nothing left open."""
        return replace(with_micro_batch(config, self.micro_batch), parallel=self.parallel)


def choose_parallelism(
    config: TrainConfig,
    overrides: Sequence[str],
    folder: RunFolder,
    world_size: int,
    machine: Callable[[], Machine],
) -> ParallelChoice:
    """Choose how to spread a run that leaves it open; what was typed of ``parallel`` beside that is kept.

    Args:
        config: of the run.
        overrides: what was typed.
        folder: of the run, where there may be one already.
        world_size: ranks.
        machine: what they run on; asked only where something is to be chosen.

    Raises:
        ConfigError: nothing is possible, or nothing fits.
    """
    if config.parallel.strategy is not Strategy.auto:
        return ParallelChoice(config.parallel, config.optim.micro_batch)
    fixed = typed_keys(overrides)
    earlier = earlier_choice(config, overrides, fixed, folder, world_size)
    if earlier is not None:
        return earlier
    seen = machine()
    found = rank_layouts(config, world_size, seen, fixed)
    first, number = found.choices[0], len(found.choices)
    why = f"1 of {number} layouts that fit, by an estimate that ranks them on {seen}"
    if first.micro_batch != config.optim.micro_batch:
        why = f"optim.micro_batch={first.micro_batch} instead of {config.optim.micro_batch}, and {why}"
    return ParallelChoice(first.parallel, first.micro_batch, found.choices[:SHOWN], why, found.left_out)


def typed_keys(overrides: Sequence[str]) -> set[str]:
    """Keys of ``parallel`` that were typed, the strategy not; and ``optim.micro_batch``."""
    keys = {typed_key(arg) for arg in overrides}
    ours = {key.removeprefix("parallel.") for key in keys if key.startswith("parallel.")}
    return ours - {"strategy", "timeout_s"} | keys & {MICRO_BATCH}


def earlier_choice(
    config: TrainConfig, overrides: Sequence[str], fixed: Collection[str], folder: RunFolder, world_size: int
) -> ParallelChoice | None:
    """How the run of this folder is spread, where that goes on this number of ranks and nothing else was typed."""
    if not folder.config.is_file():
        return None
    before = read_config(folder, TrainConfig)
    earlier = replace(before.parallel, timeout_s=config.parallel.timeout_s)
    if earlier.strategy is Strategy.auto:  # written by a launcher of another kind, before anybody chose
        return None
    if any(getattr(earlier, key) != getattr(config.parallel, key) for key in {*fixed} - {MICRO_BATCH}):
        return None
    if typed_value(overrides, MICRO_BATCH) != typed_value(read_overrides(folder), MICRO_BATCH):
        return None
    choice = ParallelChoice(earlier, before.optim.micro_batch, why="as this run began; fresh=true chooses anew")
    chosen = choice.apply(config)
    try:
        split_batch(chosen.optim, check_parallel_dims(chosen, world_size).data_ranks)
    except ConfigError:
        return None
    return choice
