"""Facts of this machine for ``environment.json``: host, processor, GPUs and cores of a rank, asked without torch.

Owns the ``ranks`` entry of that file, as far as it can be told from outside a rank. Names no variable of the
environment wholesale: they hold secrets. Must not know what the rank runs.
"""

from __future__ import annotations

import itertools
import os
import platform
import re
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DRIVER = Path("/proc/driver/nvidia")


def describe_rank(rank: int, local_rank: int, node: int, *, on_cpu: bool = False) -> dict[str, Any]:
    """Describe a rank of this node from outside, for programs that say nothing of themselves.

    The device is the GPU that ``local_rank`` counts to among the visible ones, or the CPU where there is none or
    ``on_cpu``. ``device_uuid`` is absent where the GPU cannot be told for sure.
    """
    entry = describe_place(rank, local_rank, node)
    gpus = [] if on_cpu else visible_gpus()
    if gpus:
        gpu = gpus[local_rank % len(gpus)]
        entry |= {"device": f"cuda:{gpu.index}", "device_name": gpu.name}
        entry |= {"device_uuid": gpu.uuid.removeprefix("GPU-")} if gpu.uuid else {}  # as torch writes it
    else:
        entry |= {"device": "cpu", "device_name": cpu_name()}
    return entry | {"threads": threads_of(entry["cores"])}


def describe_place(rank: int, local_rank: int, node: int) -> dict[str, Any]:
    """Name where a rank runs. ``machine`` is one string per booted kernel: several hostnames may share it."""
    return {
        "rank": rank,
        "local_rank": local_rank,
        "node": node,
        "host": socket.gethostname(),
        "machine": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        **describe_cpus(os.sched_getaffinity(0)),
    }


def describe_cpus(cpus: Iterable[int]) -> dict[str, Any]:
    """Tell how many CPUs a rank may run on, and which, as Linux lists them: ``0-3,8``."""
    numbers = sorted(cpus)
    parts = []
    for _, following in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in following]
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}")
    return {"cores": len(numbers), "cpus": ",".join(parts)}


def threads_of(cores: int) -> int:
    """Threads of a rank as OpenMP counts them: OMP_NUM_THREADS (its first level), else one for each core."""
    first = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    return int(first) if first.isdigit() and int(first) else cores


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def driver_version(path: Path = DRIVER / "version") -> str | None:
    """The NVIDIA driver of this machine; None where there is none."""
    try:
        found = re.search(r"Kernel Module\b.*?\s(\d+\.[\d.]+)\s", path.read_text())
    except OSError:
        return None
    return found.group(1) if found else None


@dataclass(frozen=True)
class Gpu:
    """One GPU. ``index`` is its number for CUDA in this job; what cannot be told for sure is None."""

    index: str
    name: str
    uuid: str | None
    bus: str | None = None
    """Its address on the PCI bus, as Linux writes it."""


def visible_gpus(folder: Path = DRIVER / "gpus", environ: Mapping[str, str] = os.environ) -> list[Gpu]:
    """The GPUs that processes of this node may use, in CUDA's order."""
    there = [_read_gpu(str(index), path) for index, path in enumerate(sorted(folder.glob("*/information")))]
    named = environ.get("CUDA_VISIBLE_DEVICES")
    if named is None:
        names = [gpu.index for gpu in there]
    else:  # CUDA ignores the first entry that names no GPU, and all that follow
        names = list(itertools.takewhile(lambda name: name not in ("", "-1"), map(str.strip, named.split(","))))
    as_listed = _counts_as_listed(there, len(names), environ)
    return [_find_gpu(name, index, there, as_listed) for index, name in enumerate(names)]


def _read_gpu(index: str, path: Path) -> Gpu:
    """A GPU as its driver tells it, under its number in the order of the PCI bus."""
    told = dict(re.findall(r"^([^:\n]+):[ \t]*(.*?)[ \t]*$", path.read_text(), re.MULTILINE))
    uuid = told.get("GPU UUID", "")
    # The driver writes question marks until the GPU is first used.
    known = uuid if uuid.startswith("GPU-") and "?" not in uuid else None
    return Gpu(index, told.get("Model", "GPU"), known, path.parent.name.lower())


def _counts_as_listed(there: list[Gpu], visible: int, environ: Mapping[str, str]) -> bool:
    """Tell whether CUDA's numbers are those of the driver's list.

    Slurm may hide GPUs of other jobs by cgroups, and CUDA then counts what is left, while /proc shows all. CUDA puts
    the fastest first where they differ, unless it is told not to.
    """
    hidden = "SLURM_JOB_ID" in environ and visible < len(there)
    alike = len({gpu.name for gpu in there}) == 1 or environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID"
    return alike and not hidden


def _find_gpu(name: str, index: int, there: list[Gpu], as_listed: bool) -> Gpu:
    """The GPU that CUDA_VISIBLE_DEVICES calls ``name``, a number or the beginning of a UUID, in its place ``index``."""
    if name.isdigit():
        return there[int(name)] if as_listed and int(name) < len(there) else Gpu(name, _names(there), None)
    found = [gpu for gpu in there if gpu.uuid is not None and gpu.uuid.startswith(name)]
    # A slice of a GPU (MIG-...) is a device of its own, which the driver does not list.
    return found[0] if len(found) == 1 else Gpu(str(index), _names(there), name)


def _names(gpus: list[Gpu]) -> str:
    return " or ".join(sorted({gpu.name for gpu in gpus})) or "GPU"
