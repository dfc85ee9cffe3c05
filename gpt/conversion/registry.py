"""All state-dict adapters, and the choice of one for a model or a config.json. Imports no torch."""

from __future__ import annotations

from typing import Any

from gpt.config import ModelConfig
from gpt.conversion.adapter import StateDictAdapter
from gpt.conversion.gpt2 import GPT2
from gpt.conversion.llama import LLAMA
from gpt.conversion.mixtral import MIXTRAL
from launch.errors import ConfigError

ADAPTERS = (GPT2, LLAMA, MIXTRAL)


def choose_adapter(config: ModelConfig) -> StateDictAdapter:
    """Return the adapter whose architecture has all parts of a model.

    Raises:
        ConfigError: no adapter has all parts. The message names the parts that the nearest one lacks.
    """
    misfits = {adapter.name: adapter.list_misfits(config) for adapter in ADAPTERS}
    for adapter in ADAPTERS:
        if not misfits[adapter.name]:
            return adapter
    nearest = min(ADAPTERS, key=lambda adapter: len(misfits[adapter.name]))
    raise ConfigError(
        f"{', '.join(misfits[nearest.name])}, which {nearest.architecture} of transformers has no part for",
        f"a model that is one of {'; '.join(adapter.describe_parts() for adapter in ADAPTERS)}",
        "--format torch, which takes every model",
    )


def find_adapter(hf: dict[str, Any]) -> StateDictAdapter:
    """Return the adapter of the ``model_type`` in a config.json.

    Raises:
        ConfigError: no adapter has this type.
    """
    for adapter in ADAPTERS:
        if adapter.name == hf.get("model_type"):
            return adapter
    raise ConfigError(
        f"a config.json of model_type={hf.get('model_type')}",
        f"one of {', '.join(adapter.name for adapter in ADAPTERS)}",
        "another model to start from",
    )
