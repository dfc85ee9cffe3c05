"""Counts of the user's parts of a model, measured once for each config. Imports no torch.

If torch is loaded, this process measures the parts. Otherwise, as on a login node, another process does. So the
launcher neither waits for torch at every command nor runs the user's module.
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

import msgspec

from gpt.components import PartCounts, StateBytes
from gpt.config.model import ModelConfig
from gpt.config.optim import ADAMW, OptimConfig
from launch.errors import ConfigError


def part_counts(model: ModelConfig) -> Mapping[str, PartCounts]:
    """Return the counts of the user's parts of a model: ``norm``, ``head_norm``, ``position``, ``attention`` and
    ``ffn``.

    ``head_norm`` counts the norms of queries and keys together; its parameters are those of one norm. The mapping is
    empty for a model of built-in parts.

    Raises:
        ConfigError: a part cannot be imported, takes other arguments, or fails.
    """
    if not model.custom_parts:
        return {}
    plain = {key: getattr(value, "name", value) for key, value in asdict(model).items()}
    found: Mapping[str, PartCounts] = _measured(json.dumps({"model": plain}, sort_keys=True), dict[str, PartCounts])
    return found


def optimizer_state(optim: OptimConfig) -> StateBytes:
    """Return the bytes of an optimizer's state: two moments and a count for AdamW, measured for one of the user.

    Raises:
        ConfigError: the user's optimizer cannot be imported, or fails.
    """
    if optim.optimizer == ADAMW:
        return StateBytes(8, 4)
    found: StateBytes = _measured(json.dumps({"optim": asdict(optim)}, sort_keys=True), StateBytes)
    return found


@lru_cache(maxsize=64)
def _measured(request: str, kind: Any) -> Any:
    return msgspec.convert(measured(request), kind)


def measured(request: str) -> dict[str, Any]:
    """Return the counts that a request in JSON asks for (see ``meta_costs.answer``).

    This process measures them if it has loaded torch, otherwise a new process does.

    Raises:
        ConfigError: a part or optimizer cannot be used.
    """
    if "torch" in sys.modules:
        from gpt.components.meta_costs import answer

        return answer(request)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(
        [sys.executable, "-m", "gpt_launch", "gpt.components.meta_costs"],
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
    told: dict[str, Any] = json.loads(lines[-1])  # a module may print lines before the answer
    if "refused" in told:
        raise ConfigError(*told["refused"])
    return told


OWNERS = (
    ("attention", r"blocks\.\d+\.attention\.(.+)"),
    ("norm", r"(?:norm|blocks\.\d+\.(?:attention_norm|ffn_norm|attention\.query_norm|attention\.key_norm))\.(.+)"),
    ("position", r"(?:position|blocks\.\d+\.attention\.rope)\.(.+)"),
    ("ffn", r"blocks\.\d+\.ffn\.(.+)"),
)
"""Parts, and patterns of their tensors' names in the whole model. A tensor belongs to the first part of the user that
matches, so norms and positions inside the user's attention belong to the attention."""


def owner_of(name: str, model: ModelConfig) -> tuple[str, str] | None:
    """Return the user's part that a tensor belongs to: field of the config, and name in the part; None if there is
    none."""
    custom = model.custom_parts
    for key, pattern in OWNERS if custom else ():
        if key in custom and (found := re.fullmatch(pattern, name)):
            return key, found.group(1)
    return None
