"""The shard of each parameter on a rank, and the activations that a forward pass saves. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

from gpt.accounting import (
    BF16,
    FP32,
    INT64,
    attention_pairs,
    block_shapes,
    expert_rows,
    outer_shapes,
)
from gpt.components import owner_of, part_counts
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
from gpt.config.model import CACHED
from gpt.topology import ParallelDims, expert_fsdp_ranks, shard_dimension
from gpt.topology.schedules import StageLayers

# Shard of each parameter: by pipeline stage, tensor and expert parallelism, then FSDP.
#
# The rules are those of the engines (gpt/parallel); tests compare the two.


SHARDED_DIM_0 = ("query", "key", "value", "sinks", "gate", "up", "token_embedding", "head")
"""Words in the names of parameters that tensor parallelism shards along the first dimension (column-parallel): by
heads, inner width or vocabulary (Megatron-LM, arXiv 1909.08053, section 3)."""
SHARDED_DIM_1 = ("output.weight", "down.weight", "experts.down")
"""Ends of the names of parameters that tensor parallelism shards along the second dimension (row-parallel)."""


AROUND = ("token_embedding.", "position.", "norm.", "head.")
"""Beginnings of the names of parameters outside of the blocks."""
ENTRY = ("token_embedding.", "position.")
"""Beginnings of the names of parameters before the first block."""


@dataclass(frozen=True)
class ParameterShard:
    """Shard of a parameter on one rank."""

    name: str
    shape: tuple[int, ...]
    """Shape of the tensor with which the rank computes: its shard under tp and ep, after the all-gather of FSDP."""
    ranks: int
    """Number of ranks over which FSDP shards the tensor of ``shape`` for storage."""
    dimension: int = 0
    """Dimension along which FSDP shards the parameter."""

    @cached_property
    def elements(self) -> int:
        """Number of elements of ``shape``."""
        return math.prod(self.shape)

    def stored(self, ranks: int) -> int:
        """Return the number of elements that a rank stores if ``ranks`` ranks shard the tensor: those of the largest
        shard, because all shards are padded to its size."""
        return -(-self.shape[self.dimension] // ranks) * (self.elements // self.shape[self.dimension])


@dataclass(frozen=True)
class ParameterShards:
    """The parameter shards of one rank."""

    block: tuple[ParameterShard, ...]
    """Shards of the parameters of one block."""
    around: tuple[ParameterShard, ...]
    """Shards of the parameters outside the blocks."""
    layers: int
    """Number of blocks on the rank."""

    @cached_property
    def elements(self) -> int:
        """Number of elements of all parameters with which the rank computes, all-gathered by FSDP."""
        return self.layers * elements(self.block) + elements(self.around)

    @cached_property
    def expert_elements(self) -> int:
        """Number of elements of experts with which the rank computes, all-gathered by FSDP."""
        return self.layers * elements(p for p in self.block if ".experts." in p.name)

    @property
    def entry(self) -> tuple[ParameterShard, ...]:
        """Shards of the parameters before the blocks: token embedding and position table."""
        return tuple(p for p in self.around if p.name.startswith(ENTRY))

    @property
    def tensors(self) -> int:
        """Number of parameter tensors of the rank."""
        return self.layers * len(self.block) + len(self.around)

    def trained(self, model: ModelConfig) -> ParameterShards:
        """Return the shards of the parameters that are trained: all, or with LoRA those of adapters."""
        block, around = (tuple(p for p in parts if model.trains(p.name)) for parts in (self.block, self.around))
        return replace(self, block=block, around=around)

    def stored(self, ranks: int | None = None) -> int:
        """Return the number of elements that the rank stores, if ``ranks`` ranks shard each parameter; None means the
        ranks of FSDP."""
        of_block, around = (sum(p.stored(ranks or p.ranks) for p in parts) for parts in (self.block, self.around))
        return self.layers * of_block + around


@lru_cache(maxsize=CACHED)
def parameter_shards(
    model: ModelConfig, dims: ParallelDims, stages: tuple[StageLayers, ...] | None = None
) -> ParameterShards:
    """Return the parameter shards of a rank that has the pipeline stages ``stages``; None means one stage with the
    whole model."""
    stages = stages or (StageLayers(range(model.n_layer), first=True, last=True),)
    # A tied embedding is in the first and the last stage.
    at_end = ("norm.", "head.", *(("token_embedding.",) if model.tie_embeddings else ()))
    first, last = any(stage.first for stage in stages), any(stage.last for stage in stages)
    around = {
        name: shape
        for name, shape in outer_shapes(model).items()
        if (last and name.startswith(at_end)) or (first and not name.startswith(("norm.", "head.")))
    }
    return ParameterShards(
        tuple(parameter_shard(name, shape, model, dims) for name, shape in block_shapes(model).items()),
        tuple(parameter_shard(name, shape, model, dims) for name, shape in around.items()),
        sum(len(stage.blocks) for stage in stages),
    )


def parameter_shard(name: str, shape: tuple[int, ...], model: ModelConfig, dims: ParallelDims) -> ParameterShard:
    """Return the shard of the parameter with this name and whole shape, on each rank that has a part of it.

    If tensor parallelism cannot divide a dimension evenly, the result is the largest shard that a rank has.
    """
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
    """Return the shape of a rank's shard of the parameter with this name and whole shape under tensor parallelism over
    ``tp`` ranks. Norms and other vectors are not sharded."""
    inner = len(shape) - 2  # stacked experts are sharded inside each expert
    if any(part in SHARDED_DIM_0 for part in name.split(".")):
        dim = max(inner, 0)
    elif name.endswith(SHARDED_DIM_1) and inner >= 0:
        dim = inner + 1
    else:
        return shape
    return (*shape[:dim], -(-shape[dim] // tp), *shape[dim + 1 :])


def elements(parts: Iterable[ParameterShard]) -> int:
    """Return the number of elements of all ``parts``, all-gathered by FSDP."""
    return sum(part.elements for part in parts)


def cast_elements(shards: ParameterShards, last: bool = True) -> int:
    """Return the number of elements of the weights that autocast casts to 16 bits: all matrices except the router.

    ``last`` is True if the rank has the last pipeline stage, and so the output matrix.
    """
    in_blocks = [p for p in shards.block if len(p.shape) > 1 and p.name != "ffn.router.weight"]
    head = [p for p in shards.around if p.name == "head.weight"] or [
        p for p in shards.around if p.name == "token_embedding.weight"
    ]
    return shards.layers * elements(in_blocks) + last * elements(head)


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
    """Numbers of ranks over which the activations of a micro-batch are divided."""

    tp: int = 1
    """Number of tensor-parallel ranks, over which heads and inner widths are sharded."""
    hidden: int = 1
    """Number of ranks over which hidden states between the modules of a block are sharded: ``tp`` with sequence
    parallelism, else 1."""
    cp: int = 1
    """Number of context-parallel ranks, over which each sequence is sharded."""
    gathers_keys: bool = False
    """True if each rank saves all-gathered keys and values (``cp_method=allgather``)."""
    sends_rows: bool = False
    """True if experts are sharded over ranks (ep), so that rows are sent to the ranks of their experts and back."""

    def tokens(self, model: ModelConfig, sequences: int) -> int:
        """Return the number of tokens that one rank has of ``sequences`` whole sequences: each is sharded over ``cp``
        ranks."""
        return sequences * model.block_size // self.cp


SINGLE_RANK = ParallelFactors()


@dataclass(frozen=True)
class ActivationBytes:
    """Activations that one rank saves for the backward pass of one micro-batch, in bytes."""

    embedding: int
    """Bytes of the embedding."""
    final: int
    """Bytes of the last norm and the output matrix."""
    block: int
    """Bytes of one block, without recomputation."""
    recomputed: int
    """Bytes of one block that are saved until its backward pass, which recomputes the rest of ``block``. Without
    recomputation equal to ``block``."""


@lru_cache(maxsize=CACHED)
def activation_bytes(
    model: ModelConfig,
    sequences: int,
    precision: Precision,
    recompute: Recompute = Recompute.none,
    factors: ParallelFactors = SINGLE_RANK,
) -> ActivationBytes:
    """Return the bytes of activations that a forward pass over ``sequences`` sequences keeps for the backward pass,
    without logits and weights.

    A recomputed block keeps its input, and with ``selective`` the results of its matrix products.
    """
    width = BF16 if precision.is_half else FP32
    layer = LayerBytes(model, sequences, width, factors)
    embedding = INT64 + layer.dropout(FP32)
    if isinstance(model.position, str) and not part_counts(model)["position"].on_heads:
        embedding += layer.custom("position")
    norm = layer.norm() if model.norm_position is not NormPosition.post else 0
    block = layer.block()
    hidden = -(-layer.tokens * FP32 * model.n_embd // factors.hidden)
    left = {
        Recompute.none: block,
        Recompute.selective: hidden + layer.products(),
        Recompute.full: hidden,
    }
    return ActivationBytes(
        layer.tokens * embedding, layer.tokens * (norm + width * model.n_embd), block, left[recompute]
    )


class LayerBytes:
    """Bytes that one layer (block) of a rank saves for its backward pass. If only some layers have sliding-window
    attention, the bytes are the mean over all layers.

    ``block``, ``products`` and ``experts`` return bytes of a micro-batch, the other methods bytes of one token.

    Args:
        model: the model.
        sequences: sequences of the micro-batch.
        width: bytes of one number in matrix products, 2 or 4.
        factors: degrees by which the layer is divided over ranks.
    """

    def __init__(self, model: ModelConfig, sequences: int, width: int, factors: ParallelFactors) -> None:
        self.model, self.width, self.factors = model, width, factors
        self.tokens = factors.tokens(model, sequences)
        self.rows = sequences * expert_rows(model) // factors.cp if model.ffn is Ffn.moe else 0
        self.heads, kv_heads = -(-model.n_head // factors.tp), -(-model.kv_heads // factors.tp)
        self.queries, self.keys = self.heads * model.head_dim, kv_heads * model.head_dim
        window = min(model.block_size, model.window or model.block_size)
        local = sum(map(model.is_local, range(model.n_layer))) / model.n_layer
        self.blockwise = local if window < model.block_size else 0.0
        """Share of the layers, 0 to 1, that have a sliding window. They compute attention one block of queries after
        another."""
        by_sinks = 0 if not model.attention_sinks else 1 if model.dropout else self.blockwise
        self.written_out = 1 if model.attention is AttentionBackend.manual else by_sinks
        """Share of the layers, 0 to 1, that write the attention scores to memory, because they use no fused kernel.

        With ``attention=manual`` these are all layers. With attention sinks they are the layers that have a window,
        and with sinks and dropout all layers. Otherwise there are none."""
        fused = 1 - self.written_out if self.written_out else 0
        self.span = attention_pairs(model) / model.n_layer / model.block_size - fused * model.block_size
        self.span += model.attention_sinks * self.written_out
        """Number of scores of one query: the mean over all layers. If only some layers write the scores to memory, the
        other layers count as 0."""
        self.keys_read = 1 + self.blockwise * (1 - window / model.block_size)
        """Number of blocks of queries that read the same key, 1 to 2: the mean over all layers. If a layer computes
        attention by blocks of queries, the windows of two blocks overlap."""
        self.inner = -(-model.ffn_width // factors.tp)
        self.inner_tensors = 1 if model.ffn_activation is Activation.relu else 2  # ReLU only needs its result
        if model.gated:
            self.inner_tensors = 4  # gate, activation of the gate, up, and their product

    def block(self) -> int:
        """Return the bytes that a block saves for its backward pass."""
        model, factors = self.model, self.factors
        bytes_ = self.tokens * (self.attention() + self.ffn() + self.adapters()) + self.experts()
        if model.parallel_residual:
            bytes_ -= self.tokens * FP32 * model.n_embd // factors.hidden  # both norms keep the same input
        if model.attention is AttentionBackend.manual:
            # The mask, one byte for each pair. A block of queries adds a bias instead.
            bytes_ += math.ceil((1 - self.blockwise) * model.block_size**2 / factors.cp)
        if factors.cp > 1 and model.position is Position.rope:
            # Sines and cosines of the rank's own positions, copied for the queries and again for the keys.
            bytes_ += 2 * FP32 * model.rotary_width * factors.tokens(model, 1)
        return bytes_

    def products(self) -> int:
        """Return the bytes of the results of a block's matrix products and attention, which selective recomputation
        saves (gpt/parallel/modules.py).

        If only one of attention and feed-forward layer is a class of the user, the result is an upper bound. It then
        has all tensors that the built-in part saves, not only results of products.
        """
        model, width, factors = self.model, self.width, self.factors
        custom = model.custom_parts
        if custom.keys() & {"attention", "ffn"}:
            attention = self.custom("attention", products=True) if "attention" in custom else self.attention()
            return self.tokens * (attention + (self.custom("ffn", products=True) if "ffn" in custom else self.ffn()))
        written_out = bool(self.written_out or model.dropout)
        attention = width * (2 * self.queries + 2 * self.keys + model.n_embd + sum(model.latent_widths))
        attention += math.ceil(width * self.heads * self.span) if written_out else FP32 * self.heads
        if factors.cp > 1 and not factors.gathers_keys:  # a ring's last rank merges one result for each block of keys
            attention += (factors.cp - 1) * (width * self.queries + (0 if written_out else FP32 * self.heads))
        up = 2 if model.gated else 1
        if model.ffn is not Ffn.moe:
            return self.tokens * (attention + width * (up * self.inner + model.n_embd))
        shared = model.n_shared_expert * self.inner
        mixture = FP32 * model.n_expert + (width * (up * shared + model.n_embd) if shared else 0)
        # Plus the rows received in both all-to-alls.
        results = up * self.inner + (3 if factors.sends_rows else 1) * model.n_embd
        return self.tokens * (attention + mixture) + self.rows * width * results

    def adapters(self) -> int:
        """Return the bytes per token that adapters (LoRA) keep for the backward pass: the results of their first
        matrices, and with dropout the noise and the results of dropout."""
        model, width = self.model, self.width
        inputs = [shape[1] for name, shape in block_shapes(model).items() if name.endswith("lora_a")]
        noise = 2 * width * sum(inputs) if model.lora.dropout else 0
        return width * model.lora.rank * len(inputs) + noise

    def custom(self, part: str, products: bool = False) -> int:
        """Return the bytes per token that a user's class keeps for the backward pass; with ``products``, only those of
        results of matrix products.

        ``part`` is the part of the model that the class replaces, such as ``attention``.
        """
        counts = part_counts(self.model)[part]
        counted = (counts.products if products else counts.saved)["half" if self.width == BF16 else "fp32"]
        return -(-counted // self.model.block_size)

    def norm(self) -> int:
        """Return the bytes per token that a norm over the width of the model keeps for the backward pass."""
        is_custom = isinstance(self.model.norm, str)
        return -(-(self.custom("norm") if is_custom else self.norm_over(self.model.n_embd)) // self.factors.hidden)

    def norms(self) -> int:
        """Return the bytes per token that the norms around attention keep for the backward pass; the norms around the
        feed-forward layer keep as many. There are two norms with ``norm_position=both``, else one."""
        if self.model.norm_position is not NormPosition.both:
            return self.norm()
        # LayerNorm keeps its input in the dtype that it receives: here that of a result.
        narrow = 0 if self.model.norm is Norm.rmsnorm or isinstance(self.model.norm, str) else FP32 - self.width
        return 2 * self.norm() - narrow * self.model.n_embd // self.factors.hidden

    def norm_over(self, width: int) -> int:
        """Return the bytes per token that a built-in norm over ``width`` numbers keeps for the backward pass, in
        fp32."""
        return FP32 * (2 * width + 1 if self.model.norm is Norm.rmsnorm else width + 2)

    def dropout(self, width: int) -> int:
        """Return the bytes per token that one dropout of the residual stream keeps for the backward pass. ``width`` is
        the number of bytes that it keeps for each element. Return 0 without dropout."""
        return -(-width * self.model.n_embd // self.factors.hidden) if self.model.dropout else 0

    def read(self, readers: int) -> int:
        """Return the bytes per token that ``readers`` matrices keep of their common input, hidden states. In 16 bits
        each matrix keeps a copy; in fp32 they all share one copy. With tp each rank keeps whole hidden states, too."""
        return (readers if self.width == BF16 else 1) * self.width * self.model.n_embd

    def attention(self) -> int:
        """Return the bytes per token that attention keeps for the backward pass, with its norms: queries, keys, values,
        the result, and the attention weights if they are written to memory."""
        model, width, factors = self.model, self.width, self.factors
        around = self.norms() + self.dropout(width)
        if isinstance(model.attention, str):
            return around + self.custom("attention")
        of_others = factors.cp if factors.gathers_keys else 1
        if self.written_out:
            # Softmax; with dropout also its noise and its result, with a bound the tangent.
            pairs = (3 if model.dropout else 1) + (model.attention_softcap is not None)
            read = self.written_out + self.keys_read - 1
            copied = 2 * self.queries * of_others * read + pairs * self.heads * self.span
            bytes_ = width * (2 * self.queries + math.ceil(copied))
        else:  # the result, in blocks and merged
            bytes_ = width * (2 * self.queries + math.ceil(self.queries * self.blockwise))
        # The rest of the layers keeps keys, values, and the log-sum-exp of every row.
        bytes_ += math.ceil((1 - self.written_out) * (2 * width * self.keys * of_others + FP32 * self.heads))
        if factors.gathers_keys:
            bytes_ += width * self.queries  # the result, once in chunks from the kernel and once merged
        if model.qk_norm and isinstance(model.norm, str):
            bytes_ += self.custom("head_norm")
        elif model.qk_norm:
            bytes_ += (self.heads + self.keys // model.head_dim) * self.norm_over(model.head_dim)
            if model.norm is not Norm.rmsnorm:  # LayerNorm keeps its input in the dtype it receives
                bytes_ -= (FP32 - width) * (self.queries + self.keys)
        if isinstance(model.position, str) and part_counts(model)["position"].on_heads:
            bytes_ += self.custom("position")
        if not model.latent_widths:
            return around + self.read(3) + bytes_
        bytes_ += sum(self.norm_over(rank) + width * rank for rank in model.latent_widths)
        # Written-out attention keeps values and result without padding. A padded result is copied without it.
        bytes_ += width * self.heads * (-2 * model.rotary_width if self.written_out else model.value_width)
        return around + self.read(2) + bytes_

    def ffn(self) -> int:
        """Return the bytes per token that the feed-forward layer keeps for the backward pass, with its norms.

        A mixture of experts keeps the tensors of the router in fp32, results and indices of the chosen experts, and
        tensors of the shared experts. ``experts`` counts the rest.
        """
        model, width = self.model, self.width
        around = self.norms() + self.dropout(width)
        if isinstance(model.ffn, str):  # each tp rank computes its own tokens in a layer of the user
            return around - (-self.custom("ffn") // self.factors.hidden)
        if model.ffn is not Ffn.moe:
            return around + self.dense(self.inner)
        chosen, indices = model.n_expert_per_token, 2 if model.capacity_factor else 3
        router = FP32 * (model.n_embd + 2 * model.n_expert + 2) + chosen * (2 * FP32 + indices * INT64)
        bytes_ = around + router + chosen * width * model.n_embd
        if model.n_shared_expert:
            bytes_ += self.dense(model.n_shared_expert * self.inner)
            bytes_ -= 0 if width == BF16 else width * model.n_embd  # the router keeps the same input
        return bytes_

    def dense(self, inner: int) -> int:
        """Return the bytes per token that a dense feed-forward layer with the inner width ``inner`` keeps for the
        backward pass."""
        return self.read(2 if self.model.gated else 1) + self.width * self.inner_tensors * inner

    def experts(self) -> int:
        """Return the bytes per micro-batch of the rows and inner tensors that the experts keep for the backward pass; 0
        without experts.

        Routing is assumed to be balanced: with expert parallelism a rank receives as many rows as it sends.
        """
        if self.model.ffn is not Ffn.moe:
            return 0
        # The order by expert on the receiving rank, and its inverse; and one row for tokens without an expert.
        orders = 2 * INT64 if self.factors.sends_rows else 0
        left_over = self.width * self.model.n_embd if self.model.capacity_factor else 0
        return self.rows * (orders + self.width * (self.model.n_embd + self.inner_tensors * self.inner)) + left_over
