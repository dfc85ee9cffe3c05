"""Estimate of the time of a step: compute, pipeline bubble, and exposed communication by mesh axis. Imports no
torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

from gpt.accounting import (
    BF16,
    FP32,
    Flops,
    expert_rows,
    forward_flops,
    recomputed_flops_per_token,
    training_flops_per_token,
)
from gpt.config import AttentionBackend, CpMethod, Ffn, ParallelConfig, Recompute, Schedule, Strategy, TrainConfig
from gpt.planning.hardware import Group, Host, Machine, group, strided_group
from gpt.planning.shards import ParameterShards, elements, parameter_shards
from gpt.topology import BUCKET_BYTES, Batch, ParallelDims, fsdp_units
from gpt.topology.pipeline import StageLayers, bubble_fraction, local_stages, rank_stages
from launch.runs.measured import MatmulRates

# Exposed communication of each kind of parallelism, in seconds.
#
# Over data ranks, per step: DDP, ZeRO-1, FSDP, replicas and DeepSpeed's ZeRO. Inside the layers, per micro-batch:
# tensor, context and expert parallelism. Between stages, per micro-batch: the pipeline's sends. With the host, per
# step: CPU offload. gpt/planning/hardware.py has the cost of a collective. ``compute_s`` is always that of one
# micro-batch, forward and backward.


BACKWARD = 2 / 3
"""Share of the backward pass in compute: two matrix products for each one of the forward pass."""
DDP_BUCKET_BYTES = 25 * 2**20
"""Size of DDP's gradient buckets in bytes. The last bucket is ready only after the backward pass, so it is exposed."""


def data_parallel_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, shards: ParameterShards, machine: Machine, compute_s: float
) -> float:
    """Return the exposed seconds per step of gradient and parameter communication with torch's strategies."""
    if dims.is_sharded:
        return fsdp_s(config, dims, batch, shards, machine, compute_s)
    if config.parallel.strategy is Strategy.zero1:
        return zero1_s(shards, data_parallel_group(dims, machine), compute_s)
    sums = sum(replicas.all_reduce(FP32 * count) for count, replicas in replica_groups(dims, shards, machine))
    if dims.model_ranks * dims.ep > 1:
        return sums  # NDEngine's own all-reduce, after the last micro-batch
    last = data_parallel_group(dims, machine).all_reduce(min(DDP_BUCKET_BYTES, FP32 * shards.elements))
    return max(last, sums - BACKWARD * compute_s)


def zero1_s(shards: ParameterShards, ring: Group, compute_s: float) -> float:
    """Return the exposed seconds per step of ZeRO-1 (arXiv 1910.02054, section 7.2.1).

    Gradients are reduce-scattered in the last backward pass; the last bucket overlaps with nothing. The parameters are
    all-gathered after the optimizer's step. Tensors whose rows do not divide evenly are padded.
    """
    size = FP32 * ring.ranks * shards.stored(ring.ranks)
    last = ring.reduce_scatter(min(BUCKET_BYTES, size))
    return max(last, ring.reduce_scatter(size) - BACKWARD * compute_s) + ring.all_gather(size)


def data_parallel_group(dims: ParallelDims, machine: Machine) -> Group:
    """Return the group that reduces gradients: the data ranks and ``cp``."""
    return group(dims, machine, ["dp_replicate", "dp_shard", "cp"])


def replica_groups(dims: ParallelDims, shards: ParameterShards, machine: Machine) -> Iterator[tuple[int, Group]]:
    """Yield a number of elements and the group that all-reduces their gradients. The group of experts is smaller."""
    experts = shards.expert_elements if dims.ep > 1 else 0
    yield shards.elements - experts, data_parallel_group(dims, machine)
    if experts:
        ranks = dims.data_ranks * dims.cp // dims.ep
        yield experts, strided_group(machine, ranks, dims.ep * dims.tp)


