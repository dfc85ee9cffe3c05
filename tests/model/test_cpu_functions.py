"""Rotary embeddings and RMSNorm as functions with gradients of their own, against torch's derivatives in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gpt.model.layers import RmsNorm, RmsNormOnCpu, Rotation

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
        assert own.grad is not None and norm.weight.grad is not None
        found.append((y.detach(), own.grad, norm.weight.grad))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=2e-6, atol=2e-6)


def test_other_precisions_and_a_norm_in_a_graph_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RmsNormOnCpu, "apply", lambda *_: pytest.fail("not for this input"))
    norm, plain = RmsNorm(WIDTH, eps=1e-5), nn.RMSNorm(WIDTH, eps=1e-5)
    x = torch.randn(2, WIDTH)
    assert torch.equal(norm(x.bfloat16()), plain(x.bfloat16()))
    assert torch.equal(torch.compile(norm, backend="eager", fullgraph=True)(x), plain(x))
    assert norm.state_dict().keys() == plain.state_dict().keys()
