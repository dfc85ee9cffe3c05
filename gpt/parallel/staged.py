"""The engine of a model whose layers are dealt out: a composed one, whose passes a pipeline makes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from gpt.config import TrainConfig
from gpt.model.gpt import GPT
from gpt.parallel.mesh import layer_mesh
from gpt.parallel.nd import ComposedEngine
from gpt.parallel.pipeline import Pipeline
from gpt.parallel.world import World
from gpt.topology.batch import Batch
from gpt.topology.dims import Topology


class StagedEngine(ComposedEngine):
    """Each rank holds some stages of the model; what else spreads it is applied to each of them."""

    def __init__(self, model: GPT, config: TrainConfig, world: World, layout: Topology, batch: Batch) -> None:
        super().__init__(model, config, world, layout, batch)
        self.layer_group = layer_mesh(self.grid, world, config.parallel.timeout_s).get_group()
        self.optimizer.register_step_post_hook(lambda *_: self._pipeline.tied.follow())

    def take_apart(self, model: GPT, config: TrainConfig, world: World, batch: Batch) -> tuple[GPT, list[GPT]]:
        self._pipeline = Pipeline(model, config, world, batch, self.grid["pp"].get_group())
        return self._pipeline.module, list(self._pipeline.stages.values())

    def passes(self, tokens_BT: Tensor, targets_BT: Tensor, on_pass: Callable[[], None]) -> Tensor:
        self.module.zero_grad(set_to_none=True)
        own = self.own(tokens_BT), self.own(targets_BT)
        return self._pipeline.step(*own, self.scale, self.criterion, on_pass) * self.counted

    def backward(self, tokens_BT: Tensor, targets_BT: Tensor, on_pass: Callable[[], None]) -> Tensor:
        loss_sum = super().backward(tokens_BT, targets_BT, on_pass)
        self._pipeline.tied.sum_gradients()
        return loss_sum

    def loss(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        return self._pipeline.loss(self.own(tokens_BT), self.own(targets_BT), self.criterion) * self.counted

    def load(self, state: dict[str, Any]) -> None:
        super().load(state)
        self._pipeline.tied.follow()

    def holders(self, name: str) -> int:
        return self.world.size // self.layout.pp * self._pipeline.holders(name)
