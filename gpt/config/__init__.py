"""Typed schema of a training run: every key, its unit and its range. Values are in ``configs/``.

This module has the config of a whole run. The other modules of this folder have the configs of its parts. None of them
imports torch, so that the login node can use the schema.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Optional

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf

from gpt.config.data import (
    BYTE_VOCAB,
    NEXT_DOCUMENT,
    DataConfig,
    Pack,
    Source,
    SyntheticConfig,
    TokenDtype,
    TokenFileFormat,
    TokenizerKind,
    WeightedPath,
)
from gpt.config.model import (
    Activation,
    AttentionBackend,
    ExpertBalance,
    ExpertMatmul,
    Ffn,
    LoraConfig,
    ModelConfig,
    Norm,
    NormPosition,
    Position,
    RopeScaling,
)
from gpt.config.optim import SCHEDULE, CheckpointConfig, DivergenceConfig, OptimConfig
from gpt.config.parallel import CpMethod, ParallelConfig, ReduceDtype, Schedule, Strategy
from gpt.config.rules import check_model, check_numbers, is_importable, nearest_divisor
from launch.errors import ConfigError
from launch.runs.compose import RunConfig, compose_typed, make_absolute, register_schema
from launch.runs.environment import install_command
from launch.runs.overrides import (
    PLACE_KEYS,
    check_overrides,
    typed_value,
)
from launch.runs.records import refuse_unknown_figure, step_figures

__all__ = [
    "BYTE_VOCAB",
    "LOGITS_AT_ONCE",
    "LOSS_CHUNK",
    "NEXT_DOCUMENT",
    "PROFILE_FROM",
    "Activation",
    "AttentionBackend",
    "CheckpointConfig",
    "CompileMode",
    "CpMethod",
    "DataConfig",
    "Device",
    "DivergenceConfig",
    "ExpertBalance",
    "ExpertMatmul",
    "Ffn",
    "Float8",
    "LoraConfig",
    "ModelConfig",
    "Norm",
    "NormPosition",
    "OptimConfig",
    "Pack",
    "ParallelConfig",
    "Position",
    "Precision",
    "Recompute",
    "ReduceDtype",
    "RopeScaling",
    "Schedule",
    "Source",
    "Strategy",
    "SyntheticConfig",
    "TokenDtype",
    "TokenFileFormat",
    "TokenizerKind",
    "TrainConfig",
    "WeightedPath",
    "nearest_divisor",
]

HF_PREFIX = "hf:"
"""Prefix of a value of ``init_from`` that must be a folder of transformers."""


@dataclass
class EvalConfig:
    """Validation during training."""

    interval: int = MISSING
    """Steps between evaluations; 0 evaluates only at the end."""
    sequences: int = MISSING
    """Sequences of the validation split per evaluation. Every evaluation uses the same sequences."""
    tasks: list[str] = field(default_factory=list)
    """Tasks of lm-eval's harness that each evaluation runs, too: names, or YAML files (FOLDER/NAME.yaml). Needs the
    extra ``eval``, and a tokenizer that can encode every text."""

    def validate(self) -> None:
        """Raise ConfigError if a number is out of its range, or a required extra is not installed."""
        check_numbers("eval.", self, ("sequences",), ("interval",))
        if self.tasks and not is_installed("lm_eval"):
            raise ConfigError(
                f"eval.tasks=[{','.join(self.tasks)}], and the package lm_eval is not installed",
                "the extra eval",
                f"{install_command('eval')}, or eval.tasks=[]",
            )


@dataclass
class LoggingConfig:
    """Outputs of the step records, in addition to the file of records that each rank always writes."""

    tensorboard: bool = True
    """Write event files for TensorBoard (rank 0)."""
    wandb: bool = False
    """Send rank 0's records to Weights & Biases; needs the extra ``wandb``, and obeys WANDB_MODE=offline. The
    environment variable WANDB_PROJECT names the project, by default gpt."""
    gradients_interval: int = 10
    """Steps between records of the gradients: mean, standard deviation, and the norm of each layer. 0 records none."""
    breakdown_interval: int = 0
    """Steps between profiled steps. On every rank torch's profiler divides such a step into computing, communication,
    copies and idle time, for the step records. 0 profiles none. A profiled step is slower."""
    console: list[str] = field(default_factory=list)
    """Names of further figures to print in the line of each step: fields of the step records, such as tflops_per_s,
    grad_mean, grad_std, memory_allocated_gib and memory_reserved_gib."""

    def validate(self) -> None:
        """Raise ConfigError if a number is out of its range, a figure is unknown, or a required extra is not
        installed."""
        check_numbers("logging.", self, (), ("gradients_interval", "breakdown_interval"))
        for name in self.console:
            refuse_unknown_figure(name, step_figures(), "logging.console=[{}]")
        if self.wandb and not is_installed("wandb"):
            raise ConfigError(
                "logging.wandb=true, and the package wandb is not installed",
                "the extra of that name",
                f"{install_command('wandb')}, or logging.wandb=false",
            )


# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


class Precision(Enum):
    """Precision of the computation: ``bf16`` and ``fp16`` are 16 bits over fp32 master weights, ``fp32`` is fp32
    throughout.

    ``fp16`` scales the loss dynamically, and skips steps whose gradients overflow (arXiv 1710.03740). ``auto`` is bf16
    on GPUs that compute in it, fp16 on older ones with matrix units (V100, T4), fp32 elsewhere.
    """

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"

    @property
    def is_half(self) -> bool:
        """True if matrix products are computed in 16 bits."""
        return self in (Precision.bf16, Precision.fp16)


class Float8(Enum):
    """Matrix products of the blocks in 8 bits (arXiv 2209.05433). ``tensorwise`` scales each factor by its largest
    magnitude; ``rowwise`` scales each row of a factor, which is slower and more exact."""

    none = "none"
    tensorwise = "tensorwise"
    rowwise = "rowwise"


class Device(Enum):
    """Device of the ranks: ``auto`` is cuda if every rank on the machine can have its own GPU, otherwise cpu."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


