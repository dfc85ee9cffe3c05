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
from gpt.model.gpt import summed_loss
from gpt.model.layers import cross_entropy
from gpt.parallel.distributed import WORLD, World
from gpt.parallel.modules import compile_loss, inverse_replicas, local_tensor
from gpt.parallel.optimizer import build_optimizer, skipping
from gpt.topology import Batch, ParallelDims

# Clipping of gradients to a global norm, in one all-reduce with the figures of the step.
#
# The sums for the update and the sums for the records wait for the same ranks at the same place, so they travel
# together. Meanwhile the host has other work to do.


class Clipped(NamedTuple):
    """Result of ``Engine.clip``, the same on all ranks."""

    norm: Tensor | None
    """Global norm of the gradients before clipping, (); None if the optimizer clips them itself."""
    sums: Tensor
    """The figures that each rank has passed to ``Engine.clip``, summed over all ranks, (N,) float64."""
    flaw: Tensor
    """() float64: 0, or NaN if gradients are not finite on some rank."""


def clip_replica(
    parameters: Iterable[nn.Parameter], limit: float, world: World, figures_N: Tensor, meanwhile: Callable[[], None]
) -> Clipped:
    """Clip gradients that are whole and equal on all ranks, in place. Collective.

    Args:
        parameters: parameters whose gradients are clipped.
        limit: largest global norm after clipping; 0 does not clip.
        world: all ranks.
        figures_N: numbers of this rank, float64, which are summed over all ranks.
        meanwhile: called while the ranks compute the sum.
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
    """Clip sharded gradients, in place. Collective.

    Args:
        gradients: for each gradient its name, this rank's shard, and 1 / (number of ranks with the same shard). With
            this factor every element counts once in the sum over all ranks.
        limit: largest global norm after clipping; 0 does not clip.
        world: all ranks.
        figures_N: numbers of this rank, float64, which are summed over all ranks.
        meanwhile: called while the ranks compute the sum.
        waits_as: name under which the timeline records the wait for the sum.
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
    """Return a tensor () float64: 0 if ``norm`` is finite, else NaN."""
    return norm.double() * 0.0


# Dynamic loss scale of fp16 (arXiv 1710.03740, section 3.2): small gradients survive, and overflowing steps are
# skipped.
#
# A step overflows if the ranks have agreed to skip it, as they do in any precision (gpt/training/step.py). All of this
# stays on the device, so that no rank waits. The arithmetic is that of torch.amp.GradScaler, which looks at the
# gradients of one rank only.


INITIAL = 2.0**16
GROWTH, BACKOFF = 2.0, 0.5
"""Numbers by which the loss scale is multiplied: after ``GROWTH_INTERVAL`` steps without overflow, and after an
overflow. They are powers of two, so that scaling causes no rounding."""
GROWTH_INTERVAL = 2000
"""Number of consecutive steps without overflow after which the scale grows. This number, ``INITIAL``,
``GROWTH`` and ``BACKOFF`` have the values of torch's GradScaler."""
MINIMUM = 1.0
"""Smallest loss scale. Gradients that overflow at this scale are too large without scaling: the run has diverged."""


class LossScale:
    """Loss scale that doubles after 2,000 steps without overflow, and halves if a step overflows."""

    def __init__(self, device: torch.device) -> None:
        self.scale = torch.full((), INITIAL, device=device)
        """Number by which the loss is multiplied, () fp32. The tensor object never changes, only its value."""
        self._steps = torch.zeros((), dtype=torch.int32, device=device)

    def unscale(self, gradients: list[Tensor]) -> None:
        """Divide gradients, which are all on one device, by the scale, in place."""
        torch._foreach_mul_(gradients, self.scale.reciprocal().to(gradients[0].device))

    def update(self, overflows: Tensor) -> None:
        """Change the scale after a step. ``overflows``, a bool tensor (), is true if the step was skipped."""
        torch._amp_update_scale_(self.scale, self._steps, overflows.to(self.scale), GROWTH, BACKOFF, GROWTH_INTERVAL)
        self.scale.clamp_(min=MINIMUM)

    def state(self) -> dict[str, float]:
        """Return the state for a checkpoint, as plain JSON. Waits for the device."""
        return {"scale": self.scale.item(), "steps": self._steps.item()}

    def load(self, state: dict[str, float]) -> None:
        """Restore a result of the method ``state``."""
        self.scale.fill_(state["scale"])
        self._steps.fill_(int(state["steps"]))


# Norms of sharded gradients.


def shared_squares(parts: Sequence[tuple[Tensor, float]]) -> tuple[Tensor, ...]:
    """Return for each shard its sum of squares, divided by the number of ranks that have the same shard, () float64.

    Each item of ``parts`` is a shard, and 1 / (number of ranks that have the same shard).
    """
    # float64 on the device: the squares of a whole model do not fit the digits of a float32.
    norms = torch.stack(torch._foreach_norm([part for part, _ in parts])).double()
    return times(norms.square(), [share for _, share in parts])


