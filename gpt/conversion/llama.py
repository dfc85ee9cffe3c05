"""Adapter of Llama in transformers. Rotary channels are paired as here, c with c + C/2. Imports no torch.

Names and shapes as in LlamaForCausalLM of transformers (models/llama/modeling_llama.py). config.json is written with
``rope_theta`` and ``rope_scaling``, which versions 4 and 5 understand. Both spellings are read.
"""

from __future__ import annotations

import re
from typing import Any

from gpt.config import Activation, Ffn, ModelConfig, Norm, Position, RopeScaling
from gpt.conversion.adapter import (
    ROPE_FIELDS,
    SCALING_FIELDS,
    Rule,
    StateDictAdapter,
    require_key,
    unsupported_part_error,
)
from launch.errors import ConfigError

ATTENTION = {
    "attention.query": "self_attn.q_proj",
    "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj",
    "attention.output": "self_attn.o_proj",
}
FFN = {"ffn.gate": "mlp.gate_proj", "ffn.up": "mlp.up_proj", "ffn.down": "mlp.down_proj"}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
LLAMA3 = {
    "rope_original_block_size": "original_max_position_embeddings",
    "rope_low_freq_factor": "low_freq_factor",
    "rope_high_freq_factor": "high_freq_factor",
}
HIDDEN_ACT = {Activation.silu: "silu", Activation.gelu: "gelu", Activation.gelu_tanh: "gelu_pytorch_tanh"}
"""Activation of the gate -> its name in config.json. SiLU makes the layer SwiGLU, the other two GEGLU."""
OTHER_NAMES = {"swish": Activation.silu, "gelu_new": Activation.gelu_tanh}
ROTARY_TABLE = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
"""Names of the tables of rotary frequencies, which old versions saved."""


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the model as keys of config.json."""
    return write_common(config) | {"attention_bias": config.bias, "mlp_bias": config.bias}


def write_common(config: ModelConfig) -> dict[str, Any]:
    """Return the keys of config.json that Llama and its relatives share."""
    return {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.ffn_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": HIDDEN_ACT[config.ffn_activation],
        "rms_norm_eps": config.norm_eps,
        **write_rope(config),
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return the model of a config.json. Raise ConfigError for a part that is not supported."""
    bias = bool(hf.get("attention_bias", False))
    if bool(hf.get("mlp_bias", False)) is not bias:
        raise unsupported_part_error(hf, "mlp_bias", f"mlp_bias={bias}, as attention_bias is")
    config = read_common(hf, rope_base=10000.0, norm_eps=1e-6)
    config.bias = bias
    return config


def read_common(hf: dict[str, Any], rope_base: float, norm_eps: float) -> ModelConfig:
    """Read the keys that Llama and its relatives share. The two numbers replace missing keys."""
    known = {hf_name: activation for activation, hf_name in HIDDEN_ACT.items()} | OTHER_NAMES
    activation = hf.get("hidden_act", "silu")
    if activation not in known:
        raise unsupported_part_error(hf, "hidden_act", f"one of {', '.join(known)}")
    n_embd, n_head = require_key(hf, "hidden_size"), require_key(hf, "num_attention_heads")
    # Here, heads share the width evenly; other models may have wider heads.
    if hf.get("head_dim") not in (None, n_embd // n_head):
        raise unsupported_part_error(hf, "head_dim", f"hidden_size / num_attention_heads = {n_embd // n_head}")
    return ModelConfig(
        name=hf["model_type"],
        n_layer=require_key(hf, "num_hidden_layers"),
        n_head=n_head,
        n_kv_head=hf.get("num_key_value_heads"),
        n_embd=n_embd,
        block_size=require_key(hf, "max_position_embeddings"),
        vocab_size=require_key(hf, "vocab_size"),
        norm=Norm.rmsnorm,
        norm_eps=hf.get("rms_norm_eps", norm_eps),
        position=Position.rope,
        ffn=Ffn.swiglu if known[activation] is Activation.silu else Ffn.geglu,
        activation=known[activation],
        ffn_hidden=require_key(hf, "intermediate_size"),
        bias=False,
        tie_embeddings=hf.get("tie_word_embeddings", False),
        **read_rope(hf, rope_base),
    )


def read_rope(hf: dict[str, Any], base: float) -> dict[str, Any]:
    """Return the fields of ModelConfig about rotary embeddings, from the spelling of version 4 or 5."""
    rope = hf.get("rope_parameters") or hf.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))  # "type" is the older spelling
    if kind not in ("default", "linear", "llama3"):
        raise ConfigError(
            f"rope_type={kind} in a config.json of model_type={hf['model_type']}",
            "rope_type=default, linear or llama3, since there is no such part here",
            "another model to start from",
        )
    if rope.get("partial_rotary_factor", hf.get("partial_rotary_factor", 1.0)) != 1.0:
        raise unsupported_part_error(hf, "partial_rotary_factor", "rotary embeddings of whole heads")
    fields: dict[str, Any] = {"rope_base": float(rope.get("rope_theta") or hf.get("rope_theta") or base)}
    if kind != "default":
        fields |= {"rope_scaling": RopeScaling[kind], "rope_factor": float(rope["factor"])}
    if kind == "llama3":
        fields |= {field: rope[key] for field, key in LLAMA3.items()}
    return fields


