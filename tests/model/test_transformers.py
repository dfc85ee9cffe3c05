"""The same weights give the same logits in ``transformers``, which was written by other people."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from gpt.config import Activation, AttentionBackend, ExpertMatmul
from gpt.model.gpt import GPT
from tests.support.small_models import LLAMA, MOE, random_tokens, small

Weights = dict[str, Tensor]


def shaken(model: nn.Module) -> Weights:
    """Give ``model`` weights that leave no part without effect, gains and biases among them."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.2 + (parameter.dim() == 1))
    return model.eval().state_dict()


def transposed(tensor: Tensor) -> Tensor:
    """A matrix transposed, a vector as it is."""
    return tensor.mT if tensor.dim() == 2 else tensor


def from_gpt2(theirs: Weights, n_layer: int) -> Weights:
    """GPT-2's names; its matrices are stored transposed, and queries, keys and values as one."""
    ours = {"token_embedding.weight": theirs["transformer.wte.weight"]}
    ours["position.weight"] = theirs["transformer.wpe.weight"]
    for kind in ("weight", "bias"):
        ours[f"norm.{kind}"] = theirs[f"transformer.ln_f.{kind}"]
        for layer in range(n_layer):
            there, here = f"transformer.h.{layer}", f"blocks.{layer}"
            q_k_v = transposed(theirs[f"{there}.attn.c_attn.{kind}"]).chunk(3)
            for name, part in zip(("query", "key", "value"), q_k_v):
                ours[f"{here}.attention.{name}.{kind}"] = part
            ours[f"{here}.attention.output.{kind}"] = transposed(theirs[f"{there}.attn.c_proj.{kind}"])
            ours[f"{here}.ffn.up.{kind}"] = transposed(theirs[f"{there}.mlp.c_fc.{kind}"])
            ours[f"{here}.ffn.down.{kind}"] = transposed(theirs[f"{there}.mlp.c_proj.{kind}"])
            ours[f"{here}.attention_norm.{kind}"] = theirs[f"{there}.ln_1.{kind}"]
            ours[f"{here}.ffn_norm.{kind}"] = theirs[f"{there}.ln_2.{kind}"]
    return ours


def from_llama(theirs: Weights, n_layer: int, tied: bool) -> Weights:
    """Llama's names; the matrices are stored as ours are."""
    names = {
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "ffn.gate": "mlp.gate_proj",
        "ffn.up": "mlp.up_proj",
        "ffn.down": "mlp.down_proj",
        "attention_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    ours = {"token_embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    if not tied:
        ours["head.weight"] = theirs["lm_head.weight"]
    for layer in range(n_layer):
        for here, there in names.items():
            ours[f"blocks.{layer}.{here}.weight"] = theirs[f"model.layers.{layer}.{there}.weight"]
    return ours


def assert_equal_logits(ours: GPT, theirs: Any) -> None:
    tokens_BT = random_tokens(ours.config, 3)
    with torch.no_grad():
        expected = theirs(tokens_BT).logits
        assert expected.std() > 0.5
        torch.testing.assert_close(ours.eval()(tokens_BT), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", AttentionBackend)
def test_gpt2(backend: AttentionBackend) -> None:
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=12, n_embd=32, n_layer=2, n_head=4))
    ours = GPT(small(attention=backend, activation=Activation.gelu_tanh))
    ours.load_state_dict(from_gpt2(shaken(theirs), 2))
    assert_equal_logits(ours, theirs)


@pytest.mark.parametrize("backend", AttentionBackend)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_llama(backend: AttentionBackend, tied: bool, kv_heads: int) -> None:
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=40,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            max_position_embeddings=12,
            rms_norm_eps=1e-5,
            tie_word_embeddings=tied,
        )
    )
    parts = {**LLAMA, "tie_embeddings": tied}
    ours = GPT(small(**parts, attention=backend, n_kv_head=kv_heads, ffn_hidden=40))
    ours.load_state_dict(from_llama(shaken(theirs), 2, tied))
    assert_equal_logits(ours, theirs)


def from_mixtral(theirs: dict[str, Tensor], n_layer: int) -> dict[str, Tensor]:
    """Mixtral's names; gate and up of each expert are stored as one matrix."""
    ours = {"token_embedding.weight": theirs["model.embed_tokens.weight"], "norm.weight": theirs["model.norm.weight"]}
    ours["head.weight"] = theirs["lm_head.weight"]
    for layer in range(n_layer):
        there, here = f"model.layers.{layer}", f"blocks.{layer}"
        for name, other in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            ours[f"{here}.attention.{name}.weight"] = theirs[f"{there}.self_attn.{other}_proj.weight"]
        ours[f"{here}.attention_norm.weight"] = theirs[f"{there}.input_layernorm.weight"]
        ours[f"{here}.ffn_norm.weight"] = theirs[f"{there}.post_attention_layernorm.weight"]
        ours[f"{here}.ffn.router.weight"] = theirs[f"{there}.mlp.gate.weight"]
        gate, up = theirs[f"{there}.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        ours[f"{here}.ffn.experts.gate"], ours[f"{here}.ffn.experts.up"] = gate, up
        ours[f"{here}.ffn.experts.down"] = theirs[f"{there}.mlp.experts.down_proj"]
    return ours


@pytest.mark.parametrize("matmul", ExpertMatmul)
@pytest.mark.parametrize("chosen", [2, 3])
def test_mixtral(matmul: ExpertMatmul, chosen: int) -> None:
    theirs: nn.Module = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=chosen,
            max_position_embeddings=12,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
        )
    )
    parts = {**LLAMA, **MOE, "n_expert_per_token": chosen, "expert_matmul": matmul}
    ours = GPT(small(**parts, n_kv_head=2))
    ours.load_state_dict(from_mixtral(shaken(theirs), 2))
    assert_equal_logits(ours, theirs)
