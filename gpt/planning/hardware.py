"""What the estimates assume of the hardware: a rate of computing, memory, and two kinds of links.

Owns the defaults, each with its source. Must not know where nodes come from.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from gpt.accounting.hardware import GIGA, TERA, find, memory_bytes, peak_flops
from gpt.config import Precision

ATTAINABLE = 0.5
"""The share of a peak that a pass computes at while it sends nothing. Matrix products alone get to 0.8 (271 of 312 on
an A100, 794 of 989 TFLOP/s on an H100); norms, activations and the residual stream take the rest of the time."""
ROOM = 0.9
"""The share of a device's memory that tensors may take: the rest is the context's, the allocator's and NCCL's."""
INTRA_NODE_LATENCY_S, INTER_NODE_LATENCY_S = 2e-6, 5e-6
"""What a step of a ring takes beside its bytes, on NVLink and on InfiniBand; a small all-reduce of eight GPUs of a node
takes some 30 us in fourteen of them."""
NETWORK_GB_PER_S = 12.5
"""What a node of unknown make sends to others: 100 Gbit/s."""
PCIE_GB_PER_S = 32.0
"""What a GPU of unknown make sends to others of its node, and any to the host: 16 lanes of PCIe 4."""
HOST_GB_PER_S = 100.0
"""What the CPUs of a node read and write its memory with: half of the 205 that eight channels of DDR4-3200 have."""
CPU_FLOPS_PER_S, CPU_LINK_GB_PER_S = 60e9, 1.0
"""One thread in fp32, as benchmarks/README.md has it, and gloo through the loopback device or 10 Gbit/s."""


@dataclass(frozen=True)
class Link:
    """What it takes a rank to send something."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True)
class Host:
    """The memory of a node beside that of its devices, as far as one rank has it."""

    link_bytes_per_s: float
    """Between it and a device, in one direction."""
    bytes_per_s: float
    """That the CPUs of a rank read and write it with."""
    room: int | None
    """Bytes for the tensors of one rank; None where nobody knows."""


@dataclass(frozen=True)
class Machine:
    """Nodes that are all alike, one rank on each device."""

    device: str
    """What it is, in words."""
    flops_per_s: float
    """That a rank attains."""
    room: int
    """Bytes for the tensors of one rank."""
    ranks_per_node: int
    intra_node: Link
    """From a rank to one of its own node."""
    inter_node: Link
    """From a rank to one of another node, while all of its node send."""
    host: Host | None = None
    """None where the devices are the CPUs themselves."""

    def __str__(self) -> str:
        intra_node, inter_node = self.intra_node.bytes_per_s / GIGA, self.inter_node.bytes_per_s / GIGA
        return (
            f"{self.device}: {self.flops_per_s / TERA:.3g} TFLOP/s attained, {intra_node:g} GB/s inside a node and "
            f"{inter_node:.3g} between nodes for each rank"
        )


@dataclass(frozen=True)
class MachineOverrides:
    """What a person, or the device itself, says; None where nothing is said. 10^9 bytes a second, one direction."""

    memory: int | None = None
    """Bytes of one device."""
    peak_tflops: float | None = None
    """Of one device, dense, in the precision of the run."""
    host_memory: int | None = None
    """Of a node, as far as one rank may have it."""
    attainable: float = ATTAINABLE
    inside_gb_per_s: float | None = None
    """From one device to the others of its node."""
    between_gb_per_s: float | None = None
    """From a whole node to others."""
    inside_latency_s: float = INTRA_NODE_LATENCY_S
    between_latency_s: float = INTER_NODE_LATENCY_S


def gpus(name: str, precision: Precision, ranks_per_node: int, overrides: MachineOverrides) -> Machine | None:
    """Nodes of GPUs; None where nobody knows their peak or their memory.

    Args:
        name: as ``torch.cuda.get_device_name()`` gives it.
        precision: that it computes in.
        ranks_per_node: devices of a node that are used.
        stated: what is known better than the table, or not in it.
    """
    known = find(name)
    peak = peak_flops(name, precision) if overrides.peak_tflops is None else overrides.peak_tflops * TERA
    memory = memory_bytes(name) if overrides.memory is None else overrides.memory
    if peak is None or memory is None:
        return None
    intra_node = PCIE_GB_PER_S if known is None else known.link_gb_per_s
    network = (known and known.network_gb_per_s) or NETWORK_GB_PER_S / ranks_per_node
    rates = links(overrides, ranks_per_node, intra_node, network)
    room = None if overrides.host_memory is None else int(ROOM * overrides.host_memory)
    host = Host(PCIE_GB_PER_S * GIGA, HOST_GB_PER_S * GIGA / ranks_per_node, room)
    return Machine(name, peak * overrides.attainable, int(ROOM * memory), ranks_per_node, *rates, host)


def cpus(memory: int, ranks_per_node: int, overrides: MachineOverrides) -> Machine:
    """Nodes whose ranks compute on the CPU, each with ``memory`` bytes for itself."""
    rates = links(overrides, ranks_per_node, CPU_LINK_GB_PER_S, CPU_LINK_GB_PER_S / ranks_per_node)
    return Machine("CPU", CPU_FLOPS_PER_S, int(ROOM * memory), ranks_per_node, *rates)


def links(overrides: MachineOverrides, ranks_per_node: int, intra_node: float, inter_node: float) -> tuple[Link, Link]:
    """The links inside and between nodes, from what is said of them or else from these rates of a rank, in GB/s."""
    if overrides.between_gb_per_s is not None:
        inter_node = overrides.between_gb_per_s / ranks_per_node
    return (
        Link(overrides.inside_latency_s, (overrides.inside_gb_per_s or intra_node) * GIGA),
        Link(overrides.between_latency_s, inter_node * GIGA),
    )


def free_memory() -> int:
    """Bytes of memory that this machine can give without swapping (MemAvailable of /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")