def shard_groups(dims: ParallelDims, shards: ParameterShards, machine: Machine) -> Iterator[tuple[int, Group]]:
    """Yield a number of elements and the group over which FSDP shards them. The group of experts is smaller."""
    experts = shards.expert_elements if dims.ep > 1 else 0
    yield shards.elements - experts, group(dims, machine, ["dp_shard", "cp"])
    if experts:
        yield experts, strided_group(machine, dims.dp_shard * dims.cp // dims.ep, dims.ep * dims.tp)


def fsdp_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, shards: ParameterShards, machine: Machine, compute_s: float
) -> float:
    """Return the exposed seconds per step of FSDP (arXiv 2304.11277, section 3).

    Parameters are all-gathered for every forward pass. With resharding, all units of blocks except the last are
    gathered again for the backward pass. Gradients are reduce-scattered in the last backward pass, or in each, and
    all-reduced between replicas in the last one. Two collectives overlap with nothing: the all-gather before the first
    unit, and the reduction after it. They cover the first unit and the embedding; norm and output matrix join the
    embedding's group if tied (gpt/parallel/nd.py).
    """
    width = BF16 if config.precision.is_half else FP32
    rings, replicas = list(shard_groups(dims, shards, machine)), group(dims, machine, ["dp_replicate"])
    ring, units = rings[0][1], fsdp_units(config, shards.layers) or [1]
    # Each unit of blocks is one group of parameters. The parameters around the blocks are one group if tied, otherwise
    # two. The experts of each block are a group of their own.
    blocks = [unit * elements(shards.block) for unit in units]
    entry, around = elements(shards.entry), elements(shards.around)
    outside = [around] if config.model.tie_embeddings else [entry, around - entry]
    groups = [[*blocks, *outside], [1] * shards.layers][: len(rings)]
    gathers = sum(in_pieces(r.all_gather, width * size, of) for (size, r), of in zip(rings, groups, strict=True))
    scatters = sum(in_pieces(r.reduce_scatter, FP32 * size, of) for (size, r), of in zip(rings, groups, strict=True))
    sums = scatters + replicas.all_reduce(FP32 * shards.stored())
    ends = [blocks[0], outside[0]]
    first = in_pieces(ring.all_gather, width * sum(ends), ends)
    last = in_pieces(ring.reduce_scatter, FP32 * sum(ends), ends)
    again = 0.0
    freed = replace(shards, layers=max(0, shards.layers - units[-1]), around=())
    if config.parallel.reshard_after_forward and freed.layers:
        groups = [blocks[:-1], [1] * freed.layers][: len(rings)]
        pieces = zip(shard_groups(dims, freed, machine), groups, strict=True)
        again = sum(in_pieces(r.all_gather, width * size, of) for (size, r), of in pieces)
    forward = max(first, gathers - (1 - BACKWARD) * compute_s)
    backward = max(0.0, again - BACKWARD * compute_s)
    if config.parallel.reduce_each_micro_batch:
        backward = max(last, again + scatters - BACKWARD * compute_s)
    closing = max(last, again + sums - BACKWARD * compute_s)
    return batch.accumulation * forward + (batch.accumulation - 1) * backward + closing


def agreement_s(config: TrainConfig, dims: ParallelDims, machine: Machine) -> float:
    """Return the seconds per step in which all ranks sum a few numbers: metrics, and the norm of sharded gradients."""
    everyone = strided_group(machine, dims.data_ranks * dims.model_ranks, 1)
    is_whole = config.parallel.strategy is Strategy.ddp and dims.model_ranks * dims.ep == 1
    return (1 if is_whole else 2) * everyone.agree()


def in_pieces(collective: Callable[[float], float], size: float, parts: Sequence[int]) -> float:
    """Return the seconds of consecutive collectives with ``size`` bytes in total, in proportion to ``parts``."""
    whole = sum(parts)
    return sum(collective(size * part / whole if whole else 0.0) for part in parts)


STEP_BYTES = 7 * FP32
"""Bytes per element of AdamW's step: it reads weight, gradient and both moments, and writes all except the gradient."""


