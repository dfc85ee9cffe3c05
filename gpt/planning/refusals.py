"""What is said where nothing can be chosen, with the least change that would help."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from gpt.config import EngineKind, Recompute, Strategy, TrainConfig
from gpt.planning.fitting import MICRO_BATCH, ORDER, Freedom, Sizes, can_fit, sizes
from gpt.planning.hardware import Machine
from gpt.planning.memory import GIB
from gpt.planning.text import describe
from gpt.topology.batch import cut
from gpt.topology.composition import lay_out
from launch.errors import ConfigError
from launch.runs.compose import plain


def impossible(config: TrainConfig, world_size: int, fixed: Collection[str]) -> ConfigError:
    """The refusal where nothing can be laid out: that of the plainest layout."""
    given = config.parallel
    kept = " ".join(f"parallel.{key}={plain(getattr(given, key))}" for key in sorted({*fixed} - {MICRO_BATCH}))
    plainest = replace(given, strategy=Strategy.ddp)
    if given.engine is EngineKind.deepspeed:
        plainest = replace(given, strategy=Strategy.deepspeed, zero_stage=given.zero_stage or 0)
    try:
        plainest.validate()
        cut(config.optim, lay_out(replace(config, parallel=plainest), world_size).data_ranks)
    except ConfigError as error:
        return error
    return ConfigError(
        f"parallel.strategy=auto {kept} on {world_size} ranks: no layout is possible",
        "fewer keys of parallel that are given",
        "parallel=auto",
    )


def too_large(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], tried: Sequence[Sizes]
) -> ConfigError:
    """The refusal where nothing fits, with the first of the usual remedies that would help."""
    least = min((found.least for found in tried if found.least), key=lambda one: one.memory.total)
    one, fix = least.candidate, next(remedies(config, world_size, machine, fixed), None)
    host, there = "", ""
    if least.memory.host:
        host = f", and {least.memory.host / GIB:.2f} GiB of the host"
        there = f" and {machine.host.room / GIB:.2f} GiB of the host" if machine.host and machine.host.room else ""
    return ConfigError(
        f"parallel.strategy=auto on {world_size} rank{'s' if world_size > 1 else ''}: the layout that needs least, "
        f"{describe(one.parallel, one.layout)} in passes of {one.batch.micro}, needs {least.memory.total_gib:.2f} GiB "
        f"on each{host}",
        f"at most {machine.room / GIB:.2f} GiB{there}, the part of {machine.device} that tensors may take",
        fix or "a smaller model, or a smaller model.block_size",
    )


def remedies(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str]) -> Iterator[str]:
    """What to type for a run that fits, the least change first."""
    nodes = -(-world_size // machine.ranks_per_node)
    options = [("", config), *recomputed(config)]
    for times in (1, 2, 4, 8, 16, 32, 64):
        ranks, more = times * world_size, [f"nodes={times * nodes}"] if times > 1 else []
        if not can_fit(options[-1][1], ranks, machine, fixed):  # nothing needs less
            continue
        for words, changed in options:
            if (words or more) and can_fit(changed, ranks, machine, fixed):
                yield " ".join([*more, *([words] if words else [])])


def recomputed(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """The same run with more recomputation, and what to type for it."""
    order = [Recompute.none, Recompute.selective, Recompute.full]
    for more in order[order.index(config.recompute) + 1 :]:
        yield f"recompute={more.name}", replace(config, recompute=more)


def recomputing(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], freedom: Freedom
) -> str | None:
    """What to type of recomputation for a run that fits with less than this freedom; None where that is not enough."""
    for words, changed in recomputed(config):
        for found in sizes(changed, world_size, machine, fixed):
            if ORDER.index(found.freedom) >= ORDER.index(freedom):
                break
            if found.fitting:
                return words
    return None
