"""Plan of a point in words for people and in facts for programs. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from enum import Enum
from typing import Any

from gpt.accounting import flops, parameters
from gpt.accounting.hardware import find
from gpt.config import Float8, ParallelConfig, Precision, Strategy, TrainConfig
from gpt.config.float8 import float8_words
from gpt.config.optim import describe_extended_schedule
from gpt.data.corpus import Corpus
from gpt.planning.advice import execution_warnings, many_epochs, many_time_limits
from gpt.planning.auto import ParallelChoice
from gpt.planning.execution import choose_compile, choose_tf32
from gpt.planning.explain import table
from gpt.planning.memory import GIB, Memory, in_memory_bytes, staging_bytes
from gpt.topology.batch import Batch
from gpt.topology.dims import ParallelDims
from gpt.workload.nodes import gpu_name, on_cpus
from launch.runs.events import Events, is_finished, planned_steps
from launch.workload import PlanRequest


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


def checkpoint_text(config: TrainConfig, world_size: int, nodes: int = 1) -> str:
    """Say when checkpoints are saved, and what that holds up."""
    every, staging = str(config.checkpoint.every()), staging_bytes(config, world_size)
    copied = f"; copied to {config.checkpoint.copy_to}" if config.checkpoint.copy_to else ""
    if not staging:
        return f"{every}, each waited for (checkpoint.asynchronous=false){copied}"
    own = config.parallel.strategy is Strategy.deepspeed and config.parallel.zero_stage
    held = in_memory_text(config, world_size, nodes)
    first = " on the first, in DeepSpeed's own files," if own else ""
    return f"{every}, in the background from {staging / GIB:.3f} GiB of host memory per rank{first}{held}{copied}"


def in_memory_text(config: TrainConfig, world_size: int, nodes: int) -> str:
    """Say how often the state goes into the memory of the nodes, and how much of it that takes."""
    if not config.checkpoint.in_memory:
        return ""
    held = in_memory_bytes(config, world_size, nodes)
    where = "its own node and of the next" if nodes > 1 else "its node"
    gone = "a lost head node, or two neighbors lost together, take" if nodes > 1 else "a lost node takes"
    return (
        f"; every {config.checkpoint.in_memory_interval} steps in the memory of {where}, "
        f"{held / GIB:.3f} GiB for each rank of a node ({gone} it along: then the disk's counts)"
    )


def execution_rows(config: TrainConfig, precision: Precision, request: PlanRequest) -> dict[str, str]:
    """Precision and compilation that the plan counts with, and where only the ranks can tell."""
    name = "bf16, where the GPUs compute in it" if precision is Precision.auto else precision.name
    compiled = choose_compile(config, request.world_size, on_cpus(config, request))
    known = find(gpu_name(request) or "")
    has_tf32 = known is None or known.tf32 is not None
    tf32 = " in TF32" if choose_tf32(config, on_cpus(config, request)) and has_tf32 else ""
    float8 = "" if config.float8 is Float8.none else f" with {float8_words(config)}"
    return {"execution": f"{name}{tf32}{float8}, compile {compiled.name}"}


def schedule_rows(config: TrainConfig, events: Events) -> dict[str, str]:
    """Learning rate where the run was finished after fewer steps, and is to go on."""
    before = planned_steps(events)
    if before is None or before >= config.optim.max_steps or not is_finished(events):
        return {}
    return {"schedule": describe_extended_schedule(config.optim, before)}


def plan_notes(choice: ParallelChoice) -> dict[str, tuple[str, ...]]:
    """Reason for which the model is parallelized so, where the command left that open, and what else there was."""
    if not choice.why:
        return {}
    return {"chosen": (choice.why, *table([layout.as_dict() for layout in choice.best]), *choice.left_out)}


def plan_warnings(
    config: TrainConfig, batch: Batch, corpus: Corpus, request: PlanRequest, step_s: float | None
) -> Iterator[str]:
    """Yield what would work, and is hardly what somebody wants."""
    if not on_cpus(config, request):
        compiled = choose_compile(config, request.world_size, on_cpus=False)
        settled = replace(config, tf32=choose_tf32(config, on_cpus=False), compile=compiled)
        yield from execution_warnings(settled, gpu_name(request))
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
