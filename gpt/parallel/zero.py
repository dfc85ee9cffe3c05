"""The two engines of DeepSpeed, one for ZeRO (arXiv 1910.02054) and one for pipelines, and the format of checkpoints.

The module imports DeepSpeed at its top, so import it only after ``gpt.parallel.distributed.load_deepspeed``.
"""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import ForwardPass, OptimizerStep
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils._pytree import tree_map_only

from gpt.checkpoint import DEEPSPEED, Manifest
from gpt.checkpoint.formats import LOOSE_FILES, MODEL_FILE, MOMENTS, TensorFiles, deepspeed_tag, open_as_tensors
from gpt.checkpoint.messages import run_on_all_ranks
from gpt.checkpoint.part import RankPart
from gpt.config import Recompute, TrainConfig
from gpt.model.ffn import set_auxiliary_scale
from gpt.model.gpt import GPT, Block
from gpt.model.layers import autocast, cross_entropy
from gpt.parallel.engine import Clipped, Engine, RunLayout
from gpt.parallel.modules import replace_forward
from gpt.parallel.optimizer import build_optimizer, skipping
from gpt.topology.check_dims import casts_weights, checkpoint_settings, ds_config
from gpt.topology.schedules import split_layers


class ZeroFiles(TensorFiles):
    """Checkpoint format of DeepSpeed's own files, for ZeRO-1 to 3. The argument ``state`` of its methods is the
    ``ZeroEngine`` itself.

    Args:
        settings: the settings of DeepSpeed on which the sharding depends, as plain JSON. The sharding also depends on
            the number of ranks, which the manifest has.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings

    def describe(self) -> dict[str, Any]:
        return {"kind": DEEPSPEED, **self.settings}

    def collect(self, step: int, state: ZeroEngine, group: dist.ProcessGroup | None) -> RankPart:
        # DeepSpeed saves its files in an order with barriers. The collector takes their content instead of writing them
        # to the run folder. Files that DeepSpeed writes by itself go to a folder of this node.
        files: dict[str, Any] = {}
        with tempfile.TemporaryDirectory(prefix="deepspeed_") as scratch:

            def keep(state_dict: Any, path: str) -> None:
                # Tensors become objects of their own: DeepSpeed may free the memory of its parameters before they are
                # copied. A torch.Size stays one: the map would make a plain tuple of it, which DeepSpeed's own tools
                # cannot read.
                taken = tree_map_only(Tensor, Tensor.detach, state_dict, is_leaf=lambda v: isinstance(v, torch.Size))
                files[Path(path).relative_to(scratch).as_posix()] = taken

            state.ds.checkpoint_engine.save = keep
            state.ds.save_checkpoint(scratch, deepspeed_tag(step))
            tensor_info = state.tensor_info()
            if dist.get_rank(group) == 0:
                files[MODEL_FILE] = tensor_info
                for name in LOOSE_FILES:
                    if (path := Path(scratch) / name).exists():
                        files[name] = path.read_bytes()
        return RankPart(dist.get_rank(group), files=files)

    def read(self, folder: Path, saved: Manifest, state: ZeroEngine, group: dist.ProcessGroup | None) -> None:
        tag = deepspeed_tag(saved.step)
        if saved.contents == self.describe() and saved.world_size == dist.get_world_size(group):
            # Read ahead of DeepSpeed, which reads some files twice: its ranks wait for each other between their files,
            # so a failure has to be known before they begin.
            contents: dict[str, Any] = {}

            def read_all() -> None:
                for path in state.rank_files(folder, tag):
                    contents[path] = torch.load(path, map_location="cpu", weights_only=False)

            run_on_all_ranks(read_all, group)
            state.ds.checkpoint_engine.load = lambda path, map_location=None: contents[path]
            state.ds.load_checkpoint(str(folder), tag)
            del state.ds.checkpoint_engine.load  # and frees the content that was read
            return
        with open_as_tensors(folder, saved, group) as tensors:
            mine = [*state.parameters, *state.buffers()]
            names = {name for of_rank in state.world.gather(mine) for name in of_rank}

            def load_tensors() -> None:
                reader = TensorReader(tensors)
                if reader.names != names:
                    raise ValueError(f"the checkpoint differs in {', '.join(sorted(reader.names ^ names)[:3])}")
                state.set_masters(reader.weight)
                state.set_moments(reader.moment, saved.step)
                for name, buffer in state.buffers().items():
                    buffer.copy_(reader.weight(name))

            run_on_all_ranks(load_tensors, group)
            state.update_from_masters()


class TensorReader:
    """Reads whole tensors, one at a time, from a checkpoint folder of torch.distributed.checkpoint. Not collective.

    The methods raise ValueError if the checkpoint lacks the tensor.
    """

    def __init__(self, folder: Path) -> None:
        self._reader = dcp.FileSystemReader(folder)
        self._known = self._reader.read_metadata().state_dict_metadata
        self.names = {key.removeprefix("model.") for key in self._known if key.startswith("model.")}
        """Names of the model's parameters and buffers."""

    def weight(self, name: str) -> Tensor:
        """Read and return a whole parameter or buffer, fp32 on the CPU."""
        return self._read(f"model.{name}")

    def moment(self, name: str, key: str) -> Tensor:
        """Read and return a whole moment of the parameter ``name``, fp32 on the CPU. ``key`` is the moment's key in the
        state of AdamW."""
        return self._read(f"optimizer.state.{name}.{key}")

    def _read(self, key: str) -> Tensor:
        entry = self._known.get(key)
        if not isinstance(entry, TensorStorageMetadata):
            raise ValueError(f"the checkpoint holds no {key}")
        found = torch.empty(entry.size)
        dcp.load({key: found}, storage_reader=self._reader, no_dist=True)
        return found


