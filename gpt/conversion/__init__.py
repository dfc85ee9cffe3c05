"""Conversion of models to and from architectures of transformers: parts, keys of config.json, and names of tensors.

Imports no torch. ``source`` inspects files without torch, for the login node. ``state_dict`` converts tensors and loads
trained models. None of them imports transformers: they read and write its files, without its code.
``architectures.yaml`` has the keys and names of each architecture.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import yaml

from gpt.accounting import block_shapes, outer_shapes
from gpt.config import (
    Activation,
    AttentionBackend,
    ExpertBalance,
    Ffn,
    LoraConfig,
    ModelConfig,
    Norm,
    NormPosition,
    Position,
    RopeScaling,
)
from launch.errors import ConfigError

NOT_LEARNED = frozenset(
    [
        *("name", "options", "dropout", "capacity_factor"),
        *("balance_coefficient", "balance_bias_rate", "z_coefficient"),
        *("attention", "expert_matmul", "vocab_multiple", "lora"),
    ]
)
"""Fields of ModelConfig that do not change the output of a trained model: names, settings of training, padding, and
choices of kernels."""
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Keys of config.json, with their values, that all models with rope_scaling=llama3 have."""
YARN: dict[str, list[Any]] = {
    **{"beta_fast": [32], "beta_slow": [1], "truncate": [True]},
    **{key: [None] for key in ("attention_factor", "mscale", "mscale_all_dim")},
}
"""Key of config.json with rope_scaling=yarn -> its values that this project supports."""
NULLABLE = ("window", "attention_softcap", "logit_softcap", "q_lora_rank")
"""Fields of ModelConfig that become None if their key in config.json is null. For all other fields, null counts as a
missing key."""
EXPERT_FIELDS = {
    *("n_expert", "n_expert_per_token", "n_shared_expert", "expert_ffn", "router_normalize", "expert_balance"),
}


def architecture_fields(config: ModelConfig) -> dict[str, Any]:
    """Return the fields of a ModelConfig that change the output of a trained model: name -> value. For a field that may
    be None and then has a default from other fields, such as ``n_kv_head``, the value is this default instead of
    None."""
    idle = set(NOT_LEARNED)
    if config.position is not Position.rope:
        idle |= {"rope_base", "rope_scaling"}
    if config.rope_scaling is RopeScaling.none:
        idle |= {"rope_factor"}
    if config.rope_scaling not in (RopeScaling.llama3, RopeScaling.yarn):
        idle |= {"rope_original_block_size"}
    if config.ffn is not Ffn.moe:
        idle |= EXPERT_FIELDS
    fields = {field.name: getattr(config, field.name) for field in dataclasses.fields(ModelConfig)}
    fields |= {"n_kv_head": config.kv_heads, "ffn_hidden": config.ffn_width, "activation": config.ffn_activation}
    fields |= {"router_normalize": config.normalizes_experts, "head_width": config.head_dim}
    if config.global_every is not None and config.global_every > config.n_layer:
        fields["global_every"] = None
    if config.expert_balance is not ExpertBalance.bias:
        fields["expert_balance"] = ExpertBalance.loss  # no part of a trained model
    return {key: value for key, value in fields.items() if key not in idle}


def format_value(value: Any) -> str:
    """Return a value of the config as text for an override, such as ``true``, ``null`` or ``rmsnorm``."""
    if isinstance(value, bool):
        return str(value).lower()
    return "null" if value is None else str(getattr(value, "name", value))


@dataclass(frozen=True)
class Rule:
    """Correspondence of parameters of this project and tensors of transformers with the same numbers.

    There are three cases. One parameter is one tensor. Or several parameters are one tensor of transformers, stacked by
    rows. Or several tensors of transformers are the slices of one parameter along its first dimension.
    """

    names: tuple[str, ...]
    """Names of the parameters in this project."""
    hf_names: tuple[str, ...]
    """Names of the tensors in files of transformers."""
    transposed: bool = False
    """True if transformers stores the transposed matrix, (in, out) instead of (out, in)."""
    offset: float = 0.0
    """Number that transformers adds to each number of the stored tensor before it computes with the tensor."""


