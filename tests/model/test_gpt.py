"""The model: its parts, its initial weights, and combinations of parts that are refused.

Tests in tests/conversion compare it with transformers."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GptOssConfig, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssAttention, GptOssRotaryEmbedding

from gpt.config import (
    Activation,
    AttentionBackend,
    ExpertBalance,
    Ffn,
    ModelConfig,
    Norm,
    NormPosition,
    Position,
    RopeScaling,
    rules,
)
from gpt.model.attention import Attention, LayerCache
from gpt.model.gpt import GPT, Block, initialize
from gpt.model.layers import Rope, build_norm, rotation_rates
from tests.support.composing import config_from
from tests.support.planning import refused
from tests.support.small_models import (
    LLAMA,
    MINIMAL,
    MOE,
    check_gradients,
    label,
    loss_of,
    random_tokens,
    small,
    variants,
)

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
    # Each layer with a window carries a change on by one token less than the window.
    spans = [config.window - 1 if config.is_local(layer) else config.block_size for layer in range(config.n_layer)]
    for t in (0, 5, config.block_size - 1):
        changed = tokens_BT.clone()
        changed[:, t] = (changed[:, t] + 1) % config.vocab_size
        difference_T = (model(changed) - logits_BTV).abs().amax((0, 2))
        assert torch.all(difference_T[:t] <= rounding)
        end = t + sum(spans) + 1
        assert torch.all(difference_T[t:end] > rounding), "every later position in reach sees the change"
        assert torch.all(difference_T[end:] <= rounding), "no position sees farther than its windows"


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


@pytest.mark.parametrize("parts", [{}, LLAMA, MOE], ids=["gpt2", "llama", "moe"])
def test_same_seed_same_bits_in_parameters_alone_and_the_config_is_left_as_it_is(parts: dict) -> None:
    config = small(**parts)
    before, tokens_BT = copy.deepcopy(config), random_tokens(config, 2)
    torch.manual_seed(1)
    first = built(config)
    torch.manual_seed(2)
    second = built(config)
    assert torch.equal(first(tokens_BT), second(tokens_BT))
    assert not torch.equal(first(tokens_BT), built(config, seed=SEED + 1)(tokens_BT))
    assert set(first.state_dict()) == {name for name, _ in first.named_parameters()}
    assert config == before


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
        loss_of(model, tokens_BT).backward()
    torch.testing.assert_close(padded(tokens_BT), plain(tokens_BT))
    for (name, mine), reference in zip(padded.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.grad[: len(reference)], reference.grad, msg=name)
        assert not mine.grad[len(reference) :].any(), name


def test_standard_deviations_are_those_of_gpt2() -> None:
    std = 0.02
    model = built(small(n_layer=8, n_embd=128, vocab_size=300, block_size=64))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
        else:
            into_residual = name.endswith(("attention.output.weight", "ffn.down.weight"))
            expected = std / math.sqrt(2 * 8) if into_residual else std
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(parameter.mean().item()) < 0.05 * expected, name


@pytest.mark.parametrize("parts", [{}, LLAMA], ids=["gpt2", "llama"])
def test_initial_loss_is_that_of_guessing(parts: dict) -> None:
    config = small(n_layer=4, n_embd=128, block_size=64, vocab_size=256, **parts)
    tokens_BT, targets_BT = random_tokens(config, 16), random_tokens(config, 16, seed=1)
    loss = loss_of(built(config), tokens_BT, targets_BT)
    assert loss.item() == pytest.approx(math.log(256), abs=0.1)


def test_a_batch_can_be_learned_by_heart() -> None:
    config = small(**LLAMA)
    model, tokens_BT = built(config), random_tokens(config, 4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = loss_of(model, tokens_BT[:, :-1], tokens_BT[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 3.5
    assert losses[-1] < 0.2


# Parts of the model, one by one, and combinations of parts that are refused.


MODELS = {
    "gpt2": {},
    "llama": LLAMA,
    "post": {
        **{"norm_position": NormPosition.post, "attention": AttentionBackend.flash, "activation": Activation.relu},
        **{"attention_sinks": True},
    },
    "latent": {**LLAMA, "kv_lora_rank": 3, "q_lora_rank": 2, "head_width": 5, "rope_head_width": 2},
    "parallel": {
        **LLAMA,
        **{"parallel_residual": True, "qk_norm": True, "ffn": Ffn.geglu, "n_kv_head": 1},
        **{"attention": AttentionBackend.manual, "norm": Norm.layernorm_nobias, "attention_sinks": True},
    },
}


@pytest.mark.parametrize("parts", MODELS.values(), ids=MODELS)
def test_gradient_of_the_whole_model(parts: dict) -> None:
    torch.manual_seed(1)
    check_gradients(GPT(small(**MINIMAL, **parts)), torch.tensor([[1, 4, 2]]))


def rope(positions: int, head_dim: int, base: float = 10000.0, **scaling: object) -> Rope:
    parts = {"n_head": 1, "n_embd": head_dim, "position": Position.rope}
    return Rope(small(**parts, block_size=positions, rope_base=base, **scaling))


def test_rope_is_a_rotation_of_complex_numbers() -> None:
    x_BTHC = torch.randn(2, 64, 3, 8)
    rates = torch.tensor([500.0 ** (-2 * pair / 8) for pair in range(4)], dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(64, dtype=torch.float64)[:, None] * rates)[:, None]
    expected = torch.complex(x_BTHC[..., :4].double(), x_BTHC[..., 4:].double()) * turn
    ours = rope(64, 8, base=500.0)(x_BTHC)
    torch.testing.assert_close(ours, torch.cat((expected.real, expected.imag), -1).float())
    assert rope(64, 8)(x_BTHC.bfloat16()).dtype is torch.bfloat16


def test_rope_scaling_is_that_of_transformers() -> None:
    theirs = LlamaConfig(hidden_size=64, num_attention_heads=1, max_position_embeddings=1000, rope_theta=5e5)
    theirs.rope_parameters = {"rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    theirs.rope_parameters["original_max_position_embeddings"] = 1000
    ours = {"base": 5e5, "rope_factor": 8.0}
    # Their dynamic NTK grows with the sequence; at 15 times the length it is ours by 8 x that factor's definition:
    # factor * length / original - (factor - 1) = 8 with factor 8 at length 15/8 of the original.
    cases = {
        RopeScaling.linear: ("linear", {}),
        RopeScaling.llama3: ("llama3", {}),
        RopeScaling.ntk: ("dynamic", {"seq_len": 1875}),
        RopeScaling.yarn: ("yarn", {}),
    }
    for scaling, (kind, words) in cases.items():
        theirs.rope_parameters["rope_type"] = kind
        expected, stretch = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"), **words)
        more = {"rope_original_block_size": 1000} if scaling in (RopeScaling.llama3, RopeScaling.yarn) else {}
        table = rope(8, 64, rope_scaling=scaling, **ours, **more)
        torch.testing.assert_close(rotation_rates(table.config).float(), expected)
        torch.testing.assert_close(table.cos[0], torch.full((32,), stretch))


@pytest.mark.parametrize("backend", AttentionBackend)
@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_against_a_loop(
    kv_heads: int, sinks: bool, window: int | None, documents: bool, backend: AttentionBackend
) -> None:
    torch.manual_seed(0)
    parts = {"window": window, "n_kv_head": kv_heads, "head_width": 6, "attention_sinks": sinks}
    attention = Attention(small(attention=backend, **parts))
    sink_H = torch.randn(4) if sinks else torch.full((4,), -math.inf)
    if attention.sinks is not None:
        attention.sinks.weight.data = sink_H
    q, k, v = torch.randn(2, 4, 11, 6), *torch.randn(2, 2, kv_heads, 11, 6)
    first = 5 if documents else 0  # of the second document
    hidden_TT = torch.ones(11, 11, dtype=torch.bool).triu(1)
    hidden_TT[first:, :first] = True
    bias = torch.zeros(2, 1, 11, 11).masked_fill(hidden_TT, -math.inf) if documents else None
    y = attention.attend(q, k, v, bias)
    for t in range(11):
        start = max(0, t + 1 - (window or 11), first if t >= first else 0)
        for head in range(4):
            keys, values = (x[:, head * kv_heads // 4, start : t + 1] for x in (k, v))
            scores = F.pad(keys @ q[:, head, t, :, None] / math.sqrt(6), (0, 0, 1, 0), value=sink_H[head].item())
            torch.testing.assert_close(y[:, head, t], (scores.softmax(1)[:, 1:] * values).sum(1))


@pytest.mark.parametrize("backend", AttentionBackend)
@pytest.mark.parametrize("window", [None, 5])
def test_sinks_are_those_of_gpt_oss(window: int | None, backend: AttentionBackend) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 33, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 10}
    rotary = {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "max_position_embeddings": 17}
    config = GptOssConfig(**sizes, **rotary, sliding_window=5, attn_implementation="eager")
    theirs = GptOssAttention(config, layer_idx=1 if window is None else 0)
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.3)
    shape = {"n_embd": 33, "n_head": 6, "n_kv_head": 2, "head_width": 10, "block_size": 17, "bias": True}
    parts = {"rope_base": 500.0, "window": window, "attention": backend, "attention_sinks": True}
    ours = Attention(small(**{**LLAMA, **shape, **parts}))
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "output": "o_proj"}
    for mine, other in names.items():
        ours.get_submodule(mine).load_state_dict(theirs.get_submodule(other).state_dict())
    ours.sinks.load_state_dict({"weight": theirs.sinks})
    x_BTD, position_T = torch.randn(2, 17, 33), torch.arange(17)
    distance_TT = position_T[:, None] - position_T
    mask_TT = torch.zeros(17, 17).masked_fill((distance_TT < 0) | (distance_TT >= (window or 17)), -math.inf)
    expected, _ = theirs(x_BTD, GptOssRotaryEmbedding(config)(x_BTD, position_T[None]), mask_TT)
    found, cache = ours(x_BTD), LayerCache(17)
    continued = torch.cat([ours(x, cache) for x in (x_BTD[:, :4], x_BTD[:, 4:9], *x_BTD[:, 9:].split(1, 1))], 1)
    for module, result in ((ours, found), (theirs, expected)):
        module.zero_grad()
        result.sin().sum().backward()
    pairs = [(found, expected), (continued, expected), (ours.sinks.weight.grad, theirs.sinks.grad)]
    for mine, other in names.items():
        own = ours.get_submodule(mine).named_parameters()
        pairs += [(p.grad, theirs.get_submodule(other).get_parameter(name).grad) for name, p in own]
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=0, atol=5e-6 * other.abs().max().item())


@pytest.mark.parametrize("backend", AttentionBackend)
def test_attention_dropout_acts_in_training_only(backend: AttentionBackend) -> None:
    attention = Attention(small(attention=backend, dropout=0.5))
    x_BTD = torch.randn(2, 12, 32)
    assert not torch.equal(attention(x_BTD), attention(x_BTD))
    attention.eval()
    assert torch.equal(attention(x_BTD), attention(x_BTD))


def test_norms_against_their_formulas() -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 32, dtype=torch.float64) * 3 + 1
    gain, shift = torch.randn(2, 32, dtype=torch.float64)
    centred = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    expected = {
        Norm.layernorm: centred * gain + shift,
        Norm.layernorm_nobias: centred * gain,
        Norm.rmsnorm: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain,
    }
    for norm, value in expected.items():
        layer = build_norm(small(norm=norm)).double()
        layer.load_state_dict({"weight": gain, "bias": shift} if norm is Norm.layernorm else {"weight": gain})
        torch.testing.assert_close(layer(x), value)


def test_blocks_against_their_formulas() -> None:
    torch.manual_seed(0)
    x_BTD = torch.randn(2, 12, 32)
    before, after, both = (
        Block(small(**parts)).eval()
        for parts in ({}, {"norm_position": NormPosition.post}, {"parallel_residual": True})
    )
    for block in (before, after, both):
        block.load_state_dict(before.state_dict())
    a, f = before.attention, before.ffn
    n1, n2 = before.attention_norm, before.ffn_norm
    middle = x_BTD + a(n1(x_BTD))
    torch.testing.assert_close(before(x_BTD), middle + f(n2(middle)))
    middle = n1(x_BTD + a(x_BTD))
    torch.testing.assert_close(after(x_BTD), n2(middle + f(middle)))
    torch.testing.assert_close(both(x_BTD), x_BTD + a(n1(x_BTD)) + f(n2(x_BTD)))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_normalized_queries_and_keys_do_not_feel_the_size_of_their_matrices(kv_heads: int) -> None:
    torch.manual_seed(0)
    attention = Attention(small(**LLAMA, n_kv_head=kv_heads, qk_norm=True))
    x_BTD = torch.randn(2, 12, 32)
    y_BTD = attention(x_BTD)
    with torch.no_grad():
        attention.query.weight.mul_(3)
        attention.key.weight.mul_(0.5)
    torch.testing.assert_close(attention(x_BTD), y_BTD, rtol=1e-3, atol=1e-4)
    assert attention.query_norm.weight.shape == (8,), "one gain for all heads"


# Models that cannot be, refused in words, each with something to type that works.


LATENT = ["model.kv_lora_rank=8", "model.rope_head_width=4"]
MOE_WORDS = ["model.ffn=moe", "model.n_expert=4", "model.bias=false"]

REFUSED = [
    (["model.n_head=3"], "model.n_head=3 does not divide model.n_embd=128"),
    (["model.n_kv_head=3"], "model.n_kv_head=3 does not divide model.n_head=4"),
    (["model.n_head=128"], "heads 1 wide"),
    (["model.rope_factor=4"], "rope_factor=4 with model.rope_scaling=none"),
    (["model.position=learned", "model.rope_scaling=ntk", "model.rope_factor=2"], "with model.position=learned"),
    (["model.rope_scaling=linear", "model.rope_factor=0.5"], "model.rope_factor=0.5"),
    (["model.n_head=64", "model.rope_scaling=ntk", "model.rope_factor=2"], "one frequency"),
    (["model.rope_scaling=llama3", "model.rope_factor=8"], "without model.rope_original_block_size"),
    (["model.parallel_residual=true", "model.norm_position=post"], "parallel_residual=true with model.norm_position"),
    (["model.parallel_residual=true", "model.norm_position=both"], "parallel_residual=true with model.norm_position"),
    (["model.rope_scaling=yarn", "model.rope_factor=8"], "yarn without model.rope_original_block_size"),
    (["model.window=0"], "model.window=0"),
    (["model.global_every=6"], "model.global_every=6 without model.window"),
    (["model.window=8", "model.global_every=1"], "model.global_every=1"),
    (["model.rope_base_local=100"], "model.rope_base_local=100 without model.window"),
    (["model.window=8", "model.rope_base_local=100", "model.position=learned"], "with other positions"),
    (["model.window=8", "model.attention=a.b:C"], "model.window=8 with model.attention=a.b:C"),
    (["model.rope_head_width=8"], "model.rope_head_width=8 with model.kv_lora_rank=null"),
    (["model.q_lora_rank=8"], "model.q_lora_rank=8 with model.kv_lora_rank=null"),
    (["model.kv_lora_rank=8"], "model.rope_head_width=null with model.kv_lora_rank=8"),
    ([*LATENT, "model.rope_head_width=32"], "model.rope_head_width=32 with model.kv_lora_rank=8"),
    ([*LATENT, "model.n_kv_head=2"], "model.n_kv_head=2 with model.kv_lora_rank=8"),
    ([*LATENT, "model.qk_norm=true"], "model.qk_norm=True with model.kv_lora_rank=8"),
    ([*LATENT, "model.norm=a.b:C"], "model.norm=a.b:C with model.kv_lora_rank=8"),
    (["model.attention_sinks=true", "model.attention=a.b:C"], "model.attention_sinks=true with model.attention=a.b:C"),
    (["model.attention_softcap=50"], "model.attention_softcap=50 with model.attention=sdpa"),
    (["model.logit_softcap=-1"], "model.logit_softcap=-1"),
    (["model.head_width=5"], "heads 5 wide"),
    (["model.activation=relu"], "model.activation=relu with model.ffn=swiglu"),
    (["model.ffn=geglu", "model.activation=silu"], "model.activation=silu with model.ffn=geglu"),
    (["model.dropout=1.5"], "model.dropout=1.5"),
    (["model.vocab_multiple=0"], "model.vocab_multiple=0"),
    (["model.n_expert=4"], "model.n_expert=4 with model.ffn=swiglu"),
    (["model.capacity_factor=1.0"], "model.capacity_factor=1.0 with model.ffn=swiglu"),
    (["model.ffn=moe"], "model.ffn=moe with model.n_expert=0"),
    ([*MOE_WORDS, "model.bias=true"], "model.ffn=moe with model.bias=true"),
    ([*MOE_WORDS, "model.n_expert_per_token=5"], "model.n_expert_per_token=5 of model.n_expert=4"),
    ([*MOE_WORDS, "model.expert_ffn=moe"], "model.expert_ffn=moe"),
    (
        [*MOE_WORDS, "model.expert_ffn=swiglu", "model.activation=gelu"],
        "model.activation=gelu with model.expert_ffn=swiglu",
    ),
    ([*MOE_WORDS, "model.n_expert_per_token=1", "model.router_normalize=true"], "router_normalize=true"),
    ([*MOE_WORDS, "model.ffn_hidden=30"], "model.expert_matmul=grouped with model.n_embd=128 and experts 30 wide"),
    ([*MOE_WORDS, "model.capacity_factor=0"], "model.capacity_factor=0"),
    ([*MOE_WORDS, "model.expert_balance=none", "model.balance_coefficient=0.1"], "balance_coefficient=0.1"),
    ([*MOE_WORDS, "model.z_coefficient=-1"], "model.z_coefficient=-1"),
    ([*MOE_WORDS, "model.balance_bias_rate=0"], "model.balance_bias_rate=0"),
]


def model(words: list[str]) -> ModelConfig:
    config = config_from(words).model
    rules.check_model(config)
    return config


@pytest.mark.parametrize(("words", "found"), REFUSED, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_refused_with_a_way_out(words: list[str], found: str) -> None:
    told = refused(model, words, found=found).fix
    # Where there are alternatives, the first one.
    fix = [word for word in told.split(",")[0].split(" ") if "=" in word]
    keys = {word.split("=")[0] for word in fix}
    model([*(word for word in words if word.split("=")[0] not in keys), *fix])


def test_defaults_follow_from_other_choices() -> None:
    assert model(MOE_WORDS).balance_weight == 0.01
    assert model([*MOE_WORDS, "model.expert_balance=bias"]).balance_weight == 0
    assert model([*MOE_WORDS, "model.expert_balance=bias", "model.balance_coefficient=0.0001"]).balance_weight == 0.0001
    assert model([*MOE_WORDS, "model.n_expert_per_token=1"]).normalizes_experts is False
    assert model(MOE_WORDS).normalizes_experts is True
    assert [model([f"model.ffn={ffn}"]).ffn_activation.name for ffn in ("standard", "swiglu", "geglu")] == [
        "gelu",
        "silu",
        "gelu",
    ]
