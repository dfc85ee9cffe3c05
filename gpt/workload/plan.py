"""Plan of a run for the launcher: hardware of its nodes, text, JSON, warnings and checks. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Any

from gpt.accounting import (
    GIB,
    GIGA,
    KNOWN,
    TERA,
    count,
    count_hidden,
    expand,
    find,
    memory_bytes,
    peak_flops,
    training_flops_per_token,
)
from gpt.config import (
    Device,
    Float8,
    ParallelConfig,
    Precision,
    Recompute,
    Strategy,
    TrainConfig,
    float8_words,
    nearest_divisor,
    prevents_chunked_loss,
)
from gpt.config.optim import MUON, describe_extended_schedule, describe_schedule, muon_options
from gpt.data.corpus import Corpus
from gpt.planning import Machine, cpus, free_memory, gpus, known_gpu, with_network
from gpt.planning.auto import (
    ParallelChoice,
    choose_compile,
    choose_tf32,
    execution_warnings,
    many_epochs,
    many_time_limits,
)
from gpt.planning.cost import estimate
from gpt.planning.memory import RankMemory, checkpoint_bytes, in_memory_bytes, per_rank, staging_bytes
from gpt.planning.search import table
from gpt.topology import Batch, ParallelDims, settle_steps, split_batch
from gpt.topology.check_dims import check_parallel_dims
from launch.errors import ConfigError, closest, counted
from launch.runs.compose import read_config
from launch.runs.events import is_finished, planned_steps
from launch.runs.folder import RunFolder
from launch.runs.measured import MatmulRates, read_matmul_rates, read_network
from launch.workload import PlanRequest, StepTime

# Hardware of the nodes of a point, as the config states it or this machine detects it, and the time of a step on it.


def on_cpus(config: TrainConfig, request: PlanRequest) -> bool:
    """Return True if the ranks will compute on CPUs. This is so with ``device=cpu``. With ``device=auto`` it is so for
    a local run if this machine has no GPU, and for another run if the config of the cluster names no GPUs."""
    if config.device is not Device.auto:
        return config.device is Device.cpu
    if request.is_local:
        return request.local_gpus == 0
    return not (request.cluster.gpus_per_node or request.cluster.gpu_name or "gpu" in (request.cluster.gres or ""))


def gpu_memory(request: PlanRequest) -> int | None:
    """Return the memory of one GPU in bytes; None if the config states neither the memory nor the name of the GPU, or
    if the memory of the named GPU is unknown.

    Raises:
        ConfigError: the config states only a name, and this name is unknown, or fits GPUs with different memory.
    """
    cluster = request.cluster
    if cluster.gpu_memory_gib is not None:
        return int(cluster.gpu_memory_gib * GIB)
    name = known_gpu(cluster.gpu_name, cluster.gpu_memory_gib)
    return None if name is None else memory_bytes(name)


def gpu_name(request: PlanRequest) -> str | None:
    """Return the whole name of the GPUs; None if it is unknown. The name in the config comes first, then that of the
    GPUs of this machine, then that which Slurm reports.

    A name that Slurm reports can mean several GPUs with equal peaks. The result is then the one with the least memory.

    Raises:
        ConfigError: the config states a name without the memory, and this name is unknown, or fits GPUs with different
            memory.
    """
    said = known_gpu(request.cluster.gpu_name, request.cluster.gpu_memory_gib) or request.local_gpu_name
    told = expand(request.gpu_type) if said is None and request.gpu_type is not None else []
    return said or min(told, key=lambda name: memory_bytes(name) or 0, default=None)


def requested_machine(config: TrainConfig, request: PlanRequest) -> Machine:
    """Return the hardware of the requested nodes, for estimates.

    Raises:
        ConfigError: the config does not describe the nodes completely, or a file of measurements that it names is
            invalid.
    """
    cluster, ranks = request.cluster, request.ranks_per_node
    rates = matmul_rates(config, request)
    if on_cpus(config, request):
        memory = host_memory(request)
        if memory is None:
            raise ConfigError(
                "parallel.strategy=auto on nodes of unknown memory",
                "cluster.mem_gb, the memory of a node; or, on GPUs, cluster.gpu_name",
                "cluster.mem_gb=64",
            )
        return calibrate(cpus(memory, ranks), rates, request)
    name = gpu_name(request)
    known = peak_flops(name or "", config.precision, choose_tf32(config, on_cpus=False))
    peak = known if cluster.gpu_tflops is None else cluster.gpu_tflops * TERA
    found = gpus(name or "", peak, ranks, memory=gpu_memory(request), host_memory=host_memory(request))
    if found is None:
        raise ConfigError(
            f"parallel.strategy=auto, and GPUs of which nothing is known ({name or 'no cluster.gpu_name'}) in "
            f"precision={config.precision.name}",
            "cluster.gpu_name, as nvidia-smi -L prints it; or cluster.gpu_tflops and cluster.gpu_memory_gib",
            f"""'cluster.gpu_name="{(closest(name or "", KNOWN) or ["NVIDIA H100 80GB HBM3"])[0]}"'""",
        )
    return calibrate(found if name else replace(found, device="a GPU"), rates, request)


def calibrate(machine: Machine, rates: MatmulRates | None, request: PlanRequest) -> Machine:
    """Return ``machine`` with better figures where they are known: the network bandwidth of the config, measured rates
    of matrix products, and measured links. The correction factors of ``request`` for computing and communication are
    applied at the end.

    ``rates`` are the measured rates of matrix products; None if not measured.

    Raises:
        ConfigError: the file ``cluster.network`` is no measurement of a network.
    """
    stated = request.cluster.inter_node_gb_per_s
    if stated is not None:  # the bandwidth of a node, which its ranks share
        between = replace(machine.inter_node, bytes_per_s=stated * GIGA / machine.ranks_per_node)
        machine = replace(machine, inter_node=between)
    if rates is not None:
        machine = replace(machine, flops_per_s=rates.best, matmul=rates.times(request.rate_factor))
    if request.cluster.network is not None:
        machine = with_network(machine, read_network(Path(request.cluster.network)))
    return replace(
        machine,
        flops_per_s=machine.flops_per_s * request.rate_factor,
        intra_node=machine.intra_node.faster(request.link_factor),
        inter_node=machine.inter_node.faster(request.link_factor),
    )


def matmul_rates(config: TrainConfig, request: PlanRequest) -> MatmulRates | None:
    """Return the rates of matrix products in the file ``cluster.matmul_rates``, in the precision of the run; None if no
    file is set.

    Raises:
        ConfigError: the file is invalid, of another device, or has no rates in this precision.
    """
    if request.cluster.matmul_rates is None:
        return None
    path = Path(request.cluster.matmul_rates)
    found, is_on_cpus = read_matmul_rates(path), on_cpus(config, request)
    device = "CPU" if is_on_cpus else gpu_name(request)
    again = f"python -m gpt.bench_matmul --output {path} on such a node, or cluster.matmul_rates=null"
    if device is not None and device != found.device:
        raise ConfigError(f"cluster.matmul_rates={path}, measured on {found.device}", f"rates of {device}", again)
    precision = "tf32" if choose_tf32(config, is_on_cpus) else config.precision.name
    if precision == "auto":
        precision = "fp32" if is_on_cpus else "bf16"
    if precision not in found.precisions:
        told = f"cluster.matmul_rates={path}, with rates in {', '.join(found.precisions)}"
        raise ConfigError(told, f"rates in {precision}, the precision of the run", again)
    return found.precisions[precision]


def host_memory(request: PlanRequest) -> int | None:
    """Return the host memory for each rank in bytes: the memory of a node divided by its number of ranks. For a local
    run, the free memory of this machine is divided. None if the memory of a node is unknown."""
    if request.is_local:
        return free_memory() // request.world_size
    return None if request.cluster.mem_gb is None else int(request.cluster.mem_gb * GIB) // request.ranks_per_node


def estimated_step(config: TrainConfig, dims: ParallelDims, batch: Batch, request: PlanRequest) -> StepTime | None:
    """Return the estimated time of a step. Return None for a local run on CPUs, or if the config does not describe the
    nodes completely.

    Raises:
        ConfigError: the file ``cluster.matmul_rates`` is invalid, of another device, or has no rates in this precision.
    """
    if request.is_local and on_cpus(config, request):
        return None
    matmul_rates(config, request)  # refuses a file of another device; an incomplete description is no error here
    try:
        machine = requested_machine(config, request)
    except ConfigError:  # an incomplete description of the nodes matters only to parallel=auto
        return None
    found = estimate(config, dims, batch, machine)
    return StepTime(found.compute_s, found.bubble_s, found.communication_s)


# Plan of a point as text for people and as facts for programs.


def plain_values(parallel: ParallelConfig) -> dict[str, Any]:
    """Return the keys of ``parallel`` with plain values, for JSON and YAML."""
    return {key: value.name if isinstance(value, Enum) else value for key, value in asdict(parallel).items()}


def plan_rows(config: TrainConfig, dims: ParallelDims, batch: Batch, needed: RankMemory, corpus: str) -> dict[str, str]:
    """Return rows of the plan that the launcher prints, on layout, model, batch, memory and data: title -> text.

    ``needed`` is the memory of a rank, and ``corpus`` the description of the corpus.
    """
    counted, steps = count(config.model), config.optim.max_steps
    active = f", {counted.active:,} active for a token" if counted.active != counted.total else ""
    active += f", {counted.trained:,} trained" if counted.frozen else ""
    gflop = training_flops_per_token(config.model).palm / 1e9
    tokens = batch.global_batch * config.model.block_size
    shares = {key: value for key, value in asdict(needed).items() if key != "host" and value}
    parts = ", ".join(f"{key} {value / GIB:.3f}" for key, value in shares.items())
    host = f", and {needed.host / GIB:.3f} GiB of host memory" if needed.host else ""
    return {
        "topology": str(dims),
        "model": f"{config.model.name}: {counted.total:,} parameters ({counted.non_embedding:,} without "
        f"embeddings{active}), {gflop:.3g} GFLOP a token",
        "batch": f"global batch {batch.global_batch} x {config.model.block_size} tokens = {batch.accumulation} "
        f"micro-batch{'es' if batch.accumulation > 1 else ''} of {batch.micro} per rank",
        "tokens": f"{tokens:,} a step, {tokens * steps:,} in {steps} steps",
        **muon_row(config, tokens * training_flops_per_token(config.model).palm),
        "memory": f"{needed.total / GIB:.3f} GiB per rank ({parts}){host}",
        "data": corpus,
    }


def muon_row(config: TrainConfig, flops: float) -> dict[str, str]:
    """Return the row of the plan on the FLOPs of the optimizer Muon: title -> text; empty for other optimizers.
    ``flops`` are those of the model in a step."""
    if config.optim.optimizer != MUON:
        return {}
    hidden = count_hidden(config.model)
    cost = muon_options(config.optim)["ns_steps"] * hidden.flops
    return {
        "optimizer": f"Muon for {hidden.elements:,} parameters in matrices of the blocks, {cost / TERA:.3g} "
        f"TFLOP a step, {cost / flops:.1%} of the model's; AdamW for the rest"
    }


def checkpoint_text(config: TrainConfig, world_size: int, nodes: int = 1) -> str:
    """Return text on checkpoints: their interval, whether training waits for them, and the host memory that they
    need."""
    every, staging = str(config.checkpoint.every()), staging_bytes(config, world_size)
    copied = f"; copied to {config.checkpoint.copy_to}" if config.checkpoint.copy_to else ""
    if not staging:
        return f"{every}, each waited for (checkpoint.asynchronous=false){copied}"
    own = config.parallel.strategy is Strategy.deepspeed and config.parallel.zero_stage
    held = in_memory_text(config, world_size, nodes)
    first = " on the first, in DeepSpeed's own files," if own else ""
    return f"{every}, in the background from {staging / GIB:.3f} GiB of host memory per rank{first}{held}{copied}"


def in_memory_text(config: TrainConfig, world_size: int, nodes: int) -> str:
    """Return text on checkpoints in memory: interval in steps, the nodes that keep them, and GiB of host memory for
    each rank; empty if the run keeps no checkpoints in memory."""
    if not config.checkpoint.in_memory:
        return ""
    held = in_memory_bytes(config, world_size, nodes)
    where = "its own node and of the next" if nodes > 1 else "its node"
    gone = "a lost head node, or two neighbors lost together, take" if nodes > 1 else "a lost node takes"
    return (
        f"; every {config.checkpoint.memory_interval} steps in the memory of {where}, "
        f"{held / GIB:.3f} GiB for each rank of a node ({gone} it along: then the disk's counts)"
    )


def execution_rows(config: TrainConfig, precision: Precision, request: PlanRequest) -> dict[str, str]:
    """Return the row of the plan on precision and compilation: title -> text. ``precision`` is ``auto`` if the GPUs are
    unknown."""
    name = "bf16, where the GPUs compute in it" if precision is Precision.auto else precision.name
    compiled = choose_compile(config, request.world_size, on_cpus(config, request))
    known = find(gpu_name(request) or "")
    has_tf32 = known is None or known.has_tf32
    tf32 = " in TF32" if choose_tf32(config, on_cpus(config, request)) and has_tf32 else ""
    float8 = "" if config.float8 is Float8.none else f" with {float8_words(config)}"
    return {"execution": f"{name}{tf32}{float8}, compile {compiled.name}"}


def schedule_text(config: TrainConfig, batch: Batch, folder: RunFolder) -> str:
    """Return text on the learning rate over the run. If the run in ``folder`` is finished and now gets more steps, the
    text also has the rates near its former last step."""
    text, events = describe_schedule(config.optim), folder.read_events()
    steps = planned_steps(events)
    if steps is None or steps >= config.optim.max_steps or not is_finished(events):
        return text
    before = settle_steps(read_config(folder, TrainConfig), batch).optim
    return f"{text}; {describe_extended_schedule(config.optim, before)}"


def plan_notes(choice: ParallelChoice) -> dict[str, tuple[str, ...]]:
    """Return notes of the plan on the parallelism that ``parallel=auto`` has chosen, and on its alternatives: title ->
    lines of text. The result is empty without ``parallel=auto``."""
    if not choice.why:
        return {}
    return {"chosen": (choice.why, *table([layout.as_dict() for layout in choice.best]), *choice.left_out)}


def plan_warnings(
    config: TrainConfig, batch: Batch, corpus: Corpus, request: PlanRequest, step_s: float | None
) -> Iterator[str]:
    """Yield warnings, as text, of settings that work but are hardly intended. ``step_s`` are the estimated seconds of a
    step; None if unknown."""
    if not on_cpus(config, request):
        compiled = choose_compile(config, request.world_size, on_cpus=False)
        settled = replace(config, tf32=choose_tf32(config, on_cpus=False), compile=compiled)
        yield from execution_warnings(settled, gpu_name(request))
        if step_s is not None:
            yield from frequent_saves(config, step_s)
    yield from many_epochs(config, batch, corpus.train_tokens)
    if step_s is not None and not request.is_local:
        yield from many_time_limits(step_s * config.optim.max_steps, request.cluster.timeout_min)


DISK_BYTES_PER_S = 1e9
"""Assumed rate, in bytes a second, at which a run can write to a shared filesystem, for a warning about the interval of
checkpoints."""


def frequent_saves(config: TrainConfig, step_s: float) -> Iterator[str]:
    """Yield a warning if writing a checkpoint takes longer than the steps until the next one, so that training waits
    for the disk. ``step_s`` are the estimated seconds of a step."""
    steps = config.checkpoint.every().steps
    size = checkpoint_bytes(config)
    if steps and steps * step_s < size / DISK_BYTES_PER_S:
        yield (
            f"checkpoint.interval={steps}: a checkpoint of {size / GIB:.3g} GiB takes {size / DISK_BYTES_PER_S:.2g} s "
            f"at 1 GB/s, and {steps} steps take {steps * step_s:.2g} s, so training waits for the disk; "
            "type checkpoint.interval=auto"
        )


def plan_facts(
    config: TrainConfig, dims: ParallelDims, batch: Batch, needed: RankMemory, corpus: str, choice: ParallelChoice
) -> dict[str, Any]:
    """Return the plan as plain JSON, for ``plan.json``. Memory is in bytes, batches in sequences.

    ``needed`` is the memory of a rank, and ``corpus`` the description of the corpus.
    """
    counted = count(config.model)
    tokens = batch.global_batch * config.model.block_size
    return {
        "topology": dims.as_dict(),
        "global_batch": batch.global_batch,
        "micro_batch": batch.micro,
        "accumulation": batch.accumulation,
        "block_size": config.model.block_size,
        "tokens_per_step": tokens,
        "tokens_total": tokens * config.optim.max_steps,
        "model": config.model.name,
        "parameters": counted.total,
        "parameters_non_embedding": counted.non_embedding,
        "parameters_trained": counted.trained,
        "parameters_active": counted.active,  # that one token uses; of the experts only those of the token
        "flops_per_token": training_flops_per_token(config.model).palm,
        "memory_bytes": {**asdict(needed), "total": needed.total},
        "parallel": plain_values(config.parallel),
        "micro_batch_limit": choice.micro_batch,
        "data": corpus,
        "chosen": choice.why,
        "choices": [layout.as_dict() for layout in choice.best],
        "left_out": list(choice.left_out),
    }


# Refusal of a point whose ranks cannot share its batch, or exceed its nodes.


def split_batch_over_nodes(config: TrainConfig, dims: ParallelDims, request: PlanRequest) -> Batch:
    """Return the split of the global batch. Raise ConfigError, with the numbers of nodes and ranks, if the batch cannot
    be divided equally."""
    total, ranks = config.optim.global_batch, dims.data_ranks
    if not config.optim.weak_scaling and total % ranks:
        found = (
            f"nodes={request.nodes} x {request.ranks_per_node} ranks = {ranks} ranks, but optim.global_batch={total} "
            f"is not a multiple of {ranks}"
        )
        # Several model-parallel ranks share a sequence. A batch for every point of a sweep must be a multiple of each
        # point's data-parallel ranks.
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
    """Raise ConfigError if a run that has begun cannot continue with the number of ranks of ``request``. With
    ``optim.weak_scaling``, always raise it, because the global batch follows from the number of ranks.

    Micro-batches, accumulation and shards follow from the number of ranks. The degrees of parallelism in the config
    stay.
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


