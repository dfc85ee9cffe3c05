"""Small models of every kind, for the tests of the model and of its accounting."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import strategies as st

from gpt.config import Activation, AttentionBackend, Ffn, ModelConfig, Norm, Position

LLAMA: dict[str, Any] = {
    "norm": Norm.rmsnorm,
    "position": Position.rope,
    "ffn": Ffn.swiglu,
    "bias": False,
    "tie_embeddings": False,
}


def small(**overrides: Any) -> ModelConfig:
    """A model of a few thousand parameters: GPT-2's parts, unless overridden."""
    values = {"name": "small", "n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 12, "vocab_size": 50}
    config = ModelConfig(**{**values, **overrides})
    config.validate()
    return config


def variants() -> list[ModelConfig]:
    """Every norm with every position, ffn and attention, with and without bias and tying, in turn grouped and not."""
    parts = itertools.product(Norm, Position, Ffn, AttentionBackend)
    return [
        small(
            norm=norm,
            position=position,
            ffn=ffn,
            attention=attention,
            n_kv_head=(None, 2, 1)[i % 3],
            bias=i % 2 == 0,
            tie_embeddings=i % 4 < 2,
            activation=list(Activation)[i % len(Activation)],
        )
        for i, (norm, position, ffn, attention) in enumerate(parts)
    ]


def label(config: ModelConfig) -> str:
    """What sets a variant apart, for the test's name."""
    parts = (config.norm.name, config.position.name, config.ffn.name, config.attention.name, f"kv{config.kv_heads}")
    return "-".join(parts)


def random_tokens(config: ModelConfig, sequences: int, seed: int = 0) -> torch.Tensor:
    """(sequences, block_size) token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (sequences, config.block_size), generator=generator)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    """Any valid model that is small enough to be built."""
    kv_heads = draw(st.integers(1, 3))
    heads = kv_heads * draw(st.integers(1, 3))
    ffn_hidden = draw(st.none() | st.integers(1, 40))
    config = ModelConfig(
        name="drawn",
        n_layer=draw(st.integers(1, 3)),
        n_head=heads,
        n_kv_head=kv_heads,
        n_embd=heads * 2 * draw(st.integers(1, 6)),
        block_size=draw(st.integers(1, 20)),
        vocab_size=draw(st.integers(1, 70)),
        norm=draw(st.sampled_from(Norm)),
        position=draw(st.sampled_from(Position)),
        ffn=draw(st.sampled_from(Ffn)),
        ffn_hidden=ffn_hidden,
        activation=draw(st.sampled_from(Activation)),
        attention=draw(st.sampled_from(AttentionBackend)),
        bias=draw(st.booleans()),
        tie_embeddings=draw(st.booleans()),
    )
    config.validate()
    return config
