"""Checks of the parallel dimensions against model, batch and training options. Imports no torch.

The planner calls ``check_parallel_dims`` on the login node. The ranks call it again before a run folder exists.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gpt.accounting import count
from gpt.components import KINDS_OF_PARALLELISM, optimizer_state, part_counts
from gpt.config import (
    CpMethod,
    ExpertMatmul,
    Ffn,
    Float8,
    ModelConfig,
    NormPosition,
    Precision,
    Recompute,
    Schedule,
    Strategy,
    TrainConfig,
)
from gpt.config.model import PARTS
from gpt.config.optim import ADAMW, MUON, SCHEDULE_FREE
from gpt.config.rules import GROUPED_MULTIPLE, divisors, is_importable
from gpt.topology import Batch, ParallelDims, check_expert, parallel_dims, split_batch
from gpt.topology.schedules import check_pipeline, split_layers
from launch.errors import ConfigError


def check_parallel_dims(config: TrainConfig, world_size: int, ranks_per_node: int = 1) -> ParallelDims:
    """Return the parallel dimensions of a run of ``world_size`` ranks, after checks against model, batch and options.

    Args:
        config: config of the run; its strategy is not ``auto``.
        world_size: number of ranks.
        ranks_per_node: number of ranks of a node, for the number of nodes that an error proposes.

    Raises:
        ConfigError: the degrees do not divide the ranks, or do not suit the model.
    """
    dims = parallel_dims(config.parallel, world_size, ranks_per_node)
    checks = (check_parallel_parts, check_zero1, check_tensor, check_pipeline, check_context, check_expert)
    for check in (*checks, check_selective, check_lora, check_deepspeed, check_schedule_free, check_tasks_of_eval):
        check(config, dims)
    if config.optim.optimizer == MUON and config.parallel.cpu_offload:
        raise ConfigError(
            "optim.optimizer=muon with parallel.cpu_offload=true",
            "matrices on the devices, which orthogonalize them, or an optimizer for parameters in host memory",
            "parallel.cpu_offload=false, or optim.optimizer=adamw",
        )
    return dims


def refuse_without_deepspeed(config: TrainConfig) -> None:
    """Raise ConfigError if the run needs DeepSpeed, and DeepSpeed is not installed on this machine. DeepSpeed is not
    imported.

    Not for a login node, because DeepSpeed may be installed on the nodes alone.
    """
    if config.parallel.strategy is Strategy.deepspeed and not is_importable("deepspeed"):
        raise ConfigError(
            f"parallel.strategy=deepspeed, and no package deepspeed in {sys.executable}",
            "DeepSpeed, which all but the strategies of that name does without",
            "pip install -c constraints.txt deepspeed, or parallel=fsdp",
        )


def check_parallel_parts(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if the user's class of the optimizer, or of a part of the model, cannot be used.

    Also raise ConfigError if tp, cp or pp is above 1, and the user's class of a part does not declare that it supports
    this dimension (attribute ``parallel``).
    """
    model = config.model
    optimizer_state(config.optim)
    for key, counts in part_counts(model).items():
        part = "norm" if key == "head_norm" else key
        asked = [name for name in ("tp", "cp", "pp") if getattr(dims, name) > 1 and name not in counts.parallel]
        if not asked:
            continue
        name, able = asked[0], KINDS_OF_PARALLELISM[part]
        says = f'parallel = ("{name}",) in the class, where that holds; ' if name in able else ""
        raise ConfigError(
            f"parallel.{name}={getattr(dims, name)} with model.{part}={model.custom_parts[part]}",
            f"{says}a part that says it can be computed under {name}"
            + ("" if name in able else f", which of {part} only ours can"),
            f"parallel=fsdp parallel.{name}=1, or model.{part}={next(iter(PARTS[part])).name}",
        )


