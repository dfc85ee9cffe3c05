"""Counts of the user's own parts of a model, measured once for each config. Torch-free.

Where torch is loaded they are measured here; elsewhere, as on a login node, by a process of its own, so that the
launcher neither waits for torch with every command nor runs the user's module itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from gpt.components.parts import PartCounts, StateBytes
from gpt.config.model import ModelConfig
from gpt.config.optim import ADAMW, OptimConfig
from launch.errors import ConfigError


def part_counts(model: ModelConfig) -> Mapping[str, PartCounts]:
    """Measure the user's own parts of a model: ``norm``, ``head_norm``, ``position``, ``attention`` and ``ffn``.

    ``head_norm`` is the norm of queries and keys together, of which one has the parameters given. Empty for a model of
    our parts alone.

    Raises:
        ConfigError: a part cannot be imported, takes other arguments, or fails.
    """
    if not model.custom_parts:
        return {}
    plain = {key: getattr(value, "name", value) for key, value in asdict(model).items()}
    return _measured(json.dumps({"model": plain}, sort_keys=True))


def optimizer_state(optim: OptimConfig) -> StateBytes:
    """Return the size of the optimizer's state: of AdamW both moments and a count, of one of the user's as measured.

    Raises:
        ConfigError: the user's optimizer cannot be imported, or fails.
    """
    if optim.optimizer == ADAMW:
        return StateBytes(8, 4)
    request = {"optim": asdict(optim)}
    return _optimizer_state(json.dumps(request, sort_keys=True))


@lru_cache(maxsize=64)
def _optimizer_state(request: str) -> StateBytes:
    return StateBytes(**measured(request))


@lru_cache(maxsize=64)
def _measured(request: str) -> Mapping[str, PartCounts]:
    answer = measured(request)
    return {name: read_counts(counts) for name, counts in answer.items()}


def measured(request: str) -> dict[str, Any]:
    """Answer a request, in JSON, by this process where it has torch, else by another one.

    Raises:
        ConfigError: a part is refused.
    """
    if "torch" in sys.modules:
        from gpt.components.measure import answer

        return answer(request)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "gpt_launch", "gpt.components.measure"],
        input=request, capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    lines = run.stdout.splitlines()
    if run.returncode or not lines:
        last = (run.stderr.strip() or "no output").splitlines()[-1]
        raise ConfigError(
            f"measuring the parts of this model failed: {last}",
            "parts that torch can build on its meta device",
            "the parts repaired, or parts of ours",
        )
    told: dict[str, Any] = json.loads(lines[-1])  # a module may have printed before
    if "refused" in told:
        raise ConfigError(*told["refused"])
    return told


def read_counts(plain: dict[str, Any]) -> PartCounts:
    """Read counts from JSON."""
    shapes = {name: tuple(shape) for name, shape in plain["shapes"].items()}
    return PartCounts(**{**plain, "shapes": shapes, "parallel": tuple(plain["parallel"])})


OWNERS = (
    ("attention", r"blocks\.\d+\.attention\.(.+)"),
    ("norm", r"(?:norm|blocks\.\d+\.(?:attention_norm|ffn_norm|attention\.query_norm|attention\.key_norm))\.(.+)"),
    ("position", r"(?:position|blocks\.\d+\.attention\.rope)\.(.+)"),
    ("ffn", r"blocks\.\d+\.ffn\.(.+)"),
)
"""Names of the tensors that belong to a part, in the whole model. The first that is the user's has them: norms and
positions inside an attention of the user's are its own."""


def owner_of(name: str, model: ModelConfig) -> tuple[str, str] | None:
    """Find the user's own part that a tensor of the model belongs to: field, and name within the part; else None."""
    custom = model.custom_parts
    for key, pattern in OWNERS if custom else ():
        if key in custom and (found := re.fullmatch(pattern, name)):
            return key, found.group(1)
    return None
