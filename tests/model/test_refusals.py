"""Models that cannot be, refused in words, each with something to type that works."""

from __future__ import annotations

import pytest

from gpt.config import ModelConfig, rules
from launch.errors import ConfigError
from tests.support.composing import config_from

MOE = ["model.ffn=moe", "model.n_expert=4", "model.bias=false"]

REFUSED = [
    (["model.n_head=3"], "model.n_head=3 does not divide model.n_embd=128"),
    (["model.n_kv_head=3"], "model.n_kv_head=3 does not divide model.n_head=4"),
    (["model.n_head=128"], "heads 1 wide"),
    (["model.rope_factor=4"], "rope_factor=4 with model.rope_scaling=none"),
    (["model.position=learned", "model.rope_scaling=ntk", "model.rope_factor=2"], "with model.position=learned"),
    (["model.rope_scaling=linear", "model.rope_factor=0.5"], "model.rope_factor=0.5"),
    (["model.n_head=64", "model.rope_scaling=ntk", "model.rope_factor=2"], "one frequency"),
    (["model.rope_scaling=llama3", "model.rope_factor=8"], "without model.rope_original_block_size"),
    (
        [
            "model.rope_scaling=llama3",
            "model.rope_factor=8",
            "model.rope_original_block_size=64",
            "model.rope_low_freq_factor=4",
        ],
        "rope_low_freq_factor=4 and model.rope_high_freq_factor=4",
    ),
    (["model.force_flash=true"], "model.force_flash=true with model.attention=sdpa"),
    (["model.parallel_residual=true", "model.norm_position=post"], "parallel_residual=true with model.norm_position"),
    (["model.activation=relu"], "model.activation=relu with model.ffn=swiglu"),
    (["model.ffn=geglu", "model.activation=silu"], "model.activation=silu with model.ffn=geglu"),
    (["model.dropout=1.5"], "model.dropout=1.5"),
    (["model.vocab_multiple=0"], "model.vocab_multiple=0"),
    (["model.init_std=-1"], "model.init_std=-1"),
    (["model.n_expert=4"], "model.n_expert=4 with model.ffn=swiglu"),
    (["model.capacity_factor=1.0"], "model.capacity_factor=1.0 with model.ffn=swiglu"),
    (["model.ffn=moe"], "model.ffn=moe with model.n_expert=0"),
    ([*MOE, "model.bias=true"], "model.ffn=moe with model.bias=true"),
    ([*MOE, "model.n_expert_per_token=5"], "model.n_expert_per_token=5 of model.n_expert=4"),
    ([*MOE, "model.expert_ffn=moe"], "model.expert_ffn=moe"),
    ([*MOE, "model.expert_ffn=swiglu", "model.activation=gelu"], "model.activation=gelu with model.expert_ffn=swiglu"),
    ([*MOE, "model.n_expert_per_token=1", "model.router_normalize=true"], "router_normalize=true"),
    ([*MOE, "model.ffn_hidden=30"], "model.expert_matmul=grouped with model.n_embd=128 and experts 30 wide"),
    ([*MOE, "model.capacity_factor=0"], "model.capacity_factor=0"),
    ([*MOE, "model.expert_balance=none", "model.balance_coefficient=0.1"], "balance_coefficient=0.1"),
    ([*MOE, "model.z_coefficient=-1"], "model.z_coefficient=-1"),
    ([*MOE, "model.balance_bias_rate=0"], "model.balance_bias_rate=0"),
]


def model(words: list[str]) -> ModelConfig:
    config = config_from(words).model
    rules.check_model(config)
    return config


@pytest.mark.parametrize(("words", "found"), REFUSED, ids=lambda value: " ".join(value) if type(value) is list else "")
def test_refused_with_a_way_out(words: list[str], found: str) -> None:
    with pytest.raises(ConfigError) as refused:
        model(words)
    assert found in refused.value.found
    # Where there are alternatives, the first one.
    fix = [word for word in refused.value.fix.split(",")[0].split(" ") if "=" in word]
    keys = {word.split("=")[0] for word in fix}
    model([*(word for word in words if word.split("=")[0] not in keys), *fix])


def test_defaults_follow_from_other_choices() -> None:
    assert model(MOE).balance_weight == 0.01
    assert model([*MOE, "model.expert_balance=bias"]).balance_weight == 0
    assert model([*MOE, "model.expert_balance=bias", "model.balance_coefficient=0.0001"]).balance_weight == 0.0001
    assert model([*MOE, "model.n_expert_per_token=1"]).normalizes_experts is False
    assert model(MOE).normalizes_experts is True
    assert [model([f"model.ffn={ffn}"]).ffn_activation.name for ffn in ("standard", "swiglu", "geglu")] == [
        "gelu",
        "silu",
        "gelu",
    ]
