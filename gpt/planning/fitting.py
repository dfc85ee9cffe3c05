"""Which layouts fit in memory, as things are or with more freedom than was typed.

Owns the order of that freedom, the cheapest first: smaller passes, which only make matrices smaller, before the memory
of the host, which is slow. A pass that was typed comes before any other; one that nobody typed is a limit, under which
each layout has the passes that fit. Must not know how fast a layout is, beyond that.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import TypeVar

from gpt.config import TrainConfig
from gpt.planning.candidates import OFFLOADS, Candidate, candidates
from gpt.planning.hardware import Machine
from gpt.planning.memory import Memory, per_rank
from launch.errors import ConfigError

Config = TypeVar("Config", bound=TrainConfig)
MICRO_BATCH = "optim.micro_batch"


@dataclass(frozen=True)
class Freedom:
    """What may differ from what was typed."""

    smaller_passes: bool = False
    """``optim.micro_batch``; the global batch stays."""
    offload: bool = False


ORDER = (Freedom(), Freedom(smaller_passes=True), Freedom(offload=True), Freedom(smaller_passes=True, offload=True))


@dataclass(frozen=True)
class Sized:
    """A possible layout and what it needs."""

    candidate: Candidate
    memory: Memory


@dataclass(frozen=True)
class Sizes:
    """Everything that is possible with some freedom."""

    freedom: Freedom
    fitting: tuple[Sized, ...]
    too_large: tuple[Sized, ...]
    refused: tuple[ConfigError, ...]

    @property
    def least(self) -> Sized | None:
        """Of those that do not fit, the one that takes least of its device."""
        return min(self.too_large, key=lambda one: one.memory.total, default=None)


def sizes(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str]) -> Iterator[Sizes]:
    """What is possible, with more and more freedom; for keys of ``parallel`` that are ``fixed`` there is none, and
    passes are not smaller at once where they are."""
    least = config.optim.micro_batch == 1
    for freedom in ORDER:
        if freedom.offload and not may_offload(machine, fixed):
            continue
        if least if freedom.smaller_passes else not least and MICRO_BATCH not in fixed:
            continue
        yield of_freedom(config, world_size, machine, fixed, freedom)


def can_fit(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str]) -> bool:
    """Whether anything fits with all freedom there is: with passes as typed or of one sequence, which need least."""
    return any(
        fits(one.memory, machine)
        for offload in (False, *([True] if may_offload(machine, fixed) else []))
        for changed in (config, with_passes(config, 1))
        for one in sized(changed, world_size, machine, fixed, Freedom(offload=offload), [])
    )


def may_offload(machine: Machine, fixed: Collection[str]) -> bool:
    """Whether the memory of the host is another one, and what lies there is open."""
    return machine.host is not None and set(OFFLOADS).isdisjoint(fixed)


def of_freedom(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], freedom: Freedom
) -> Sizes:
    """What is possible with as much freedom."""
    refused: list[ConfigError] = []
    parts: tuple[list[Sized], list[Sized]] = ([], [])
    for one in sized(config, world_size, machine, fixed, freedom, refused):
        parts[fits(one.memory, machine)].append(one)
    return Sizes(freedom, tuple(parts[True]), tuple(parts[False]), tuple(refused))


def sized(
    config: TrainConfig,
    world_size: int,
    machine: Machine,
    fixed: Collection[str],
    freedom: Freedom,
    refused: list[ConfigError],
) -> Iterator[Sized]:
    """Every layout that is possible with as much freedom, each with passes of every size; refusals of the passes that
    were typed are added to a list."""
    known = set()
    for changed in [config, *(with_passes(config, size) for size in halves(config.optim.micro_batch, freedom))]:
        found = candidates(changed, world_size, machine.ranks_per_node, fixed, freedom.offload)
        refused += found.refused if changed is config else ()
        for one in found.possible:
            key = f"{one.parallel} {one.batch.micro}"
            if key not in known:  # passes that do not divide a rank's sequences are smaller than was asked for
                known.add(key)
                yield Sized(one, per_rank(replace(changed, parallel=one.parallel), one.layout, one.batch))


def with_passes(config: Config, micro_batch: int) -> Config:
    """The same run with passes of at most so many sequences."""
    return replace(config, optim=replace(config.optim, micro_batch=micro_batch))


def halves(micro_batch: int, freedom: Freedom) -> Iterator[int]:
    """Smaller passes to try, down to one sequence."""
    while freedom.smaller_passes and micro_batch > 1:
        micro_batch //= 2
        yield micro_batch


def fits(memory: Memory, machine: Machine) -> bool:
    """Whether a rank has room for it, on its device and, as far as that is known, on its host."""
    if machine.host is None:  # the same memory
        return memory.total + memory.host <= machine.room
    return memory.total <= machine.room and (machine.host.room is None or memory.host <= machine.host.room)
