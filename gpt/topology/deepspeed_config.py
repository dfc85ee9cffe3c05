"""Configuration of DeepSpeed: generated from the run's config and merged with the user's file. Imports no torch.

The login node also checks this configuration.
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
    """Return the config with which DeepSpeed starts: the generated config, with the further settings of the user's file
    ``parallel.deepspeed_config``.

    Raises:
        ConfigError: the user's file contradicts the run, or cannot be read.
    """
    path = config.parallel.deepspeed_config
    ours = generated_config(config, batch)
    if path is None:
        return ours
    theirs = read_file(Path(path))
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
    if parallel.offload_optimizer:
        # torch's fused AdamW also runs on the host; DeepSpeed's own would be compiled at the first start.
        made["zero_force_ds_cpu_optimizer"] = False
    return made


def casts_weights(config: TrainConfig) -> bool:
    """True if DeepSpeed keeps bf16 weights over fp32 master weights.

    ZeRO-0 is excluded, because it would run Adam twice in the first step. In ZeRO-0, weights are fp32 and autocast
    casts them, as with DDP.
    """
    return config.precision.is_half and bool(config.parallel.zero_stage)


def checkpoint_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return those of ``settings`` that determine the sharding and the content of DeepSpeed's checkpoints."""
    return {key: settings.get(key) for key in ("zero_optimization", "bf16", "data_types")}


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


def run_values(config: TrainConfig, batch: Batch) -> dict[str, Any]:
    """Return the values that the run's config determines: dotted key of DeepSpeed -> value."""
    optim, parallel, precision = config.optim, config.parallel, config.precision
    found: dict[str, Any] = {
        "train_batch_size": batch.global_batch,
        "train_micro_batch_size_per_gpu": batch.micro,
        "gradient_accumulation_steps": batch.accumulation,
        "gradient_clipping": optim.grad_clip,
        "zero_optimization.stage": parallel.zero_stage,
        "zero_optimization.offload_optimizer.device": "cpu" if parallel.offload_optimizer else "none",
        "zero_optimization.offload_param.device": "cpu" if parallel.offload_parameters else "none",
        # Keys of older DeepSpeed config files for the same two settings.
        "zero_optimization.cpu_offload": parallel.offload_optimizer,
        "zero_optimization.cpu_offload_param": parallel.offload_parameters,
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
"""Sections of DeepSpeed's config that would replace work of this program."""


def merged_settings(
    ours: dict[str, Any], theirs: dict[str, Any], known: dict[str, Any], path: str, prefix: str = ""
) -> dict[str, Any]:
    """Return the settings of the run, with the settings of the user's file that the run does not determine.

    Args:
        ours: settings of the run.
        theirs: settings of the user's file, or of a section of that file.
        known: result of ``run_values``.
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
    """Return True if two values mean the same. 1 equals 1.0, true differs from 1, and Adam means AdamW, its default in
    DeepSpeed."""
    if isinstance(theirs, bool) or isinstance(ours, bool):
        return theirs is ours
    if isinstance(theirs, str) and isinstance(ours, str):
        return theirs.lower() == ours.lower() or (theirs.lower(), ours) == ("adam", "AdamW")
    return bool(theirs == ours)


BUCKET = 500_000_000
"""Number of gradient elements that DeepSpeed reduces at once: its default (reduce_bucket_size)."""
