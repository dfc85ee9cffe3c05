"""GPUs of this machine, counted without torch, and the refusal of spares on it.

Must not know what a run needs.
"""

from __future__ import annotations

import os
from pathlib import Path

from launch.config import Config
from launch.errors import ConfigError


def refuse_local_spares(config: Config) -> None:
    """Raise ConfigError where spare nodes are asked of this one machine."""
    if config.spare_nodes:
        raise ConfigError(
            f"spare_nodes={config.spare_nodes} with agents on this machine (cluster=local)",
            "a Slurm cluster: nodes on one machine are lost together",
            "spare_nodes=0, or cluster=slurm",
        )


def local_gpus() -> int:
    """GPUs of this machine that may be used, counted without torch."""
    named = _named_gpus()
    if named is not None:
        return len([name for name in named if name not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def visible_gpus() -> list[int]:
    """Indices of the visible GPUs; those that CUDA_VISIBLE_DEVICES names in another way are left out."""
    named = _named_gpus()
    if named is not None:
        return [int(name) for name in named if name.isdigit()]
    return list(range(local_gpus()))


def _named_gpus() -> list[str] | None:
    """The devices in CUDA_VISIBLE_DEVICES; None where it is not set, and all GPUs may be used."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if names is None else [name.strip() for name in names.split(",")]


def local_gpu_name() -> str | None:
    """Name of the first GPU of this machine, from the driver's files."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return None
