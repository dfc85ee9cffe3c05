"""What ranks that see different samples send each other: gradients once a step, parameters for every micro-batch."""

from __future__ import annotations

from collections.abc import Iterator

from gpt.accounting.flops import expert_rows, forward_flops
from gpt.config import CpMethod, Ffn, ParallelConfig, Precision, Recompute, Strategy, TrainConfig
from gpt.planning.collectives import Group, group, strided_group
from gpt.planning.hardware import Host, Machine
from gpt.planning.memory import BF16, FP32, ParameterShards, elements
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims
from gpt.topology.pipeline import StageLayers

BACKWARD = 2 / 3
"""The share of a pass that is the backward one: it has two products for each of the forward one's."""
BUCKET_BYTES = 25 * 2**20
"""DDP sums gradients in buckets of this size; the last one is full when the backward pass is over."""


def data_parallel_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, shards: ParameterShards, machine: Machine, compute_s: float
) -> float:
    """Seconds of a step that a rank waits for gradients and parameters; ``compute_s`` is what one pass computes."""
    if dims.is_sharded:
        return fsdp_s(config, dims, batch, shards, machine, compute_s)
    sums = sum(replicas.all_reduce(FP32 * count) for count, replicas in replica_groups(dims, shards, machine))
    if dims.model_ranks * dims.ep > 1:
        return sums  # after the last pass, by hand
    last = data_parallel_group(dims, machine).all_reduce(min(BUCKET_BYTES, FP32 * shards.elements))
    waits = max(last, sums - BACKWARD * compute_s)
    if config.parallel.strategy is Strategy.zero1:
        waits += data_parallel_group(dims, machine).all_gather(FP32 * shards.elements)
    return waits


def data_parallel_group(dims: ParallelDims, machine: Machine) -> Group:
    """All ranks that hold the same part of the model, or share it."""
    return group(dims, machine, ["dp_replicate", "dp_shard", "cp"])


def replica_groups(dims: ParallelDims, shards: ParameterShards, machine: Machine) -> Iterator[tuple[int, Group]]:
    """Elements whose gradients are summed, and over which ranks: of experts those that hold the same ones."""
    experts = shards.expert_elements if dims.ep > 1 else 0
    yield shards.elements - experts, data_parallel_group(dims, machine)
    if experts:
        ranks = dims.data_ranks * dims.cp // dims.ep
        yield experts, strided_group(machine, ranks, dims.ep * dims.tp)


def shard_groups(dims: ParallelDims, shards: ParameterShards, machine: Machine) -> Iterator[tuple[int, Group]]:
    """Elements that are gathered, and from which ranks."""
    experts = shards.expert_elements if dims.ep > 1 else 0
    yield shards.elements - experts, group(dims, machine, ["dp_shard", "cp"])
    if experts:
        yield experts, strided_group(machine, dims.dp_shard * dims.cp // dims.ep, dims.ep * dims.tp)


def fsdp_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, shards: ParameterShards, machine: Machine, compute_s: float
) -> float:
    """FSDP: parameters are gathered for every forward pass, and again for the backward one where they were given back;
    gradients are scattered in the last one, and averaged between copies (arXiv 2304.11277, section 3). The first gather
    of a pass has nothing to hide behind, nor has the last scatter."""
    width = BF16 if config.precision is Precision.bf16 else FP32
    rings, replicas = list(shard_groups(dims, shards, machine)), group(dims, machine, ["dp_replicate"])
    ring = rings[0][1]
    gathers = sum(ring.all_gather(width * count) for count, ring in rings)
    sums = sum(ring.all_gather(FP32 * count) for count, ring in rings) + replicas.all_reduce(FP32 * shards.stored())
    block = elements(shards.block)
    first, last = ring.all_gather(width * (elements(shards.around) + block)), ring.all_gather(FP32 * block)
    again = gathers if config.parallel.reshard_after_forward else 0.0
    forward = max(first, gathers - (1 - BACKWARD) * compute_s)
    backward = max(0.0, again - BACKWARD * compute_s)
    closing = max(last, again + sums - BACKWARD * compute_s)
    return batch.accumulation * forward + (batch.accumulation - 1) * backward + closing


STEP_BYTES = 7 * FP32
"""For each element of AdamW's step: weight, gradient and both moments are read, and all but the gradient written."""


def uses_offload(parallel: ParallelConfig) -> bool:
    """Whether any of it is there."""
    return parallel.cpu_offload or parallel.offload_optimizer or parallel.offload_parameters


