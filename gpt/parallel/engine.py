"""The engine: a parallelized model, its optimizer, clipping of gradients, the loss scale of fp16, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from gpt.checkpoint.formats import TensorFiles
from gpt.config import Pack, Precision, TrainConfig
from gpt.config.optim import SCHEDULE_FREE
from gpt.model.ffn import set_auxiliary_scale
from gpt.model.layers import cross_entropy, summed_loss
from gpt.parallel.distributed import WORLD, World
from gpt.parallel.modules import compile_loss, inverse_replicas, local_tensor
from gpt.parallel.optimizer import build_optimizer, skipping
from gpt.topology import Batch, ParallelDims

# Clipping of gradients to a global norm, in one all-reduce with the figures of the step.
#
# The sums for the update and the sums for the records wait for the same ranks at the same place, so they travel
# together. Meanwhile the host has other work to do.


class Clipped(NamedTuple):
    """Result of ``Engine.clip``: gradient norm and summed figures of a step, known to all ranks before the update."""

    norm: Tensor | None
    """Global norm of the gradients before they were clipped, (); None if the optimizer clips in its step."""
    sums: Tensor
    """Figures of the step, summed over all ranks, (N,) float64."""
    flaw: Tensor
    """0; NaN if gradients are not finite on some rank. () float64, the same on all ranks."""


def clip_replica(
    parameters: Iterable[nn.Parameter], limit: float, world: World, figures_N: Tensor, meanwhile: Callable[[], None]
) -> Clipped:
    """Clip whole gradients, which are equal on all ranks, to the norm ``limit``; 0 does not clip. Collective.

    ``figures_N``, N numbers of this rank, float64, are summed over all ranks. ``meanwhile`` is called during the sum.
    """
    parameters = [p for p in parameters if p.grad is not None]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Replicas have the same gradients. A replica with other numbers must not be alone in skipping the step.
    pending = world.start_all_reduce(torch.cat([flaw_of(norm).unsqueeze(0), figures_N]))
    if limit > 0:
        clip_grads_with_norm_(parameters, limit, norm)
    meanwhile()
    flaw, sums = pending.wait().tensor_split([1])
    return Clipped(norm, sums, flaw.squeeze(0))


def clip_shards(
    gradients: Iterable[tuple[str, Tensor, float]],
    limit: float,
    world: World,
    figures_N: Tensor,
    meanwhile: Callable[[], None],
    waits_as: str = WORLD,
) -> Clipped:
    """Clip sharded gradients to the global norm ``limit``; 0 does not clip. Collective.

    Each item of ``gradients`` is a name, this rank's shard, and 1 / (number of ranks that have the same shard).
    With that factor, every element counts once in the sum over all ranks. The timeline of a step records the wait for
    the other ranks under the name ``waits_as``. For ``figures_N`` and ``meanwhile`` see ``Engine.clip``.
    """
    parts = [(part, share) for _, part, share in gradients]
    # Gradients may be offloaded to the host; collectives run on the device. The squares come first, since the number of
    # figures differs between steps. The place of an element may decide the order of its sum over the ranks.
    squares = torch.stack(shared_squares(parts)).sum().to(world.device)
    pending = world.start_all_reduce(torch.cat([squares.unsqueeze(0), figures_N]))
    meanwhile()
    squares, sums = pending.wait(waits_as).tensor_split([1])
    norm = squares.squeeze(0).sqrt()
    if limit > 0:
        factor = (limit / (norm + 1e-6)).clamp(max=1.0)
        torch._foreach_mul_([part for part, _ in parts], factor.to(parts[0][0]))
    return Clipped(norm, sums, flaw_of(norm))


def flaw_of(norm: Tensor) -> Tensor:
    """Return 0 if ``norm`` is finite, else NaN; () float64."""
    return norm.double() * 0.0


# Dynamic loss scale of fp16 (arXiv 1710.03740, section 3.2): small gradients survive, and overflowing steps are
# skipped.
#
# A step overflows if the ranks have agreed to skip it, as they do in any precision (gpt/training/step.py). All of this
# stays on the device, so that no rank waits. The arithmetic is that of torch.amp.GradScaler, which looks at the
# gradients of one rank only.


INITIAL = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
"""Factors of the loss scale: after ``GROWTH_INTERVAL`` steps without overflow, and after an overflow. They are powers
of two, so scaling and unscaling cause no rounding."""
GROWTH_INTERVAL = 2000
"""Steps in a row without overflow after which the scale grows. This number and the three numbers above are those of
torch."""
MINIMUM = 1.0
"""Smallest scale. At this scale gradients are not scaled up, so if they overflow, the run has diverged."""


class LossScale:
    """Loss scale that doubles after 2,000 steps without overflow, and halves if a step overflows."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        """Factor of the loss, () fp32; the tensor is changed in place only."""
        self._steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide gradients (this rank's shards, all on one device) by the scale, in place."""
        torch._foreach_mul_(gradients, self.scale.reciprocal().to(gradients[0].device))

    def update(self, overflows: Tensor) -> None:
        """Adapt the scale after a step; ``overflows``, a bool (), is true if the step was skipped."""
        torch._amp_update_scale_(self.scale, self._steps, overflows.to(self.scale), GROWTH, BACKOFF, GROWTH_INTERVAL)
        self.scale.clamp_(min=MINIMUM)

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, in numbers that JSON stores exactly. Waits for the device."""
        return {"scale": self.scale.item(), "steps": self._steps.item()}

    def load(self, state: dict[str, float]) -> None:
        """Restore what ``state`` has returned."""
        self.scale.fill_(state["scale"])
        self._steps.fill_(int(state["steps"]))


# Norms of sharded gradients.


def shared_squares(parts: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, ...]:
    """Return the sum of squares of each shard, divided by the number of the shard's replicas; each () float64.

    Each item of ``parts`` is a shard, and 1 / (number of its replicas).
    """
    # float64 on the device: the squares of a whole model do not fit the digits of a float32.
    norms = torch.stack(torch._foreach_norm([part for part, _ in parts])).double()
    return times(norms.square(), [share for _, share in parts])


def times(values_N: Tensor, factors: Sequence[float]) -> tuple[Tensor, ...]:
    """Multiply each of N values on a device by a number of the host; each product is ().

    The factors are arguments of the kernel: a tensor of them would be copied to the device, and the host would wait.
    """
    return tuple(torch._foreach_mul(values_N.unbind(), list(factors)))


# The engine: a parallelized model with its optimizer, as the training loop sees it.
#
# An engine is applied to a finished model from outside; the model contains no code for parallelism. The engines are DDP
# and ZeRO-1 (ddp.py), ND parallelism (nd.py), pipelines (pipeline.py) and DeepSpeed's (zero.py). gpt/train.py chooses
# one.
#
# Shapes: B sequences, T tokens of each.


@dataclass(frozen=True)
class RunLayout:
    """Config of a run, its ranks, and how these share the model and the batch."""

    config: TrainConfig
    world: World
    dims: ParallelDims
    batch: Batch


class Engine:
    """A model parallelized over the ranks, and its optimizer. Every method is collective.

    Args:
        layout: config, ranks and batch of the run.
        averaged: number of ranks over which the strategy averages gradients; 1 if it sums them.
    """

    module: nn.Module
    """This rank's part of the model, with the parameter names of the whole model (maybe after ``module.``)."""
    trained: nn.Module
    """The module that the optimizer steps and checkpoints store: ``module``, or this rank's shard of it."""
    files: TensorFiles
    """The checkpoint format of the state that ``state()`` returns."""
    layer_group: dist.ProcessGroup | None = None
    """The ranks that have the same layers (the same pipeline stage); None means all ranks."""
    timed_groups: tuple[str, ...] | None = None
    """Groups whose waits ``gpt.parallel.distributed`` records; None if there are none, or if some waits cannot be
    recorded."""
    loss_scale: LossScale | None = None
    """Loss scale of fp16, for records and checkpoints; None in other precisions."""
    loss_weight: float = 1.0
    """1, or 0 if another rank computes and reports the loss of the same tokens."""
    has_answers: bool = False
    """True if only tokens of answers are targets. ``gpt.train`` sets this after it has opened the token files."""
    counted: Tensor | None = None
    """Number of targets in the global batch of the last step, () float64; None if every token has a target."""
    waits_as: str = WORLD
    """Name under which the timeline of a step records the wait of ``clip``."""

    def __init__(self, layout: RunLayout, averaged: int) -> None:
        self.config, self.world, self.dims, self.batch = layout.config, layout.world, layout.dims, layout.batch
        self.on_micro_batch: Callable[[], None] = lambda: None
        self._averaged = averaged
        self.scale: float | Tensor = averaged / (self.batch.global_batch * self.config.model.block_size)

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        """Run forward and backward over all micro-batches; leave the gradients of the mean loss over the global batch.

        Args:
            tokens_BT: this data-parallel rank's sequences of the global batch, (per_rank, T).
            targets_BT: the next tokens, (per_rank, T).
            on_micro_batch: called before each micro-batch.

        Returns:
            This rank's part of the summed loss, () float64: over all ranks each token counts once.
        """
        self.on_micro_batch = on_micro_batch
        if self.has_answers or self.config.data.pack is Pack.documents:
            mine = (targets_BT >= 0).sum().double().to(self.world.device)
            # Targets of the global batch. Model-parallel ranks have the same sequences: each one is counted once.
            self.counted = self.world.all_reduce(mine) * self.batch.ranks / self.world.size
            self.scale = (self._averaged / self.counted.clamp(min=1)).float()
        self.begin_backward()
        loss_sum = self.run_micro_batches(tokens_BT, targets_BT)
        self.reduce_gradients()
        self.on_micro_batch = lambda: None  # a pipeline also calls it in evaluations
        if self.loss_scale is not None:
            self.loss_scale.unscale([local_tensor(p.grad) for p in self.trained.parameters() if p.grad is not None])
        return loss_sum * self.loss_weight

    def run_micro_batches(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Run forward and backward over all micro-batches; return this rank's part of the summed loss, () float64."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i in range(self.batch.accumulation):
            self.on_micro_batch()
            part = slice(i * self.batch.micro, (i + 1) * self.batch.micro)
            loss_sum += self.run_micro_batch(tokens_BT[part], targets_BT[part], i == self.batch.accumulation - 1)
        return loss_sum

    def begin_backward(self) -> None:
        """Prepare the backward passes of a step."""

    def run_micro_batch(self, tokens_BT: Tensor, targets_BT: Tensor, last: bool) -> Tensor:
        """Run forward and backward of a micro-batch; return the summed loss, (). ``last``: it is the last one of a
        step."""
        raise NotImplementedError

    def reduce_gradients(self) -> None:
        """Reduce over the ranks the gradients that backward passes did not reduce, after the last micro-batch."""

    @property
    def gradient_factor(self) -> float | Tensor:
        """Number by which the summed loss of a micro-batch is multiplied before its backward pass.

        It is ``scale``, which turns sums over tokens into means over the global batch, times the loss scale of fp16.
        """
        return self.scale if self.loss_scale is None else self.scale * self.loss_scale.scale

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        """Clip the gradients to ``optim.grad_clip``, and sum figures of the step over all ranks, without a device sync.

        Args:
            figures_N: N numbers of this rank, float64. If the norm needs an all-reduce, it sums these numbers, too.
            meanwhile: called once, while the ranks communicate.
        """
        limit = self.config.optim.grad_clip
        return clip_shards(self.gradients(), limit, self.world, figures_N, meanwhile, self.waits_as)

    def update(self, lr: float, skip: Tensor) -> Tensor | None:
        """Step the optimizer; change nothing if ``skip`` is true, a bool () that is the same on all ranks.

        Returns:
            The global gradient norm, (), if ``clip`` returned no norm; otherwise None. The norm is not finite if the
                optimizer itself has skipped the step, which it does on all ranks.
        """
        raise NotImplementedError

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return this rank's part of the summed loss of at most a micro-batch, (); for evaluation."""
        raise NotImplementedError

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yield each gradient as (name, shard, share), by the parameter's name in the whole model.

        The shard is that of this rank; the share is 1 / (number of ranks that have the same shard).
        """
        for name, parameter in self.trained.named_parameters():
            if parameter.grad is not None:
                share = inverse_replicas(parameter.grad, self.owners(name))
                yield name.removeprefix("module."), local_tensor(parameter.grad), share

    def owners(self, name: str) -> int:
        """Return the number of ranks that have the parameter ``name``, or a shard of it."""
        return self.world.size

    def state(self) -> Any:
        """Return the state of model and optimizer in the layout that the checkpoint format ``files`` writes."""
        raise NotImplementedError

    def load(self, state: Any) -> None:
        """Restore model and optimizer from ``state``, a result of ``state()`` that a checkpoint has filled."""

    def begin(self) -> None:
        """Prepare a run without checkpoint: reset the optimizer's state, which ``state()`` may have initialized."""

    def averaged_weights(self) -> AbstractContextManager[object]:
        """Return the context of an evaluation, in which parameters are the averages of a schedule-free optimizer."""
        return nullcontext()


class TorchEngine(Engine):
    """A model parallelized by torch; each strategy overrides the methods in which it differs.

    Args:
        module: the module that is called for a forward pass.
        trained: the module that the optimizer steps and checkpoints store.
        layout: config, ranks and batch of the run.
        averaged: number of ranks over which the strategy averages gradients; 1 if it sums them.
    """

    criterion: Callable[[Tensor, Tensor], Tensor] = staticmethod(cross_entropy)
    """Summed loss of logits and targets."""

    def __init__(self, module: nn.Module, trained: nn.Module, layout: RunLayout, averaged: int) -> None:
        super().__init__(layout, averaged)
        self.module, self.trained = module, trained
        if self.criterion is cross_entropy:
            self.criterion = compile_loss(self.config)
        self.files = TensorFiles()
        if self.config.precision is Precision.fp16:
            self.loss_scale = LossScale(self.world.device)
        self.optimizer = build_optimizer(
            trained, self.config.optim, fused=self.loss_scale is not None, world=self.world
        )
        self.averages = self.config.optim.optimizer == SCHEDULE_FREE
        """True if the optimizer is schedule-free: evaluations and checkpoints have its averaged weights."""
        self._parameters = tuple(module.parameters())
        # Tensor-parallel ranks route the same tokens, and their gradients are summed. Each context-parallel rank has
        # the mean over its own tokens.
        per_sequence = averaged / (self.batch.global_batch * self.dims.tp * self.dims.cp)
        set_auxiliary_scale(module, per_sequence, None if self.loss_scale is None else self.loss_scale.scale)

    def sync_context(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of a micro-batch. Only in the ``last`` one of a step may the backward pass reduce
        gradients."""
        return nullcontext()

    def begin_backward(self) -> None:
        """Set the gradients of the last step to None.

        The engine lists the parameters once, when it is built. A walk over the modules would take 0.3% of each step
        of a small model. It would also miss parameters that FSDP has replaced by all-gathered ones.
        """
        for parameter in self._parameters:
            parameter.grad = None

    def run_micro_batch(self, tokens_BT: Tensor, targets_BT: Tensor, last: bool) -> Tensor:
        with self.sync_context(last):
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

    def update(self, lr: float, skip: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with skipping(self.optimizer, skip):
            self.optimizer.step()
        if self.loss_scale is not None:
            self.loss_scale.update(skip)

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        if self.averages:
            self.optimizer.eval()  # type: ignore[attr-defined]
            self.gather_stepped()
        yield
        if self.averages:
            self.optimizer.train()  # type: ignore[attr-defined]
            self.gather_stepped()

    def gather_stepped(self) -> None:
        """Gather the parameters of which each rank has changed its shard."""

    def state(self) -> dict[str, Any]:
        with self.averaged_weights():
            model, optimizer = get_state_dict(self.trained, self.optimizer)
            if self.averages:  # training goes on with other weights before those of the checkpoint are written
                model = {name: cast(Tensor, tensor).clone() for name, tensor in model.items()}
        return {"model": model, "optimizer": optimizer}

    def load(self, state: dict[str, Any]) -> None:
        # The stored parameter groups name the parameters of one rank, which differ between pipeline stages. Their other
        # values come from the config.
        groups = get_optimizer_state_dict(self.trained, self.optimizer)["param_groups"]
        optimizer = {"state": state["optimizer"]["state"], "param_groups": groups}
        set_state_dict(self.trained, self.optimizer, model_state_dict=state["model"], optim_state_dict=optimizer)
        if self.averages:
            counts = {key: state["optimizer"]["param_groups"][0][key] for key in ("k", "weight_sum", "lr_max")}
            for group in self.optimizer.param_groups:
                group.update(counts, train_mode=False)
            self.optimizer.train()  # type: ignore[attr-defined]

    def begin(self) -> None:
        # get_state_dict initializes the optimizer by a step with zero gradients, which AdamW would count as its first.
        self.optimizer.state.clear()
        if self.averages:
            self.optimizer.train()  # type: ignore[attr-defined]
