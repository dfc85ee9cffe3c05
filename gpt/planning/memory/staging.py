"""Host memory in which a rank stages its part of a checkpoint, while a process beside it writes that to the disk."""

from __future__ import annotations

import math

from gpt.accounting.parameters import count
from gpt.accounting.units import BF16, FP32
from gpt.components.facts import optimizer_state
from gpt.config import Strategy, TrainConfig


def staging_bytes(config: TrainConfig, world_size: int) -> int:
    """Return the bytes of host memory that a rank needs to save in the background; 0 where saves are waited for.

    Whole tensors by name are shared out, so that each is written by one rank. In DeepSpeed's own files each rank writes
    its shards, and the first the weights as they compute besides.

    Args:
        config: of the run.
        world_size: number of ranks.
    """
    if not config.checkpoint.asynchronous:
        return 0
    shared = shared_bytes(config, world_size)
    if config.parallel.strategy is not Strategy.deepspeed or not config.parallel.zero_stage:
        return shared
    return shared + count(config.model).total * (BF16 if config.precision.is_half else FP32)


GENERATIONS = 2
"""Checkpoints in memory at most: the last that all ranks have agreed on, and the one on its way."""


def in_memory_bytes(config: TrainConfig, world_size: int, nodes: int) -> int:
    """Return the bytes of host memory that checkpoints in memory take for each rank of a node; 0 where there are none.

    A node holds its own ranks' parts and, where there is another one, as many of a neighbor's.

    Args:
        config: of the run.
        world_size: number of ranks.
        nodes: number of nodes.
    """
    if not config.checkpoint.in_memory:
        return 0
    return shared_bytes(config, world_size) * GENERATIONS * min(nodes, 2)


def shared_bytes(config: TrainConfig, world_size: int) -> int:
    """Return a rank's share of the weights and of the optimizer's state, in bytes."""
    each = FP32 + optimizer_state(config.optim).per_element  # the weight, and of AdamW both moments
    return math.ceil(count(config.model).total * each / world_size)
