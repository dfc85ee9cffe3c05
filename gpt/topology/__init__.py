"""Parallel dimensions of a run, the split of its batch, and the groups of blocks that FSDP shards. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

from gpt.accounting import block_shapes
from gpt.config import Ffn, ModelConfig, OptimConfig, ParallelConfig, Strategy, TrainConfig, nearest_divisor
from gpt.config.optim import SCHEDULE, LrSchedule, check_decay, describe_schedule, lr_at
from gpt.config.rules import divisors
from launch.errors import ConfigError, counted
from launch.runs.compose import read_config
from launch.runs.events import last_step
from launch.runs.folder import RunFolder

# Parallel dimensions: the number of ranks along each axis of the device mesh.
#
# The planner and the training process derive them from the same config, so the plan and the run agree.


@dataclass(frozen=True)
class ParallelDims:
    """Degree of each kind of parallelism. The product of all degrees without ``ep`` is the number of ranks.

    The degrees are the sizes of the axes of the device mesh. ``pp`` is the outermost axis and ``tp`` the innermost, so
    that ranks with the most communication have neighboring numbers.
    """

    strategy: str
    """``ddp``, ``zero1``, ``fsdp``, ``hsdp``, or for DeepSpeed ``ds_zero0`` to ``ds_zero3``."""
    dp_replicate: int
    """Number of model replicas."""
    dp_shard: int
    """Number of ranks over which each replica is sharded."""
    pp: int = 1
    """Number of pipeline-parallel ranks."""
    cp: int = 1
    """Number of context-parallel ranks, over which each sequence is sharded."""
    tp: int = 1
    """Number of tensor-parallel ranks, over which each matrix is sharded."""
    ep: int = 1
    """Number of expert-parallel ranks, over which experts are sharded. These ranks are part of the data-parallel
    ranks."""

    @property
    def sizes(self) -> dict[str, int]:
        """Axes of the device mesh with their sizes, outermost first."""
        names = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
        return {name: getattr(self, name) for name in names}

    @property
    def data_ranks(self) -> int:
        """Number of groups of ranks that compute different samples (data parallelism)."""
        return self.dp_replicate * self.dp_shard

    @property
    def model_ranks(self) -> int:
        """Number of ranks that compute the same samples together: the product of pp, cp and tp."""
        return self.pp * self.cp * self.tp

    @property
    def is_sharded(self) -> bool:
        """True if the data-parallel ranks of a replica shard its parameters (FSDP)."""
        return self.strategy in ("fsdp", "hsdp")

    def data_rank(self, rank: int) -> int:
        """Return the index, from 0, of the part of the global batch that the rank with the number ``rank`` computes.
        Ranks that compute the same samples have the same index."""
        return rank // (self.cp * self.tp) % self.data_ranks

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary, which the records of a run contain."""
        return asdict(self)

    def __str__(self) -> str:
        sizes = {**self.sizes, "ep": self.ep}
        always = ("dp_replicate", "dp_shard")
        return " ".join([self.strategy, *(f"{n}={s}" for n, s in sizes.items() if s > 1 or n in always)])