def check_zero1(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if zero1 is combined with another kind of parallelism than data parallelism."""
    if config.parallel.strategy is Strategy.zero1:
        refuse_dimensions(
            dims,
            ("tp", "pp", "cp", "ep"),
            "parallel.strategy=zero1",
            "zero1 with data parallelism only: it shards the optimizer state of a model that every rank replicates",
            "parallel.strategy=fsdp parallel.reshard_after_forward=false",
        )


def refuse_dimensions(dims: ParallelDims, names: Sequence[str], found: str, expected: str, instead: str) -> None:
    """Raise ConfigError if one of the dimensions ``names`` has several ranks.

    Args:
        dims: the parallel dimensions.
        names: dimensions that must be 1, such as ``tp``.
        found: override that does not work with these dimensions.
        expected: text on what works instead.
        instead: overrides with which these dimensions work.
    """
    others = " ".join(f"parallel.{name}={getattr(dims, name)}" for name in names if getattr(dims, name) > 1)
    if others:
        raise ConfigError(f"{found} with {others}", expected, f"{instead} {others}")


def check_context(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if sequences cannot be sharded over ``cp`` ranks, because of their length, or because of an
    attention, dropout or capacity setting of the model."""
    model, cp = config.model, dims.cp
    if cp == 1:
        return
    if model.block_size % (2 * cp):
        raise ConfigError(
            f"parallel.cp={cp} with model.block_size={model.block_size}",
            f"a multiple of {2 * cp}: each rank takes an early and a late chunk of every sequence, all of equal length",
            f"model.block_size={-(-model.block_size // (2 * cp)) * 2 * cp}",
        )
    if model.capacity_factor is not None:
        raise ConfigError(
            f"parallel.cp={cp} with model.capacity_factor={model.capacity_factor:g}",
            "no capacity limit: whether an expert has room depends on tokens of the sequence that other ranks hold",
            "model.capacity_factor=null",
        )
    if model.dropout and config.parallel.cp_method is CpMethod.ring:
        raise ConfigError(
            f"parallel.cp_method=ring with model.dropout={model.dropout:g}",
            "no dropout: the noise of each block of keys would have to be drawn again in the backward pass",
            "parallel.cp_method=allgather, or model.dropout=0",
        )
    for key in ("window", "attention_softcap"):
        value = getattr(model, key)
        if value is not None and config.parallel.cp_method is CpMethod.ring:
            raise ConfigError(
                f"parallel.cp_method=ring with model.{key}={value:g}",
                "all earlier keys and their plain scores, since a ring computes and merges whole blocks of keys",
                f"parallel.cp_method=allgather, or model.{key}=null",
            )


def check_selective(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if blocks are compiled and recomputed selectively, and ``cp`` or ``ep`` is above 1."""
    name = next((name for name in ("cp", "ep") if getattr(dims, name) > 1), None)
    if name and config.compiles and config.recompute is Recompute.selective:
        raise ConfigError(
            f"parallel.{name}={getattr(dims, name)} with recompute=selective and compile={config.compile.name}",
            "one of the two, or recompute=full: selective recomputation does not see into compiled code",
            "recompute=full, or compile=none",
        )


def check_tensor(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if the model's matrices or activations cannot be sharded over ``tp`` ranks."""
    if dims.tp == 1:
        return
    model, tp = config.model, dims.tp
    if model.kv_lora_rank is not None:
        raise ConfigError(
            f"parallel.tp={tp} with model.kv_lora_rank={model.kv_lora_rank}",
            "keys and values of each head on one rank, since all heads share the latent",
            "parallel.tp=1 parallel=fsdp, or parallel=cp",
        )
    check_matrices(model, tp)
    if model.padded_vocab % tp:
        raise ConfigError(
            f"parallel.tp={tp} with {model.padded_vocab} rows of the embedding (model.vocab_size={model.vocab_size}, "
            f"model.vocab_multiple={model.vocab_multiple})",
            f"a multiple of {tp} rows; padding rows take no part",
            f"model.vocab_multiple={math.lcm(model.vocab_multiple, tp)}",
        )
    check_sequence(config, dims)


def check_matrices(model: ModelConfig, tp: int) -> None:
    """Raise ConfigError if ``tp`` ranks do not evenly divide query heads, key-value heads or the inner width of the
    ffn."""
    shared = {
        f"model.n_head={model.n_head}": model.n_head,
        f"{model.kv_heads} key and value heads": model.kv_heads,
        f"{'experts' if model.ffn is Ffn.moe else 'a feed-forward layer'} {model.ffn_width} wide": model.ffn_width,
    }
    if isinstance(model.ffn, str):  # a layer of the user is replicated, and each rank computes its own tokens
        shared.popitem()
    sharers = max(
        n for n in divisors(tp) if all(number % n == 0 for number in shared.values()) and grouped_matmul_fits(model, n)
    )
    for text, number in shared.items():
        if number % tp:
            raise ConfigError(
                f"parallel.tp={tp} with {text}", f"a number of ranks that divides {number}", f"parallel.tp={sharers}"
            )
    if not grouped_matmul_fits(model, tp):
        raise ConfigError(
            f"parallel.tp={tp} with experts {model.ffn_width} wide, {model.ffn_width // tp} on each rank",
            f"multiples of {GROUPED_MULTIPLE} on each rank, since torch's grouped matmul takes rows of whole 16 bytes",
            f"model.expert_matmul=loop, or parallel.tp={sharers}",
        )


def grouped_matmul_fits(model: ModelConfig, tp: int) -> bool:
    """Return True if torch's grouped product accepts the width of an expert's shard on ``tp`` ranks, or if the model
    does not use this product."""
    grouped = model.ffn is Ffn.moe and model.expert_matmul is ExpertMatmul.grouped
    return not grouped or model.ffn_width % (GROUPED_MULTIPLE * tp) == 0


def check_sequence(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError in two cases. With sequence parallelism: the ranks do not evenly divide a sequence. Without it:
    dropout is used with tensor parallelism.

    Without sequence parallelism, ranks have the same activations. Each rank draws its own dropout noise, so the ranks
    would drop different elements.
    """
    model, ranks = config.model, dims.tp * dims.cp
    wish = f"model.block_size={-(-model.block_size // ranks) * ranks}"
    if config.parallel.sequence_parallel and model.block_size % ranks:
        raise ConfigError(
            f"parallel.sequence_parallel=true with model.block_size={model.block_size} on {ranks} ranks",
            f"a multiple of {ranks}: each rank has an equal shard of every sequence",
            wish if model.dropout else f"parallel.sequence_parallel=false, or {wish}",
        )
    if model.dropout and not config.parallel.sequence_parallel:
        raise ConfigError(
            f"model.dropout={model.dropout:g} with parallel.tp={dims.tp} parallel.sequence_parallel=false",
            "sequence parallelism: ranks draw their own dropout noise, so replicated activations would diverge",
            "parallel.sequence_parallel=true" if model.block_size % ranks == 0 else "model.dropout=0",
        )


def check_deepspeed(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if DeepSpeed is used with tp, cp or ep, with another optimizer than AdamW, with fp16, or with a
    pipeline that it does not support. Also raise it if the user's DeepSpeed config file contradicts the run."""
    if config.parallel.strategy is not Strategy.deepspeed:
        return
    refuse_dimensions(
        dims,
        ("tp", "cp", "ep"),
        "parallel.strategy=deepspeed",
        "data and pipeline parallelism only: DeepSpeed does not shard matrices, sequences or experts of this model",
        "parallel=fsdp",
    )
    if dims.pp > 1:
        check_stages(config, dims)
    if config.optim.optimizer != ADAMW:
        raise ConfigError(
            f"optim.optimizer={config.optim.optimizer} with parallel.strategy=deepspeed",
            "AdamW, whose moments are what DeepSpeed's checkpoints are read and written by",
            "parallel=fsdp (ZeRO-3), parallel=zero1, or optim.optimizer=adamw",
        )
    if config.precision is Precision.fp16:
        raise ConfigError(
            "precision=fp16 with parallel.strategy=deepspeed",
            "bf16 or fp32: the loss scale of fp16 belongs to the engines of torch",
            "parallel=fsdp, or precision=fp32",
        )
    ds_config(config, split_batch(config.optim, dims.data_ranks))


def check_lora(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if LoRA is used with an engine, a precision or an optimizer that does not support it."""
    parallel, rank = config.parallel, config.model.lora.rank
    sharing = [name for name in ("tp", "pp", "ep") if getattr(dims, name) > 1]
    refused = {f"parallel.{name}={getattr(dims, name)}": f"parallel.{name}=1" for name in sharing}
    if parallel.strategy is Strategy.deepspeed:
        refused = {"parallel.strategy=deepspeed": "parallel=fsdp"}
    if config.float8 is not Float8.none:
        refused[f"float8={config.float8.name}"] = "float8=none"
    if config.optim.optimizer == MUON:
        refused[f"optim.optimizer={MUON}"] = "optim.optimizer=adamw"
    if rank and refused:
        raise ConfigError(
            f"model.lora.rank={rank} with {' '.join(refused)}",
            "adapters under ddp, zero1 or fsdp, also with parallel.cp; without float8, and not with Muon",
            f"{' '.join(refused.values())}, or model.lora.rank=0",
        )


def check_schedule_free(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if schedule-free AdamW is used with tp, pp, cp or ep, or with CPU offload."""
    sharing = [f"parallel.{name}=1" for name in ("tp", "pp", "cp", "ep") if getattr(dims, name) > 1]
    sharing += ["parallel.cpu_offload=false"] if config.parallel.cpu_offload else []
    if config.optim.optimizer == SCHEDULE_FREE and sharing:
        raise ConfigError(
            f"optim.optimizer={SCHEDULE_FREE} without {' '.join(sharing)}",
            "data parallelism with weights on the devices: ddp, zero1 or fsdp",
            f"{' '.join(sharing)}, or optim.optimizer=adamw",
        )


def check_tasks_of_eval(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if ``eval.tasks`` is set with tp, pp or cp: the tasks need a rank with logits of whole
    sequences."""
    sharing = " ".join(f"parallel.{name}=1" for name in ("tp", "pp", "cp") if getattr(dims, name) > 1)
    if config.eval.tasks and sharing:
        raise ConfigError(
            f"eval.tasks=[{','.join(config.eval.tasks)}] without {sharing}",
            "data parallelism, in which each rank computes the logits of whole sequences",
            f"{sharing}, or eval.tasks=[]",
        )


def check_stages(config: TrainConfig, dims: ParallelDims) -> None:
    """Raise ConfigError if DeepSpeed's pipeline does not support the ZeRO stage, the offload, the schedule, or the
    input and output layers of the model."""
    parallel = config.parallel
    if parallel.zero_stage in (2, 3):
        # A preset with parameter offload implies ZeRO-3, so changing the ZeRO stage alone would not suffice.
        fix = "parallel=ds_pp_zero1" if parallel.offloads_parameters else "parallel.zero_stage=1"
        raise ConfigError(
            f"parallel.zero_stage={parallel.zero_stage} with parallel.pp={dims.pp}",
            "stage 0 or 1: a stage of DeepSpeed's pipeline keeps its gradients over all micro-batches",
            f"{fix}, or parallel=fsdp parallel.pp={dims.pp}",
        )
    if parallel.offloads_optimizer:
        raise ConfigError(
            f"parallel.cpu_offload=true with parallel.pp={dims.pp}",
            "one of them: DeepSpeed's pipeline steps an optimizer on the device",
            "parallel.cpu_offload=false, or parallel.pp=1",
        )
    if parallel.schedule is not Schedule["1f1b"]:
        raise ConfigError(
            f"parallel.schedule={parallel.schedule.name} with parallel.strategy=deepspeed",
            "1f1b, DeepSpeed's only schedule",
            f"parallel.schedule=1f1b, or parallel=pp parallel.pp={dims.pp}",
        )
    last = split_layers(config.model, dims.pp, config.recompute)[-1]
    if parallel.zero_stage and config.model.norm_position is NormPosition.post and not last.blocks:
        raise ConfigError(
            f"parallel.pp={dims.pp} with model.norm_position=post, where the last stage has the output matrix alone",
            "both parameter groups in every stage: DeepSpeed reduces the gradient norm of each group over the stages",
            "parallel.zero_stage=0, or fewer stages",
        )
    for key, idle in (("scale_embedding", False), ("logit_softcap", None)):
        if getattr(config.model, key) != idle:
            raise ConfigError(
                f"parallel.strategy=deepspeed parallel.pp={dims.pp} with model.{key}",
                "a plain embedding and plain logits: DeepSpeed's first and last layer are the shared matrix alone",
                f"parallel=pp parallel.pp={dims.pp}, or parallel.pp=1",
            )


# Configuration of DeepSpeed: generated from the run's config and merged with the user's file.


AUTO = "auto"
"""Value in DeepSpeed config files of other trainers that means: the trainer sets this value."""


def ds_config(config: TrainConfig, batch: Batch) -> dict[str, Any]:
    """Return the config of DeepSpeed: generated from that of the run, with additional settings from the user's file
    ``parallel.deepspeed_config``.

    Raises:
        ConfigError: the user's file contradicts the run, or cannot be read.
    """
    path = config.parallel.deepspeed_config
    ours = generated_config(config, batch)
    if path is None:
        return ours
    return merged_settings(ours, read_file(Path(path)), run_values(config, batch), path)


def generated_config(config: TrainConfig, batch: Batch) -> dict[str, Any]:
    """Return the config of DeepSpeed that follows from the config of the run.

    It has no optimizer and no learning-rate schedule: DeepSpeed receives torch's AdamW, and the engine sets its
    learning rate in each step.
    """
    parallel = config.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.zero_stage:
        # DeepSpeed allocates a whole bucket, by default 2 GB, even for a small model.
        zero["reduce_bucket_size"] = min(BUCKET, count(config.model).total)
    if parallel.offloads_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if parallel.offloads_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    made: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        # In ZeRO-0 the engine clips. DeepSpeed would clip each pipeline stage by its own norm, and not return the norm.
        "gradient_clipping": config.optim.grad_clip if parallel.zero_stage else 0.0,
        "zero_optimization": zero,
        # By default DeepSpeed waits for the device before and after every micro-batch, to measure its time.
        "timers": {"throughput": {"enabled": False}},
    }
    if casts_weights(config):
        # bf16 weights over fp32 master weights. Gradients are accumulated and reduced in fp32; the default is 16 bits.
        made |= {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    if parallel.offloads_optimizer:
        # torch's fused AdamW also runs on the host; DeepSpeed's own would be compiled at the first start.
        made["zero_force_ds_cpu_optimizer"] = False
    return made


def casts_weights(config: TrainConfig) -> bool:
    """Return True if DeepSpeed keeps bf16 weights in addition to fp32 master weights: in bf16 with ZeRO-1, 2 or 3.

    With ZeRO-0 the weights are fp32, and autocast casts them, as with DDP. If ZeRO-0 kept bf16 weights, DeepSpeed would
    run Adam twice in the first step.
    """
    return config.precision.is_half and bool(config.parallel.zero_stage)


def checkpoint_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the DeepSpeed settings that determine the sharding and the content of its checkpoints, out of
    ``settings``."""
    return {key: settings.get(key) for key in ("zero_optimization", "bf16", "data_types")}


def read_file(path: Path) -> dict[str, Any]:
    """Read the user's DeepSpeed config file, and return it as a dictionary.

    Raises:
        ConfigError: the file cannot be read, or is no JSON object.
    """
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"parallel.deepspeed_config={path}, which cannot be read ({error})",
            "a JSON file that all nodes see",
            "parallel.deepspeed_config=FILE.json, or no parallel.deepspeed_config",
        ) from error
    if not isinstance(value, dict):
        raise ConfigError(
            f"parallel.deepspeed_config={path}, which holds a {type(value).__name__}",
            "a JSON object: DeepSpeed's keys and values",
            '{"zero_optimization": {"reduce_bucket_size": 5e8}}',
        )
    return value


def run_values(config: TrainConfig, batch: Batch) -> dict[str, Any]:
    """Return the DeepSpeed settings that the config of the run determines, dotted key -> value."""
    optim, parallel, precision = config.optim, config.parallel, config.precision
    found: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": optim.grad_clip,
        "zero_optimization.stage": parallel.zero_stage,
        "zero_optimization.offload_optimizer.device": "cpu" if parallel.offloads_optimizer else "none",
        "zero_optimization.offload_param.device": "cpu" if parallel.offloads_parameters else "none",
        # Keys of older DeepSpeed config files for the same two settings.
        "zero_optimization.cpu_offload": parallel.offloads_optimizer,
        "zero_optimization.cpu_offload_param": parallel.offloads_parameters,
        # This setting orders shards in a way that checkpoints do not record, so a resumed run would mix up weights.
        "zero_optimization.round_robin_gradients": False,
        # Replica groups, which checkpoints do not record.
        "zero_optimization.zero_hpz_partition_size": 1,
        "zero_optimization.mics_shard_size": -1,
        "zero_force_ds_cpu_optimizer": False,
        "bf16.enabled": precision is Precision.bf16,
        "fp16.enabled": precision is Precision.fp16,
        "optimizer.type": "AdamW",
        "optimizer.params.lr": optim.lr,
        "optimizer.params.betas": [optim.beta1, optim.beta2],
        "optimizer.params.eps": optim.eps,
        "optimizer.params.weight_decay": optim.weight_decay,
        "optimizer.params.torch_adam": True,
        "optimizer.params.adam_w_mode": True,
    }
    if parallel.pp > 1:
        found["wall_clock_breakdown"] = False  # DeepSpeed's pipeline would start a timer of it twice
    others = ("amp", "torch_autocast", "tensorboard", "wandb", "csv_monitor", "comet")
    return found | {f"{name}.enabled": False for name in others}


OWNED_SECTIONS = (
    *("scheduler", "checkpoint", "elasticity", "autotuning", "curriculum_learning", "data_efficiency"),
    *("compression_training", "activation_checkpointing", "compile", "tensor_parallel", "pipeline"),
)
"""Sections of DeepSpeed's config that are refused, because this program does their work."""


def merged_settings(
    ours: dict[str, Any], theirs: dict[str, Any], known: dict[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """Return the settings ``ours``, with those settings of ``theirs`` added that the run does not determine.

    Args:
        ours: settings that follow from the config of the run.
        theirs: settings of the user's file, or of a section of that file.
        known: settings that the run determines, a result of ``run_values``.
        path: path of the user's file, for messages.
        prefix: dotted key of the section.

    Raises:
        ConfigError: the file contradicts a value of the run, or has one of ``OWNED_SECTIONS``.
    """
    merged = dict(ours)
    for key, value in theirs.items():
        name, inner = prefix + key, ours.get(key)
        if value == AUTO or (name in known and same_value(value, known[name])):
            continue
        if name in known or (name in OWNED_SECTIONS and value):
            raise ConfigError(
                f"{name}={json.dumps(value)} in {path}"
                + (f", but this run has {json.dumps(known[name])}" if name in known else ""),
                "settings that this run's own keys do not decide, such as bucket sizes; see docs/parallel.md",
                f"no {key} in {Path(path).name}, and keys of optim, parallel, precision, recompute or logging instead",
            )
        if isinstance(value, dict):
            section = merged_settings(inner if isinstance(inner, dict) else {}, value, known, path, f"{name}.")
            if section or not value:
                merged[key] = section
        elif not name.startswith("optimizer."):
            merged[key] = value
    return merged


def same_value(theirs: Any, ours: Any) -> bool:
    """Return True if two DeepSpeed settings mean the same. 1 equals 1.0, true differs from 1, upper and lower case do
    not differ, and Adam means AdamW."""
    if isinstance(theirs, bool) or isinstance(ours, bool):
        return theirs is ours
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower() or (theirs.lower(), ours) == ("adam", "AdamW")
    return bool(theirs == ours)


BUCKET = 500_000_000
"""Largest number of gradient elements that DeepSpeed reduces at once: its default of ``reduce_bucket_size``."""
