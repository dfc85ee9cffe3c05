"""CPUs of each rank beside its GPU: the NUMA node that the GPU hangs on, as far as Linux and the driver tell it.

A rank that runs on the other socket reaches its GPU and its pinned memory over the link between the sockets. Owns which
ranks are bound to what, and the variable that says so to a rank. Torch-free; torch's own binding needs numactl.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from launch.runs.hosts import Gpu

VARIABLE = "LAUNCH_CPUS"
"""CPUs that a rank is bound to, in its environment."""
DEVICES = Path("/sys/bus/pci/devices")


def cpus_of_ranks(
    ranks: int, gpus: Sequence[Gpu], allowed: Collection[int], devices: Path = DEVICES
) -> list[frozenset[int]] | None:
    """CPUs for each rank of a node, by local rank, out of those this process may use; None where none is to be bound.

    That is where a GPU or its place is not known, where all CPUs are near, and where the CPUs near some GPUs are fewer
    than the ranks on them: a job that shares its node may have been given those of another socket.
    """
    if len(gpus) < ranks or ranks == 0:
        return None
    near = [cpus_near(gpu, devices) & frozenset(allowed) for gpu in gpus[:ranks]]
    sharing = Counter(near)
    if any(len(cpus) < count for cpus, count in sharing.items()) or set(near) == {frozenset(allowed)}:
        return None
    return near


def cpus_near(gpu: Gpu, devices: Path) -> frozenset[int]:
    """CPUs of the NUMA node of a GPU; none where that is not known."""
    if gpu.bus is None:
        return frozenset()
    try:
        return frozenset(parse_cpus((devices / gpu.bus / "local_cpulist").read_text()))
    except OSError:
        return frozenset()


def parse_cpus(text: str) -> Iterator[int]:
    """The CPUs of a list as Linux writes it: ``0-3,8``."""
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


def told_cpus(environment: Mapping[str, str]) -> frozenset[int]:
    """CPUs that a rank with this environment is bound to; none where it is not bound."""
    return frozenset(parse_cpus(environment.get(VARIABLE, "")))


@contextmanager
def bound(cpus: Collection[int]) -> Iterator[None]:
    """Start processes in a ``with`` block that run on these CPUs only; where there are none, anywhere."""
    before = os.sched_getaffinity(0)
    if cpus:
        os.sched_setaffinity(0, cpus)  # of this thread, and of what it starts
    try:
        yield
    finally:
        if cpus:
            os.sched_setaffinity(0, before)
