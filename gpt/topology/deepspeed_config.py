"""Configuration of DeepSpeed: generated from the run's config and merged with the user's file. Imports no torch.

The login node checks it, too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gpt.accounting import count
from gpt.config import Precision, TrainConfig
from gpt.topology import Batch
from launch.errors import ConfigError

AUTO = "auto"
"""Placeholder in config files of other trainers for a value that the trainer sets."""


def ds_config(config: TrainConfig, batch: Batch) -> dict[str, Any]:
    """Return the config with which DeepSpeed starts: the generated one, plus the settings of
    ``parallel.deepspeed_config``.

    Raises:
        ConfigError: the user's file contradicts the run, or cannot be read.
    """
    path = config.parallel.deepspeed_config
    ours = generated_config(config, batch)
    if path is None:
        return ours
    theirs = read_file(Path(path))
    refuse_owned_sections(theirs, path)
    return merged_settings(ours, theirs, run_values(config, batch), path)


def generated_config(config: TrainConfig, batch: Batch) -> dict[str, Any]:
    """Return DeepSpeed's config, generated from that of the run.

    It has no optimizer and no learning-rate schedule: DeepSpeed receives torch's AdamW, whose rate is set at each step.
    """
    parallel = config.parallel
    zero: dict[str, Any] = {"stage": parallel.zero_stage}
    if parallel.zero_stage:
        # DeepSpeed allocates a whole bucket, by default 2 GB, even for a small model.
        zero["reduce_bucket_size"] = min(BUCKET, count(config.model).total)
    if parallel.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": True}
    if parallel.offload_parameters:
        zero["offload_param"] = {"device": "cpu", "pin_memory": True}
    made: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        # In ZeRO-0 the engine clips. DeepSpeed would clip each pipeline stage by its own norm, and not return the norm.
        "gradient_clipping": config.optim.grad_clip if parallel.zero_stage else 0.0,
        "zero_optimization": zero,
        # By default it waits for the device before and after every micro-batch, to measure its time.
        "timers": {"throughput": {"enabled": False}},
    }
    if casts_weights(config):
        # 16-bit weights over fp32 master weights. Gradients are accumulated and reduced in fp32; the default is 16
        # bits.
        made |= {
            config.precision.name: {"enabled": True} | (LOSS_SCALE if config.precision is Precision.fp16 else {}),
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    if parallel.offload_optimizer:
        # torch's fused AdamW also runs on the host; DeepSpeed's own would be compiled at the first start.
        made["zero_force_ds_cpu_optimizer"] = False
    return made


def casts_weights(config: TrainConfig) -> bool:
    """True if DeepSpeed keeps 16-bit weights over fp32 master weights, and in fp16 the loss scale.

    ZeRO-0 is excluded, because it would run Adam twice in the first step. There, weights are fp32 and autocast casts
    them, as with DDP.
    """
    return config.precision.is_half and bool(config.parallel.zero_stage)


def checkpoint_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that determine the sharding and the content of DeepSpeed's checkpoints."""
    found = {key: settings.get(key) for key in ("zero_optimization", "bf16", "data_types")}
    return found | ({"fp16": settings["fp16"]} if "fp16" in settings else {})


