"""Memory that one rank needs for training, from the configs alone. Imports no torch.

Only tensors are counted, without the CUDA context and the reserves of the caching allocator and NCCL. So a plan should
leave some tenths of a device free. Parameters, gradients and optimizer state are exact.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from gpt.accounting import BF16, FP32, GIB, count, count_hidden
from gpt.components import optimizer_state
from gpt.config import (
    LOGITS_AT_ONCE,
    LOSS_CHUNK,
    AttentionBackend,
    CpMethod,
    Pack,
    ParallelConfig,
    ReduceDtype,
    Schedule,
    Strategy,
    TrainConfig,
)
from gpt.config.optim import MUON
from gpt.planning.rank_shards import (
    ParallelFactors,
    ParameterShard,
    ParameterShards,
    activation_bytes,
    cast_elements,
    elements,
    parameter_shards,
)
from gpt.topology import BUCKET_BYTES, BUCKETS_IN_FLIGHT, Batch, ParallelDims, fsdp_units
from gpt.topology.check_dims import BUCKET
from gpt.topology.schedules import StageLayers, local_stages, rank_stages

# Parameters, gradients and optimizer state of one rank, in bytes: exact, for AdamW over fp32 weights.
#
# DeepSpeed keeps fp32 masters in addition to its compute weights, even if these are fp32. It flattens tensors before it
# shards them (deepspeed 0.19: runtime/zero/stage_1_and_2.py, stage3.py, runtime/bf16_optimizer.py). Its gradient bucket
# is not counted here.


ALIGNMENT = 2
"""ZeRO-1 and 2 flatten the parameters of a group into one tensor. They pad it to a multiple of ``ALIGNMENT`` x (number
of ranks) elements."""
PERSISTENT = 100_000
"""Largest parameter, in elements, that stays gathered in ZeRO-3 (stage3_param_persistence_threshold)."""


@dataclass(frozen=True)
class RankMemory:
    """Memory of one rank at the begin of the backward pass, when training needs the most memory. In bytes.

    The estimate is within 4 % of measurements with ddp on small models, including experts and recomputation. With
    recomputation in bf16 it is up to 10 % too high, because recomputation keeps no bf16 copies of the matrices of a
    block. On CPUs in bf16 with fsdp it is up to 10 % too high, because norms on CPUs keep bf16 values; norms on GPUs
    keep fp32 values.
    """

    parameters: int = 0
    """Bytes of the weights in fp32; with DeepSpeed in bf16, of the bf16 weights."""
    gradients: int = 0
    """Bytes of the gradients of the weights in ``parameters``. With a strategy that shards gradients, only this rank's
    shards count."""
    optimizer: int = 0
    """Bytes of AdamW's moments and Muon's momentum in fp32, and of step counts; with DeepSpeed also of the fp32 master
    weights."""
    compute_weights: int = 0
    """Bytes of weights that were all-gathered or cast for computing, and of unsharded gradients before their
    reduction."""
    activations: int = 0
    """Bytes of the activations that forward passes save for backward passes."""
    logits: int = 0
    """Bytes of logits, of their gradient, and in bf16 of an fp32 copy of a chunk of the logits."""
    not_at_once: int = 0
    """Correction of the sum in bytes, negative or 0. With fsdp, gradients take memory while activations and logits are
    freed. So only the larger of these two amounts counts, and this field subtracts the smaller one."""
    host: int = 0
    """Bytes of parameters, gradients and optimizer state in host memory, with CPU offload. ``total`` does not include
    them."""

    @property
    def total(self) -> int:
        """Bytes on the device: the sum of all fields but ``host``."""
        return sum(vars(self).values()) - self.host

    @property
    def total_gib(self) -> float:
        """``total`` in GiB."""
        return self.total / GIB


def states(config: TrainConfig, dims: ParallelDims, shards: ParameterShards) -> RankMemory:
    """Return the memory of a rank with these parameter shards for weights, gradients and optimizer state. The other
    fields of the result are 0."""
    if config.parallel.strategy is Strategy.deepspeed and config.parallel.zero_stage:
        found = zero_1_2_states if config.parallel.zero_stage < 3 else zero_3_states
        return found(config, dims.data_ranks, shards)
    ranks = dims.data_ranks if config.parallel.strategy is Strategy.zero1 else None
    trained = shards.trained(config.model)
    kept, gradients = FP32 * shards.stored(), FP32 * trained.stored(ranks)
    state = optimizer_bytes(config, trained, ranks)
    if config.parallel.cpu_offload:
        return RankMemory(host=kept + gradients + state)
    return RankMemory(kept, gradients, state)


def optimizer_bytes(config: TrainConfig, shards: ParameterShards, ranks: int | None) -> int:
    """Return the bytes of a rank's optimizer state for these parameter shards, if the state is sharded over ``ranks``
    ranks. A ``ranks`` of None means that FSDP shards it with the parameters."""
    each = optimizer_state(config.optim)
    found = round(each.per_element * shards.stored(ranks)) + each.per_tensor * shards.tensors
    if config.optim.optimizer != MUON:
        return found
    # Muon has one momentum, and counts no steps.
    hidden = replace(shards, block=tuple(p for p in shards.block if len(p.shape) > 1), around=())
    return found - FP32 * hidden.stored(ranks) - each.per_tensor * hidden.tensors


def zero_1_2_states(config: TrainConfig, ranks: int, shards: ParameterShards) -> RankMemory:
    """Return the memory of a rank for weights, gradients and optimizer state with ZeRO-1 or 2 over ``ranks`` ranks.

    Master weights and moments are sharded, in ZeRO-2 also gradients.
    """
    parallel, bf16 = config.parallel, config.precision.is_half
    multiple = ALIGNMENT * ranks
    groups = [-(-size // multiple) * multiple for size in group_sizes(shards)]
    flat, counts = sum(groups), FP32 * len(groups)
    masters_and_moments = 3 * FP32 * flat // ranks
    # ZeRO-1 leaves gradients in the unpadded parameters, and in bf16 also accumulates them in fp32.
    whole = FP32 * flat + BF16 * shards.elements if bf16 else FP32 * shards.elements
    gradients = FP32 * flat // ranks if parallel.zero_stage == 2 else whole
    host = masters_and_moments if parallel.offloads_optimizer else 0
    return RankMemory((BF16 if bf16 else FP32) * flat, gradients, masters_and_moments + counts - host, host=host)


def zero_3_states(config: TrainConfig, ranks: int, shards: ParameterShards) -> RankMemory:
    """Return the memory of a rank for weights, gradients and optimizer state with ZeRO-3 over ``ranks`` ranks.

    Every parameter and its state are sharded. Small parameters also stay gathered.
    """
    parallel, width = config.parallel, BF16 if config.precision.is_half else FP32
    part = sum(count * -(-p.elements // ranks) for p, count in pieces(shards))
    # A single rank frees nothing, although it also has its shard of everything.
    whole = sum(count * p.elements for p, count in pieces(shards) if p.elements <= PERSISTENT or ranks == 1)
    counts = FP32 * sum(1 for size in group_sizes(shards) if size)
    states_there = 3 * FP32 * part if parallel.offloads_optimizer else 0
    weights_there = width * part if parallel.offloads_parameters else 0
    return RankMemory(
        width * (part + whole) - weights_there,
        FP32 * part,
        3 * FP32 * part + counts - states_there,
        host=states_there + weights_there,
    )


def pieces(shards: ParameterShards) -> list[tuple[ParameterShard, int]]:
    """Return pairs of a parameter shard, and the number of equal shards that the rank has.

    All blocks are equal, so the number is that of the blocks of the rank for a parameter of a block, and 1 for other
    parameters.
    """
    return [(p, shards.layers) for p in shards.block] + [(p, 1) for p in shards.around]


def group_sizes(shards: ParameterShards) -> list[int]:
    """Return the number of elements of each parameter group of the optimizer. The first group has the matrices, which
    have weight decay; the second has the other parameters. An empty group is left out."""
    groups = (
        sum(n * p.elements for p, n in pieces(shards) if (len(p.shape) > 1) is decays) for decays in (True, False)
    )
    return [size for size in groups if size]


# Host memory in which a rank stages its part of a checkpoint, while another process writes this part to the disk.


def staging_bytes(config: TrainConfig, world_size: int) -> int:
    """Return the bytes of host memory that a rank needs to save in the background, for the rank that needs the most.
    Return 0 if training waits for saves.

    Each rank saves an equal part of the state. With DeepSpeed's own files, the first rank also saves the weights that
    the forward pass uses, so it needs the most.

    Args:
        config: config of the run.
        world_size: number of ranks.
    """
    if not config.checkpoint.asynchronous:
        return 0
    shared = shared_bytes(config, world_size)
    if config.parallel.strategy is not Strategy.deepspeed or not config.parallel.zero_stage:
        return shared
    return shared + count(config.model).total * (BF16 if config.precision.is_half else FP32)


GENERATIONS = 2
"""Largest number of checkpoints in memory at the same time: the last complete one, and the one that is being saved."""


def in_memory_bytes(config: TrainConfig, world_size: int, nodes: int) -> int:
    """Return the bytes of host memory, for each rank of a node, that checkpoints in memory need. Return 0 if the config
    keeps none.

    A node keeps the parts of its own ranks, and with several nodes also those of a neighboring node.

    Args:
        config: config of the run.
        world_size: number of ranks.
        nodes: number of nodes.
    """
    if not config.checkpoint.in_memory:
        return 0
    return shared_bytes(config, world_size) * GENERATIONS * min(nodes, 2)


def shared_bytes(config: TrainConfig, world_size: int) -> int:
    """Return the bytes of a checkpoint, divided by the number of ranks and rounded up."""
    return math.ceil(checkpoint_bytes(config) / world_size)


def checkpoint_bytes(config: TrainConfig) -> int:
    """Return the bytes of a checkpoint: all weights, and the optimizer's state without counts of steps."""
    counted, each = count(config.model), optimizer_state(config.optim).per_element  # for AdamW both moments
    hidden = count_hidden(config.model).elements if config.optim.optimizer == MUON else 0
    return round(FP32 * counted.total + each * counted.trained) - FP32 * hidden


