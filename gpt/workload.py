"""The GPT of this project as the launcher sees it: its keys, the plan of a point, and the command of a rank.

Owns what needs both sides: the config of a training run, and what is said of the nodes. Torch-free.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

from omegaconf import DictConfig

from gpt.accounting import flops, parameters
from gpt.accounting.hardware import GIGA, KNOWN, find, memory_bytes
from gpt.checkpoint.verify import saved_checkpoints
from gpt.config import Device, ParallelConfig, Precision, Recompute, Strategy, TrainConfig, nearest_divisor
from gpt.config.compose import NOT_IN_POINT, RESUMABLE, make_paths_absolute
from gpt.conversion.source import check_init_from
from gpt.data.corpus import Corpus, check_fit, describe
from gpt.planning import memory
from gpt.planning.advice import many_epochs, many_time_limits, slow_precision
from gpt.planning.auto import ParallelChoice, choose_parallelism
from gpt.planning.cost import estimate
from gpt.planning.execution import assume_precision, choose_compile, choose_precision
from gpt.planning.explain import table
from gpt.planning.hardware import Machine, MachineOverrides, cpus, free_memory, gpus, known_gpu
from gpt.planning.memory import GIB, Memory
from gpt.topology.batch import Batch, split_batch
from gpt.topology.dims import ParallelDims
from gpt.topology.rules import check_parallel_dims, require_deepspeed
from launch.errors import ConfigError
from launch.process import hash_seed
from launch.runs.folder import RunFolder
from launch.runs.provenance import ROOT, source_files
from launch.runs.ranges import closest
from launch.runs.saved import SavedCheckpoint
from launch.workload import CodeTree, PlanRequest, RankCommand, RankContract, WorkloadPlan

BYTES_PER_PARAMETER = 12
"""Of a checkpoint: weights and both of Adam's moments, in fp32."""

PRELOAD = ("gpt.train", "gpt.parallel.ddp", "gpt.parallel.nd", "gpt.parallel.pipeline")
"""Modules that ranks import, however they are configured."""


class GptWorkload:
    """``python -m gpt.train`` on every rank."""

    name = "gpt"
    schema = TrainConfig
    not_in_point = NOT_IN_POINT
    resumable = RESUMABLE

    def make_paths_absolute(self, document: DictConfig) -> None:
        """Take the paths that were typed relative to the folder they were typed in."""
        make_paths_absolute(document)

    def plan(self, config: TrainConfig, request: PlanRequest) -> WorkloadPlan:
        """Parallelism, batch, memory and corpus of a point.

        Raises:
            ConfigError: ranks, batch, model and corpus do not go together, or the nodes cannot hold them.
        """
        check_init_from(config, request.folder)
        gpu = gpu_name(request)
        precision = choose_precision(config, request.folder, on_cpus(config, request), gpu)
        config = assume_precision(config, precision)
        choice = choose_parallelism(
            config, request.overrides, request.folder, request.world_size, lambda: machine_of(config, request)
        )
        config = choice.apply(config)
        if request.is_local:
            require_deepspeed(config)
        dims = check_parallel_dims(config, request.world_size)
        batch = split_batch_over_nodes(config, dims, request)
        corpus = describe(config.data, config.data_cache)
        check_fit(corpus, config.model, config.eval.sequences)
        needed = memory.per_rank(config, dims, batch)
        refuse_what_does_not_fit(config, needed, request)
        counted = parameters.count(config.model)
        interval = config.checkpoint.interval
        often = interval // 2 if interval else config.optim.max_steps // 10
        step_s = estimated_step_s(config, dims, batch, request)
        return WorkloadPlan(
            rows=plan_rows(config, dims, batch, needed, str(corpus)) | execution_rows(config, precision, request),
            notes=plan_notes(choice),
            facts=plan_facts(config, dims, batch, needed, str(corpus), choice),
            settled={
                "parallel": plain_values(config.parallel),
                "optim.max_micro_batch": choice.micro_batch,
                "precision": precision.name,
            },
            warnings=tuple(plan_warnings(config, batch, corpus, request, step_s)),
            max_steps=config.optim.max_steps,
            checkpoint_kind=f"{config.model.name} {counted.total}",
            checkpoint_bytes=counted.total * BYTES_PER_PARAMETER,
            step_kind=step_kind(config, dims, batch),
            step_s=None if on_cpus(config, request) else step_s,  # the model assumes one rate for all CPUs
            saves=f"checkpoint.interval={interval}",
            saves_more_often=f"checkpoint.interval={max(1, often)}",
            checkpoints_kept=config.checkpoint.keep_last + 1,
            uses_cpus=on_cpus(config, request),
        )

    def command(self, config: TrainConfig, folder: RunFolder, attempt: int) -> RankCommand:
        """The training script, which reads everything else from the run folder."""
        args = (sys.executable, "-m", "gpt.train", "--run", str(folder.path))
        # Python reads the hash seed only at its start, which takes ranks that are executed (see fix_hash_seed).
        defaults = {"PYTHONHASHSEED": hash_seed(config.seed)} if config.deterministic else {}
        return RankCommand(args, defaults=defaults, preload=PRELOAD)

    def contract(self, config: TrainConfig, world_size: int) -> RankContract:
        """Ranks that tell everything themselves, through ``launch.worker``."""
        return RankContract(unit="tokens", max_steps=config.optim.max_steps)

    def code(self, config: TrainConfig) -> CodeTree:
        """The packages of this project."""
        return CodeTree(ROOT, source_files, has_launcher=True)

    def checkpoints(self, folder: RunFolder) -> Iterator[SavedCheckpoint]:
        """Yield the checkpoints of a run, newest first."""
        return saved_checkpoints(folder.checkpoints)


