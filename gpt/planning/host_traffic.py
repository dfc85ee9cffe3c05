"""What a rank that keeps training state in the memory of the host waits for: copies, and a step of the CPUs."""

from __future__ import annotations

from gpt.config import ParallelConfig, Precision, TrainConfig
from gpt.planning.data_traffic import BACKWARD
from gpt.planning.hardware import Host
from gpt.planning.memory import BF16, FP32, Pieces
from gpt.topology.batch import Batch
from gpt.topology.dims import Topology

STEP_BYTES = 7 * FP32
"""For each element of AdamW's step: weight, gradient and both moments are read, and all but the gradient written."""


def keeps_on_host(parallel: ParallelConfig) -> bool:
    """Whether any of it is there."""
    return parallel.cpu_offload or parallel.offload_optimizer or parallel.offload_parameters


def host_s(config: TrainConfig, layout: Topology, batch: Batch, held: Pieces, host: Host, compute_s: float) -> float:
    """Seconds of a step; ``compute_s`` is what one pass computes.

    Weights are brought for each pass, and again for the backward one where they were given back; both hide behind
    computing. What follows does not: gradients go to the host, AdamW steps there, and of DeepSpeed's ranks that have
    the weights on their devices each brings its part back. In stages 2 and 3 gradients go after every pass.
    """
    parallel, fsdp = config.parallel, config.parallel.cpu_offload
    part = held.held() if fsdp else -(-held.elements // layout.data_ranks)
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