def parallel_dims(parallel: ParallelConfig, world_size: int, ranks_per_node: int = 1) -> ParallelDims:
    """Return the parallel dimensions of a run of ``world_size`` ranks with the config ``parallel``.

    Args:
        parallel: config of the parallelism; its strategy is not ``auto``.
        world_size: number of ranks.
        ranks_per_node: number of ranks of a node, for the number of nodes that an error proposes.

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
            enough = math.lcm(model_ranks * size, ranks_per_node)
            raise ConfigError(
                f"parallel.{name}={size} with {counted(world_size, 'rank')}{taken}",
                f"a divisor of {left}",
                f"parallel.{name}={nearest_divisor(left, size)}, or {enough} ranks in all: "
                f"nodes={enough // ranks_per_node}",
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
    # Under fsdp, experts are inside one replica: FSDP shards them further over the remaining ranks.
    experts_among = shard if parallel.strategy is Strategy.fsdp else data_ranks
    if experts_among % parallel.ep:
        where = " in one replica of the model" if experts_among < data_ranks else ""
        raise ConfigError(
            f"parallel.ep={parallel.ep} with {experts_among} ranks that see different samples{where}",
            f"a divisor of {experts_among}",
            f"parallel.ep={nearest_divisor(experts_among, parallel.ep)}",
        )
    sizes = {name: getattr(parallel, name) for name in ("pp", "cp", "tp", "ep")}
    name = parallel.strategy.name
    if parallel.strategy is Strategy.deepspeed:
        name = f"ds_zero{parallel.zero_stage}"
    elif parallel.strategy is Strategy.fsdp and shard < data_ranks:
        name = "hsdp"
    return ParallelDims(name, data_ranks // shard, shard, **sizes)


# Split of the global batch: sequences per data-parallel rank, and micro-batches per step (gradient accumulation).
#
# The planner and the training loop call the same function, so the plan and the run agree.


@dataclass(frozen=True)
class Batch:
    """Split of the sequences of a step: ``global_batch`` = ranks x per_rank, ``per_rank`` = accumulation x micro."""

    global_batch: int
    """Number of sequences of a step, over all ranks."""
    ranks: int
    """Number of data-parallel ranks."""
    per_rank: int
    """Number of sequences of a step on one data-parallel rank."""
    micro: int
    """Number of sequences of a micro-batch."""
    accumulation: int
    """Number of micro-batches of each rank in a step."""


def split_batch(optim: OptimConfig, data_ranks: int) -> Batch:
    """Split the global batch over ``data_ranks`` data-parallel ranks.

    The micro-batch is the largest divisor of the per-rank batch up to ``optim.max_micro_batch``. So for any number of
    ranks all micro-batches have the same size, and the global batch stays the same.

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
    """Return the config with ``optim.max_steps`` computed from ``optim.max_tokens`` and the split ``batch`` of a step.
    Return ``config`` unchanged if ``optim.max_tokens`` is None.

    Raises:
        ConfigError: with this number of steps the decay of ``wsd`` begins too early or too late.
    """
    optim = config.optim
    if optim.max_tokens is None:
        return config
    steps = math.ceil(optim.max_tokens / (batch.global_batch * config.model.block_size))
    optim = replace(optim, max_steps=steps)
    if optim.schedule is LrSchedule.wsd:
        check_decay(optim)
    return replace(config, optim=optim)


def refuse_other_rates(config: TrainConfig, batch: Batch, folder: RunFolder) -> None:
    """Raise ConfigError if the learning-rate schedule of ``config`` contradicts the steps that the run has made: some
    step would have another learning rate than it had.

    Only steps up to the checkpoint from which the run resumes are compared. This is the last checkpoint, or the step
    ``config.resume_from``.

    Args:
        config: config of the run, a result of ``settle_steps``.
        batch: split of the global batch.
        folder: folder of the run, with the config of the earlier attempt; it may not exist yet.
    """
    now = config.optim
    if not folder.config.exists():
        return
    before = settle_steps(read_config(folder, TrainConfig), batch).optim
    if all(getattr(now, key) == getattr(before, key) for key in SCHEDULE):
        return
    kept = config.resume_from if isinstance(config.resume_from, int) else last_step(folder, ())
    other = next((step for step in range(1, kept + 1) if lr_at(now, step) != lr_at(before, step)), None)
    if other is not None:
        raise ConfigError(
            f"{describe_schedule(now)}: learning rate {lr_at(now, other):.3g} at step {other}, which {folder.path} has "
            f"made with {lr_at(before, other):.3g}",
            "a schedule with the learning rates of the steps that the run has made",
            f"resume_from={other - 1}, or fresh=true for a new folder" if other > 1 else "fresh=true, for a new folder",
        )


# Sharding of experts: the dimension that FSDP shards, and checks of expert parallelism.
#
# Called on the login node by gpt/topology/check_dims.py, and by the ranks that shard the experts (gpt/parallel/nd.py).


