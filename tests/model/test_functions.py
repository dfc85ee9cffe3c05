"""Functions of the model: on CPUs, the loss, attention by blocks of keys, and its cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.config import ModelConfig, Position
from gpt.model import layers
from gpt.model.attention import Attended, Cache, attend_block, attend_block_backward, merge_blocks
from gpt.model.gpt import GPT
from gpt.model.layers import Linear, LinearOnCpu, RmsNorm, RmsNormOnCpu, Rotation, cross_entropy
from tests.support.small_models import label, random_tokens, small, variants

WIDTH = 12


def plain_rotation(x_BTHC: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (c, c + C/2) as complex numbers."""
    first, second = x_BTHC.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.complex(cos.double(), sin.double())
    return torch.cat((turned.real, turned.imag), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_rotation_and_its_gradient_are_those_of_complex_numbers(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x_BTHC = torch.randn(2, 5, 3, WIDTH, generator=generator).to(dtype).requires_grad_()
    angle_T1P = 6 * torch.rand(5, 1, WIDTH // 2, generator=generator)
    gradient_BTHC = torch.randn(2, 3, 5, WIDTH, generator=generator).transpose(1, 2)  # as attention gives it
    found = Rotation.apply(x_BTHC, angle_T1P.cos(), angle_T1P.sin())
    expected = plain_rotation(x_BTHC, angle_T1P.cos(), angle_T1P.sin())
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)
    (mine,) = torch.autograd.grad(found, x_BTHC, gradient_BTHC)
    (theirs,) = torch.autograd.grad(expected, x_BTHC, gradient_BTHC.double())
    assert mine.dtype == dtype
    torch.testing.assert_close(mine, theirs, rtol=1e-6 if dtype is torch.float32 else 2**-7, atol=1e-6)


def test_a_norm_and_its_gradients_are_torchs_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    x, gradient = (torch.randn(3, 7, WIDTH, generator=generator) for _ in range(2))
    gain_D = 0.5 + torch.rand(WIDTH, generator=generator)
    found = []
    for kind, dtype in ((RmsNorm, torch.float32), (nn.RMSNorm, torch.float64)):
        norm = kind(WIDTH, eps=1e-5).to(dtype)
        norm.weight.data.copy_(gain_D)
        own = x.detach().to(dtype, copy=True).requires_grad_()
        y = norm(own)
        y.backward(gradient.to(dtype))
        found.append((y.detach(), own.grad, norm.weight.grad))
    torch.testing.assert_close(*found, rtol=2e-6, atol=2e-6, check_dtype=False)


def test_other_precisions_and_a_norm_in_a_graph_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    for ours in (RmsNormOnCpu, LinearOnCpu):
        monkeypatch.setattr(ours, "apply", lambda *_: pytest.fail("not for this input"))
    norm, plain, layer = RmsNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5), Linear(WIDTH, 5)
    x = torch.randn(2, WIDTH)
    assert torch.equal(norm(x.bfloat16()), plain(x.bfloat16()))
    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), plain(x))
    assert norm.state_dict().keys() == plain.state_dict().keys()
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    assert layer.double()(x.double()).dtype == torch.float64
    assert layer.to("meta")(x.to("meta")).shape == (2, 5)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_a_linear_layer_and_its_gradients_are_torchs_in_float64(bias: bool, compiled: bool) -> None:
    x, gradient = torch.randn(3, 7, WIDTH), torch.randn(3, 7, 5)
    layer = Linear(WIDTH, 5, bias=bias)
    plain = nn.Linear(WIDTH, 5, bias=bias).double()
    plain.load_state_dict(layer.state_dict())
    found = []
    called = torch.compile(layer, fullgraph=True) if compiled else layer
    for module, call, dtype in ((layer, called, torch.float32), (plain, plain, torch.float64)):
        own = x.to(dtype, copy=True).requires_grad_()
        y = call(own)
        found.append((y.detach(), *torch.autograd.grad(y, (own, *module.parameters()), gradient.to(dtype))))
    torch.testing.assert_close(*found, rtol=2e-6, atol=2e-6, check_dtype=False)


# The loss against torch's, in value and gradient, and what it moves and allocates for each logit.


B, T, V, D = 2, 24, 700, 2


def torchs(logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten(), reduction="sum")


