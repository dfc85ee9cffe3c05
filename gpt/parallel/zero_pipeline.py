"""DeepSpeed's pipeline parallelism (1F1B), combined with data parallelism.

A tied embedding is one layer in the first and the last stage; DeepSpeed sums its two gradients. The module imports
DeepSpeed at its top, so import it only after ``load_deepspeed``.

Shapes: B sequences of a micro-batch, T tokens of each, D width, V vocabulary.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from deepspeed.pipe import PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import ForwardPass, OptimizerStep
from torch import Tensor, nn

from gpt.config import TrainConfig
from gpt.model.gpt import GPT
from gpt.model.layers import cross_entropy
from gpt.parallel.engine import RunLayout
from gpt.parallel.zero import ZeroEngine
from gpt.topology.schedules import split_layers

BEFORE, AFTER = 2, 2
"""Number of DeepSpeed's layers before the first block, and after the last one."""
TIED = "token_embedding"


class ZeroPipelineEngine(ZeroEngine):
    """A model split into pipeline stages, run and stepped by DeepSpeed's pipeline engine."""

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
        assert isinstance(self.module, GPTPipelineModule)
        return self.module.whole_name(name)

    def run_micro_batches(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        self._rows = self.batch.micro
        self._loss_sum.zero_()
        self.ds.train_batch(zip(tokens_BT.split(self.batch.micro), targets_BT.split(self.batch.micro), strict=True))
        return self._loss_sum.clone()

    @torch.no_grad()
    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the summed loss of a micro-batch, (). A smaller micro-batch is padded, since the stages expect one
        size."""
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
        assert isinstance(self.module, GPTPipelineModule)
        return [*super().rank_files(folder, tag), *self.module.rank_files(folder / tag)]

    def step_optimizer(self) -> None:
        self.ds._exec_optimizer_step()

    def _forward_pass(self, ds: PipelineEngine, buffer_id: int) -> None:
        self.on_micro_batch()
        PipelineEngine._exec_forward_pass(ds, buffer_id)

    def _criterion(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """Return the loss for the backward pass, times the number of micro-batches, by which DeepSpeed divides."""
        loss = cross_entropy(logits_BTV[: self._rows], targets_BT[: self._rows], self.config.model.vocab_size)
        self._loss_sum += loss.detach()
        return loss * (self.scale * self.batch.accumulation)


class GPTPipelineModule(PipelineModule):
    """This rank's layers of a GPT, with the parameter names of the whole model.

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
        """Name of a layer in DeepSpeed -> prefix of its parameters in the whole model."""
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
        """Return the paths of the files that this rank reads: one file for each of its layers with a state."""
        layers = [i for i, layer in enumerate(self.forward_funcs) if hasattr(layer, "load_state_dict")]
        return [path for i in layers for path in self.ckpt_layer_path_list(str(folder), i)]

    def whole_name(self, name: str) -> str:
        """Return the name in the whole model of a parameter of this module."""
        layer, _, rest = name.removeprefix("tied_modules.").partition(".")
        return f"{self._names[layer]}{rest}"


class Entry(nn.Module):
    """Layer between the token embedding and the first block: learned positions and dropout."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.position, self.dropout = model.position, model.dropout

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Add learned positions, if any, and apply dropout."""
        return self.dropout(x_BTD if self.position is None else self.position(x_BTD, 0))


def deepspeed_layers(model: GPT) -> list[Any]:
    """Return the layers of a GPT for DeepSpeed; each layer takes the output of the layer before."""
    embedding: Any = model.token_embedding
    head: Any = model.head
    if model.config.tie_embeddings:
        # DeepSpeed builds the embedding anew in both stages, over the memory of the existing weight.
        weight = model.token_embedding.weight.detach()
        tied = partial(TiedLayerSpec, TIED, nn.Embedding, *weight.shape, _weight=weight)
        embedding, head = tied(), tied(forward_fn=lambda shared, x_BTD: F.linear(x_BTD, shared.weight))
    return [embedding, Entry(model), *model.blocks, model.norm, head]
