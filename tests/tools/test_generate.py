"""Generation: sampling against transformers, the cache against none, and the command as it is typed."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from gpt.data.tokenizers import ByteTokenizer
from gpt.generate import Sampling, Text, generate_tokens, make_generators, probabilities
from gpt.model.gpt import GPT
from tests.model.test_functions import lively
from tests.support.commands import run
from tests.support.small_models import LLAMA, random_tokens, small


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    temperature=st.floats(0.1, 5),
    top_k=st.none() | st.integers(1, 20),
    top_p=st.none() | st.floats(0.05, 0.95),
)
def test_sampling_is_that_of_transformers(
    seed: int, temperature: float, top_k: int | None, top_p: float | None
) -> None:
    logits_BV = torch.randn(3, 15, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected_BV = TemperatureLogitsWarper(temperature)(None, logits_BV)
    if top_k is not None:
        expected_BV = TopKLogitsWarper(top_k)(None, expected_BV)
    if top_p is not None:
        expected_BV = TopPLogitsWarper(top_p)(None, expected_BV)
    torch.testing.assert_close(probabilities(logits_BV, Sampling(temperature, top_k, top_p)), expected_BV.softmax(1))


def written(model: GPT, prompt_BT: torch.Tensor, tokens: int, seed: int, use_cache: bool) -> torch.Tensor:
    generators = make_generators(seed, len(prompt_BT))
    return torch.stack(
        list(islice(generate_tokens(model, prompt_BT, 50, Sampling(0.8), generators, use_cache), tokens)), 1
    )


@pytest.mark.parametrize("prompt", [1, 12, 30], ids=lambda n: f"prompt of {n}")
@pytest.mark.parametrize("parts", [{}, LLAMA], ids=["gpt2", "llama"])
def test_the_cache_changes_nothing_also_where_the_window_slides(parts: dict, prompt: int) -> None:
    model = lively(small(**parts))
    prompt_BT = random_tokens(small(block_size=prompt), 2)
    with_cache = written(model, prompt_BT, 30, seed=5, use_cache=True)
    assert torch.equal(with_cache, written(model, prompt_BT, 30, seed=5, use_cache=False))
    assert not torch.equal(with_cache, written(model, prompt_BT, 30, seed=6, use_cache=True))
    alone = written(model, prompt_BT[:1], 30, seed=5, use_cache=True)
    assert torch.equal(alone, with_cache[:1]), "what is drawn does not depend on the batch"


@torch.no_grad()
def test_greedy_takes_the_likeliest_of_the_last_block() -> None:
    model = lively(small(vocab_size=60))
    prompt_BT = random_tokens(small(block_size=30), 2)
    first = next(generate_tokens(model, prompt_BT, 50, Sampling(0), make_generators(0, 2)))
    assert torch.equal(first, model(prompt_BT[:, -12:])[:, -1, :50].argmax(1)), "ids above the tokenizer's never come"


@given(st.text(max_size=20), st.binary(max_size=4))
def test_a_stream_adds_up_to_the_text(text: str, tail: bytes) -> None:
    shown: list[str] = []
    stream = Text(ByteTokenizer(), shown.append)
    content = text.encode(errors="replace") + tail
    for byte in content:
        stream.add(byte)
    stream.close()
    assert "".join(shown) == content.decode(errors="replace")


def test_the_command_writes_and_refuses(trained: Path) -> None:
    def texts(*words: str, status: int = 0) -> str:
        return run(f"gpt.generate {trained} --max-new-tokens 40", *words, cwd=trained, status=status)

    printed = texts("-p", "import os", "-p", "def", "-p", "for i in", "--seed", "3")
    assert "--- 1\nimport os" in printed and "--- 2\ndef" in printed and "120 tokens in" in printed
    first = printed.split("--- 2")[0].partition("--- 1\n")[2]
    assert first in texts("-p", "import os", "--seed", "3"), "as the tokens come, and the same"
    assert "an empty prompt" in texts("-p", "", status=2)