def plain_values(parallel: ParallelConfig) -> dict[str, Any]:
    """The keys of ``parallel`` as JSON and YAML hold them."""
    return {key: value.name if isinstance(value, Enum) else value for key, value in asdict(parallel).items()}


def plan_rows(config: TrainConfig, dims: ParallelDims, batch: Batch, needed: Memory, corpus: str) -> dict[str, str]:
    """Lines of the plan for people."""
    counted, steps = parameters.count(config.model), config.optim.max_steps
    active = f", {counted.active:,} active for a token" if counted.active != counted.total else ""
    gflop = flops.training_flops_per_token(config.model).palm / 1e9
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
        "memory": f"{needed.total / GIB:.3f} GiB per rank ({parts}){host}",
        "data": corpus,
    }


def execution_rows(config: TrainConfig, precision: Precision, request: PlanRequest) -> dict[str, str]:
    """Precision and compilation that the plan counts with, and where only the ranks can tell."""
    name = "bf16, where the GPUs compute in it" if precision is Precision.auto else precision.name
    compiled = choose_compile(config, request.world_size, on_cpus(config, request))
    return {"execution": f"{name}, compile {compiled.name}"}


def plan_notes(choice: ParallelChoice) -> dict[str, tuple[str, ...]]:
    """Reason for which the model is parallelized so, where the command left that open, and what else there was."""
    if not choice.why:
        return {}
    return {"chosen": (choice.why, *table([layout.as_dict() for layout in choice.best]), *choice.left_out)}


def plan_warnings(
    config: TrainConfig, batch: Batch, corpus: Corpus, request: PlanRequest, step_s: float | None
) -> Iterator[str]:
    """Yield what would work, and is hardly what somebody wants."""
    name = gpu_name(request)
    if name is not None and not on_cpus(config, request):
        yield from slow_precision(name, config.precision)
    yield from many_epochs(config, batch, corpus.train_tokens)
    if step_s is not None and not request.is_local:
        yield from many_time_limits(step_s * config.optim.max_steps, request.cluster.timeout_min)


def plan_facts(
    config: TrainConfig, dims: ParallelDims, batch: Batch, needed: Memory, corpus: str, choice: ParallelChoice
) -> dict[str, Any]:
    """The plan for programs."""
    counted = parameters.count(config.model)
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
        "parameters_active": counted.active,  # what one token is computed with: of experts those it goes to
        "flops_per_token": flops.training_flops_per_token(config.model).palm,
        "memory_bytes": {**asdict(needed), "total": needed.total},
        "parallel": plain_values(config.parallel),
        "micro_batch_limit": choice.micro_batch,
        "data": corpus,
        "chosen": choice.why,
        "choices": [layout.as_dict() for layout in choice.best],
        "left_out": list(choice.left_out),
    }


def step_kind(config: TrainConfig, dims: ParallelDims, batch: Batch) -> str:
    """Return the settings that decide how long a step takes on given nodes, beside the data."""
    counted = parameters.count(config.model)
    size = f"{config.model.name} {counted.total} {batch.global_batch}x{config.model.block_size} micro {batch.micro}"
    how = (config.device, config.precision, config.compile, config.recompute)
    return " ".join([size, str(dims), *(choice.name for choice in how)])


def estimated_step_s(config: TrainConfig, dims: ParallelDims, batch: Batch, request: PlanRequest) -> float | None:
    """Time of a step by the cost model of the layouts; None on this machine's CPUs, and where too little is known."""
    if request.is_local and on_cpus(config, request):
        return None
    try:
        machine = machine_of(config, request)
    except ConfigError:  # too little is said of the nodes, which only parallel=auto has to know
        return None
    return estimate(config, dims, batch, machine).step_s


