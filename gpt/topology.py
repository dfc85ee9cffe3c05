"""The topology of a run: how many ranks stand along each dimension of parallelism. Torch-free.

The planner and the training process derive it from the same config, so what was promised is what runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gpt.config import ParallelConfig, Strategy, nearest_divisor
from gpt.errors import ConfigError


@dataclass(frozen=True)
class Topology:
    """Ranks along each dimension; their product is the world size. The last one is the innermost: neighbours."""

    strategy: str
    dp_replicate: int
    """Copies of the model."""
    dp_shard: int
    """Ranks that share one copy."""

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
    """Lay ``world_size`` ranks out as ``parallel`` says.

    Raises:
        ConfigError: they cannot be laid out so.
    """
    if parallel.strategy is not Strategy.fsdp:
        return Topology(parallel.strategy.name, world_size, 1)
    shard = world_size if parallel.dp_shard is None else parallel.dp_shard
    if world_size % shard:
        raise ConfigError(
            f"parallel.dp_shard={shard} does not divide {world_size} ranks",
            "copies of the model that are shared by equally many ranks",
            f"parallel.dp_shard={nearest_divisor(world_size, shard)}",
        )
    name = "fsdp" if shard == world_size else "hsdp"
    return Topology(name, world_size // shard, shard)
