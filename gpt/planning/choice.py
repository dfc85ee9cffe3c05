"""The choice of a way to spread a model: of those that fit, the one that an estimate says is fastest.

Owns the order. gpt/planning/fitting.py knows what fits, gpt/planning/left_out.py what to say of the others, and
gpt/planning/refusals.py what to say where there is no choice.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from gpt.config import ParallelConfig, TrainConfig
from gpt.planning.candidates import Candidate
from gpt.planning.cost import Estimate, estimate
from gpt.planning.fitting import Freedom, Sized, Sizes, sizes, with_passes
from gpt.planning.hardware import Machine
from gpt.planning.left_out import left_out
from gpt.planning.memory import Memory
from gpt.planning.refusals import impossible, too_large
from gpt.planning.text import describe
from gpt.topology.batch import Batch
from gpt.topology.dims import Topology

NO_DIFFERENCE = 1.03
"""Estimates whose ratio is less are equal: the plainer layout goes before."""


@dataclass(frozen=True)
class Choice:
    """A layout that fits, and what is expected of it."""

    parallel: ParallelConfig
    layout: Topology
    batch: Batch
    micro_batch: int
    """``optim.micro_batch``: as it was typed, or smaller."""
    memory: Memory
    estimate: Estimate

    def as_dict(self) -> dict[str, object]:
        """What ``plan.json`` holds of it."""
        found = self.estimate
        return {
            "layout": describe(self.parallel, self.layout),
            "micro_batch": self.batch.micro,
            "accumulation": self.batch.accumulation,
            "memory_bytes": self.memory.total,
            "host_bytes": self.memory.host,
            "step_s": found.step_s,
            "tokens_per_s": found.tokens_per_s,
            "compute_s": found.compute_s,
            "idle_s": found.idle_s,
            "communication_s": found.communication_s,
        }


@dataclass(frozen=True)
class Chosen:
    """What there was to choose from."""

    choices: tuple[Choice, ...]
    """The layouts that fit, best first."""
    left_out: tuple[str, ...]
    """Of the others, and of what it took to fit, in words: a line each."""


def choose(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str] = ()) -> Chosen:
    """The layouts that fit, best first: as typed, or where nothing does with more freedom.

    Args:
        config: of the run, with ``parallel.strategy=auto``.
        world_size: ranks.
        machine: what they run on.
        fixed: keys of ``parallel`` that were typed, and are kept; ``optim.micro_batch``, where it was typed too.

    Raises:
        ConfigError: none is possible, or none fits.
    """
    tried: list[Sizes] = []
    for found in sizes(config, world_size, machine, fixed):
        tried.append(found)
        if found.fitting:
            pairs = [(one.candidate, choice(config, found.freedom, one, machine)) for one in found.fitting]
            return Chosen(in_order(pairs), tuple(left_out(config, world_size, machine, fixed, tried)))
    if all(not found.too_large for found in tried):
        raise impossible(config, world_size, fixed)
    raise too_large(config, world_size, machine, fixed, tried)


def choice(config: TrainConfig, freedom: Freedom, sized: Sized, machine: Machine) -> Choice:
    """What is expected of a candidate that fits with some freedom."""
    one = sized.candidate
    micro_batch = one.batch.micro if freedom.smaller_passes else config.optim.micro_batch
    chosen = replace(with_passes(config, micro_batch), parallel=one.parallel)
    expected = estimate(chosen, one.layout, one.batch, machine)
    return Choice(one.parallel, one.layout, one.batch, micro_batch, sized.memory, expected)


def in_order(found: Sequence[tuple[Candidate, Choice]]) -> tuple[Choice, ...]:
    """Fastest first; but of those that are hardly slower than the fastest, plainest first. Each layout once, with the
    passes that are best for it."""
    limit = NO_DIFFERENCE * min(choice.estimate.step_s for _, choice in found)

    def key(pair: tuple[Candidate, Choice]) -> tuple[object, ...]:
        one, choice = pair
        step_s = choice.estimate.step_s
        return (step_s > limit, *((step_s,) if step_s > limit else ()), one.plainness, step_s, str(choice))

    ordered = [choice for _, choice in sorted(found, key=key)]
    first = {str(choice.parallel): choice for choice in reversed(ordered)}
    return tuple(choice for choice in ordered if first[str(choice.parallel)] is choice)
