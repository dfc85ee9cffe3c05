"""Memory of one rank, part by part: states, gathered weights, activations of micro-batches in flight, and logits."""

from __future__ import annotations

from dataclasses import dataclass, fields

from gpt.accounting.units import BF16, FP32, GIB
from gpt.config import LOSS_CHUNK, CpMethod, ParallelConfig, Precision, Schedule, Strategy, TrainConfig
from gpt.planning.memory.activations import ParallelFactors, activation_bytes
from gpt.planning.memory.shards import ParameterShards, cast_elements, elements, parameter_shards
from gpt.planning.memory.states import sizes, states
from gpt.topology.batch import Batch
from gpt.topology.deepspeed_config import BUCKET
from gpt.topology.dims import ParallelDims
from gpt.topology.fsdp_units import fsdp_units
from gpt.topology.gradient_buckets import BUCKET_BYTES, BUCKETS_IN_FLIGHT
from gpt.topology.pipeline import StageLayers, local_stages, rank_stages

LIVE = 10**9
"""Elements that ZeRO-3 keeps gathered (stage3_max_live_parameters, stage3_max_reuse_distance)."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank around the start of the backward pass, where training needs most.

    Within 4 % of what was measured with ddp on small models, with experts and recomputation too. But up to a tenth
    above it with recomputation in bf16, which casts the matrices of a block again and keeps none; and up to a third
    with fsdp, where gradients grow only while activations shrink, and where the residual stream may be bf16 too.
    """

    parameters: int
    """fp32; with DeepSpeed in bf16 the bf16 weights."""
    gradients: int
    optimizer: int
    """Moments of AdamW, fp32, and its step counts; with DeepSpeed the fp32 master weights too."""
    compute_weights: int
    """Weights that were all-gathered or cast for computing, and unsharded gradients before their reduction."""
    activations: int
    """Saved by forward passes for backward passes."""
    logits: int
    """Logits, the gradient with respect to them, and in bf16 an fp32 copy of a chunk of them."""

    host: int = 0
    """Parameters, gradients and optimizer state in host memory instead; not in the total."""

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, part.name) for part in fields(self)) - self.host

    @property
    def total_gib(self) -> float:
        """GiB on the device."""
        return self.total / GIB


def per_rank(config: TrainConfig, dims: ParallelDims, batch: Batch) -> Memory:
    """Return the memory of the rank that needs most, for AdamW over fp32 master weights.

    ddp holds 4 bytes a parameter for the weights, 4 for the gradients (which are views of the communication buckets)
    and 8 for the moments; zero1 shards moments and reduced gradients; fsdp all three, every tensor sharded along its
    first dimension and padded (ZeRO, arXiv 1910.02054, section 3; FSDP2, arXiv 2304.11277). DeepSpeed: see ``states``.
    Beside that, see ``compute_weights``, ``activations`` and ``logits``.

    Args:
        config: of the run.
        dims: the parallel dimensions.
        batch: the split of the global batch.
    """
    return max((rank_memory(config, dims, batch, rank) for rank in range(dims.pp)), key=lambda memory: memory.total)


def rank_memory(config: TrainConfig, dims: ParallelDims, batch: Batch, pp_rank: int) -> Memory:
    """Return the memory of the ranks at one place of their pipelines."""
    stages = rank_stages(config, pp_rank)
    shards = parameter_shards(config.model, dims, stages)
    stored = states(config, dims, shards)
    in_flight = micro_batches_in_flight(config.parallel, pp_rank, batch.accumulation)
    return Memory(
        parameters=stored.parameters,
        gradients=stored.gradients,
        optimizer=stored.optimizer,
        compute_weights=compute_weights(config, shards, batch.accumulation > 1),
        activations=activations(config, dims, batch, stages, in_flight),
        logits=logits(config, dims, batch, in_flight) if any(stage.last for stage in stages) else 0,
        host=stored.host,
    )


def parallel_factors(config: TrainConfig, dims: ParallelDims) -> ParallelFactors:
    """Return the degrees by which activations are divided over ranks."""
    hidden = dims.tp if config.parallel.sequence_parallel else 1
    gathers = dims.cp > 1 and config.parallel.cp_method is CpMethod.allgather
    return ParallelFactors(tp=dims.tp, hidden=hidden, cp=dims.cp, gathers_keys=gathers, sends_rows=dims.ep > 1)


def activations(
    config: TrainConfig, dims: ParallelDims, batch: Batch, stages: list[StageLayers], in_flight: int
) -> int:
    """Return the activations in bytes of ``in_flight`` micro-batches in a rank's stages.

    torch's pipeline has receive buffers for every micro-batch of a step, forward and backward
    (torch.distributed.pipelining.stage), and keeps a stage's outputs as long as its activations.
    """
    model, factors = config.model, parallel_factors(config, dims)
    per_micro_batch = activation_bytes(model, batch.micro, config.precision, config.recompute, factors)
    layers = sum(len(stage.blocks) for stage in stages)
    inside = in_flight * layers * per_micro_batch.recomputed + (
        per_micro_batch.block - per_micro_batch.recomputed if layers else 0
    )
    around = in_flight * sum(
        stage.first * per_micro_batch.embedding + stage.last * per_micro_batch.final for stage in stages
    )
    if dims.pp == 1:
        return inside + around
    hidden = factors.tokens(model, batch.micro) * FP32 * model.n_embd
    received = sum((batch.accumulation - in_flight) * (not stage.first) for stage in stages)
    handed_on = sum((batch.accumulation + in_flight) * (not stage.last) for stage in stages)
    return inside + around + hidden * (received + handed_on)


