"""Planner: valid layouts, memory per rank, step-time estimates, and ``parallel=auto``. Imports no torch.

This module has the model of the hardware: compute rate, memory, links, and the cost of collectives. ``rank_shards``
computes the shard of each parameter and the saved activations, ``memory`` the memory of a rank, and ``cost`` the time
of a step. ``search`` enumerates the layouts, keeps those that fit, and explains the rest. ``auto`` ranks them and
chooses the first. The estimates serve to rank layouts; they are not measurements of the machine.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gpt.accounting import GIB, GIGA, KNOWN, TERA, expand, find, memory_bytes, words_of
from gpt.topology import ParallelDims
from launch.errors import ConfigError, closest
from launch.runs.measured import COLLECTIVES, TIERS, Curve, LinkFit, MatmulRates, Network

# Compute rate, memory, and links within and between nodes.


ATTAINABLE = 0.5
"""Share of the peak that a forward and backward pass attains without communication, 0 to 1. Matrix products alone reach
0.8 (271 of 312 TFLOP/s on an A100, 794 of 989 on an H100). Norms, activations and the residual stream take the rest of
the time."""
ROOM = 0.9
"""Share of a device's memory that tensors may use, 0 to 1. The CUDA context, the allocator and NCCL use the rest."""
INTRA_NODE_LATENCY_S, INTER_NODE_LATENCY_S = 2e-6, 5e-6
"""Latency of a ring step on NVLink and on InfiniBand, in seconds. A small all-reduce over the eight GPUs of a node
takes some 30 us in fourteen steps."""
NETWORK_GB_PER_S = 12.5
"""Network bandwidth of a node of unknown make, in GB/s: 100 Gbit/s."""
PCIE_GB_PER_S = 32.0
"""Bandwidth in GB/s of a GPU of unknown make to others of its node, and of any GPU to the host: 16 lanes of PCIe 4."""
HOST_GB_PER_S = 100.0
"""Host memory bandwidth of a node in GB/s: half of the 205 GB/s of eight channels of DDR4-3200."""
CPU_FLOPS_PER_S, CPU_LINK_GB_PER_S = 60e9, 1.0
"""Rate of one thread in fp32 (see benchmarks/speed/README.md), and bandwidth of gloo through the loopback device or 10
Gbit/s."""


@dataclass(frozen=True)
class Link:
    """Latency in seconds and bandwidth in bytes a second of a rank's link, in one direction."""

    latency_s: float
    bytes_per_s: float
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    """Collective -> its measured latency in seconds, and bandwidth in bytes a second (``launch.runs.measured``)."""

    curves: Mapping[str, Curve] = field(default_factory=dict, hash=False)
    """Collective -> measured deviation from its latency and bandwidth, by the bytes of a message."""

    def rates(self, collective: str) -> tuple[float, float]:
        """Return latency in seconds, and bandwidth in bytes a second, of a collective."""
        return self.measured.get(collective, (self.latency_s, self.bytes_per_s))

    def faster(self, factor: float) -> Link:
        """Return a link whose latencies are ``factor`` times as short, and bandwidths ``factor`` times as large."""
        measured = {name: (latency_s / factor, rate * factor) for name, (latency_s, rate) in self.measured.items()}
        return Link(self.latency_s / factor, self.bytes_per_s * factor, measured, self.curves)


@dataclass(frozen=True)
class Host:
    """A rank's share of the host memory of a node with GPUs."""

    link_bytes_per_s: float
    """Bandwidth between host memory and a device, in one direction, in bytes a second."""
    bytes_per_s: float
    """Bandwidth of host memory for one rank, in bytes a second."""
    room: int | None
    """Bytes for the tensors of one rank; None if unknown."""


@dataclass(frozen=True)
class Machine:
    """Identical nodes with one rank on each device."""

    device: str
    """Name of the device, for messages."""
    flops_per_s: float
    """Attained rate of a rank, in FLOP/s."""
    room: int
    """Bytes for the tensors of one rank."""
    ranks_per_node: int
    intra_node: Link
    """Link of a rank to another rank of its node."""
    inter_node: Link
    """Link of a rank to a rank of another node, while all ranks of its node send."""
    host: Host | None = None
    """Host memory of a rank; None if the devices are the CPUs themselves."""
    matmul: MatmulRates | None = None
    """Measured rates of matrix products by size; ``flops_per_s`` is then the fastest of them. None if not measured."""

    def __str__(self) -> str:
        intra_node, inter_node = self.intra_node.bytes_per_s / GIGA, self.inter_node.bytes_per_s / GIGA
        return (
            f"{self.device}: {self.flops_per_s / TERA:.3g} TFLOP/s attained, {intra_node:g} GB/s inside a node and "
            f"{inter_node:.3g} between nodes for each rank"
        )