def expert_fsdp_ranks(dims: ParallelDims) -> int:
    """Return the number of ranks, in one replica of the model, over which FSDP shards the same experts."""
    return dims.dp_shard // dims.ep * dims.cp


def shard_dimension(model: ModelConfig, dims: ParallelDims) -> int:
    """Return 0 or 1: the dimension along which FSDP shards the stacked matrices (experts, outputs, inputs) of a rank.

    The result is 0 if the rank's number of experts is a multiple of the number of FSDP's ranks: each rank then stores
    whole experts, contiguous in memory. Otherwise it is 1.
    """
    return 0 if model.n_expert // dims.ep % expert_fsdp_ranks(dims) == 0 else 1


def can_shard(model: ModelConfig, dims: ParallelDims) -> bool:
    """Return True if FSDP can shard the experts. In another dimension than the first, torch requires that its size is a
    multiple of the number of ranks. Return True without FSDP, too."""
    if not dims.is_sharded or shard_dimension(model, dims) == 0:
        return True
    return model.n_embd % expert_fsdp_ranks(dims) == 0 and model.ffn_width % (expert_fsdp_ranks(dims) * dims.tp) == 0


def check_expert(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if the experts cannot be sharded over ``ep`` ranks."""
    model, ep = config.model, dims.ep
    if ep == 1:
        return
    if model.ffn is not Ffn.moe:
        raise ConfigError(
            f"parallel.ep={ep} with model.ffn={getattr(model.ffn, 'name', model.ffn)}",
            "a mixture of experts, whose experts can be sharded",
            "parallel.ep=1, or model=moe_200m",
        )
    if model.n_expert % ep:
        raise ConfigError(
            f"parallel.ep={ep} with model.n_expert={model.n_expert}",
            "equally many experts on every rank",
            f"parallel.ep={nearest_ep(model, dims)}",
        )
    if not can_shard(model, dims):
        ranks = expert_fsdp_ranks(dims)
        raise ConfigError(
            f"parallel.ep={ep}: fsdp shards {model.n_expert // ep} experts of {model.n_embd} x {model.ffn_width} over "
            f"{ranks} ranks",
            f"equally many experts on every rank, or model.n_embd and model.ffn_hidden that are multiples of {ranks}",
            f"parallel.ep={nearest_ep(model, dims)}",
        )


def nearest_ep(model: ModelConfig, dims: ParallelDims) -> int:
    """Return the valid number of expert-parallel ranks that is nearest to ``dims.ep``; 1 is always valid."""
    ranks = dims.dp_shard if dims.is_sharded else dims.data_ranks
    possible = [d for d in divisors(math.gcd(model.n_expert, ranks)) if d == 1 or can_shard(model, replace(dims, ep=d))]
    return min(possible, key=lambda d: (abs(d - dims.ep), d))


# Blocks that FSDP shards and gathers together. The engine builds these units, and the plan counts their memory and
# time.


def fsdp_units(config: TrainConfig, layers: int) -> list[int]:
    """Return the number of blocks of each unit of FSDP, in the order of the forward pass. FSDP gathers the blocks of a
    unit together.

    A unit is one block, or as many consecutive blocks as needed for ``parallel.fsdp_min_num_params`` parameters. Blocks
    that remain at the end join the last unit.

    Args:
        config: config of the run.
        layers: number of blocks of the model, or of a pipeline stage; the sum of the result.
    """
    least = config.parallel.fsdp_min_num_params
    if least is None:
        return [1] * layers
    of_a_block = sum(math.prod(shape) for shape in block_shapes(config.model).values())
    together = min(-(-least // of_a_block), layers)
    if not together:
        return []
    units = [together] * (layers // together)
    units[-1] += layers % together
    return units


# Size of the flat buckets in which ZeRO-1, and DDP with other dimensions, reduce gradients; the plan counts with it.


BUCKET_BYTES = 32 * 2**20
"""Largest size, in bytes, of a bucket of several gradients, which one collective reduces. With larger buckets there are
fewer collectives, but the last one, which nothing overlaps, takes longer."""

BUCKETS_IN_FLIGHT = 2
"""Largest number of buckets whose collectives run at the same time."""