CompileMode = Enum(
    "CompileMode",
    {
        "auto": "auto",
        "none": "none",
        "default": "default",
        "reduce-overhead": "reduce-overhead",
        "max-autotune": "max-autotune",
    },
)
"""Use of ``torch.compile``: ``none`` compiles nothing, and ``auto`` is ``default`` on GPUs and ``none`` on CPUs. The
other values are modes of ``torch.compile``: ``default``, ``reduce-overhead`` (with CUDA graphs), ``max-autotune`` (also
measures several kernels, which takes minutes)."""


class Recompute(Enum):
    """Activation checkpointing (arXiv 1604.06174): the backward pass computes some activations again.

    ``none`` keeps all. ``selective`` keeps the results of matrix products and of the attention kernel, and computes
    other results again: norms, activations, rotations, dropout. ``full`` keeps only the input of each block.
    """

    none = "none"
    selective = "selective"
    full = "full"


LOSS_CHUNK = 2**23
"""Largest number of logits that the loss converts to fp32 at a time: a chunk of 32 MiB. A chunk keeps a GPU busy, and
fits into its cache (an H100's L2 has 50 MB), so that repeated passes over it do not read the GPU's memory."""

LOGITS_AT_ONCE = {"cuda": 2**26, "cpu": 2**21}
"""Type of device -> largest number of logits that ``ChunkedLoss`` computes at a time: 128 MiB in 16 bits on cuda, 8 MiB
in fp32 on cpu. Smaller chunks take more time, because each chunk reads and writes the gradient of the output
matrix."""


PROFILE_FROM = 5
"""First step that ``profile=true`` profiles, counted from 1: earlier steps compile and allocate memory."""


