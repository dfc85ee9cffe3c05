"""The parts a model can be built from, by name. Torch-free; what each one computes is in ``gpt/model``."""

from __future__ import annotations

from enum import Enum


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
