"""Precision, TF32 and compilation of the ranks, where the config leaves them to the devices.

Owns what only ranks can tell: the devices that all of them have, what an earlier attempt computed in, and where what it
compiled lies. The rule is gpt/planning/execution.py's.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from gpt.config import Float8, Precision, TrainConfig
from gpt.parallel.distributed import World
from gpt.planning.execution import choose_compile, choose_tf32, float8_refusal, refuse_float8, refuse_tf32, tf32_refusal
from launch.errors import ConfigError
from launch.runs.environment import COMPILE_CACHE
from launch.runs.files import read_json
from launch.runs.folder import RunFolder


def settle_execution(config: TrainConfig, folder: RunFolder, world: World) -> TrainConfig:
    """Return the config with ``precision``, ``tf32`` and ``compile`` filled in, the same on all ranks. Collective.

    Raises:
        ConfigError: the run was begun in bf16, and some of these devices do not compute in it; or TF32 is asked for
            where there is none, or float8.
    """
    precision = config.precision
    if precision is Precision.auto:
        precision = settle_precision(folder, world)
    on_cpus = world.device.type != "cuda"
    config = replace(config, precision=precision)
    refuse_tf32(config, None)
    tf32 = choose_tf32(config, on_cpus) and all(world.gather(has_tf32(world.device)))
    if config.tf32 and not tf32:
        raise tf32_refusal(torch.cuda.get_device_name(world.device))
    refuse_float8(config, on_cpus, None)
    if config.float8 is not Float8.none and not config.float8_emulate:
        lacking = world.gather(not has_float8(world.device)).count(True)
        if lacking:
            raise float8_refusal(config, f"{world.size} ranks, of which {lacking} have GPUs that do not compute in it")
    return replace(config, tf32=tf32, compile=choose_compile(config, world.size, on_cpus))


def settle_precision(folder: RunFolder, world: World) -> Precision:
    """Choose the precision that earlier attempts computed in, else the best one that the devices of all ranks have."""
    before = world.on_first(lambda: earlier_precision(folder))
    best = world.gather(best_precision(world.device).name)
    if before is None:
        return next(p for p in (Precision.fp32, Precision.fp16, Precision.bf16) if p.name in best)
    lacking = [name for name in best if name != Precision.bf16.name]
    if before == Precision.bf16.name and lacking and world.device.type == "cuda":
        raise ConfigError(
            f"a run begun in bf16, and {len(lacking)} of {world.size} ranks on GPUs that do not compute in it",
            "GPUs like those that it began on",
            "GPUs of compute capability 8.0 or more, or precision=fp32 fresh=true to start over",
        )
    return Precision[before]


def keep_compiled(config: TrainConfig, world: World) -> None:
    """Have torch's compiler keep what it makes for later attempts, on whatever nodes they run, and for runs of the
    same shapes. Collective.
    """
    if config.compiles:
        folder = world.on_first(partial(open_compile_cache, Path(config.output_dir) / ".cache" / "compiled"))
        if folder is not None and not names_compile_cache():
            os.environ[COMPILE_CACHE] = folder


def names_compile_cache() -> bool:
    """Tell whether the user has named a folder for what is compiled; torch names its own, in /tmp, when imported."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir  # slow to import

    return os.environ.get(COMPILE_CACHE, default_cache_dir()) != default_cache_dir()


def open_compile_cache(folder: Path) -> str | None:
    """Make a folder for what is compiled; None where the user has named one, and on a filesystem that cannot lock
    files, as the compiler does."""
    if names_compile_cache():
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError:
        return None
    return str(folder.absolute())


VOLTA = (7, 0)
"""Compute capability from which GPUs have matrix units, first for fp16 only (V100, T4)."""
AMPERE = (8, 0)
"""Compute capability from which they know bf16 and TF32."""
ADA = (8, 9)
"""Compute capability from which they know 8-bit floating point."""
GFX_OF_FLOAT8 = ("gfx94", "gfx95", "gfx12")
"""What the architectures of AMD's GPUs that know it begin with: MI300, MI350 and Navi 4 (torchao, ``utils``)."""


def best_precision(device: torch.device) -> Precision:
    """Return the precision in which a device computes fastest; fp32 for CPUs, few of which are faster in bf16."""
    if device.type != "cuda":
        return Precision.fp32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return Precision.bf16
    return Precision.fp16 if torch.cuda.get_device_capability(device) >= VOLTA else Precision.fp32


def has_tf32(device: torch.device) -> bool:
    """Tell whether a device computes in TF32 where torch is allowed to."""
    on_cuda = device.type == "cuda" and torch.version.hip is None
    return on_cuda and torch.cuda.get_device_capability(device) >= AMPERE


def has_float8(device: torch.device) -> bool:
    """Tell whether the matrix units of a GPU multiply 8-bit floating point numbers."""
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.startswith(GFX_OF_FLOAT8)
    return torch.cuda.get_device_capability(device) >= ADA


def earlier_precision(folder: RunFolder) -> str | None:
    """Name of the precision of the newest attempt that tells it; None where there is none."""
    for attempt in reversed(folder.attempts()):
        told = read_json(folder.environment(attempt)).get("precision")
        if told in Precision.__members__ and told != Precision.auto.name:
            return str(told)
    return None
