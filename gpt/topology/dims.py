"""The parallel dimensions of a run: the number of ranks along each axis of the device mesh. Torch-free.

The planner and the training process derive them from the same config, so the plan and the run agree.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gpt.config import ParallelConfig, Strategy, nearest_divisor
from launch.errors import ConfigError


@dataclass(frozen=True)
class ParallelDims:
    """Degree of each kind of parallelism: the sizes of the mesh axes. All but ``ep`` multiply to the world size.

    ``pp`` is the outermost axis and ``tp`` the innermost, so that ranks that communicate most are neighbors.
    """

    strategy: str
    dp_replicate: int
    """Model replicas."""
    dp_shard: int
    """Ranks over which each replica is sharded."""
    pp: int = 1
    """Pipeline-parallel ranks."""
    cp: int = 1
    """Context-parallel ranks, over which each sequence is sharded."""
    tp: int = 1
    """Tensor-parallel ranks, over which each matrix is sharded."""
    ep: int = 1
    """Expert-parallel ranks, taken from the data-parallel ones, over which experts are sharded."""

    @property
    def sizes(self) -> dict[str, int]:
        """The axes of the device mesh, from the outermost, with their sizes."""
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        return {name: getattr(self, name) for name in names}

    @property
    def data_ranks(self) -> int:
        """Data-parallel ranks: groups of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def model_ranks(self) -> int:
        """Model-parallel ranks: those that work on the same samples."""
        return self.pp * self.cp * self.tp

    @property
    def is_sharded(self) -> bool:
        """True where the data-parallel ranks of a replica shard its parameters (FSDP)."""
        return self.strategy in ("fsdp", "hsdp")

    def data_rank(self, rank: int) -> int:
        """Return the data-parallel rank of a rank: the index of its part of the global batch."""
        return rank // (self.cp * self.tp) % self.data_ranks

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as records hold them."""
        return asdict(self)

    def __str__(self) -> str:
        sizes = {**self.sizes, "ep": self.ep}
        always = ("dp_replicate", "dp_shard")
        return " ".join([self.strategy, *(f"{n}={s}" for n, s in sizes.items() if s > 1 or n in always)])


def parallel_dims(parallel: ParallelConfig, world_size: int) -> ParallelDims:
    """Return the mesh of ``world_size`` ranks that ``parallel`` asks for.

    Raises:
        ConfigError: the degrees do not divide the number of ranks.
    """
    assert parallel.strategy is not Strategy.auto, "resolved by gpt.planning.auto before"
    model_ranks = 1
    for name in ("tp", "cp", "pp"):
        size = getattr(parallel, name)
        left = world_size // model_ranks
        if left % size:
            taken = f", {left} of them left by the other dimensions" if model_ranks > 1 else ""
            raise ConfigError(
                f"parallel.{name}={size} with {world_size} ranks{taken}",
                f"a divisor of {left}",
                f"parallel.{name}={nearest_divisor(left, size)}, or {model_ranks * size} ranks in all: nodes={size}",
            )
        model_ranks *= size
    data_ranks = world_size // model_ranks
    shard = 1
    if parallel.strategy is Strategy.fsdp:
        shard = data_ranks if parallel.dp_shard is None else parallel.dp_shard
    elif parallel.strategy is Strategy.deepspeed and parallel.zero_stage == 3:
        shard = data_ranks
    if data_ranks % shard:
        raise ConfigError(
            f"parallel.dp_shard={shard} does not divide {data_ranks} ranks",
            "replicas of the model that are sharded over equally many ranks",
            f"parallel.dp_shard={nearest_divisor(data_ranks, shard)}",
        )
    # Under fsdp inside one replica: FSDP shards its experts further over the ranks that are left.
    experts_among = shard if parallel.strategy is Strategy.fsdp else data_ranks
    if experts_among % parallel.ep:
        where = " in one replica of the model" if experts_among < data_ranks else ""
        raise ConfigError(
            f"parallel.ep={parallel.ep} with {experts_among} ranks that see different samples{where}",
            f"a divisor of {experts_among}",
            f"parallel.ep={nearest_divisor(experts_among, parallel.ep)}",
        )
    sizes = {name: getattr(parallel, name) for name in ("pp", "cp", "tp", "ep")}
    return ParallelDims(strategy_name(parallel, shard < data_ranks), data_ranks // shard, shard, **sizes)


def strategy_name(parallel: ParallelConfig, replicas: bool) -> str:
    """Return the name of the strategy in records; ``replicas`` is set where there are several of the model."""
    if parallel.strategy is Strategy.deepspeed:
        return f"ds_zero{parallel.zero_stage}"
    return "hsdp" if parallel.strategy is Strategy.fsdp and replicas else parallel.strategy.name