def split_batch_over_nodes(config: TrainConfig, dims: ParallelDims, request: PlanRequest) -> Batch:
    """Split the global batch, naming nodes and ranks where that does not go."""
    total, ranks = config.optim.global_batch, dims.data_ranks
    if not config.optim.weak_scaling and total % ranks:
        found = (
            f"nodes={request.nodes} x {request.ranks_per_node} ranks = {ranks} ranks, but optim.global_batch={total} "
            f"is not a multiple of {ranks}"
        )
        fewer = nearest_divisor(total, ranks)
        raise ConfigError(
            found,
            "the same number of sequences for every rank",
            f"optim.global_batch={-(-total // ranks) * ranks}, or {fewer} ranks in all",
        )
    return split_batch(config.optim, ranks)


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
        wanted = needed.total + needed.host
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
    known = find(gpu_name(request) or "")
    if config.precision is Precision.fp32 and not on_cpus(config, request) and (known is None or known.bf16):
        yield "precision=bf16"
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
    have = host_memory(request)
    if on_cpus(config, request) or have is None or needed.host <= have:
        return
    raise ConfigError(
        f"offload of {needed.host / GIB:.2f} GiB for each rank, and {have / GIB:.2f} GiB of a node's memory for each",
        "a node that holds what its GPUs leave to it",
        "more nodes, no offload, or cluster.mem_gb=N where the nodes have more",
    )


def on_cpus(config: TrainConfig, request: PlanRequest) -> bool:
    """True where the ranks will compute on CPUs, as far as can be told from here."""
    if config.device is not Device.auto:
        return config.device is Device.cpu
    if request.is_local:
        return request.local_gpus == 0
    return not (request.cluster.gpus_per_node or request.cluster.gpu_name or "gpu" in (request.cluster.gres or ""))


def gpu_memory(request: PlanRequest) -> int | None:
    """Bytes of one GPU, as far as they are said or known."""
    cluster = request.cluster
    if cluster.gpu_memory_gib is not None:
        return int(cluster.gpu_memory_gib * GIB)
    name = known_gpu(cluster.gpu_name, cluster.gpu_memory_gib)
    return None if name is None else memory_bytes(name)


def gpu_name(request: PlanRequest) -> str | None:
    """Return the whole name of the GPUs, as it is said of the nodes or seen on this machine; None where unknown."""
    return known_gpu(request.cluster.gpu_name, request.cluster.gpu_memory_gib) or request.local_gpu_name


def gpu_words(request: PlanRequest) -> str:
    """Where the memory of a GPU is known from."""
    cluster = request.cluster
    if cluster.gpu_memory_gib is not None:
        return "cluster.gpu_memory_gib"
    return f"cluster.gpu_name: {known_gpu(cluster.gpu_name, None)}"


def machine_of(config: TrainConfig, request: PlanRequest) -> Machine:
    """Return the hardware that the estimates assume of the nodes of a cluster.

    Raises:
        ConfigError: too little is said of them.
    """
    cluster, links = request.cluster, request.cluster.interconnect
    overrides = MachineOverrides(
        memory=gpu_memory(request),
        peak_tflops=cluster.gpu_tflops,
        attainable=cluster.matmul_efficiency,
        inside_gb_per_s=links.intra_node.bandwidth_gb_per_s,
        between_gb_per_s=links.inter_node.bandwidth_gb_per_s,
        inside_latency_s=links.intra_node.latency_us / 1e6,
        between_latency_s=links.inter_node.latency_us / 1e6,
        host_memory=host_memory(request),
    )
    if on_cpus(config, request):
        return cpus(cpu_memory(request), request.ranks_per_node, overrides)
    name = gpu_name(request)
    found = gpus(name or "", config.precision, request.ranks_per_node, overrides)
    if found is None:
        raise ConfigError(
            f"parallel.strategy=auto, and GPUs of which nothing is known ({name or 'no cluster.gpu_name'}) in "
            f"precision={config.precision.name}",
            "cluster.gpu_name, as nvidia-smi -L prints it; or cluster.gpu_tflops and cluster.gpu_memory_gib",
            f"""'cluster.gpu_name="{(closest(name or "", KNOWN) or ["NVIDIA H100 80GB HBM3"])[0]}"'""",
        )
    return found if name else replace(found, device="a GPU")


def host_memory(request: PlanRequest) -> int | None:
    """Bytes of a node's memory that one rank may have; None where nobody said."""
    if request.is_local:
        return free_memory() // request.world_size
    return None if request.cluster.mem_gb is None else int(request.cluster.mem_gb * GIGA) // request.ranks_per_node


def cpu_memory(request: PlanRequest) -> int:
    """Bytes that one rank on CPUs may have."""
    found = host_memory(request)
    if found is None:
        raise ConfigError(
            "parallel.strategy=auto on nodes of unknown memory",
            "cluster.mem_gb, the memory of a node; or, on GPUs, cluster.gpu_name",
            "cluster.mem_gb=64",
        )
    return found
