"""Each component by itself: its gradient against finite differences, and its own promises."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck
from torch.func import functional_call

from gpt.config import Activation, AttentionBackend, Ffn, Norm
from gpt.model.attention import Attention, manual_attention, sdpa_attention
from gpt.model.block import Block
from gpt.model.ffn import build_ffn
from gpt.model.gpt import GPT
from gpt.model.norm import build_norm
from gpt.model.position import LearnedPosition, Rope
from tests.model.small import LLAMA, small

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 8, "block_size": 4, "vocab_size": 5, "ffn_hidden": 6}


def components() -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    for norm in Norm:
        for bias in (True, False):
            made[f"{norm.name}-bias={bias}"] = build_norm(small(**TINY, norm=norm, bias=bias))
    for backend in AttentionBackend:
        for kv_heads in (2, 1):
            made[f"attention-{backend.name}-kv={kv_heads}"] = Attention(
                small(**TINY, attention=backend, n_kv_head=kv_heads)
            )
            made[f"attention-{backend.name}-kv={kv_heads}-llama"] = Attention(
                small(**TINY, **LLAMA, attention=backend, n_kv_head=kv_heads)
            )
    for activation in Activation:
        made[f"ffn-{activation.name}"] = build_ffn(small(**TINY, activation=activation))
    made["ffn-swiglu"] = build_ffn(small(**TINY, ffn=Ffn.swiglu))
    made["learned position"] = LearnedPosition(4, 8)
    made["block-gpt2"] = Block(small(**TINY))
    made["block-llama"] = Block(small(**TINY, **LLAMA))
    return made


def check_gradients(module: nn.Module, *inputs: Tensor) -> None:
    """Compare the gradients of all parameters and floating-point inputs with finite differences."""
    module = module.double()
    names = [name for name, _ in module.named_parameters()]
    values = [(p.detach() + 0.3 * torch.randn_like(p)).requires_grad_() for p in module.parameters()]

    def call(*arguments: Tensor) -> Tensor:
        parameters = dict(zip(names, arguments[len(inputs) :]))
        return functional_call(module, parameters, arguments[: len(inputs)])

    assert gradcheck(call, (*inputs, *values))


@pytest.mark.parametrize("name", components())
def test_gradient_and_shape(name: str) -> None:
    torch.manual_seed(1)
    x_BTD = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    module = components()[name]
    assert module.double()(x_BTD).shape == x_BTD.shape
    check_gradients(module, x_BTD)


@pytest.mark.parametrize("parts", [{}, LLAMA], ids=["gpt2", "llama"])
def test_gradient_of_the_whole_model(parts: dict) -> None:
    torch.manual_seed(1)
    check_gradients(GPT(small(**TINY, **parts)), torch.tensor([[1, 4, 2]]))


def test_gradient_of_rope() -> None:
    rope = Rope(4, 6, base=10.0).double()
    assert gradcheck(rope, torch.randn(2, 3, 1, 6, dtype=torch.float64, requires_grad=True))


def test_rope_is_a_rotation_of_complex_numbers() -> None:
    rope = Rope(block_size=64, head_dim=8, base=500.0)
    x_BTHC = torch.randn(2, 64, 3, 8)
    rates = torch.tensor([500.0 ** (-2 * pair / 8) for pair in range(4)], dtype=torch.float64)
    turn = torch.exp(1j * torch.arange(64, dtype=torch.float64)[:, None] * rates)[:, None]
    expected = torch.complex(x_BTHC[..., :4].double(), x_BTHC[..., 4:].double()) * turn
    torch.testing.assert_close(rope(x_BTHC), torch.cat((expected.real, expected.imag), -1).float())


def test_rope_scores_depend_on_the_distance_only() -> None:
    rope = Rope(block_size=40, head_dim=16, base=10000.0).double()
    q, k = torch.randn(16).double(), torch.randn(16).double()
    q_T, k_T = (rope(x.expand(1, 40, 1, 16))[0, :, 0] for x in (q, k))
    scores = q_T @ k_T.T
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5], rtol=0, atol=1e-5)
    assert (scores[0] - scores[0, 0]).abs().max() > 1e-3


def test_rope_keeps_the_dtype_of_bf16() -> None:
    assert Rope(4, 6, 10.0)(torch.randn(1, 4, 2, 6, dtype=torch.bfloat16)).dtype is torch.bfloat16


@pytest.mark.parametrize("kv_heads", [6, 3, 2, 1])
@pytest.mark.parametrize("time", [1, 7, 33])
def test_sdpa_equals_manual(kv_heads: int, time: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 6, time, 8, dtype=torch.float64)
    k, v = torch.randn(2, 2, kv_heads, time, 8, dtype=torch.float64)
    torch.testing.assert_close(sdpa_attention(q, k, v, 0.0), manual_attention(q, k, v, 0.0))


def test_manual_attention_against_a_loop() -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 1, 5, 4, dtype=torch.float64)
    y = manual_attention(q, k, v, 0.0)
    for t in range(5):
        weights = [math.exp(q[0, 0, t] @ k[0, 0, s] / math.sqrt(4)) for s in range(t + 1)]
        mean = sum((w * v[0, 0, s] for s, w in enumerate(weights)), start=torch.zeros(4)) / sum(weights)
        torch.testing.assert_close(y[0, 0, t], mean)


@pytest.mark.parametrize("backend", AttentionBackend)
def test_grouped_queries_equal_repeated_keys_and_values(backend: AttentionBackend) -> None:
    torch.manual_seed(0)
    grouped = Attention(small(attention=backend, n_kv_head=2))
    full = Attention(small(attention=backend))
    weights = grouped.state_dict()
    for name in ("key.weight", "key.bias", "value.weight", "value.bias"):
        by_head = weights[name].unflatten(0, (2, 8))
        weights[name] = by_head.repeat_interleave(2, dim=0).flatten(0, 1)
    full.load_state_dict(weights)
    x_BTD = torch.randn(3, 12, 32)
    torch.testing.assert_close(grouped(x_BTD), full(x_BTD))


@pytest.mark.parametrize("backend", AttentionBackend)
def test_attention_dropout_acts_in_training_only(backend: AttentionBackend) -> None:
    attention = Attention(small(attention=backend, dropout=0.5))
    x_BTD = torch.randn(2, 12, 32)
    assert not torch.equal(attention(x_BTD), attention(x_BTD))
    attention.eval()
    assert torch.equal(attention(x_BTD), attention(x_BTD))
