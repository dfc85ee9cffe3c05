"""How many parameters a model has, and of what shapes, from its config alone.

Torch-free: the planner counts a model before any machine builds it. The names and shapes are those of
``gpt.model.gpt.GPT`` and are compared with it in the tests; nothing here imports it.

D width, H heads, K key-value heads, C head width, F inner width of the ffn, V vocabulary, T block size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from gpt.config import Ffn, ModelConfig, Norm, Position

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Parameters:
    """Number of parameters by component; a tied output matrix counts once, as embedding."""

    embedding: int
    position: int
    attention: int
    ffn: int
    norm: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, component.name) for component in fields(self))

    @property
    def non_embedding(self) -> int:
        """Without token, position and output embeddings: the N of the scaling laws (arXiv 2001.08361, section 2.1)."""
        return self.total - self.embedding - self.position - self.head


def count(model: ModelConfig) -> Parameters:
    """The parameters of ``model`` by component."""
    block, around = block_shapes(model), outer_shapes(model)
    return Parameters(
        embedding=size(around, "token_embedding."),
        position=size(around, "position."),
        attention=model.n_layer * size(block, "attention."),
        ffn=model.n_layer * size(block, "ffn."),
        norm=model.n_layer * (size(block, "attention_norm.") + size(block, "ffn_norm.")) + size(around, "norm."),
        head=size(around, "head."),
    )


def size(shapes: Shapes, prefix: str = "") -> int:
    """Number of elements in the tensors whose name starts with ``prefix``."""
    return sum(math.prod(shape) for name, shape in shapes.items() if name.startswith(prefix))


def block_shapes(model: ModelConfig) -> Shapes:
    """Name and shape of every parameter of one block."""
    width, queries, keys = model.n_embd, model.n_head * model.head_dim, model.kv_heads * model.head_dim
    shapes = norm_shapes(model, "attention_norm")
    shapes |= linear_shapes(model, "attention.query", queries, width)
    shapes |= linear_shapes(model, "attention.key", keys, width)
    shapes |= linear_shapes(model, "attention.value", keys, width)
    shapes |= linear_shapes(model, "attention.output", width, queries)
    shapes |= norm_shapes(model, "ffn_norm")
    for matrix in ("gate", "up") if model.ffn is Ffn.swiglu else ("up",):
        shapes |= linear_shapes(model, f"ffn.{matrix}", model.ffn_width, width)
    return shapes | linear_shapes(model, "ffn.down", width, model.ffn_width)


def outer_shapes(model: ModelConfig) -> Shapes:
    """Name and shape of every parameter outside the blocks."""
    shapes: Shapes = {"token_embedding.weight": (model.vocab_size, model.n_embd)}
    if model.position is Position.learned:
        shapes["position.weight"] = (model.block_size, model.n_embd)
    shapes |= norm_shapes(model, "norm")
    if not model.tie_embeddings:
        shapes["head.weight"] = (model.vocab_size, model.n_embd)
    return shapes


def linear_shapes(model: ModelConfig, name: str, outputs: int, inputs: int) -> Shapes:
    """A matrix, and its bias where the model has them."""
    matrix: Shapes = {f"{name}.weight": (outputs, inputs)}
    return matrix | {f"{name}.bias": (outputs,)} if model.bias else matrix


def norm_shapes(model: ModelConfig, name: str) -> Shapes:
    """A gain, and a shift where the layer has one."""
    gain: Shapes = {f"{name}.weight": (model.n_embd,)}
    shift = model.bias and model.norm is Norm.layernorm
    return gain | {f"{name}.bias": (model.n_embd,)} if shift else gain
