"""With a cache, tokens that come in pieces get the logits they get at once."""

from __future__ import annotations

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gpt.config import Activation, ModelConfig, Position
from gpt.model.attention import Cache
from gpt.model.gpt import GPT
from tests.model.test_transformers import from_gpt2, shaken
from tests.support.small_models import label, random_tokens, small, variants


def lively(config: ModelConfig) -> GPT:
    """A model whose attention is far from uniform, so that a wrong position or mask shows."""
    torch.manual_seed(5)
    model = GPT(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.25 + (parameter.dim() == 1))
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("config", variants(), ids=label)
@pytest.mark.parametrize("cuts", [[5, 1, 1, 5], [1, 3, 8], [12]], ids=str)
def test_pieces_equal_the_whole(config: ModelConfig, cuts: list[int]) -> None:
    model, tokens_BT = lively(config), random_tokens(config, 3)
    cache = Cache(config.block_size)
    pieces = [model(piece, cache) for piece in tokens_BT.split(cuts, dim=1)]
    assert cache.length == config.block_size
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(tokens_BT), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_generation_is_that_of_transformers() -> None:
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=12, n_embd=32, n_layer=2, n_head=4))
    config = small(activation=Activation.gelu_tanh)
    ours = GPT(config).eval()
    ours.load_state_dict(from_gpt2(shaken(theirs), 2))
    prompt_BT = random_tokens(config, 4)[:, :3]
    cache, tokens_BT = Cache(12), prompt_BT
    new_BT = prompt_BT
    for _ in range(9):
        new_BT = ours(new_BT, cache)[:, -1:].argmax(-1)
        tokens_BT = torch.cat((tokens_BT, new_BT), dim=1)
    expected = theirs.generate(prompt_BT, do_sample=False, max_length=12, eos_token_id=None, pad_token_id=0)
    assert torch.equal(tokens_BT, expected)


@torch.no_grad()
def test_memory_is_taken_once_and_holds_the_key_value_heads_only() -> None:
    config = small(n_kv_head=2, position=Position.rope)
    model, cache = lively(config), Cache(config.block_size)
    tokens_BT = random_tokens(config, 3)
    model(tokens_BT[:, :4], cache)
    where = [cache.layer(i)._k_BKSC.data_ptr() for i in range(2)]
    assert cache.layer(0)._k_BKSC.shape == (3, 2, 12, 8)
    model(tokens_BT[:, 4:7], cache)
    assert [cache.layer(i)._k_BKSC.data_ptr() for i in range(2)] == where


@torch.no_grad()
def test_bf16_is_cached_as_bf16() -> None:
    config = small(position=Position.rope)
    model, cache = lively(config), Cache(config.block_size)
    with torch.autocast("cpu", torch.bfloat16):
        model(random_tokens(config, 1)[:, :4], cache)
    assert cache.layer(1)._k_BKSC.dtype is torch.bfloat16


@torch.no_grad()
def test_more_than_there_is_room_for_is_refused() -> None:
    config = small()
    model, tokens_BT = lively(config), random_tokens(config, 1)
    cache = Cache(config.block_size)
    model(tokens_BT, cache)
    with pytest.raises(AssertionError, match="13 tokens in a model of block_size=12"):
        model(tokens_BT[:, :1], cache)
    short = Cache(4)
    with pytest.raises(AssertionError, match="5 tokens in a cache for 4"):
        model(tokens_BT[:, :5], short)
    cache = Cache(12)
    model(tokens_BT[:, :2], cache)
    with pytest.raises(AssertionError, match="one batch"):
        model(tokens_BT[:, :2].expand(2, 2), cache)