def logits(config: TrainConfig, dims: ParallelDims, batch: Batch, in_flight: int) -> int:
    """Return the bytes of logits: those of each micro-batch in flight, and what the loss makes of one of them.

    Its gradient is as large, and made from a chunk in fp32 at a time, unless it is fp32 itself (gpt/model/loss.py).
    """
    tokens = parallel_factors(config, dims).tokens(config.model, batch.micro)
    columns = config.model.padded_vocab // (dims.tp if config.parallel.loss_parallel else 1)
    if config.precision is Precision.fp32:
        return (in_flight + 1) * FP32 * tokens * columns
    return (in_flight + 1) * BF16 * tokens * columns + FP32 * min(tokens * columns, LOSS_CHUNK)


def compute_weights(config: TrainConfig, shards: ParameterShards, accumulates: bool) -> int:
    """Return the bytes of weights beside the stored ones, and of unsharded gradients beside the sharded ones.

    DDP and ZeRO-1 in bf16: autocast keeps the bf16 copy of every matrix until its backward pass. ZeRO-1: see
    ``unreduced_gradients``. FSDP: norm and output matrix, or the tied embedding, stay all-gathered for the whole
    pass; of the units of blocks (``fsdp_units``) two are (one computes, the next is prefetched), or all of them,
    and the embedding, without resharding after the forward pass; the gradient of one unit or of the output matrix
    is unsharded until its reduce-scatter. With gradient accumulation nothing is reduced before the last
    micro-batch, so all gradients are unsharded, in fp32, unless ``parallel.reduce_each_micro_batch`` says so. ZeRO-3
    frees gathered parameters only where it holds more than ``LIVE`` elements, or needs them no more; ZeRO-1 and 2
    compute with the parameters that they hold. All three have a gradient bucket, in fp32 at most.
    """
    bf16 = config.precision.is_half
    if config.parallel.zero_stage:
        gathered = min(shards.elements, LIVE) if config.parallel.zero_stage == 3 else 0
        return (BF16 if bf16 else FP32) * gathered + FP32 * min(shards.elements, BUCKET)
    if config.parallel.strategy is not Strategy.fsdp:
        casts = BF16 * cast_elements(shards) if bf16 else 0
        return casts + (unreduced_gradients(shards, accumulates) if config.parallel.strategy is Strategy.zero1 else 0)
    block, around = elements(shards.block), elements(shards.around)
    width, reshards = BF16 if bf16 else FP32, config.parallel.reshard_after_forward
    units = sorted(fsdp_units(config, shards.layers))
    gathered = sum(units[-2:]) if reshards else shards.layers
    # An embedding that is tied to the output matrix is not freed after its forward pass.
    kept = around - (elements(shards.entry) if reshards and not config.model.tie_embeddings else 0)
    accumulates = accumulates and not config.parallel.reduce_each_micro_batch
    whole = FP32 * shards.elements if accumulates else width * max(max(units, default=0) * block, kept)
    return width * (kept + gathered * block) + whole


def unreduced_gradients(shards: ParameterShards, accumulates: bool) -> int:
    """Return the bytes of the gradients that a rank of ZeRO-1 holds whole, in fp32.

    With gradient accumulation all of them, until the last backward pass; else those of the bucket that is filled and of
    those in flight, the largest that there can be.
    """
    if accumulates:
        return FP32 * shards.elements
    at_once = BUCKETS_IN_FLIGHT + 1
    several = [size for size, count in sizes(shards) for _ in range(min(count, at_once))]
    largest = sorted((max(FP32 * size, BUCKET_BYTES) for size in several), reverse=True)[:at_once]
    return min(FP32 * shards.elements, sum(largest))


def micro_batches_in_flight(parallel: ParallelConfig, pp_rank: int, micro_batches: int) -> int:
    """Count the micro-batches whose activations a rank keeps at once, each through all of its stages, rounded up.

    gpipe keeps all; 1f1b as many as there are ranks from here to the end (arXiv 2104.04473, section 2.2.1); interleaved
    has that many more begun as torch's schedule warms up with (section 2.2.2); the V-shaped ones as many as there are
    ranks, on every rank, DualPipeV one more (arXiv 2401.10241, section 6; https://github.com/deepseek-ai/DualPipe).
    """
    ranks, local = parallel.pp, local_stages(parallel)
    if ranks == 1:
        return 1
    after = ranks - 1 - pp_rank
    in_round = micro_batches // max(1, micro_batches // ranks)
    most = {
        Schedule.gpipe: micro_batches,
        Schedule["1f1b"]: after + 1,
        Schedule.interleaved: -(-((local - 1) * in_round + 2 * after + 1) // local),
        Schedule.zbv: ranks,
        Schedule.dualpipev: ranks + 1,
    }
    return min(micro_batches, most[parallel.schedule])
