"""Refusal of a point whose batch its ranks cannot share, or whose ranks its nodes cannot hold. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterator

from gpt.accounting.hardware import find
from gpt.config import Device, Precision, Recompute, Strategy, TrainConfig, nearest_divisor
from gpt.planning.hardware import free_memory
from gpt.planning.memory import GIB, Memory, in_memory_bytes, per_rank, staging_bytes
from gpt.topology.batch import Batch, split_batch
from gpt.topology.dims import ParallelDims
from gpt.topology.rules import check_parallel_dims
from gpt.workload.nodes import gpu_memory, gpu_name, gpu_words, host_memory, on_cpus
from launch.errors import ConfigError, counted
from launch.workload import PlanRequest


def split_batch_over_nodes(config: TrainConfig, dims: ParallelDims, request: PlanRequest) -> Batch:
    """Split the global batch, naming nodes and ranks where that does not go."""
    total, ranks = config.optim.global_batch, dims.data_ranks
    if not config.optim.weak_scaling and total % ranks:
        found = (
            f"nodes={request.nodes} x {request.ranks_per_node} ranks = {ranks} ranks, but optim.global_batch={total} "
            f"is not a multiple of {ranks}"
        )
        # Of model-parallel ranks several share a sequence; what every point of the sweep can split has to be a multiple
        # of each point's data-parallel ranks.
        together = request.world_size // ranks
        every = math.lcm(ranks, *(size // together for size in request.sweep_sizes if size % together == 0))
        points = " of every point" if every != ranks else ""
        fewer = nearest_divisor(total, ranks)
        raise ConfigError(
            found,
            f"the same number of sequences for every rank{points}",
            f"optim.global_batch={-(-total // every) * every}, or {counted(fewer, 'rank')} in all",
        )
    return split_batch(config.optim, ranks)


def refuse_size(config: TrainConfig, request: PlanRequest) -> None:
    """Raise ConfigError where a run in the middle of its steps could not go on with the ranks of ``request``.

    Micro-batches, accumulation and shards follow from the number of ranks; tp, cp, pp, ep and a typed dp_shard stay.
    """
    if config.optim.weak_scaling:
        raise ConfigError(
            "optim.weak_scaling=true, by which the global batch follows from the number of ranks",
            "the same global batch with fewer nodes",
            "optim.weak_scaling=false",
        )
    dims = check_parallel_dims(config, request.world_size)
    batch = split_batch_over_nodes(config, dims, request)
    refuse_what_does_not_fit(config, per_rank(config, dims, batch), request)


def refuse_what_does_not_fit(config: TrainConfig, needed: Memory, request: PlanRequest) -> None:
    """Raise ConfigError where the nodes, as far as they are known, cannot hold ranks that need ``needed`` each."""
    if request.is_local:
        refuse_too_few_gpus(config, request)
    refuse_too_little_memory(config, needed, request)
    refuse_too_little_host(config, needed, request)


def refuse_too_few_gpus(config: TrainConfig, request: PlanRequest) -> None:
    """Raise ConfigError where local ranks would have to share GPUs, or there are none and cuda was asked for."""
    gpus = request.local_gpus
    if config.device is Device.cpu or (config.device is Device.auto and gpus == 0):
        return
    if request.world_size > gpus:
        raise ConfigError(
            f"nodes={request.nodes} x {request.ranks_per_node} ranks = {request.world_size} ranks on a machine with "
            f"{gpus} GPUs",
            "a GPU for each rank",
            "device=cpu" if gpus == 0 else f"nodes=1 ranks_per_node={gpus}, or device=cpu",
        )


def refuse_too_little_memory(config: TrainConfig, needed: Memory, request: PlanRequest) -> None:
    """Raise ConfigError where the memory that is known cannot hold the run."""
    if on_cpus(config, request) and request.is_local:
        have, ranks, where = free_memory(), request.world_size, "free on this machine"
        wanted = needed.total + needed.host + staging_bytes(config, request.world_size)
        wanted += in_memory_bytes(config, request.world_size, request.nodes)
    elif (memory := gpu_memory(request)) is not None:
        have, ranks, where, wanted = memory, 1, f"on a GPU ({gpu_words(request)})", needed.total
    else:
        return
    if ranks * wanted > have:
        each = f"{wanted / GIB:.2f} GiB"
        total = f"{ranks} ranks x {each} = {ranks * wanted / GIB:.2f} GiB" if ranks > 1 else f"a rank of {each}"
        raise ConfigError(
            f"{total}, and {have / GIB:.2f} GiB {where}",
            "a run that fits",
            ", or ".join([*smaller(config, request), "a smaller model"]),
        )


def smaller(config: TrainConfig, request: PlanRequest) -> Iterator[str]:
    """Suggest overrides that need less memory, the cheapest first."""
    if config.checkpoint.in_memory and on_cpus(config, request):
        yield "checkpoint.in_memory=false"
    known = find(gpu_name(request) or "")
    if config.precision is Precision.fp32 and not on_cpus(config, request):
        yield f"precision={(Precision.bf16 if known is None else known.half).name}"
    if config.optim.max_micro_batch > 1:
        yield "optim.max_micro_batch=1"
    if config.recompute is Recompute.none:
        yield "recompute=selective"
    if config.parallel.strategy is Strategy.fsdp or config.parallel.zero_stage == 3:
        yield "more nodes"
    else:
        yield "parallel=fsdp"


def refuse_too_little_host(config: TrainConfig, needed: Memory, request: PlanRequest) -> None:
    """Raise ConfigError where what GPUs leave to the memory of their node is more than that has, as far as is known."""
    have, staging = host_memory(request), staging_bytes(config, request.world_size)
    held = in_memory_bytes(config, request.world_size, request.nodes)
    computing = needed.total if on_cpus(config, request) and held else 0  # on GPUs it is not the node's memory
    if have is None or (on_cpus(config, request) and not held) or needed.host + staging + held + computing <= have:
        return
    parts = [
        (computing, "training in"),
        (needed.host, "offload of"),
        (staging, "checkpoints that are staged in"),
        (held, "checkpoints in memory of"),
    ]
    asked = ", ".join(f"{text} {size / GIB:.2f} GiB" for size, text in parts if size)
    fixes = ["more nodes", *(["no offload"] if needed.host else [])]
    fixes += ["checkpoint.in_memory=false"] if held else ["checkpoint.asynchronous=false"] if staging else []
    raise ConfigError(
        f"{asked} for each rank, and {have / GIB:.2f} GiB of a node's memory for each",
        "a node that holds what its GPUs leave to it",
        f"{', '.join(fixes)}, or cluster.mem_gb=N where the nodes have more",
    )
