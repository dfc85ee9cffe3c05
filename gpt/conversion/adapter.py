"""State-dict adapter of an architecture: its supported models, the keys of its config, and the names of its tensors.

Imports no torch: ``gpt.conversion.state_dict`` converts the tensors.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gpt.config import ExpertBalance, Ffn, ModelConfig, Position, RopeScaling
from launch.errors import ConfigError

INITIAL_FIELDS = ("init_std", "embedding_init_std", "residual_init_scaled")
TRAINING_FIELDS = ("dropout", "capacity_factor", "balance_coefficient", "balance_bias_rate", "z_coefficient")
KERNEL_FIELDS = ("attention", "force_flash", "expert_matmul", "vocab_multiple")
NOT_LEARNED = frozenset({"name", "options", *INITIAL_FIELDS, *TRAINING_FIELDS, *KERNEL_FIELDS})
"""Fields of ModelConfig that a trained model does not depend on. Any architecture accepts any value of them."""
ROPE_FIELDS = ("rope_base", "rope_scaling")
LLAMA3_FIELDS = ("rope_original_block_size", "rope_low_freq_factor", "rope_high_freq_factor")
SCALING_FIELDS = ("rope_factor", *LLAMA3_FIELDS)
EXPERT_FIELDS = (
    "n_expert",
    "n_expert_per_token",
    "n_shared_expert",
    "expert_ffn",
    "router_normalize",
    "expert_balance",
)


@dataclass(frozen=True)
class Rule:
    """Parameters of this project and tensors of transformers with the same numbers. One of the two sides is one tensor.

    Several parameters here may be one tensor of transformers, stacked by rows. Several tensors of transformers may be
    the slices of one parameter along its first dimension.
    """

    names: tuple[str, ...]
    """Names of the parameters in this project."""
    hf_names: tuple[str, ...]
    """Names of the tensors in files of transformers."""
    transposed: bool = False
    """True if transformers stores a matrix as (in, out); here it is (out, in)."""

    def __post_init__(self) -> None:
        assert len(self.names) == 1 or len(self.hf_names) == 1, self


@dataclass(frozen=True)
class StateDictAdapter:
    """Adapter between a state dict of this project and one architecture of the transformers library."""

    name: str
    """``model_type`` in its config.json."""
    architecture: str
    """Class of transformers that loads the model."""
    prefix: str
    """Prefix of the names of all tensors except lm_head. Files of the bare model omit it."""
    parts: dict[str, tuple[Any, ...]]
    """Field of ModelConfig that chooses a part -> choices of the architecture, the usual one first."""
    numbers: frozenset[str]
    """Fields of ModelConfig for which the architecture accepts any value."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """Function that returns a model as keys of config.json."""
    read_config: Callable[[dict[str, Any]], ModelConfig]
    """Function that returns the model of a config.json. It raises ConfigError for an unsupported part."""
    rules: Callable[[ModelConfig], list[Rule]]
    """Function that returns the rules of a model's tensors, in the order of the forward pass. They include a bias in
    every possible layer if the architecture requires it."""
    grouped_queries: bool = True
    """True if a model may have fewer key-value heads than query heads."""
    requires_bias: bool = False
    """True if every layer needs a bias. Layers without one are then written with a bias of zeros."""
    buffers: re.Pattern[str] = re.compile(r"(?!)")
    """Pattern of the names of redundant tensors in some files, which follow from the config."""

    def canonical(self, name: str) -> str:
        """Return a tensor's name with the prefix that files of the bare model omit."""
        return name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name

    def list_misfits(self, config: ModelConfig) -> list[str]:
        """Return the settings that the architecture does not support, as ``key=value``.

        A field of ModelConfig that is in neither ``parts`` nor ``numbers`` must have its default.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(ModelConfig)}
        wrong = []
        for key, value in architecture(config).items():
            if key == "n_kv_head":
                fits = self.grouped_queries or value == config.n_head
            elif key in self.parts:
                fits = value in self.parts[key]
            else:
                fits = key in self.numbers or value == defaults[key]
            if not fits:
                wrong.append(f"model.{key}={format_value(value)}")
        return wrong

    def describe_parts(self) -> str:
        """Return the parts of the architecture, as settings of ModelConfig."""
        choices = [f"{key}={'|'.join(format_value(v) for v in values)}" for key, values in self.parts.items()]
        choices += [] if self.grouped_queries else ["n_kv_head=n_head"]
        return f"{self.name} ({', '.join(choices)})"


def architecture(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of ModelConfig that affect a trained model's output: defaults resolved, idle ones left out."""
    idle = set(NOT_LEARNED)
    if config.position is not Position.rope:
        idle.update(ROPE_FIELDS)
    if config.rope_scaling is RopeScaling.none:
        idle.update(SCALING_FIELDS)
    if config.rope_scaling is not RopeScaling.llama3:
        idle.update(LLAMA3_FIELDS)
    if config.ffn is not Ffn.moe:
        idle.update(EXPERT_FIELDS)
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    fields |= {"n_kv_head": config.kv_heads, "ffn_hidden": config.ffn_width, "activation": config.ffn_activation}
    fields |= {"router_normalize": config.normalizes_experts}
    if config.expert_balance is not ExpertBalance.bias:
        fields["expert_balance"] = ExpertBalance.loss  # no part of a trained model
    return {key: value for key, value in fields.items() if key not in idle}


def format_value(value: Any) -> str:
    """Return ``value`` as typed in an override."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(getattr(value, "name", value))


def require_key(hf: dict[str, Any], key: str) -> Any:
    """Read a key that every config.json of an architecture has.

    Raises:
        ConfigError: the key is missing.
    """
    if hf.get(key) is None:
        raise ConfigError(
            f"a config.json of model_type={hf.get('model_type')} without {key}",
            "the config.json that transformers writes",
            "save_pretrained() of the model once more",
        )
    return hf[key]


def unsupported_part_error(hf: dict[str, Any], key: str, expected: str) -> ConfigError:
    """Return the error for a config.json with a part that the model here does not have."""
    return ConfigError(
        f"{key}={hf.get(key)!r} in a config.json of model_type={hf['model_type']}",
        f"{expected}, since there is no such part here",
        "another model to start from",
    )
