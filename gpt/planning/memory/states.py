"""Parameters, gradients and optimizer state of one rank, in bytes: exact, for AdamW over fp32 weights.

DeepSpeed keeps fp32 masters beside the weights it computes with, also where these are fp32, and flattens tensors before
it shards them (deepspeed 0.19: runtime/zero/stage_1_and_2.py, stage3.py, runtime/bf16_optimizer.py). Its gradient
bucket is not counted here.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.accounting.units import BF16, FP32
from gpt.components.facts import optimizer_state
from gpt.config import Strategy, TrainConfig
from gpt.planning.memory.shards import ParameterShards
from gpt.topology.dims import ParallelDims

ALIGNMENT = 2
"""Elements per rank to a multiple of which ZeRO-1 and 2 pad a flat group."""
PERSISTENT = 100_000
"""Largest parameter, in elements, that stays gathered in ZeRO-3 (stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class States:
    """Bytes of one rank, on its device but for ``host``."""

    parameters: int
    gradients: int
    optimizer: int
    """Moments and step counts, and fp32 masters where they are apart from the parameters."""
    host: int = 0
    """Offloaded to host memory."""


def states(config: TrainConfig, dims: ParallelDims, shards: ParameterShards) -> States:
    """Return the training state of a rank with these parameter shards."""
    if config.parallel.strategy is Strategy.deepspeed and config.parallel.zero_stage:
        found = zero_1_2_states if config.parallel.zero_stage < 3 else zero_3_states
        return found(config, dims.data_ranks, shards)
    stepped = shards.stored(dims.data_ranks) if config.parallel.strategy is Strategy.zero1 else shards.stored()
    sizes_of_state = optimizer_state(config.optim)
    kept, gradients = FP32 * shards.stored(), FP32 * stepped
    state = round(sizes_of_state.per_element * stepped) + sizes_of_state.per_tensor * shards.tensors
    if config.parallel.cpu_offload:
        return States(0, 0, 0, kept + gradients + state)
    return States(kept, gradients, state)


def zero_1_2_states(config: TrainConfig, ranks: int, shards: ParameterShards) -> States:
    """Return the state under ZeRO-1 and 2: sharded masters and moments, in ZeRO-2 gradients too."""
    parallel, bf16 = config.parallel, config.precision.is_half
    groups = [rounded_up(size, ALIGNMENT * ranks) for size in group_sizes(shards)]
    flat, counts = sum(groups), FP32 * len(groups)
    masters_and_moments = 3 * FP32 * flat // ranks
    # ZeRO-1 leaves gradients in the parameters, which are not padded, and in bf16 accumulates them in fp32 beside that.
    whole = FP32 * flat + BF16 * shards.elements if bf16 else FP32 * shards.elements
    gradients = FP32 * flat // ranks if parallel.zero_stage == 2 else whole
    host = masters_and_moments if parallel.offload_optimizer else 0
    return States((BF16 if bf16 else FP32) * flat, gradients, masters_and_moments + counts - host, host)


def zero_3_states(config: TrainConfig, ranks: int, shards: ParameterShards) -> States:
    """Return the state under ZeRO-3: everything sharded, parameter by parameter; small ones also stay gathered."""
    parallel, width = config.parallel, BF16 if config.precision.is_half else FP32
    part = sum(count * -(-size // ranks) for size, count in sizes(shards))
    # One rank alone frees nothing, though it has its shard of everything too.
    whole = sum(count * size for size, count in sizes(shards) if size <= PERSISTENT or ranks == 1)
    counts = FP32 * sum(1 for size in group_sizes(shards) if size)
    states_there = 3 * FP32 * part if parallel.offload_optimizer else 0
    weights_there = width * part if parallel.offload_parameters else 0
    return States(
        width * (part + whole) - weights_there,
        FP32 * part,
        3 * FP32 * part + counts - states_there,
        states_there + weights_there,
    )


def sizes(shards: ParameterShards) -> list[tuple[int, int]]:
    """List the elements of each parameter, with the number of equal ones."""
    return [(p.elements, shards.layers) for p in shards.block] + [(p.elements, 1) for p in shards.around]


def group_sizes(shards: ParameterShards) -> list[int]:
    """List the elements of the optimizer's groups: matrices, which decay, and the others."""
    pieces = [(p, shards.layers) for p in shards.block] + [(p, 1) for p in shards.around]
    matrices = sum(n * p.elements for p, n in pieces if len(p.shape) > 1)
    others = sum(n * p.elements for p, n in pieces if len(p.shape) == 1)
    return [size for size in (matrices, others) if size]


def rounded_up(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple
