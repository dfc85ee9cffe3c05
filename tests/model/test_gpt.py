"""The model: its parts and its initial weights. tests/conversion compares it with transformers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from gpt.config import ExpertBalance, Ffn, ModelConfig, Position
from gpt.model.gpt import GPT, initialize
from tests.support.small_models import LLAMA, MOE, label, loss_of, random_tokens, small, variants

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
