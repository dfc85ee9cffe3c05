"""Environment of one attempt: device and memory of each rank, and versions of the software.

Owns the entries of ``attempts/NNNN/environment.json`` that need torch. Records no variable of the environment: some
hold secrets (``launch.runs.environment`` names those that are told).
"""

from __future__ import annotations

import os
import resource
from typing import Any

import torch

from gpt.parallel.distributed import World
from launch.runs.environment import cpu_name, describe_place, driver_version, library_versions


def describe_rank(world: World) -> dict[str, Any]:
    """Describe where this rank runs, and on which device."""
    device = world.device
    record = describe_place(world.rank, world.local_rank, world.node) | {
        "pid": os.getpid(),
        "device": str(device),
        "device_name": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "threads_are_set": "OMP_NUM_THREADS" in os.environ,
    }
    if device.type == "cuda":
        record["device_uuid"] = str(torch.cuda.get_device_properties(device).uuid)
        record["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    return record


def software() -> dict[str, str]:
    """List the versions of Python, of the libraries that decide a result, and of CUDA and NCCL where torch has them."""
    versions = library_versions()
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(str(n) for n in torch.cuda.nccl.version())
    driver = driver_version()
    return versions | ({"nvidia-driver": driver} if driver else {})


GIB = 2**30


def memory_gib(device: torch.device) -> tuple[float | None, float, float | None]:
    """Measure allocated, peak and reserved memory, GiB; None for what a CPU does not tell.

    On a GPU: the tensors now, the most that they took in this attempt, and the memory that the allocator keeps from the
    driver. On a CPU only the peak is known, of the RAM of the whole process with its libraries.
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
