"""Adapter of Mixtral in transformers: Llama's attention, and one tensor per matrix of an expert. Imports no torch.

Names as in the files that transformers writes for MixtralForCausalLM (w1 is the gate, w3 up, w2 down). Version 5 stacks
them in memory, but not on disk. Its router scales the weights of a token's experts to a sum of 1.
"""

from __future__ import annotations

from typing import Any

from gpt.config import Activation, ExpertBalance, Ffn, ModelConfig, Norm, Position
from gpt.conversion.adapter import Rule, StateDictAdapter, require_key, unsupported_part_error
from gpt.conversion.llama import (
    ATTENTION,
    NORMS,
    ROTARY_TABLE,
    SHARED_NUMBERS,
    last_rules,
    map_names,
    read_common,
    write_common,
)

EXPERT_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Return the model as keys of config.json."""
    experts = {"num_local_experts": config.n_expert, "num_experts_per_tok": config.n_expert_per_token}
    loss = {"router_aux_loss_coef": config.balance_weight, "output_router_logits": False}
    return write_common(config) | experts | loss | {"sliding_window": None}


def read_config(hf: dict[str, Any]) -> ModelConfig:
    """Return the model of a config.json. Raise ConfigError for a part that is not supported."""
    window = hf.get("sliding_window")
    # A window as long as the longest sequence excludes nothing.
    if window is not None and window < require_key(hf, "max_position_embeddings"):
        raise unsupported_part_error(hf, "sliding_window", "sliding_window=null")
    config = read_common(hf, rope_base=1e6, norm_eps=1e-5)
    config.expert_ffn, config.ffn = config.dense_ffn, Ffn.moe
    config.n_expert = require_key(hf, "num_local_experts")
    config.n_expert_per_token = require_key(hf, "num_experts_per_tok")
    config.router_normalize = True
    return config


def rules(config: ModelConfig) -> list[Rule]:
    """Return the rules of a model's tensors, in the order of the forward pass."""
    found = [Rule(("token_embedding.weight",), ("model.embed_tokens.weight",))]
    for layer in range(config.n_layer):
        block, hf_block = f"blocks.{layer}", f"model.layers.{layer}"
        found += map_names(block, hf_block, NORMS | ATTENTION, ("weight",))
        found += expert_rules(config.n_expert, f"{block}.ffn", f"{hf_block}.block_sparse_moe")
    return found + last_rules(config)


def expert_rules(experts: int, ffn: str, hf_ffn: str) -> list[Rule]:
    """Return the rules of the router and of the experts' matrices of one block."""
    found = [Rule((f"{ffn}.router.weight",), (f"{hf_ffn}.gate.weight",))]
    for name, hf_name in EXPERT_MATRICES.items():
        # Here, one tensor has the matrices of all experts, along its first dimension.
        each = tuple(f"{hf_ffn}.experts.{expert}.{hf_name}.weight" for expert in range(experts))
        found.append(Rule((f"{ffn}.experts.{name}",), each))
    return found


MIXTRAL = StateDictAdapter(
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
