"""Shard of each parameter on a rank, exactly, and the activations that a forward pass saves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from gpt.accounting import BF16, FP32, INT64, block_shapes, expert_rows, outer_shapes
from gpt.components.facts import owner_of, part_counts
from gpt.config import (
    Activation,
    AttentionBackend,
    Ffn,
    ModelConfig,
    Norm,
    NormPosition,
    Position,
    Precision,
    Recompute,
)
from gpt.config.rules import cached_by_model
from gpt.topology import ParallelDims, expert_fsdp_ranks, shard_dimension
from gpt.topology.pipeline import StageLayers

# Shard of each parameter: by pipeline stage, tensor and expert parallelism, then FSDP.
#
# The rules are those of the engines (gpt/parallel); tests compare the two.


SHARDED_DIM_0 = ("query", "key", "value", "gate", "up", "token_embedding", "head")
"""Tensors that tensor parallelism shards along the first dimension (column-parallel): by heads, inner width or
vocabulary (Megatron-LM, arXiv 1909.08053, section 3)."""
SHARDED_DIM_1 = ("output.weight", "down.weight", "experts.down")
"""Tensors that tensor parallelism shards along the second dimension (row-parallel)."""


AROUND = ("token_embedding.", "position.", "norm.", "head.")
"""Prefixes of the names of parameters outside the blocks."""
ENTRY = ("token_embedding.", "position.")
"""Prefixes of the names of parameters before the blocks."""


@dataclass(frozen=True)
class ParameterShard:
    """Shard of a parameter on one rank."""

    name: str
    shape: tuple[int, ...]
    """Shape with which the rank computes: sharded by tp and ep, not yet by FSDP."""
    ranks: int
    """Number of ranks over which FSDP shards the parameter further."""
    dimension: int = 0
    """Dimension along which FSDP shards the parameter."""

    @cached_property
    def elements(self) -> int:
        """Number of elements with which the rank computes."""
        return math.prod(self.shape)

    def stored(self, ranks: int) -> int:
        """Return the elements stored by one of ``ranks`` ranks: those of the largest shard, to which all shards are
        padded."""
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
        """Number of elements with which the rank computes."""
        return self.layers * elements(self.block) + elements(self.around)

    @cached_property
    def expert_elements(self) -> int:
        """Number of elements of experts with which the rank computes."""
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
        """Return the elements that the rank stores, sharded over ``ranks``, by default over FSDP's ranks."""
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
    """True if a stage has a parameter outside the blocks. A tied embedding is in the first and the last stage."""
    if name.startswith(("norm.", "head.")):
        return part.last
    return part.first or (part.last and name.startswith("token_embedding.") and model.tie_embeddings)


