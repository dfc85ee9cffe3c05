"""AdamW (arXiv 1711.05101) and its steps that are skipped; norms of gradients in shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gpt.components.load import build_optimizer as build_custom
from gpt.config import OptimConfig
from gpt.config.optim import ADAMW


class AdamW(torch.optim.AdamW):
    """torch's AdamW, which steps this rank's shards of DTensors. Its state stays DTensors, as checkpoints take it.

    The step is elementwise, on gradients that are sharded as their parameters. Through DTensor torch would look for a
    sharding of each parameter, 2 to 3 ms of the host apiece in the first step, hash all of them in each step, and
    refuse a list with plain tensors among them.
    """

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> Any:
        has_complex = super()._init_group(group, *lists)  # fills the lists: parameters, gradients, state
        for index, (p, grad) in enumerate(zip(*lists[:2], strict=True)):
            if isinstance(p, DTensor) and isinstance(grad, DTensor) and grad.placements != p.placements:
                lists[1][index] = grad.redistribute(placements=p.placements)  # a sum that is due yet
        for tensors in lists:
            tensors[:] = [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
        return has_complex


def build_optimizer(
    module: nn.Module, config: OptimConfig, kind: type[torch.optim.AdamW] = AdamW, fused: bool = False
) -> torch.optim.Optimizer:
    """Build AdamW, or the user's optimizer, over the parameters of ``module``, with weight decay for matrices and
    none for biases and norms.

    ``fused`` asks for the fused step on devices other than GPUs and CPUs too, where it is not the default.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer != ADAMW:
        own: torch.optim.Optimizer = build_custom(config, groups)
        return own
    fused = fused or all(p.device.type in ("cuda", "cpu") for p in parameters)
    return kind(
        groups,
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=fused,
    )


@contextmanager
def skipping(optimizer: torch.optim.Optimizer, skip: Tensor) -> Iterator[None]:
    """Have a step of the fused ``optimizer`` change nothing, and not count, where ``skip``, a bool (), is true.

    The fused kernel looks at it on the device; before the step of an optimizer of the user's the host
    does. Offloaded parameters are stepped by the host, which waits here: torch would read the flag while it is still
    being copied.
    """
    optimizer.found_inf = skip.float().to(first_parameter(optimizer).device)  # type: ignore[attr-defined]
    try:
        yield
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def first_parameter(optimizer: torch.optim.Optimizer) -> Tensor:
    """Return a parameter of an optimizer, whose parameters are all on one device."""
    found: Tensor = optimizer.param_groups[0]["params"][0]
    return found


def sum_of_squares(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return this rank's part of the sum of squares of sharded gradients, () float64.

    Args:
        parts: shards, each with 1 over the number of its replicas. At least one.
    """
    return torch.stack(shared_squares(parts)).sum()


def shared_squares(parts: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, ...]:
    """Return the sum of squares of each shard, times 1 over the number of its replicas; each () float64."""
    # float64 on the device: the squares of a whole model do not fit the digits of a float32.
    norms = torch.stack(torch._foreach_norm([part for part, _ in parts])).double()
    return times(norms.square(), [share for _, share in parts])


def sum_of_elements(parts: Sequence[tuple[Tensor, float]]) -> Tensor:
    """Return this rank's part of the sum of the elements of sharded gradients, () float64."""
    sums = torch.stack([part.sum() for part, _ in parts]).double()
    return torch.stack(times(sums, [share for _, share in parts])).sum()


def times(values_N: Tensor, factors: Sequence[float]) -> tuple[Tensor, ...]:
    """Multiply each of N values on a device by a number of the host; each product is ().

    As arguments of the kernel: a tensor of the factors would be copied to the device, and the host would wait for it.
    """
    return tuple(torch._foreach_mul(values_N.unbind(), list(factors)))
