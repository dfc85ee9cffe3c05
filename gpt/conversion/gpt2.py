"""Adapter of GPT-2 in transformers: transposed matrices; queries, keys and values in one. Imports no torch.

Names and shapes as in GPT2LMHeadModel of transformers (models/gpt2/modeling_gpt2.py). There, every layer has a bias. A
model without biases is written with biases of zeros, which compute the same.
"""

from __future__ import annotations

import re
from typing import Any

from gpt.config import Activation, Ffn, ModelConfig, Norm, Position
from gpt.conversion.adapter import Rule, StateDictAdapter, format_value, require_key, unsupported_part_error

ACTIVATIONS = {
    Activation.gelu_tanh: "gelu_new",
    Activation.gelu: "gelu",
    Activation.relu: "relu",
    Activation.silu: "silu",
    Activation.leaky_relu: "leaky_relu",
}
OTHER_NAMES = {"gelu_pytorch_tanh": Activation.gelu_tanh, "swish": Activation.silu}

KINDS = ("weight", "bias")


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the model as keys of config.json."""
    return {
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.ffn_width,
        "activation_function": ACTIVATIONS[config.ffn_activation],
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "tie_word_embeddings": config.tie_embeddings,
    }


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return the model of a config.json. Raise ConfigError for a part that is not supported."""
    # With other values of these keys, the same tensors compute something else.
    plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in plain.items():
        if hf.get(key, value) is not value:
            raise unsupported_part_error(hf, key, f"{key}={format_value(value)}")
    known = {hf_name: activation for activation, hf_name in ACTIVATIONS.items()} | OTHER_NAMES
    activation = hf.get("activation_function", "gelu_new")
    if activation not in known:
        raise unsupported_part_error(hf, "activation_function", f"one of {', '.join(known)}")
    return ModelConfig(
        name="gpt2",
        n_layer=require_key(hf, "n_layer"),
        n_head=require_key(hf, "n_head"),
        n_embd=require_key(hf, "n_embd"),
        block_size=require_key(hf, "n_positions"),
        vocab_size=require_key(hf, "vocab_size"),
        norm=Norm.layernorm,
        norm_eps=hf.get("layer_norm_epsilon", 1e-5),
        position=Position.learned,
        ffn=Ffn.standard,
        ffn_hidden=hf.get("n_inner"),
        activation=known[activation],
        bias=True,
        tie_embeddings=hf.get("tie_word_embeddings", True),
    )


def rules(config: ModelConfig) -> list[Rule]:
    """Return the rules of a model's tensors, in the order of the forward pass."""
    found = [
        Rule(("token_embedding.weight",), ("transformer.wte.weight",)),
        Rule(("position.weight",), ("transformer.wpe.weight",)),
    ]
    for layer in range(config.n_layer):
        found += block_rules(f"blocks.{layer}", f"transformer.h.{layer}")
    found += [Rule((f"norm.{kind}",), (f"transformer.ln_f.{kind}",)) for kind in KINDS]
    if not config.tie_embeddings:
        found.append(Rule(("head.weight",), ("lm_head.weight",)))
    return found


def block_rules(block: str, hf_block: str) -> list[Rule]:
    """Return the rules of one block's tensors. ``block`` and ``hf_block`` are the prefixes of its names here and in
    transformers."""
    q_k_v = [f"{block}.attention.{name}" for name in ("query", "key", "value")]
    matrices = {"attention.output": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}
    norms = {"attention_norm": "ln_1", "ffn_norm": "ln_2"}
    found = []
    for kind in KINDS:
        transposed = kind == "weight"  # GPT-2's Conv1D stores its matrix as (in, out)
        found.append(Rule(tuple(f"{name}.{kind}" for name in q_k_v), (f"{hf_block}.attn.c_attn.{kind}",), transposed))
        for name, hf_name in matrices.items():
            found.append(Rule((f"{block}.{name}.{kind}",), (f"{hf_block}.{hf_name}.{kind}",), transposed))
        for name, hf_name in norms.items():
            found.append(Rule((f"{block}.{name}.{kind}",), (f"{hf_block}.{hf_name}.{kind}",)))
    return found


GPT2 = StateDictAdapter(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    parts={
        "norm": (Norm.layernorm, Norm.layernorm_nobias),
        "position": (Position.learned,),
        "ffn": (Ffn.standard,),
        "activation": tuple(ACTIVATIONS),
    },
    numbers=frozenset(
        ["n_layer", "n_head", "n_embd", "block_size", "vocab_size", "norm_eps", "ffn_hidden", "bias", "tie_embeddings"]
    ),
    write_config=write_config,
    read_config=read_config,
    rules=rules,
    grouped_queries=False,
    requires_bias=True,
    # The causal mask, which old versions saved.
    buffers=re.compile(r"transformer\.h\.\d+\.attn\.(bias|masked_bias)"),
)