def local_gradient(parameter: Any) -> Tensor | None:
    """Return this rank's shard of the gradient of a DeepSpeed parameter, after the backward pass and before the step;
    None if this rank has no shard."""
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


class ZeroEngine(Engine):
    """Engine of DeepSpeed's ZeRO, which shards the training state over the data-parallel ranks."""

    def __init__(self, model: GPT, layout: RunLayout) -> None:
        config, world, dims, batch = layout.config, layout.world, layout.dims, layout.batch
        super().__init__(layout, averaged=dims.data_ranks)
        self.stage = config.parallel.zero_stage or 0
        casts = casts_weights(config)
        set_auxiliary_scale(model, dims.data_ranks / batch.global_batch)
        module = self.module = self.trained = self.prepare_module(model)
        first = {name: p.detach().to("cpu", copy=True) for name, p in module.named_parameters()} if casts else {}
        # Inside the model, since on GPUs DeepSpeed disables an autocast that is enabled around the model.
        replace_forward(module, autocast(config, world.device)(module.forward))
        settings = ds_config(config, batch)
        if self.stage == 3 and (config.compiles or config.recompute is Recompute.selective):
            # The layers of a block are gathered together, not each by hooks inside the block. Such hooks can be neither
            # compiled nor recomputed selectively.
            deepspeed.utils.set_z3_leaf_modules(module, [Block])
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints the free memory again and again
            self.ds, *_ = deepspeed.initialize(
                model=module,
                optimizer=build_optimizer(module, config.optim, torch.optim.AdamW),
                config=deepcopy(settings),  # DeepSpeed adds keys to the settings that it gets
                dist_init_required=False,
            )
        self.files = ZeroFiles(checkpoint_settings(settings) | {"pp": dims.pp}) if self.stage else TensorFiles()
        self.optimizer = self.ds.optimizer
        self.parameters: dict[str, Any] = dict(module.named_parameters())
        """Name in the whole model -> parameter."""
        if casts:
            # DeepSpeed made the fp32 masters from weights that it had rounded to bf16 already.
            self.set_masters(first.__getitem__)
            self.update_from_masters()

    def prepare_module(self, model: GPT) -> nn.Module:
        """Return the module that DeepSpeed gets: the model, or a DeepSpeed pipeline of its layers."""
        return model

    def run_micro_batch(self, tokens_BT: Tensor, targets_BT: Tensor, last: bool) -> Tensor:
        loss = self.loss(tokens_BT, targets_BT)
        self.ds.backward(loss * self.gradient_factor, scale_wrt_gas=False)
        if not last:
            self.ds.step()  # counts the micro-batch; only the last one of a step, in ``update``, changes the weights
        return loss.detach()

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        device = self.world.device
        logits_BTV = self.ds(tokens_BT.to(device, non_blocking=True))
        return cross_entropy(logits_BTV, targets_BT.to(device, non_blocking=True), self.config.model.vocab_size)

    def clip(self, figures_N: Tensor, meanwhile: Callable[[], None]) -> Clipped:
        if not self.stage:
            return super().clip(figures_N, meanwhile)
        pending = self.world.start_all_reduce(figures_N)
        meanwhile()
        return Clipped(None, pending.wait(), figures_N.new_zeros(()))

    def update(self, lr: float, skip: Tensor) -> Tensor | None:
        for group in self.ds.optimizer.param_groups:
            group["lr"] = lr
        if self.stage == 0:
            with skipping(self.ds.basic_optimizer, skip):
                self.step_optimizer()
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
                yield name, part.to(self.world.device), share

    def state(self) -> Any:
        """Return the state for a checkpoint. In stage 0 these are the tensors of model and optimizer. In other stages
        the state is this engine, because the format ``ZeroFiles`` takes the engine."""
        if self.stage:
            return self
        parameters, optimizer = self.parameters, self.ds.basic_optimizer
        if not optimizer.state:
            self.create_moments(0)
        name_of = {parameter: name for name, parameter in parameters.items()}
        groups = [{**group, "params": [name_of[p] for p in group["params"]]} for group in optimizer.param_groups]
        moments = {name: optimizer.state[parameter] for name, parameter in parameters.items()}
        model = {name: parameter.detach() for name, parameter in parameters.items()}
        return {
            "model": model | self.buffers(),
            "optimizer": {"state": moments, "param_groups": groups},
        }

    def begin(self) -> None:
        if not self.stage:
            self.ds.basic_optimizer.state.clear()

    def rank_files(self, folder: Path, tag: str) -> list[str]:
        """Return the paths of the files that this rank has to read from the DeepSpeed checkpoint in ``folder``. The
        checkpoint was saved with the same parallelism. ``tag`` is DeepSpeed's name of the checkpoint."""
        return [*self.ds._get_all_ckpt_names(str(folder), tag), self.ds._get_zero_ckpt_name(str(folder), tag)]

    def tensor_info(self) -> dict[str, Any]:
        """Return two dictionaries about the whole model, of all pipeline stages: ``shapes`` (name of a parameter ->
        shape) and ``buffers`` (name -> tensor). Collective."""
        shapes = {n: list(getattr(p, "ds_shape", p.shape)) for n, p in self.parameters.items()}
        buffers = {name: buffer.cpu() for name, buffer in self.buffers().items()}
        found: dict[str, Any] = {"shapes": {}, "buffers": {}}
        for theirs in self.world.gather({"shapes": shapes, "buffers": buffers}):
            for what, named in theirs.items():
                found[what] |= named
        return found

    def buffers(self) -> dict[str, Tensor]:
        """Return the buffers of this rank's module that checkpoints contain (the persistent ones): name in the whole
        model -> buffer."""
        return {
            self.whole_name(f"{prefix}.{name}".removeprefix(".")): buffer
            for prefix, module in self.module.named_modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name not in module._non_persistent_buffers_set
        }

    def whole_name(self, name: str) -> str:
        """Return the name, in the whole model, of the parameter or buffer ``name`` of ``module``."""
        return name

    # This rank's shards: fp32 master weights and moments are written into them.
    #
    # Stages 1 and 2 of DeepSpeed flatten the parameters of a group and shard the flat tensor; stage 3 shards each
    # parameter. Both pad at the end. fp32 masters and moments are further flat tensors. In stage 0 everything is where
    # torch keeps it. This uses DeepSpeed's internals because ``deepspeed.utils.safe_set_*`` know no moments before the
    # first step, and no padding.

    def held(self) -> list[tuple[str, Any]]:
        """Return name and parameter of each parameter whose state is on this rank, whole or in part."""
        return [(n, p) for n, p in self.parameters.items() if self.stage in (0, 3) or p._hp_mapping is not None]

    @torch.no_grad()
    def set_masters(self, whole: Callable[[str], Tensor]) -> None:
        """Set this rank's shards of the fp32 master weights. ``whole`` returns a whole parameter by its name, in fp32.

        The weights that the forward pass uses change only with ``update_from_masters``.
        """
        if self.stage == 3:
            self.optimizer.checkpoint_event_prologue()  # re-partitions gathered parameters
        for name, parameter in self.held():
            self._set(parameter, whole(name), None)

    @torch.no_grad()
    def set_moments(self, whole: Callable[[str, str], Tensor], steps: int) -> None:
        """Set this rank's shards of AdamW's moments, and the count of steps to ``steps``.

        ``whole`` returns a whole moment by the name of its parameter and its key in AdamW's state.
        """
        self.create_moments(steps)
        for name, parameter in self.held():
            for key in MOMENTS:
                self._set(parameter, whole(name, key), key)

    def create_moments(self, steps: int) -> None:
        """Create the state of AdamW: moments of zeros, and the count of steps ``steps``."""
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
        """Copy this rank's shard of the tensor ``whole`` into the state of ``parameter``: into its moment ``key``, or
        into its master weight if ``key`` is None."""
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
        """Copy the fp32 master weights into the weights that the forward pass uses. Collective."""
        if self.stage == 3:
            for group in range(len(self.optimizer.fp32_partitioned_groups_flat)):
                self.optimizer._reassign_or_swap_out_partitioned_parameters(group)
            persistent = self.optimizer.persistent_parameters
            if persistent:
                persistent[0].partition(persistent)
            self.optimizer.checkpoint_event_epilogue()
        elif self.stage:
            self.optimizer.update_lp_params()


