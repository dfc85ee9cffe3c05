"""Precision and compilation of the ranks, where the config leaves them to the devices.

Owns what only ranks can tell: the devices that all of them have, and what an earlier attempt computed in. The rule is
gpt/planning/execution.py's.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from gpt.config import Precision, TrainConfig
from gpt.parallel.distributed import World
from gpt.planning.execution import choose_compile
from launch.errors import ConfigError
from launch.runs.files import read_json
from launch.runs.folder import RunFolder


def settle_execution(config: TrainConfig, folder: RunFolder, world: World) -> TrainConfig:
    """Return the config with ``precision`` and ``compile`` filled in, the same on all ranks. Collective.

    Raises:
        ConfigError: the run was begun in bf16, and some of these devices do not compute in it.
    """
    precision = config.precision
    if precision is Precision.auto:
        precision = settle_precision(folder, world)
    on_cpus = world.device.type != "cuda"
    return replace(config, precision=precision, compile=choose_compile(config, world.size, on_cpus))


def settle_precision(folder: RunFolder, world: World) -> Precision:
    """Choose the precision that earlier attempts computed in, else bf16 where the devices of all ranks have it."""
    before = world.on_first(lambda: earlier_precision(folder))
    lacking = [name for name in world.gather(None if has_bf16(world.device) else str(world.device)) if name is not None]
    if before is None:
        return Precision.fp32 if lacking else Precision.bf16
    if before == Precision.bf16.name and lacking and world.device.type == "cuda":
        raise ConfigError(
            f"a run begun in bf16, and {len(lacking)} of {world.size} ranks on GPUs that do not compute in it",
            "GPUs like those that it began on",
            "GPUs of compute capability 8.0 or more, or precision=fp32 fresh=true to start over",
        )
    return Precision[before]


def has_bf16(device: torch.device) -> bool:
    """Tell whether a device computes in bf16 faster than in fp32; CPUs are not counted among those."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def earlier_precision(folder: RunFolder) -> str | None:
    """Name of the precision of the newest attempt that tells it; None where there is none."""
    for attempt in reversed(folder.attempts()):
        told = read_json(folder.environment(attempt)).get("precision")
        if told in Precision.__members__ and told != Precision.auto.name:
            return str(told)
    return None
