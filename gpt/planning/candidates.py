"""The ways of spreading a model that there are to choose from.

Owns the search: every size of every dimension that gpt/topology/composition.py does not refuse, for the strategies of
one engine. Must not know what a layout costs, or what fits.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from gpt.config import EngineKind, Ffn, ParallelConfig, Schedule, Strategy, TrainConfig
from gpt.topology.batch import Batch, cut
from gpt.topology.composition import lay_out
from gpt.topology.dims import Topology
from gpt.topology.stages import V_SHAPED
from launch.errors import ConfigError

SCHEDULES = (Schedule["1f1b"], Schedule.interleaved, Schedule.zbv)
"""Of schedules that idle equally long, the one that keeps fewer activations."""
OFFLOADS = ("cpu_offload", "offload_optimizer", "offload_parameters")
"""Keys of ``parallel`` that keep something in the memory of the host."""


@dataclass(frozen=True)
class Candidate:
    """A layout that is possible."""

    parallel: ParallelConfig
    layout: Topology
    batch: Batch

    @property
    def plainness(self) -> tuple[int, ...]:
        """How little there is to it, to be compared; the plainest is the smallest, and has the largest passes."""
        dimensions = [getattr(self.layout, name) for name in ("pp", "cp", "ep", "tp")]
        strategies = [Strategy.ddp, Strategy.zero1, Strategy.fsdp]
        stage, copies = self.parallel.zero_stage, self.layout.strategy == "hsdp"
        return (
            sum(size > 1 for size in dimensions),
            strategies.index(self.parallel.strategy) + copies if stage is None else stage,
            max(dimensions),
            sum(getattr(self.parallel, key) for key in OFFLOADS),
            not self.parallel.reshard_after_forward,
            -self.batch.micro,
        )


@dataclass(frozen=True)
class Found:
    """What a search came to."""

    possible: tuple[Candidate, ...]
    refused: tuple[ConfigError, ...]
    """Why others are not."""


def candidates(
    config: TrainConfig, world_size: int, ranks_per_node: int, fixed: Collection[str] = (), offload: bool = False
) -> Found:
    """Everything that is possible on ``world_size`` ranks.

    Args:
        config: of the run; its ``parallel`` says what is ``fixed``.
        world_size: ranks.
        ranks_per_node: ranks of a node. Tensor parallelism does not leave it, since every layer waits for it.
        fixed: keys of ``parallel`` that are not to be chosen.
        offload: whether what is not fixed is to be kept in the memory of the host.
    """
    possible, refused = [], []
    for parallel in grids(config, world_size, ranks_per_node, fixed, offload):
        chosen = replace(config, parallel=parallel)
        try:
            parallel.validate()
            layout = lay_out(chosen, world_size)
            possible.append(Candidate(parallel, layout, cut(config.optim, layout.data_ranks)))
        except ConfigError as error:
            refused.append(error)
    return Found(tuple(possible), tuple(refused))


def grids(
    config: TrainConfig, world_size: int, ranks_per_node: int, fixed: Collection[str], offload: bool
) -> Iterator[ParallelConfig]:
    """Every combination of what is not fixed, possible or not."""
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
                    grid = replace(given, tp=tp, cp=cp, pp=pp, ep=ep)
                    if cuts_others:
                        yield from strategies(grid, world_size, ranks_per_node, fixed, offload)
                    else:
                        yield from stages_of_zero(grid, fixed, offload)


def strategies(
    grid: ParallelConfig, world_size: int, ranks_per_node: int, fixed: Collection[str], offload: bool
) -> Iterator[ParallelConfig]:
    """Every schedule, and every way for the data ranks of a grid to share a model by torch's means."""
    schedules = SCHEDULES if grid.pp > 1 and "schedule" not in fixed else (grid.schedule,)
    data_ranks = world_size // (grid.tp * grid.cp * grid.pp)
    on_a_node = max(1, ranks_per_node // (grid.tp * grid.cp))
    shards = [None] if data_ranks <= on_a_node or data_ranks % on_a_node or on_a_node == 1 else [None, on_a_node]
    on_host = offload or grid.cpu_offload
    for schedule in schedules:
        found = replace(grid, schedule=schedule, cpu_offload=on_host)
        if "dp_shard" not in fixed and not on_host:
            yield replace(found, strategy=Strategy.ddp)
            if data_ranks > 1 and grid.tp * grid.cp * grid.pp * grid.ep == 1:
                yield replace(found, strategy=Strategy.zero1)
        reshards = (False,) if schedule in V_SHAPED else (True, False)
        for shard in [grid.dp_shard] if "dp_shard" in fixed else shards:
            for reshard in [grid.reshard_after_forward] if "reshard_after_forward" in fixed else reshards:
                if data_ranks * grid.cp > 1 or (on_host and world_size == 1):
                    yield replace(found, strategy=Strategy.fsdp, dp_shard=shard, reshard_after_forward=reshard)


def stages_of_zero(grid: ParallelConfig, fixed: Collection[str], offload: bool) -> Iterator[ParallelConfig]:
    """Every stage of DeepSpeed's; kept on the host the optimizer's state, and where a stage can the parameters too."""
    for stage in [grid.zero_stage] if "zero_stage" in fixed else (0, 1, 2, 3):
        found = replace(grid, strategy=Strategy.deepspeed, zero_stage=stage)
        if not offload:
            yield found
        elif stage:
            yield replace(found, offload_optimizer=True)
            if stage == 3:
                yield replace(found, offload_optimizer=True, offload_parameters=True)


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
