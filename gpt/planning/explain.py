"""Texts of ``parallel=auto``: the ranked layouts, what was relaxed, what was left out, and refusals where nothing fits.

Whatever the search changes or drops is said in the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from gpt.config import EngineKind, ParallelConfig, Recompute, Strategy, TrainConfig
from gpt.planning.hardware import Machine
from gpt.planning.memory import GIB
from gpt.planning.search import (
    MICRO_BATCH,
    OFFLOADS,
    RELAXATIONS,
    Candidate,
    Relaxation,
    SearchResult,
    can_fit,
    may_offload,
    search_layouts,
)
from gpt.topology.batch import split_batch
from gpt.topology.dims import ParallelDims
from gpt.topology.rules import check_parallel_dims
from launch.errors import ConfigError
from launch.runs.compose import plain

REASONS = 3
"""Number of reasons for refusals that are shown, the most frequent first."""


def explain_search(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], tried: Sequence[SearchResult]
) -> Iterator[str]:
    """Yield lines on relaxations and left-out layouts; of the searches in ``tried`` the last one found something."""
    last = tried[-1]
    yield from relaxation_lines(config, machine, tried)
    if len(tried) > 1 and (text := sufficient_recompute(config, world_size, machine, fixed, last.relaxation)):
        yield f"{text} would fit without that"
    if last.too_large:
        yield f"left out: {len(last.too_large)} that do not fit ({nearest_text(last, machine)})"
    yield from refusal_lines(last)
    yield f"not considered: {'; '.join(unexplored_lines(config, fixed, last.relaxation, machine))}"


def relaxation_lines(config: TrainConfig, machine: Machine, tried: Sequence[SearchResult]) -> Iterator[str]:
    """Yield a line for each relaxation that was needed, with the result without it."""
    known, last = {found.relaxation: found for found in tried}, tried[-1].relaxation
    without = known.get(replace(last, smaller_micro_batch=False))
    if last.smaller_micro_batch and without:
        yield (
            f"smaller micro-batches, and more of them for the same global batch: with optim.max_micro_batch="
            f"{config.optim.max_micro_batch} {failure_text(without, machine)}"
        )
    if last.offload:
        without = known.get(Relaxation(smaller_micro_batch=True)) or known[Relaxation()]
        yield f"CPU offload, which is slow: on the devices alone {failure_text(without, machine)}"


def failure_text(found: SearchResult, machine: Machine) -> str:
    """Say why a search found nothing that fits."""
    return f"nothing fits ({nearest_text(found, machine)})" if found.too_large else "no layout is valid"


def nearest_text(found: SearchResult, machine: Machine) -> str:
    """Describe the layout that comes nearest to fitting."""
    assert found.least is not None
    return f"nearest: {requirement_text(found.least, machine)}"


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


def unexplored_lines(
    config: TrainConfig, fixed: Collection[str], relaxation: Relaxation, machine: Machine
) -> Iterator[str]:
    """Yield what the search did not consider, and how to ask for it."""
    if config.parallel.engine is EngineKind.deepspeed:
        yield "torch's strategies (parallel.engine=native)"
        if "pp" not in fixed:
            yield "DeepSpeed's pipeline (parallel.pp=2)"
    else:
        yield "DeepSpeed's ZeRO stages (parallel.engine=deepspeed)"
    smaller = config.optim.max_micro_batch > 1 and not relaxation.smaller_micro_batch
    ways = ["smaller micro-batches"] if smaller and not relaxation.offload else []
    ways += ["CPU offload"] if may_offload(machine, fixed) and not relaxation.offload else []
    if ways:
        yield f"{' and '.join(ways)}, only where nothing fits otherwise"


def no_layout_error(config: TrainConfig, world_size: int, fixed: Collection[str]) -> ConfigError:
    """Return the refusal where no layout is valid: that of the plainest one."""
    given = config.parallel
    kept = " ".join(f"parallel.{key}={plain(getattr(given, key))}" for key in sorted({*fixed} - {MICRO_BATCH}))
    plainest = replace(given, strategy=Strategy.ddp)
    if given.engine is EngineKind.deepspeed:
        plainest = replace(given, strategy=Strategy.deepspeed, zero_stage=given.zero_stage or 0)
    try:
        plainest.validate()
        split_batch(config.optim, check_parallel_dims(replace(config, parallel=plainest), world_size).data_ranks)
    except ConfigError as error:
        return error
    return ConfigError(
        f"parallel.strategy=auto {kept} on {world_size} ranks: no layout is valid",
        "fewer keys of parallel that are given",
        "parallel=auto",
    )


def out_of_memory_error(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], tried: Sequence[SearchResult]
) -> ConfigError:
    """Return the refusal where nothing fits, with the least change that would help."""
    least = min((found.least for found in tried if found.least), key=lambda one: one.memory.total)
    fix = next(remedies(config, world_size, machine, fixed), None)
    host, there = "", ""
    if least.memory.host:
        host = f", and {least.memory.host / GIB:.2f} GiB of host memory"
        there = f" and {machine.host.room / GIB:.2f} GiB of host memory" if machine.host and machine.host.room else ""
    return ConfigError(
        f"parallel.strategy=auto on {world_size} rank{'s' if world_size > 1 else ''}: the layout that needs least, "
        f"{describe(least.parallel, least.dims)} with micro-batches of {least.batch.micro}, needs "
        f"{least.memory.total_gib:.2f} GiB on each{host}",
        f"at most {machine.room / GIB:.2f} GiB{there}, the part of {machine.device} that tensors may take",
        fix or "a smaller model, or a smaller model.block_size",
    )


def remedies(config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str]) -> Iterator[str]:
    """Yield overrides that make the run fit, the least change first."""
    nodes = -(-world_size // machine.ranks_per_node)
    options = [("", config), *more_recompute(config)]
    for times in (1, 2, 4, 8, 16, 32, 64):
        ranks, more = times * world_size, [f"nodes={times * nodes}"] if times > 1 else []
        if not can_fit(options[-1][1], ranks, machine, fixed):  # nothing needs less
            continue
        for text, changed in options:
            if (text or more) and can_fit(changed, ranks, machine, fixed):
                yield " ".join([*more, *([text] if text else [])])


def more_recompute(config: TrainConfig) -> Iterator[tuple[str, TrainConfig]]:
    """Yield the run with more recomputation, each with the override for it."""
    order = [Recompute.none, Recompute.selective, Recompute.full]
    for more in order[order.index(config.recompute) + 1 :]:
        yield f"recompute={more.name}", replace(config, recompute=more)


def sufficient_recompute(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], relaxation: Relaxation
) -> str | None:
    """Return the recompute override with which a layout fits under less relaxation; None where that is not enough."""
    for text, changed in more_recompute(config):
        for found in search_layouts(changed, world_size, machine, fixed):
            if RELAXATIONS.index(found.relaxation) >= RELAXATIONS.index(relaxation):
                break
            if found.fitting:
                return text
    return None


def describe(parallel: ParallelConfig, dims: ParallelDims) -> str:
    """Describe a layout: its dimensions, schedule, resharding and offload."""
    text = [str(dims)]
    if dims.pp > 1:
        text.append(parallel.schedule.name)
    if dims.is_sharded and not parallel.reshard_after_forward:
        text.append("reshard_after_forward=false")
    return " ".join([*text, *(f"{key}=true" for key in OFFLOADS if getattr(parallel, key))])


def requirement_text(one: Candidate, machine: Machine) -> str:
    """Describe a layout with the memory it needs and the memory there is."""
    host = ""
    if one.memory.host and machine.host is not None:
        room = "" if machine.host.room is None else f" of {machine.host.room / GIB:.3g}"
        host = f", and {one.memory.host / GIB:.3g}{room} GiB of host memory"
    return (
        f"{describe(one.parallel, one.dims)} with micro-batches of {one.batch.micro}, "
        f"{one.memory.total_gib:.3g} of {machine.room / GIB:.3g} GiB{host}"
    )


def table(choices: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a line for each of some layouts, given as ``LayoutChoice.as_dict`` returns them, best first."""
    width = max((len(choice["layout"]) for choice in choices), default=0)
    num_width = max((len(micro_batches_text(choice)) for choice in choices), default=0)
    for number, choice in enumerate(choices, start=1):
        step_s = choice["step_s"]
        sent = {name: s for name, s in choice["communication_s"].items() if s >= 0.001 * step_s}
        shares = "".join(f", {name} {s / step_s:.1%}" for name, s in sent.items())
        host = f" and {choice['host_bytes'] / GIB:.3g} GiB of host memory" if choice["host_bytes"] else ""
        yield (
            f"{number}. {choice['layout']:<{width}}  {micro_batches_text(choice):>{num_width}}, "
            f"{choice['memory_bytes'] / GIB:.3g} GiB{host}, {format_seconds(step_s)} a step, "
            f"{choice['tokens_per_s']:,.0f} tokens/s; bubble {choice['idle_s'] / step_s:.1%}, "
            f"communication {sum(sent.values()) / step_s:.1%}{shares and f' ({shares[2:]})'}"
        )


def micro_batches_text(choice: Mapping[str, Any]) -> str:
    """Describe the micro-batches of a rank in a step."""
    count = choice["accumulation"]
    return f"{count} micro-batch{'es' if count > 1 else ''} of {choice['micro_batch']}"


def format_seconds(value: float) -> str:
    """Format a duration in ms or s."""
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"