@dataclass(frozen=True)
class StateDictAdapter:
    """Conversion between models of this project and one architecture of transformers. Most fields come from
    ``architectures.yaml``."""

    name: str
    """``model_type`` in config.json of the architecture."""
    architecture: str
    """Class of transformers that loads the model."""
    prefix: str
    """Prefix of the names of all tensors except lm_head. Some files leave the prefix out."""
    parts: str
    """Text on the parts of the architecture, as settings of ModelConfig, for messages."""
    keys: dict[str, list[Any]]
    """Field of ModelConfig -> [key in config.json], or [key in config.json, value if the key is missing]. With the
    first form, a config.json without the key is refused."""
    dropout: list[str]
    """Keys of config.json with the share of values that dropout sets to zero."""
    only: dict[str, list[Any]]
    """Key of config.json -> its values that this project supports. A missing key is also supported."""
    activations: dict[str, str]
    """Name of an activation in config.json -> its name in this project. If several names in config.json mean the same
    activation, the first of them is written."""
    names: dict[str, str]
    """Name of a module in this project -> its name in transformers. For a module of a block, both names begin inside
    the block. If several modules have the same name in transformers, their matrices are one tensor there, stacked by
    rows. ``{}`` is replaced by the number of an expert."""
    layers: str
    """Beginning of the names of all tensors of blocks in transformers: the part before the number of the block."""
    buffers: str
    """Regular expression for the names of tensors that old versions of transformers saved, and that are not needed."""
    transposes: bool = False
    """True if transformers stores the matrices of blocks transposed, (in, out) instead of (out, in)."""
    gain_offset: float = 0.0
    """Number that transformers adds to the stored gain of a norm: 1 in Gemma."""
    even_heads: bool = False
    """True if the number of heads must divide the width of the model, even if config.json has a ``head_dim``, which
    states the width of a head."""
    requires_bias: bool = False
    """True if every layer of the architecture has a bias. A model without biases is written with biases of zeros."""

    def canonical(self, name: str) -> str:
        """Return the name of a tensor of transformers with ``prefix``. ``name`` may be without it, as in some files."""
        return name if name.startswith((self.prefix, "lm_head.")) else self.prefix + name

    def write_config(self, config: ModelConfig) -> dict[str, Any]:
        """Return the content of config.json for a model: key -> value. Parts that the architecture lacks have no
        key."""
        config = self.equivalent(config)
        fields = {**vars(config), **architecture_fields(config)}
        written = {key: fields[field] for field, (key, *_) in self.keys.items()}
        names = (name for name, found in self.activations.items() if found == config.ffn_activation.name)
        written[self.keys["activation"][0]] = next(names, None)
        return written | dict.fromkeys(self.dropout, config.dropout) | PARTS[self.name][0](config)

    def equivalent(self, config: ModelConfig) -> ModelConfig:
        """Return a config whose model computes the same as the model of ``config``. Some parts that the architecture
        lacks are replaced by parts that it has.

        If the architecture requires biases, biases are added. Otherwise NTK-aware scaling of rotary frequencies becomes
        another base.
        """
        if self.requires_bias:
            norm = Norm.layernorm if config.norm is Norm.layernorm_nobias else config.norm
            return dataclasses.replace(config, bias=True, norm=norm)
        if config.rope_scaling is not RopeScaling.ntk:
            return config
        # transformers' rope_type=dynamic is different: it depends on the length of the text.
        base = config.rope_base * config.rope_factor ** (config.rotary_width / (config.rotary_width - 2))
        return dataclasses.replace(config, rope_base=base, rope_scaling=RopeScaling.none, rope_factor=1.0)

    def read_config(self, hf: dict[str, Any]) -> ModelConfig:
        """Return the ModelConfig for the content ``hf`` of a config.json. Raise ConfigError if a key is missing or a
        part is not supported."""
        fields: dict[str, Any] = {"name": hf["model_type"]}
        for field, (key, *missing) in self.keys.items():
            is_set = hf.get(key) is not None or (key in hf and field in NULLABLE)
            if not is_set and not missing:
                raise ConfigError(
                    f"a config.json of model_type={self.name} without {key}",
                    "the config.json that transformers writes",
                    "save_pretrained() of the model once more",
                )
            fields[field] = hf[key] if is_set else missing[0]
        refuse_others(hf, self.only | {self.keys["activation"][0]: [*self.activations]})
        fields["activation"] = Activation[self.activations[fields["activation"]]]
        return ModelConfig(**(fields | PARTS[self.name][1](hf, fields)))

    def rules(self, config: ModelConfig) -> list[Rule]:
        """Return the rules for all tensors of a model, without adapters (LoRA)."""
        config = dataclasses.replace(self.equivalent(config), lora=LoraConfig())
        blocks = [f"blocks.{layer}.{name}" for layer in range(config.n_layer) for name in block_shapes(config)]
        found: dict[tuple[str, ...], list[str]] = {}
        for name in [*outer_shapes(config), *blocks]:
            found.setdefault(self.hf_names(name, config), []).append(name)
        matrix = re.compile(r"blocks\..*(?<!_norm)\.weight")
        return [
            Rule(
                tuple(names),
                hf_names,
                self.transposes and matrix.fullmatch(names[0]) is not None,
                self.gain_offset if re.search(r"(^|[._])norm\.weight$", names[0]) else 0.0,
            )
            for hf_names, names in found.items()
        ]

    def adapted(self, config: ModelConfig) -> dict[str, list[str]]:
        """Return the modules with an adapter (LoRA): name in transformers -> names in this project. Several modules of
        this project may be one stacked module of transformers."""
        stacks = {
            rule.hf_names[0]: [name.removesuffix(".weight") for name in rule.names] for rule in self.rules(config)
        }
        return {
            name.removesuffix(".weight"): modules
            for name, modules in stacks.items()
            if name.endswith(".weight") and any(module.endswith(config.adapted) for module in modules)
        }

    def peft_targets(self, config: ModelConfig) -> dict[str, Any]:
        """Return the entries of peft's adapter_config.json that name the layers with adapters, their ranks and their
        alphas.

        If several modules with adapters are one stacked module of transformers, the rank and alpha of its adapter are
        multiplied by their number, so that the scale is the same.
        """
        first, lora = f"{self.layers}.0.", config.lora
        adapters = {
            name.removeprefix(first): sum(module.endswith(config.adapted) for module in modules)
            for name, modules in self.adapted(config).items()
            if name.startswith(first)
        }
        several = {name: number for name, number in adapters.items() if number > 1}
        return {
            "target_modules": [*adapters],
            "rank_pattern": {name: lora.rank * number for name, number in several.items()},
            "alpha_pattern": {name: lora.alpha * number for name, number in several.items()},
        }

    def hf_names(self, name: str, config: ModelConfig) -> tuple[str, ...]:
        """Return the names in transformers of the tensors of the parameter ``name``: one, or for stacked experts one
        for each expert."""
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        prefix, local = (f"{self.layers}.{block[1]}.", block[2]) if block else ("", name)
        if local in self.names:
            return tuple(f"{prefix}{self.names[local].format(expert)}.weight" for expert in range(config.n_expert))
        module, _, kind = local.rpartition(".")
        return (f"{prefix}{self.names[module]}.{kind}",)

    def list_misfits(self, config: ModelConfig) -> list[str]:
        """Return the settings of a model that the architecture does not support, as ``model.KEY=VALUE``; empty if it
        supports all."""
        asked = architecture_fields(self.equivalent(config))
        kept = architecture_fields(self.read_config({"model_type": self.name, **self.write_config(config)}))
        odd = ["n_head"] if self.even_heads and config.n_embd % config.n_head else []
        odd += [key for key, value in asked.items() if kept.get(key) != value]
        return [f"model.{key}={format_value(asked[key])}" for key in odd]


