"""The topology of a run: how many ranks stand along each dimension of parallelism. Torch-free.

The planner and the training process derive it from the same config, so what was promised is what runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gpt.config import ParallelConfig, Strategy


@dataclass(frozen=True)
class Topology:
    """Ranks along each dimension; their product is the world size."""

    strategy: str
    dp_replicate: int
    """Copies of the model (DDP)."""
    dp_shard: int
    """Ranks that share one copy (FSDP)."""

    @property
    def data_ranks(self) -> int:
        """Ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    def as_dict(self) -> dict[str, Any]:
        """The fields, for records."""
        return asdict(self)

    def __str__(self) -> str:
        return f"{self.strategy} dp_replicate={self.dp_replicate} dp_shard={self.dp_shard}"


def topology(parallel: ParallelConfig, world_size: int) -> Topology:
    """Lay ``world_size`` ranks out as ``parallel`` says."""
    if parallel.strategy is Strategy.fsdp:
        return Topology("fsdp", 1, world_size)
    return Topology("ddp", world_size, 1)
