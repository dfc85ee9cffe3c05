"""The Engine protocol of the training loop, and the base of the torch engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

from gpt.checkpoint.formats import Format, TensorFiles
from gpt.config import Precision, TrainConfig
from gpt.model.ffn import set_auxiliary_scale
from gpt.model.loss import cross_entropy, summed_loss
from gpt.parallel.compile import compile_loss
from gpt.parallel.distributed import World
from gpt.parallel.dtensor import local_tensor
from gpt.parallel.optimizer import Clipped, DynamicLossScale, LossScale, build_optimizer, clip_replica, skipping
from gpt.topology import Batch, ParallelDims

# The Engine protocol: a parallelized model with its optimizer, as the training loop sees it.
#
# An engine is applied to a finished model from outside; the model knows nothing of parallelism. The engines are DDP and
# ZeRO-1 (ddp.py), ND parallelism (nd.py), pipelines (pipeline.py) and DeepSpeed's (deepspeed/).
# gpt/training/execution.py chooses one.
#
# Shapes: B sequences, T tokens of each.


class Engine(Protocol):
    """A model parallelized over the ranks, and its optimizer. Every method is collective."""

    module: nn.Module
    """This rank's part of the model, with the parameter names of the whole model (maybe after ``module.``)."""
    layer_group: dist.ProcessGroup | None
    """The ranks that hold the same layers (the same pipeline stage); None means all ranks."""
    files: Format
    """The checkpoint format of the state that ``state()`` returns."""
    timed_groups: tuple[str, ...] | None
    """Groups whose waits ``gpt.parallel.timeline`` records; None if there are none, or some waits cannot be seen."""

    @property
    def loss_scale(self) -> LossScale | None:
        """The loss scale of fp16; None in other precisions."""
        ...

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        """Run forward and backward over all micro-batches; leave the gradients of the mean loss over the global batch.

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
            figures_N: N numbers of this rank, float64. They travel with the numbers for the norm, if it needs a
                collective.
            meanwhile: called once, while the ranks communicate.
        """
        ...

    def update(self, lr: float, skip: Tensor) -> Tensor | None:
        """Step the optimizer; change nothing if ``skip`` is true, a bool () that is the same on all ranks.

        Returns:
            The global gradient norm, (), if ``clip`` returned none: not finite if the optimizer itself has skipped the
                step, on all ranks. None if ``clip`` returned a norm.
        """
        ...

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return this rank's part of the summed loss of at most a micro-batch, (); for evaluation."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yield each gradient as (name, shard, share), by the parameter's name in the whole model.

        The shard is this rank's; the share is 1 over the number of replicas of that shard.
        """
        ...

    def state(self) -> Any:
        """Return the state of model and optimizer in the form of ``files``, independent of the parallelism."""
        ...

    def load(self, state: Any) -> None:
        """Take over a state that was loaded into the result of ``state()``."""
        ...

    def begin(self) -> None:
        """Reset an optimizer that has not stepped yet, whose state ``state()`` initialized."""
        ...


# Base of the torch engines: gradient accumulation over micro-batches, AdamW, clipping, and checkpoint state.
#
# Shapes: B sequences, T tokens of each.


ForwardBackward = Callable[[Tensor, Tensor, bool], Tensor]
"""Runs forward and backward of a micro-batch: tokens and targets, (B, T), and whether it is the step's last.

