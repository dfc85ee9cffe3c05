"""What a step takes: computing, waiting in a pipeline, and sending, by dimension of the grid.

An estimate, to rank layouts against each other: it knows no kernel, no straggler and no small matrix. What it assumes:

- computing: FLOPs over the rate that a rank attains, whatever the shapes. The slowest rank of a pipeline sets the pace.
- gradients that DDP or FSDP exchange hide behind the backward pass of the last micro-batch, and gathered parameters
  behind the pass they are gathered for, as far as that is long enough; the keys that a ring passes on hide behind
  attention. Everything else waits: what tensor, context and expert parallelism exchange inside a layer, what a stage of
  a pipeline hands on, and gradients that are summed after the last pass.
"""

from __future__ import annotations

from dataclasses import dataclass

from gpt.accounting.flops import Flops, recomputed_flops_per_token, training_flops_per_token
from gpt.config import AttentionBackend, Strategy, TrainConfig
from gpt.planning.communication import (
    data_parallel_group,
    data_parallel_s,
    deepspeed_s,
    layer_communication_s,
    offload_s,
    pipeline_s,
    uses_offload,
)
from gpt.planning.hardware import Machine
from gpt.planning.memory import ParameterShards, parameter_shards
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims
from gpt.topology.pipeline import StageLayers, bubble_fraction, local_stages, rank_stages


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by what they go to."""

    compute_s: float
    """Of the slowest rank of a pipeline, recomputation included."""
    bubble_s: float
    """That a rank of a pipeline waits for the first and the last micro-batches."""
    communication_s: dict[str, float]
    """By dimension, and ``host`` for copies to and from the host; what is not hidden behind computing."""
    tokens: int
    """Of a step."""

    @property
    def step_s(self) -> float:
        """All of it."""
        return self.compute_s + self.bubble_s + sum(self.communication_s.values())

    @property
    def tokens_per_s(self) -> float:
        """Of the whole run."""
        return self.tokens / self.step_s


def estimate(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> Estimate:
    """The time of a step on ``machine``: that of the pipeline's slowest rank."""
    ranks = [estimate_rank(config, dims, batch, machine, rank) for rank in range(dims.pp)]
    return max(ranks, key=lambda found: found.step_s)


def estimate_rank(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine, rank: int) -> Estimate:
    """The time of a step for one rank of the pipeline, if it were the one that sets the pace."""
    stages = rank_stages(config, rank)
    shards = parameter_shards(config.model, dims, stages)
    compute_s = micro_batch_s(config, dims, batch, stages, machine)
    per_micro_batch = layer_communication_s(config, dims, batch, stages, machine, compute_s)
    if dims.pp > 1:
        per_micro_batch["pp"] = pipeline_s(config, dims, batch, len(stages), machine)
    inside = {name: batch.accumulation * seconds for name, seconds in per_micro_batch.items()}
    busy_s = batch.accumulation * compute_s + sum(inside.values())
    bubble = bubble_share(config, dims, batch)
    after = per_step_s(config, dims, batch, shards, machine, compute_s)
    return Estimate(
        compute_s=batch.accumulation * compute_s,
        bubble_s=busy_s * bubble / (1 - bubble),
        communication_s={**after, **inside},
        tokens=batch.global_batch * config.model.block_size,
    )


def per_step_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, shards: ParameterShards, machine: Machine, compute_s: float
) -> dict[str, float]:
    """Seconds of a step that a rank waits for gradients and parameters, of the other data ranks and of its host."""
    if config.parallel.strategy is Strategy.deepspeed:
        waits = {"dp": deepspeed_s(config, batch, shards, data_parallel_group(dims, machine), compute_s)}
    else:
        waits = {"dp": data_parallel_s(config, dims, batch, shards, machine, compute_s)}
    if machine.host is not None and uses_offload(config.parallel):
        waits["host"] = offload_s(config, dims, batch, shards, machine.host, compute_s)
    return waits


def bubble_share(config: TrainConfig, dims: ParallelDims, batch: Batch) -> float:
    """The share of a step that a rank of the pipeline waits, 0 to 1."""
    if dims.pp == 1:
        return 0.0
    return bubble_fraction(config.parallel.schedule, dims.pp, batch.accumulation, local_stages(config.parallel))


def micro_batch_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, stages: list[StageLayers], machine: Machine
) -> float:
    """Seconds in which a rank computes both passes of a micro-batch through its parts of the model."""
    model, flops = config.model, training_flops_per_token(config.model)
    layers = sum(len(stage.blocks) for stage in stages)
    of_blocks = matmul_flops(config, flops) - flops.logits + recomputed_flops_per_token(model, config.recompute)
    logits = flops.logits if any(stage.last for stage in stages) else 0
    per_token = (layers / model.n_layer * of_blocks + logits) / (dims.tp * dims.cp)
    return batch.micro * model.block_size * per_token / machine.flops_per_s


def matmul_flops(config: TrainConfig, flops: Flops) -> int:
    """All of them, of attention those that the kernel computes."""
    return flops.palm if config.model.attention is AttentionBackend.manual else flops.causal
