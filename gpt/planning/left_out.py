"""What was not chosen, and what it took to fit, as a person reads it: nothing is changed or dropped without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from gpt.config import EngineKind, TrainConfig
from gpt.planning.fitting import Freedom, Sizes, may_offload
from gpt.planning.hardware import Machine
from gpt.planning.refusals import recomputing
from gpt.planning.text import needs

REASONS = 3
"""Of the refusals, the most frequent ones are shown."""


def left_out(
    config: TrainConfig, world_size: int, machine: Machine, fixed: Collection[str], tried: Sequence[Sizes]
) -> Iterator[str]:
    """A line for each thing that is to be known; ``tried`` are the searches, of which the last found something."""
    last = tried[-1]
    yield from taken(config, machine, tried)
    if len(tried) > 1 and (words := recomputing(config, world_size, machine, fixed, last.freedom)):
        yield f"{words} would fit without that"
    if last.too_large:
        yield f"left out: {len(last.too_large)} that do not fit ({nearest(last, machine)})"
    yield from refusals(last)
    yield f"not considered: {'; '.join(not_considered(config, fixed, last.freedom, machine))}"


def taken(config: TrainConfig, machine: Machine, tried: Sequence[Sizes]) -> Iterator[str]:
    """Each freedom that was taken, and what there was without it."""
    known, last = {found.freedom: found for found in tried}, tried[-1].freedom
    without = known.get(replace(last, smaller_passes=False))
    if last.smaller_passes and without:
        yield (
            f"smaller passes, and more of them for the same global batch: with optim.micro_batch="
            f"{config.optim.micro_batch} {nothing(without, machine)}"
        )
    if last.offload:
        without = known.get(Freedom(smaller_passes=True)) or known[Freedom()]
        yield f"memory of the host, which is slow: on the devices alone {nothing(without, machine)}"


def nothing(found: Sizes, machine: Machine) -> str:
    """Why a search found nothing that fits."""
    return f"nothing fits ({nearest(found, machine)})" if found.too_large else "no layout is possible"


def nearest(found: Sizes, machine: Machine) -> str:
    """What does not fit, and nearly does."""
    assert found.least is not None
    return f"nearest: {needs(found.least.candidate, found.least.memory, machine)}"


def refusals(found: Sizes) -> Iterator[str]:
    """What cannot be laid out, the most frequent reasons first, each with the first example."""
    if not found.refused:
        return
    counts = Counter(error.expected for error in found.refused)
    examples = {error.expected: error.found for error in reversed(found.refused)}
    shown = counts.most_common(REASONS)
    rest = len(found.refused) - sum(number for _, number in shown)
    yield f"refused: {len(found.refused)} that cannot be laid out{f', {rest} of them not shown here' if rest else ''}"
    for reason, number in shown:
        yield f"  {number} like {examples[reason]}; expected: {reason}"


def not_considered(config: TrainConfig, fixed: Collection[str], freedom: Freedom, machine: Machine) -> Iterator[str]:
    """What else there is, and how to ask for it."""
    if config.parallel.engine is EngineKind.deepspeed:
        yield "torch's own strategies (parallel.engine=native)"
        if "pp" not in fixed:
            yield "DeepSpeed's pipeline (parallel.pp=2)"
    else:
        yield "DeepSpeed's stages (parallel.engine=deepspeed)"
    smaller = config.optim.micro_batch > 1 and not freedom.smaller_passes
    ways = ["smaller passes"] if smaller and not freedom.offload else []
    ways += ["the memory of the host"] if may_offload(machine, fixed) and not freedom.offload else []
    if ways:
        yield f"{' and '.join(ways)}, only for what does not fit otherwise"