def refuse_what_does_not_fit(config: TrainConfig, needed: RankMemory, request: PlanRequest) -> None:
    """Raise ConfigError if the run needs more GPUs or memory than the nodes have, as far as that is known. ``needed``
    is the memory of a rank."""
    if request.is_local:
        refuse_too_few_gpus(config, request)
    refuse_too_little_memory(config, needed, request)
    refuse_too_little_host(config, needed, request)


def refuse_too_few_gpus(config: TrainConfig, request: PlanRequest) -> None:
    """Raise ConfigError if a run on this machine has more ranks than GPUs, and ``device`` is ``cuda``, or ``auto`` on a
    machine with GPUs."""
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


def refuse_too_little_memory(config: TrainConfig, needed: RankMemory, request: PlanRequest) -> None:
    """Raise ConfigError if a rank needs more memory than its GPU has, or if ranks on CPUs together need more memory
    than this machine has. ``needed`` is the memory of a rank."""
    if on_cpus(config, request) and request.is_local:
        have, ranks, where = free_memory(), request.world_size, "free on this machine"
        wanted = needed.total + needed.host + staging_bytes(config, request.world_size)
        wanted += in_memory_bytes(config, request.world_size, request.nodes)
    elif (memory := gpu_memory(request)) is not None:
        source = f"cluster.gpu_name: {known_gpu(request.cluster.gpu_name, None)}"
        if request.cluster.gpu_memory_gib is not None:
            source = "cluster.gpu_memory_gib"
        have, ranks, where, wanted = memory, 1, f"on a GPU ({source})", needed.total
    else:
        return
    if ranks * wanted > have:
        each = f"{wanted / GIB:.2f} GiB"
        total = f"{ranks} ranks x {each} = {ranks * wanted / GIB:.2f} GiB" if ranks > 1 else f"a rank of {each}"
        raise ConfigError(
            f"{total}, and {have / GIB:.2f} GiB {where}",
            "a run that fits",
            ", or ".join([*smaller(config, needed, request), "a smaller model"]),
        )