def write_rope(config: ModelConfig) -> dict[str, Any]:
    """Return rotary embeddings as keys of config.json.

    NTK-aware scaling only changes the base, so the base is written. transformers' rope_type=dynamic is different: it
    depends on the length of the text.
    """
    base, scaling = config.rope_base, config.rope_scaling
    if scaling is RopeScaling.ntk:
        base *= config.rope_factor ** (config.head_dim / (config.head_dim - 2))
    if scaling in (RopeScaling.none, RopeScaling.ntk):
        return {"rope_theta": base, "rope_scaling": None}
    described: dict[str, Any] = {"rope_type": scaling.name, "factor": config.rope_factor}
    if scaling is RopeScaling.llama3:
        described |= {key: getattr(config, field) for field, key in LLAMA3.items()}
    return {"rope_theta": base, "rope_scaling": described}


def rules(config: ModelConfig) -> list[Rule]:
    """Return the rules of a model's tensors, in the order of the forward pass."""
    kinds = ("weight", "bias") if config.bias else ("weight",)
    found = [Rule(("token_embedding.weight",), ("model.embed_tokens.weight",))]
    for layer in range(config.n_layer):
        block, hf_block = f"blocks.{layer}", f"model.layers.{layer}"
        found += map_names(block, hf_block, NORMS, ("weight",)) + map_names(block, hf_block, ATTENTION | FFN, kinds)
    return found + last_rules(config)


def last_rules(config: ModelConfig) -> list[Rule]:
    """Return the rules of the tensors after the blocks: the last norm, and the head unless it is the embedding."""
    found = [Rule(("norm.weight",), ("model.norm.weight",))]
    return found if config.tie_embeddings else [*found, Rule(("head.weight",), ("lm_head.weight",))]


def map_names(block: str, hf_block: str, names: dict[str, str], kinds: tuple[str, ...]) -> list[Rule]:
    """Return rules for tensors of a block that differ only in their names. ``names`` maps names here to those of
    transformers."""
    return [
        Rule((f"{block}.{name}.{kind}",), (f"{hf_block}.{hf_name}.{kind}",))
        for name, hf_name in names.items()
        for kind in kinds
    ]


SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "ffn_hidden")
SHARED_NUMBERS = frozenset({*SIZES, *ROPE_FIELDS, *SCALING_FIELDS, "norm_eps", "tie_embeddings"})

LLAMA = StateDictAdapter(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    parts={
        "norm": (Norm.rmsnorm,),
        "position": (Position.rope,),
        "ffn": (Ffn.swiglu, Ffn.geglu),
        "activation": tuple(HIDDEN_ACT),
    },
    numbers=SHARED_NUMBERS | {"bias"},
    write_config=write_config,
    read_config=read_config,
    rules=rules,
    buffers=ROTARY_TABLE,
)
