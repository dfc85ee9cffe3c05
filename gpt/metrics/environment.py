"""What one attempt ran on: hosts, devices, cores, and software.

Owns ``attempts/NNNN/environment.json``. Names no variable of the environment wholesale: they hold secrets.
"""

from __future__ import annotations

import os
import platform
import re
import resource
import socket
from pathlib import Path
from typing import Any

import torch

from gpt.parallel.distributed import World
from launch.runs.provenance import library_versions


def describe_rank(world: World) -> dict[str, Any]:
    """Where this rank runs. ``machine`` is one string per booted kernel: several hostnames may share it."""
    device = world.device
    record: dict[str, Any] = {
        "rank": world.rank,
        "local_rank": world.local_rank,
        "node": world.node,
        "host": socket.gethostname(),
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        "pid": os.getpid(),
        "device": str(device),
        "device_name": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        record["device_uuid"] = str(torch.cuda.get_device_properties(device).uuid)
        record["memory_gib"] = torch.cuda.get_device_properties(device).total_memory / 2**30
    return record


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def software() -> dict[str, str]:
    """Versions of Python, of the libraries that decide a result, and of CUDA and NCCL where torch has them."""
    versions = library_versions()
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
        versions["nccl"] = ".".join(str(n) for n in torch.cuda.nccl.version())
    driver = driver_version()
    return versions | ({"nvidia-driver": driver} if driver else {})


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str | None:
    """The NVIDIA driver of this machine; None where there is none."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d+\.[\d.]+)\s", path.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


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
