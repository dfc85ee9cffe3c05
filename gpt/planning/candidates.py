"""The ways of spreading a model that there are to choose from.

Owns the search: every size of every dimension that gpt/composition.py does not refuse, for the strategies of torch.
DeepSpeed shares the same things by other means, and is chosen by name. Must not know what a layout costs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace

from gpt.batch import Batch, cut
from gpt.composition import lay_out
from gpt.config import Ffn, ParallelConfig, Schedule, Strategy, TrainConfig
from gpt.errors import ConfigError
from gpt.topology import Topology

SCHEDULES = (Schedule["1f1b"], Schedule.interleaved, Schedule.zbv)
"""Of schedules that idle equally long, the one that keeps fewer activations."""


@dataclass(frozen=True)
class Candidate:
    """A layout that is possible."""

    parallel: ParallelConfig
    layout: Topology
    batch: Batch

    @property
    def plainness(self) -> tuple[int, int, int, int]:
        """How little there is to it, to be compared; the plainest is the smallest."""
        dimensions = [getattr(self.layout, name) for name in ("pp", "cp", "ep", "tp")]
        strategies = [Strategy.ddp, Strategy.zero1, Strategy.fsdp]
        copies = self.layout.is_sharded and self.layout.dp_replicate > 1
        return (
            sum(size > 1 for size in dimensions),
            strategies.index(self.parallel.strategy) + copies,
            max(dimensions),
            not self.parallel.reshard_after_forward,
        )


def candidates(
    config: TrainConfig, world_size: int, ranks_per_node: int, fixed: Collection[str] = ()
) -> Iterator[Candidate]:
    """Everything that is possible on ``world_size`` ranks.

    Args:
        config: of the run; its ``parallel`` says what is ``fixed``.
        world_size: ranks.
        ranks_per_node: ranks of a node. Tensor parallelism does not leave it, since every layer waits for it.
        fixed: keys of ``parallel`` that are not to be chosen.
    """
    for parallel in grids(config, world_size, ranks_per_node, fixed):
        chosen = replace(config, parallel=parallel)
        try:
            parallel.validate()
            layout = lay_out(chosen, world_size)
            yield Candidate(parallel, layout, cut(config.optim, layout.data_ranks))
        except ConfigError:
            continue


def grids(
    config: TrainConfig, world_size: int, ranks_per_node: int, fixed: Collection[str]
) -> Iterator[ParallelConfig]:
    """Every combination of what is not fixed, possible or not."""
    given = config.parallel

    def sizes(key: str, most: int) -> list[int]:
        return [getattr(given, key)] if key in fixed else divisors(most)

    experts = config.model.n_expert if config.model.ffn is Ffn.moe else 1
    for tp in sizes("tp", ranks_per_node):
        for cp in sizes("cp", world_size // tp):
            for pp in sizes("pp", world_size // tp // cp):
                if world_size % (tp * cp * pp):
                    continue
                for ep in sizes("ep", experts):
                    grid = replace(given, tp=tp, cp=cp, pp=pp, ep=ep)
                    yield from strategies(grid, world_size, ranks_per_node, fixed)


def strategies(
    grid: ParallelConfig, world_size: int, ranks_per_node: int, fixed: Collection[str]
) -> Iterator[ParallelConfig]:
    """Every schedule, and every way for the data ranks of a grid to share a model."""
    schedules = SCHEDULES if grid.pp > 1 and "schedule" not in fixed else (grid.schedule,)
    data_ranks = world_size // (grid.tp * grid.cp * grid.pp)
    on_a_node = max(1, ranks_per_node // (grid.tp * grid.cp))
    shards = [None] if data_ranks <= on_a_node or data_ranks % on_a_node or on_a_node == 1 else [None, on_a_node]
    for schedule in schedules:
        found = replace(grid, schedule=schedule)
        if "dp_shard" not in fixed:
            yield replace(found, strategy=Strategy.ddp)
            if data_ranks > 1:
                yield replace(found, strategy=Strategy.zero1)
        for shard in [grid.dp_shard] if "dp_shard" in fixed else shards:
            for reshard in [grid.reshard_after_forward] if "reshard_after_forward" in fixed else (True, False):
                if data_ranks * grid.cp > 1:
                    yield replace(found, strategy=Strategy.fsdp, dp_shard=shard, reshard_after_forward=reshard)


def divisors(number: int) -> list[int]:
    """All of them, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]
