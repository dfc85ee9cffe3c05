"""Search for parallel layouts that are valid and fit into memory, and messages about its result. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gpt.accounting import GIB
from gpt.config import Ffn, ParallelConfig, Recompute, Schedule, Strategy, TrainConfig
from gpt.config.rules import divisors
from gpt.planning import Machine
from gpt.planning.memory import RankMemory, per_rank
from gpt.topology import Batch, ParallelDims, split_batch
from gpt.topology.check_dims import check_parallel_dims
from gpt.topology.schedules import V_SHAPED
from launch.errors import ConfigError, counted
from launch.runs.compose import plain

# Search of the valid parallel layouts, and of those that fit in memory.
#
# ``candidates`` enumerates every degree of every dimension that gpt/topology/check_dims.py accepts, for the strategies
# of torch. ``LayoutSearch`` keeps those that fit: on the devices alone, or else with CPU offload.


SCHEDULES = (Schedule["1f1b"], Schedule.interleaved, Schedule.zbv)
"""Pipeline schedules that are tried. Of schedules with equal bubbles, the list has only the one that keeps the fewest
activations."""


@dataclass(frozen=True)
class Candidate:
    """A valid layout, with the memory of the rank that needs most."""

    parallel: ParallelConfig
    dims: ParallelDims
    batch: Batch
    memory: RankMemory

    @property
    def plainness(self) -> tuple[int, ...]:
        """Sort key: the plainest layout has the smallest key.

        A plain layout has few parallel dimensions, little sharding and no offload. Of equally plain layouts, the one
        with the largest micro-batches has the smallest key.
        """
        dimensions = [getattr(self.dims, name) for name in ("pp", "cp", "ep", "tp")]
        strategies = [Strategy.ddp, Strategy.zero1, Strategy.fsdp]
        return (
            sum(size > 1 for size in dimensions),
            strategies.index(self.parallel.strategy) + (self.dims.strategy == "hsdp"),
            max(dimensions),
            self.parallel.cpu_offload,
            not self.parallel.reshard_after_forward,
            -self.batch.micro,
        )


def candidates(
    config: TrainConfig,
    world_size: int,
    ranks_per_node: int,
    fixed: Collection[str] = (),
    offload: bool = False,
) -> Iterator[Candidate]:
    """Yield the valid layouts on ``world_size`` ranks.

    Args:
        config: config of the run.
        world_size: number of ranks.
        ranks_per_node: number of ranks of a node. Larger degrees of tensor parallelism are not tried, because every
            layer waits for the collectives of tensor parallelism, and between nodes these are slow.
        fixed: keys of ``parallel`` that keep the values of ``config``.
        offload: True for layouts with CPU offload, False for those without.
    """
    for parallel in parallel_configs(config, world_size, ranks_per_node, fixed, offload):
        chosen = replace(config, parallel=parallel)
        try:
            parallel.validate()
            dims = check_parallel_dims(chosen, world_size)
            batch = split_batch(config.optim, dims.data_ranks)
        except ConfigError:
            continue
        yield Candidate(parallel, dims, batch, per_rank(chosen, dims, batch))


def parallel_configs(
    config: TrainConfig, world_size: int, ranks_per_node: int, fixed: Collection[str], offload: bool
) -> Iterator[ParallelConfig]:
    """Yield configs of ``parallel`` with every combination of values of the keys that are not ``fixed``, also invalid
    combinations. The arguments are those of ``candidates``."""
    given = config.parallel

    def sizes(key: str, most: int) -> list[int]:
        return [getattr(given, key)] if key in fixed else divisors(most)

    experts = config.model.n_expert if config.model.ffn is Ffn.moe else 1
    for tp in sizes("tp", ranks_per_node):
        for cp in sizes("cp", world_size // tp):
            for pp in sizes("pp", world_size // tp // cp):
                if world_size % (tp * cp * pp):
                    continue
                for ep in sizes("ep", math.gcd(experts, world_size // (tp * cp * pp))):
                    base = replace(given, tp=tp, cp=cp, pp=pp, ep=ep)
                    yield from torch_configs(base, world_size, ranks_per_node, fixed, offload)


def torch_configs(
    base: ParallelConfig, world_size: int, ranks_per_node: int, fixed: Collection[str], offload: bool
) -> Iterator[ParallelConfig]:
    """Yield ``base`` with every pipeline schedule and every strategy of torch (ddp, zero1, fsdp, hsdp) that is possible
    with the other keys.

    The degrees tp, cp, pp and ep stay those of ``base``; ``schedule``, ``dp_shard`` and ``reshard_after_forward`` stay
    if they are in ``fixed``. If ``offload`` is True or ``base`` uses CPU offload, all configs use it, and the
    strategies are fsdp and hsdp only.
    """
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


def with_micro_batch(config: TrainConfig, micro_batch: int) -> TrainConfig:
    """Return the config with micro-batches of at most ``micro_batch`` sequences."""
    return replace(config, optim=replace(config.optim, max_micro_batch=micro_batch))


@dataclass(frozen=True)
class SearchResult:
    """Valid layouts, either all without or all with CPU offload."""

    offload: bool
    """True for layouts with CPU offload."""
    fitting: tuple[Candidate, ...]
    """Layouts that fit into memory."""
    too_large: tuple[Candidate, ...]
    """Layouts that do not fit into memory."""


@dataclass(frozen=True)
class LayoutSearch:
    """Search for the layouts of a run that fit into memory, and text on its result."""

    config: TrainConfig
    world_size: int
    machine: Machine
    fixed: Collection[str] = ()
    """Keys of ``parallel`` on the command line, which keep the values of ``config``."""

    def results(self) -> Iterator[SearchResult]:
        """Yield the result of the search without CPU offload, and then that with CPU offload if ``offloads`` has
        True."""
        for offload in self.offloads:
            found = list(self.layouts(offload))
            fitting = tuple(one for one in found if self.fits(one))
            yield SearchResult(offload, fitting, tuple(one for one in found if not self.fits(one)))

    def layouts(self, offload: bool) -> Iterator[Candidate]:
        """Yield every valid layout with several sizes of micro-batches, up to ``optim.max_micro_batch`` sequences.
        ``offload`` as in ``candidates``."""
        known, micro_batch = set(), self.config.optim.max_micro_batch
        while micro_batch:
            for one in self.of_micro_batch(micro_batch, offload):
                key = f"{one.parallel} {one.batch.micro}"
                if key not in known:  # split_batch rounds down to a divisor, so sizes repeat
                    known.add(key)
                    yield one
            micro_batch //= 2

    def of_micro_batch(self, micro_batch: int, offload: bool) -> Iterator[Candidate]:
        """Yield every valid layout with micro-batches of at most ``micro_batch`` sequences. ``offload`` as in
        ``candidates``."""
        config = with_micro_batch(self.config, micro_batch)
        return candidates(config, self.world_size, self.machine.ranks_per_node, self.fixed, offload)

    def fits(self, one: Candidate) -> bool:
        """Return True if a layout fits into the memory of a rank's device, and into host memory if that is known."""
        memory, machine = one.memory, self.machine
        if machine.host is None:  # device and host memory are the same
            return memory.total + memory.host <= machine.room
        return memory.total <= machine.room and (machine.host.room is None or memory.host <= machine.host.room)

    @property
    def offloads(self) -> tuple[bool, ...]:
        """Values of ``offload`` to search: False, and also True if devices have their own memory and the command line
        does not set ``parallel.cpu_offload``."""
        return (False,) if self.machine.host is None or "cpu_offload" in self.fixed else (False, True)

    @property
    def can_fit(self) -> bool:
        """True if at least one layout fits into memory. Only two sizes of micro-batches are tried: the largest, and one
        sequence."""
        sizes = (self.config.optim.max_micro_batch, 1)
        return any(
            self.fits(one) for offload in self.offloads for size in sizes for one in self.of_micro_batch(size, offload)
        )

    def with_more_recompute(self) -> Iterator[tuple[str, LayoutSearch]]:
        """Yield a pair for each value of ``recompute`` that recomputes more than the value in ``config``. The pair has
        the override, such as ``recompute=full``, and a search with this override. The least recomputation is first."""
        order = [Recompute.none, Recompute.selective, Recompute.full]
        for more in order[order.index(self.config.recompute) + 1 :]:
            yield f"recompute={more.name}", replace(self, config=replace(self.config, recompute=more))

    def explain(self, tried: Sequence[SearchResult]) -> Iterator[str]:
        """Yield lines of text for a plan: on CPU offload, if it is used, and on layouts that do not fit.

        ``tried`` has the results of the search, of which the last one has layouts that fit.
        """
        last = tried[-1]
        if last.offload:
            why = f"nothing fits ({self.nearest(tried[0])})" if tried[0].too_large else "no layout is valid"
            yield f"CPU offload, which is slow: on the devices alone {why}"
            for text, changed in self.with_more_recompute():
                if next(changed.results()).fitting:
                    yield f"{text} would fit without that"
                    break
        if last.too_large:
            yield f"left out: {len(last.too_large)} that do not fit ({self.nearest(last)})"

    def nearest(self, *found: SearchResult) -> str:
        """Return text on one of the layouts in ``found`` that do not fit: the one that needs the least memory of a
        device. The text also has the memory that is available."""
        too_large = [one for result in found for one in result.too_large]
        one, machine = min(too_large, key=lambda one: one.memory.total), self.machine
        host = ""
        if one.memory.host and machine.host is not None:
            room = "" if machine.host.room is None else f" of {machine.host.room / GIB:.3g}"
            host = f", and {one.memory.host / GIB:.3g}{room} GiB of host memory"
        return (
            f"nearest: {layout_text(one.parallel, one.dims)} with micro-batches of {one.batch.micro}, "
            f"{one.memory.total_gib:.3g} of {machine.room / GIB:.3g} GiB{host}"
        )

    def no_layout_error(self) -> ConfigError:
        """Return the error for a search that has found no valid layout.

        If the config with ``parallel.strategy=ddp`` is invalid, its error is returned. Otherwise the error names the
        keys in ``fixed``.
        """
        given = self.config.parallel
        plainest = replace(given, strategy=Strategy.ddp)
        try:
            plainest.validate()
            dims = check_parallel_dims(replace(self.config, parallel=plainest), self.world_size)
            split_batch(self.config.optim, dims.data_ranks)
        except ConfigError as error:
            return error
        kept = " ".join(f"parallel.{key}={plain(getattr(given, key))}" for key in sorted(self.fixed))
        return ConfigError(
            f"parallel.strategy=auto {kept} on {self.world_size} ranks: no layout is valid",
            "fewer keys of parallel that are given",
            "parallel=auto",
        )

    def out_of_memory_error(self, tried: Sequence[SearchResult]) -> ConfigError:
        """Return the error for a search in which no layout fits into memory. The error proposes the result of
        ``remedy``, with which a layout fits, or else a smaller model. ``tried`` has the results of the search."""
        machine = self.machine
        host = machine.host if tried[-1].offload else None
        there = f" and {host.room / GIB:.2f} GiB of host memory" if host is not None and host.room is not None else ""
        return ConfigError(
            f"parallel.strategy=auto on {counted(self.world_size, 'rank')}: nothing fits ({self.nearest(*tried)})",
            f"at most {machine.room / GIB:.2f} GiB{there}, the part of {machine.device} that tensors may take",
            self.remedy() or "a smaller model, or a smaller model.block_size",
        )

    def remedy(self) -> str | None:
        """Return overrides with which a layout fits, as text: more recomputation, more nodes, or both. None if no such
        change is enough."""
        nodes = -(-self.world_size // self.machine.ranks_per_node)
        options = [("", self), *self.with_more_recompute()]
        for times in (1, 2, 4, 8, 16, 32, 64):
            larger = [(text, replace(one, world_size=times * self.world_size)) for text, one in options]
            if not larger[-1][1].can_fit:  # no layout needs less memory
                continue
            more = f"nodes={times * nodes}" if times > 1 else ""
            for text, one in larger:
                if (text or more) and one.can_fit:
                    return " ".join(filter(None, (more, text)))
        return None


def layout_text(parallel: ParallelConfig, dims: ParallelDims) -> str:
    """Return a layout as text: its dimensions, schedule, resharding and offload."""
    text = [str(dims)]
    if dims.pp > 1:
        text.append(parallel.schedule.name)
    if dims.is_sharded and not parallel.reshard_after_forward:
        text.append("reshard_after_forward=false")
    return " ".join([*text, *(["cpu_offload=true"] if parallel.cpu_offload else [])])


def table(choices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line of text for each layout. ``choices`` are results of ``LayoutChoice.as_dict``, best first."""
    batches = [
        f"{n} micro-batch{'es' if n > 1 else ''} of {c['micro_batch']}" for c in choices for n in [c["accumulation"]]
    ]
    width = max((len(choice["layout"]) for choice in choices), default=0)
    num_width = max(map(len, batches), default=0)
    for number, (choice, batch) in enumerate(zip(choices, batches, strict=True), start=1):
        step_s = choice["step_s"]
        sent = {name: s for name, s in choice["communication_s"].items() if s >= 0.001 * step_s}
        shares = "".join(f", {name} {s / step_s:.1%}" for name, s in sent.items())
        host = f" and {choice['host_bytes'] / GIB:.3g} GiB of host memory" if choice["host_bytes"] else ""
        yield (
            f"{number}. {choice['layout']:<{width}}  {batch:>{num_width}}, "
            f"{choice['memory_bytes'] / GIB:.3g} GiB{host}, "
            f"{f'{step_s * 1e3:.3g} ms' if step_s < 1 else f'{step_s:.3g} s'} a step, "
            f"{choice['tokens_per_s']:,.0f} tokens/s; bubble {choice['idle_s'] / step_s:.1%}, "
            f"communication {sum(sent.values()) / step_s:.1%}{shares and f' ({shares[2:]})'}"
        )
