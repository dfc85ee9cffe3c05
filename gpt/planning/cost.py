"""Estimate of the time of a step: compute, pipeline bubble, and exposed communication by mesh axis.

It serves to rank layouts against each other, and knows no kernels and stragglers. Its assumptions:

- compute: FLOPs over the rate that a rank attains, whatever the shapes; or by the measured rates of products of these
  shapes, where there are some. The slowest pipeline stage sets the pace.
- overlap: DDP's all-reduce and the reduce-scatter of ZeRO-1 and FSDP overlap with the last backward pass, FSDP's
  all-gathers with the pass they are for, and the transfers of ring attention with attention. All other communication is
  exposed: that of tensor, context and expert parallelism inside a layer, sends between pipeline stages, and the
  all-reduce of gradients after the last micro-batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from gpt.accounting.flops import Flops, forward_flops, recomputed_flops_per_token, training_flops_per_token
from gpt.config import AttentionBackend, Ffn, Strategy, TrainConfig
from gpt.planning.communication import (
    agreement_s,
    data_parallel_group,
    data_parallel_s,
    deepspeed_s,
    layer_communication_s,
    offload_s,
    pipeline_s,
    tied_embedding_s,
    uses_offload,
)
from gpt.planning.hardware import Machine
from gpt.planning.memory import ParameterShards, parameter_shards
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims
from gpt.topology.pipeline import StageLayers, bubble_fraction, local_stages, rank_stages
from launch.runs.measured import MatmulRates


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by cause."""

    compute_s: float
    """Compute of the slowest pipeline stage, recomputation included."""
    bubble_s: float
    """Pipeline bubble: idle time while the pipeline fills and drains."""
    communication_s: dict[str, float]
    """Exposed communication by mesh axis, ``world`` for numbers that all ranks sum, and ``host`` for copies from and to
    host memory."""
    tokens: int
    """Tokens of a step."""

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.bubble_s + sum(self.communication_s.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens / self.step_s


def estimate(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> Estimate:
    """Estimate a step on ``machine``: that of the slowest pipeline stage."""
    different: dict[object, int] = {}
    for rank in range(dims.pp):  # inner stages with as many blocks take as long as one another
        different.setdefault(tuple((len(one.blocks), one.first, one.last) for one in rank_stages(config, rank)), rank)
    ranks = [estimate_rank(config, dims, batch, machine, rank) for rank in different.values()]
    return max(ranks, key=lambda found: found.step_s)


def estimate_rank(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine, rank: int) -> Estimate:
    """Estimate a step for one pipeline rank, as if it set the pace."""
    stages = rank_stages(config, rank)
    shards = parameter_shards(config.model, dims, stages)
    compute_s = micro_batch_s(config, dims, batch, stages, machine)
    per_micro_batch = layer_communication_s(config, dims, batch, stages, machine, compute_s)
    if dims.pp > 1:
        per_micro_batch["pp"] = pipeline_s(config, dims, batch, stages, machine)
    inside = {name: batch.accumulation * seconds for name, seconds in per_micro_batch.items()}
    busy_s = batch.accumulation * compute_s + sum(inside.values())
    bubble = bubble_share(config, dims, batch)
    after = per_step_s(config, dims, batch, shards, machine, compute_s)
    if dims.pp > 1:
        inside["pp"] += tied_embedding_s(config, dims, stages, shards, machine)
    return Estimate(
        compute_s=batch.accumulation * compute_s,
        bubble_s=busy_s * bubble / (1 - bubble),
        communication_s={**after, **inside},
        tokens=batch.global_batch * config.model.block_size,
    )


def per_step_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, shards: ParameterShards, machine: Machine, compute_s: float
) -> dict[str, float]:
    """Return the exposed seconds per step of gradient and parameter communication, with data ranks and host."""
    if config.parallel.strategy is Strategy.deepspeed:
        waits = {"dp": deepspeed_s(config, batch, shards, data_parallel_group(dims, machine), compute_s)}
    else:
        waits = {"dp": data_parallel_s(config, dims, batch, shards, machine, compute_s)}
    if (agreeing := agreement_s(config, dims, machine)) > 0:
        waits["world"] = agreeing
    if machine.host is not None and uses_offload(config.parallel):
        waits["host"] = offload_s(config, dims, batch, shards, machine.host, compute_s)
    return waits


def bubble_share(config: TrainConfig, dims: ParallelDims, batch: Batch) -> float:
    """Return the pipeline bubble as a share of the step, 0 to 1."""
    if dims.pp == 1:
        return 0.0
    return bubble_fraction(config.parallel.schedule, dims.pp, batch.accumulation, local_stages(config.parallel))


def micro_batch_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, stages: list[StageLayers], machine: Machine
) -> float:
    """Return the compute seconds of one micro-batch, forward and backward, through a rank's stages."""
    model, flops = config.model, training_flops_per_token(config.model)
    layers = sum(len(stage.blocks) for stage in stages)
    of_blocks = matmul_flops(config, flops) - flops.logits + recomputed_flops_per_token(model, config.recompute)
    logits = flops.logits if any(stage.last for stage in stages) else 0
    block_rate, logits_rate = product_rates(config, dims, batch, machine)
    per_token = layers / model.n_layer * of_blocks / block_rate + logits / logits_rate
    return batch.micro * model.block_size * per_token / (dims.tp * dims.cp)


