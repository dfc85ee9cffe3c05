"""DeepSpeed's ZeRO (arXiv 1910.02054): the engine, and gradients, weights and moments of a rank's shards."""

from __future__ import annotations

import io
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from gpt.checkpoint.formats import Format, TensorFiles
from gpt.config import Precision, Recompute, TrainConfig
from gpt.model.ffn import set_auxiliary_scale
from gpt.model.gpt import GPT, Block
from gpt.model.loss import autocast, cross_entropy
from gpt.parallel.compile import replace_forward
from gpt.parallel.deepspeed.checkpoint import TensorReader, ZeroFiles
from gpt.parallel.distributed import World, set_timeouts
from gpt.parallel.engine import accumulate
from gpt.parallel.optimizer import (
    Clipped,
    DynamicLossScale,
    LossScale,
    build_optimizer,
    clip_shards,
    skipping,
    sum_figures,
)
from gpt.topology import Batch, ParallelDims
from gpt.topology.deepspeed_config import casts_weights, checkpoint_settings, ds_config

# A rank's shards under ZeRO: gradients read from them, fp32 master weights and moments written into them.
#
# Stages 1 and 2 of DeepSpeed flatten the parameters of a group and shard the flat tensor; stage 3 shards each
# parameter. Both pad at the end. fp32 masters and moments are further flat tensors. In stage 0 everything is where
# torch keeps it. ``Shards`` uses DeepSpeed's internals because ``deepspeed.utils.safe_set_*`` know no moments before
# the first step, and no padding.


MOMENTS = ("exp_avg", "exp_avg_sq")
"""Keys of AdamW's state that have the size of the parameter."""


class Shards:
    """The sharded training state of a DeepSpeed engine, by parameter names in the whole model."""

    def __init__(self, ds: Any, parameters: dict[str, nn.Parameter]) -> None:
        self.ds, self.parameters = ds, parameters
        self.optimizer = ds.optimizer
        self.stage = ds.zero_optimization_stage()

    def holds(self, name: str) -> bool:
        """True if this rank has a shard of the parameter's state."""
        return self.stage in (0, 3) or self.parameters[name]._hp_mapping is not None  # type: ignore[attr-defined]

    @torch.no_grad()
    def set_masters(self, whole: Callable[[str], Tensor]) -> None:
        """Set the master weights from ``whole``, which returns a whole fp32 parameter by name.

        The weights used in computing change only with ``update_from_masters``.
        """
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # re-partitions gathered parameters
        for name, parameter in self.parameters.items():
            if self.holds(name):
                self._set(parameter, whole(name), None)

    @torch.no_grad()
    def set_moments(self, whole: Callable[[str, str], Tensor], steps: int) -> None:
        """Set AdamW's moments after ``steps`` from ``whole``, which returns one by parameter name and key."""
        self.create_moments(steps)
        for name, parameter in self.parameters.items():
            if self.holds(name):
                for key in MOMENTS:
                    self._set(parameter, whole(name, key), key)

    def create_moments(self, steps: int) -> None:
        """Create zero moments, as AdamW does in its first step."""
        base = self.ds.basic_optimizer
        flat = self.optimizer.fp32_partitioned_groups_flat if self.stage == 3 else None
        for group in base.param_groups:
            counted_there = group.get("fused") or group.get("capturable")
            for tensor in group["params"] if flat is None else flat:
                where = tensor.device if counted_there else torch.device("cpu")
                count = torch.tensor(float(steps), dtype=torch.float32, device=where)
                base.state[tensor] = {"step": count} | {key: torch.zeros_like(tensor) for key in MOMENTS}
        if self.stage in (1, 2):
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _set(self, parameter: Any, whole: Tensor, key: str | None) -> None:
        """Copy this rank's shard of ``whole`` into the masters, or into the moment ``key``."""
        if self.stage == 3:
            size, rank = parameter.ds_tensor.numel(), self.optimizer._get_param_partition_rank(parameter)
            piece = whole.flatten()[rank * size : (rank + 1) * size]
            piece = F.pad(piece, (0, size - piece.numel()))
            self.optimizer.set_local_hp_param(piece, parameter, key)
        elif self.stage:
            parameter.set_full_hp_param(whole, key)
        elif key is None:
            parameter.copy_(whole)
        else:
            self.ds.basic_optimizer.state[parameter][key].copy_(whole)

    @torch.no_grad()
    def update_from_masters(self) -> None:
        """Update the weights used in computing from the masters. Collective."""
        if self.stage == 3:
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self.optimizer.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
            self.optimizer.checkpoint_event_epilogue()
        elif self.stage:
            self.optimizer.update_lp_params()