# Total memory of one rank: states, gathered weights, activations of micro-batches in flight, and logits.


LIVE = 10**9
"""Largest number of elements that ZeRO-3 keeps gathered (stage3_max_live_parameters, stage3_max_reuse_distance)."""


def per_rank(config: TrainConfig, dims: ParallelDims, batch: Batch) -> RankMemory:
    """Return the memory of the rank that needs most.

    With AdamW, ddp needs 4 bytes a parameter for the weights, 4 for the gradients (views of the communication buckets)
    and 8 for the moments. zero1 shards moments and reduced gradients. fsdp shards all three: every tensor along its
    first dimension, padded (ZeRO, arXiv 1910.02054, section 3; FSDP2, arXiv 2304.11277). For DeepSpeed see ``states``,
    for other memory ``compute_weights``, ``activations`` and ``logits``.

    Args:
        config: config of the run.
        dims: the parallel dimensions.
        batch: the split of the global batch.
    """
    return max((rank_memory(config, dims, batch, rank) for rank in range(dims.pp)), key=lambda memory: memory.total)


def rank_memory(config: TrainConfig, dims: ParallelDims, batch: Batch, pp_rank: int) -> RankMemory:
    """Return the memory of a rank with the index ``pp_rank`` in its pipeline."""
    stages = rank_stages(config, pp_rank)
    shards = parameter_shards(config.model, dims, stages)
    in_flight = micro_batches_in_flight(config.parallel, pp_rank, batch.accumulation)
    found = replace(
        states(config, dims, shards),
        compute_weights=compute_weights(config, shards, stages, batch.accumulation > 1, in_flight),
        activations=activations(config, dims, batch, stages, in_flight),
        logits=logits(config, dims, batch, in_flight) if any(stage.last for stage in stages) else 0,
    )
    # With reduce_each_micro_batch, reduced gradients of the first micro-batch exist from the second one on.
    if config.parallel.strategy is not Strategy.fsdp or (
        batch.accumulation > 1 and config.parallel.reduce_each_micro_batch
    ):
        return found
    return replace(found, not_at_once=-min(found.gradients, found.activations + found.logits))


