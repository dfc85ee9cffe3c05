"""Schema of the architecture, and the parts that a model is built from. Imports no torch. The values are in
configs/model."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Optional, Union

from omegaconf import MISSING

# Names of the parts that a model is built from. ``gpt/model`` computes them.


class Norm(Enum):
    """Normalization: LayerNorm (arXiv 1607.06450) with gain and shift, LayerNorm with a gain only, or RMSNorm (arXiv
    1910.07467), which has a gain and does not subtract the mean."""

    layernorm = "layernorm"
    layernorm_nobias = "layernorm_nobias"
    rmsnorm = "rmsnorm"


class NormPosition(Enum):
    """Place of a block's norms.

    ``pre``: before attention and before ffn, and one more norm before the output matrix (arXiv 2002.04745; GPT-2 and
    later). ``post``: after each addition to the residual stream (arXiv 1706.03762, section 5.4). ``both``: as ``pre``,
    and one more norm on the result of attention and on that of ffn (Gemma 2, arXiv 2408.00118, section 2).
    """

    pre = "pre"
    post = "post"
    both = "both"


class Position(Enum):
    """Encoding of positions: a learned table (GPT-2), rotary embeddings (arXiv 2104.09864), or none."""

    learned = "learned"
    rope = "rope"
    none = "none"


class RopeScaling(Enum):
    """Scaling of rotary frequencies for sequences longer than those of the first training.

    ``linear`` divides all frequencies by the factor (arXiv 2306.15595). ``ntk`` raises the base: the slowest frequency
    is divided by the factor and the fastest stays (NTK-aware; arXiv 2309.00071, section 3.1). ``llama3`` divides the
    slow frequencies, keeps the fast ones, and blends the frequencies between (Llama 3.1's code,
    https://github.com/meta-llama/llama-models). ``yarn`` keeps frequencies of more than 32 turns in the original
    length, divides those of less than one turn, and blends those between linearly in their index. It also multiplies
    queries and keys by 0.1 ln(factor) + 1 (arXiv 2309.00071, section 3.4).
    """

    none = "none"
    linear = "linear"
    ntk = "ntk"
    llama3 = "llama3"
    yarn = "yarn"


class Ffn(Enum):
    """Feed-forward layer. ``standard`` is two matrices and an activation between them. ``swiglu`` and ``geglu`` are
    gated by SiLU and by GELU (arXiv 2002.05202). ``moe`` is several such layers (experts), of which a router picks a
    few for each token."""

    standard = "standard"
    swiglu = "swiglu"
    geglu = "geglu"
    moe = "moe"


class Activation(Enum):
    """Activation of the feed-forward layer; ``gelu_tanh`` is GPT-2's approximation, ``leaky_relu`` has slope 0.01."""

    gelu = "gelu"
    gelu_tanh = "gelu_tanh"
    silu = "silu"
    relu = "relu"
    leaky_relu = "leaky_relu"


class AttentionBackend(Enum):
    """Implementation of attention.

    ``sdpa`` lets torch choose a fused kernel; for training on Hopper GPUs and later, cuDNN's comes first. ``flash``
    uses the flash kernel (arXiv 2307.08691) if it supports the device, dtype and shapes, else torch's choice.
    ``manual`` computes the formula directly and is the reference.
    """

    sdpa = "sdpa"
    flash = "flash"
    manual = "manual"


PARTS: dict[str, type[Enum]] = {"norm": Norm, "position": Position, "ffn": Ffn, "attention": AttentionBackend}
"""Field of the model config that also accepts a class of the user -> names of the built-in parts."""


class ExpertBalance(Enum):
    """Method that keeps experts equally busy: ``loss`` adds a loss (arXiv 2101.03961, section 2.2; computed per
    sequence, as in arXiv 2412.19437, section 2.1.2). ``bias`` moves a bias of each expert a little after every step;
    only the choice of experts uses the bias (arXiv 2408.15664). ``none`` does nothing."""

    loss = "loss"
    bias = "bias"
    none = "none"


class ExpertMatmul(Enum):
    """Implementation of the experts' products: ``grouped`` is one product of torch for all experts; ``loop`` computes
    one expert after another and is the reference."""

    grouped = "grouped"
    loop = "loop"


# Schema of the architecture.


LORA_TARGETS = {
    **{name: f"attention.{name}" for name in ("query", "key", "value", "output")},
    **{name: f"ffn.{name}" for name in ("gate", "up", "down")},
}
"""Value of ``lora.targets`` -> module of a block."""
CACHED = 2**16
"""Largest number of results that each cached function of a model config keeps. A search for layouts calls such
functions thousands of times with the same few models."""

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X] and Union[X, Y], not X | Y.
# ruff: noqa: UP007, UP045


