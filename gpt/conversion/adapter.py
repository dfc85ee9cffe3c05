"""The state-dict adapter of an architecture: the models it takes, the keys of its config, and the names of its tensors.

Torch-free: the tensors themselves are moved by ``gpt.conversion.state_dict``.
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
"""Fields of ModelConfig that a trained model does not depend on: any architecture takes any value of them."""
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
    """Parameters of our model and tensors of transformers that hold the same numbers; one of the sides is one tensor.

    Several of ours are one of transformers', one below the other (rows of our matrices); several of transformers' are
    the slices of one of ours along its first dimension.
    """

    names: tuple[str, ...]
    """Names of our parameters."""
    hf_names: tuple[str, ...]
    """Names of the tensors in files of transformers."""
    transposed: bool = False
    """True where transformers stores a matrix as (in, out); ours are (out, in)."""

    def __post_init__(self) -> None:
        assert len(self.names) == 1 or len(self.hf_names) == 1, self


@dataclass(frozen=True)
class StateDictAdapter:
    """Adapter between our state dict and one architecture of the transformers library."""

    name: str
    """``model_type`` in its config.json."""
    architecture: str
    """Class of transformers that loads it."""
    prefix: str
    """Beginning of the names of all tensors but lm_head; files of the bare model leave it out."""
    parts: dict[str, tuple[Any, ...]]
    """Fields of ModelConfig that choose a part -> the choices that the architecture has, the usual one first."""
    numbers: frozenset[str]
    """Fields of ModelConfig that the architecture takes with any value."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """Describe a model as keys of config.json."""
    read_config: Callable[[dict[str, Any]], ModelConfig]
    """Read the model that a config.json describes; raises ConfigError for what our model has no part for."""
    rules: Callable[[ModelConfig], list[Rule]]
    """List the rules of a model's tensors, in the order of the forward pass; with a bias in every layer that can have
    one where the architecture requires it."""
    grouped_queries: bool = True
    """True where there may be fewer key-value heads than query heads."""
    requires_bias: bool = False
    """True where every layer has a bias: layers of ours without one are written with one of zeros."""
    buffers: re.Pattern[str] = re.compile(r"(?!)")
    """Names of tensors that some files hold although they follow from the config."""

    def canonical(self, name: str) -> str:
        """Complete a tensor's name with the prefix that files of the bare model leave out."""
        return name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name

    def list_misfits(self, config: ModelConfig) -> list[str]:
        """List the settings that the architecture has no part for, as ``key=value``.

        A field of ModelConfig that the adapter does not name must have its default.
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
        """Describe the parts that the architecture has, as settings of ModelConfig."""
        choices = [f"{key}={'|'.join(format_value(v) for v in values)}" for key, values in self.parts.items()]
        choices += [] if self.grouped_queries else ["n_kv_head=n_head"]
        return f"{self.name} ({', '.join(choices)})"


def architecture(config: ModelConfig) -> dict[str, Any]:
    """Fields of ModelConfig that the output of a trained model depends on, defaults resolved and idle ones left out."""
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
        fields["expert_balance"] = ExpertBalance.loss  # a loss leaves nothing behind, a bias is a part of the model
    return {key: value for key, value in fields.items() if key not in idle}


def format_value(value: Any) -> str:
    """Format ``value`` as it is typed in an override."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(getattr(value, "name", value))


def require_key(hf: dict[str, Any], key: str) -> Any:
    """Read a key that every config.json of an architecture has.

    Raises:
        ConfigError: it is not there.
    """
    if hf.get(key) is None:
        raise ConfigError(
            f"a config.json of model_type={hf.get('model_type')} without {key}",
            "the config.json that transformers writes",
            "save_pretrained() of the model once more",
        )
    return hf[key]


def unsupported_part_error(hf: dict[str, Any], key: str, expected: str) -> ConfigError:
    """Refusal of a config.json that asks for a part that our model does not have."""
    return ConfigError(
        f"{key}={hf.get(key)!r} in a config.json of model_type={hf['model_type']}",
        f"{expected}, since there is no such part here",
        "another model to start from",
    )
