"""Pipeline parallelism without torch: checks, the split of the layers into stages, schedules and their bubble.

``split_layers`` balances the stages by counted FLOPs. The planner and the ranks (gpt/parallel/pipeline.py) call the
same functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate, pairwise

from gpt.accounting import recomputed_flops_per_token, training_flops
from gpt.config import ModelConfig, ParallelConfig, Recompute, Schedule, Strategy, TrainConfig
from gpt.config.model import CACHED
from gpt.topology import Batch, ParallelDims, split_batch
from launch.errors import ConfigError


def check_pipeline(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if the pipeline cannot run the layers, the micro-batches or other settings of the run."""
    if dims.pp == 1:
        return
    if config.parallel.cpu_offload and config.model.tie_embeddings and not config.parallel.offloads_optimizer:
        raise ConfigError(
            f"parallel.cpu_offload=true with parallel.pp={config.parallel.pp} and model.tie_embeddings=true",
            "gradients on the devices, where first and last rank sum those of the tied matrix",
            "parallel.cpu_offload=false",
        )
    check_layers(config)
    check_micro_batches(config, dims)
    if config.parallel.schedule in V_SHAPED:
        check_split_backward(config)


def check_layers(config: TrainConfig) -> None:
    """Raise ConfigError if the pipeline has more stages than the model has blocks."""
    ranks, held, layers = config.parallel.pp, local_stages(config.parallel), config.model.n_layer
    if ranks * held <= layers:
        return
    each = f" with {held} stages on each rank" if held > 1 else ""
    most = max(p for p in range(1, ranks + 1) if ranks % p == 0 and (p == 1 or p * held <= layers))
    raise ConfigError(
        f"parallel.pp={ranks}{each}, and model.n_layer={layers}",
        f"at most {layers} stages, one for each block",
        f"parallel.pp={most}",
    )