# DeepSpeed's pipeline parallelism (1F1B), combined with data parallelism.
#
# A tied embedding is one layer in the first and the last stage; DeepSpeed sums its two gradients.
#
# Shapes: B sequences of a micro-batch, T tokens of each, D width, V vocabulary.


BEFORE, AFTER = 2, 2
"""Number of layers of DeepSpeed's pipeline before the first block, and after the last block."""
TIED = "token_embedding"


class ZeroPipelineEngine(ZeroEngine):
    """Engine of DeepSpeed's pipelines, with ZeRO-0 or ZeRO-1."""

    module: GPTPipelineModule

    def __init__(self, model: GPT, layout: RunLayout) -> None:
        self._rows = layout.batch.micro
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=layout.world.device)
        super().__init__(model, layout)
        self.layer_group = self.ds.grid.get_data_parallel_group()
        self.ds._copy_recovery_script = lambda _: None  # zero_to_fp32.py does not join stages
        steps = {ForwardPass: self._forward_pass, OptimizerStep: lambda _: None}  # ``update`` does the step
        self.ds._INSTRUCTION_MAP = PipelineEngine._INSTRUCTION_MAP | steps

    def prepare_module(self, model: GPT) -> nn.Module:
        with redirect_stdout(io.StringIO()):  # DeepSpeed prints the layers
            return GPTPipelineModule(model, self.config, self.dims.pp, self._criterion)

    def whole_name(self, name: str) -> str:
        return self.module.whole_name(name)

    def run_micro_batches(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        self._rows = self.batch.micro
        self._loss_sum.zero_()
        self.ds.train_batch(zip(tokens_BT.split(self.batch.micro), targets_BT.split(self.batch.micro), strict=True))
        return self._loss_sum.clone()

    @torch.no_grad()
    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed loss of one batch of an evaluation, () float64: on the last stage; 0 on other stages.

        ``tokens_BT`` and ``targets_BT`` have at most the sequences of a micro-batch. A smaller batch is padded, since
        all stages expect the same size.
        """
        self._rows = len(tokens_BT)
        self._loss_sum.zero_()
        filled = [F.pad(rows, (0, 0, 0, self.batch.micro - len(rows))) for rows in (tokens_BT, targets_BT)]
        self.ds.eval_batch(iter([tuple(filled)]), reduce_output=None, bcast_loss=False, num_micro_batches=1)
        return self._loss_sum.clone()

    def gradients(self) -> Iterator[tuple[str, Tensor, float]]:
        twice = f"{TIED}.weight" if self.config.model.tie_embeddings else None
        held = self.dims.data_ranks if self.stage == 0 else 1
        for name, part, _ in super().gradients():
            yield name, part, 1 / (held * (2 if name == twice else 1))

    def rank_files(self, folder: Path, tag: str) -> list[str]:
        return [*super().rank_files(folder, tag), *self.module.rank_files(folder / tag)]

    def step_optimizer(self) -> None:
        self.ds._exec_optimizer_step()

    def _forward_pass(self, ds: PipelineEngine, buffer_id: int) -> None:
        self.on_micro_batch()
        PipelineEngine._exec_forward_pass(ds, buffer_id)

    def _criterion(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss of a micro-batch that DeepSpeed differentiates. The loss is multiplied by the number of
        micro-batches, because DeepSpeed divides it by this number afterwards."""
        loss = cross_entropy(logits_BTV[: self._rows], targets_BT[: self._rows], self.config.model.vocab_size)
        self._loss_sum += loss.detach()
        return loss * (self.scale * self.batch.accumulation)


class GPTPipelineModule(PipelineModule):
    """This rank's layers of a GPT as a pipeline of DeepSpeed. Parameters have their names in the whole model.

    Args:
        model: the whole model, on the CPU; its layers become those of this module.
        config: config of the run.
        stages: number of ranks of the pipeline.
        criterion: loss of logits and targets.
    """

    def __init__(
        self, model: GPT, config: TrainConfig, stages: int, criterion: Callable[[Tensor, Tensor], Tensor]
    ) -> None:
        parts = split_layers(config.model, stages, config.recompute)
        ends = [BEFORE + part.blocks.stop for part in parts]
        self._cuts = [0, *ends[:-1], BEFORE + config.model.n_layer + AFTER]
        last = BEFORE + config.model.n_layer
        around = {"0": f"{TIED}.", TIED: f"{TIED}.", "1": "", str(last): "norm.", str(last + 1): "head."}
        self._names = around | {str(BEFORE + number): f"blocks.{number}." for number in range(config.model.n_layer)}
        """Name of a layer in DeepSpeed -> prefix of the names of its parameters in the whole model."""
        super().__init__(deepspeed_layers(model), num_stages=stages, loss_fn=criterion)
        self._layer_specs: list[Any] = []  # frees the other stages' layers

    def _partition_layers(self, method: str = "") -> None:
        self.parts = self._cuts
        stage = self._topo.get_coord(self.global_rank).pipe
        self._set_bounds(*self.parts[stage : stage + 2])

    @torch.no_grad()
    def _synchronize_tied_weights(self) -> None:
        super()._synchronize_tied_weights()  # torch warns of a broadcast that it cannot differentiate

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for name, parameter in super().named_parameters(*args, **kwargs):
            yield self.whole_name(name), parameter

    def rank_files(self, folder: Path) -> list[str]:
        """Return the paths of the files of this rank's layers in the folder of a DeepSpeed checkpoint."""
        layers = [i for i, layer in enumerate(self.forward_funcs) if hasattr(layer, "load_state_dict")]
        return [path for i in layers for path in self.ckpt_layer_path_list(str(folder), i)]

    def whole_name(self, name: str) -> str:
        """Return the name, in the whole model, of the parameter ``name`` of this module."""
        layer, _, rest = name.removeprefix("tied_modules.").partition(".")
        return f"{self._names[layer]}{rest}"


class Entry(nn.Module):
    """Layer of a DeepSpeed pipeline between the token embedding and the first block: learned positions and dropout."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.position, self.dropout = model.position, model.dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add learned positions, if the model has them, and apply dropout, (B, T, D) -> (B, T, D)."""
        return self.dropout(x_BTD if self.position is None else self.position(x_BTD, 0))


def deepspeed_layers(model: GPT) -> list[Any]:
    """Return the layers of a GPT for a pipeline of DeepSpeed. Each layer takes the result of the layer before."""
    embedding: Any = model.token_embedding
    head: Any = model.head
    if model.config.tie_embeddings:
        # DeepSpeed builds the embedding anew in both stages, over the memory of the existing weight.
        weight = model.token_embedding.weight.detach()
        tied = partial(TiedLayerSpec, TIED, nn.Embedding, *weight.shape, _weight=weight)
        embedding, head = tied(), tied(forward_fn=lambda shared, x_BTD: F.linear(x_BTD, shared.weight))
    return [embedding, Entry(model), *model.blocks, model.norm, head]
