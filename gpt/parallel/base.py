"""Base of the torch engines: gradient accumulation over micro-batches, AdamW, clipping, and checkpoint state.

Owns the scale of the gradients: a sum over this rank's tokens becomes the mean over all tokens of the step.

Shapes: B sequences, T tokens of one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

from gpt.checkpoint.formats import Format, TensorFiles
from gpt.config import TrainConfig
from gpt.model.loss import cross_entropy, summed_loss
from gpt.model.moe import set_auxiliary_scale
from gpt.parallel.distributed import World
from gpt.parallel.optimizer import build_optimizer, clip_gradients
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims


class TorchEngine:
    """A model parallelized by torch; each strategy overrides what it does differently.

    Args:
        module: the module that is called.
        trained: the module that the optimizer steps and checkpoints store: ``module``, or this rank's shard of it.
        config: of the run.
        world: all ranks.
        dims: the parallel dimensions.
        batch: the split of the global batch.
        averaged: number of ranks over which the strategy averages gradients; 1 where it sums them.
    """

    layer_group: dist.ProcessGroup | None = None
    criterion: Callable[[Tensor, Tensor], Tensor] = staticmethod(cross_entropy)
    """Summed loss of logits and targets."""
    loss_weight: float = 1.0
    """1, or 0 where another rank computes and reports the loss of the same tokens."""
    files: Format = TensorFiles()

    def __init__(
        self,
        module: nn.Module,
        trained: nn.Module,
        config: TrainConfig,
        world: World,
        dims: ParallelDims,
        batch: Batch,
        averaged: int,
    ) -> None:
        self.module, self.trained = module, trained
        self.config, self.world, self.dims, self.batch = config, world, dims, batch
        self.optimizer = build_optimizer(trained, config.optim)
        self.scale = averaged / (batch.global_batch * config.model.block_size)
        # Tensor-parallel ranks route the same tokens and their gradients are summed; each context-parallel rank has the
        # mean over its own tokens.
        set_auxiliary_scale(module, averaged / (batch.global_batch * dims.tp * dims.cp))

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        self.module.zero_grad(set_to_none=True)
        num_micro_batches, micro = self.batch.accumulation, self.batch.micro
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i in range(num_micro_batches):
            on_micro_batch()
            part = slice(i * micro, (i + 1) * micro)
            with self.micro_batch_context(last=i == num_micro_batches - 1):
                loss = self.micro_batch_loss(tokens_BT[part], targets_BT[part])
                (loss * self.scale).backward()
            loss_sum += loss.detach()
        return loss_sum * self.loss_weight

    def micro_batch_context(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of a micro-batch. Gradients are reduced over ranks in the ``last`` one of a step only."""
        return nullcontext()

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self.micro_batch_loss(tokens_BT, targets_BT) * self.loss_weight

    def micro_batch_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed loss of one forward pass, () fp32, on every rank that takes part in it."""
        return summed_loss(self.module, self.config, tokens_BT, targets_BT, self.world.device, self.criterion)

    def update(self, lr: float) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self.clip(self.config.optim.grad_clip)
        self.optimizer.step()
        return norm

    def clip(self, limit: float) -> Tensor:
        """Clip the gradients to a global norm of ``limit`` (0: leave them); return the norm they had, ()."""
        return clip_gradients(self.module, limit)

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None:
                yield name.removeprefix("module."), parameter.grad, 1 / self.world.size

    def state(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.trained, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        # The stored parameter groups name the parameters of one rank, which differ between pipeline stages. Everything
        # else in them comes from the config.
        groups = get_optimizer_state_dict(self.trained, self.optimizer)["param_groups"]
        optimizer = {"state": state["optimizer"]["state"], "param_groups": groups}
        set_state_dict(self.trained, self.optimizer, model_state_dict=state["model"], optim_state_dict=optimizer)

    def begin(self) -> None:
        # get_state_dict initializes the optimizer by a step with zero gradients, which AdamW would count as its first.
        self.optimizer.state.clear()
