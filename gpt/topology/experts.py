"""How experts are dealt out: along which dimension they are cut, and what cannot be dealt out. Torch-free.

Asked on the login node by gpt/topology/rules.py, and by the ranks where they cut (gpt/parallel/expert.py).
"""

from __future__ import annotations

import math
from dataclasses import replace

from gpt.config import Ffn, ModelConfig, Recompute, TrainConfig
from gpt.config.checks import divisors
from gpt.topology.dims import ParallelDims
from launch.errors import ConfigError


def expert_fsdp_ranks(dims: ParallelDims) -> int:
    """Ranks of one copy of the model that have the same experts dealt out to them, and share these under fsdp."""
    return dims.dp_shard // dims.ep * dims.cp


def shard_dimension(model: ModelConfig, dims: ParallelDims) -> int:
    """Along which dimension of (experts, outputs, inputs) fsdp cuts the experts that were dealt out to a rank.

    The first where they go round evenly: a rank then holds whole ones, in one piece of memory. Else the second.
    """
    return 0 if model.n_expert // dims.ep % expert_fsdp_ranks(dims) == 0 else 1


def can_shard(model: ModelConfig, dims: ParallelDims) -> bool:
    """Whether fsdp can cut them: evenly, as torch demands of any but the first dimension."""
    if not dims.is_sharded or shard_dimension(model, dims) == 0:
        return True
    return model.n_embd % expert_fsdp_ranks(dims) == 0 and model.ffn_width % (expert_fsdp_ranks(dims) * dims.tp) == 0


def check_expert(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError where the experts cannot be dealt out to ``ep`` ranks."""
    model, ep = config.model, dims.ep
    if ep == 1:
        return
    if model.ffn is not Ffn.moe:
        raise ConfigError(
            f"parallel.ep={ep} with model.ffn={model.ffn.name}",
            "a mixture of experts, whose experts can be dealt out",
            "parallel.ep=1, or model=moe_200m",
        )
    if config.recompute is Recompute.selective and config.compile.name != "none":
        raise ConfigError(
            f"parallel.ep={ep} with recompute=selective and compile={config.compile.name}",
            "one of the two, or full recomputation: the compiler hides from a selective one what could be kept",
            "recompute=full",
        )
    if model.n_expert % ep:
        raise ConfigError(
            f"parallel.ep={ep} with model.n_expert={model.n_expert}",
            "as many experts for every rank",
            f"parallel.ep={nearest_ep(model, dims)}",
        )
    if not can_shard(model, dims):
        ranks = expert_fsdp_ranks(dims)
        raise ConfigError(
            f"parallel.ep={ep}: fsdp cuts {model.n_expert // ep} experts of {model.n_embd} x {model.ffn_width} over "
            f"{ranks} ranks",
            f"as many experts for every rank, or model.n_embd and model.ffn_hidden that are multiples of {ranks}",
            f"parallel.ep={nearest_ep(model, dims)}",
        )


def nearest_ep(model: ModelConfig, dims: ParallelDims) -> int:
    """The ``ep`` nearest to that of ``dims`` for which there is nothing to refuse; 1 is such a one."""
    ranks = dims.dp_shard if dims.is_sharded else dims.data_ranks
    possible = [d for d in divisors(math.gcd(model.n_expert, ranks)) if d == 1 or can_shard(model, replace(dims, ep=d))]
    return min(possible, key=lambda d: (abs(d - dims.ep), d))
