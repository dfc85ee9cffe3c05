"""What this machine or the nodes of a cluster can hold, and the refusal of what does not fit.

Owns the look at this machine, without torch. Must not know what a run needs, beyond the number it is given.
"""

from __future__ import annotations

import os
from pathlib import Path

from gpt.accounting.memory import GIB
from gpt.config import Device
from gpt.errors import ConfigError
from launch.config import ClusterKind, Config


def refuse_what_does_not_fit(config: Config, needed: int, kind: ClusterKind) -> None:
    """Raise ConfigError where the nodes, as far as they are known, cannot hold a run of ``needed`` bytes a rank."""
    if kind is ClusterKind.local:
        refuse_local_spares(config)
        refuse_too_few_gpus(config, local_gpus())
    refuse_too_little_memory(config, needed, kind)


def refuse_local_spares(config: Config) -> None:
    """Raise ConfigError where spares would be agents on the machine that they should stand in for."""
    if config.spares:
        raise ConfigError(
            f"spares={config.spares} with agents on this machine (cluster=local)",
            "a Slurm cluster: nodes on one machine are lost together",
            "spares=0, or cluster=slurm",
        )


def local_gpus() -> int:
    """GPUs of this machine that may be used, counted without torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([word for word in visible.split(",") if word.strip() not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def refuse_too_few_gpus(config: Config, gpus: int) -> None:
    """Raise ConfigError where local ranks would have to share GPUs, or there are none and cuda was asked for."""
    if config.device is Device.cpu or (config.device is Device.auto and gpus == 0):
        return
    if config.world_size > gpus:
        raise ConfigError(
            f"nodes={config.nodes} x {config.ranks_on_node} ranks = {config.world_size} ranks on a machine with {gpus} "
            "GPUs",
            "a GPU for each rank",
            "device=cpu" if gpus == 0 else f"nodes=1 ranks_per_node={gpus}, or device=cpu",
        )


def refuse_too_little_memory(config: Config, needed: int, kind: ClusterKind) -> None:
    """Raise ConfigError where the memory that is known cannot hold the run."""
    if kind is ClusterKind.local and (config.device is Device.cpu or local_gpus() == 0):
        have, ranks, where = available_memory(), config.world_size, "free on this machine"
    elif config.cluster.gpu_memory_gib is not None:
        have, ranks, where = int(config.cluster.gpu_memory_gib * GIB), 1, "on a GPU (cluster.gpu_memory_gib)"
    else:
        return
    if ranks * needed > have:
        total = f"{ranks} ranks x {needed / GIB:.2f} GiB = {ranks * needed / GIB:.2f} GiB"
        raise ConfigError(
            f"{total}, and {have / GIB:.2f} GiB {where}",
            "a run that fits",
            "parallel=fsdp, optim.micro_batch=1, or a smaller model",
        )


def available_memory() -> int:
    """Bytes of memory that this machine can give without swapping (MemAvailable of /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")