@dataclass
class LoraConfig:
    """Adapters of low rank, added to frozen weights (LoRA, arXiv 2106.09685)."""

    rank: int = 0
    """Rank of the two matrices of each adapter, which alone are trained. 0 adds no adapters, and trains all weights."""
    alpha: float = 16.0
    """Scale of the adapters: the product of the two matrices is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Share of the input values of an adapter that dropout sets to zero."""
    targets: list[str] = field(default_factory=lambda: ["query", "value"])
    """Linear layers of each block that get an adapter, of query, key, value, output, gate, up and down."""


@dataclass
class ModelConfig:
    """Architecture of the GPT. Its hash follows from its values, so that functions of a config can cache results."""

    name: str = MISSING
    """Short name, used for the run's folder."""
    n_layer: int = MISSING
    """Number of transformer blocks."""
    n_head: int = MISSING
    """Number of query heads; divides n_embd, unless head_width is set."""
    n_embd: int = MISSING
    """Width of the residual stream."""
    block_size: int = MISSING
    """Sequence length in tokens."""
    vocab_size: int = MISSING
    """Number of token ids; at least the tokenizer's."""
    vocab_multiple: int = 1
    """The numbers of rows of the embedding and of the output matrix are rounded up to a multiple of this, for speed
    (128 on GPUs). Logits and loss ignore the additional rows."""
    n_kv_head: Optional[int] = None
    """Number of key and value heads (grouped-query attention, arXiv 2305.13245; 1 is multi-query, arXiv 1911.02150);
    null means n_head."""
    head_width: Optional[int] = None
    """Width of one head; null means n_embd / n_head."""
    kv_lora_rank: Optional[int] = None
    """Width of the latent of multi-head latent attention (arXiv 2405.04434, section 2.1). The keys and values of all
    heads are computed from this latent, and a cache keeps the latent in place of them. null means no latent."""
    q_lora_rank: Optional[int] = None
    """With kv_lora_rank: width of a latent that the queries are computed from; null means no such latent."""
    rope_head_width: Optional[int] = None
    """Needed with kv_lora_rank, null without: width of the part of each head that is rotated. All heads share this part
    of the keys. The width is smaller than head_width, which includes this part. Values have the remaining width."""
    norm: Union[Norm, str] = Norm.layernorm
    """Name of a built-in norm. Or, as for position, ffn and attention, a class of your own: ``package.module:Class``,
    or an entry point of the group ``gpt.norm`` (``gpt.position``, and so on). See docs/components.md."""
    norm_eps: float = 1e-5
    """Number that a norm adds to the mean square, or to the variance."""
    norm_position: NormPosition = NormPosition.pre
    qk_norm: bool = False
    """Normalize queries and keys, head by head, before the rotary positions (arXiv 2010.04245, arXiv 2302.05442)."""
    position: Union[Position, str] = Position.learned
    rope_base: float = 10000.0
    """Base of the rotary frequencies; used with position=rope only."""
    rope_scaling: RopeScaling = RopeScaling.none
    rope_factor: float = 1.0
    """Factor by which the sequences became longer, at least 1. Only with a rope_scaling other than none."""
    rope_original_block_size: Optional[int] = None
    """Sequence length before the scaling. Needed for rope_scaling=llama3 and yarn; other values do not read it."""
    window: Optional[int] = None
    """Number of tokens that a token attends to: itself and the nearest earlier tokens (arXiv 2004.05150, section 3.1).
    null means all earlier tokens. Attention then computes blocks of this many queries."""
    global_every: Optional[int] = None
    """With a window: layers whose number, counted from 1, is a multiple of this have no window (global layers). null
    means that all layers have the window (Mistral); 6 makes five layers with a window for each global one (Gemma 3)."""
    rope_base_local: Optional[float] = None
    """Base of the rotary frequencies in the layers with a window, which rope_scaling then does not change. null means
    that all layers have the same frequencies."""
    attention_softcap: Optional[float] = None
    """Bound *c* of attention's scores *s*, which become c tanh(s / c) (Gemma 2, arXiv 2408.00118, section 2);
    attention=manual only, since torch's fused kernels have no such operation. null means no bound."""
    attention_sinks: bool = False
    """Give each head a learned logit that joins the softmax over the keys and has no value, so that a head can attend
    to nothing (gpt-oss, arXiv 2508.10925, section 2.2; arXiv 2309.17453)."""
    logit_softcap: Optional[float] = None
    """Bound *c* of the logits *s*, which become c tanh(s / c) (Gemma 2). null means no bound."""
    scale_embedding: bool = False
    """Multiply the token embedding by the square root of n_embd (arXiv 1706.03762, section 3.4; Gemma)."""
    ffn: Union[Ffn, str] = Ffn.standard
    ffn_hidden: Optional[int] = None
    """Inner width of the feed-forward layer, or of one expert. null means 4 n_embd (standard), or 8/3 n_embd rounded up
    to a multiple of 64 (gated)."""
    activation: Optional[Activation] = None
    """Activation of the feed-forward layer. null means GELU for standard and geglu, SiLU for swiglu. swiglu accepts
    only SiLU; geglu also accepts gelu_tanh."""
    n_expert: int = 0
    """ffn=moe: number of experts."""
    n_expert_per_token: int = 2
    """ffn=moe: number of experts that compute each token."""
    n_shared_expert: int = 0
    """ffn=moe: number of additional experts, which compute every token (arXiv 2401.06066, section 3.2). They are
    implemented as one wider layer."""
    expert_ffn: Ffn = Ffn.swiglu
    """ffn=moe: kind of one expert: standard, swiglu or geglu."""
    expert_matmul: ExpertMatmul = ExpertMatmul.grouped
    capacity_factor: Optional[float] = None
    """ffn=moe: largest number of tokens of a sequence that an expert computes in training, as a multiple of an even
    share. Later tokens of the sequence are dropped (arXiv 2101.03961, section 2.2). null drops none. Evaluation and
    generation drop none."""
    router_normalize: Optional[bool] = None
    """ffn=moe: scale a token's expert weights to a sum of 1 (arXiv 2401.04088, section 2.1). null means true for two or
    more experts per token; the weight of a single expert would always be 1, and the router would not learn."""
    expert_balance: ExpertBalance = ExpertBalance.loss
    balance_coefficient: Optional[float] = None
    """ffn=moe: weight of the balance loss; null means 0.01 with expert_balance=loss, and 0 with bias. With
    bias, a small weight (0.0001) can guard single sequences (arXiv 2412.19437, section 2.1.2)."""
    balance_bias_rate: float = 0.001
    """expert_balance=bias: change of a bias after each step (arXiv 2408.15664, section 2)."""
    z_coefficient: float = 0.001
    """ffn=moe: weight of the router's z-loss, which keeps its logits small (arXiv 2202.08906, section 3); 0 turns it
    off."""
    attention: Union[AttentionBackend, str] = AttentionBackend.sdpa
    parallel_residual: bool = False
    """Attention and ffn read the same residual stream and are added together (GPT-NeoX, arXiv 2204.06745, section 2.1),
    instead of one after the other."""
    bias: bool = True
    """Bias in linear layers. ``norm`` decides about the bias of LayerNorm."""
    tie_embeddings: bool = True
    """Share the output matrix with the token embedding (arXiv 1608.05859)."""
    dropout: float = 0.0
    """Share of values set to zero after the embedding, in attention's weights, and after attention and ffn (GPT-2)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    options: dict[str, Any] = field(default_factory=dict)
    """Settings for your own classes in the model, which read this dictionary as ``config.options``."""

    def __post_init__(self) -> None:
        # OmegaConf keeps a name as a string if a field also accepts strings.
        for key, names in PARTS.items():
            value = getattr(self, key)
            if isinstance(value, str) and value in names.__members__:
                setattr(self, key, names[value])

    def __hash__(self) -> int:
        rest = (value for key, value in vars(self).items() if key not in ("options", "lora"))
        return hash((*rest, repr(self.options), repr(self.lora)))

    @property
    def adapted(self) -> tuple[str, ...]:
        """Names, inside a block, of the modules that have an adapter, such as ``attention.query``; empty without
        LoRA."""
        return tuple(LORA_TARGETS[target] for target in self.lora.targets if self.lora.rank)

    def trains(self, name: str) -> bool:
        """Return True if the parameter ``name`` is trained: with LoRA only parameters of adapters, else all."""
        return not self.lora.rank or ".lora_" in name

    @property
    def custom_parts(self) -> dict[str, str]:
        """Parts of the model that are classes of the user: field of the config -> name of the class."""
        return {key: value for key in PARTS if isinstance(value := getattr(self, key), str)}

    @property
    def head_dim(self) -> int:
        """Width of one attention head: ``head_width``, or if that is None n_embd / n_head."""
        return self.n_embd // self.n_head if self.head_width is None else self.head_width

    @property
    def rotary_width(self) -> int:
        """Width of the part of a head that is rotated: in latent attention ``rope_head_width``, else the width of the
        whole head."""
        return self.head_dim if self.rope_head_width is None else self.rope_head_width

    @property
    def value_width(self) -> int:
        """Width of the values of one head. In latent attention this is the width of the part of a head that is not
        rotated; otherwise it is the width of the whole head."""
        return self.head_dim if self.rope_head_width is None else self.head_dim - self.rope_head_width

    @property
    def latent_widths(self) -> list[int]:
        """Widths of the latents of latent attention: of keys and values, then of queries if they have one. Empty
        without latent attention."""
        return [width for width in (self.kv_lora_rank, self.q_lora_rank) if width is not None]

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads: ``n_kv_head``, or if that is None n_head."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    def is_local(self, layer: int) -> bool:
        """Return True if the layer with this number, from 0, has a window."""
        return self.window is not None and (self.global_every is None or (layer + 1) % self.global_every > 0)

    def of_layer(self, layer: int) -> ModelConfig:
        """Return the config of the layer with this number, from 0. The config of a global layer has no window. If
        ``rope_base_local`` is set, the config of a layer with a window has this value as ``rope_base``, and has no
        ``rope_scaling``."""
        if not self.is_local(layer):
            return self if self.window is None else replace(self, window=None)
        if self.rope_base_local is None:
            return self
        return replace(self, rope_base=self.rope_base_local, rope_scaling=RopeScaling.none)

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding and of the output matrix: ``vocab_size``, rounded up to a multiple of
        ``vocab_multiple``."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def dense_ffn(self) -> Ffn:
        """Kind of the feed-forward layer, or of one expert; ``Ffn.standard`` if the feed-forward layer is a class of
        the user."""
        if isinstance(self.ffn, str):
            return Ffn.standard
        return self.expert_ffn if self.ffn is Ffn.moe else self.ffn

    @property
    def gated(self) -> bool:
        """True if the feed-forward layer, or an expert, has a third matrix for its gate."""
        return self.dense_ffn in (Ffn.swiglu, Ffn.geglu)

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward layer or of one expert: ``ffn_hidden`` if it is set. Otherwise 4 ``n_embd``;
        with a gated layer 8/3 ``n_embd``, rounded up to a multiple of 64."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        return -(-8 * self.n_embd // (3 * 64)) * 64 if self.gated else 4 * self.n_embd

    @property
    def ffn_activation(self) -> Activation:
        """Activation of the feed-forward layer: ``activation`` if it is set. Otherwise silu with swiglu, and gelu with
        every other layer."""
        if self.activation is not None:
            return self.activation
        return Activation.silu if self.dense_ffn is Ffn.swiglu else Activation.gelu

    @property
    def normalizes_experts(self) -> bool:
        """True if the weights of a token's experts are scaled to a sum of 1: ``router_normalize`` if it is set.
        Otherwise True if a token has more than one expert."""
        return self.n_expert_per_token > 1 if self.router_normalize is None else self.router_normalize

    @property
    def balance_weight(self) -> float:
        """Weight of the balance loss: ``balance_coefficient`` if it is set. Otherwise 0.01 with expert_balance=loss,
        and 0 with bias or none."""
        if self.balance_coefficient is not None:
            return self.balance_coefficient
        return 0.01 if self.expert_balance is ExpertBalance.loss else 0.0
