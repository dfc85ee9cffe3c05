"""The choice of a way to spread a model: of those that fit, the one that an estimate says is fastest.

Owns the order, and what is said where nothing fits.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from gpt.accounting.memory import GIB, Memory, per_rank
from gpt.batch import cut
from gpt.compose import plain
from gpt.composition import lay_out
from gpt.config import ParallelConfig, Recompute, Strategy, TrainConfig
from gpt.errors import ConfigError
from gpt.planning.candidates import Candidate, candidates
from gpt.planning.cost import Estimate, estimate
from gpt.planning.machine import Machine
from gpt.topology import Topology

NO_DIFFERENCE = 1.03
"""Estimates whose ratio is less are equal: the plainer layout goes before."""


@dataclass(frozen=True)
class Choice:
    """A layout that fits, and what is expected of it."""

    parallel: ParallelConfig
    layout: Topology
    memory: Memory
    estimate: Estimate

    def as_dict(self) -> dict[str, object]:
        """What ``plan.json`` holds of it."""
        found = self.estimate
        return {
            "layout": describe(self.parallel, self.layout),
            "memory_bytes": self.memory.total,
            "step_s": found.step_s,
            "tokens_per_s": found.tokens_per_s,
            "compute_s": found.compute_s,
            "idle_s": found.idle_s,
            "communication_s": found.communication_s,
        }


def describe(parallel: ParallelConfig, layout: Topology) -> str:
    """The layout in words, with what its grid does not say."""
    words = [str(layout)]
    if layout.pp > 1:
        words.append(parallel.schedule.name)
    if layout.is_sharded and not parallel.reshard_after_forward:
        words.append("reshard_after_forward=false")
    return " ".join(words)


def choose(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str] = ()) -> list[Choice]:
    """The layouts that fit, best first.

    Args:
        config: of the run, with ``parallel.strategy=auto``.
        world_size: ranks.
        machine: what they run on.
        fixed: keys of ``parallel`` that were typed, and are kept.

    Raises:
        ConfigError: none is possible, or none fits.
    """
    possible = list(candidates(config, world_size, machine.ranks_per_node, fixed))
    if not possible:
        raise impossible(config, world_size, fixed)
    sizes = [(one, per_rank(replace(config, parallel=one.parallel), one.layout, one.batch)) for one in possible]
    fitting = [(one, memory) for one, memory in sizes if memory.total <= machine.room]
    if not fitting:
        least = min(sizes, key=lambda pair: pair[1].total)
        raise too_large(config, world_size, machine, fixed, *least)
    return in_order([(one, choice(config, one, memory, machine)) for one, memory in fitting])


def choice(config: TrainConfig, one: Candidate, memory: Memory, machine: Machine) -> Choice:
    """What is expected of a candidate."""
    chosen = replace(config, parallel=one.parallel)
    return Choice(one.parallel, one.layout, memory, estimate(chosen, one.layout, one.batch, machine))


def in_order(found: Sequence[tuple[Candidate, Choice]]) -> list[Choice]:
    """Fastest first; but of those that are hardly slower than the fastest, plainest first."""
    limit = NO_DIFFERENCE * min(choice.estimate.step_s for _, choice in found)

    def key(pair: tuple[Candidate, Choice]) -> tuple[object, ...]:
        one, choice = pair
        step_s = choice.estimate.step_s
        return (step_s > limit, *((step_s,) if step_s > limit else ()), one.plainness, step_s, str(choice))

    return [choice for _, choice in sorted(found, key=key)]


def impossible(config: TrainConfig, world_size: int, fixed: Collection[str]) -> ConfigError:
    """The refusal where nothing can be laid out: that of the plainest layout."""
    given = config.parallel
    kept = " ".join(f"parallel.{key}={plain(getattr(given, key))}" for key in sorted(fixed))
    try:
        plainest = replace(given, strategy=Strategy.ddp)
        cut(config.optim, lay_out(replace(config, parallel=plainest), world_size).data_ranks)
    except ConfigError as error:
        return error
    return ConfigError(
        f"parallel.strategy=auto {kept} on {world_size} ranks: no layout is possible",
        "fewer keys of parallel that are given",
        "parallel=auto",
    )


def too_large(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], least: Candidate, memory: Memory
) -> ConfigError:
    """The refusal where nothing fits, with the first of the usual remedies that would help."""
    fix = next(remedies(config, world_size, machine, fixed), "a smaller model, or a smaller model.block_size")
    return ConfigError(
        f"parallel.strategy=auto on {world_size} ranks: the layout that needs least, "
        f"{describe(least.parallel, least.layout)}, needs {memory.total_gib:.2f} GiB on each",
        f"at most {machine.room / GIB:.2f} GiB, the part of {machine.device} that tensors may take",
        fix,
    )


def remedies(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str]) -> Iterator[str]:
    """What to type for a run that fits, the least change first."""
    changes: list[tuple[str, TrainConfig]] = []
    if config.recompute is Recompute.none:
        changes.append(("recompute=selective", replace(config, recompute=Recompute.selective)))
    if config.recompute is not Recompute.full:
        changes.append(("recompute=full", replace(config, recompute=Recompute.full)))
    small = replace(config, optim=replace(config.optim, micro_batch=1), recompute=Recompute.full)
    changes.append(("recompute=full optim.micro_batch=1", small))
    nodes = -(-world_size // machine.ranks_per_node)
    for times in (1, 2, 4, 8, 16, 32, 64):
        for words, changed in changes if times == 1 else [("", config), *changes]:
            ranks = times * world_size
            if any(
                per_rank(replace(changed, parallel=one.parallel), one.layout, one.batch).total <= machine.room
                for one in candidates(changed, ranks, machine.ranks_per_node, fixed)
            ):
                yield " ".join([*([f"nodes={times * nodes}"] if times > 1 else []), *([words] if words else [])])
