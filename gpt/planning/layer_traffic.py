"""What ranks that work on the same samples send each other for every micro-batch, and what that takes.

T tokens of a micro-batch on one rank, D width, K width of the keys.
"""

from __future__ import annotations

from gpt.accounting.flops import expert_rows, forward_flops
from gpt.config import CpMethod, Ffn, Precision, Recompute, Strategy, TrainConfig
from gpt.planning.collectives import group, strided
from gpt.planning.hardware import Machine
from gpt.planning.memory import BF16, FP32
from gpt.topology.batch import Batch
from gpt.topology.dims import Topology
from gpt.topology.stages import Part


def layers_s(
    config: TrainConfig, layout: Topology, batch: Batch, parts: list[Part], machine: Machine, compute_s: float
) -> dict[str, float]:
    """Seconds that a rank waits for others inside the layers of its parts, for a micro-batch, by dimension."""
    layers = sum(len(part.blocks) for part in parts)
    found: dict[str, float] = {}
    if layout.tp > 1:
        around = sum(part.first + part.last for part in parts)
        found["tp"] = tensor_s(config, layout, batch, machine, layers, around)
    if layout.cp > 1:
        found["cp"] = layers * context_s(config, layout, batch, machine)
    if layout.ep > 1:
        found["ep"] = layers * expert_s(config, layout, batch, machine)
    return found


def tokens_of(config: TrainConfig, layout: Topology, batch: Batch) -> int:
    """T."""
    return batch.micro * config.model.block_size // layout.cp


def product_width(config: TrainConfig) -> int:
    """Bytes of an element that a matrix product gave."""
    return BF16 if config.precision is Precision.bf16 else FP32


def stream_width(config: TrainConfig) -> int:
    """Bytes of an element of the residual stream: fp32 under autocast, which fsdp does without."""
    return product_width(config) if config.parallel.strategy is Strategy.fsdp else FP32


def forward_passes(config: TrainConfig) -> int:
    """How often a block does its forward pass: again where it is recomputed."""
    return 1 if config.recompute is Recompute.none else 2


def tensor_s(config: TrainConfig, layout: Topology, batch: Batch, machine: Machine, layers: int, around: int) -> float:
    """Two sums in each direction for a block (arXiv 1909.08053, section 3), or with sequence parallelism as many bytes
    in twice as many steps (arXiv 2205.05198, section 4.2.2); one for the embedding and one for the output matrix."""
    line, elements = group(layout, machine, ["tp"]), tokens_of(config, layout, batch) * config.model.n_embd
    stream, product = line.gather(stream_width(config) * elements), line.gather(product_width(config) * elements)
    if config.parallel.sequence_parallel:
        forward = backward = 2 * (stream + product)
    else:
        forward, backward = 4 * product, 4 * stream
    seconds = layers * (forward_passes(config) * forward + backward) + 2 * around * stream
    if not config.parallel.loss_parallel:
        seconds += line.gather(FP32 * tokens_of(config, layout, batch) * config.model.padded_vocab)
    return seconds


def context_s(config: TrainConfig, layout: Topology, batch: Batch, machine: Machine) -> float:
    """Keys and values of a layer brought to all, and the sum of their gradients back; or sent round, which hides behind
    attention."""
    model, line = config.model, group(layout, machine, ["cp"])
    keys = 2 * product_width(config) * batch.micro * model.block_size * model.kv_heads * model.head_dim / layout.tp
    seconds = (forward_passes(config) + 1) * line.gather(keys)
    if config.parallel.cp_method is CpMethod.allgather:
        return seconds
    # On the way back the keys go round again, with their gradients, which are summed in fp32.
    products = forward_flops(model, batch.micro).attention / 2 / model.n_layer / (layout.cp * layout.tp)
    computing = (forward_passes(config) + 2) * products / machine.flops_per_s
    return max(0.0, seconds + line.gather(keys * FP32 / product_width(config)) - computing)


def expert_s(config: TrainConfig, layout: Topology, batch: Batch, machine: Machine) -> float:
    """The rows of a layer sent to their experts and back (arXiv 2006.16668, section 3.2), and so their gradients."""
    model = config.model
    assert model.ffn is Ffn.moe
    rows = batch.micro * expert_rows(model) / layout.cp
    line = strided(machine, layout.ep, layout.cp * layout.tp)
    again = config.recompute is Recompute.full  # what was sent is kept with the results of matrix products
    return 2 * (2 + again) * line.exchange(product_width(config) * rows * model.n_embd)


def send_s(config: TrainConfig, layout: Topology, batch: Batch, stages: int, machine: Machine) -> float:
    """The stream handed on by each of a rank's stages, and its gradient handed back."""
    stride = layout.data_ranks * layout.cp * layout.tp
    link = machine.inside if layout.pp * stride <= machine.ranks_per_node else machine.between
    size = stream_width(config) * tokens_of(config, layout, batch) * config.model.n_embd
    return 2 * stages * (link.latency_s + size / link.bytes_per_s)
