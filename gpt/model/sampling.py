"""Drawing of tokens from a model's logits, one after another, with a cache of keys and values.

Shapes: B sequences, T tokens of each, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.model.attention import Cache
from gpt.model.gpt import GPT
from launch.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """Settings of the random choice of a token from the logits."""

    temperature: float = 1.0
    """Divisor of the logits. Below 1, likely tokens become likelier; 0 always picks the likeliest."""
    top_k: int | None = None
    """Number of the likeliest tokens to draw from; None for all."""
    top_p: float | None = None
    """Cumulative probability of the smallest set of likeliest tokens to draw from (nucleus, arXiv 1904.09751); None for
    all."""

    def validate(self) -> None:
        """Raise ConfigError if a number is out of its range."""
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ConfigError(f"--temperature {self.temperature}", "0 or above", "--temperature 1")
        if self.top_k is not None and self.top_k < 1:
            raise ConfigError(f"--top-k {self.top_k}", "1 or above", "--top-k 50")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}", "above 0, up to 1", "--top-p 0.9")


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Compute the probabilities to draw from, (B, V): apply temperature, then ``top_k``, then ``top_p``."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(1, keepdim=True), 1.0)
    logits_BV = logits_BV / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < logits_BV.size(1):
        least_B1 = logits_BV.topk(sampling.top_k, dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -math.inf)
    probabilities_BV = logits_BV.softmax(1)
    if sampling.top_p is not None and sampling.top_p < 1:
        sorted_BV, order_BV = probabilities_BV.sort(1, descending=True)
        # Keep a token if the tokens before it have too little probability, so the likeliest always stays.
        kept_BV = sorted_BV.cumsum(1) - sorted_BV < sampling.top_p
        probabilities_BV = torch.zeros_like(probabilities_BV).scatter_(1, order_BV, sorted_BV * kept_BV)
        probabilities_BV /= probabilities_BV.sum(1, keepdim=True)
    return probabilities_BV


def make_generators(seed: int, count: int) -> list[torch.Generator]:
    """Return a random generator for each sequence, so that no sequence depends on other sequences of the batch."""
    return [torch.Generator("cpu").manual_seed((seed * 1000 + i) % 2**63) for i in range(count)]


@torch.no_grad()
def generate_tokens(
    model: GPT,
    prompt_BT: Tensor,
    vocab_size: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token of each sequence, (B,) on the CPU, without end.

    The model gets at most ``block_size`` tokens, the last ones of a longer text. When this window is full, only its
    last half is kept. So the cache is refilled once per ``block_size / 2`` tokens, not for every token.

    Args:
        model: the model, in eval mode.
        prompt_BT: prompts of equal length, on the model's device.
        vocab_size: number of ids that may be drawn. An embedding may have more rows than the tokenizer has ids.
        sampling: settings of the random choice.
        generators: a generator for each sequence.
        use_cache: keep keys and values, instead of recomputing every token at each step.
    """
    size = model.config.block_size
    tokens_BT, start, read = prompt_BT, max(0, prompt_BT.size(1) - size), 0
    use_cache = use_cache and model.has_cache
    cache = Cache(size)
    while True:
        if tokens_BT.size(1) - start > size:
            start, cache = tokens_BT.size(1) - max(1, size // 2), Cache(size)
        read = start + cache.length if use_cache else start  # first token that the cache lacks
        logits_BTV = model(tokens_BT[:, read:], cache if use_cache else None)
        # Draw on the CPU, so that a seed gives the same tokens whatever the device of the model is.
        chances_BV = probabilities(logits_BTV[:, -1, :vocab_size].float(), sampling).cpu()
        next_B = torch.cat(
            [torch.multinomial(row, 1, generator=own) for row, own in zip(chances_BV, generators, strict=True)]
        )
        tokens_BT = torch.cat([tokens_BT, next_B[:, None].to(tokens_BT.device)], 1)
        yield next_B