def local_gradient(parameter: Any) -> Tensor | None:
    """Return this rank's shard of a gradient, between backward pass and step; None if it has none."""
    if hasattr(parameter, "ds_id"):
        return parameter._z3_optimizer.get_local_fp32_grad_for_param(parameter)
    if not hasattr(parameter, "_hp_mapping"):
        return parameter.grad
    mapping = parameter._hp_mapping
    if mapping is None:
        return None
    piece = mapping.get_lp_grad_fragment(parameter._index_in_param_group).flatten()
    address = mapping.lp_fragment_address
    if piece.numel() == parameter.numel():  # the bf16 optimizer keeps whole gradients
        piece = piece[address.start : address.start + address.numel]
    return piece


# DeepSpeed's ZeRO: training state sharded over data ranks by ``parallel.zero_stage`` (arXiv 1910.02054).
#
# DeepSpeed averages gradients over the data ranks, clips them and steps. It gets torch's AdamW with two parameter
# groups, and the learning rate of each step. The model stays our own object, and its parameters keep their names. From
# stage 1 on a parameter has no ``grad``. In stage 3 a parameter is empty between forward and backward passes.
#
# Shapes: B sequences, T tokens of each.


class ZeroEngine:
    """A model whose training state DeepSpeed shards over the data ranks."""

    layer_group: dist.ProcessGroup | None = None
    timed_groups: tuple[str, ...] | None = None  # DeepSpeed communicates by itself

    def __init__(self, model: GPT, config: TrainConfig, world: World, dims: ParallelDims, batch: Batch) -> None:
        import deepspeed

        self.config, self.world, self.dims, self.batch = config, world, dims, batch
        self.stage = config.parallel.zero_stage or 0
        self.scale = dims.data_ranks / (batch.global_batch * config.model.block_size)
        fp16, casts = config.precision is Precision.fp16, casts_weights(config)
        # In ZeRO-0 the weights are fp32, and DeepSpeed uses no loss scale.
        self._dynamic = DynamicLossScale(world.device) if fp16 and not casts else None
        self._auxiliary = torch.ones((), device=world.device) if fp16 and casts else None
        """Copy of DeepSpeed's loss scale for the losses of routing, which enter the gradient by themselves."""
        factor = self._auxiliary if self._dynamic is None else self._dynamic.scale
        set_auxiliary_scale(model, dims.data_ranks / batch.global_batch, factor)
        module = self.module = self.prepare_module(model)
        first = {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters()} if casts else {}
        # Inside the model, since on GPUs DeepSpeed disables an autocast that is enabled around the model.
        replace_forward(module, partial(autocast_forward, module.forward, config, world.device))
        settings = ds_config(config, batch)
        if self.stage == 3 and (config.compiles or config.recompute is Recompute.selective):
            # The layers of a block are gathered together, not each by hooks inside the block. Such hooks can be neither
            # compiled nor recomputed selectively.
            deepspeed.utils.set_z3_leaf_modules(module, [Block])
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints the free memory again and again
            self.ds, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(module, config.optim, torch.optim.AdamW, fused=self._dynamic is not None),
                config=deepcopy(settings),  # DeepSpeed adds keys to the settings that it gets
                dist_init_required=False,
            )
        set_timeouts(config.parallel.timeout_s)
        self.files: Format = ZeroFiles(checkpoint_settings(settings) | {"pp": dims.pp}) if self.stage else TensorFiles()
        self.shards = Shards(self.ds, dict(module.named_parameters()))
        if casts:
            # DeepSpeed made the fp32 masters from weights that it had rounded to bf16 already.
            self.shards.set_masters(first.__getitem__)
            self.shards.update_from_masters()
        self.loss_scale: LossScale | None = self._dynamic
        if self._auxiliary is not None:
            self.loss_scale = ZeroLossScale(self.ds, self._auxiliary)

    def prepare_module(self, model: GPT) -> nn.Module:
        """Return the module that DeepSpeed gets."""
        return model

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_micro_batch: Callable[[], None]) -> Tensor:
        self.read_loss_scale()
        micro_batches = tokens_BT, targets_BT, on_micro_batch, self._forward_backward
        loss_sum = accumulate(self.batch, self.world.device, *micro_batches)
        self.unscale_gradients()
        return loss_sum

    @property
    def gradient_factor(self) -> float | Tensor:
        """Factor of the summed loss of a micro-batch in its backward pass, without DeepSpeed's own loss scale."""
        return self.scale if self._dynamic is None else self.scale * self._dynamic.scale

    def read_loss_scale(self) -> None:
        """Take over DeepSpeed's loss scale for the losses of routing."""
        if self._auxiliary is not None:
            self._auxiliary.fill_(self.ds.optimizer.loss_scale)

    def unscale_gradients(self) -> None:
        """Undo our loss scale in the gradients of all micro-batches; DeepSpeed's is undone in its step."""
        if self._dynamic is not None:
            self._dynamic.unscale(p.grad for p in self.module.parameters() if p.grad is not None)

    def _forward_backward(self, tokens_BT: Tensor, targets_BT: Tensor, last: bool) -> Tensor:
        loss = self.loss(tokens_BT, targets_BT)
        self.ds.backward(loss * self.gradient_factor, scale_wrt_gas=False)
        if not last:
            self.ds.step()  # counts the micro-batch; only the last one of a step, in ``update``, changes the weights
        return loss.detach()

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        device = self.world.device
        logits_BTV = self.ds(tokens_BT.to(device, non_blocking=True))
        return cross_entropy(logits_BTV, targets_BT.to(device, non_blocking=True))

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        if self.stage:
            return sum_figures(self.world, figures_N, meanwhile)
        limit = self.config.optim.grad_clip
        return clip_shards(self.gradients(), limit, self.world, figures_N, meanwhile)

    def update(self, lr: float, skip: Tensor) -> Tensor | None:
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            with skipping(self.ds.basic_optimizer, skip):
                self.step_optimizer()
            if self._dynamic is not None:
                self._dynamic.update(skip)
            return None
        # From stage 1 on DeepSpeed itself skips a step whose gradients are not finite on some rank. A loss that is not
        # finite makes them so. DeepSpeed waits for the device to learn that, in every step.
        self.step_optimizer()
        if self.ds.optimizer.overflow:
            return skip.new_full((), math.inf, dtype=torch.float64)  # DeepSpeed may return the norm of the step before
        return torch.as_tensor(self.ds.get_global_grad_norm(), device=self.world.device)

    def step_optimizer(self) -> None:
        """Step DeepSpeed's optimizer."""
        self.ds.step()

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        share = 1 / self.world.size if self.stage == 0 else 1.0
        for name, parameter in self.module.named_parameters():
            part = local_gradient(parameter)
            if part is not None:
                part = part.to(self.world.device)
                yield name, part if self._auxiliary is None else part.float() / self._auxiliary, share

    def state(self) -> Any:
        """Return the engine itself, stored in DeepSpeed's files; in stage 0 the state of model and optimizer."""
        if self.stage:
            return self
        parameters, optimizer = self.shards.parameters, self.ds.basic_optimizer
        if not optimizer.state:
            self.shards.create_moments(0)
        name_of = {parameter: name for name, parameter in parameters.items()}
        groups = [{**group, "params": [name_of[p] for p in group["params"]]} for group in optimizer.param_groups]
        moments = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
        model = {name: parameter.detach() for name, parameter in parameters.items()}
        return {
            "model": model | self.buffers(),
            "optimizer": {"state": moments, "param_groups": groups},
        }

    def load(self, state: Any) -> None:
        """Do nothing: the state was loaded in place."""

    def begin(self) -> None:
        if not self.stage:
            self.ds.basic_optimizer.state.clear()

    def rank_files(self, folder: Path, tag: str) -> list[str]:
        """List the files that this rank reads of a DeepSpeed checkpoint written with the same parallelism."""
        return [*self.ds._get_all_ckpt_names(str(folder), tag), self.ds._get_zero_ckpt_name(str(folder), tag)]

    def load_tensors(self, tensors: TensorReader, names: set[str], steps: int) -> None:
        """Load the state after ``steps`` from whole tensors, which must be those of ``names``.

        Not collective; call ``update_from_masters`` of ``shards`` afterwards.
        """
        tensors.refuse_others(names)
        self.shards.set_masters(tensors.weight)
        self.shards.set_moments(tensors.moment, steps)
        for name, buffer in self.buffers().items():
            buffer.copy_(tensors.weight(name))

    def tensor_names(self) -> set[str]:
        """Collect the names of all parameters and buffers of the whole model. Collective."""
        mine = [*self.shards.parameters, *self.buffers()]
        return {name for theirs in self.world.gather(mine) for name in theirs}

    def tensor_info(self) -> dict[str, Any]:
        """Collect the shapes of the parameters, and the buffers, by name, of all pipeline stages. Collective."""
        shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self.shards.parameters.items()}
        buffers = {name: buffer.cpu() for name, buffer in self.buffers().items()}
        found: dict[str, Any] = {"shapes": {}, "buffers": {}}
        for theirs in self.world.gather({"shapes": shapes, "buffers": buffers}):
            for what, named in theirs.items():
                found[what] |= named
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Return the persistent buffers, by their names in the whole model."""
        return {
            self.whole_name(f"{prefix}.{name}".removeprefix(".")): buffer
            for prefix, module in self.module.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def whole_name(self, name: str) -> str:
        """Return the name in the whole model of a parameter or buffer of ``module``."""
        return name


class ZeroLossScale:
    """The loss scale that DeepSpeed keeps on the host, where it waits for the overflow of each step.

    ``used``, (), holds the scale of the last step.
    """

    def __init__(self, ds: Any, used: Tensor) -> None:
        self._ds, self._used = ds, used

    def used(self) -> Tensor:
        return self._used.double()

    def state(self) -> dict[str, float]:
        scaler = self._ds.optimizer.loss_scaler  # another object once DeepSpeed has read a checkpoint
        steps = scaler.cur_iter - 1 - scaler.last_overflow_iter
        return {"scale": scaler.cur_scale, "steps": steps}

    def load(self, state: dict[str, float]) -> None:
        scaler = self._ds.optimizer.loss_scaler
        scaler.cur_scale = state["scale"]
        scaler.cur_iter, scaler.last_overflow_iter = int(state["steps"]), -1


def autocast_forward(forward: Callable[..., Any], config: TrainConfig, device: torch.device, *args: Any) -> Any:
    """Call ``forward`` in the precision of the run."""
    with autocast(config, device):
        return forward(*args)


def load_deepspeed(world: World) -> None:
    """Import and initialize DeepSpeed for the device of this rank, with warnings and errors only."""
    os.environ["DS_ACCELERATOR"] = world.device.type  # else it takes any GPU it sees, whatever ``device`` says
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # torch 2.13 renames collectives that DeepSpeed calls in every step, and 2.11 knows no other names.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    # DeepSpeed's shared-memory collectives take a minute to compile at the first start; gloo does without them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.groups.mpu = None  # an earlier pipeline in this process leaves it behind
    deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False, dist_init_required=False)
