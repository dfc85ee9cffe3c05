"""The split of the global batch: sequences per data-parallel rank, and micro-batches per step (gradient accumulation).

Torch-free. The planner and the training loop call the same function, so the plan and the run agree.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from gpt.config import OptimConfig, TrainConfig, nearest_divisor
from launch.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Sequences of a step: ``global_batch == per_rank * ranks`` and ``per_rank == micro * accumulation``."""

    global_batch: int
    ranks: int
    """Data-parallel ranks."""
    per_rank: int
    micro: int
    """Sequences of a micro-batch."""
    accumulation: int
    """Micro-batches of each rank in a step."""


def split_batch(optim: OptimConfig, data_ranks: int) -> Batch:
    """Split the global batch over ``data_ranks`` data-parallel ranks.

    The micro-batch is the largest divisor of the per-rank batch that ``optim.max_micro_batch`` allows, so on any
    number of ranks all micro-batches have one size and the global batch stays the same.

    Raises:
        ConfigError: the global batch is not a multiple of the number of ranks.
    """
    total = optim.global_batch * (data_ranks if optim.weak_scaling else 1)
    if total % data_ranks:
        wish = -(-total // data_ranks) * data_ranks
        raise ConfigError(
            f"optim.global_batch={total} sequences over {data_ranks} ranks",
            f"a multiple of {data_ranks}",
            f"optim.global_batch={wish} (or {nearest_divisor(total, data_ranks)} ranks)",
        )
    per_rank = total // data_ranks
    micro = max(d for d in range(1, min(optim.max_micro_batch, per_rank) + 1) if per_rank % d == 0)
    return Batch(total, data_ranks, per_rank, micro, per_rank // micro)


def settle_steps(config: TrainConfig, batch: Batch) -> TrainConfig:
    """Return the config with the number of steps that ``optim.max_tokens`` takes, where that is given."""
    optim = config.optim
    if optim.max_tokens is None:
        return config
    steps = math.ceil(optim.max_tokens / (batch.global_batch * config.model.block_size))
    return replace(config, optim=replace(optim, max_steps=steps))
