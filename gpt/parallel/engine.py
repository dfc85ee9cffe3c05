"""What the training loop sees of a way to spread a model over ranks, and the choice of one.

A strategy is applied to a finished model from outside; the model knows nothing of it.

Shapes: B sequences, T tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from gpt.checkpoint.formats import Format


class Engine(Protocol):
    """A model spread over the ranks, and its optimizer. Every method is called by all ranks together."""

    module: nn.Module
    """This rank's share of the model, its parameters named as in the whole one (maybe after ``module.``)."""
    layer_group: dist.ProcessGroup | None
    """The ranks that hold the same layers; None means all."""
    files: Format
    """How ``state()`` becomes the files of a checkpoint."""

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        """Leave in the parameters the gradients of the mean loss over the global batch.

        Args:
            tokens_BT: this data rank's sequences of the batch, (per_rank, T).
            targets_BT: the tokens that follow.
            on_micro_batch: called before each micro-batch.

        Returns:
            This rank's share of the summed loss, () float64: over all ranks each token counts once.
        """
        ...

    def update(self, lr: float) -> Tensor:
        """Clip the gradients and step the parameters; the global norm the gradients had, (). Waits for no device."""
        ...

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """This rank's share of the summed loss of at most a micro-batch, (); for evaluation."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        """For each parameter with a gradient: its name in the whole model, this rank's part of the gradient, and one
        over the number of ranks that hold the same part."""
        ...

    def state(self) -> Any:
        """Model and optimizer state as ``files`` takes it, independent of how they are spread."""
        ...

    def load(self, state: Any) -> None:
        """Take over a state that was loaded into what ``state()`` gave."""
        ...

    def begin(self) -> None:
        """Forget what ``state()`` did to an optimizer that has not stepped yet."""
        ...
