"""What one attempt ran on: hosts, devices, cores, software, and the state of the code.

Owns ``attempts/NNNN/environment.json``. Names no variable of the environment wholesale: they hold secrets.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from gpt.parallel.world import World

PACKAGES = ("torch", "numpy", "hydra-core", "omegaconf", "submitit", "deepspeed")
GIT_TIMEOUT_S = 10


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
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
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


def code_state(folder: Path = Path(__file__).parent) -> dict[str, str]:
    """Commit and hash of the uncommitted changes of the checkout ``folder`` lies in; empty where there is none."""
    commit = git(folder, "rev-parse", "HEAD")
    diff = git(folder, "diff", "HEAD")
    if commit is None or diff is None:
        return {}
    return {"commit": commit.decode().strip(), "diff_sha256": hashlib.sha256(diff).hexdigest()}


def git(folder: Path, *words: str) -> bytes | None:
    """What git prints, or None where there is no git or no checkout."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, timeout=GIT_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
