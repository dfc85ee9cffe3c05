"""What is recorded of the gradients: their mean and standard deviation, and the norm of each layer's.

Owns the sums, which are the same however the model is spread over ranks. Every rank sums its own part on its device;
the sums travel with the loss, so there is no collective of their own and nobody waits for them. Must not know
strategies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True)
class GradientFigures:
    """Of the gradients of a step before clipping, over all parameters."""

    mean: float
    std: float
    layer_norms: dict[str, float]
    """L2 norm by layer: ``blocks.0`` and so on, and what is outside the blocks."""


class Gradients:
    """The gradients of a module, by layer."""

    def __init__(self, module: nn.Module, ranks: int) -> None:
        self._ranks = ranks
        self._layers: dict[str, list[nn.Parameter]] = {}
        for name, parameter in module.named_parameters():
            self._layers.setdefault(layer_of(name), []).append(parameter)
        self._elements = sum(p.numel() for p in module.parameters())

    @property
    def names(self) -> list[str]:
        """The layers, in the order of the model."""
        return list(self._layers)

    def sums(self) -> Tensor:
        """This rank's share of the sums over all elements: squares by layer, then the elements; (layers + 1,) float64.

        Added up over all ranks they are those of the whole model.
        """
        squares, elements = [], []
        for parameters in self._layers.values():
            grads = [p.grad for p in parameters if p.grad is not None]
            parts = [local(grad) for grad in grads]
            # float64 on the device: the squares of a whole model do not fit the digits of a float32.
            shares = torch.tensor([self._share(grad) for grad in grads], dtype=torch.float64, device=parts[0].device)
            squares.append((torch.stack(torch._foreach_norm(parts)).double().square() * shares).sum())
            elements.append((torch.stack([part.sum() for part in parts]).double() * shares).sum())
        return torch.stack([*squares, torch.stack(elements).sum()])

    def figures(self, sums: list[float]) -> GradientFigures:
        """What the sums of all ranks say."""
        *squares, total = sums
        mean = total / self._elements
        variance = max(0.0, sum(squares) / self._elements - mean**2)
        return GradientFigures(
            mean, math.sqrt(variance), {n: math.sqrt(s) for n, s in zip(self._layers, squares, strict=True)}
        )

    def _share(self, grad: Tensor) -> float:
        """One over the number of ranks that hold the same part of this gradient."""
        if not isinstance(grad, DTensor):
            return 1 / self._ranks
        placements = enumerate(grad.placements)
        parts = math.prod(grad.device_mesh.size(i) for i, placement in placements if isinstance(placement, Shard))
        return parts / self._ranks


def local(grad: Tensor) -> Tensor:
    """The part of a gradient that this rank holds."""
    return grad.to_local() if isinstance(grad, DTensor) else grad


def layer_of(parameter: str) -> str:
    """``blocks.3`` for ``module.blocks.3.ffn.up.weight``, the first word for what is in no block."""
    words = parameter.removeprefix("module.").split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]
