"""The topology of a run: how many ranks stand along each dimension of parallelism. Torch-free.

The planner and the training process derive it from the same config, so what was promised is what runs.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from gpt.config import ParallelConfig, Strategy, nearest_divisor
from launch.errors import ConfigError


@dataclass(frozen=True)
class ParallelDims:
    """Ranks along each dimension. All but ``ep`` multiply to the world size; of these ``pp`` is the outermost and
    ``tp`` the innermost, so that the ranks that talk most are neighbours."""

    strategy: str
    dp_replicate: int
    """Copies of the model."""
    dp_shard: int
    """Ranks that share one copy."""
    pp: int = 1
    """Stages of the pipeline."""
    cp: int = 1
    """Ranks that share each sequence."""
    tp: int = 1
    """Ranks that share each matrix."""
    ep: int = 1
    """Data ranks that deal out the experts among themselves."""

    @property
    def sizes(self) -> dict[str, int]:
        """The dimensions of the grid of ranks, from the outermost."""
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        return {name: getattr(self, name) for name in names}

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that see different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def model_ranks(self) -> int:
        """Ranks that work on the same samples."""
        return self.pp * self.cp * self.tp

    @property
    def is_sharded(self) -> bool:
        """Whether the ranks of a copy share its parameters, rather than each holding its own."""
        return self.strategy in ("fsdp", "hsdp")

    def data_rank(self, rank: int) -> int:
        """Which of the ``data_ranks`` parts of a batch a rank works on."""
        return rank // (self.cp * self.tp) % self.data_ranks

    def as_dict(self) -> dict[str, Any]:
        """The fields, for records."""
        return asdict(self)

    def __str__(self) -> str:
        sizes = {**self.sizes, "ep": self.ep}
        always = ("dp_replicate", "dp_shard")
        return " ".join([self.strategy, *(f"{n}={s}" for n, s in sizes.items() if s > 1 or n in always)])


def parallel_dims(parallel: ParallelConfig, world_size: int) -> ParallelDims:
    """Lay ``world_size`` ranks out as ``parallel`` says.

    Raises:
        ConfigError: they cannot be laid out so.
    """
    assert parallel.strategy is not Strategy.auto, "to be settled before"
    model_ranks = 1
    for name in ("tp", "cp", "pp"):
        size = getattr(parallel, name)
        left = world_size // model_ranks
        if left % size:
            taken = f", {left} of them beside the other dimensions" if model_ranks > 1 else ""
            raise ConfigError(
                f"parallel.{name}={size} with {world_size} ranks{taken}",
                f"a divisor of {left}",
                f"parallel.{name}={nearest_divisor(left, size)}",
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
            "copies of the model that are shared by equally many ranks",
            f"parallel.dp_shard={nearest_divisor(data_ranks, shard)}",
        )
    # Under fsdp inside one copy, whose experts fsdp cuts further over the ranks that are left.
    experts_among = shard if parallel.strategy is Strategy.fsdp else data_ranks
    if experts_among % parallel.ep:
        where = " in one copy of the model" if experts_among < data_ranks else ""
        raise ConfigError(
            f"parallel.ep={parallel.ep} with {experts_among} ranks that see different samples{where}",
            f"a divisor of {experts_among}",
            f"parallel.ep={nearest_divisor(experts_among, parallel.ep)}",
        )
    sizes = {name: getattr(parallel, name) for name in ("pp", "cp", "tp", "ep")}
    return ParallelDims(strategy_name(parallel, shard < data_ranks), data_ranks // shard, shard, **sizes)


def strategy_name(parallel: ParallelConfig, replicas: bool) -> str:
    """What records call the strategy; ``replicas``: there is more than one copy of the model."""
    if parallel.strategy is Strategy.deepspeed:
        return f"ds_zero{parallel.zero_stage}"
    return "hsdp" if parallel.strategy is Strategy.fsdp and replicas else parallel.strategy.name