def uses_offload(parallel: ParallelConfig) -> bool:
    """True if parameters, gradients or optimizer state are offloaded to host memory."""
    return parallel.cpu_offload or parallel.offload_optimizer or parallel.offload_parameters


def offload_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, shards: ParameterShards, host: Host, compute_s: float
) -> float:
    """Return the exposed seconds per step of CPU offload.

    Weights are copied to the device for each forward pass, and with resharding again for the backward pass. Both copies
    overlap with compute. The rest is exposed: gradients are copied to the host and AdamW runs there. DeepSpeed's ranks
    with weights on their devices copy their shard back. In ZeRO-2 and 3, gradients are copied after every micro-batch.
    """
    parallel, fsdp = config.parallel, config.parallel.cpu_offload
    part = shards.stored() if fsdp else -(-shards.elements // dims.data_ranks)
    # fsdp copies the fp32 weights and casts them on the device; DeepSpeed also has bf16 weights next to the masters.
    width = BF16 if config.precision.is_half and not fsdp else FP32
    brought = width * part / host.link_bytes_per_s
    waits = 0.0
    if fsdp or parallel.offload_parameters:
        again = brought if parallel.reshard_after_forward else 0.0
        hidden = (1 - BACKWARD) * compute_s, BACKWARD * compute_s
        waits += batch.accumulation * (max(0.0, brought - hidden[0]) + max(0.0, again - hidden[1]))
    if fsdp or parallel.offload_optimizer:
        often = batch.accumulation if (parallel.zero_stage or 0) >= 2 else 1
        waits += often * FP32 * part / host.link_bytes_per_s + STEP_BYTES * part / host.bytes_per_s
        waits += 0.0 if fsdp or parallel.offload_parameters else brought
    return waits


def layer_communication_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, stages: list[StageLayers], machine: Machine, compute_s: float
) -> dict[str, float]:
    """Return the exposed seconds per micro-batch of collectives inside the layers of a rank's stages, by mesh axis."""
    layers = sum(len(stage.blocks) for stage in stages)
    found: dict[str, float] = {}
    if dims.tp > 1:
        around = sum(stage.first + stage.last for stage in stages)
        found["tp"] = tensor_parallel_s(config, dims, batch, machine, layers, around)
    if dims.cp > 1:
        found["cp"] = layers * context_parallel_s(config, dims, batch, machine)
    if dims.ep > 1:
        found["ep"] = layers * expert_parallel_s(config, dims, batch, machine)
    return found


def tokens_per_rank(config: TrainConfig, dims: ParallelDims, batch: Batch) -> int:
    """Return the tokens of a micro-batch on one rank."""
    return batch.micro * config.model.block_size // dims.cp


def product_width(config: TrainConfig) -> int:
    """Return the bytes of an element of a matrix product's result."""
    return BF16 if config.precision.is_half else FP32


def hidden_width(config: TrainConfig) -> int:
    """Return the bytes of an element of the hidden states: fp32 under autocast, which FSDP does not use."""
    return product_width(config) if config.parallel.strategy is Strategy.fsdp else FP32


def num_forwards(config: TrainConfig) -> int:
    """Return the number of forward passes of a block for each micro-batch: two with recomputation."""
    return 1 if config.recompute is Recompute.none else 2


def tensor_parallel_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine, layers: int, around: int
) -> float:
    """Return the seconds per micro-batch of tensor parallelism.

    A block has two all-reduces in each direction (arXiv 1909.08053, section 3). With sequence parallelism it has two
    all-gathers and two reduce-scatters (arXiv 2205.05198, section 4.2.2). The embedding and the output matrix have one
    each.
    """
    ring, elements = group(dims, machine, ["tp"]), tokens_per_rank(config, dims, batch) * config.model.n_embd
    hidden, product = hidden_width(config) * elements, product_width(config) * elements
    if config.parallel.sequence_parallel:
        forward = 2 * (ring.all_gather(hidden) + ring.reduce_scatter(product))
        backward = 2 * (ring.reduce_scatter(hidden) + ring.all_gather(product))
        ends = ring.all_gather(hidden) + ring.reduce_scatter(hidden)
    else:
        forward, backward, ends = 2 * ring.all_reduce(product), 2 * ring.all_reduce(hidden), ring.all_reduce(hidden)
    seconds = layers * (num_forwards(config) * forward + backward) + around * ends
    if not config.parallel.loss_parallel:
        seconds += ring.all_gather(FP32 * tokens_per_rank(config, dims, batch) * config.model.padded_vocab)
    return seconds