def parallel_factors(config: TrainConfig, dims: ParallelDims) -> ParallelFactors:
    """Return the numbers of ranks over which the activations of a run are divided."""
    hidden = dims.tp if config.parallel.sequence_parallel else 1
    gathers = dims.cp > 1 and config.parallel.cp_method is CpMethod.allgather
    return ParallelFactors(tp=dims.tp, hidden=hidden, cp=dims.cp, gathers_keys=gathers, sends_rows=dims.ep > 1)


def activations(
    config: TrainConfig, dims: ParallelDims, batch: Batch, stages: Sequence[StageLayers], in_flight: int
) -> int:
    """Return the bytes of the activations of ``in_flight`` micro-batches in the pipeline stages of a rank.

    They include two kinds of tensors of torch's pipeline (torch.distributed.pipelining.stage): receive buffers for
    every micro-batch of a step, forward and backward; and the results of a stage, which it keeps as long as its
    activations.
    """
    model, factors = config.model, parallel_factors(config, dims)
    if model.attention_sinks and config.data.pack is Pack.documents:  # with its bias, scores are written out
        model = replace(model, attention=AttentionBackend.manual)
    per_micro_batch = activation_bytes(model, batch.micro, config.precision, config.recompute, factors)
    layers = sum(len(stage.blocks) for stage in stages)
    inside = in_flight * layers * per_micro_batch.recomputed + (
        per_micro_batch.block - per_micro_batch.recomputed if layers else 0
    )
    around = in_flight * sum(
        stage.first * per_micro_batch.embedding + stage.last * per_micro_batch.final for stage in stages
    )
    if config.data.pack is Pack.documents:  # the bias of attention, which all blocks of a stage share
        width = BF16 if config.precision.is_half else FP32
        around += in_flight * len(stages) * batch.micro * model.block_size**2 * width
    if dims.pp == 1:
        return inside + around
    hidden = factors.tokens(model, batch.micro) * FP32 * model.n_embd
    received = sum((batch.accumulation - in_flight) * (not stage.first) for stage in stages)
    handed_on = sum((batch.accumulation + in_flight) * (not stage.last) for stage in stages)
    return inside + around + hidden * (received + handed_on)


