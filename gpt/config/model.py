"""The schema of the architecture, and the parts a model can be built from. Torch-free; values are in configs/model."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Optional, Union

from omegaconf import MISSING

# The parts a model can be built from, by name. Torch-free; what each one computes is in ``gpt/model``.


class Norm(Enum):
    """Normalization: LayerNorm (arXiv 1607.06450) with gain and shift, LayerNorm with a gain only, or RMSNorm (arXiv
    1910.07467), which has a gain and does not subtract the mean."""

    layernorm = "layernorm"
    layernorm_nobias = "layernorm_nobias"
    rmsnorm = "rmsnorm"


class NormPosition(Enum):
    """Place of a block's norms: ``pre`` before attention and ffn (arXiv 2002.04745; GPT-2 and later), with one more
    norm before the output matrix; ``post`` after each addition to the residual stream (arXiv 1706.03762, section 5.4).
    """

    pre = "pre"
    post = "post"


class Position(Enum):
    """Encoding of positions: a learned table (GPT-2), rotary embeddings (arXiv 2104.09864), or none."""

    learned = "learned"
    rope = "rope"
    none = "none"


class RopeScaling(Enum):
    """Scaling of rotary frequencies for sequences longer than those a model was first trained on.

    ``linear`` divides all of them by the factor (arXiv 2306.15595). ``ntk`` raises the base, so that the slowest is
    divided by the factor and the fastest is left (NTK-aware; arXiv 2309.00071, section 3.1). ``llama3`` divides the
    slow ones, leaves the fast ones, and blends those between (Llama 3.1's code, https://github.com/meta-llama/llama-models).
    """

    none = "none"
    linear = "linear"
    ntk = "ntk"
    llama3 = "llama3"


class Ffn(Enum):
    """Feed-forward layer: two matrices and an activation; gated by SiLU (SwiGLU) or GELU (GEGLU; both arXiv
    2002.05202); or ``moe``, several of these of which a router picks a few for each token."""

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

    ``sdpa`` lets torch choose a fused kernel; in training on Hopper GPUs and later, cuDNN's first. ``flash`` takes the
    flash kernel (arXiv 2307.08691) where device, dtype and shapes have one, and elsewhere torch's choice, with a notice
    when the run starts; see ``force_flash``.
    ``manual`` writes the formula out and is the reference.
    """

    sdpa = "sdpa"
    flash = "flash"
    manual = "manual"


PARTS: dict[str, type[Enum]] = {"norm": Norm, "position": Position, "ffn": Ffn, "attention": AttentionBackend}
"""Fields of the model's config that take a class of the user's, too -> the names that are ours."""


class ExpertBalance(Enum):
    """Method that keeps experts equally busy: ``loss`` adds a loss (arXiv 2101.03961, section 2.2; for each sequence by
    itself, as in arXiv 2412.19437, section 2.1.2); ``bias`` moves a bias of each expert that only the choice sees, a
    little after every step (arXiv 2408.15664); ``none`` leaves them alone."""

    loss = "loss"
    bias = "bias"
    none = "none"


class ExpertMatmul(Enum):
    """Implementation of the experts' products: ``grouped`` is one product of torch for all of them; ``loop`` takes them
    one by one and is the reference."""

    grouped = "grouped"
    loop = "loop"


# The schema of the architecture. Torch-free; its values are in ``configs/model``, its parts in ``components``.


# OmegaConf 2.3 reads these annotations at run time and knows Optional[X] and Union[X, Y], not X | Y.
# ruff: noqa: UP007, UP045


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
    """Number of token ids; at least the tokenizer's."""
    vocab_multiple: int = 1
    """The embedding and the output matrix get rows up to a multiple of this, for speed (128 on GPUs). The rows added
    take no part: logits and loss are those of vocab_size tokens."""
    n_kv_head: Optional[int] = None
    """Number of key and value heads (grouped-query attention, arXiv 2305.13245; 1 is multi-query, arXiv 1911.02150);
    null means n_head."""
    norm: Union[Norm, str] = Norm.layernorm
    """One of ours by name; or, as for position, ffn and attention, a class of your own: ``package.module:Class``, or
    the name of an entry point of the group ``gpt.norm`` (``gpt.position``, and so on). See docs/components.md."""
    norm_eps: float = 1e-5
    """Number that a norm adds to the mean square, or to the variance."""
    norm_position: NormPosition = NormPosition.pre
    qk_norm: bool = False
    """Normalize queries and keys, head by head, before positions turn them (arXiv 2010.04245, arXiv 2302.05442)."""
    position: Union[Position, str] = Position.learned
    rope_base: float = 10000.0
    """Base of the rotary frequencies; used with position=rope only."""
    rope_scaling: RopeScaling = RopeScaling.none
    rope_factor: float = 1.0
    """Factor by which the sequences became longer, at least 1; rope_scaling other than none only."""
    rope_original_block_size: Optional[int] = None
    """Sequence length before the scaling; rope_scaling=llama3 only."""
    rope_low_freq_factor: float = 1.0
    """rope_scaling=llama3: frequencies that turn less often in the original length are divided by the factor."""
    rope_high_freq_factor: float = 4.0
    """rope_scaling=llama3: frequencies that turn more often in the original length are left alone."""
    ffn: Union[Ffn, str] = Ffn.standard
    ffn_hidden: Optional[int] = None
    """Inner width of the feed-forward layer, with ffn=moe of one expert; null means 4 n_embd (standard) or 8/3 n_embd
    rounded up to 64 (gated)."""
    activation: Optional[Activation] = None
    """Activation of the feed-forward layer. null means GELU for standard and geglu, SiLU for swiglu. swiglu takes no
    other, geglu also gelu_tanh."""
    n_expert: int = 0
    """ffn=moe: number of experts."""
    n_expert_per_token: int = 2
    """ffn=moe: experts that each token goes to."""
    n_shared_expert: int = 0
    """ffn=moe: experts beside these that every token goes to (arXiv 2401.06066, section 3.2), computed as one."""
    expert_ffn: Ffn = Ffn.swiglu
    """ffn=moe: kind of one expert: standard, swiglu or geglu."""
    expert_matmul: ExpertMatmul = ExpertMatmul.grouped
    capacity_factor: Optional[float] = None
    """ffn=moe: in training an expert takes from each sequence at most this many times its even share of the tokens, the
    earlier ones first; the others pass it by (arXiv 2101.03961, section 2.2). null drops none. In evaluation and
    generation none is dropped."""
    router_normalize: Optional[bool] = None
    """ffn=moe: scale a token's expert weights to a sum of 1 (arXiv 2401.04088, section 2.1). null means where there are
    two or more of them; a single one would always weigh 1, and teach the router nothing."""
    expert_balance: ExpertBalance = ExpertBalance.loss
    balance_coefficient: Optional[float] = None
    """ffn=moe: weight of the balance loss; null means 0.01 with expert_balance=loss, and 0 with bias, where a small one
    (0.0001) can guard single sequences (arXiv 2412.19437, section 2.1.2)."""
    balance_bias_rate: float = 0.001
    """expert_balance=bias: distance that a bias moves after each step (arXiv 2408.15664, section 2)."""
    z_coefficient: float = 0.001
    """ffn=moe: weight of the router's z-loss, which keeps its logits small (arXiv 2202.08906, section 3); 0 turns it
    off."""
    attention: Union[AttentionBackend, str] = AttentionBackend.sdpa
    force_flash: bool = False
    """attention=flash: refuse to train, and say why, where the flash kernel cannot run."""
    parallel_residual: bool = False
    """Attention and ffn read the same residual stream and are added together (GPT-NeoX, arXiv 2204.06745, section 2.1),
    instead of one after the other."""
    bias: bool = True
    """Bias in linear layers; that of LayerNorm is a matter of ``norm``."""
    tie_embeddings: bool = True
    """Output matrix shared with the token embedding (arXiv 1608.05859)."""
    dropout: float = 0.0
    """Share of zeros after the embedding, in attention's weights, and after attention and ffn (GPT-2)."""
    init_std: float = 0.02
    """Standard deviation of the initial matrices (GPT-2)."""
    embedding_init_std: Optional[float] = None
    """Standard deviation of the initial token embedding; null means init_std."""
    residual_init_scaled: bool = True
    """Divide the initial matrices that write into the residual stream by sqrt(2 n_layer) (GPT-2, section 2.3)."""
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of parts of your own, which find them as ``config.options``."""

    def __post_init__(self) -> None:
        # OmegaConf leaves a name as the string that it is where a field takes strings too.
        for key, names in PARTS.items():
            value = getattr(self, key)
            if isinstance(value, str) and value in names.__members__:
                setattr(self, key, names[value])

    @property
    def custom_parts(self) -> dict[str, str]:
        """The parts that are classes of the user's: field of the config -> name."""
        return {key: value for key in PARTS if isinstance(value := getattr(self, key), str)}

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Number of key and value heads, with the default resolved."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def padded_vocab(self) -> int:
        """Number of rows of the embedding and of the output matrix."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def dense_ffn(self) -> Ffn:
        """Kind of the feed-forward layer, or of one expert of it; of a layer of the user's, standard."""
        if isinstance(self.ffn, str):
            return Ffn.standard
        return self.expert_ffn if self.ffn is Ffn.moe else self.ffn

    @property
    def gated(self) -> bool:
        """True where the feed-forward layer, or an expert, has a third matrix for its gate."""
        return self.dense_ffn in (Ffn.swiglu, Ffn.geglu)

    @property
    def ffn_width(self) -> int:
        """Inner width of the feed-forward layer, or of one expert, with the default resolved."""
        if self.ffn_hidden is not None:
            return self.ffn_hidden
        return -(-8 * self.n_embd // (3 * 64)) * 64 if self.gated else 4 * self.n_embd

    @property
    def ffn_activation(self) -> Activation:
        """Activation of the feed-forward layer, with the default resolved."""
        if self.activation is not None:
            return self.activation
        return Activation.silu if self.dense_ffn is Ffn.swiglu else Activation.gelu

    @property
    def normalizes_experts(self) -> bool:
        """True where a token's expert weights are scaled to a sum of 1, with the default resolved."""
        return self.n_expert_per_token > 1 if self.router_normalize is None else self.router_normalize

    @property
    def balance_weight(self) -> float:
        """Weight of the balance loss, with the default resolved."""
        if self.balance_coefficient is not None:
            return self.balance_coefficient
        return 0.01 if self.expert_balance is ExpertBalance.loss else 0.0
