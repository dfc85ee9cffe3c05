"""Search of the parallel layouts that are valid, and of those that fit in memory.

``candidates`` enumerates every degree of every dimension that gpt/topology/rules.py does not refuse, for the strategies
of one engine. ``search_layouts`` keeps those that fit, with more and more relaxation: smaller micro-batches, CPU
offload. Must not know what a layout costs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from gpt.config import EngineKind, Ffn, ParallelConfig, Schedule, Strategy, TrainConfig
from gpt.config.checks import divisors
from gpt.planning.hardware import Machine
from gpt.planning.memory import Memory, per_rank
from gpt.topology.batch import Batch, split_batch
from gpt.topology.dims import ParallelDims
from gpt.topology.pipeline import V_SHAPED
from gpt.topology.rules import check_parallel_dims
from launch.errors import ConfigError

SCHEDULES = (Schedule["1f1b"], Schedule.interleaved, Schedule.zbv)
"""Schedules to consider: of those with equal bubbles, the one that keeps fewer activations."""
OFFLOADS = ("cpu_offload", "offload_optimizer", "offload_parameters")
"""Keys of ``parallel`` that offload something to host memory."""


@dataclass(frozen=True)
class Candidate:
    """A valid layout, and its memory per rank."""

    parallel: ParallelConfig
    dims: ParallelDims
    batch: Batch
    memory: Memory

    @property
    def plainness(self) -> tuple[int, ...]:
        """Sort key: the plainest layout is the smallest, and has the largest micro-batches."""
        dimensions = [getattr(self.dims, name) for name in ("pp", "cp", "ep", "tp")]
        strategies = [Strategy.ddp, Strategy.zero1, Strategy.fsdp]
        stage, replicas = self.parallel.zero_stage, self.dims.strategy == "hsdp"
        return (
            sum(size > 1 for size in dimensions),
            strategies.index(self.parallel.strategy) + replicas if stage is None else stage,
            max(dimensions),
            sum(getattr(self.parallel, key) for key in OFFLOADS),
            not self.parallel.reshard_after_forward,
            -self.batch.micro,
        )


def candidates(
    config: TrainConfig,
    world_size: int,
    ranks_per_node: int,
    fixed: Collection[str] = (),
    offload: bool = False,
    refused: list[ConfigError] | None = None,
) -> Iterator[Candidate]:
    """Enumerate the valid layouts on ``world_size`` ranks.

    Args:
        config: of the run; its ``parallel`` holds the values of ``fixed`` keys.
        world_size: ranks.
        ranks_per_node: ranks of a node. Tensor parallelism stays within a node: every layer waits for its collectives.
        fixed: keys of ``parallel`` that never change.
        offload: True to enumerate layouts with CPU offload instead.
        refused: takes the refusals of invalid layouts.
    """
    for parallel in parallel_configs(config, world_size, ranks_per_node, fixed, offload):
        chosen = replace(config, parallel=parallel)
        try:
            parallel.validate()
            dims = check_parallel_dims(chosen, world_size)
            batch = split_batch(config.optim, dims.data_ranks)
        except ConfigError as error:
            if refused is not None:
                refused.append(error)
            continue
        yield Candidate(parallel, dims, batch, per_rank(chosen, dims, batch))


def parallel_configs(
    config: TrainConfig, world_size: int, ranks_per_node: int, fixed: Collection[str], offload: bool
) -> Iterator[ParallelConfig]:
    """Yield every combination of the keys that are not fixed, valid or not."""
    given = config.parallel
    cuts_others = given.engine is not EngineKind.deepspeed  # whose pipeline is taken where it is asked for

    def sizes(key: str, most: int) -> list[int]:
        return [getattr(given, key)] if key in fixed else divisors(most if cuts_others else 1)

    experts = config.model.n_expert if config.model.ffn is Ffn.moe else 1
    for tp in sizes("tp", ranks_per_node):
        for cp in sizes("cp", world_size // tp):
            for pp in sizes("pp", world_size // tp // cp):
                if world_size % (tp * cp * pp):
                    continue
                for ep in sizes("ep", math.gcd(experts, world_size // (tp * cp * pp))):
                    base = replace(given, tp=tp, cp=cp, pp=pp, ep=ep)
                    if cuts_others:
                        yield from torch_configs(base, world_size, ranks_per_node, fixed, offload)
                    else:
                        yield from zero_configs(base, fixed, offload)


def torch_configs(
    base: ParallelConfig, world_size: int, ranks_per_node: int, fixed: Collection[str], offload: bool
) -> Iterator[ParallelConfig]:
    """Yield every pipeline schedule and torch strategy (ddp, zero1, fsdp, hsdp) for given degrees of ``base``."""
    schedules = SCHEDULES if base.pp > 1 and "schedule" not in fixed else (base.schedule,)
    data_ranks = world_size // (base.tp * base.cp * base.pp)
    on_a_node = max(1, ranks_per_node // (base.tp * base.cp))
    shards = [None] if data_ranks <= on_a_node or data_ranks % on_a_node or on_a_node == 1 else [None, on_a_node]
    on_host = offload or base.cpu_offload
    for schedule in schedules:
        found = replace(base, schedule=schedule, cpu_offload=on_host)
        if "dp_shard" not in fixed and not on_host:
            yield replace(found, strategy=Strategy.ddp)
            if data_ranks > 1 and base.tp * base.cp * base.pp * base.ep == 1:
                yield replace(found, strategy=Strategy.zero1)
        reshards = (False,) if schedule in V_SHAPED else (True, False)
        for shard in [base.dp_shard] if "dp_shard" in fixed else shards:
            for reshard in [base.reshard_after_forward] if "reshard_after_forward" in fixed else reshards:
                if data_ranks * base.cp > 1 or (on_host and world_size == 1):
                    yield replace(found, strategy=Strategy.fsdp, dp_shard=shard, reshard_after_forward=reshard)


def zero_configs(base: ParallelConfig, fixed: Collection[str], offload: bool) -> Iterator[ParallelConfig]:
    """Yield every ZeRO stage of DeepSpeed; ``offload`` means the optimizer state, and in stage 3 the parameters too."""
    for stage in [base.zero_stage] if "zero_stage" in fixed else (0, 1, 2, 3):
        found = replace(base, strategy=Strategy.deepspeed, zero_stage=stage)
        if not offload:
            yield found
        elif stage:
            yield replace(found, offload_optimizer=True)
            if stage == 3:
                yield replace(found, offload_optimizer=True, offload_parameters=True)


Config = TypeVar("Config", bound=TrainConfig)
MICRO_BATCH = "optim.max_micro_batch"


@dataclass(frozen=True)
class Relaxation:
    """Changes to the config as typed that a search may make so that a layout fits."""

    smaller_micro_batch: bool = False
    """Reduce ``optim.max_micro_batch``; the global batch stays."""
    offload: bool = False
    """Offload to host memory."""


RELAXATIONS = (
    Relaxation(),
    Relaxation(smaller_micro_batch=True),
    Relaxation(offload=True),
    Relaxation(smaller_micro_batch=True, offload=True),
)


@dataclass(frozen=True)
class SearchResult:
    """The valid layouts under one relaxation."""

    relaxation: Relaxation
    fitting: tuple[Candidate, ...]
    too_large: tuple[Candidate, ...]
    refused: tuple[ConfigError, ...]

    @property
    def least(self) -> Candidate | None:
        """The layout that needs the least device memory, of those that do not fit."""
        return min(self.too_large, key=lambda one: one.memory.total, default=None)


def search_layouts(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str]
) -> Iterator[SearchResult]:
    """Yield the valid layouts, first as typed, then with smaller micro-batches, then with CPU offload, then both.

    Keys in ``fixed`` were set by the user and never change. Unless ``optim.max_micro_batch`` is among them, the search
    starts with micro-batches of every size, which cost nothing but speed.
    """
    least = config.optim.max_micro_batch == 1
    for relaxation in RELAXATIONS:
        if relaxation.offload and not may_offload(machine, fixed):
            continue
        if least if relaxation.smaller_micro_batch else not least and MICRO_BATCH not in fixed:
            continue
        yield search_once(config, world_size, machine, fixed, relaxation)


def can_fit(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str]) -> bool:
    """True where any layout fits under any relaxation, with micro-batches as typed or of one sequence."""
    return any(
        fits_memory(one.memory, machine)
        for offload in (False, *([True] if may_offload(machine, fixed) else []))
        for changed in (config, with_micro_batch(config, 1))
        for one in relaxed_candidates(changed, world_size, machine, fixed, Relaxation(offload=offload), [])
    )


def may_offload(machine: Machine, fixed: Collection[str]) -> bool:
    """True where the machine has host memory apart from its devices', and the user set no offload key."""
    return machine.host is not None and set(OFFLOADS).isdisjoint(fixed)


