"""Choice of the engine: applies the parallelism of a config to a model."""

from __future__ import annotations

import torch

from gpt.config import Strategy, TrainConfig
from gpt.model.gpt import GPT
from gpt.model.init import Weights
from gpt.parallel.distributed import World
from gpt.parallel.engine import Engine
from gpt.parallel.materialize import materialize
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims


def parallelize(
    model: GPT, weights: Weights, config: TrainConfig, world: World, dims: ParallelDims, batch: Batch
) -> Engine:
    """Parallelize a model as ``config.parallel`` says, with this rank's part of it on ``world.device``.

    Args:
        model: on the meta device.
        weights: its values, of which those engines that shard the model keep this rank's shards alone.
        config: of the run.
        world: all ranks.
        dims: the parallel dimensions.
        batch: the split of the global batch.
    """
    from gpt.parallel.ddp import DDPEngine, Zero1Engine
    from gpt.parallel.nd import NDEngine
    from gpt.parallel.pipeline import PipelineEngine

    if config.parallel.strategy is Strategy.deepspeed:
        return parallelize_with_deepspeed(model, weights, config, world, dims, batch)
    if dims.pp > 1:
        return PipelineEngine(model, weights, config, world, dims, batch)
    if config.parallel.strategy is Strategy.fsdp or dims.model_ranks * dims.ep > 1:
        return NDEngine(model, weights, config, world, dims, batch)
    materialize([model], weights, world.device)
    if config.parallel.strategy is Strategy.zero1:
        return Zero1Engine(model, config, world, dims, batch)
    return DDPEngine(model, config, world, dims, batch)


def parallelize_with_deepspeed(
    model: GPT, weights: Weights, config: TrainConfig, world: World, dims: ParallelDims, batch: Batch
) -> Engine:
    """Parallelize a model by DeepSpeed, which is imported only here, and takes whole models."""
    from gpt.parallel.deepspeed.engine import load_deepspeed

    load_deepspeed(world)  # before what imports it at its top
    if dims.pp > 1:
        from gpt.parallel.deepspeed.pipeline import ZeroPipelineEngine

        materialize([model], weights, torch.device("cpu"))
        return ZeroPipelineEngine(model, config, world, dims, batch)
    from gpt.parallel.deepspeed.engine import ZeroEngine

    materialize([model], weights, world.device)
    return ZeroEngine(model, config, world, dims, batch)