def logits(config: TrainConfig, dims: ParallelDims, batch: Batch, in_flight: int) -> int:
    """Return the bytes of the logits of ``in_flight`` micro-batches, and of the tensors that the loss of one
    micro-batch makes.

    The gradient of the logits is as large as the logits. If the logits are not fp32, the gradient is computed chunk by
    chunk from an fp32 copy of the chunk (gpt/model/layers.py). A pipeline keeps the logits until the end of their
    backward pass, which also makes a gradient of the output matrix; with FSDP ``compute_weights`` counts this gradient.
    A chunked loss keeps the gradients of hidden states and output matrix. It needs a chunk of logits three times in the
    dtype of products, and once in fp32.
    """
    model, width = config.model, BF16 if config.precision.is_half else FP32
    numbers = parallel_factors(config, dims).tokens(model, batch.micro) * (model.padded_vocab // dims.tp)
    if config.chunked_loss:
        hidden = numbers // model.padded_vocab * model.n_embd
        of_chunk = min(numbers, LOGITS_AT_ONCE["cuda"]) * (3 * width + FP32)
        return of_chunk + FP32 * (hidden + model.trains("head.weight") * model.padded_vocab * model.n_embd)
    chunk = FP32 * min(numbers, LOSS_CHUNK) if config.precision.is_half else 0
    kept = dims.pp > 1 and config.parallel.strategy is not Strategy.fsdp
    matrix = width * model.n_embd * (model.padded_vocab // dims.tp) if kept else 0
    copies = 1 if model.logit_softcap is None else 2  # with and without the bound, and their gradients
    return copies * (in_flight + 1) * width * numbers + max(chunk, matrix)


def compute_weights(
    config: TrainConfig, shards: ParameterShards, stages: Sequence[StageLayers], accumulates: bool, in_flight: int
) -> int:
    """Return the bytes of gathered or cast copies of weights, and of gradients before they are reduced and sharded.

    DDP and ZeRO-1 in bf16: autocast keeps the bf16 copy of every matrix until its backward pass, and makes another one
    for each micro-batch in flight. For gradients of ZeRO-1 see ``unreduced_gradients``.

    FSDP: norm and output matrix, or the tied embedding, stay all-gathered for the whole pass. Of the units of blocks
    (``fsdp_units``) two are gathered: one computes, the next is prefetched. Without resharding after the forward pass,
    all units and the embedding are gathered. The gradient of one unit or of the output matrix is unsharded until its
    reduce-scatter. With gradient accumulation (``accumulates``) nothing is reduced before the last micro-batch. So all
    gradients are unsharded, in ``parallel.reduce_dtype``, unless ``parallel.reduce_each_micro_batch`` is set.

    ZeRO-3 frees gathered parameters only beyond ``LIVE`` elements, or when they are not needed again. ZeRO-1 and 2
    compute with their own parameters. All three have a gradient bucket, in fp32 at most.
    """
    bf16, trained = config.precision.is_half, shards.trained(config.model)
    if config.parallel.zero_stage:
        gathered = min(shards.elements, LIVE) if config.parallel.zero_stage == 3 else 0
        return (BF16 if bf16 else FP32) * gathered + FP32 * min(shards.elements, BUCKET)
    if config.parallel.strategy is not Strategy.fsdp:
        casts = in_flight * BF16 * cast_elements(shards, any(stage.last for stage in stages)) if bf16 else 0
        return casts + (unreduced_gradients(trained, accumulates) if config.parallel.strategy is Strategy.zero1 else 0)
    block = elements(shards.block)
    width, reshards = BF16 if bf16 else FP32, config.parallel.reshard_after_forward
    units = sorted(fsdp_units(config, shards.layers))
    gathered = sum(units[-2:]) if reshards else shards.layers
    # An embedding that is tied to the output matrix is not freed after its forward pass.
    frees = reshards and not config.model.tie_embeddings
    kept, reduced = (elements(s.around) - frees * elements(s.entry) for s in (shards, trained))
    accumulates = accumulates and not config.parallel.reduce_each_micro_batch
    largest = max(max(units, default=0) * elements(trained.block), reduced)
    whole = reduced_width(config) * trained.elements if accumulates else width * largest
    return width * (kept + gathered * block) + whole


def reduced_width(config: TrainConfig) -> int:
    """Return the number of bytes of an element of the gradients that FSDP reduces."""
    return BF16 if config.parallel.reduce_dtype is ReduceDtype.bf16 else FP32


def unreduced_gradients(shards: ParameterShards, accumulates: bool) -> int:
    """Return the bytes of the gradients of a rank with ZeRO-1 that are not reduced yet, in fp32.

    With gradient accumulation (``accumulates``) these are all gradients. Otherwise they are those of the bucket that is
    being filled, and of the largest possible buckets that are being reduced.
    """
    if accumulates:
        return FP32 * shards.elements
    at_once = BUCKETS_IN_FLIGHT + 1
    several = [p.elements for p, count in pieces(shards) for _ in range(min(count, at_once))]
    largest = sorted((max(FP32 * size, BUCKET_BYTES) for size in several), reverse=True)[:at_once]
    return min(FP32 * shards.elements, sum(largest))


def micro_batches_in_flight(parallel: ParallelConfig, pp_rank: int, micro_batches: int) -> int:
    """Return the largest number of micro-batches whose activations a rank keeps at the same time, in all its stages.

    gpipe keeps all ``micro_batches``. 1f1b keeps as many as there are ranks from this one to the last (arXiv
    2104.04473, section 2.2.1). interleaved also keeps those with which torch's schedule warms up (section 2.2.2); the
    number of passes through stages is divided by the stages of the rank, and rounded up. zbv keeps as many as there are
    ranks, and dualpipev one more (arXiv 2401.10241, section 6; https://github.com/deepseek-ai/DualPipe).
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
