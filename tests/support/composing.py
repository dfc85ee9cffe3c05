"""Configurations from what is typed, for tests of what follows from them rather than of the typing."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gpt.config import TrainConfig, compose_train
from launch.runs.compose import to_schema

VALUES = ("model.", "optim.", "parallel.", "eval.")
"""Keys whose plain value is put into what was composed before; all else is composed."""
ELSEWHERE = ("parallel.deepspeed_config", "model.name")
"""A path is made absolute, and the name of a model names the run."""
OPENWEBTEXT = "data=openwebtext"


def without_openwebtext(words: Sequence[str], folder: Path) -> list[str]:
    """The words of a command, with token files in ``folder``, made up, in place of OpenWebText, which is far away."""
    if OPENWEBTEXT not in words:
        return list(words)
    for name in ("train", "val"):
        (np.arange(2_000_000) % 50257).astype(np.uint16).tofile(folder / f"{name}.bin")
    return [*(word for word in words if word != OPENWEBTEXT), "data=tokens", f"data.path={folder}"]


def config_from(words: Iterable[str]) -> TrainConfig:
    """The configuration of these words, as ``gpt.train`` has it.

    Hydra parses the words, but composes only those that name a group of files, once for all tests of a process:
    composing takes a tenth of a second. Tests of composing itself call ``compose_train``.
    """
    words = list(words)
    values = [word for word in words if word.startswith(VALUES) and not word.startswith(ELSEWHERE)]
    config = copy.deepcopy(_composed(tuple(word for word in words if word not in values)))
    try:
        changed: dict[str, Any] = {}
        for override in OverridesParser.create().parse_overrides(values):
            section, _, key = override.key_or_group.partition(".")
            merged = changed.setdefault(section, OmegaConf.structured(getattr(config, section)))
            OmegaConf.update(merged, key, override.value())
        for section, merged in changed.items():
            setattr(config, section, OmegaConf.to_object(merged))
    except (HydraException, OmegaConfBaseException):  # to have it in our words
        return to_schema(compose_train(words), TrainConfig)
    return config


@cache
def _composed(words: tuple[str, ...]) -> TrainConfig:
    return to_schema(compose_train(words), TrainConfig)
