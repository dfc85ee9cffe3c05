"""The Engine protocol: a parallelized model with its optimizer, as the training loop sees it.

An engine is applied to a finished model from outside; the model knows nothing of parallelism. The engines are DDP and
ZeRO-1 (ddp.py), ND parallelism (nd.py), pipelines (pipeline.py) and DeepSpeed's (deepspeed/);
gpt/training/parallelize.py chooses one.

Shapes: B sequences, T tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor, nn

from gpt.checkpoint.formats import Format
from gpt.parallel.clipping import Clipped
from gpt.parallel.loss_scale import LossScale


class Engine(Protocol):
    """A model parallelized over the ranks, and its optimizer. Every method is collective."""

    module: nn.Module
    """This rank's part of the model, its parameters named as in the whole one (maybe after ``module.``)."""
    layer_group: dist.ProcessGroup | None
    """The ranks that hold the same layers (the same pipeline stage); None means all ranks."""
    files: Format
    """The checkpoint format that stores what ``state()`` returns."""
    timed_groups: tuple[str, ...] | None
    """Groups whose waits ``gpt.parallel.timeline`` records; None where there are none, or some waits are out of
    sight."""

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale of fp16; None in other precisions."""
        ...

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        """Run forward and backward over all micro-batches, leaving the gradients of the mean loss over the global
        batch.

        Args:
            tokens_BT: this data-parallel rank's sequences of the global batch, (per_rank, T).
            targets_BT: the next tokens, (per_rank, T).
            on_micro_batch: called before each micro-batch.

        Returns:
            This rank's part of the summed loss, () float64: over all ranks each token counts once.
        """
        ...

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        """Clip the gradients to ``optim.grad_clip``, and sum figures of the step over all ranks, without a device sync.

        Args:
            figures_N: N numbers of this rank, float64. They travel with those that the norm takes, if it takes any.
            meanwhile: called once, while the ranks communicate.
        """
        ...

    def update(self, lr: float, skip: Tensor) -> Tensor | None:
        """Step the optimizer; where ``skip``, a bool () that is the same on all ranks, is true, change nothing.

        Returns:
            The global gradient norm, (), where ``clip`` told none: not finite where the optimizer has skipped the step
            by itself, on all ranks. Else None.
        """
        ...

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return this rank's part of the summed loss of at most a micro-batch, (); for evaluation."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yield for each parameter with a gradient its name in the whole model, this rank's shard of the gradient, and
        1
        over the number of replicas of that shard."""
        ...

    def state(self) -> Any:
        """Return model and optimizer state as ``files`` takes it, independent of the parallelism."""
        ...

    def load(self, state: Any) -> None:
        """Take over a state that was loaded into what ``state()`` returned."""
        ...

    def begin(self) -> None:
        """Reset an optimizer that has not stepped yet, whose state ``state()`` initialized."""
        ...