def smaller(config: TrainConfig, needed: RankMemory, request: PlanRequest) -> Iterator[str]:
    """Yield overrides, as text, each of which makes the run need less memory. Those that cost the least speed come
    first. The last one may be the text ``more nodes``. ``needed`` is the memory of a rank."""
    if config.checkpoint.in_memory and on_cpus(config, request):
        yield "checkpoint.memory_interval=0"
    known = find(gpu_name(request) or "")
    if config.precision is Precision.fp32 and not on_cpus(config, request):
        yield f"precision={(Precision.bf16 if known is None else known.half).name}"
    if not config.chunked_loss and needed.logits > needed.total / 10 and prevents_chunked_loss(config) is None:
        yield "chunked_loss=true"
    if config.optim.max_micro_batch > 1:
        yield "optim.max_micro_batch=1"
    if config.recompute is Recompute.none:
        yield "recompute=selective"
    is_sharded = config.parallel.strategy is Strategy.fsdp or config.parallel.zero_stage == 3
    if not is_sharded and request.world_size > 1:
        yield "parallel=fsdp"
    elif not config.parallel.cpu_offload and not on_cpus(config, request):
        yield "parallel=fsdp_offload"
    if is_sharded:
        yield "more nodes"


def refuse_too_little_host(config: TrainConfig, needed: RankMemory, request: PlanRequest) -> None:
    """Raise ConfigError if the ranks need more host memory for offload and checkpoints than their node has. Do nothing
    if the memory of the node is unknown. ``needed`` is the memory of a rank."""
    have, staging = host_memory(request), staging_bytes(config, request.world_size)
    held = in_memory_bytes(config, request.world_size, request.nodes)
    computing = needed.total if on_cpus(config, request) and held else 0  # on GPUs this is not in host memory
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
    fixes += ["checkpoint.memory_interval=0"] if held else ["checkpoint.asynchronous=false"] if staging else []
    raise ConfigError(
        f"{asked} for each rank, and {have / GIB:.2f} GiB of a node's memory for each",
        "a node that holds what its GPUs leave to it",
        f"{', '.join(fixes)}, or cluster.mem_gb=N where the nodes have more",
    )
