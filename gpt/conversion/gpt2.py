"""GPT-2 as transformers stores it: matrices transposed, queries, keys and values in one. Torch-free.

Names and shapes as in GPT2LMHeadModel of transformers (models/gpt2/modeling_gpt2.py). Every layer has a bias there; a
model of ours without is written with biases of zeros, which compute the same.
"""

from __future__ import annotations

import re
from typing import Any

from gpt.config import Activation, Ffn, ModelConfig, Norm, Position
from gpt.conversion.spec import Format, Rule, refuse_part, required, spelled

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
    """The model's part of config.json."""
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
    """The model that a config.json describes."""
    plain = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False}
    for key, value in plain.items():
        if hf.get(key, value) is not value:
            raise refuse_part(hf, key, f"{key}={spelled(value)}")
    known = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | OTHER_NAMES
    activation = hf.get("activation_function", "gelu_new")
    if activation not in known:
        raise refuse_part(hf, "activation_function", f"one of {', '.join(known)}")
    return ModelConfig(
        name="gpt2",
        n_layer=required(hf, "n_layer"),
        n_head=required(hf, "n_head"),
        n_embd=required(hf, "n_embd"),
        block_size=required(hf, "n_positions"),
        vocab_size=required(hf, "vocab_size"),
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
    """All tensors of a model."""
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


def block_rules(ours: str, theirs: str) -> list[Rule]:
    """The tensors of one block."""
    q_k_v = [f"{ours}.attention.{name}" for name in ("query", "key", "value")]
    matrices = {"attention.output": "attn.c_proj", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}
    norms = {"attention_norm": "ln_1", "ffn_norm": "ln_2"}
    found = []
    for kind in KINDS:
        turned = kind == "weight"
        found.append(Rule(tuple(f"{name}.{kind}" for name in q_k_v), (f"{theirs}.attn.c_attn.{kind}",), turned))
        for here, there in matrices.items():
            found.append(Rule((f"{ours}.{here}.{kind}",), (f"{theirs}.{there}.{kind}",), turned))
        for here, there in norms.items():
            found.append(Rule((f"{ours}.{here}.{kind}",), (f"{theirs}.{there}.{kind}",)))
    return found


GPT2 = Format(
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