def product_rates(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> tuple[float, float]:
    """Return the rates at which a block and the output matrix are computed, FLOP/s.

    A block's is the harmonic mean over its products forward and backward, weighted by their FLOPs. Attention's own
    products, the router's and those of custom parts have no shape of these: they run at the fastest rate measured.
    """
    rates, model = machine.matmul, config.model
    if rates is None:
        return machine.flops_per_s, machine.flops_per_s
    flops = forward_flops(model, 1)
    logits_s = seconds_per_flop(rates, tokens_of(config, dims, batch), model.padded_vocab / dims.tp, model.n_embd)
    projected, fed = block_seconds_per_flop(config, dims, batch, rates)
    dense = fed if isinstance(model.ffn, Enum) else 1 / rates.best
    whole = matmul_flops(config, flops) - flops.logits
    rest = (whole - flops.projections - flops.ffn) / rates.best
    return whole / (flops.projections * projected + flops.ffn * dense + rest), 1 / logits_s


def tokens_of(config: TrainConfig, dims: ParallelDims, batch: Batch) -> float:
    """Return the rows of a rank's products: tokens of a micro-batch."""
    return batch.micro * config.model.block_size / dims.cp


def block_seconds_per_flop(
    config: TrainConfig, dims: ParallelDims, batch: Batch, rates: MatmulRates
) -> tuple[float, float]:
    """Return seconds per FLOP of attention's projections, and of the feed-forward layer or an expert."""
    model, rows = config.model, tokens_of(config, dims, batch)
    widths = [model.n_head * model.head_dim, *(2 * [model.kv_heads * model.head_dim]), model.n_head * model.head_dim]
    projected = sum(width * seconds_per_flop(rates, rows, width / dims.tp, model.n_embd) for width in widths)
    if model.ffn is Ffn.moe:  # the ranks of ep hand each other the tokens of their experts
        rows *= dims.ep * model.n_expert_per_token / model.n_expert
    return projected / sum(widths), seconds_per_flop(rates, rows, model.ffn_width / dims.tp, model.n_embd)


def seconds_per_flop(rates: MatmulRates, rows: float, sharded: float, width: float) -> float:
    """Return the mean seconds per FLOP of Y = X W and of the two products of its backward pass, of X and of W.

    Sharded by columns or by rows, W has the sizes ``sharded`` and ``width``; both ways, which differ in what is summed
    over, count alike.
    """
    shapes = [(rows, sharded, width), (rows, width, sharded), (width, sharded, rows)]
    return sum(1 / rates.rate(*shape) for shape in shapes) / len(shapes)


def matmul_flops(config: TrainConfig, flops: Flops) -> int:
    """Return the FLOPs of all matrix products, with attention as the kernel computes it: a fused one skips the mask."""
    return flops.palm if config.model.attention is AttentionBackend.manual else flops.causal