def gpus(
    name: str, peak: float | None, ranks_per_node: int, *, memory: int | None = None, host_memory: int | None = None
) -> Machine | None:
    """Return the machine of GPU nodes; None if their peak or memory is unknown.

    Args:
        name: result of ``torch.cuda.get_device_name()``.
        peak: dense peak of one device in the precision of the run, FLOP/s; None if unknown.
        ranks_per_node: number of devices of a node that the run uses.
        memory: memory of one device in bytes; None takes the value of the table of accelerators.
        host_memory: host memory in bytes that one rank may use; None if unknown.
    """
    known = find(name)
    memory = memory_bytes(name) if memory is None else memory
    if peak is None or memory is None:
        return None
    inside = PCIE_GB_PER_S if known is None else known.link_gb
    between = (known and known.network_gb) or NETWORK_GB_PER_S / ranks_per_node
    room = None if host_memory is None else int(ROOM * host_memory)
    host = Host(PCIE_GB_PER_S * GIGA, HOST_GB_PER_S * GIGA / ranks_per_node, room)
    return Machine(name, peak * ATTAINABLE, int(ROOM * memory), ranks_per_node, *links(inside, between), host)


def known_gpu(name: str | None, memory_gib: float | None) -> str | None:
    """Return the full name of the GPUs with the short or full name ``name``. Of variants, the one whose memory is
    nearest to ``memory_gib``.

    None for a ``name`` of None. An unknown name with a ``memory_gib`` is returned unchanged, since a plan needs no
    more.

    Raises:
        ConfigError: ``memory_gib`` is None, and the device is unknown or has variants with different memory.
    """
    meant = [] if name is None else expand(name)
    if memory_gib is not None and meant:
        return min(meant, key=lambda known: abs((memory_bytes(known) or 0) - memory_gib * GIB))
    if name is None or memory_gib is not None or len(meant) == 1:
        return meant[0] if meant else name
    if meant:
        sized = [f"cluster.gpu_name={name}-{(memory_bytes(known) or 0) / GIGA:.0f}GB" for known in meant]
        raise ConfigError(
            f"cluster.gpu_name={name}, which is one of {', '.join(meant)}",
            "a name with the memory, by which a run that does not fit is refused",
            ", or ".join(sized),
        )
    chips = closest(name.lower(), {words_of(known)[0] for known in KNOWN})[:1]
    likely = [f"cluster.gpu_name={shlex.quote(known)}" for chip in chips for known in expand(chip)]
    raise ConfigError(
        f"cluster.gpu_name={name}, which is not known",
        f"one of {', '.join(KNOWN)}, or a short name such as H100 or A100-80GB",
        ", or ".join(["cluster.gpu_memory_gib=N, the memory of one GPU, beside that name", *likely]),
    )


def cpus(memory: int, ranks_per_node: int) -> Machine:
    """Return the machine of CPU nodes, with ``memory`` bytes for each rank."""
    rates = links(CPU_LINK_GB_PER_S, CPU_LINK_GB_PER_S / ranks_per_node)
    return Machine("CPU", CPU_FLOPS_PER_S, int(ROOM * memory), ranks_per_node, *rates)


def links(inside: float, between: float) -> tuple[Link, Link]:
    """Return the links of a rank within a node and between nodes. ``inside`` and ``between`` are bandwidths in GB/s."""
    return Link(INTRA_NODE_LATENCY_S, inside * GIGA), Link(INTER_NODE_LATENCY_S, between * GIGA)


def with_network(machine: Machine, network: Network) -> Machine:
    """Return ``machine`` with the measured links of ``network``. A link that was not measured stays unchanged.

    Between nodes, all ranks of a node share its network adapters.
    """
    share = network.ranks_per_node / machine.ranks_per_node
    inside, between = (network.tiers.get(tier) for tier in TIERS)
    return replace(
        machine,
        intra_node=measured_link(inside, 1.0) if inside else machine.intra_node,
        inter_node=measured_link(between, share) if between else machine.inter_node,
    )


