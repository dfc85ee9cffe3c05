"""Gradient statistics: their mean and standard deviation, and the norm of each layer's.

Owns the sums, which are the same however the model is spread over ranks. Every rank sums its own part on its device;
the sums travel with the loss, so there is no collective of their own and nobody waits for them. Must not know
strategies.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt.config import ModelConfig
from gpt.model.gpt import GPT
from gpt.parallel.optimizer import shared_squares, sum_of_elements


@dataclass(frozen=True)
class GradientFigures:
    """Statistics of the gradients of a step before clipping, over all parameters."""

    mean: float
    std: float
    layer_norms: dict[str, float]
    """L2 norm by layer: ``blocks.0`` and so on, and what is outside the blocks."""


class Gradients:
    """The gradients of a model, by layer."""

    def __init__(self, model: ModelConfig, device: torch.device) -> None:
        with torch.device("meta"):
            whole = GPT(model)
        self._device = device
        self.names = list(dict.fromkeys(layer_of(name) for name, _ in whole.named_parameters()))
        """The layers, in the order of the model."""
        self._elements = sum(p.numel() for p in whole.parameters())

    def sums(self, parts: Iterable[tuple[str, Tensor, float]]) -> Tensor:
        """This rank's share of the sums over all elements: squares by layer, then the elements; (layers + 1,) float64.

        Added up over all ranks they are those of the whole model.

        Args:
            parts: name, part of the gradient that this rank holds, one over the number of ranks that hold the same.
        """
        named = list(parts)
        held = [(part, share) for _, part, share in named]
        layers: dict[str, list[Tensor]] = {name: [] for name in self.names}
        for (name, *_), squares in zip(named, shared_squares(held), strict=True):
            layers[layer_of(name)].append(squares)
        nothing = torch.zeros((), dtype=torch.float64, device=held[0][0].device)
        sums = [torch.stack(squares).sum() if squares else nothing for squares in layers.values()]
        return torch.stack([*sums, sum_of_elements(held)]).to(self._device)

    def figures(self, sums: list[float]) -> GradientFigures:
        """Compute the statistics from the sums of all ranks."""
        *squares, total = sums
        mean = total / self._elements
        variance = max(0.0, sum(squares) / self._elements - mean**2)
        return GradientFigures(
            mean, math.sqrt(variance), {n: math.sqrt(s) for n, s in zip(self.names, squares, strict=True)}
        )


def layer_of(parameter: str) -> str:
    """``blocks.3`` for ``blocks.3.ffn.up.weight``, the first word for what is in no block."""
    words = parameter.split(".")
    return ".".join(words[:2]) if words[0] == "blocks" else words[0]
