"""Search of the layouts that are valid and fit in memory, and texts about them. Imports no torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from gpt.accounting import GIB
from gpt.config import EngineKind, Ffn, ParallelConfig, Recompute, Schedule, Strategy, TrainConfig
from gpt.config.rules import divisors
from gpt.planning.devices import Machine
from gpt.planning.memory import RankMemory, per_rank
from gpt.topology import Batch, ParallelDims, split_batch
from gpt.topology.check_dims import check_parallel_dims
from gpt.topology.schedules import V_SHAPED
from launch.errors import ConfigError
from launch.runs.compose import plain

# Search of the valid parallel layouts, and of those that fit in memory.
#
# ``candidates`` enumerates every degree of every dimension that gpt/topology/check_dims.py accepts, for the strategies
# of one engine. ``LayoutSearch`` keeps those that fit. It relaxes the config step by step: smaller micro-batches, CPU
# offload.


SCHEDULES = (Schedule["1f1b"], Schedule.interleaved, Schedule.zbv)
"""Schedules to consider. Of schedules with equal bubbles, only the one with the fewest activations is in the list."""
OFFLOADS = ("cpu_offload", "offload_optimizer", "offload_parameters")
"""Keys of ``parallel`` that offload tensors to host memory."""


@dataclass(frozen=True)
class Candidate:
    """Valid layout, and its memory per rank."""

    parallel: ParallelConfig
    dims: ParallelDims
    batch: Batch
    memory: RankMemory

    @property
    def plainness(self) -> tuple[int, ...]:
        """Sort key: the plainest layout has the smallest key.

        Plain means few parallel dimensions, little sharding and no offload. Of equally plain layouts, the one with
        the largest micro-batches has the smallest key.
        """
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
        config: config of the run; its ``parallel`` has the values of ``fixed`` keys.
        world_size: number of ranks.
        ranks_per_node: ranks of a node. Tensor parallelism stays within a node, because every layer waits for it.
        fixed: keys of ``parallel`` that never change.
        offload: True to enumerate layouts with CPU offload instead.
        refused: list to which the errors of invalid layouts are appended.
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
    cuts_others = given.engine is not EngineKind.deepspeed  # DeepSpeed's pipeline is used only if requested

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
    """Yield every ZeRO stage of DeepSpeed. ``offload`` offloads the optimizer state, and in stage 3 also the
    parameters."""
    for stage in [base.zero_stage] if "zero_stage" in fixed else (0, 1, 2, 3):
        found = replace(base, strategy=Strategy.deepspeed, zero_stage=stage)
        if not offload:
            yield found
        elif stage:
            yield replace(found, offload_optimizer=True)
            if stage == 3:
                yield replace(found, offload_optimizer=True, offload_parameters=True)


MICRO_BATCH = "optim.max_micro_batch"
Config = TypeVar("Config", bound=TrainConfig)


def with_micro_batch(config: Config, micro_batch: int) -> Config:
    """Return the config with micro-batches of at most ``micro_batch`` sequences."""
    return replace(config, optim=replace(config.optim, max_micro_batch=micro_batch))


@dataclass(frozen=True)
class Relaxation:
    """Changes to the typed config that a search may make so that a layout fits."""

    smaller_micro_batch: bool = False
    """Reduce ``optim.max_micro_batch``; the global batch stays the same."""
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
        """Layout with the least device memory, of those that do not fit; None without such a layout."""
        return min(self.too_large, key=lambda one: one.memory.total, default=None)


REASONS = 3
"""Number of shown reasons for invalid layouts, the most frequent first."""


@dataclass(frozen=True)
class LayoutSearch:
    """Search of the layouts that fit. Its texts report every change of the config and every excluded layout."""

    config: TrainConfig
    world_size: int
    machine: Machine
    fixed: Collection[str] = ()
    """Keys of ``parallel`` that the user typed, and ``optim.max_micro_batch`` if typed. They never change."""

    def results(self) -> Iterator[SearchResult]:
        """Yield the valid layouts: first as typed, then with smaller micro-batches, with CPU offload, and with both.

        Unless ``optim.max_micro_batch`` is typed, the first search already tries all sizes of micro-batches, because
        they only cost speed.
        """
        least = self.config.optim.max_micro_batch == 1
        for relaxation in RELAXATIONS:
            if relaxation.offload and not self.may_offload:
                continue
            if least if relaxation.smaller_micro_batch else not least and MICRO_BATCH not in self.fixed:
                continue
            refused: list[ConfigError] = []
            found = list(self.layouts(relaxation, refused))
            fitting = tuple(one for one in found if self.fits(one))
            too_large = tuple(one for one in found if not self.fits(one))
            yield SearchResult(relaxation, fitting, too_large, tuple(refused))

    def layouts(self, relaxation: Relaxation, refused: list[ConfigError]) -> Iterator[Candidate]:
        """Yield every valid layout under a relaxation, with every micro-batch that the relaxation allows.

        Errors for the typed micro-batch are appended to ``refused``.
        """
        known, micro_batch = set(), self.config.optim.max_micro_batch
        changed, refusals = self.config, refused
        while True:
            ranks = self.world_size, self.machine.ranks_per_node
            for one in candidates(changed, *ranks, self.fixed, relaxation.offload, refusals):
                key = f"{one.parallel} {one.batch.micro}"
                if key not in known:  # split_batch rounds down to a divisor, so sizes repeat
                    known.add(key)
                    yield one
            micro_batch //= 2
            if not relaxation.smaller_micro_batch or not micro_batch:
                return
            changed, refusals = with_micro_batch(self.config, micro_batch), []

    def fits(self, one: Candidate) -> bool:
        """True if the layout fits into a rank's device memory and, as far as known, into host memory."""
        memory, machine = one.memory, self.machine
        if machine.host is None:  # device and host memory are the same
            return memory.total + memory.host <= machine.room
        return memory.total <= machine.room and (machine.host.room is None or memory.host <= machine.host.room)

    @property
    def may_offload(self) -> bool:
        """True if the machine has host memory apart from its devices', and no offload key was typed."""
        return self.machine.host is not None and set(OFFLOADS).isdisjoint(self.fixed)

    @property
    def can_fit(self) -> bool:
        """True if any layout fits under any relaxation, with micro-batches as typed or of one sequence."""
        return any(
            self.fits(one)
            for offload in (False, *([True] if self.may_offload else []))
            for changed in (self, replace(self, config=with_micro_batch(self.config, 1)))
            for one in changed.layouts(Relaxation(offload=offload), [])
        )

    def with_more_recompute(self) -> Iterator[tuple[str, LayoutSearch]]:
        """Yield for every stronger recomputation its override and the search for the run with it."""
        order = [Recompute.none, Recompute.selective, Recompute.full]
        for more in order[order.index(self.config.recompute) + 1 :]:
            yield f"recompute={more.name}", replace(self, config=replace(self.config, recompute=more))

    def explain(self, tried: Sequence[SearchResult]) -> Iterator[str]:
        """Yield lines of text on relaxations and excluded layouts. The last search in ``tried`` found a layout."""
        last, known = tried[-1], {found.relaxation: found for found in tried}
        without = known.get(replace(last.relaxation, smaller_micro_batch=False))
        if last.relaxation.smaller_micro_batch and without:
            yield (
                f"smaller micro-batches, and more of them for the same global batch: with optim.max_micro_batch="
                f"{self.config.optim.max_micro_batch} {self.failure(without)}"
            )
        if last.relaxation.offload:
            without = known.get(Relaxation(smaller_micro_batch=True)) or known[Relaxation()]
            yield f"CPU offload, which is slow: on the devices alone {self.failure(without)}"
        if len(tried) > 1 and (text := self.sufficient_recompute(last.relaxation)):
            yield f"{text} would fit without that"
        if last.too_large:
            yield f"left out: {len(last.too_large)} that do not fit ({self.nearest(last)})"
        yield from refusal_lines(last)
        yield f"not considered: {'; '.join(self.unexplored(last.relaxation))}"

    def sufficient_recompute(self, relaxation: Relaxation) -> str | None:
        """Return the override of ``recompute`` with which a layout fits under less relaxation; None if none does."""
        for text, changed in self.with_more_recompute():
            for found in changed.results():
                if RELAXATIONS.index(found.relaxation) >= RELAXATIONS.index(relaxation):
                    break
                if found.fitting:
                    return text
        return None

    def failure(self, found: SearchResult) -> str:
        """Return the reason why a search found no layout that fits."""
        return f"nothing fits ({self.nearest(found)})" if found.too_large else "no layout is valid"

    def nearest(self, found: SearchResult) -> str:
        """Describe the layout that comes nearest to fitting, with its required and the available memory."""
        one, host, machine = found.least, "", self.machine
        assert one is not None
        if one.memory.host and machine.host is not None:
            room = "" if machine.host.room is None else f" of {machine.host.room / GIB:.3g}"
            host = f", and {one.memory.host / GIB:.3g}{room} GiB of host memory"
        return (
            f"nearest: {layout_text(one.parallel, one.dims)} with micro-batches of {one.batch.micro}, "
            f"{one.memory.total_gib:.3g} of {machine.room / GIB:.3g} GiB{host}"
        )

    def unexplored(self, relaxation: Relaxation) -> Iterator[str]:
        """Yield texts on kinds of layouts that the search did not try, with the keys that would include them."""
        if self.config.parallel.engine is EngineKind.deepspeed:
            yield "torch's strategies (parallel.engine=native)"
            if "pp" not in self.fixed:
                yield "DeepSpeed's pipeline (parallel.pp=2)"
        else:
            yield "DeepSpeed's ZeRO stages (parallel.engine=deepspeed)"
        smaller = self.config.optim.max_micro_batch > 1 and not relaxation.smaller_micro_batch
        ways = ["smaller micro-batches"] if smaller and not relaxation.offload else []
        ways += ["CPU offload"] if self.may_offload and not relaxation.offload else []
        if ways:
            yield f"{' and '.join(ways)}, only where nothing fits otherwise"

    def no_layout_error(self) -> ConfigError:
        """Return the error for a search without valid layouts: that of the plainest layout."""
        given = self.config.parallel
        plainest = replace(given, strategy=Strategy.ddp)
        if given.engine is EngineKind.deepspeed:
            plainest = replace(given, strategy=Strategy.deepspeed, zero_stage=given.zero_stage or 0)
        try:
            plainest.validate()
            dims = check_parallel_dims(replace(self.config, parallel=plainest), self.world_size)
            split_batch(self.config.optim, dims.data_ranks)
        except ConfigError as error:
            return error
        keys = sorted({*self.fixed} - {MICRO_BATCH})
        kept = " ".join(f"parallel.{key}={plain(getattr(given, key))}" for key in keys)
        return ConfigError(
            f"parallel.strategy=auto {kept} on {self.world_size} ranks: no layout is valid",
            "fewer keys of parallel that are given",
            "parallel=auto",
        )

    def out_of_memory_error(self, tried: Sequence[SearchResult]) -> ConfigError:
        """Return the error for a search in which no layout fits, with the least change that would help."""
        least = min((found.least for found in tried if found.least), key=lambda one: one.memory.total)
        machine, host, there = self.machine, "", ""
        if least.memory.host:
            host = f", and {least.memory.host / GIB:.2f} GiB of host memory"
            there = (
                f" and {machine.host.room / GIB:.2f} GiB of host memory" if machine.host and machine.host.room else ""
            )
        return ConfigError(
            f"parallel.strategy=auto on {self.world_size} rank{'s' if self.world_size > 1 else ''}: the layout that "
            f"needs least, {layout_text(least.parallel, least.dims)} with micro-batches of {least.batch.micro}, needs "
            f"{least.memory.total_gib:.2f} GiB on each{host}",
            f"at most {machine.room / GIB:.2f} GiB{there}, the part of {machine.device} that tensors may take",
            self.remedy() or "a smaller model, or a smaller model.block_size",
        )

    def remedy(self) -> str | None:
        """Return the overrides that make the run fit with the least change; None if no tried change is enough."""
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


def refusal_lines(found: SearchResult) -> Iterator[str]:
    """Yield lines on invalid layouts, the most frequent reasons first, each with an example."""
    if not found.refused:
        return
    counts = Counter(error.expected for error in found.refused)
    examples = {error.expected: error.found for error in reversed(found.refused)}
    shown = counts.most_common(REASONS)
    rest = len(found.refused) - sum(number for _, number in shown)
    yield f"refused: {len(found.refused)} invalid layouts{f', {rest} of them not shown here' if rest else ''}"
    for reason, number in shown:
        yield f"  {number} like {examples[reason]}; expected: {reason}"


def layout_text(parallel: ParallelConfig, dims: ParallelDims) -> str:
    """Describe a layout: its dimensions, schedule, resharding and offload."""
    text = [str(dims)]
    if dims.pp > 1:
        text.append(parallel.schedule.name)
    if dims.is_sharded and not parallel.reshard_after_forward:
        text.append("reshard_after_forward=false")
    return " ".join([*text, *(f"{key}=true" for key in OFFLOADS if getattr(parallel, key))])


def table(choices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each layout, best first. ``choices`` are results of ``LayoutChoice.as_dict``."""
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