Returns the summed loss, ().
"""


def accumulate(
    batch: Batch,
    device: torch.device,
    tokens_BT: Tensor,
    targets_BT: Tensor,
    on_micro_batch: Callable[[], None],
    forward_backward: ForwardBackward,
) -> Tensor:
    """Run all micro-batches of a step in turn (gradient accumulation); return the summed loss, () float64."""
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    for i in range(batch.accumulation):
        on_micro_batch()
        part = slice(i * batch.micro, (i + 1) * batch.micro)
        loss_sum += forward_backward(tokens_BT[part], targets_BT[part], i == batch.accumulation - 1)
    return loss_sum


def no_context(last: bool) -> AbstractContextManager[object]:
    """Do nothing around a micro-batch: the strategy reduces no gradients in backward passes."""
    return nullcontext()


class TorchEngine:
    """A model parallelized by torch; each strategy overrides the methods in which it differs.

    Args:
        module: the module that is called.
        trained: the module that the optimizer steps and checkpoints store: ``module``, or this rank's shard of it.
        config: of the run.
        world: all ranks.
        dims: the parallel dimensions.
        batch: the split of the global batch.
        averaged: number of ranks over which the strategy averages gradients; 1 if it sums them.
        sync_context: returns the context of a micro-batch, given whether it is the last of a step. A strategy that
            reduces gradients in backward passes does so only in the last one.
        reduce_gradients: called after the last micro-batch, to reduce gradients that backward passes did not reduce.
    """

    layer_group: dist.ProcessGroup | None = None
    criterion: Callable[[Tensor, Tensor], Tensor] = staticmethod(cross_entropy)
    """Summed loss of logits and targets."""
    timed_groups: tuple[str, ...] | None = None
    loss_weight: float = 1.0
    """1, or 0 if another rank computes and reports the loss of the same tokens."""
    files: Format

    def __init__(
        self,
        module: nn.Module,
        trained: nn.Module,
        config: TrainConfig,
        world: World,
        dims: ParallelDims,
        batch: Batch,
        averaged: int,
        sync_context: Callable[[bool], AbstractContextManager[object]] = no_context,
        reduce_gradients: Callable[[], None] = lambda: None,
    ) -> None:
        self.module, self.trained = module, trained
        self.config, self.world, self.dims, self.batch = config, world, dims, batch
        self._sync_context, self._reduce_gradients = sync_context, reduce_gradients
        if self.criterion is cross_entropy:
            self.criterion = compile_loss(config)
        self.files = TensorFiles()
        self.loss_scale = DynamicLossScale(world.device) if config.precision is Precision.fp16 else None
        self.optimizer = build_optimizer(trained, config.optim, fused=self.loss_scale is not None)
        self._parameters = tuple(module.parameters())
        self.scale = averaged / (batch.global_batch * config.model.block_size)
        # Tensor-parallel ranks route the same tokens, and their gradients are summed. Each context-parallel rank has
        # the mean over its own tokens.
        per_sequence = averaged / (batch.global_batch * dims.tp * dims.cp)
        set_auxiliary_scale(module, per_sequence, None if self.loss_scale is None else self.loss_scale.scale)

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        self.zero_grad()
        loss_sum = accumulate(
            self.batch, self.world.device, tokens_BT, targets_BT, on_micro_batch, self._forward_backward
        )
        self._reduce_gradients()
        self.unscale_gradients()
        return loss_sum * self.loss_weight

    def zero_grad(self) -> None:
        """Drop the gradients of the last step.

        The list is of the parameters at the beginning. A walk over the modules costs a small model's step a third of a
        percent. It would also miss the parameters that FSDP has replaced by gathered ones.
        """
        for parameter in self._parameters:
            parameter.grad = None

    @property
    def gradient_factor(self) -> float | Tensor:
        """Factor of the summed loss of a micro-batch in its backward pass: ``scale`` times the loss scale."""
        return self.scale if self.loss_scale is None else self.scale * self.loss_scale.scale

    def unscale_gradients(self) -> None:
        """Undo the loss scale in the gradients of all micro-batches."""
        if self.loss_scale is not None:
            self.loss_scale.unscale(local_tensor(p.grad) for p in self.trained.parameters() if p.grad is not None)

    def _forward_backward(self, tokens_BT: Tensor, targets_BT: Tensor, last: bool) -> Tensor:
        with self._sync_context(last):
            loss = self._micro_batch_loss(tokens_BT, targets_BT)
            self._run_backward(loss * self.gradient_factor, last)
        return loss.detach()

    def _run_backward(self, loss: Tensor, last: bool) -> None:
        """Run the backward pass of a micro-batch from its scaled loss, ()."""
        loss.backward()

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self._micro_batch_loss(tokens_BT, targets_BT) * self.loss_weight

    def _micro_batch_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed loss of one forward pass, () fp32, on every rank that takes part in it."""
        own = self.local_tokens(tokens_BT), self.local_tokens(targets_BT)
        return summed_loss(self.module, self.config, *own, self.world.device, self.criterion)

    def local_tokens(self, x_BT: Tensor) -> Tensor:
        """Return this rank's tokens, or targets, of each sequence, (B, T); all of them without context parallelism."""
        return x_BT

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        return clip_replica(self._parameters, self.config.optim.grad_clip, self.world, figures_N, meanwhile)

    def update(self, lr: float, skip: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with skipping(self.optimizer, skip):
            self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.update(skip)

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name.removeprefix("module."), parameter.grad, 1 / self.world.size

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.trained, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        # The stored parameter groups name the parameters of one rank, which differ between pipeline stages. Their other
        # values come from the config.
        groups = get_optimizer_state_dict(self.trained, self.optimizer)["param_groups"]
        optimizer = {"state": state["optimizer"]["state"], "param_groups": groups}
        set_state_dict(self.trained, self.optimizer, model_state_dict=state["model"], optim_state_dict=optimizer)

    def begin(self) -> None:
        # get_state_dict initializes the optimizer by a step with zero gradients, which AdamW would count as its first.
        self.optimizer.state.clear()