def search_once(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], relaxation: Relaxation
) -> SearchResult:
    """Search the layouts under one relaxation."""
    refused: list[ConfigError] = []
    found = list(relaxed_candidates(config, world_size, machine, fixed, relaxation, refused))
    fitting = tuple(one for one in found if fits_memory(one.memory, machine))
    too_large = tuple(one for one in found if not fits_memory(one.memory, machine))
    return SearchResult(relaxation, fitting, too_large, tuple(refused))


def relaxed_candidates(
    config: TrainConfig,
    world_size: int,
    machine: Machine,
    fixed: Collection[str],
    relaxation: Relaxation,
    refused: list[ConfigError],
) -> Iterator[Candidate]:
    """Yield every valid layout under a relaxation, with every micro-batch that the relaxation allows.

    Refusals for the micro-batch as typed are appended to ``refused``.
    """
    known = set()
    for changed in [
        config,
        *(with_micro_batch(config, size) for size in smaller_micro_batches(config.optim.max_micro_batch, relaxation)),
    ]:
        refusals = refused if changed is config else None
        for one in candidates(changed, world_size, machine.ranks_per_node, fixed, relaxation.offload, refusals):
            key = f"{one.parallel} {one.batch.micro}"
            if key not in known:  # split_batch rounds down to a divisor, so sizes repeat
                known.add(key)
                yield one


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    """Return the config with micro-batches of at most ``micro_batch`` sequences."""
    return replace(config, optim=replace(config.optim, max_micro_batch=micro_batch))


def smaller_micro_batches(micro_batch: int, relaxation: Relaxation) -> Iterator[int]:
    """Yield smaller micro-batches to try, halving down to one sequence."""
    while relaxation.smaller_micro_batch and micro_batch > 1:
        micro_batch //= 2
        yield micro_batch


def fits_memory(memory: Memory, machine: Machine) -> bool:
    """True where a rank has room on its device and, as far as known, in host memory."""
    if machine.host is None:  # the same memory
        return memory.total + memory.host <= machine.room
    return memory.total <= machine.room and (machine.host.room is None or memory.host <= machine.host.room)
