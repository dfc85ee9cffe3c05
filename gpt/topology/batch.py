"""How a global batch is cut: sequences per rank, per forward pass, and passes per step.

Torch-free; the planner and the training loop call the same function, so what was promised is what runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.config import OptimConfig, nearest_divisor
from launch.errors import ConfigError


@dataclass(frozen=True)
class Batch:
    """Sequences of one step: ``global_batch == per_rank * ranks`` and ``per_rank == micro * accumulation``."""

    global_batch: int
    ranks: int
    per_rank: int
    micro: int
    accumulation: int


def split_batch(optim: OptimConfig, data_ranks: int) -> Batch:
    """Cut the global batch for ``data_ranks`` data-parallel ranks.

    The micro-batch is the largest divisor of the per-rank batch that ``optim.micro_batch`` allows, so every number
    of ranks gets equal passes and the same global batch.

    Raises:
        ConfigError: the batch cannot be dealt out evenly.
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
    micro = max(d for d in range(1, min(optim.micro_batch, per_rank) + 1) if per_rank % d == 0)
    return Batch(total, data_ranks, per_rank, micro, per_rank // micro)
