"""Attention put together from blocks of keys is attention: against one softmax over all keys, and its gradients."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gpt.model.attention import Attended, attend_block, attend_block_backward, merge_blocks

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


def attention(q_BHTC: Tensor, k_BKSC: Tensor, v_BKSC: Tensor) -> Tensor:
    """One softmax; the last query looks at all keys, each one before it at one less."""
    k, v = (x.repeat_interleave(q_BHTC.size(1) // x.size(1), dim=1) for x in (k_BKSC, v_BKSC))
    scores = torch.einsum("bhtc,bhsc->bhts", q_BHTC, k) / math.sqrt(q_BHTC.size(-1))
    age = torch.arange(k.size(2)) - torch.arange(q_BHTC.size(2))[:, None] - (k.size(2) - q_BHTC.size(2))
    return torch.einsum("bhts,bhsc->bhtc", scores.masked_fill(age.to(k.device) > 0, -math.inf).softmax(-1), v)


@pytest.mark.parametrize("fused", [True, False])
@settings(max_examples=20, deadline=None)
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

    blocks = list(zip(k.detach().split([*earlier, queries], 2), v.detach().split([*earlier, queries], 2), strict=True))
    causal = [False] * len(earlier) + [True]
    y, lse = attend_block(q.detach(), *blocks[-1], True, fused)
    for block in blocks[:-1]:
        y, lse = merge_blocks(y, lse, *attend_block(q.detach(), *block, False, fused))
    torch.testing.assert_close(y, expected.detach())

    parts = [
        attend_block_backward(grad, Attended(q.detach(), y, lse), *block, c, fused)
        for block, c in zip(blocks, causal, strict=True)
    ]
    dqs, dks, dvs = zip(*parts, strict=True)
    torch.testing.assert_close(sum(dqs), q.grad)
    torch.testing.assert_close(torch.cat(dks, dim=2), k.grad)
    torch.testing.assert_close(torch.cat(dvs, dim=2), v.grad)


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

    blocks = [(k[:, :, :32], v[:, :, :32], False), (k[:, :, 32:], v[:, :, 32:], True)]
    y, lse = merge_blocks(*attend_block(q, *blocks[0], fused), *attend_block(q, *blocks[1], fused))
    y = y.to(q.dtype)
    assert lse.dtype is torch.float32
    torch.testing.assert_close(y.float(), expected.detach(), rtol=0.05, atol=0.05)
    parts = [attend_block_backward(grad, Attended(q, y, lse), k_, v_, causal, fused) for k_, v_, causal in blocks]
    (dq, _, _), (dq_own, _, _) = parts
    found = (dq + dq_own, *(torch.cat(pair, dim=2) for pair in zip(parts[0][1:], parts[1][1:], strict=True)))
    for x, y_ in zip(found, wide, strict=True):
        assert x.dtype is torch.bfloat16
        torch.testing.assert_close(x.float(), y_.grad, rtol=0.1, atol=0.1)
