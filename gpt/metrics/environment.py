"""What one attempt ran on: hosts, devices, cores, and software.

Owns ``attempts/NNNN/environment.json``. Names no variable of the environment wholesale: they hold secrets.
"""

from __future__ import annotations

import os
import resource
from typing import Any

import torch

from gpt.parallel.distributed import World
from launch.runs.hosts import cpu_name, describe_place, driver_version
from launch.runs.provenance import library_versions


def describe_rank(world: World) -> dict[str, Any]:
    """Describe where this rank runs, and on which device."""
    device = world.device
    record = describe_place(world.rank, world.local_rank, world.node) | {
        "pid": os.getpid(),
        "device": str(device),
        "device_name": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        record["device_uuid"] = str(torch.cuda.get_device_properties(device).uuid)
        record["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    return record


def software() -> dict[str, str]:
    """Versions of Python, of the libraries that decide a result, and of CUDA and NCCL where torch has them."""
    versions = library_versions()
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(str(n) for n in torch.cuda.nccl.version())
    driver = driver_version()
    return versions | ({"nvidia-driver": driver} if driver else {})


GIB = 2**30


def memory_gib(device: torch.device) -> tuple[float | None, float, float | None]:
    """Allocated, peak and reserved memory, GiB.

    On a GPU: what tensors take now, the most they took in this attempt, and what the allocator keeps from the driver.
    A CPU knows only the most that the whole process, its libraries included, has held in RAM.
    """
    if device.type != "cuda":
        # Linux counts ru_maxrss in KiB (getrusage(2)).
        return None, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB, None
    known = torch.cuda.memory_stats(device)  # asked once: it takes a tenth of a millisecond
    return (
        known["allocated_bytes.all.current"] / GIB,
        known["allocated_bytes.all.peak"] / GIB,
        known["reserved_bytes.all.current"] / GIB,
    )