def refuse_others(hf: dict[str, Any], choices: dict[str, list[Any]]) -> None:
    """Raise ConfigError if a key of the config.json ``hf`` has a value that this project does not support.

    ``choices`` has key -> supported values. Keys that are not in ``choices`` are not checked. A missing key, or null,
    is accepted.
    """
    for key, values in choices.items():
        if hf.get(key) is not None and hf[key] not in values:
            raise ConfigError(
                f"{key}={hf[key]} in a config.json of model_type={hf['model_type']}",
                f"{key} of {', '.join(map(str, values))}, since there is no such part here",
                "another model to start from",
            )


def no_parts(*_: Any) -> dict[str, Any]:
    """Return an empty dictionary, whatever the arguments: architectures.yaml has all keys of a GPT-2."""
    return {}


# Llama, and its descendants. config.json is written with ``rope_theta`` and ``rope_scaling``, which versions 4 and 5 of
# transformers understand. Both spellings are read.


def write_llama(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of a Llama's config.json whose keys are not in architectures.yaml."""
    biases = {"attention_bias": config.bias, "mlp_bias": config.bias}
    return write_rope(config) | biases


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of config.json for rotary embeddings."""
    base, scaling = config.rope_base, config.rope_scaling
    if scaling is RopeScaling.none:
        return {"rope_theta": base, "rope_scaling": None}
    described: dict[str, Any] = {"rope_type": scaling.name, "factor": config.rope_factor}
    if scaling is not RopeScaling.linear:
        described |= {"original_max_position_embeddings": config.rope_original_block_size}
    if scaling is RopeScaling.llama3:
        described |= LLAMA3
    return {"rope_theta": base, "rope_scaling": described}


def read_llama(hf: dict[str, Any], fields: dict[str, Any], rope_base: float = 10000.0) -> dict[str, Any]:
    """Return those fields of ModelConfig for a Llama's config.json that have no key in architectures.yaml: name ->
    value.

    Args:
        hf: content of the config.json.
        fields: fields of ModelConfig from the keys in architectures.yaml.
        rope_base: base of the rotary frequencies if config.json has none.

    Raises:
        ConfigError: a part of the model is not supported.
    """
    bias = bool(hf.get("attention_bias", False))
    refuse_others(hf, {"mlp_bias": [bias]})
    is_swiglu = fields["activation"] is Activation.silu
    return {
        "norm": Norm.rmsnorm,
        "position": Position.rope,
        "ffn": Ffn.swiglu if is_swiglu else Ffn.geglu,
        "bias": bias,
        **read_rope(hf, rope_base),
    }


def read_rope(hf: dict[str, Any], base: float) -> dict[str, Any]:
    """Return the fields of ModelConfig for rotary embeddings from the content ``hf`` of a config.json of transformers 4
    or 5. ``base`` is the base of the frequencies if ``hf`` has none.

    Raises:
        ConfigError: the scaling of the frequencies is not supported.
    """
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    rope = rope.get("full_attention", rope)  # of the layers without a window, if these differ
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" is the older spelling
    kinds = ["default", "linear", "llama3", "yarn"]
    choices: dict[str, list[Any]] = {"rope_type": kinds, "partial_rotary_factor": [1.0]}
    refuse_others({**hf, **rope, "rope_type": kind}, choices)
    fields: dict[str, Any] = {"rope_base": float(rope.get("rope_theta") or hf.get("rope_theta") or base)}
    if kind != "default":
        fields |= {"rope_scaling": RopeScaling[kind], "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        refuse_others({**hf, **rope}, {key: [value] for key, value in LLAMA3.items()})
    if kind == "yarn":
        refuse_others({**hf, **rope}, YARN)
    if kind in ("llama3", "yarn"):
        fields |= {"rope_original_block_size": rope["original_max_position_embeddings"]}
    return fields


def write_plain(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of config.json whose keys are not in architectures.yaml. The architecture is like Llama, but
    its config.json has no keys for biases."""
    return {key: value for key, value in write_llama(config).items() if not key.endswith("_bias")}


def write_phi3(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of a Phi-3's config.json whose keys are not in architectures.yaml. ``rope_scaling`` is null,
    because this project supports no scaling of Phi-3."""
    return write_plain(config) | {"rope_scaling": None}


def read_phi3(hf: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig from a Phi-3's config.json, as ``read_llama``."""
    rope = hf.get("rope_parameters") or {}
    refuse_others({**hf, **rope}, {"rope_scaling": [None], "rope_type": ["default"]})
    return read_llama(hf, fields)


def write_mixtral(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of a Mixtral's config.json whose keys are not in architectures.yaml."""
    experts = {"router_aux_loss_coef": config.balance_weight, "output_router_logits": False}
    return write_plain(config) | experts


def read_mixtral(hf: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig from a Mixtral's config.json, as ``read_llama``."""
    parts = read_llama(hf, fields, rope_base=1e6)
    return parts | {"ffn": Ffn.moe, "expert_ffn": parts["ffn"], "router_normalize": True}


def read_qwen3(hf: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig from a Qwen3's config.json, as ``read_llama``."""
    return read_llama(hf, fields) | {"qk_norm": True}


def write_deepseek(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of a DeepSeek V2's or V3's config.json whose keys are not in architectures.yaml. The model has
    no experts."""
    widths = dict.fromkeys(("qk_nope_head_dim", "v_head_dim"), config.value_width)
    return write_plain(config) | widths | {"first_k_dense_replace": config.n_layer, "num_nextn_predict_layers": 0}


def read_deepseek(hf: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig from a DeepSeek V2's or V3's config.json, as ``read_llama``. Experts are not
    supported."""
    plain, layers = hf.get("qk_nope_head_dim", 128), fields["n_layer"]
    dense = min(hf.get("first_k_dense_replace") or 0, layers)
    refuse_others({**hf, "first_k_dense_replace": dense}, {"first_k_dense_replace": [layers], "v_head_dim": [plain]})
    # The norms of latents have this eps, whatever eps the other norms have.
    return read_llama(hf, fields) | {"head_width": plain + fields["rope_head_width"], "norm_eps": 1e-6}


# Gemma 2 and 3, whose layers differ.


def layer_kinds(config: ModelConfig) -> list[str]:
    """Return transformers' name for the kind of each layer: ``sliding_attention`` with a window, ``full_attention``
    without."""
    return ["sliding_attention" if config.is_local(layer) else "full_attention" for layer in range(config.n_layer)]


def write_gemma(config: ModelConfig) -> dict[str, Any]:
    """Return the entries of the config.json of a Gemma 2, or of a Gemma 3 for text only, whose keys are not in
    architectures.yaml."""
    base = 1e4 if config.rope_base_local is None else config.rope_base_local
    kinds = {"layer_types": layer_kinds(config), "query_pre_attn_scalar": config.head_dim}
    return write_plain(config) | kinds | ({"rope_local_base_freq": base} if config.qk_norm else {})


def read_gemma2(hf: dict[str, Any], fields: dict[str, Any], every: int = 2) -> dict[str, Any]:
    """Return the fields of ModelConfig from a Gemma 2's config.json, as ``read_llama``.

    If config.json has no layer_types, the layers whose number, counted from 1, is a multiple of ``every`` have no
    window.
    """
    # The scores are divided by the root of this number, here by that of the width of a head.
    refuse_others({"query_pre_attn_scalar": 256, **hf}, {"query_pre_attn_scalar": [fields["head_width"]]})
    parts = read_llama(hf, fields) | {"norm_position": NormPosition.both, "scale_embedding": True}
    kinds = hf.get("layer_types")
    if kinds is not None:  # the first global layer gives the pattern, which all layers are compared with
        every = kinds.index("full_attention") + 1 if "full_attention" in kinds else len(kinds) + 1
    window = None if every == 1 else fields["window"]
    parts |= {"window": window, "global_every": None if window is None or every > fields["n_layer"] else every}
    refuse_others(hf, {"layer_types": [layer_kinds(ModelConfig(**fields | parts))]})
    # torch's fused kernels have no bound of the scores.
    return parts | ({} if fields.get("attention_softcap") is None else {"attention": AttentionBackend.manual})


def read_gemma3(hf: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of ModelConfig from the config.json of a Gemma 3 for text only, as ``read_llama``."""
    parts = read_gemma2(hf, fields, hf.get("sliding_window_pattern") or 6) | read_rope(hf, 1e6)
    local = (hf.get("rope_parameters") or {}).get("sliding_attention", {})
    refuse_others({**hf, **local}, {"rope_type": ["default"]})
    base = float(local.get("rope_theta") or hf.get("rope_local_base_freq") or 1e4)
    return parts | {"qk_norm": True, "rope_base_local": None if parts["window"] is None else base}


PARTS: dict[
    str, tuple[Callable[[ModelConfig], dict[str, Any]], Callable[[dict[str, Any], dict[str, Any]], dict[str, Any]]]
] = {
    "gpt2": (no_parts, no_parts),
    "llama": (write_llama, read_llama),
    "mistral": (write_plain, read_llama),
    "phi3": (write_phi3, read_phi3),
    "mixtral": (write_mixtral, read_mixtral),
    "qwen3": (write_plain, read_qwen3),
    "deepseek_v3": (write_deepseek, read_deepseek),
    "deepseek_v2": (write_deepseek, read_deepseek),
    "gemma2": (write_gemma, read_gemma2),
    "gemma3_text": (write_gemma, read_gemma3),
}
"""Architecture -> two functions for the parts that architectures.yaml does not have. The first takes a ModelConfig, and
returns keys of config.json. The second takes a config.json, and the fields of ModelConfig from architectures.yaml, and
returns further fields; it raises ConfigError for a part that is not supported."""
TABLE = resources.files("gpt.conversion").joinpath("architectures.yaml")
ADAPTERS = tuple(StateDictAdapter(name, **row) for name, row in yaml.safe_load(TABLE.read_text()).items())


def choose_adapter(config: ModelConfig) -> StateDictAdapter:
    """Return the adapter of the architecture of transformers that has all parts of a model.

    Raises:
        ConfigError: no architecture has all parts. The message names the parts that the most similar architecture
            lacks.
    """
    misfits = {adapter.name: adapter.list_misfits(config) for adapter in ADAPTERS}
    nearest = min(ADAPTERS, key=lambda adapter: len(misfits[adapter.name]))
    if not misfits[nearest.name]:
        return nearest
    raise ConfigError(
        f"{', '.join(misfits[nearest.name])}, which {nearest.architecture} of transformers has no part for",
        f"a model that is one of {'; '.join(f'{adapter.name} ({adapter.parts})' for adapter in ADAPTERS)}",
        "--format torch, which takes every model",
    )


def find_adapter(hf: dict[str, Any]) -> StateDictAdapter:
    """Return the adapter of the architecture with the ``model_type`` of a config.json.

    Raises:
        ConfigError: this architecture is not supported.
    """
    for adapter in ADAPTERS:
        if adapter.name == hf.get("model_type"):
            return adapter
    raise ConfigError(
        f"a config.json of model_type={hf.get('model_type')}",
        f"one of {', '.join(adapter.name for adapter in ADAPTERS)}",
        "another model to start from",
    )
