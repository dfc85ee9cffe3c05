"""Which part of each parameter a rank holds, exactly: cut by stage, heads, experts, and then over the data ranks.

The rules are those of the engines (gpt/parallel) and are compared in the tests with what these hold. Must not know how
many bytes an element has.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gpt.accounting.parameters import block_shapes, outer_shapes
from gpt.config import ModelConfig
from gpt.topology.dims import ParallelDims
from gpt.topology.experts import expert_fsdp_ranks, shard_dimension
from gpt.topology.pipeline import StageLayers

SHARDED_DIM_0 = ("query", "key", "value", "gate", "up", "token_embedding", "head")
"""Tensors that tensor parallelism cuts along the first dimension: by heads, inner width or vocabulary (Megatron-LM,
arXiv 1909.08053, section 3)."""
SHARDED_DIM_1 = ("output.weight", "down.weight", "experts.down")
"""Those that it cuts along the second: they read what the former gave."""


@dataclass(frozen=True)
class ParameterShard:
    """One rank's part of a parameter."""

    name: str
    shape: tuple[int, ...]
    """Of what it computes with: cut by tp and ep, not yet by the data ranks."""
    ranks: int
    """Ranks that share this part."""
    dimension: int = 0
    """Along which they share it."""

    @property
    def elements(self) -> int:
        """Of what it computes with."""
        return math.prod(self.shape)

    def stored(self, ranks: int) -> int:
        """Elements that one of ``ranks`` ranks stores: the largest slice, to which the others are padded."""
        return -(-self.shape[self.dimension] // ranks) * (self.elements // self.shape[self.dimension])


@dataclass(frozen=True)
class ParameterShards:
    """The parameters of one rank."""

    block: tuple[ParameterShard, ...]
    """Of one block."""
    around: tuple[ParameterShard, ...]
    """Outside the blocks."""
    layers: int
    """Blocks it has."""

    @property
    def elements(self) -> int:
        """Of what it computes with."""
        return self.layers * elements(self.block) + elements(self.around)

    @property
    def expert_elements(self) -> int:
        """Of these, those of the experts."""
        return self.layers * elements(p for p in self.block if ".experts." in p.name)

    @property
    def tensors(self) -> int:
        """Number of parameters."""
        return self.layers * len(self.block) + len(self.around)

    def stored(self, ranks: int | None = None) -> int:
        """Elements that it stores, where ``ranks`` ranks share them, by default those that do."""
        of_block, around = (sum(p.stored(ranks or p.ranks) for p in parts) for parts in (self.block, self.around))
        return self.layers * of_block + around


def parameter_shards(
    model: ModelConfig, dims: ParallelDims, parts: Sequence[StageLayers] | None = None
) -> ParameterShards:
    """The parameters of a rank that has these parts of the model, by default all of it."""
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
    """Whether a part of the model has a parameter outside the blocks; a tied embedding is at both ends."""
    if name.startswith(("norm.", "head.")):
        return part.last
    return part.first or (part.last and name.startswith("token_embedding.") and model.tie_embeddings)


def parameter_shard(name: str, shape: tuple[int, ...], model: ModelConfig, dims: ParallelDims) -> ParameterShard:
    """One rank's part of a parameter of this name and whole shape."""
    local = tensor_parallel_shape(name, shape, dims.tp)
    # A sequence that is shared leaves each of its ranks a part of the gradient, so they share the parameters too.
    ranks = dims.dp_shard * dims.cp if dims.is_sharded else 1
    if dims.ep == 1 or ".experts." not in name:
        return ParameterShard(name, local, ranks)
    expert_shape = (local[0] // dims.ep, *local[1:])
    if not dims.is_sharded:
        return ParameterShard(name, expert_shape, 1)
    return ParameterShard(name, expert_shape, expert_fsdp_ranks(dims), shard_dimension(model, dims))


def tensor_parallel_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """The shape of what one of ``tp`` ranks has of a matrix or its bias; of norms and the like the whole."""
    inner = len(shape) - 2  # a stack of experts is cut inside each of them
    if any(part in SHARDED_DIM_0 for part in name.split(".")):
        dim = max(inner, 0)
    elif name.endswith(SHARDED_DIM_1) and inner >= 0:
        dim = inner + 1
    else:
        return shape
    return (*shape[:dim], -(-shape[dim] // tp), *shape[dim + 1 :])


def elements(parts: Iterable[ParameterShard]) -> int:
    """Elements of what a rank computes with of these."""
    return sum(part.elements for part in parts)


def cast_elements(shards: ParameterShards) -> int:
    """Elements of the matrices that autocast casts: those that activations are multiplied with, the output matrix among
    them, the router, which computes in fp32, not."""
    in_blocks = [p for p in shards.block if len(p.shape) > 1 and p.name != "ffn.router.weight"]
    head = [p for p in shards.around if p.name == "head.weight"] or [
        p for p in shards.around if p.name == "token_embedding.weight"
    ]
    return shards.layers * elements(in_blocks) + elements(head)
