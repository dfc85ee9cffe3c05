"""The model: its parts, its initial weights, and the models of transformers with the same weights."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

from gpt.config import Activation, AttentionBackend, ExpertBalance, ExpertMatmul, Ffn, ModelConfig, Position
from gpt.model.gpt import GPT, initialize
from tests.support.small_models import LLAMA, MOE, label, random_tokens, small, variants

SEED = 7


def built(config: ModelConfig, seed: int = SEED) -> GPT:
    model = GPT(config)
    initialize(model, seed)
    return model


@pytest.mark.parametrize("config", variants(), ids=label)
def test_shape_and_causality(config: ModelConfig) -> None:
    model, tokens_BT = built(config), random_tokens(config, 3)
    for parameter in model.parameters():
        parameter.data.mul_(5)  # away from the start, where attention is almost uniform
    logits_BTV = model(tokens_BT)
    assert logits_BTV.shape == (3, config.block_size, config.vocab_size)
    # How many rows an expert gets changes with a later token, and with it how threads cut its product: the last bits.
    rounding = 1e-5 * float(logits_BTV.abs().max()) if config.ffn is Ffn.moe else 0.0
    for t in (0, 5, config.block_size - 1):
        changed = tokens_BT.clone()
        changed[:, t] = (changed[:, t] + 1) % config.vocab_size
        difference_T = (model(changed) - logits_BTV).abs().amax((0, 2))
        assert torch.all(difference_T[:t] <= rounding)
        assert torch.all(difference_T[t:] > rounding), "every later position sees the change"


@pytest.mark.parametrize("position", Position)
def test_a_prefix_gives_the_same_logits(position: Position) -> None:
    config = small(position=position)
    model, tokens_BT = built(config), random_tokens(config, 2)
    torch.testing.assert_close(model(tokens_BT[:, :5]), model(tokens_BT)[:, :5])


@pytest.mark.parametrize("position", Position)
def test_order_of_the_past_matters_with_positions_only(position: Position) -> None:
    # One layer: without positions its last token sees a set. Deeper models learn the order from the causal mask.
    config = small(n_layer=1, position=position)
    model, tokens_BT = built(config), random_tokens(config, 1)
    for parameter in model.parameters():
        parameter.data.mul_(10)
    swapped = tokens_BT.clone()
    swapped[0, [2, 6]] = tokens_BT[0, [6, 2]]
    assert tokens_BT[0, 2] != tokens_BT[0, 6]
    difference = (model(tokens_BT)[0, -1] - model(swapped)[0, -1]).abs().max().item()
    assert difference < 1e-3 if position is Position.none else difference > 1


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(AssertionError, match="13 tokens in a model of block_size=12"):
        built(small())(torch.zeros(1, 13, dtype=torch.long))


def test_the_config_is_left_alone() -> None:
    config = small(**LLAMA, n_kv_head=2)
    before = copy.deepcopy(config)
    built(config)(random_tokens(config, 1))
    assert config == before


@pytest.mark.parametrize("parts", [{}, LLAMA, MOE], ids=["gpt2", "llama", "moe"])
def test_same_seed_same_bits(parts: dict) -> None:
    config = small(**parts)
    tokens_BT = random_tokens(config, 2)
    torch.manual_seed(1)
    first = built(config)
    torch.manual_seed(2)
    second = built(config)
    assert torch.equal(first(tokens_BT), second(tokens_BT))
    assert not torch.equal(first(tokens_BT), built(config, seed=SEED + 1)(tokens_BT))


def test_dropout_follows_the_generator_and_stops_in_evaluation() -> None:
    config = small(dropout=0.3)
    model, tokens_BT = built(config), random_tokens(config, 2)
    plain = built(small())(tokens_BT)
    outputs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outputs.append(model(tokens_BT))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    assert torch.equal(model.eval()(tokens_BT), plain)


@pytest.mark.parametrize(
    "parts",
    [{}, {"tie_embeddings": False}, LLAMA, {**MOE, "expert_balance": ExpertBalance.bias}],
    ids=["gpt2", "untied", "llama", "moe"],
)
def test_meta_construction_then_to_empty(parts: dict) -> None:
    config = small(**parts)
    plain, tokens_BT = built(config), random_tokens(config, 2)
    with torch.device("meta"):
        model = GPT(config)
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))
    for restore in ("initialize", "load"):
        model.to_empty(device="cpu")
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.fill_(math.nan)
        if restore == "initialize":
            initialize(model, SEED)
        else:
            model.load_state_dict(plain.state_dict())
            model.reset_buffers()
        assert torch.equal(model(tokens_BT), plain(tokens_BT))
        model.to("meta")


def test_a_checkpoint_holds_parameters_only() -> None:
    for parts in ({}, LLAMA, MOE):
        model = GPT(small(**parts))
        assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def test_a_value_depends_on_seed_and_name_only() -> None:
    shallow, deep = built(small(n_layer=1)), built(small(n_layer=3, **{**LLAMA, "bias": True}))
    for name in ("token_embedding.weight", "blocks.0.attention.query.weight"):
        assert torch.equal(shallow.get_parameter(name), deep.get_parameter(name))
    layers = [deep.get_parameter(f"blocks.{layer}.attention.query.weight") for layer in range(3)]
    assert not torch.equal(layers[0], layers[1])
    assert not torch.equal(layers[1], layers[2])


@pytest.mark.parametrize("tied", [True, False])
def test_rows_that_fill_up_the_vocabulary_take_no_part(tied: bool) -> None:
    plain = built(small(tie_embeddings=tied))
    padded = built(small(tie_embeddings=tied, vocab_multiple=64))
    assert padded.token_embedding.weight.shape == (64, 32)
    tokens_BT = random_tokens(plain.config, 2)
    for model in (plain, padded):
        F.cross_entropy(model(tokens_BT).flatten(0, 1), tokens_BT.flatten()).backward()
    torch.testing.assert_close(padded(tokens_BT), plain(tokens_BT))
    for (name, mine), reference in zip(padded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad[: len(reference)], reference.grad, msg=name)
        assert not mine.grad[len(reference) :].any(), name


def test_initial_values_follow_their_keys() -> None:
    chosen = {"init_std": 0.01, "embedding_init_std": 1.0, "residual_init_scaled": False}
    model = built(small(n_layer=1, n_embd=128, vocab_size=300, **chosen))
    assert model.token_embedding.weight.std().item() == pytest.approx(1.0, rel=0.05)
    for name in ("attention.query", "attention.output", "ffn.down"):
        assert model.get_parameter(f"blocks.0.{name}.weight").std().item() == pytest.approx(0.01, rel=0.05), name


def test_standard_deviations_are_those_of_gpt2() -> None:
    model = built(small(n_layer=8, n_embd=128, vocab_size=300, block_size=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
        else:
            into_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
            expected = 0.02 / math.sqrt(2 * 8) if into_residual else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


@pytest.mark.parametrize("parts", [{}, LLAMA], ids=["gpt2", "llama"])
def test_initial_loss_is_that_of_guessing(parts: dict) -> None:
    config = small(n_layer=4, n_embd=128, block_size=64, vocab_size=256, **parts)
    tokens_BT, targets_BT = random_tokens(config, 16), random_tokens(config, 16, seed=1)
    loss = F.cross_entropy(built(config)(tokens_BT).flatten(0, 1), targets_BT.flatten())
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_a_batch_can_be_learned_by_heart() -> None:
    config = small(**LLAMA)
    model, tokens_BT = built(config), random_tokens(config, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = F.cross_entropy(model(tokens_BT[:, :-1]).flatten(0, 1), tokens_BT[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.2


# The same weights give the same logits in ``transformers``, which was written by other people.


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
