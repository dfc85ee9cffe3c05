"""The GPT as a workload of the launcher: its keys, the plan of a run, the command of a rank, and models of a given
size.

Imports no torch.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from omegaconf import DictConfig

from gpt.accounting import count, expand, peak_flops, training_flops_per_token
from gpt.checkpoint.target import check_target, saved_checkpoints, saved_copies
from gpt.config import (
    LENGTH,
    NOT_IN_POINT,
    RESUMABLE,
    Device,
    ModelConfig,
    TrainConfig,
    make_paths_absolute,
    refuse_two_lengths,
)
from gpt.conversion.source import check_init_from
from gpt.data.corpus import check_fit, check_tasks, describe_corpus
from gpt.planning import Machine, memory
from gpt.planning.auto import (
    LayoutChoice,
    assume_precision,
    choose_parallelism,
    choose_precision,
    rank_layouts,
    refuse_float8,
    refuse_tf32,
    typed_keys,
)
from gpt.planning.search import layout_text
from gpt.topology import refuse_other_rates, settle_steps, split_batch
from gpt.topology.check_dims import check_parallel_dims, refuse_without_deepspeed
from gpt.workload.plan import (
    checkpoint_text,
    estimated_step,
    execution_rows,
    gpu_name,
    on_cpus,
    plain_values,
    plan_facts,
    plan_notes,
    plan_rows,
    plan_warnings,
    refuse_size,
    refuse_what_does_not_fit,
    requested_machine,
    schedule_text,
    split_batch_over_nodes,
)
from launch.errors import ConfigError
from launch.runs.compose import read_config
from launch.runs.environment import ROOT, source_files
from launch.runs.events import SavedCheckpoint
from launch.runs.folder import RunFolder
from launch.runs.overrides import typed_key
from launch.runs.process import hash_seed
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

# Layouts for a given number of parameters: a model of about that size, and the fastest layouts that train it.


GOAL_WORDS = ("model=llama_1p36b", "parallel=auto", "precision=bf16", "recompute=selective", "optim=gpt2")
"""Overrides that ``launch.project`` adds when it plans the training of a model of a given size: a family of models, and
usual settings of large models. An override whose key the user sets is not added."""
ASPECT = 110
"""Desired ratio of width to number of layers, for models of a given size. The ratio is 128 in Llama 2 7B, and 102 in
Llama 2 70B (arXiv 2307.09288)."""
WITHIN = 0.03
"""Largest relative difference of a model's number of parameters from the given size. Of the models within this
difference, the one whose ratio of width to layers is nearest to ``ASPECT`` is chosen."""
TOKENS_PER_STEP = 4e6
"""Default global batch in tokens for a model of a given size, as for Llama 2 (arXiv 2307.09288, section 2.2)."""
BATCH_MULTIPLE = 384
"""The default global batch, in sequences, is a multiple of this, so that many numbers of ranks divide it: 2^7 x 3."""
HEAD_DIM = 128
EXAMPLE = 'python -m launch.project --fit "7e9 params, 1e12 tokens, 30 days" --gpu h100'
MOST_PARAMETERS = 1e15
"""Largest number of parameters of a model of a given size."""
SHOWN = 2
"""Largest number of layouts that ``GptWorkload.set_ups`` returns."""


def sized_model(family: ModelConfig, wanted: float) -> ModelConfig:
    """Return the config of a model with about ``wanted`` parameters. Its parts are those of the model ``family``; its
    width and number of layers are chosen.

    Raises:
        ConfigError: no width and number of layers give about this size, or it exceeds ``MOST_PARAMETERS``.
    """
    if wanted > MOST_PARAMETERS:
        raise ConfigError(f"{wanted:.3g} params", f"{MOST_PARAMETERS:.0e} at most", EXAMPLE)
    ratio = 0.0 if family.ffn_hidden is None else family.ffn_hidden / family.n_embd
    keys = family.n_head // (family.n_kv_head or family.n_head)
    found: list[tuple[bool, float, ModelConfig]] = []
    for heads in range(2, 257, 2):
        if heads % keys:
            continue
        width = heads * HEAD_DIM
        hidden = round(ratio * width / 256) * 256 if ratio else None
        shaped = replace(family, n_embd=width, n_head=heads, ffn_hidden=hidden, n_layer=1)
        shaped = shaped if family.n_kv_head is None else replace(shaped, n_kv_head=heads // keys)
        one, two = (count(replace(shaped, n_layer=layers)).total for layers in (1, 2))
        layers = max(1, round(1 + (wanted - one) / (two - one)))
        error = abs(one + (layers - 1) * (two - one) - wanted) / wanted
        aspect = max(width / layers / ASPECT, ASPECT * layers / width)
        found.append((error > WITHIN, aspect if error <= WITHIN else error, replace(shaped, n_layer=layers)))
    is_far, _, model = min(found, key=lambda one: one[:2])
    if is_far:
        raise ConfigError(
            f"{wanted:.3g} params, and the nearest of model={family.name} has {count(model).total:.3g}",
            f"a size that a model with heads of {HEAD_DIM} comes within {100 * WITHIN:.0f} % of",
            EXAMPLE,
        )
    return model


def sized_config(config: TrainConfig, goal: TrainingGoal, has_batch: bool) -> TrainConfig:
    """Return ``config`` with a model of the size of ``goal``, and with ``optim.weak_scaling`` set to false.

    ``has_batch`` is True if the user has set the global batch, which then stays. If it is False, the global batch
    becomes the default of about ``TOKENS_PER_STEP`` tokens.
    """
    model = sized_model(config.model, goal.parameters)
    optim = config.optim
    if not has_batch:
        batches = max(1, round(TOKENS_PER_STEP / model.block_size / BATCH_MULTIPLE))
        optim = replace(optim, global_batch=batches * BATCH_MULTIPLE)
    return replace(config, model=model, optim=replace(optim, weak_scaling=False))


def as_set_up(config: TrainConfig, choice: LayoutChoice, world_size: int, machine: Machine) -> SetUp:
    """Return the layout ``choice`` in the form that ``launch.project`` shows: parallelism, time of a step, memory of a
    rank, utilization of the peak, and the overrides to type for it."""
    model, found = config.model, choice.estimate
    peak = peak_flops(machine.device, config.precision)
    rate = training_flops_per_token(model).palm * found.tokens_per_s / world_size
    words = [
        *(f"model={model.name}", f"model.n_layer={model.n_layer}", f"model.n_head={model.n_head}"),
        *(f"model.n_embd={model.n_embd}", f"optim.global_batch={config.optim.global_batch}"),
        *([] if model.ffn_hidden is None else [f"model.ffn_hidden={model.ffn_hidden}"]),
        *([] if model.n_kv_head is None else [f"model.n_kv_head={model.n_kv_head}"]),
        *(f"optim.max_micro_batch={choice.batch.micro}", f"precision={config.precision.name}"),
        *(f"recompute={config.recompute.name}", "parallel=auto"),
    ]
    return SetUp(
        parallelism=re.sub(r" dp_replicate=1\b", "", layout_text(choice.parallel, choice.dims)),
        micro_batch=choice.batch.micro,
        step_s=found.step_s,
        work_per_step=found.tokens,
        memory_bytes=choice.memory.total,
        mfu=None if peak is None else rate / peak,
        command=" ".join(words),
    )


# The workload.


PRELOAD = ("gpt.train", "gpt.parallel.ddp", "gpt.parallel.nd", "gpt.parallel.pipeline")
"""Names of the modules that the launcher imports before it forks ranks."""


class GptWorkload(Workload):
    """The workload ``gpt`` of the launcher: ``python -m gpt.train`` on every rank."""

    name = "gpt"
    schema = TrainConfig
    not_in_point = NOT_IN_POINT
    resumable = RESUMABLE
    length = LENGTH
    goal_words = GOAL_WORDS
    figures = step_figures()

    def make_paths_absolute(self, document: DictConfig) -> None:
        """Replace relative paths in a composed config by absolute ones, in place. They are relative to the current
        folder."""
        make_paths_absolute(document)

    def computes_on_cpus(self, config: TrainConfig) -> bool:
        """Return True if the ranks compute on CPUs on every machine, even on one with GPUs (``device=cpu``)."""
        return config.device is Device.cpu

    def plan(self, config: TrainConfig, request: PlanRequest) -> WorkloadPlan:
        """Return the plan of a run on the nodes of ``request``: parallelism, batch, memory, corpus and time of a step.

        Raises:
            ConfigError: ranks, batch, model and corpus do not fit together, or need more than the nodes have.
        """
        check_init_from(config, request.folder)
        refuse_two_lengths(config.optim.max_tokens, request.overrides)
        gpu = gpu_name(request)
        precision = choose_precision(config, request.folder, on_cpus(config, request), gpu)
        config = assume_precision(config, precision)
        refuse_float8(config, on_cpus(config, request), gpu)
        refuse_tf32(config, gpu)
        choice = choose_parallelism(
            config, request.overrides, request.folder, request.world_size, lambda: requested_machine(config, request)
        )
        config = choice.apply(config)
        if request.is_local:
            refuse_without_deepspeed(config)
        if config.checkpoint.copy_to is not None:
            check_target(config.checkpoint.copy_to, request.folder.path)
        dims = check_parallel_dims(config, request.world_size, request.ranks_per_node)
        batch = split_batch_over_nodes(config, dims, request)
        config = settle_steps(config, batch)
        refuse_other_rates(config, batch, request.folder)
        corpus = describe_corpus(config.data, config.data_cache)
        check_fit(corpus, config.model, config.eval.sequences)
        check_tasks(config.eval.tasks, corpus.tokenizer)
        needed = memory.per_rank(config, dims, batch)
        refuse_what_does_not_fit(config, needed, request)
        step = estimated_step(config, dims, batch, request)
        step_s = None if step is None else step.step_s
        kept, every = config.checkpoint.keep_last, config.checkpoint.every().steps
        if kept is None:
            kept = -(-config.optim.max_steps // every) if every else 1
        return WorkloadPlan(
            rows={
                **plan_rows(config, dims, batch, needed, str(corpus)),
                "checkpoints": checkpoint_text(config, request.world_size, request.nodes),
                **execution_rows(config, precision, request),
                "schedule": schedule_text(config, batch, request.folder),
            },
            notes=plan_notes(choice),
            facts=plan_facts(config, dims, batch, needed, str(corpus), choice),
            settled={
                "parallel": plain_values(config.parallel),
                "optim.max_micro_batch": choice.micro_batch,
                "precision": precision.name,
                # A rank that finds no GPU then refuses, and does not train on CPUs while GPUs are billed.
                **({"device": "cuda"} if config.device is Device.auto and not on_cpus(config, request) else {}),
            },
            warnings=tuple(plan_warnings(config, batch, corpus, request, step_s)),
            max_steps=config.optim.max_steps,
            checkpoint_bytes=memory.checkpoint_bytes(config),
            step_s=None if on_cpus(config, request) else step_s,  # the estimate assumes one rate for all CPUs
            saves_more_often=f"checkpoint.interval={saves_more_often(config)}",
            checkpoints_kept=kept + 1,  # with the one that is being written
            uses_cpus=on_cpus(config, request),
            fewer_nodes=possible_sizes(request, partial(refuse_size, config)),
        )

    def step_time(self, config: TrainConfig, request: PlanRequest) -> StepTime | None:
        """Return the estimated time of a step on the nodes of ``request``; None if they are not described completely.

        Raises:
            ConfigError: ranks, batch and model do not fit together.
        """
        precision = choose_precision(config, request.folder, on_cpus(config, request), gpu_name(request))
        config = assume_precision(config, precision)
        dims = check_parallel_dims(config, request.world_size)
        return estimated_step(config, dims, split_batch_over_nodes(config, dims, request), request)

    def rehearse(self, config: Any, folder: RunFolder) -> bool:
        """Rehearse a run in another process, because the launcher's process loads no torch.

        The process runs ``gpt.rehearse``, which makes two training steps of some ranks, without a GPU and on tensors
        without values. The rehearsal prints its result. Return True if it has found no fault: the run would not hang,
        wait for its GPUs, or need more memory than they have.
        """
        stated = config.cluster
        gpu = stated.gpu_name if stated.gpu_name and expand(stated.gpu_name) else ""
        words = [*(sys.executable, "-m", "gpt_launch", "gpt.rehearse", "--run", str(folder.path), "--gpu", gpu)]
        words += ["--ranks", str(config.world_size), "--ranks-per-node", str(config.ranks_on_node)]
        words += [] if stated.gpu_memory_gib is None else ["--gpu-gib", str(stated.gpu_memory_gib)]
        return subprocess.run(words).returncode == 0

    def set_ups(self, config: TrainConfig, request: PlanRequest, goal: TrainingGoal) -> list[SetUp]:
        """Return at most ``SHOWN`` layouts that train a model of the size of ``goal`` on the nodes of ``request``, the
        fastest first.

        Raises:
            ConfigError: there is no model of this size, or no layout is valid and fits into memory.
        """
        has_batch = any(typed_key(word) == "optim.global_batch" for word in request.overrides)
        config = sized_config(config, goal, has_batch)
        config = assume_precision(config, choose_precision(config, request.folder, False, gpu_name(request)))
        machine, fixed = requested_machine(config, request), typed_keys(request.overrides)
        ranked = rank_layouts(config, request.world_size, machine, fixed).choices
        return [as_set_up(config, choice, request.world_size, machine) for choice in ranked[:SHOWN]]

    def command(self, config: TrainConfig, folder: RunFolder, attempt: int) -> RankCommand:
        """Return the command of a rank: ``gpt.train``, which reads its config from the run folder."""
        args = (sys.executable, "-m", "gpt_launch", "gpt.train", "--run", str(folder.path))
        # Python reads the hash seed only at its start, so ranks must be executed anew (see fix_hash_seed).
        defaults = {"PYTHONHASHSEED": hash_seed(config.seed)} if config.deterministic else {}
        return RankCommand(args, defaults=defaults, preload=PRELOAD, wants_memory_store=config.checkpoint.in_memory)

    def contract(self, config: TrainConfig, world_size: int) -> RankContract:
        """Return facts about the ranks that the launcher's agent needs: the unit in which their work is counted
        (tokens), and the number of steps of the run."""
        if config.optim.max_tokens is not None:
            batch = split_batch(config.optim, check_parallel_dims(config, world_size).data_ranks)
            config = settle_steps(config, batch)
        return RankContract(unit="tokens", max_steps=config.optim.max_steps)

    def code(self, config: TrainConfig) -> CodeTree:
        """Return the files of code on which a run depends: the source files of this project, which include the
        launcher."""
        return CodeTree(ROOT, source_files, has_launcher=True)

    def checkpoints(self, folder: RunFolder) -> Iterator[SavedCheckpoint]:
        """Yield descriptions of the checkpoints of a run, newest first."""
        return saved_checkpoints(folder.checkpoints)

    def copies(self, folder: RunFolder) -> Iterator[SavedCheckpoint]:
        """Yield descriptions of the checkpoints that the run has copied to ``checkpoint.copy_to``, newest first.

        Raises:
            ConfigError: ``checkpoint.copy_to`` is not set, or the copies cannot be read.
        """
        return saved_copies(read_config(folder, TrainConfig).checkpoint.copy_to, folder.path)


def saves_more_often(config: TrainConfig) -> str:
    """Return a value of ``checkpoint.interval``, as text, to propose for a run that needs more checkpoints. It is half
    of the present interval. If checkpoints are saved at the end only, it is a tenth of the run's steps."""
    every = config.checkpoint.every()
    if every.minutes is not None:
        return f"{every.minutes / 2:g}min"
    return str(max(1, every.steps // 2 if every.steps else config.optim.max_steps // 10))
