"""The schema of the architecture. Torch-free; its values are in ``configs/model``."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Optional

from omegaconf import MISSING

from gpt.config.checks import nearest_divisor, require_positive, require_range
from gpt.errors import ConfigError

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


class Norm(Enum):
    """Normalization layer: LayerNorm (arXiv 1607.06450) or RMSNorm (arXiv 1910.07467)."""

    layernorm = "layernorm"
    rmsnorm = "rmsnorm"


class Position(Enum):
    """How a token knows its place: a learned table (GPT-2), rotary (arXiv 2104.09864), or not at all."""

    learned = "learned"
    rope = "rope"
    none = "none"


class Ffn(Enum):
    """Feed-forward layer: two matrices and an activation, or the gated SwiGLU (arXiv 2002.05202)."""

    standard = "standard"
    swiglu = "swiglu"


class Activation(Enum):
    """Activation of the standard feed-forward layer; ``gelu_tanh`` is GPT-2's approximation."""

    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    silu = "silu"
    relu = "relu"


class AttentionBackend(Enum):
    """``sdpa`` is torch's fused kernel; ``manual`` writes the formula out and is the reference."""

    sdpa = "sdpa"
    manual = "manual"


@dataclass
class ModelConfig:
    """Architecture of the GPT."""

    name: str = MISSING
    """Short name, used for the run's folder."""
    n_layer: int = MISSING
    """Number of transformer blocks."""
    n_head: int = MISSING
    """Number of query heads; divides n_embd."""
    n_embd: int = MISSING
    """Width of the residual stream."""
    block_size: int = MISSING
    """Sequence length in tokens."""
    vocab_size: int = MISSING
    """Number of token ids the embedding holds; at least the tokenizer's."""
    n_kv_head: Optional[int] = None
    """Number of key and value heads (grouped-query attention, arXiv 2305.13245); null means n_head."""
    norm: Norm = Norm.layernorm
    norm_eps: float = 1e-5
    position: Position = Position.learned
    rope_base: float = 10000.0
    """Base of the rotary frequencies; used with position=rope only."""
    ffn: Ffn = Ffn.standard
    ffn_hidden: Optional[int] = None
    """Inner width of the feed-forward layer; null means 4 n_embd (standard) or 8/3 n_embd rounded up to 64 (swiglu)."""
    activation: Activation = Activation.gelu
    attention: AttentionBackend = AttentionBackend.sdpa
    bias: bool = True
    """Bias in linear layers and LayerNorm."""
    tie_embeddings: bool = True
    """Output matrix shared with the token embedding."""
    dropout: float = 0.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward layer, with the default resolved."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        if self.ffn is Ffn.swiglu:
            return -(-8 * self.n_embd // (3 * 64)) * 64
        return 4 * self.n_embd

    def validate(self) -> None:
        """Raise ConfigError where the numbers cannot make a model."""
        for key in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "kv_heads", "ffn_width"):
            require_positive(f"model.{key}", getattr(self, key))
        if self.n_embd % self.n_head:
            heads = nearest_divisor(self.n_embd, self.n_head)
            raise ConfigError(
                f"model.n_head={self.n_head} does not divide model.n_embd={self.n_embd}",
                "heads of equal width",
                f"model.n_head={heads}",
            )
        if self.n_head % self.kv_heads:
            heads = nearest_divisor(self.n_head, self.kv_heads)
            raise ConfigError(
                f"model.n_kv_head={self.kv_heads} does not divide model.n_head={self.n_head}",
                "every key-value head shared by the same number of query heads",
                f"model.n_kv_head={heads}",
            )
        if self.position is Position.rope and self.head_dim % 2:
            raise ConfigError(
                f"model.position=rope with heads {self.head_dim} wide",
                "an even head width, since rotary embeddings turn pairs of channels",
                "model.position=learned, or a model.n_head that makes n_embd / n_head even",
            )
        require_range("model.dropout", self.dropout, 0.0, 0.99)