def times(values_N: Tensor, factors: Sequence[float]) -> tuple[Tensor, ...]:
    """Multiply N values on a device, (N,), by N numbers of the host. Return the N products, each ().

    The numbers are arguments of the kernel. As a tensor they would be copied to the device, and the host would wait.
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
    """Config of a run, its ranks, its parallel dimensions, and the split of its batch."""

    config: TrainConfig
    world: World
    dims: ParallelDims
    batch: Batch


class Engine:
    """A model parallelized over the ranks, with its optimizer, for the training loop. Every method is collective.

    Args:
        layout: config, ranks and batch of the run.
        averaged: number of ranks over which the strategy averages gradients; 1 if it sums them.
    """

    module: nn.Module
    """This rank's part of the model. Its parameters have the same names as in the whole model. A wrapper may add the
    prefix ``module.`` to them."""
    trained: nn.Module
    """The module whose parameters the optimizer updates and checkpoints store: ``module``, or a module with this rank's
    shards of its parameters."""
    files: TensorFiles
    """Checkpoint format of the state that the method ``state`` returns."""
    layer_group: dist.ProcessGroup | None = None
    """Process group of the ranks with the same layers (pipeline stage); None means all ranks."""
    timed_groups: tuple[str, ...] | None = None
    """Kinds of parallelism, such as ``tp``, whose waits the timeline of a step records. None if the run has no such
    kind, or if the timeline cannot record some of the waits."""
    loss_scale: LossScale | None = None
    """Loss scale of fp16; None in other precisions."""
    loss_weight: float = 1.0
    """Weight of this rank's loss in the sum over all ranks: 1, or 0 if another rank computes and reports the loss of
    the same tokens."""
    has_answers: bool = False
    """True if the corpus has conversations: then only the tokens of answers are targets. ``gpt.train`` sets this
    attribute after it has built the engine."""
    counted: Tensor | None = None
    """Number of targets in the global batch of the last step, () float64; None if every token has a target."""
    waits_as: str = WORLD
    """Name under which the timeline of a step records the wait in ``clip``."""

    def __init__(self, layout: RunLayout, averaged: int) -> None:
        self.config, self.world, self.dims, self.batch = layout.config, layout.world, layout.dims, layout.batch
        self.on_micro_batch: Callable[[], None] = lambda: None
        self._averaged = averaged
        self.scale: float | Tensor = averaged / (self.batch.global_batch * self.config.model.block_size)

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        """Compute the gradients of the mean loss over the global batch: forward and backward over all micro-batches.

        The gradients are then in the parameters of ``trained``, reduced over the ranks.

        Args:
            tokens_BT: sequences of this data-parallel rank, (per_rank, T).
            targets_BT: the next tokens, (per_rank, T).
            on_micro_batch: called before each micro-batch.

        Returns:
            This rank's part of the summed loss, () float64. The sum over all ranks counts each token once.
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
        """Compute gradients over all micro-batches. Return this rank's part of the summed loss, () float64."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i in range(self.batch.accumulation):
            self.on_micro_batch()
            part = slice(i * self.batch.micro, (i + 1) * self.batch.micro)
            loss_sum += self.run_micro_batch(tokens_BT[part], targets_BT[part], i == self.batch.accumulation - 1)
        return loss_sum

    def begin_backward(self) -> None:
        """Prepare the backward passes of a step."""

    def run_micro_batch(self, tokens_BT: Tensor, targets_BT: Tensor, last: bool) -> Tensor:
        """Compute gradients over a micro-batch. Return its summed loss, (). ``last`` is True for the last micro-batch
        of a step."""
        raise NotImplementedError

    def reduce_gradients(self) -> None:
        """Reduce gradients over the ranks after the last micro-batch, unless the backward passes have reduced them."""

    @property
    def gradient_factor(self) -> float | Tensor:
        """Number by which the summed loss of a micro-batch is multiplied before its backward pass: ``scale`` times the
        loss scale of fp16. ``scale`` turns a sum over tokens into a mean over the global batch."""
        return self.scale if self.loss_scale is None else self.scale * self.loss_scale.scale

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        """Clip the gradients to the norm ``optim.grad_clip``, and sum ``figures_N`` over all ranks, in one all-reduce.
        The host does not wait for the device.

        Args:
            figures_N: N numbers of this rank, float64.
            meanwhile: called once, while the ranks communicate.
        """
        limit = self.config.optim.grad_clip
        return clip_shards(self.gradients(), limit, self.world, figures_N, meanwhile, self.waits_as)

    def update(self, lr: float, skip: Tensor) -> Tensor | None:
        """Update the parameters with the learning rate ``lr``; change nothing if ``skip`` is true.

        ``skip`` is a bool tensor (), the same on all ranks.

        Returns:
            The global gradient norm, (), if ``clip`` returned None for the norm; otherwise None. The norm is not finite
            if the optimizer itself has skipped the update, on all ranks.
        """
        raise NotImplementedError

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return this rank's part of the summed loss of an evaluation, (). The batch is at most a micro-batch."""
        raise NotImplementedError

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        """Yield for each gradient the name of its parameter in the whole model, this rank's shard of the gradient, and
        1 / (number of ranks that have the same shard)."""
        for name, parameter in self.trained.named_parameters():
            if parameter.grad is not None:
                share = inverse_replicas(parameter.grad, self.owners(name))
                yield name.removeprefix("module."), local_tensor(parameter.grad), share

    def owners(self, name: str) -> int:
        """Return the number of ranks that have the parameter ``name``, or a shard of it."""
        return self.world.size

    def state(self) -> Any:
        """Return the state of model and optimizer for a checkpoint, as the format ``files`` needs it."""
        raise NotImplementedError

    def load(self, state: Any) -> None:
        """Restore model and optimizer from ``state``: a result of the method ``state``, filled from a checkpoint."""

    def begin(self) -> None:
        """Prepare a run that has loaded no checkpoint: clear the state of the optimizer.

        Before a load, the method ``state`` creates the state of the optimizer by a step with zero gradients. If no
        checkpoint can be loaded, the optimizer must not count this step.
        """

    def averaged_weights(self) -> AbstractContextManager[object]:
        """Return a context for evaluations, in which the parameters are the averaged weights of a schedule-free
        optimizer. With other optimizers the context does nothing."""
        return nullcontext()


