"""The GPT as a workload of the launcher: its keys, the plan of a point, and the command of a rank. Imports no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial

from omegaconf import DictConfig

from gpt.accounting import counts
from gpt.accounting.counts import FP32
from gpt.checkpoint.target import check_target
from gpt.checkpoint.verify import saved_checkpoints, saved_copies
from gpt.components.facts import optimizer_state
from gpt.config import Device, TrainConfig
from gpt.config.compose import LENGTH, NOT_IN_POINT, RESUMABLE, make_paths_absolute, refuse_two_lengths
from gpt.conversion.source import check_init_from
from gpt.data.corpus import check_fit, describe
from gpt.planning import memory
from gpt.planning.auto import choose_parallelism, typed_keys
from gpt.planning.execution import assume_precision, choose_precision, refuse_float8, refuse_tf32
from gpt.topology.dims import settle_steps, split_batch
from gpt.topology.rules import check_parallel_dims, require_deepspeed
from gpt.workload.goal import GOAL_WORDS, rank_set_ups, sized_config
from gpt.workload.plan import (
    checkpoint_text,
    estimated_step,
    execution_rows,
    gpu_name,
    machine_of,
    on_cpus,
    plain_values,
    plan_facts,
    plan_notes,
    plan_rows,
    plan_warnings,
    refuse_size,
    refuse_what_does_not_fit,
    schedule_rows,
    split_batch_over_nodes,
    step_kind,
)
from launch.process import hash_seed
from launch.runs.compose import read_config
from launch.runs.environment import ROOT, source_files
from launch.runs.events import SavedCheckpoint
from launch.runs.folder import RunFolder
from launch.runs.overrides import typed_key
from launch.runs.records import step_figures
from launch.workload import (
    CodeTree,
    PlanRequest,
    RankCommand,
    RankContract,
    SetUp,
    StepTime,
    TrainingGoal,
    Workload,
    WorkloadPlan,
    possible_sizes,
)

PRELOAD = ("gpt.train", "gpt.parallel.ddp", "gpt.parallel.nd", "gpt.parallel.pipeline")
"""Modules that ranks import in every configuration."""


class GptWorkload(Workload):
    """``python -m gpt.train`` on every rank."""

    name = "gpt"
    schema = TrainConfig
    not_in_point = NOT_IN_POINT
    resumable = RESUMABLE
    length = LENGTH
    goal_words = GOAL_WORDS
    figures = step_figures()

    def make_paths_absolute(self, document: DictConfig) -> None:
        """Resolve typed relative paths against the current folder."""
        make_paths_absolute(document)

    def computes_on_cpus(self, config: TrainConfig) -> bool:
        """Return True if the config excludes GPUs on any machine."""
        return config.device is Device.cpu

    def plan(self, config: TrainConfig, request: PlanRequest) -> WorkloadPlan:
        """Return parallelism, batch, memory and corpus of a point.

        Raises:
            ConfigError: ranks, batch, model and corpus do not go together, or exceed the nodes.
        """
        check_init_from(config, request.folder)
        refuse_two_lengths(config.optim.max_tokens, request.overrides)
        gpu = gpu_name(request)
        precision = choose_precision(config, request.folder, on_cpus(config, request), gpu)
        config = assume_precision(config, precision)
        refuse_float8(config, on_cpus(config, request), gpu)
        refuse_tf32(config, gpu)
        choice = choose_parallelism(
            config, request.overrides, request.folder, request.world_size, lambda: machine_of(config, request)
        )
        config = choice.apply(config)
        if request.is_local:
            require_deepspeed(config)
        if config.checkpoint.copy_to is not None:
            check_target(config.checkpoint.copy_to, request.folder.path)
        dims = check_parallel_dims(config, request.world_size)
        batch = split_batch_over_nodes(config, dims, request)
        config = settle_steps(config, batch)
        corpus = describe(config.data, config.data_cache)
        check_fit(corpus, config.model, config.eval.sequences)
        needed = memory.per_rank(config, dims, batch)
        refuse_what_does_not_fit(config, needed, request)
        counted = counts.count(config.model)
        step = estimated_step(config, dims, batch, request)
        step_s = None if step is None else step.step_s
        return WorkloadPlan(
            rows={
                **plan_rows(config, dims, batch, needed, str(corpus)),
                "checkpoints": checkpoint_text(config, request.world_size, request.nodes),
                **execution_rows(config, precision, request),
                **schedule_rows(config, request.folder.read_events()),
            },
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
            checkpoint_bytes=round(counted.total * (FP32 + optimizer_state(config.optim).per_element)),
            step_kind=step_kind(config, dims, batch),
            step_s=None if on_cpus(config, request) else step_s,  # the estimate assumes one rate for all CPUs
            saves=f"checkpoint.interval={config.checkpoint.interval}",
            saves_more_often=f"checkpoint.interval={saves_more_often(config)}",
            checkpoints_kept=config.checkpoint.keep_last + 1,
            uses_cpus=on_cpus(config, request),
            fewer_nodes=possible_sizes(request, partial(refuse_size, config)),
        )

    def step_time(self, config: TrainConfig, request: PlanRequest) -> StepTime | None:
        """Return the time of a step on nodes as ``request.cluster`` describes them; None if the description is
        incomplete.

        Raises:
            ConfigError: ranks, batch and model do not go together.
        """
        precision = choose_precision(config, request.folder, on_cpus(config, request), gpu_name(request))
        config = assume_precision(config, precision)
        dims = check_parallel_dims(config, request.world_size)
        return estimated_step(config, dims, split_batch_over_nodes(config, dims, request), request)

    def set_ups(self, config: TrainConfig, request: PlanRequest, goal: TrainingGoal) -> list[SetUp]:
        """Return layouts that train a model of a given size on the nodes of ``request``, the fastest first.

        Raises:
            ConfigError: no model has that size, or no layout is valid or fits.
        """
        has_batch = any(typed_key(word) == "optim.global_batch" for word in request.overrides)
        config = sized_config(config, goal, has_batch)
        config = assume_precision(config, choose_precision(config, request.folder, False, gpu_name(request)))
        machine, fixed = machine_of(config, request), typed_keys(request.overrides)
        return rank_set_ups(config, request.world_size, machine, fixed)

    def command(self, config: TrainConfig, folder: RunFolder, attempt: int) -> RankCommand:
        """Return the command of the training script, which reads everything else from the run folder."""
        args = (sys.executable, "-m", "gpt_launch", "gpt.train", "--run", str(folder.path))
        # Python reads the hash seed only at its start, so ranks must be executed anew (see fix_hash_seed).
        defaults = {"PYTHONHASHSEED": hash_seed(config.seed)} if config.deterministic else {}
        return RankCommand(args, defaults=defaults, preload=PRELOAD, wants_memory_store=config.checkpoint.in_memory)

    def contract(self, config: TrainConfig, world_size: int) -> RankContract:
        """Return the contract of ranks that report everything themselves, through ``launch.worker``."""
        if config.optim.max_tokens is not None:
            batch = split_batch(config.optim, check_parallel_dims(config, world_size).data_ranks)
            config = settle_steps(config, batch)
        return RankContract(unit="tokens", max_steps=config.optim.max_steps)

    def code(self, config: TrainConfig) -> CodeTree:
        """Return the packages of this project."""
        return CodeTree(ROOT, source_files, has_launcher=True)

    def checkpoints(self, folder: RunFolder) -> Iterator[SavedCheckpoint]:
        """Yield the checkpoints of a run, newest first."""
        return saved_checkpoints(folder.checkpoints)

    def copies(self, folder: RunFolder) -> Iterator[SavedCheckpoint]:
        """Yield the remote copies of a run's checkpoints, newest first.

        Raises:
            ConfigError: the run makes no copies, or they are unreachable.
        """
        return saved_copies(read_config(folder, TrainConfig).checkpoint.copy_to, folder.path)


def saves_more_often(config: TrainConfig) -> str:
    """Return a ``checkpoint.interval`` of half the length, as an override."""
    every = config.checkpoint.every()
    if every.minutes is not None:
        return f"{every.minutes / 2:g}min"
    return str(max(1, every.steps // 2 if every.steps else config.optim.max_steps // 10))
