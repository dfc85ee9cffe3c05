"""Mixtral as transformers stores it: Llama's attention, and experts one by one where ours are one tensor. Torch-free.

Names as in the files that transformers writes for MixtralForCausalLM (w1 is the gate, w3 up, w2 down); version 5 holds
them stacked in memory, but not on disk. Its router scales the weights of a token's experts to a sum of 1.
"""

from __future__ import annotations

from typing import Any

from gpt.config import Activation, ExpertBalance, Ffn, ModelConfig, Norm, Position
from gpt.conversion.llama import (
    ATTENTION,
    NORMS,
    ROTARY_TABLE,
    SHARED_NUMBERS,
    last_rules,
    read_common,
    same,
    write_common,
)
from gpt.conversion.spec import Format, Rule, refuse_part, required

EXPERT_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}


def write_config(config: ModelConfig) -> dict[str, Any]:
    """The model's part of config.json."""
    experts = {"num_local_experts": config.n_expert, "num_experts_per_tok": config.n_expert_per_token}
    loss = {"router_aux_loss_coef": config.balance_weight, "output_router_logits": False}
    return write_common(config) | experts | loss | {"sliding_window": None}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """The model that a config.json describes."""
    window = hf.get("sliding_window")
    if window is not None and window < required(hf, "max_position_embeddings"):
        raise refuse_part(hf, "sliding_window", "sliding_window=null")
    config = read_common(hf, rope_base=1e6, norm_eps=1e-5)
    config.expert_ffn, config.ffn = config.ffn, Ffn.moe
    config.n_expert = required(hf, "num_local_experts")
    config.n_expert_per_token = required(hf, "num_experts_per_tok")
    config.router_normalize = True
    return config


def rules(config: ModelConfig) -> list[Rule]:
    """All tensors of a model."""
    found = [Rule(("token_embedding.weight",), ("model.embed_tokens.weight",))]
    for layer in range(config.n_layer):
        here, there = f"blocks.{layer}", f"model.layers.{layer}"
        found += same(here, there, NORMS | ATTENTION, ("weight",))
        found += expert_rules(config.n_expert, f"{here}.ffn", f"{there}.block_sparse_moe")
    return found + last_rules(config)


def expert_rules(experts: int, ours: str, theirs: str) -> list[Rule]:
    """The router and the matrices of all experts of one block."""
    found = [Rule((f"{ours}.router.weight",), (f"{theirs}.gate.weight",))]
    for here, there in EXPERT_MATRICES.items():
        each = tuple(f"{theirs}.experts.{expert}.{there}.weight" for expert in range(experts))
        found.append(Rule((f"{ours}.experts.{here}",), each))
    return found


MIXTRAL = Format(
    name="mixtral",
    architecture="MixtralForCausalLM",
    prefix="model.",
    parts={
        "norm": (Norm.rmsnorm,),
        "position": (Position.rope,),
        "ffn": (Ffn.moe,),
        "expert_ffn": (Ffn.swiglu, Ffn.geglu),
        "activation": (Activation.silu, Activation.gelu, Activation.gelu_tanh),
        "router_normalize": (True,),
        "expert_balance": (ExpertBalance.loss,),
        "bias": (False,),
    },
    numbers=SHARED_NUMBERS | {"n_expert", "n_expert_per_token"},
    write_config=write_config,
    read_config=read_config,
    rules=rules,
    buffers=ROTARY_TABLE,
)
