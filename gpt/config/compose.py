"""Composition of ``configs/train.yaml`` for the commands of gpt: keys that name a run, and keys that may change.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from gpt.config import ParallelConfig, TrainConfig
from launch.errors import ConfigError
from launch.runs.compose import compose_typed, make_absolute, register_schema
from launch.runs.overrides import (
    PLACE_KEYS,
    check_overrides,
    typed_value,
)

WATCHING = ("logging", "profile", "profile_from", "profile_to")
NOT_IN_POINT = (*PLACE_KEYS, "data.cache_dir", *WATCHING)
"""Keys of the folders and of the monitoring of a run. They do not change any result of the run."""


def compose_train(overrides: Sequence[str]) -> DictConfig:
    """Compose ``configs/train.yaml`` with ``overrides``, checked against the schema.

    Raises:
        ConfigError: an unknown key or option, or a value of the wrong type.
    """
    register_schema("train_schema", TrainConfig)
    store = ConfigStore.instance()
    if "train_main.yaml" not in store.repo:
        store.store("train_main", {"defaults": ["train_schema", "train", "_self_"]})
    config = compose_typed("train_main", TrainConfig, check_overrides(overrides, TrainConfig))
    make_paths_absolute(config)
    refuse_two_lengths(config.optim.max_tokens, overrides)
    return config


def refuse_two_lengths(max_tokens: float | None, overrides: Sequence[str]) -> None:
    """Raise ConfigError if a number of steps is typed for a run whose length is given in tokens."""
    steps = typed_value(overrides, "optim.max_steps")
    if max_tokens is not None and steps is not None:
        raise ConfigError(
            f"optim.max_steps={steps} with optim.max_tokens={max_tokens:g}",
            "one of the two: the number of steps follows from the tokens and the global batch",
            f"optim.max_tokens={max_tokens:g}, or optim.max_steps={steps} optim.max_tokens=null",
        )


def make_paths_absolute(config: DictConfig) -> None:
    """Resolve typed relative paths against the current folder, because ranks may run in another folder."""
    data = config.data
    keys = [(config, key) for key in ("output_dir", "run_dir", "init_from")]
    keys += [(data, key) for key in ("path", "val_path", "tokenizer_path", "cache_dir")]
    keys.append((config.parallel, "deepspeed_config"))
    keys += [(source, "path") for source in data.sources]
    if data.dataset is not None and Path(data.dataset).is_dir():  # otherwise the name of a dataset on the hub
        keys.append((data, "dataset"))
    make_absolute(keys)


def settle_parallel(config: DictConfig, values: Mapping[str, Any], micro_batch: int) -> None:
    """Set the keys of ``parallel`` and the size of a micro-batch in a composed config that may leave them open."""
    config.parallel = OmegaConf.merge(OmegaConf.structured(ParallelConfig), values)
    config.optim.max_micro_batch = micro_batch


EXECUTION = (
    *("parallel", "optim.max_micro_batch", "device", "compile", "compile_dynamic", "recompute", "deterministic"),
    *("compile_fullgraph", "gc_interval", "optim.target_val_loss", "optim.patience"),
    "optim.target_val_nats_per_byte",
)
LENGTH = ("optim.max_steps", "optim.max_tokens")
"""Keys of the number of steps. A larger number extends the run beyond its former end."""
RESUMABLE = (*PLACE_KEYS, "data.cache_dir", *WATCHING, "checkpoint", "eval", "divergence", *EXECUTION, *LENGTH)
"""Keys that may change between the attempts of one run: they extend the run, or do not change the loss curve."""
