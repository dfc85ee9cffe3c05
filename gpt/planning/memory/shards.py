"""The exact shard of each parameter on a rank: by pipeline stage, tensor and expert parallelism, then FSDP.

The rules are those of the engines (gpt/parallel), and the tests compare both. Must not know how many bytes an element
has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from gpt.accounting.parameters import block_shapes, outer_shapes
from gpt.components.facts import owner_of
from gpt.config import ModelConfig
from gpt.config.memo import cached_by_model
from gpt.topology.dims import ParallelDims
from gpt.topology.experts import expert_fsdp_ranks, shard_dimension
from gpt.topology.pipeline import StageLayers

SHARDED_DIM_0 = ("query", "key", "value", "gate", "up", "token_embedding", "head")
"""Tensors that tensor parallelism shards along the first dimension (column-parallel): by heads, inner width or
vocabulary
(Megatron-LM, arXiv 1909.08053, section 3)."""
SHARDED_DIM_1 = ("output.weight", "down.weight", "experts.down")
"""Tensors that it shards along the second dimension (row-parallel)."""


AROUND = ("token_embedding.", "position.", "norm.", "head.")
"""Beginnings of the names of parameters outside the blocks."""
ENTRY = ("token_embedding.", "position.")
"""Those of parameters before the blocks."""


@dataclass(frozen=True)
class ParameterShard:
    """One rank's shard of a parameter."""

    name: str
    shape: tuple[int, ...]
    """Shape that the rank computes with: sharded by tp and ep, not yet by FSDP."""
    ranks: int
    """Ranks over which FSDP shards it further."""
    dimension: int = 0
    """Dimension along which FSDP shards it."""

    @cached_property
    def elements(self) -> int:
        """Elements that the rank computes with."""
        return math.prod(self.shape)

    def stored(self, ranks: int) -> int:
        """Return the elements stored by one of ``ranks`` ranks: the largest shard, to which the others are padded."""
        return -(-self.shape[self.dimension] // ranks) * (self.elements // self.shape[self.dimension])


@dataclass(frozen=True)
class ParameterShards:
    """The parameter shards of one rank."""

    block: tuple[ParameterShard, ...]
    """Shards of one block."""
    around: tuple[ParameterShard, ...]
    """Shards outside the blocks."""
    layers: int
    """Number of blocks on the rank."""

    @cached_property
    def elements(self) -> int:
        """Elements that the rank computes with."""
        return self.layers * elements(self.block) + elements(self.around)

    @cached_property
    def expert_elements(self) -> int:
        """Elements of experts that the rank computes with."""
        return self.layers * elements(p for p in self.block if ".experts." in p.name)

    @property
    def entry(self) -> tuple[ParameterShard, ...]:
        """Shards before the blocks."""
        return tuple(p for p in self.around if p.name.startswith(ENTRY))

    @property
    def tensors(self) -> int:
        """Number of parameters."""
        return self.layers * len(self.block) + len(self.around)

    def stored(self, ranks: int | None = None) -> int:
        """Return the elements that the rank stores, sharded over ``ranks``, by default over FSDP's."""
        of_block, around = (sum(p.stored(ranks or p.ranks) for p in parts) for parts in (self.block, self.around))
        return self.layers * of_block + around


def parameter_shards(
    model: ModelConfig, dims: ParallelDims, parts: Sequence[StageLayers] | None = None
) -> ParameterShards:
    """Return the parameter shards of a rank with these stages, by default the whole model."""
    return _parameter_shards(model, dims, None if parts is None else tuple(parts))


@cached_by_model
def _parameter_shards(model: ModelConfig, dims: ParallelDims, parts: tuple[StageLayers, ...] | None) -> ParameterShards:
    block, around = block_shapes(model), outer_shapes(model)
    if parts is not None:
        around = {
            name: shape for name, shape in around.items() if any(has_parameter(part, name, model) for part in parts)
        }
    return ParameterShards(
        tuple(parameter_shard(name, shape, model, dims) for name, shape in block.items()),
        tuple(parameter_shard(name, shape, model, dims) for name, shape in around.items()),
        model.n_layer if parts is None else sum(len(part.blocks) for part in parts),
    )


def has_parameter(part: StageLayers, name: str, model: ModelConfig) -> bool:
    """True where a stage has a parameter outside the blocks; a tied embedding is in the first and the last one."""
    if name.startswith(("norm.", "head.")):
        return part.last
    return part.first or (part.last and name.startswith("token_embedding.") and model.tie_embeddings)


def parameter_shard(name: str, shape: tuple[int, ...], model: ModelConfig, dims: ParallelDims) -> ParameterShard:
    """Return one rank's shard of a parameter, given its name and whole shape."""
    local = shape
    if dims.tp > 1:
        whole_name = name if name.startswith(AROUND) else f"blocks.0.{name}"
        if owner_of(whole_name, model) is None:  # parts of the user's are replicated
            local = tensor_parallel_shape(name, shape, dims.tp)
    # Context-parallel ranks each have a part of the gradient, so FSDP shards over them too.
    ranks = dims.dp_shard * dims.cp if dims.is_sharded else 1
    if dims.ep == 1 or ".experts." not in name:
        return ParameterShard(name, local, ranks)
    expert_shape = (local[0] // dims.ep, *local[1:])
    if not dims.is_sharded:
        return ParameterShard(name, expert_shape, 1)
    return ParameterShard(name, expert_shape, expert_fsdp_ranks(dims), shard_dimension(model, dims))


def tensor_parallel_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """Return the shape of one tensor-parallel rank's shard; norms and the like are replicated."""
    inner = len(shape) - 2  # stacked experts are sharded inside each of them
    if any(part in SHARDED_DIM_0 for part in name.split(".")):
        dim = max(inner, 0)
    elif name.endswith(SHARDED_DIM_1) and inner >= 0:
        dim = inner + 1
    else:
        return shape
    return (*shape[:dim], -(-shape[dim] // tp), *shape[dim + 1 :])


def elements(parts: Iterable[ParameterShard]) -> int:
    """Sum the elements that a rank computes with."""
    return sum(part.elements for part in parts)


def cast_elements(shards: ParameterShards) -> int:
    """Count the elements of the matrices that autocast casts: all matrices of products but the fp32 router."""
    in_blocks = [p for p in shards.block if len(p.shape) > 1 and p.name != "ffn.router.weight"]
    head = [p for p in shards.around if p.name == "head.weight"] or [
        p for p in shards.around if p.name == "token_embedding.weight"
    ]
    return shards.layers * elements(in_blocks) + elements(head)