@dataclass
class TrainConfig(RunConfig):
    """Config of one training run."""

    name: str = "${model.name}"
    """Folder under output_dir for the points of one sweep."""
    init_from: Optional[str] = None
    """Source of the first weights; null draws random weights. The source is a folder of the transformers library
    (safetensors), an adapter of peft (LoRA), or the folder of another run, whose newest checkpoint is loaded. With
    hf:FOLDER the folder must be one of transformers. The source must have the same model as this run. Without effect if
    the run already has a checkpoint."""
    seed: int = 1337
    """Seed of the initial weights, of dropout and of the order of the data."""
    device: Device = Device.auto
    precision: Precision = Precision.auto
    tf32: Optional[bool] = None
    """Round the factors of fp32 matrix products to TF32, for up to eight times the speed, on GPUs that support TF32
    (compute capability 8.0). null means true for fp32 on GPUs unless ``deterministic`` is set."""
    float8: Float8 = Float8.none
    """Compute the linear layers of the blocks in 8-bit floating point by torchao (the extra ``float8``), on GPUs that
    support it (compute capability 8.9). This is faster with compilation and for wide models, and changes the loss a
    little."""
    float8_emulate: bool = False
    """Compute the values of float8 in 16 or 32 bits, on devices without float8. This is slower and serves to compare
    losses."""
    compile: CompileMode = CompileMode["auto"]
    """Compile every block, the last norm, the output matrix and the loss with torch.compile; needs a C++ compiler on
    CPUs. This changes the last bits of the losses."""
    compile_fullgraph: bool = False
    """End the run if torch.compile cannot compile a whole block, instead of running the rest of the block eagerly."""
    chunked_loss: bool = False
    """Compute the logits and the loss of a few tokens at a time, instead of all tokens of a micro-batch. Less memory is
    needed for logits, so a micro-batch can be larger. The loss differs by rounding only."""
    recompute: Recompute = Recompute.none
    """Recompute activations in the backward pass: less memory, and up to a third more computing. The loss does not
    change."""
    deterministic: bool = False
    """Refuse operations whose result depends on the order in which threads run (torch.use_deterministic_algorithms).
    This costs time on GPUs."""
    profile: bool = False
    """Write a trace of three steps of rank 0, from step 5 on, and a table of their time by operation, into the folder
    of the attempt."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    @property
    def compiles(self) -> bool:
        """True if ``compile`` names a mode of ``torch.compile``. False for ``none``. False also for ``auto``, which the
        run later replaces by ``default`` or ``none``."""
        return self.compile.name not in ("none", "auto")

    @property
    def data_cache(self) -> Path:
        """Folder of the prepared corpora: ``data.cache_dir``, or if that is None ``.cache`` in ``output_dir``.
        Absolute."""
        return Path(self.data.cache_dir or Path(self.output_dir) / ".cache").expanduser().absolute()

    def validate(self) -> None:
        """Raise ConfigError for the first setting, or combination of settings, that cannot work. Reads only the
        config."""
        super().validate()
        check_model(self.model)
        parts = (self.data, self.optim, self.parallel, self.eval, self.checkpoint, self.divergence, self.logging)
        for part in parts:
            part.validate()
        check_numbers("", self, seed=(0, 2**63 - 1))
        check_tf32(self)
        check_float8(self)
        check_chunked_loss(self)
        check_packing(self)
        if self.checkpoint.in_memory and self.parallel.strategy is Strategy.deepspeed:
            raise ConfigError(
                f"checkpoint.memory_interval={self.checkpoint.memory_interval} with parallel.strategy=deepspeed",
                "tensors by name, which any node can take over; DeepSpeed's own files are for its loader, from a disk",
                "parallel=fsdp, or checkpoint.memory_interval=0",
            )
        early = {key: getattr(self.optim, key) for key in ("target_val_loss", "patience")}
        asked = next((f"optim.{key}={value:g}" for key, value in early.items() if value is not None), None)
        if asked and not self.eval.interval:
            raise ConfigError(
                f"{asked} with eval.interval=0",
                "evaluations during training, after which it may be over",
                f"{asked} eval.interval={max(1, self.optim.max_steps // 10)}",
            )
        if self.profile and self.logging.breakdown_interval:
            raise ConfigError(
                f"profile=true with logging.breakdown_interval={self.logging.breakdown_interval}",
                "one of both: a process has one profiler",
                "profile=true logging.breakdown_interval=0, or profile=false",
            )
        if self.profile and self.optim.max_tokens is None and self.optim.max_steps < PROFILE_FROM:
            raise ConfigError(
                f"profile=true in a run of {self.optim.max_steps} steps",
                f"at least {PROFILE_FROM} steps: the first ones compile and allocate, and are not profiled",
                f"optim.max_steps={PROFILE_FROM}, or profile=false",
            )


FLOAT8_MULTIPLE = 16
"""Numbers of rows and columns of an 8-bit matrix must be multiples of this: matrix units read 16 bytes at a time
(torch's ``_scaled_mm``)."""


def check_float8(config: TrainConfig) -> None:
    """Raise ConfigError for the first setting that does not work with ``float8``. The device is not checked."""
    if config.float8 is Float8.none:
        if config.float8_emulate:
            raise ConfigError(
                "float8_emulate=true with float8=none", "a float8 to emulate", "float8=rowwise, or float8_emulate=false"
            )
        return
    found = f"float8={config.float8.name}"
    own = next((key for key in ("attention", "ffn") if key in config.model.custom_parts), None)
    if own is not None:
        raise ConfigError(
            f"{found} with model.{own}={config.model.custom_parts[own]}",
            "attention and feed-forward layers of ours, whose matrices are known to fit 8 bits",
            "float8=none, or a part of ours",
        )
    if not is_importable("torchao"):
        raise ConfigError(
            f"{found}, and the package torchao is not installed",
            "the extra float8",
            f"{install_command('float8')}, or float8=none",
        )
    if config.precision.name == "fp16":
        raise ConfigError(
            f"{found} with precision=fp16", "bf16 or fp32 around the products in 8 bits", "precision=bf16"
        )
    parallel = config.parallel
    if parallel.tp > 1:
        raise ConfigError(
            f"{found} with parallel.tp={parallel.tp}",
            "matrices that are whole where they are multiplied",
            "parallel.tp=1 parallel=fsdp, or float8=none",
        )
    if parallel.strategy is Strategy.deepspeed:
        raise ConfigError(f"{found} with DeepSpeed", "an engine of torch", "parallel=fsdp, or float8=none")
    model = config.model
    widths = {
        "model.n_embd": model.n_embd,
        "width of all heads": model.n_head * model.head_dim,
        "width of the key-value heads": model.kv_heads * model.head_dim,
        "feed-forward width": model.ffn_width,
        **{f"latent {width} wide": width for width in model.latent_widths},
        "rotated part of a head": model.rotary_width if model.latent_widths else 0,
    }
    odd = {name: size for name, size in widths.items() if size % FLOAT8_MULTIPLE}
    if odd:
        key, size = next(iter(odd.items()))
        raise ConfigError(
            f"{found} with {key} of {size}",
            f"multiples of {FLOAT8_MULTIPLE} on both sides of every matrix",
            f"a model whose {key} is {-(-size // FLOAT8_MULTIPLE) * FLOAT8_MULTIPLE}, or float8=none",
        )


def check_chunked_loss(config: TrainConfig) -> None:
    """Raise ConfigError if ``chunked_loss`` is set and another setting makes it impossible."""
    found = prevents_chunked_loss(config)
    if config.chunked_loss and found is not None:
        raise ConfigError(
            f"chunked_loss=true with {found}",
            "an engine of torch in bf16 or fp32, with the last layer and the output matrix whole on each rank",
            "chunked_loss=false",
        )


def prevents_chunked_loss(config: TrainConfig) -> str | None:
    """Return the first setting that prevents a chunked loss in this run, as text; None if no setting prevents it.

    A chunked loss needs the whole output matrix on each rank, and an engine that passes targets to the model. It
    supports neither the loss scale of fp16 nor a bound of the logits.
    """
    parallel, cap = config.parallel, config.model.logit_softcap
    refused = {
        "DeepSpeed": parallel.strategy is Strategy.deepspeed,
        f"parallel.tp={parallel.tp}": parallel.tp > 1,
        f"parallel.pp={parallel.pp}": parallel.pp > 1,
        f"model.logit_softcap={cap}": cap is not None,
        "fp16, whose small gradients need a scale before the loss": config.precision is Precision.fp16,
    }
    return next((found for found, is_refused in refused.items() if is_refused), None)


def check_packing(config: TrainConfig) -> None:
    """Raise ConfigError if ``data.pack`` is set, and the attention, the positions or the engine of the run cannot keep
    documents apart."""
    if config.data.pack is Pack.none:
        return
    own = next((key for key in ("attention", "position") if key in config.model.custom_parts), None)
    if own is not None:
        raise ConfigError(
            f"data.pack=documents with model.{own}={config.model.custom_parts[own]}",
            "attention and positions of ours, which take the documents of a sequence",
            "data.pack=none, or a part of ours",
        )
    parallel = config.parallel
    if parallel.cp > 1 or parallel.strategy is Strategy.deepspeed:
        raise ConfigError(
            "data.pack=documents with " + ("DeepSpeed" if parallel.cp == 1 else f"parallel.cp={parallel.cp}"),
            "whole sequences on each rank, and an engine of torch",
            "parallel=fsdp parallel.cp=1, or data.pack=none",
        )


def float8_words(config: TrainConfig) -> str:
    """Return the float8 setting as text for plans and summaries, such as ``float8 rowwise (emulated)``. ``float8`` must
    not be ``none``."""
    return f"float8 {config.float8.name}{' (emulated)' if config.float8_emulate else ''}"


def check_tf32(config: TrainConfig) -> None:
    """Raise ConfigError if ``tf32`` is true and ``precision`` is bf16 or fp16."""
    if config.tf32 and config.precision.is_half:
        raise ConfigError(
            f"tf32=true with precision={config.precision.name}",
            "TF32 for the products of precision=fp32 only; others are of 16 bits",
            "precision=fp32 tf32=true, or tf32=null",
        )


def is_installed(package: str) -> bool:
    """Return True if a Python package is installed with its metadata. A folder that only has the name of the
    package does not count, such as the folder ``wandb`` with the files of runs."""
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


# Composition of ``configs/train.yaml``: keys that name a run, and keys that may change.


WATCHING = ("logging", "profile")
NOT_IN_POINT = (*PLACE_KEYS, "data.cache_dir", *WATCHING)
"""Keys that are left out of the name of a run's folder, because they do not change any result: folders and
monitoring."""


def compose_train(overrides: Sequence[str]) -> DictConfig:
    """Compose ``configs/train.yaml`` with ``overrides``, check the result against the schema, and return it.

    Raises:
        ConfigError: an unknown key or option, or a value of the wrong type.
    """
    register_schema("train_schema", TrainConfig)
    store = ConfigStore.instance()
    if "train_main.yaml" not in store.repo:
        store.store("train_main", {"defaults": ["train_schema", "train", "_self_"]})
    config = compose_typed("train_main", TrainConfig, check_overrides(overrides, TrainConfig))
    make_paths_absolute(config)
    refuse_two_lengths(config.optim.max_tokens, overrides)
    return config


def refuse_two_lengths(max_tokens: float | None, overrides: Sequence[str]) -> None:
    """Raise ConfigError if both keys for the length of the run are set: ``overrides`` have ``optim.max_steps``, and
    ``max_tokens``, the value of ``optim.max_tokens``, is not None."""
    steps = typed_value(overrides, "optim.max_steps")
    if max_tokens is not None and steps is not None:
        raise ConfigError(
            f"optim.max_steps={steps} with optim.max_tokens={max_tokens:g}",
            "one of the two: the number of steps follows from the tokens and the global batch",
            f"optim.max_tokens={max_tokens:g}, or optim.max_steps={steps} optim.max_tokens=null",
        )


def make_paths_absolute(config: DictConfig) -> None:
    """Replace relative paths in ``config`` by absolute ones, in place. They are relative to the current folder, and
    ranks may run in another folder."""
    data = config.data
    keys: list[tuple[Any, Any]] = [(config, key) for key in ("output_dir", "run_dir", "init_from")]
    keys += [(data, key) for key in ("path", "val_path", "tokenizer_path", "cache_dir")]
    keys.append((config.parallel, "deepspeed_config"))
    keys += [(source, "path") for source in data.sources]
    keys += [(config.eval.tasks, place) for place, task in enumerate(config.eval.tasks) if Path(task).is_file()]
    if data.dataset is not None and Path(data.dataset).is_dir():  # otherwise it is the name of a dataset on the hub
        keys.append((data, "dataset"))
    is_hf = config.init_from is not None and config.init_from.startswith(HF_PREFIX)
    if is_hf:
        config.init_from = config.init_from.removeprefix(HF_PREFIX)
    make_absolute(keys)
    if is_hf:
        config.init_from = HF_PREFIX + config.init_from


def settle_parallel(config: DictConfig, values: Mapping[str, Any], micro_batch: int) -> None:
    """Write a chosen parallelism into ``config``, in place.

    Args:
        config: composed config of the run.
        values: key of ``parallel`` -> value. Other keys of ``parallel`` get their defaults.
        micro_batch: number of sequences, for ``optim.max_micro_batch``.
    """
    config.parallel = OmegaConf.merge(OmegaConf.structured(ParallelConfig), values)
    config.optim.max_micro_batch = micro_batch


EXECUTION = (
    *("parallel", "optim.max_micro_batch", "device", "compile", "recompute", "deterministic"),
    *("compile_fullgraph", "optim.target_val_loss", "optim.patience"),
)
LENGTH = (*(f"optim.{key}" for key in SCHEDULE), "optim.max_steps", "optim.max_tokens")
"""Keys that extend a finished run: they set the number of steps, and the learning rate of the additional steps."""
RESUMABLE = (*PLACE_KEYS, "data.cache_dir", *WATCHING, "checkpoint", "eval", "divergence", *EXECUTION, *LENGTH)
"""Keys that may change between the attempts of one run, because they extend the run or do not change its losses."""