class TorchEngine(Engine):
    """Base of the engines that torch parallelizes. Each engine overrides the methods in which it differs.

    Args:
        module: the module that is called for a forward pass.
        trained: the module whose parameters the optimizer updates and checkpoints store.
        layout: config, ranks and batch of the run.
        averaged: number of ranks over which the strategy averages gradients; 1 if it sums them.
    """

    criterion: Callable[[Tensor, Tensor], Tensor] = staticmethod(cross_entropy)
    """Function that computes the summed loss of logits and targets, ()."""

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
        """True if the optimizer is schedule-free: evaluations and checkpoints use its averaged weights."""
        self._parameters = tuple(module.parameters())
        # Tensor-parallel ranks route the same tokens, and their gradients are summed. Each context-parallel rank has
        # the mean over its own tokens.
        per_sequence = averaged / (self.batch.global_batch * self.dims.tp * self.dims.cp)
        set_auxiliary_scale(module, per_sequence, None if self.loss_scale is None else self.loss_scale.scale)

    def sync_context(self, last: bool) -> AbstractContextManager[object]:
        """Return a context for forward and backward of a micro-batch. Gradients are reduced over the ranks only in the
        ``last`` micro-batch of a step."""
        return nullcontext()

    def begin_backward(self) -> None:
        """Set the gradients of the last step to None.

        The engine lists the parameters once, when it is built. A walk over the modules would take 0.3 % of each step of
        a small model, and would miss parameters that FSDP has replaced by all-gathered ones.
        """
        for parameter in self._parameters:
            parameter.grad = None

    def run_micro_batch(self, tokens_BT: Tensor, targets_BT: Tensor, last: bool) -> Tensor:
        with self.sync_context(last):
            loss = self._micro_batch_loss(tokens_BT, targets_BT)
            self._run_backward(loss * self.gradient_factor, last)
        return loss.detach()

    def _run_backward(self, loss: Tensor, last: bool) -> None:
        """Run the backward pass of a micro-batch from its scaled loss, (). ``last`` is True for the last micro-batch of
        a step."""
        loss.backward()

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self._micro_batch_loss(tokens_BT, targets_BT) * self.loss_weight

    def _micro_batch_loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Run a forward pass. Return its summed loss, () fp32."""
        own = self.local_tokens(tokens_BT), self.local_tokens(targets_BT)
        return summed_loss(self.module, self.config, *own, self.world.device, self.criterion)

    def local_tokens(self, x_BT: Tensor) -> Tensor:
        """Select this rank's part of the tokens or targets of each sequence, (B, T). With context parallelism the rank
        has some of the T positions, otherwise all."""
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
        """All-gather replicated parameters of which each rank has updated only its shard. Collective."""

    def state(self) -> dict[str, Any]:
        with self.averaged_weights():
            model, optimizer = get_state_dict(self.trained, self.optimizer)
            if self.averages:  # training continues with other weights before those of the checkpoint are written
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
