"""Number and shapes of a model's parameters, from its config alone.

Torch-free: the planner counts a model before any machine builds it. The names and shapes are those of
``gpt.model.gpt.GPT`` and are compared with it in the tests; nothing here imports it.

D width, H heads, K key-value heads, C head width, F inner width of the ffn, V vocabulary, T block size, E experts.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields

from gpt.components.facts import part_counts
from gpt.config import Ffn, ModelConfig, Norm, NormPosition, Position

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameters:
    """Number of parameters by component; a tied output matrix counts once, as embedding."""

    embedding: int
    """Token embedding, with the padding of the vocabulary."""
    position: int
    attention: int
    """Attention, with the norms of queries and keys."""
    ffn: int
    """Feed-forward layers; of a mixture the router, all experts, and the shared ones."""
    norm: int
    head: int
    idle: int = 0
    """Part of ``ffn``: the experts that a token is not routed to."""

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, component.name) for component in fields(self) if component.name != "idle")

    @property
    def active(self) -> int:
        """Parameters that one token uses: all but the experts that it is not routed to."""
        return self.total - self.idle

    @property
    def non_embedding(self) -> int:
        """Without token, position and output embeddings: the N of the scaling laws (arXiv 2001.08361, section 2.1)."""
        return self.total - self.embedding - self.position - self.head

    @property
    def active_non_embedding(self) -> int:
        """``active`` without the embeddings."""
        return self.non_embedding - self.idle

    def as_dict(self) -> dict[str, int]:
        """Return the components and the sums over them."""
        sums = ("total", "active", "non_embedding", "active_non_embedding")
        return {**asdict(self), **{name: getattr(self, name) for name in sums}}


def count(model: ModelConfig) -> Parameters:
    """Count the parameters of ``model`` by component."""
    block, around = block_shapes(model), outer_shapes(model)
    experts = model.n_layer * size(block, "ffn.experts.")
    idle_experts = model.n_expert - model.n_expert_per_token
    return Parameters(
        embedding=size(around, "token_embedding."),
        position=size(around, "position."),
        attention=model.n_layer * size(block, "attention."),
        ffn=model.n_layer * size(block, "ffn."),
        norm=model.n_layer * (size(block, "attention_norm.") + size(block, "ffn_norm.")) + size(around, "norm."),
        head=size(around, "head."),
        idle=experts // model.n_expert * idle_experts if experts else 0,
    )


def size(shapes: Shapes, prefix: str = "") -> int:
    """Count the elements of the tensors whose name starts with ``prefix``."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def block_shapes(model: ModelConfig) -> Shapes:
    """Name and shape of every parameter of one block."""
    width, queries, keys = model.n_embd, model.n_head * model.head_dim, model.kv_heads * model.head_dim
    shapes = norm_shapes(model, "attention_norm", width)
    if isinstance(model.attention, str):
        shapes |= part_shapes(model, "attention", "attention")
    else:
        shapes |= linear_shapes(model, "attention.query", queries, width)
        shapes |= linear_shapes(model, "attention.key", keys, width)
        shapes |= linear_shapes(model, "attention.value", keys, width)
        shapes |= linear_shapes(model, "attention.output", width, queries)
        if model.qk_norm:
            shapes |= norm_shapes(model, "attention.query_norm", model.head_dim)
            shapes |= norm_shapes(model, "attention.key_norm", model.head_dim)
        if isinstance(model.position, str) and part_counts(model)["position"].on_heads:
            shapes |= part_shapes(model, "position", "attention.rope")
    shapes |= norm_shapes(model, "ffn_norm", width)
    if isinstance(model.ffn, str):
        return shapes | part_shapes(model, "ffn", "ffn")
    return shapes | (mixture_shapes(model) if model.ffn is Ffn.moe else dense_shapes(model, "ffn", model.ffn_width))


def part_shapes(model: ModelConfig, part: str, name: str) -> Shapes:
    """Parameters of a part of the user's, which lies in the model under ``name``."""
    return {f"{name}.{local}": shape for local, shape in part_counts(model)[part].shapes.items()}


def dense_shapes(model: ModelConfig, name: str, inner: int) -> Shapes:
    """A feed-forward layer of two matrices, or three where it is gated."""
    shapes: Shapes = {}
    for matrix in ("gate", "up") if model.gated else ("up",):
        shapes |= linear_shapes(model, f"{name}.{matrix}", inner, model.n_embd)
    return shapes | linear_shapes(model, f"{name}.down", model.n_embd, inner)


def mixture_shapes(model: ModelConfig) -> Shapes:
    """Router, the stacked matrices of the experts, and the shared experts as one layer."""
    width, inner, experts = model.n_embd, model.ffn_width, model.n_expert
    shapes: Shapes = {"ffn.router.weight": (experts, width)}
    for matrix in ("gate", "up") if model.gated else ("up",):
        shapes[f"ffn.experts.{matrix}"] = (experts, inner, width)
    shapes["ffn.experts.down"] = (experts, width, inner)
    return shapes | (dense_shapes(model, "ffn.shared", model.n_shared_expert * inner) if model.n_shared_expert else {})


def outer_shapes(model: ModelConfig) -> Shapes:
    """Name and shape of every parameter outside the blocks."""
    shapes: Shapes = {"token_embedding.weight": (model.padded_vocab, model.n_embd)}
    if model.position is Position.learned:
        shapes["position.weight"] = (model.block_size, model.n_embd)
    elif isinstance(model.position, str) and not part_counts(model)["position"].on_heads:
        shapes |= part_shapes(model, "position", "position")
    if model.norm_position is NormPosition.pre:
        shapes |= norm_shapes(model, "norm", model.n_embd)
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.padded_vocab, model.n_embd)
    return shapes


def linear_shapes(model: ModelConfig, name: str, outputs: int, inputs: int) -> Shapes:
    """A matrix, and its bias where the model has them."""
    matrix: Shapes = {f"{name}.weight": (outputs, inputs)}
    return matrix | {f"{name}.bias": (outputs,)} if model.bias else matrix


def norm_shapes(model: ModelConfig, name: str, width: int) -> Shapes:
    """A gain, and a shift where the layer has one."""
    if isinstance(model.norm, str):
        return part_shapes(model, "norm" if width == model.n_embd else "head_norm", name)
    gain: Shapes = {f"{name}.weight": (width,)}
    return gain | {f"{name}.bias": (width,)} if model.norm is Norm.layernorm else gain