def read_file(path: Path) -> dict[str, Any]:
    """Read the user's config file.

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


def run_values(config: TrainConfig, batch: Batch) -> dict[str, tuple[Any, str]]:
    """Return the values that the run determines: DeepSpeed's dotted key -> value, and override for the file's value.

    ``{}`` in an override is a placeholder for the value in the file.
    """
    optim, parallel = config.optim, config.parallel
    precision, offloads = config.precision, "parallel.offload_{}=true"
    accumulation_fix = f"optim.max_micro_batch of {batch.per_rank} sequences divided by {{}}"
    found: dict[str, tuple[Any, str]] = {
        "train_batch_size": (batch.global_batch, "optim.global_batch={}"),
        "train_micro_batch_size_per_gpu": (batch.micro, "optim.max_micro_batch={}"),
        "gradient_accumulation_steps": (batch.accumulation, accumulation_fix),
        "gradient_clipping": (optim.grad_clip, "optim.grad_clip={}"),
        "zero_optimization.stage": (parallel.zero_stage, "parallel.zero_stage={}"),
        "zero_optimization.offload_optimizer.device": (
            "cpu" if parallel.offload_optimizer else "none",
            offloads.format("optimizer"),
        ),
        "zero_optimization.offload_param.device": (
            "cpu" if parallel.offload_parameters else "none",
            offloads.format("parameters"),
        ),
        # Keys of older files for the same two settings.
        "zero_optimization.cpu_offload": (parallel.offload_optimizer, offloads.format("optimizer")),
        "zero_optimization.cpu_offload_param": (parallel.offload_parameters, offloads.format("parameters")),
        # This setting orders shards in a way that checkpoints do not record, so a resumed run would mix up weights.
        "zero_optimization.round_robin_gradients": (False, "false"),
        # Replica groups, which checkpoints do not record.
        "zero_optimization.zero_hpz_partition_size": (1, "parallel=hsdp parallel.dp_shard={}"),
        "zero_optimization.mics_shard_size": (-1, "parallel=hsdp parallel.dp_shard={}"),
        "zero_force_ds_cpu_optimizer": (False, "no zero_force_ds_cpu_optimizer"),
        "bf16.enabled": (precision is Precision.bf16, other_precision(precision, Precision.bf16)),
        "fp16.enabled": (precision is Precision.fp16, other_precision(precision, Precision.fp16)),
        "amp.enabled": (False, "precision=bf16"),
        "torch_autocast.enabled": (False, "precision=bf16"),
        "optimizer.type": ("AdamW", "AdamW, the only one here"),
        "optimizer.params.lr": (optim.lr, "optim.lr={}"),
        "optimizer.params.betas": ([optim.beta1, optim.beta2], "optim.beta1 and optim.beta2"),
        "optimizer.params.eps": (optim.eps, "optim.eps={}"),
        "optimizer.params.weight_decay": (optim.weight_decay, "optim.weight_decay={}"),
        "optimizer.params.torch_adam": (True, "true: torch's AdamW is used"),
        "optimizer.params.adam_w_mode": (True, "true: the weight decay is AdamW's"),
    }
    if parallel.pp > 1:
        found["wall_clock_breakdown"] = (False, "parallel.pp=1: its pipeline starts a timer of it twice")
    for monitor in ("tensorboard", "wandb", "csv_monitor", "comet"):
        ours = "logging.csv=true" if monitor == "csv_monitor" else f"logging.{monitor}=true"
        found[f"{monitor}.enabled"] = (False, ours if monitor != "comet" else "logging.wandb=true")
    return found


def other_precision(ours: Precision, section: Precision) -> str:
    """Return the override of ``precision`` that agrees with the user's file.

    It is fp32 if the file turns off the section of ``ours``, otherwise the precision of ``section``.
    """
    return f"precision={'fp32' if ours is section else section.name}"


OWNED_SECTIONS = {
    "scheduler": "no scheduler: optim.warmup_steps, optim.lr and optim.min_lr are the schedule",
    "checkpoint": "no checkpoint: the checkpoint group says when, and other sizes are read without asking",
    "elasticity": "no elasticity: split the batch by optim.max_micro_batch",
    "autotuning": "no autotuning: sweep the keys with -m",
    "curriculum_learning": "no curriculum_learning",
    "data_efficiency": "no data_efficiency",
    "compression_training": "no compression_training",
    "activation_checkpointing": "recompute=full, or recompute=selective",
    "compile": "compile=default",
    "tensor_parallel": "parallel=tp",
    "pipeline": "parallel=ds_pp",
}
"""Section of DeepSpeed's config that would replace work of this program -> override to type instead."""


def refuse_owned_sections(theirs: dict[str, Any], path: str) -> None:
    """Raise ConfigError if the file has one of ``OWNED_SECTIONS``."""
    for key, instead in OWNED_SECTIONS.items():
        if theirs.get(key):
            raise ConfigError(
                f"{key} in {path}",
                "settings of DeepSpeed that leave data, schedule and checkpoints to this run",
                instead,
            )


def merged_settings(
    ours: dict[str, Any], theirs: dict[str, Any], known: dict[str, tuple[Any, str]], path: str, prefix: str = ""
) -> dict[str, Any]:
    """Return the settings of the run, and those of the file that the run does not determine.

    Args:
        ours: settings of the run.
        theirs: settings of the file, or of a section of the file.
        known: result of ``run_values``.
        path: the file, for messages.
        prefix: dotted key of the section.

    Raises:
        ConfigError: the file contradicts a value of the run.
    """
    merged = dict(ours)
    for key, value in theirs.items():
        name, inner = prefix + key, ours.get(key)
        if isinstance(value, dict):
            section = merged_settings(inner if isinstance(inner, dict) else {}, value, known, path, f"{name}.")
            if section or not value:
                merged[key] = section
        elif value == AUTO:
            continue
        elif name not in known:
            if not name.startswith("optimizer."):
                merged[key] = value
        elif not same_value(value, known[name][0]):
            mine, fix = known[name]
            raise ConfigError(
                f"{name}={json.dumps(value)} in {path}, but this run has {json.dumps(mine)}",
                "one value, given by this run's own configuration",
                f"{fix.format(value)}, or no {key} in {Path(path).name}",
            )
    return merged


def same_value(theirs: Any, ours: Any) -> bool:
    """Compare two values. 1 equals 1.0, true differs from 1, and Adam means AdamW, its default in DeepSpeed."""
    if isinstance(theirs, bool) or isinstance(ours, bool):
        return theirs is ours
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower() or (theirs.lower(), ours) == ("adam", "AdamW")
    return bool(theirs == ours)


LOSS_SCALE = {"loss_scale": 0, "initial_scale_power": 16, "loss_scale_window": 2000, "hysteresis": 1}
"""DeepSpeed's dynamic loss scale (``"loss_scale": 0``), changed as in the other engines (gpt/parallel/engine.py). By
default DeepSpeed would ignore the first overflow."""

BUCKET = 500_000_000
"""Number of gradient elements that DeepSpeed reduces at once: its default (reduce_bucket_size)."""