def context_parallel_s(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> float:
    """Return the exposed seconds per layer of context parallelism.

    These are an all-gather of keys and values, and a reduce-scatter of their gradients; or the transfers of ring
    attention, which overlap with attention.
    """
    model, ring = config.model, group(dims, machine, ["cp"])
    keys = 2 * product_width(config) * batch.micro * model.block_size * model.kv_heads * model.head_dim / dims.tp
    if config.parallel.cp_method is CpMethod.allgather:
        return num_forwards(config) * ring.all_gather(keys) + ring.reduce_scatter(keys)
    sends = ring.ranks - 1
    seconds = (num_forwards(config) + 1) * sends * ring.send(keys / ring.ranks)
    # In the backward pass the keys circulate again, together with their gradients, which are accumulated in fp32.
    products = forward_flops(model, batch.micro).attention / 2 / model.n_layer / (dims.cp * dims.tp)
    computing = (num_forwards(config) + 2) * products / machine.flops_per_s
    gradients = sends * ring.send(keys * FP32 / product_width(config) / ring.ranks)
    return max(0.0, seconds + gradients - computing)


def expert_parallel_s(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> float:
    """Return the seconds per layer of expert parallelism's all-to-alls in both directions (arXiv 2006.16668, 3.2)."""
    model = config.model
    assert model.ffn is Ffn.moe
    rows = batch.micro * expert_rows(model) / dims.cp
    ring = strided_group(machine, dims.ep, dims.cp * dims.tp)
    again = config.recompute is Recompute.full  # selective recomputation keeps received rows
    return 2 * (2 + again) * ring.all_to_all(product_width(config) * rows * model.n_embd)


def pipeline_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, stages: Sequence[StageLayers], machine: Machine
) -> float:
    """Return the seconds per micro-batch of sending hidden states to the next stage, and gradients back.

    In 1F1B, hidden states to a neighbor and gradients from it are sent at the same time, because a link carries both
    directions (the paired sends of torch's Schedule1F1B). An inner stage has two such exchanges, the first and the last
    stage one.
    """
    size = hidden_width(config) * tokens_per_rank(config, dims, batch) * config.model.n_embd
    size //= dims.tp if config.parallel.sequence_parallel else 1
    sends = 2 * len(stages)
    if config.parallel.schedule is Schedule["1f1b"]:
        sends -= sum(stage.first + stage.last for stage in stages)
    return sends * stage_group(dims, machine).send(size)


def stage_group(dims: ParallelDims, machine: Machine) -> Group:
    """Return the group of two neighboring pipeline ranks: inside a node if it contains a whole pipeline."""
    stride = dims.data_ranks * dims.cp * dims.tp
    return Group(2, machine.intra_node if dims.pp * stride <= machine.ranks_per_node else machine.inter_node)


def tied_embedding_s(
    config: TrainConfig, dims: ParallelDims, stages: Sequence[StageLayers], shards: ParameterShards, machine: Machine
) -> float:
    """Return the seconds per step in which the first and the last stage exchange gradients of a tied embedding."""
    ends = [stage for stage in stages if stage.first != stage.last]
    if not config.model.tie_embeddings or len(ends) != 1:
        return 0.0
    tied = next(p for p in shards.around if p.name.startswith("token_embedding."))
    return stage_group(dims, machine).send(FP32 * tied.stored(tied.ranks))


def deepspeed_s(config: TrainConfig, batch: Batch, shards: ParameterShards, ring: Group, compute_s: float) -> float:
    """Return the exposed seconds per step of ZeRO's gradient and parameter communication in DeepSpeed."""
    stage, width = config.parallel.zero_stage, BF16 if config.precision.is_half else FP32
    sums, gathers = ring.reduce_scatter(FP32 * shards.elements), ring.all_gather(width * shards.elements)
    if stage == 0:
        return ring.all_reduce(FP32 * shards.elements)
    if stage in (1, 2):
        return (batch.accumulation if stage == 2 else 1) * sums + gathers
    block = elements(shards.block)
    first, last = ring.all_gather(width * (elements(shards.around) + block)), ring.reduce_scatter(FP32 * block)
    forward = max(first, gathers - (1 - BACKWARD) * compute_s)
    backward = max(last, gathers + sums - BACKWARD * compute_s)
    return batch.accumulation * (forward + backward)


# Estimate of a step, for ranking layouts. It does not model kernels and stragglers. Its assumptions:
#
# - compute: FLOPs over the attained rate of a rank, for any shapes; or the measured rates of products of these shapes,
#   if available. The slowest pipeline stage sets the pace.
# - overlap: DDP's all-reduce and the reduce-scatter of ZeRO-1 and FSDP overlap with the last backward pass. FSDP's
#   all-gathers overlap with their pass, and the transfers of ring attention with attention. All other communication is
#   exposed: that of tensor, context and expert parallelism inside a layer, sends between pipeline stages, and the
#   all-reduce of gradients after the last micro-batch.


@dataclass(frozen=True)
class Estimate:
    """Seconds of one step, by cause."""

    compute_s: float
    """Compute of the slowest pipeline stage, including recomputation."""
    bubble_s: float
    """Pipeline bubble: idle time while the pipeline fills and drains."""
    communication_s: dict[str, float]
    """Exposed communication by mesh axis. ``world`` is the sum of a few numbers over all ranks, ``host`` the copies
    from and to host memory."""
    tokens: int
    """Number of tokens of a step."""

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.bubble_s + sum(self.communication_s.values())

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second over all ranks."""
        return self.tokens / self.step_s


def estimate(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> Estimate:
    """Estimate a step on ``machine``. The slowest pipeline stage determines it."""
    different: dict[object, int] = {}
    for rank in range(dims.pp):  # inner stages with equally many blocks take equally long
        different.setdefault(tuple((len(one.blocks), one.first, one.last) for one in rank_stages(config, rank)), rank)
    ranks = [estimate_rank(config, dims, batch, machine, rank) for rank in different.values()]
    return max(ranks, key=lambda found: found.step_s)


def estimate_rank(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine, rank: int) -> Estimate:
    """Estimate a step for one pipeline rank, as if it were the slowest."""
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
    """Return the exposed seconds per step of gradient and parameter communication, over data ranks and with the
    host."""
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
    """Return the rates of a block and of the output matrix, in FLOP/s.

    The rate of a block is the harmonic mean over its products, forward and backward, weighted by their FLOPs.
    Attention's own products, the router's and those of custom parts have other shapes; they use the fastest measured
    rate.
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
    if model.ffn is Ffn.moe:  # the ranks of ep exchange the tokens of their experts
        rows *= dims.ep * model.n_expert_per_token / model.n_expert
    return projected / sum(widths), seconds_per_flop(rates, rows, model.ffn_width / dims.tp, model.n_embd)


def seconds_per_flop(rates: MatmulRates, rows: float, sharded: float, width: float) -> float:
    """Return the mean seconds per FLOP of Y = X W and of the two products of its backward pass, for X and for W.

    W has the sizes ``sharded`` and ``width``, sharded by columns or by rows. The two ways differ only in the dimension
    that is summed over, and count alike.
    """
    shapes = [(rows, sharded, width), (rows, width, sharded), (width, sharded, rows)]
    return sum(1 / rates.rate(*shape) for shape in shapes) / len(shapes)


def matmul_flops(config: TrainConfig, flops: Flops) -> int:
    """Return the FLOPs of all matrix products. A fused attention kernel skips the mask."""
    return flops.palm if config.model.attention is AttentionBackend.manual else flops.causal
