"""Sharding of experts: the dimension that FSDP shards, and the refusals of expert parallelism. Torch-free.

Called on the login node by gpt/topology/rules.py, and by the ranks that shard them (gpt/parallel/expert.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

from gpt.config import Ffn, ModelConfig, Recompute, TrainConfig
from gpt.config.checks import divisors
from gpt.topology.dims import ParallelDims
from launch.errors import ConfigError


def expert_fsdp_ranks(dims: ParallelDims) -> int:
    """Count the ranks of one replica that hold the same experts, over which FSDP shards these."""
    return dims.dp_shard // dims.ep * dims.cp


def shard_dimension(model: ModelConfig, dims: ParallelDims) -> int:
    """Choose the dimension of (experts, outputs, inputs) along which FSDP shards a rank's experts.

    The first where it divides evenly: a rank then holds whole experts, contiguous in memory. Else the second.
    """
    return 0 if model.n_expert // dims.ep % expert_fsdp_ranks(dims) == 0 else 1


def can_shard(model: ModelConfig, dims: ParallelDims) -> bool:
    """True where FSDP can shard the experts: evenly, as torch demands of any but the first dimension."""
    if not dims.is_sharded or shard_dimension(model, dims) == 0:
        return True
    return model.n_embd % expert_fsdp_ranks(dims) == 0 and model.ffn_width % (expert_fsdp_ranks(dims) * dims.tp) == 0


def check_expert(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError where the experts cannot be sharded over ``ep`` ranks."""
    model, ep = config.model, dims.ep
    if ep == 1:
        return
    if model.ffn is not Ffn.moe:
        raise ConfigError(
            f"parallel.ep={ep} with model.ffn={getattr(model.ffn, 'name', model.ffn)}",
            "a mixture of experts, whose experts can be sharded",
            "parallel.ep=1, or model=moe_200m",
        )
    if config.recompute is Recompute.selective and config.compiles:
        raise ConfigError(
            f"parallel.ep={ep} with recompute=selective and compile={config.compile.name}",
            "one of the two, or recompute=full: selective recomputation does not see into compiled code",
            "recompute=full",
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
    """Find the valid ``ep`` nearest to that of ``dims``; 1 is always valid."""
    ranks = dims.dp_shard if dims.is_sharded else dims.data_ranks
    possible = [d for d in divisors(math.gcd(model.n_expert, ranks)) if d == 1 or can_shard(model, replace(dims, ep=d))]
    return min(possible, key=lambda d: (abs(d - dims.ep), d))
