"""The formats there are, and which of them a model or a config.json is. Torch-free."""

from __future__ import annotations

from typing import Any

from gpt.config import ModelConfig
from gpt.conversion.gpt2 import GPT2
from gpt.conversion.llama import LLAMA
from gpt.conversion.mixtral import MIXTRAL
from gpt.conversion.spec import Format
from launch.errors import ConfigError

FORMATS = (GPT2, LLAMA, MIXTRAL)


def format_for(config: ModelConfig) -> Format:
    """The format that takes a model of ours.

    Raises:
        ConfigError: none does; names the parts that the nearest one lacks.
    """
    misfits = {fmt.name: fmt.misfits(config) for fmt in FORMATS}
    for fmt in FORMATS:
        if not misfits[fmt.name]:
            return fmt
    nearest = min(FORMATS, key=lambda fmt: len(misfits[fmt.name]))
    raise ConfigError(
        f"{', '.join(misfits[nearest.name])}, which {nearest.architecture} of transformers has no part for",
        f"a model that is one of {'; '.join(fmt.taken() for fmt in FORMATS)}",
        "--format torch, which takes every model",
    )


def format_of(hf: dict[str, Any]) -> Format:
    """The format that a config.json names.

    Raises:
        ConfigError: it names none of them.
    """
    for fmt in FORMATS:
        if fmt.name == hf.get("model_type"):
            return fmt
    raise ConfigError(
        f"a config.json of model_type={hf.get('model_type')}",
        f"one of {', '.join(fmt.name for fmt in FORMATS)}",
        "another model to start from",
    )