def check_micro_batches(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError for a number of micro-batches that the schedule does not accept."""
    batch, parallel = split_batch(config.optim, dims.data_ranks), config.parallel
    if accepts_micro_batches(parallel, batch.accumulation):
        return
    fewest = min_micro_batches(parallel)
    enough = f"at least {fewest}" if batch.accumulation < fewest else f"a multiple of {parallel.pp}"
    number = f"{batch.accumulation} micro-batch{'es' if batch.accumulation > 1 else ''}"
    raise ConfigError(
        f"{number} (optim.global_batch={batch.global_batch} over {batch.ranks} data ranks, "
        f"{batch.micro} sequences each) for parallel.schedule={parallel.schedule.name} on {parallel.pp} ranks",
        f"{enough} of them",
        suggest_batch(config, batch),
    )


def suggest_batch(config: TrainConfig, batch: Batch) -> str:
    """Return overrides, as text for an error, with which the schedule accepts the batch: smaller micro-batches, or if
    that is impossible a larger batch."""
    sizes = [size for size in range(batch.micro, 0, -1) if batch.per_rank % size == 0]
    for size in sizes:
        if accepts_micro_batches(config.parallel, batch.per_rank // size):
            return f"optim.max_micro_batch={size}"
    number = batch.accumulation
    while not accepts_micro_batches(config.parallel, number):
        number += 1
    ranks = 1 if config.optim.weak_scaling else batch.ranks
    return f"optim.global_batch={number * batch.micro * ranks} optim.max_micro_batch={batch.micro}"


def check_split_backward(config: TrainConfig) -> None:
    """Raise ConfigError for settings that do not work with a schedule that splits the backward pass (zbv, dualpipev).

    The two halves of a split backward pass read saved activations at different times. So blocks cannot be compiled or
    recomputed, and FSDP cannot reshard parameters after the forward pass.
    """
    schedule = config.parallel.schedule.name
    undivided = {
        f"compile={config.compile.name}": (
            config.compiles,
            "compile=none",
            "compiled code has one backward pass, not two halves",
        ),
        f"recompute={config.recompute.name}": (
            config.recompute is not Recompute.none,
            "recompute=none",
            "both halves, and each matrix, would recompute the block",
        ),
    }
    for found, (is_set, instead, why) in undivided.items():
        if is_set:
            raise ConfigError(
                f"{found} with parallel.schedule={schedule}, which splits the backward pass",
                f"{instead}: {why}",
                f"parallel.schedule=interleaved, or {instead}",
            )
    if config.parallel.strategy is Strategy.fsdp and config.parallel.reshard_after_forward:
        raise ConfigError(
            f"parallel.reshard_after_forward=true with parallel.schedule={schedule}",
            "false: the second half of a split backward pass does not gather the parameters again",
            "parallel.reshard_after_forward=false",
        )


V_SHAPED = (Schedule.zbv, Schedule.dualpipev)
"""Schedules in which each rank has two stages; the first rank has the first and the last stage."""


@dataclass(frozen=True)
class StageLayers:
    """The layers of one pipeline stage."""

    blocks: range
    """Numbers of the blocks of the stage, from 0; may be empty."""
    first: bool
    """True for the stage with the token embedding."""
    last: bool
    """True for the stage with the final norm and the output matrix."""


def local_stages(parallel: ParallelConfig) -> int:
    """Return the number of stages on each rank."""
    if parallel.stages_per_rank is not None:
        return parallel.stages_per_rank
    return 2 if parallel.schedule is Schedule.interleaved or parallel.schedule in V_SHAPED else 1


def stage_indices(parallel: ParallelConfig, pp_rank: int) -> list[int]:
    """Return the indices of the stages of a pipeline-parallel rank, ascending."""
    ranks, held = parallel.pp, local_stages(parallel)
    if parallel.schedule in V_SHAPED:
        return [pp_rank, 2 * ranks - 1 - pp_rank]
    return [pp_rank + ranks * i for i in range(held)]


@lru_cache(maxsize=CACHED)
def split_layers(model: ModelConfig, stages: int, recompute: Recompute = Recompute.none) -> tuple[StageLayers, ...]:
    """Split the layers into ``stages`` consecutive stages, so that the stage with the most FLOPs has as few as
    possible. The FLOPs are those of training, including the FLOPs that ``recompute`` adds.

    The output matrix counts like a layer: with a large vocabulary the last stage has few blocks, or none. The look-up
    in the embedding costs no FLOPs, and is in the first stage.
    """
    flops = training_flops(model, sequences=1)
    again = recomputed_flops_per_token(model, recompute) * model.block_size
    costs = [(flops.palm - flops.logits + again) // model.n_layer] * model.n_layer + [flops.logits]
    parts = []
    for layers in partition(tuple(costs), stages):
        last = layers.stop > model.n_layer
        parts.append(StageLayers(range(layers.start, layers.stop - last), first=layers.start == 0, last=last))
    return tuple(parts)


def rank_stages(config: TrainConfig, pp_rank: int) -> tuple[StageLayers, ...]:
    """Return the layers of each stage of the rank ``pp_rank`` of a pipeline, in the order of the stages. For ``pp`` = 1
    there is one stage, the whole model."""
    parallel = config.parallel
    if parallel.pp == 1:
        return (StageLayers(range(config.model.n_layer), first=True, last=True),)
    parts = split_layers(config.model, parallel.pp * local_stages(parallel), config.recompute)
    return tuple(parts[stage] for stage in stage_indices(parallel, pp_rank))


@cache
def partition(costs: tuple[int, ...], parts: int) -> list[range]:
    """Split a sequence of items into ``parts`` consecutive parts, none empty, so that the largest sum of costs of a
    part is minimal. ``costs`` has the cost of each item. Return the indices of the items of each part.

    Of several such partitions, the most even one (least squares) is returned. Of equally even ones, the partition whose
    first parts are shorter is returned, because the first stages of a pipeline keep the activations of the most
    micro-batches.
    """
    assert 1 <= parts <= len(costs), (parts, len(costs))
    sums = [0, *accumulate(costs)]
    end = len(costs)

    @cache
    def largest(start: int, left: int) -> int:
        if left == 1:
            return sums[end] - sums[start]
        cuts = range(start + 1, end - left + 2)
        return min(max(sums[cut] - sums[start], largest(cut, left - 1)) for cut in cuts)

    def square(start: int, stop: int) -> float:
        cost = sums[stop] - sums[start]
        return cost**2 if cost <= limit else math.inf

    @cache
    def most_even(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Return the least possible sum of squares if the items from the index ``start`` on are split into ``left``
        parts, and the ends of these parts."""
        if left == 1:
            return square(start, end), (end,)
        found = []
        for cut in range(start + 1, end - left + 2):
            rest, ends = most_even(cut, left - 1)
            found.append((square(start, cut) + rest, (cut, *ends)))
        return min(found)

    limit = largest(0, parts)
    return [range(*pair) for pair in pairwise([0, *most_even(0, parts)[1]])]


def min_micro_batches(parallel: ParallelConfig) -> int:
    """Return the smallest number of micro-batches of a step that the schedule accepts."""
    if parallel.schedule is Schedule["1f1b"]:
        return 1 if parallel.strategy is Strategy.deepspeed else parallel.pp
    return 2 * parallel.pp if parallel.schedule is Schedule.dualpipev else 1


def accepts_micro_batches(parallel: ParallelConfig, micro_batches: int) -> bool:
    """Return True if the schedule accepts this number of micro-batches of a step.

    Interleaved 1F1B processes the micro-batches in groups, of at least as many micro-batches as there are ranks. All
    groups must be equal.
    """
    rounds = max(1, micro_batches // parallel.pp) if parallel.schedule is Schedule.interleaved else 1
    return micro_batches >= min_micro_batches(parallel) and micro_batches % rounds == 0


def bubble_fraction(schedule: Schedule, pp: int, micro_batches: int, stages_per_rank: int = 1) -> float:
    """Return the share of a step in which a rank of a pipeline is idle, 0 to 1, for stages of equal cost.

    GPipe and 1F1B: (p - 1) / (m + p - 1) for p ranks and m micro-batches (arXiv 1811.06965, section 2.3; 2104.04473,
    section 2.2.1). With v stages per rank, there are v times as many time slots, each shorter by v (section 2.2.2). The
    V-shaped schedules split the backward pass into two halves. Each half is assumed to take as long as the forward
    pass; then ranks are idle only until the first micro-batch has reached the last rank (ZB-V: arXiv 2401.10241,
    section 6; DualPipeV: 2412.19437, section 3.2.1, halved as at https://github.com/deepseek-ai/DualPipe). For few
    micro-batches the formulas follow torch's schedules.
    """
    p, m = pp, micro_batches
    if schedule in V_SHAPED:
        bubble = max(p - 1, 2 * (2 * p - 1 - m))
        return bubble / (6 * m + bubble)
    v = stages_per_rank
    bubble = v * max(0, p - m) + min(p, m) - 1
    return bubble / (v * m + bubble)
