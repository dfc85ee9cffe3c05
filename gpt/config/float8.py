"""``float8``: what it goes together with, and the refusals of what it does not. Torch-free."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from gpt.config.checks import is_importable
from gpt.config.model import ModelConfig
from gpt.config.parallel import Strategy
from launch.errors import ConfigError
from launch.runs.environment import install_command

if TYPE_CHECKING:
    from gpt.config.train import TrainConfig

MULTIPLE = 16
"""Divisor of both sides of a matrix in 8 bits: the matrix units read 16 bytes at a time (torch's ``_scaled_mm``)."""


class Float8(Enum):
    """Matrix products of the blocks in 8 bits (arXiv 2209.05433): ``tensorwise`` scales each factor by its largest
    magnitude, ``rowwise`` each of its rows, slower and more exact."""

    none = "none"
    tensorwise = "tensorwise"
    rowwise = "rowwise"


def check_float8(config: TrainConfig) -> None:
    """Raise ConfigError for the first thing that ``float8`` does not go together with, whatever the device."""
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
    odd = {name: size for name, size in widths(config.model).items() if size % MULTIPLE}
    if odd:
        key, size = next(iter(odd.items()))
        raise ConfigError(
            f"{found} with {key} of {size}",
            f"multiples of {MULTIPLE} on both sides of every matrix",
            f"a model whose {key} is {-(-size // MULTIPLE) * MULTIPLE}, or float8=none",
        )


def widths(model: ModelConfig) -> dict[str, int]:
    """Sizes of the sides of the matrices of a block, by what they are."""
    return {
        "model.n_embd": model.n_embd,
        "width of all heads": model.n_head * model.head_dim,
        "width of the key-value heads": model.kv_heads * model.head_dim,
        "feed-forward width": model.ffn_width,
    }


def float8_words(config: TrainConfig) -> str:
    """Name the 8-bit products of a run, which are not switched off, for plans and summaries."""
    return f"float8 {config.float8.name}{' (emulated)' if config.float8_emulate else ''}"
