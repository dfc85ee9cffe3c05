"""The typed schema of a training run: every field, its unit and its range. Values live in ``configs/``.

Owns the dataclasses that Hydra composes over and the checks that need no other information than the config itself.
Torch-free, so that the login node can use it. Must not know of nodes, Slurm or the launcher.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Optional

from omegaconf import MISSING

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


class Source(Enum):
    """Where the text comes from: the running Python's own library source, or a text file of the user's."""

    stdlib = "stdlib"
    text = "text"


class Strategy(Enum):
    """How ranks share the work: DDP (replicas) or FSDP2 (parameters, gradients and optimizer sharded)."""

    ddp = "ddp"
    fsdp = "fsdp"


class Precision(Enum):
    """``bf16`` computes in bfloat16 over fp32 master weights; ``fp32`` computes in fp32 throughout."""

    fp32 = "fp32"
    bf16 = "bf16"


class Device(Enum):
    """``auto`` is cuda where every rank of the machine can have a GPU of its own, cpu elsewhere."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


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


@dataclass
class DataConfig:
    """The corpus. Tokens are bytes: 256 ids, nothing to download."""

    source: Source = MISSING
    path: Optional[str] = None
    """The text file; source=text only."""
    max_bytes: Optional[int] = None
    """Read at most so many bytes of the corpus; null reads all of it."""
    val_fraction: float = 0.1
    """Share of the corpus, at its end, that is kept for validation."""
    cache_dir: Optional[str] = None
    """Where the token file is written once; null means <output_dir>/.cache. Shared by all nodes."""

    def validate(self) -> None:
        """Raise ConfigError where the corpus is not fully described."""
        if self.source is Source.text and not self.path:
            raise ConfigError("data=text without data.path", "the path of a text file", "data=text data.path=FILE")
        require_range("data.val_fraction", self.val_fraction, 0.001, 0.5)
        if self.max_bytes is not None:
            require_positive("data.max_bytes", self.max_bytes)


@dataclass
class OptimConfig:
    """Batch, AdamW (arXiv 1711.05101) and its schedule: linear warm-up, then a cosine to ``min_lr``."""

    max_steps: int = MISSING
    """Number of optimizer steps."""
    global_batch: int = MISSING
    """Sequences per optimizer step over all ranks; per rank with weak_scaling=true."""
    micro_batch: int = MISSING
    """Most sequences per forward pass and rank; gradients accumulate over as many passes as that takes."""
    weak_scaling: bool = False
    """Let the batch grow with the ranks. Changes the loss curve, so it is asked for by name."""
    lr: float = MISSING
    """Peak learning rate."""
    min_lr: float = MISSING
    """Learning rate at the end of the cosine."""
    warmup_steps: int = MISSING
    weight_decay: float = 0.1
    """Applied to matrices, not to biases and norms."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    grad_clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        for key in ("max_steps", "global_batch", "micro_batch", "lr"):
            require_positive(f"optim.{key}", getattr(self, key))
        for key in ("min_lr", "warmup_steps", "weight_decay", "grad_clip"):
            require_range(f"optim.{key}", getattr(self, key), 0.0, float("inf"))
        require_range("optim.beta1", self.beta1, 0.0, 0.9999999)
        require_range("optim.beta2", self.beta2, 0.0, 0.9999999)
        if self.min_lr > self.lr:
            raise ConfigError(
                f"optim.min_lr={self.min_lr} above optim.lr={self.lr}",
                "a schedule that goes down",
                f"optim.min_lr={self.lr / 10:g}",
            )


@dataclass
class ParallelConfig:
    """How the model is spread over the ranks. Nothing here changes the loss curve."""

    strategy: Strategy = MISSING
    reshard_after_forward: bool = True
    """fsdp only: free the gathered parameters of a block after its forward pass (less memory, one more all-gather)."""
    timeout_s: int = 600
    """Seconds after which a collective that does not complete fails the run."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_positive("parallel.timeout_s", self.timeout_s)


@dataclass
class EvalConfig:
    """Validation during training."""

    interval: int = MISSING
    """Steps between evaluations; 0 evaluates at the end only."""
    sequences: int = MISSING
    """Sequences of the validation split per evaluation, the same ones every time."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_range("eval.interval", self.interval, 0, float("inf"))
        require_positive("eval.sequences", self.sequences)


@dataclass
class CheckpointConfig:
    """When checkpoints are written and which are kept."""

    interval: int = MISSING
    """Steps between checkpoints; 0 saves at the end and when interrupted only."""
    keep_last: int = MISSING
    """How many of the newest are kept."""
    keep_every: int = 0
    """Checkpoints whose step is a multiple of this are kept for good; 0 keeps none for good."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_range("checkpoint.interval", self.interval, 0, float("inf"))
        require_positive("checkpoint.keep_last", self.keep_last)
        require_range("checkpoint.keep_every", self.keep_every, 0, float("inf"))


@dataclass
class LoggingConfig:
    """Views of the step records. The records themselves are always written."""

    tensorboard: bool = True
    """Write event files for TensorBoard (rank 0)."""
    console_interval_s: float = 5.0
    """Seconds between the plain lines that rank 0 prints."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_range("logging.console_interval_s", self.console_interval_s, 0, float("inf"))


@dataclass
class TrainConfig:
    """One training run, whatever starts it."""

    name: str = "${model.name}"
    """Folder under output_dir that holds the points of one sweep."""
    output_dir: str = "outputs"
    run_dir: Optional[str] = None
    """The folder of this run; null derives it from output_dir, name and the overrides."""
    fresh: bool = False
    """Start over in a new folder instead of resuming."""
    seed: int = 1337
    device: Device = Device.auto
    precision: Precision = Precision.fp32
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def validate(self) -> None:
        """Raise ConfigError for the first thing that cannot work; needs no other information than the config."""
        for part in (self.model, self.data, self.optim, self.parallel, self.eval, self.checkpoint, self.logging):
            part.validate()
        require_range("seed", self.seed, 0, 2**63 - 1)
        if self.model.vocab_size < BYTE_VOCAB:
            raise ConfigError(
                f"model.vocab_size={self.model.vocab_size} with byte tokens",
                f"room for all {BYTE_VOCAB} byte values",
                f"model.vocab_size={BYTE_VOCAB}",
            )


BYTE_VOCAB = 256


def require_positive(key: str, value: float) -> None:
    """Raise ConfigError unless ``value`` is above zero."""
    if not value > 0:
        raise ConfigError(f"{key}={value}", "a number above 0", f"{key}=1")


def require_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ConfigError unless ``low <= value <= high``."""
    if not low <= value <= high:
        bound = f"at least {low:g}" if high == float("inf") else f"a number from {low:g} to {high:g}"
        raise ConfigError(f"{key}={value}", bound, f"{key}={low:g}")


def nearest_divisor(number: int, wish: int) -> int:
    """The divisor of ``number`` that lies nearest to ``wish``, for error messages."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: (abs(d - wish), d))


def closest(word: str, choices: Iterable[str]) -> list[str]:
    """Up to three of ``choices`` that look like ``word``, best first, for error messages."""
    return difflib.get_close_matches(word, list(choices), n=3, cutoff=0.6)
