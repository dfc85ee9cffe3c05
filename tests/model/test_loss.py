"""The loss against torch's, in value and gradient, and what it moves and allocates for each logit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpt.model import layers
from gpt.model.layers import cross_entropy

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
def test_loss_and_gradient_are_those_of_torch(
    dtype: torch.dtype, padding: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "LOSS_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    logits_BTV = (5 * torch.randn(B, T, V + padding, generator=generator)).to(dtype)
    logits_BTV[0, 0, 3] = 60.0  # a token that is all but certain
    (found, grad), (expected, expected_grad) = (computed(f, logits_BTV, 0.003) for f in (cross_entropy, torchs))
    assert found.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    # In bf16 a value at the border of two may be rounded to the other one.
    rounding = 2e-6 if dtype is torch.float32 else 2**-7
    torch.testing.assert_close(grad, expected_grad, rtol=rounding, atol=1e-9)
    assert (grad - expected_grad).norm() <= (1e-6 if dtype is torch.float32 else 1e-4) * expected_grad.norm()


def test_the_loss_may_be_multiplied_by_any_number() -> None:
    logits_BTV = torch.randn(B, T, V, generator=torch.Generator().manual_seed(0))
    for scale in (-0.5, 0.0):
        (_, grad), (_, expected) = (computed(f, logits_BTV, scale) for f in (cross_entropy, torchs))
        torch.testing.assert_close(grad, expected, rtol=2e-6, atol=1e-9)


def test_on_a_cpu_a_chunk_stays_in_the_caches_of_its_cores() -> None:
    # Beside the logits and their gradient, nothing is larger than a chunk.
    whole = torch.zeros(1, 2 * layers.CACHED_LOGITS * torch.get_num_threads() // V, V, requires_grad=True)
    with Traffic(whole.numel()) as seen:
        cross_entropy(whole, torch.zeros(whole.shape[:2], dtype=torch.long)).backward()
    assert seen.made == whole.nbytes and 0 < seen.largest_but_whole <= layers.chunk_elements(whole.device)


class Traffic(TorchDispatchMode):
    """Bytes that operations on tensors of all logits read, write and allocate; what is in chunks is not in these."""

    VIEWS = ("view", "detach", "slice", "t.default", "transpose", "expand", "alias", "unsqueeze", "as_strided", "split")

    def __init__(self, logits: int) -> None:
        super().__init__()
        self.logits, self.moved, self.made = logits, 0, 0
        self.largest_fp32, self.largest_but_whole = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        ins, outs = ([x for x in tree_leaves(part) if isinstance(x, Tensor)] for part in ((args, kwargs), out))
        if not any(name in str(func) for name in self.VIEWS):
            self.moved += sum(x.nbytes for x in (*ins, *outs) if x.numel() >= self.logits)
            self.made += sum(x.nbytes for x in outs if x.numel() >= self.logits)
            self.largest_but_whole = max(
                [self.largest_but_whole, *(x.numel() for x in outs if x.numel() < self.logits)]
            )
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
