"""DeepSpeed's engine: data ranks that share what ``parallel.zero_stage`` says (ZeRO, arXiv 1910.02054).

Owns the passes, the step and their scale. DeepSpeed averages gradients over the data ranks, clips them and steps; it is
given torch's AdamW with our two groups, and the rate of each step. The model stays our own object, its parameters by
their own names; from stage 1 on a parameter no longer has a ``grad``, and in stage 3 it is empty between passes.

Shapes: B sequences, T tokens of one.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.utils import get_total_norm

from gpt.batch import Batch
from gpt.checkpoint.formats import Format, TensorFiles
from gpt.config import TrainConfig
from gpt.execution import replace_forward
from gpt.loss import autocast, cross_entropy
from gpt.model.gpt import GPT
from gpt.model.moe import set_auxiliary_scale
from gpt.optim import build_optimizer
from gpt.parallel.deepspeed.config import casts_weights, ds_config, pieces_of
from gpt.parallel.deepspeed.files import TensorReader, ZeroFiles
from gpt.parallel.deepspeed.shards import Shards, local_gradient
from gpt.parallel.deepspeed.start import load_deepspeed, set_timeouts
from gpt.parallel.world import World
from gpt.topology import Topology


class ZeroEngine:
    """A model whose training state DeepSpeed spreads over the data ranks."""

    layer_group: dist.ProcessGroup | None = None

    def __init__(self, model: GPT, config: TrainConfig, world: World, layout: Topology, batch: Batch) -> None:
        deepspeed = load_deepspeed(world)
        self.module: nn.Module = model
        self.config, self.world, self.layout, self.batch = config, world, layout, batch
        self.stage = config.parallel.zero_stage or 0
        self.scale = layout.data_ranks / (batch.global_batch * config.model.block_size)
        set_auxiliary_scale(model, layout.data_ranks / batch.global_batch)
        casts = casts_weights(config)
        first = {name: p.detach().to("cpu", copy=True) for name, p in model.named_parameters()} if casts else {}
        # Inside the model, since DeepSpeed switches off an autocast that is on around it, on GPUs only.
        replace_forward(model, partial(in_autocast, model.forward, config, world.device))
        settings = ds_config(config, batch)
        with redirect_stdout(io.StringIO()):  # it prints how much memory there is, again and again
            self.ds, *_ = deepspeed.initialize(
                model=model,
                optimizer=build_optimizer(model, config.optim, torch.optim.AdamW),
                config=deepcopy(settings),  # it adds to what it is given
                dist_init_required=False,
            )
        set_timeouts(config.parallel.timeout_s)
        self.files: Format = ZeroFiles(pieces_of(settings)) if self.stage else TensorFiles()
        self.shards = Shards(self.ds, dict(model.named_parameters()))
        if casts:
            # DeepSpeed made the fp32 masters from weights that it had rounded to bf16 already.
            self.shards.set_weights(first.__getitem__)

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_pass: Callable[[], None]) -> Tensor:
        passes, micro = self.batch.accumulation, self.batch.micro
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for i in range(passes):
            on_pass()
            part = slice(i * micro, (i + 1) * micro)
            loss = self.loss(tokens_BT[part], targets_BT[part])
            self.ds.backward(loss * self.scale, scale_wrt_gas=False)
            if i < passes - 1:
                self.ds.step()  # counts the pass; the last one steps the weights
            loss_sum += loss.detach()
        return loss_sum

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        device = self.world.device
        logits_BTV = self.ds(tokens_BT.to(device, non_blocking=True))
        return cross_entropy(logits_BTV, targets_BT.to(device, non_blocking=True))

    def update(self, lr: float) -> Tensor:
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        whole = [p.grad for p in self.module.parameters() if p.grad is not None] if self.stage == 0 else []
        norm = get_total_norm(whole) if whole else None  # stage 0 clips, and does not tell
        self.ds.step()
        return torch.as_tensor(self.ds.get_global_grad_norm() if norm is None else norm, device=self.world.device)

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        for name, parameter in self.module.named_parameters():
            part = local_gradient(parameter)
            if part is not None:
                yield name, part.to(self.world.device), 1 / self.world.size if self.stage == 0 else 1.0

    def state(self) -> Any:
        """The engine itself, whose files are DeepSpeed's; in stage 0 what torch has, as with ddp."""
        if self.stage:
            return self
        model, optimizer = get_state_dict(self.module, self.ds.basic_optimizer)
        return {"model": model, "optimizer": optimizer}

    def load(self, state: Any) -> None:
        if not self.stage:
            set_state_dict(
                self.module,
                self.ds.basic_optimizer,
                model_state_dict=state["model"],
                optim_state_dict=state["optimizer"],
            )

    def begin(self) -> None:
        if not self.stage:
            self.ds.basic_optimizer.state.clear()

    def take(self, tensors: TensorReader, steps: int) -> None:
        """Take over the state after ``steps`` from whole tensors."""
        buffers = persistent_buffers(self.module)
        tensors.refuse_others({*self.shards.parameters, *buffers})
        self.shards.set_weights(tensors.weight)
        self.shards.set_moments(tensors.moment, steps)
        for name, buffer in buffers.items():
            buffer.copy_(tensors.weight(name))

    def about(self) -> dict[str, Any]:
        """Shapes of the parameters, and the buffers that belong to the model, by name."""
        shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self.shards.parameters.items()}
        return {"shapes": shapes, "buffers": persistent_buffers(self.module)}


def persistent_buffers(module: nn.Module) -> dict[str, Tensor]:
    """The buffers that a checkpoint holds."""
    stored = module.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in module.named_buffers() if name in stored}


def in_autocast(forward: Callable[..., Any], config: TrainConfig, device: torch.device, *args: Any) -> Any:
    """``forward`` in the precision of the run."""
    with autocast(config, device):
        return forward(*args)
