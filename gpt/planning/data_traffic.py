"""What ranks that see different samples send each other: gradients once a step, parameters for every micro-batch."""

from __future__ import annotations

from collections.abc import Iterator

from gpt.config import Precision, Strategy, TrainConfig
from gpt.planning.collectives import Group, group, strided
from gpt.planning.hardware import Machine
from gpt.planning.memory import BF16, FP32, Pieces, elements
from gpt.topology.batch import Batch
from gpt.topology.dims import Topology

BACKWARD = 2 / 3
"""The share of a pass that is the backward one: it has two products for each of the forward one's."""


BUCKET_BYTES = 25 * 2**20
"""DDP sums gradients in buckets of this size; the last one is full when the backward pass is over."""


def data_s(
    config: TrainConfig, layout: Topology, batch: Batch, held: Pieces, machine: Machine, compute_s: float
) -> float:
    """Seconds of a step that a rank waits for gradients and parameters; ``compute_s`` is what one pass computes."""
    if layout.is_sharded:
        return sharded_s(config, layout, batch, held, machine, compute_s)
    sums = sum(copies.all_reduce(FP32 * count) for count, copies in among_copies(layout, held, machine))
    if layout.model_ranks * layout.ep > 1:
        return sums  # after the last pass, by hand
    last = data_group(layout, machine).all_reduce(min(BUCKET_BYTES, FP32 * held.elements))
    waits = max(last, sums - BACKWARD * compute_s)
    if config.parallel.strategy is Strategy.zero1:
        waits += data_group(layout, machine).gather(FP32 * held.elements)
    return waits


def data_group(layout: Topology, machine: Machine) -> Group:
    """All ranks that hold the same part of the model, or share it."""
    return group(layout, machine, ["dp_replicate", "dp_shard", "cp"])


def among_copies(layout: Topology, held: Pieces, machine: Machine) -> Iterator[tuple[int, Group]]:
    """Elements whose gradients are summed, and over which ranks: of experts those that hold the same ones."""
    dealt = held.dealt_out if layout.ep > 1 else 0
    yield held.elements - dealt, data_group(layout, machine)
    if dealt:
        ranks = layout.data_ranks * layout.cp // layout.ep
        yield dealt, strided(machine, ranks, layout.ep * layout.tp)


def among_shards(layout: Topology, held: Pieces, machine: Machine) -> Iterator[tuple[int, Group]]:
    """Elements that are gathered, and from which ranks."""
    dealt = held.dealt_out if layout.ep > 1 else 0
    yield held.elements - dealt, group(layout, machine, ["dp_shard", "cp"])
    if dealt:
        yield dealt, strided(machine, layout.dp_shard * layout.cp // layout.ep, layout.ep * layout.tp)


def sharded_s(
    config: TrainConfig, layout: Topology, batch: Batch, held: Pieces, machine: Machine, compute_s: float
) -> float:
    """FSDP: parameters are gathered for every forward pass, and again for the backward one where they were given back;
    gradients are scattered in the last one, and averaged between copies (arXiv 2304.11277, section 3). The first gather
    of a pass has nothing to hide behind, nor has the last scatter."""
    width = BF16 if config.precision is Precision.bf16 else FP32
    shards, copies = list(among_shards(layout, held, machine)), group(layout, machine, ["dp_replicate"])
    line = shards[0][1]
    gathers = sum(line.gather(width * count) for count, line in shards)
    sums = sum(line.gather(FP32 * count) for count, line in shards) + copies.all_reduce(FP32 * held.held())
    block = elements(held.block)
    first, last = line.gather(width * (elements(held.around) + block)), line.gather(FP32 * block)
    again = gathers if config.parallel.reshard_after_forward else 0.0
    forward = max(first, gathers - (1 - BACKWARD) * compute_s)
    backward = max(0.0, again - BACKWARD * compute_s)
    closing = max(last, again + sums - BACKWARD * compute_s)
    return batch.accumulation * forward + (batch.accumulation - 1) * backward + closing