def offload_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, shards: ParameterShards, host: Host, compute_s: float
) -> float:
    """Seconds of a step; ``compute_s`` is what one pass computes.

    Weights are brought for each pass, and again for the backward one where they were given back; both hide behind
    computing. What follows does not: gradients go to the host, AdamW steps there, and of DeepSpeed's ranks that have
    the weights on their devices each brings its part back. In stages 2 and 3 gradients go after every pass.
    """
    parallel, fsdp = config.parallel, config.parallel.cpu_offload
    part = shards.stored() if fsdp else -(-shards.elements // dims.data_ranks)
    # fsdp copies the fp32 weights and casts them there; DeepSpeed has bf16 ones beside the masters.
    width = BF16 if config.precision is Precision.bf16 and not fsdp else FP32
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
    """Seconds that a rank waits for others inside the layers of its parts, for a micro-batch, by dimension."""
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
    """T."""
    return batch.micro * config.model.block_size // dims.cp


def product_width(config: TrainConfig) -> int:
    """Bytes of an element that a matrix product gave."""
    return BF16 if config.precision is Precision.bf16 else FP32


def hidden_width(config: TrainConfig) -> int:
    """Bytes of an element of the residual stream: fp32 under autocast, which fsdp does without."""
    return product_width(config) if config.parallel.strategy is Strategy.fsdp else FP32


def num_forwards(config: TrainConfig) -> int:
    """How often a block does its forward pass: again where it is recomputed."""
    return 1 if config.recompute is Recompute.none else 2


def tensor_parallel_s(
    config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine, layers: int, around: int
) -> float:
    """Two sums in each direction for a block (arXiv 1909.08053, section 3), or with sequence parallelism as many bytes
    in twice as many steps (arXiv 2205.05198, section 4.2.2); one for the embedding and one for the output matrix."""
    ring, elements = group(dims, machine, ["tp"]), tokens_per_rank(config, dims, batch) * config.model.n_embd
    hidden_s = ring.all_gather(hidden_width(config) * elements)
    product_s = ring.all_gather(product_width(config) * elements)
    if config.parallel.sequence_parallel:
        forward = backward = 2 * (hidden_s + product_s)
    else:
        forward, backward = 4 * product_s, 4 * hidden_s
    seconds = layers * (num_forwards(config) * forward + backward) + 2 * around * hidden_s
    if not config.parallel.loss_parallel:
        seconds += ring.all_gather(FP32 * tokens_per_rank(config, dims, batch) * config.model.padded_vocab)
    return seconds


def context_parallel_s(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> float:
    """Keys and values of a layer brought to all, and the sum of their gradients back; or sent round, which hides behind
    attention."""
    model, ring = config.model, group(dims, machine, ["cp"])
    keys = 2 * product_width(config) * batch.micro * model.block_size * model.kv_heads * model.head_dim / dims.tp
    seconds = (num_forwards(config) + 1) * ring.all_gather(keys)
    if config.parallel.cp_method is CpMethod.allgather:
        return seconds
    # On the way back the keys go round again, with their gradients, which are summed in fp32.
    products = forward_flops(model, batch.micro).attention / 2 / model.n_layer / (dims.cp * dims.tp)
    computing = (num_forwards(config) + 2) * products / machine.flops_per_s
    return max(0.0, seconds + ring.all_gather(keys * FP32 / product_width(config)) - computing)


def expert_parallel_s(config: TrainConfig, dims: ParallelDims, batch: Batch, machine: Machine) -> float:
    """The rows of a layer sent to their experts and back (arXiv 2006.16668, section 3.2), and so their gradients."""
    model = config.model
    assert model.ffn is Ffn.moe
    rows = batch.micro * expert_rows(model) / dims.cp
    ring = strided_group(machine, dims.ep, dims.cp * dims.tp)
    again = config.recompute is Recompute.full  # what was sent is kept with the results of matrix products
    return 2 * (2 + again) * ring.all_to_all(product_width(config) * rows * model.n_embd)


def pipeline_s(config: TrainConfig, dims: ParallelDims, batch: Batch, num_stages: int, machine: Machine) -> float:
    """The stream handed on by each of a rank's stages, and its gradient handed back."""
    stride = dims.data_ranks * dims.cp * dims.tp
    link = machine.intra_node if dims.pp * stride <= machine.ranks_per_node else machine.inter_node
    size = hidden_width(config) * tokens_per_rank(config, dims, batch) * config.model.n_embd
    return 2 * num_stages * (link.latency_s + size / link.bytes_per_s)


def deepspeed_s(config: TrainConfig, batch: Batch, shards: ParameterShards, ring: Group, compute_s: float) -> float:
    """Seconds of a step that a rank waits for gradients and parameters; ``compute_s`` is what one pass computes."""
    stage, width = config.parallel.zero_stage, BF16 if config.precision is Precision.bf16 else FP32
    sums, gathers = ring.all_gather(FP32 * shards.elements), ring.all_gather(width * shards.elements)
    if stage == 0:
        return 2 * sums
    if stage in (1, 2):
        return (batch.accumulation if stage == 2 else 1) * sums + gathers
    block = elements(shards.block)
    first, last = ring.all_gather(width * (elements(shards.around) + block)), ring.all_gather(FP32 * block)
    forward = max(first, gathers - (1 - BACKWARD) * compute_s)
    backward = max(last, gathers + sums - BACKWARD * compute_s)
    return batch.accumulation * (forward + backward)
