"""What a foreign format is made of: which models it takes, how its config is spelled, which of its tensors are ours.

Owns the two dataclasses that a format fills in, and the judgement whether a model fits. Torch-free.
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
NOT_LEARNED = frozenset({"name", *INITIAL_FIELDS, *TRAINING_FIELDS, *KERNEL_FIELDS})
"""Fields of ModelConfig that a trained model does not depend on: any format takes any value of them."""
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
    """Parameters of ours and tensors of theirs that hold the same numbers; one side has one, the other one or more.

    Several of ours are one of theirs one below the other (rows of our matrices); several of theirs are the slices of
    one of ours along its first dimension.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False
    """Their matrices are stored (in, out), where ours are (out, in)."""

    def __post_init__(self) -> None:
        assert len(self.ours) == 1 or len(self.theirs) == 1, self


@dataclass(frozen=True)
class Format:
    """One architecture of the transformers library."""

    name: str
    """``model_type`` in its config.json."""
    architecture: str
    prefix: str
    """What the names of all tensors but lm_head begin with; files of the bare model leave it out."""
    parts: dict[str, tuple[Any, ...]]
    """Fields of ModelConfig that choose a part, and the choices that the format has, the usual one first."""
    numbers: frozenset[str]
    """Fields of ModelConfig that the format takes with any value."""
    write_config: Callable[[ModelConfig], dict[str, Any]]
    """The keys of config.json that describe the model."""
    read_config: Callable[[dict[str, Any]], ModelConfig]
    """The model a config.json describes; raises ConfigError for what our model has no part for."""
    rules: Callable[[ModelConfig], list[Rule]]
    """All tensors of a model, in the order of the forward pass; with a bias in every layer that can have one where the
    format requires it."""
    grouped_queries: bool = True
    """Whether there may be fewer key-value heads than query heads."""
    requires_bias: bool = False
    """Layers without a bias are written with one of zeros."""
    buffers: re.Pattern[str] = re.compile(r"(?!)")
    """Names of tensors that some files hold and that follow from the config."""

    def canonical(self, name: str) -> str:
        """A tensor's name with the prefix that files of the bare model leave out."""
        return name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name

    def misfits(self, config: ModelConfig) -> list[str]:
        """What of ``config`` the format has no room for, as ``key=value``; a field it does not name must be neutral."""
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
                wrong.append(f"model.{key}={spelled(value)}")
        return wrong

    def taken(self) -> str:
        """The parts that the format has, in words."""
        choices = [f"{key}={'|'.join(spelled(v) for v in values)}" for key, values in self.parts.items()]
        choices += [] if self.grouped_queries else ["n_kv_head=n_head"]
        return f"{self.name} ({', '.join(choices)})"


def architecture(config: ModelConfig) -> dict[str, Any]:
    """The fields that decide what a trained model computes, with derived defaults resolved and idle ones left out."""
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


def spelled(value: Any) -> str:
    """``value`` as one would type it in an override."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(getattr(value, "name", value))


def required(hf: dict[str, Any], key: str) -> Any:
    """A key that every config.json of a format has.

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


def refuse_part(hf: dict[str, Any], key: str, expected: str) -> ConfigError:
    """The error for a config.json that asks for a part that our model does not have."""
    return ConfigError(
        f"{key}={hf.get(key)!r} in a config.json of model_type={hf['model_type']}",
        f"{expected}, since there is no such part here",
        "another model to start from",
    )