def measured_link(fits: Mapping[str, LinkFit], share: float) -> Link:
    """Return a link with the measured latencies of ``fits``, and the measured bandwidths times ``share``.

    A collective that was not measured uses the values of a send, or else of the first measured collective.
    """
    rates = {name: (fit.latency_s, fit.bytes_per_s * share) for name, fit in fits.items()}
    curves = {name: fit.curve for name, fit in fits.items() if fit.curve}
    return Link(*rates.get("send", next(iter(rates.values()))), rates, curves)


def free_memory() -> int:
    """Return the bytes of memory available without swapping on this machine (MemAvailable of /proc/meminfo)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("/proc/meminfo has no MemAvailable")


# Cost of collectives: the alpha-beta (latency and bandwidth) model of a ring.
#
# An all-gather or reduce-scatter of n bytes over a ring of k ranks takes k - 1 steps of n / k bytes; an all-reduce
# takes twice as many (Thakur, Rabenseifner and Gropp, 2005, sections 4.1 and 4.5; NCCL's performance notes). Trees have
# less latency in large groups; they are used here only for a few numbers.


@dataclass(frozen=True)
class Group:
    """Number of ranks of a process group, and the slowest link of its ring."""

    ranks: int
    link: Link

    def seconds(self, collective: str, size: float) -> float:
        """Return the seconds of ``collective`` (one of ``launch.runs.measured.COLLECTIVES``) with ``size`` bytes."""
        fit = LinkFit(*self.link.rates(collective), curve=self.link.curves.get(collective, ()))
        return fit.seconds(collective, self.ranks, size)

    def all_gather(self, size: float) -> float:
        """Return the seconds of an all-gather whose result is ``size`` bytes on each rank."""
        return self.seconds("all_gather", size)

    def reduce_scatter(self, size: float) -> float:
        """Return the seconds of a reduce-scatter whose input is ``size`` bytes on each rank."""
        return self.seconds("reduce_scatter", size)

    def all_reduce(self, size: float) -> float:
        """Return the seconds of an all-reduce of ``size`` bytes on each rank."""
        return self.seconds("all_reduce", size)

    def agree(self) -> float:
        """Return the seconds of an all-reduce of a few numbers: over a tree, as in NCCL, or as measured."""
        if "all_reduce" in self.link.measured:
            return self.all_reduce(0.0)
        return 2 * math.ceil(math.log2(self.ranks)) * self.link.latency_s

    def all_to_all(self, size: float) -> float:
        """Return the seconds of an all-to-all whose input is ``size`` bytes on each rank."""
        return self.seconds("all_to_all", size)

    def send(self, size: float) -> float:
        """Return the seconds of sending ``size`` bytes to a neighbor."""
        return self.seconds("send", size)


def group(dims: ParallelDims, machine: Machine, names: Sequence[str]) -> Group:
    """Return the group of ranks along neighboring mesh axes.

    Ranks are numbered along the innermost axis first, and fill the nodes in this order. Each rank has its own share of
    its node's network adapters: a ring with several ranks on a node uses the shares of all of them.
    """
    sizes = dims.sizes
    inner = list(sizes)[list(sizes).index(names[-1]) + 1 :]
    stride, ranks = math.prod(sizes[name] for name in inner), math.prod(sizes[name] for name in names)
    return strided_group(machine, ranks, stride)


def strided_group(machine: Machine, ranks: int, stride: int) -> Group:
    """Return a group of ``ranks`` ranks whose numbers are ``stride`` apart."""
    if ranks * stride <= machine.ranks_per_node:
        return Group(ranks, machine.intra_node)
    together = max(1, min(ranks, machine.ranks_per_node // stride))
    if together == 1:
        return Group(ranks, machine.inter_node)
    inside, between = machine.intra_node, machine.inter_node

    def slower(within: tuple[float, float], latency_s: float, rate: float) -> tuple[float, float]:
        return latency_s, min(together * rate, within[1])

    known = [name for name in COLLECTIVES if name in between.measured or name in inside.measured]
    measured = {name: slower(inside.rates(name), *between.rates(name)) for name in known}
    assumed = slower((inside.latency_s, inside.bytes_per_s), between.latency_s, between.bytes_per_s)
    return Group(ranks, Link(*assumed, measured))