def parameter_shard(name: str, shape: tuple[int, ...], model: ModelConfig, dims: ParallelDims) -> ParameterShard:
    """Return one rank's shard of a parameter, from its name and whole shape."""
    local = shape
    if dims.tp > 1:
        whole_name = name if name.startswith(AROUND) else f"blocks.0.{name}"
        if owner_of(whole_name, model) is None:  # parts of the user are replicated
            local = tensor_parallel_shape(name, shape, dims.tp)
    # Each context-parallel rank has a part of the gradient, so FSDP also shards over these ranks.
    ranks = dims.dp_shard * dims.cp if dims.is_sharded else 1
    if dims.ep == 1 or ".experts." not in name:
        return ParameterShard(name, local, ranks)
    expert_shape = (local[0] // dims.ep, *local[1:])
    if not dims.is_sharded:
        return ParameterShard(name, expert_shape, 1)
    return ParameterShard(name, expert_shape, expert_fsdp_ranks(dims), shard_dimension(model, dims))


def tensor_parallel_shape(name: str, shape: tuple[int, ...], tp: int) -> tuple[int, ...]:
    """Return the shape of one tensor-parallel rank's shard. Norms and other vectors are replicated."""
    inner = len(shape) - 2  # stacked experts are sharded inside each expert
    if any(part in SHARDED_DIM_0 for part in name.split(".")):
        dim = max(inner, 0)
    elif name.endswith(SHARDED_DIM_1) and inner >= 0:
        dim = inner + 1
    else:
        return shape
    return (*shape[:dim], -(-shape[dim] // tp), *shape[dim + 1 :])


def elements(parts: Iterable[ParameterShard]) -> int:
    """Return the sum of the elements with which a rank computes."""
    return sum(part.elements for part in parts)


def cast_elements(shards: ParameterShards) -> int:
    """Return the elements of the matrices that autocast casts: all matrices of products except the fp32 router."""
    in_blocks = [p for p in shards.block if len(p.shape) > 1 and p.name != "ffn.router.weight"]
    head = [p for p in shards.around if p.name == "head.weight"] or [
        p for p in shards.around if p.name == "token_embedding.weight"
    ]
    return shards.layers * elements(in_blocks) + elements(head)


# Activations that a forward pass saves for its backward pass, tensor by tensor.
#
# A sum over the tensors that autograd saves, after Korthikanti et al. (arXiv 2205.05198, section 4.1), adapted to the
# parts here. In bf16 the residual stream and the norms are still fp32 (autocast), and each matrix casts its input
# separately. The sum is exact on the CPU, and an upper bound for CUDA: there RMSNorm does not keep the normalized
# input, and dropout keeps one byte per element. The fused attention kernel keeps no T x T matrix. With dropout torch
# has no such kernel for the CPU, which then needs as much as ``manual``. With all-gathered keys, the CPU kernel also
# saves a mask, which a GPU does not need and which is not counted.
#
# D width, H heads, K key-value heads, C head width, F inner width of the ffn, T tokens of a sequence.


@dataclass(frozen=True)
class ParallelFactors:
    """Degrees by which the activations of a micro-batch are divided over ranks; by default they are not."""

    tp: int = 1
    """Number of tensor-parallel ranks, over which heads and inner widths are sharded."""
    hidden: int = 1
    """Number of ranks over which hidden states between the modules of a block are sharded: tp with sequence
    parallelism."""
    cp: int = 1
    """Number of context-parallel ranks, over which each sequence is sharded."""
    gathers_keys: bool = False
    """With cp: True if each rank saves the all-gathered keys and values."""
    sends_rows: bool = False
    """True if experts are sharded over ranks, so that rows are sent to them and back."""

    def tokens(self, model: ModelConfig, sequences: int) -> int:
        """Return the tokens of one rank in ``sequences`` sequences."""
        return sequences * model.block_size // self.cp


SINGLE_RANK = ParallelFactors()


@dataclass(frozen=True)
class ActivationBytes:
    """Saved activations of one rank for one micro-batch, in bytes."""

    embedding: int
    final: int
    """Bytes of the final norm and the output matrix."""
    block: int
    """Bytes of one block."""
    recomputed: int
    """Part of ``block`` that is saved until its backward pass begins, if the rest is recomputed then."""


@cached_by_model
def activation_bytes(
    model: ModelConfig,
    sequences: int,
    precision: Precision,
    recompute: Recompute = Recompute.none,
    factors: ParallelFactors = SINGLE_RANK,
) -> ActivationBytes:
    """Return the activations saved by a forward pass over ``sequences`` sequences, without logits and weights.

    A recomputed block saves its input, and with ``selective`` the results of its matrix products.
    """
    tokens = factors.tokens(model, sequences)
    width = BF16 if precision.is_half else FP32
    embedding = INT64 + dropout_bytes(model, FP32, factors)
    if isinstance(model.position, str) and not part_counts(model)["position"].on_heads:
        embedding += custom_bytes(model, "position", width)
    norm = norm_bytes(model, factors=factors, kept=width) if model.norm_position is NormPosition.pre else 0
    block = block_bytes(model, sequences, width, factors)
    hidden = -(-tokens * FP32 * model.n_embd // factors.hidden)
    left = {
        Recompute.none: block,
        Recompute.selective: hidden + product_bytes(model, sequences, width, factors),
        Recompute.full: hidden,
    }
    return ActivationBytes(tokens * embedding, tokens * (norm + width * model.n_embd), block, left[recompute])


def block_bytes(model: ModelConfig, sequences: int, width: int, factors: ParallelFactors) -> int:
    """Return the bytes that one block saves for its backward pass."""
    tokens = factors.tokens(model, sequences)
    bytes_ = tokens * (attention_bytes(model, width, factors) + ffn_bytes(model, width, factors))
    if model.ffn is Ffn.moe:
        bytes_ += expert_bytes(model, sequences, width, factors)
    if model.parallel_residual:
        bytes_ -= tokens * FP32 * model.n_embd // factors.hidden  # both norms keep the same input
    bytes_ += sum(part_counts(model)[part].fixed for part in ("attention", "ffn") if part in model.custom_parts)
    if model.attention is AttentionBackend.manual:
        bytes_ += model.block_size**2 // factors.cp  # the mask, one byte for each pair
    if factors.cp > 1 and model.position is Position.rope:
        # Sines and cosines of the rank's own positions, copied for the queries and again for the keys.
        bytes_ += 2 * FP32 * model.head_dim * factors.tokens(model, 1)
    return bytes_


def product_bytes(model: ModelConfig, sequences: int, width: int, factors: ParallelFactors) -> int:
    """Return the bytes of the results of a block's matrix products, with attention, as gpt/parallel/compile.py saves
    them."""
    tokens, up = factors.tokens(model, sequences), 2 if model.gated else 1
    if model.custom_parts.keys() & {"attention", "ffn"}:
        return tokens * custom_products(model, width, factors)
    queries, keys, heads = head_widths(model, factors)
    written_out = model.attention is AttentionBackend.manual or bool(model.dropout)
    attention = width * (2 * queries + 2 * keys + model.n_embd)
    attention += width * heads * model.block_size if written_out else FP32 * heads
    if factors.cp > 1 and not factors.gathers_keys:  # the last rank of a ring merges one result for each block of keys
        attention += (factors.cp - 1) * (width * queries + (0 if written_out else FP32 * heads))
    inner = -(-model.ffn_width // factors.tp)
    if model.ffn is not Ffn.moe:
        return tokens * (attention + width * (up * inner + model.n_embd))
    shared = model.n_shared_expert * inner
    mixture = FP32 * model.n_expert + (width * (up * shared + model.n_embd) if shared else 0)
    rows = sequences * expert_rows(model) // factors.cp
    results = up * inner + (3 if factors.sends_rows else 1) * model.n_embd  # plus the rows received in both all-to-alls
    return tokens * (attention + mixture) + rows * width * results


def custom_products(model: ModelConfig, width: int, factors: ParallelFactors) -> int:
    """Return the bytes per token of matrix products of a layer whose attention or feed-forward layer is the user's.

    A built-in part of the layer counts with all its saved tensors, as an upper bound.
    """
    bytes_ = 0
    for part, ours in (("attention", attention_bytes), ("ffn", ffn_bytes)):
        if part in model.custom_parts:
            bytes_ += custom_bytes(model, part, width, products=True)
        else:
            bytes_ += ours(model, width, factors)
    return bytes_


def custom_bytes(model: ModelConfig, part: str, width: int, products: bool = False) -> int:
    """Return the bytes per token that a part of the user saves, or those of its matrix products, rounded up."""
    counts = part_counts(model)[part]
    measured = (counts.products if products else counts.saved)["half" if width == BF16 else "fp32"]
    return -(-measured // model.block_size)


def head_widths(model: ModelConfig, factors: ParallelFactors) -> tuple[int, int, int]:
    """Return the width of queries and of keys of one token, and the number of query heads, of one rank."""
    heads, kv_heads = -(-model.n_head // factors.tp), -(-model.kv_heads // factors.tp)
    return heads * model.head_dim, kv_heads * model.head_dim, heads


def norm_bytes(
    model: ModelConfig,
    norms: int = 1,
    width: int | None = None,
    factors: ParallelFactors = SINGLE_RANK,
    kept: int = FP32,
) -> int:
    """Return the bytes per token of ``norms`` norms over ``width`` (D): input and statistics, fp32. ``kept`` is the
    bytes of a number in matrix products, for the measured norms of the user."""
    if isinstance(model.norm, str):
        return -(-custom_bytes(model, "norm" if width is None else "head_norm", kept) // factors.hidden)
    width = model.n_embd if width is None else width
    return -(-FP32 * norms * (2 * width + 1 if model.norm is Norm.rmsnorm else width + 2) // factors.hidden)


def read_bytes(model: ModelConfig, width: int, readers: int) -> int:
    """Return the bytes per token that matrices keep of a tensor that ``readers`` of them read: one tensor, or in bf16
    one cast each. They read the whole tensor, even if the hidden states before are sharded."""
    return (readers if width == BF16 else 1) * width * model.n_embd


def attention_bytes(model: ModelConfig, width: int, factors: ParallelFactors) -> int:
    """Return the bytes per token of one layer: norm, queries, keys, values, saved values of T x T pairs, and the
    result."""
    around = norm_bytes(model, factors=factors, kept=width) + dropout_bytes(model, width, factors)
    if isinstance(model.attention, str):
        return around + custom_bytes(model, "attention", width)
    queries, keys, heads = head_widths(model, factors)
    of_others = factors.cp if factors.gathers_keys else 1
    if model.attention is AttentionBackend.manual:
        pairs = 3 if model.dropout else 1  # softmax, and with dropout also its noise and its result
        bytes_ = width * (2 * queries + 2 * queries * of_others + pairs * heads * model.block_size)
    else:
        bytes_ = width * (2 * queries + 2 * keys * of_others) + FP32 * heads  # plus the log-sum-exp of every row
    if factors.gathers_keys:
        bytes_ += width * queries  # the result, once in chunks from the kernel and once merged
    if model.qk_norm:
        bytes_ += norm_bytes(model, heads + keys // model.head_dim, model.head_dim, kept=width)
        if isinstance(model.norm, Norm) and model.norm is not Norm.rmsnorm:
            bytes_ -= (FP32 - width) * (queries + keys)  # LayerNorm keeps its input in the dtype it receives
    if isinstance(model.position, str) and part_counts(model)["position"].on_heads:
        bytes_ += custom_bytes(model, "position", width)
    return around + read_bytes(model, width, 3) + bytes_


def ffn_bytes(model: ModelConfig, width: int, factors: ParallelFactors) -> int:
    """Return the bytes per token of one layer: norm and feed-forward layer."""
    around, inner = (
        norm_bytes(model, factors=factors, kept=width) + dropout_bytes(model, width, factors),
        -(-model.ffn_width // factors.tp),
    )
    if isinstance(model.ffn, str):  # each tp rank computes its own tokens in a layer of the user
        return around - (-custom_bytes(model, "ffn", width) // factors.hidden)
    if model.ffn is not Ffn.moe:
        return around + dense_bytes(model, width, inner)
    bytes_ = around + mixture_bytes(model, width)
    if model.n_shared_expert:
        bytes_ += dense_bytes(model, width, model.n_shared_expert * inner)
        bytes_ -= 0 if width == BF16 else width * model.n_embd  # the router keeps the same input
    return bytes_


def dense_bytes(model: ModelConfig, width: int, inner: int) -> int:
    """Return the bytes per token: the input, once for each matrix that reads it, and the inner tensors."""
    return read_bytes(model, width, readers=2 if model.gated else 1) + width * inner_tensors(model) * inner


def inner_tensors(model: ModelConfig) -> int:
    """Return the number of tensors of the inner width that the activation and the last matrix save."""
    if model.gated:
        return 4  # gate, activation of the gate, up, and their product
    return 1 if model.ffn_activation is Activation.relu else 2  # ReLU only needs its result


def mixture_bytes(model: ModelConfig, width: int) -> int:
    """Return the bytes per token: the router in fp32, the results of its experts, and their places."""
    chosen, indices = model.n_expert_per_token, 2 if model.capacity_factor else 3
    router = FP32 * (model.n_embd + 2 * model.n_expert + 2) + chosen * (2 * FP32 + indices * INT64)
    return router + chosen * width * model.n_embd


def expert_bytes(model: ModelConfig, sequences: int, width: int, factors: ParallelFactors) -> int:
    """Return the bytes of the rows of one layer's experts, and of their inner tensors.

    With expert parallelism a rank is assumed to receive as many rows as it sends: balanced routing.
    """
    rows = sequences * expert_rows(model) // factors.cp
    orders = 2 * INT64 if factors.sends_rows else 0  # the order by expert on the receiving rank, and its inverse
    inner = inner_tensors(model) * -(-model.ffn_width // factors.tp)
    left_over = width * model.n_embd if model.capacity_factor else 0  # one row for tokens without an expert
    return rows * (orders + width * (model.n_embd + inner)) + left_over


def dropout_bytes(model: ModelConfig, width: int, factors: ParallelFactors) -> int:
    """Return the bytes per token of the noise of one dropout over the residual width."""
    return -(-width * model.n_embd // factors.hidden) if model.dropout else 0
