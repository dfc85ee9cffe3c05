"""Results that are kept by the values of a model's config: computed once for equal ones, anew for others."""

from __future__ import annotations

from dataclasses import replace

from gpt.accounting import forward_flops
from gpt.config import ModelConfig
from gpt.config.rules import cached_by_model

MODEL = ModelConfig(name="m", n_layer=2, n_head=2, n_embd=64, block_size=32, vocab_size=128)


def test_equal_configs_share_a_result_and_a_changed_one_has_its_own() -> None:
    asked: list[tuple[int, int]] = []

    @cached_by_model
    def width(model: ModelConfig, times: int) -> int:
        asked.append((model.n_embd, times))
        return model.n_embd * times

    other = replace(MODEL)
    assert [width(MODEL, 2), width(other, 2), width(MODEL, times=2)] == [128, 128, 128]
    assert asked == [(64, 2)] * 2, "once for each way to call it"
    other.n_embd = 32  # configs can be changed
    assert [width(other, 2), width(MODEL, 3), width(MODEL, 2)] == [64, 192, 128]
    other.options = {"ffn": {"a": [1]}}
    assert width(other, 2) == 64 and len(asked) == 5


def test_flops_of_a_changed_config_are_not_those_of_before() -> None:
    model = replace(MODEL)
    before = forward_flops(model, 1)
    model.n_layer *= 2
    assert forward_flops(model, 1).ffn == 2 * before.ffn and forward_flops(MODEL, 1) == before