def computed(criterion: Callable[[Tensor, Tensor], Tensor], logits_BTV: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of the loss times ``scale``."""
    targets_BT = torch.randint(V, (B, T), generator=torch.Generator().manual_seed(1))
    logits_BTV = logits_BTV.detach().clone().requires_grad_()
    found = criterion(logits_BTV[..., :V], targets_BT)
    (found * scale).backward()
    assert logits_BTV.grad is not None
    return found.detach(), logits_BTV.grad


@pytest.mark.parametrize("chunk", [1, 5 * V, 2**23], ids=["by token", "uneven chunks", "at once"])
@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradient_times_any_number_are_those_of_torch(
    dtype: torch.dtype, padding: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "LOSS_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits_BTV = (5 * torch.randn(B, T, V + padding, generator=generator)).to(dtype)
    logits_BTV[0, 0, 3] = 60.0  # a token that is all but certain
    for scale in (0.003, -0.5, 0.0):
        (found, grad), (expected, expected_grad) = (computed(f, logits_BTV, scale) for f in (cross_entropy, torchs))
        assert found.dtype == torch.float32 and grad.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        # In bf16 a value at the border of two may be rounded to the other one.
        rounding = 2e-6 if dtype is torch.float32 else 2**-7
        torch.testing.assert_close(grad, expected_grad, rtol=rounding, atol=1e-9)
        assert (grad - expected_grad).norm() <= (1e-6 if dtype is torch.float32 else 1e-4) * expected_grad.norm()


class Traffic(TorchDispatchMode):
    """Bytes that operations on tensors of all logits read, write and allocate; what is in chunks is not in these."""

    VIEWS = ("view", "detach", "slice", "t.default", "transpose", "expand", "alias", "unsqueeze", "as_strided", "split")

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.logits, self.moved, self.made = logits, 0, 0
        self.largest_fp32 = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        ins, outs = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        if not any(name in str(func) for name in self.VIEWS):
            self.moved += sum(x.nbytes for x in (*ins, *outs) if x.numel() >= self.logits)
            self.made += sum(x.nbytes for x in outs if x.numel() >= self.logits)
            self.largest_fp32 = max([self.largest_fp32, *(x.numel() for x in outs if x.dtype == torch.float32)])
        return out


def traffic(criterion: Callable[[Tensor, Tensor], Tensor], padding: int = 0) -> Traffic:
    """Of head, loss and their backward pass in bf16."""
    x_BTD, head_VD = torch.randn(B, T, D, requires_grad=True), torch.randn(V + padding, D, requires_grad=True)
    with Traffic(B * T * V) as seen:
        with torch.autocast("cpu", torch.bfloat16):
            logits_BTV = F.linear(x_BTD, head_VD)[..., :V]
        (criterion(logits_BTV, torch.randint(V, (B, T))) * 1e-3).backward()
    return seen


@pytest.mark.parametrize("padding", [0, 4])
def test_logits_are_moved_seldom_and_never_whole_in_fp32(padding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "LOSS_CHUNK", 4 * V)
    seen, plain = (traffic(criterion, padding) for criterion in (cross_entropy, torchs))
    logits = B * T * V
    assert (seen.moved / logits, seen.made / logits) <= (20, 8)
    assert seen.largest_fp32 <= 4 * V
    assert plain.moved / logits > 40 and plain.made / logits > 16 and plain.largest_fp32 >= logits


# Attention put together from blocks of keys is attention: against one softmax over all keys, and its gradients.


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
    """One softmax; the last query looks at all keys, each one before it at one less."""
    k, v = (x.repeat_interleave(q_BHTC.size(1) // x.size(1), dim=1) for x in (k_BKSC, v_BKSC))
    scores = torch.einsum("bhtc,bhsc->bhts", q_BHTC, k) / math.sqrt(q_BHTC.size(-1))
    age = torch.arange(k.size(2)) - torch.arange(q_BHTC.size(2))[:, None] - (k.size(2) - q_BHTC.size(2))
    return torch.einsum("bhts,bhsc->bhtc", scores.masked_fill(age.to(k.device) > 0, -math.inf).softmax(-1), v)


def from_blocks(
    q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor, grad: Tensor, lengths: list[int], fused: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Attention by blocks of keys of these lengths, the last of them causal; its logarithms, and its gradients."""
    causal = [False] * (len(lengths) - 1) + [True]
    blocks = list(zip(k_BKSC.split(lengths, 2), v_BKSC.split(lengths, 2), causal, strict=True))
    y, lse = attend_block(q_BHTC, *blocks[-1], fused)
    for block in blocks[:-1]:
        y, lse = merge_blocks(y, lse, *attend_block(q_BHTC, *block, fused))
    y = y.to(q_BHTC.dtype)
    parts = [attend_block_backward(grad, Attended(q_BHTC, y, lse), *block, fused) for block in blocks]
    dqs, dks, dvs = zip(*parts, strict=True)
    return y, lse, [sum(dqs), torch.cat(dks, dim=2), torch.cat(dvs, dim=2)]


@pytest.mark.parametrize("fused", [True, False])
@settings(max_examples=20)
@given(
    st.integers(1, 2),
    st.sampled_from([(1, 1), (4, 4), (4, 2), (3, 1)]),
    st.integers(1, 9),
    st.lists(st.integers(1, 9), max_size=3),
    st.integers(1, 12),
    st.integers(0, 2**31),
)
def test_blocks_put_together_are_one_softmax(
    fused: bool, batch: int, heads: tuple[int, int], queries: int, earlier: list[int], width: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = {"generator": generator, "dtype": torch.float64}
    keys = sum(earlier) + queries
    q = (3 * torch.randn(batch, heads[0], queries, width, **draw)).requires_grad_()
    k, v = (torch.randn(batch, heads[1], keys, width, **draw).requires_grad_() for _ in range(2))
    expected = attention(q, k, v)
    grad = torch.randn(expected.shape, **draw)
    expected.backward(grad)

    y, _, gradients = from_blocks(*(x.detach() for x in (q, k, v)), grad, [*earlier, queries], fused)
    torch.testing.assert_close([y, *gradients], [expected.detach(), q.grad, k.grad, v.grad])


@pytest.mark.parametrize("width", [16, 12])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("device", DEVICES)
def test_half_precision_stays_close_and_sums_in_fp32(device: str, fused: bool, width: int) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, 32, width, device=device, dtype=torch.bfloat16)
    k, v = (torch.randn(2, 2, 64, width, device=device, dtype=torch.bfloat16) for _ in range(2))
    grad = torch.randn_like(q)
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    expected = attention(*wide)
    expected.backward(grad.float())

    y, lse, found = from_blocks(q, k, v, grad, [32, 32], fused)
    assert lse.dtype is torch.float32 and {x.dtype for x in found} == {torch.bfloat16}
    torch.testing.assert_close(y.float(), expected.detach(), rtol=0.05, atol=0.05)
    torch.testing.assert_close(found, [x.grad for x in wide], rtol=0.1, atol=0.1, check_dtype=False)


# With a cache, tokens that come in pieces get the logits they get at once.


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
def test_memory_is_taken_once_and_holds_the_key_value_heads_only_in_bf16_where_that_is_computed() -> None:
    config = small(n_kv_head=2, position=Position.rope)
    model, cache, tokens_BT = lively(config), Cache(config.block_size), random_tokens(config, 3)

    def held() -> list[tuple[int, tuple[int, ...], torch.dtype]]:
        keys = [cache.layer(i)._k_BKSC for i in range(2)]
        return [(k.data_ptr(), tuple(k.shape), k.dtype) for k in keys]

    with torch.autocast("cpu", torch.bfloat16):
        model(tokens_BT[:, :4], cache)
        before = held()
        assert [key[1:] for key in before] == [((3, 2, 12, 8), torch.bfloat16)] * 2
        model(tokens_BT[:, 4:7], cache)
    assert held() == before


@torch.no_grad()
def test_more_than_there_is_room_for_is_refused() -> None:
    config = small()
    model, tokens_BT = lively(config), random_tokens(config, 1)
    cache = Cache(config.block_size)
    model(tokens_BT, cache)
    for tokens, kept in ((tokens_BT[:, :1], (cache,)), (torch.zeros(1, 13, dtype=torch.long), ())):
        with pytest.raises(AssertionError, match="13 tokens in a model of block_size=12"):
            model(tokens, *kept)
    short = Cache(4)
    with pytest.raises(AssertionError, match="5 tokens in a cache for 4"):
        model(tokens_BT[:, :5], short)
    cache = Cache(12)
    model(tokens_BT[:, :2], cache)
    with pytest.raises(AssertionError, match="one batch"):
        model(tokens_BT[:, :2].expand(2, 2), cache)


@pytest.mark.parametrize("trains", [True, False])
def test_a_chunked_loss_has_no_gradient_of_a_frozen_matrix(trains: bool) -> None:
    torch.manual_seed(0)
    x_BTD, weight_VD = torch.randn(2, 5, 8, requires_grad=True), torch.randn(11, 8, requires_grad=trains)
    targets_BT = torch.randint(11, (2, 5))
    loss = layers.chunked_loss(x_BTD, weight_VD, targets_BT, 11, layers.loss_and_gradient)
    assert (loss.grad_fn.gradients[1] is not None) == trains
    expected = torch.nn.functional.cross_entropy(
        (x_BTD @ weight_VD.mT).flatten(0, 1), targets_BT.flatten(), reduction="sum"
    )
    asked = (x_BTD, weight_VD) if trains else (x_BTD,)
    for found, reference in zip(torch.autograd.grad(loss, asked), torch.autograd.grad(expected, asked), strict=True):
        torch.testing.assert_close(found, reference)
