"""Planner: valid layouts, memory per rank, step-time estimates, and ``parallel=auto``. Imports no torch.

A layout is a choice of parallel dimensions, strategy and schedule. This module has the model of the hardware: rate of
computing, memory, links, and the time of collectives. ``rank_shards`` computes the shard of each parameter and the
saved activations, ``memory`` the memory of a rank, and ``cost`` the time of a step. ``search`` enumerates the layouts
that fit into memory, and ``auto`` chooses the fastest. The estimates compare layouts; they are not measurements.
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
"""Assumed rate of a forward and backward pass without communication, as a share of the peak, 0 to 1. Matrix products
alone reach 0.8 (271 of 312 TFLOP/s on an A100, 794 of 989 on an H100). Norms, activations and the residual stream take
the rest of the time."""
ROOM = 0.9
"""Share of a device's memory that tensors may use, 0 to 1. The CUDA context, the allocator and NCCL use the rest."""
INTRA_NODE_LATENCY_S, INTER_NODE_LATENCY_S = 2e-6, 5e-6
"""Assumed latency, in seconds, of one step of a collective over a ring of ranks: on NVLink inside of a node, on
InfiniBand between nodes. A small all-reduce over the eight GPUs of a node takes some 30 us in fourteen steps."""
NETWORK_GB_PER_S = 12.5
"""Assumed network bandwidth of a node whose GPUs are unknown, in GB/s: 100 Gbit/s."""
PCIE_GB_PER_S = 32.0
"""Assumed bandwidth in GB/s, that of 16 lanes of PCIe 4: between any GPU and the host, and between an unknown GPU and
the other GPUs of its node."""
HOST_GB_PER_S = 100.0
"""Assumed bandwidth of the host memory of a node, in GB/s: half of the 205 GB/s of eight channels of DDR4-3200."""
CPU_FLOPS_PER_S, CPU_LINK_GB_PER_S = 60e9, 1.0
"""Assumed figures of ranks on CPUs. The first is the rate of one rank in fp32, in FLOP/s (one thread, see
benchmarks/speed/README.md). The second is the bandwidth of gloo in GB/s, both inside of a node and over a network of 10
Gbit/s."""


@dataclass(frozen=True)
class Link:
    """Link from a rank to another rank."""

    latency_s: float
    """Latency, in seconds, of one step of a collective over a ring of ranks."""
    bytes_per_s: float
    """Bandwidth in one direction, in bytes a second."""
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict, hash=False)
    """Collective -> its measured latency in seconds, and bandwidth in bytes a second (``launch.runs.measured``)."""

    curves: Mapping[str, Curve] = field(default_factory=dict, hash=False)
    """Collective -> correction of its time: pairs of a message size in bytes, and the ratio of the measured time to the
    time that follows from latency and bandwidth."""

    def rates(self, collective: str) -> tuple[float, float]:
        """Return latency in seconds and bandwidth in bytes a second of a collective: the measured ones, or else
        ``latency_s`` and ``bytes_per_s``."""
        return self.measured.get(collective, (self.latency_s, self.bytes_per_s))

    def faster(self, factor: float) -> Link:
        """Return a link that is ``factor`` times as fast: latencies are divided by ``factor``, bandwidths
        multiplied."""
        measured = {name: (latency_s / factor, rate * factor) for name, (latency_s, rate) in self.measured.items()}
        return Link(self.latency_s / factor, self.bytes_per_s * factor, measured, self.curves)


@dataclass(frozen=True)
class Host:
    """Host memory of a node with GPUs, as one rank can use it."""

    link_bytes_per_s: float
    """Bandwidth between host memory and a device, in one direction, in bytes a second."""
    bytes_per_s: float
    """Bandwidth of host memory for one rank, in bytes a second."""
    room: int | None
    """Bytes of host memory that the tensors of one rank may use; None if unknown."""


@dataclass(frozen=True)
class Machine:
    """Hardware of a run for estimates: identical nodes with one rank on each device."""

    device: str
    """Name of the device, for messages."""
    flops_per_s: float
    """Assumed or measured rate at which a rank computes, in FLOP/s."""
    room: int
    """Bytes of device memory that the tensors of one rank may use."""
    ranks_per_node: int
    intra_node: Link
    """Link of a rank to another rank of its node."""
    inter_node: Link
    """Link of a rank to a rank of another node, while all other ranks of its node send, too."""
    host: Host | None = None
    """Host memory of a rank; None if the devices are the CPUs themselves."""
    matmul: MatmulRates | None = None
    """Measured rates of matrix products by size; ``flops_per_s`` is then the highest of them. None if not measured."""

    def __str__(self) -> str:
        intra_node, inter_node = self.intra_node.bytes_per_s / GIGA, self.inter_node.bytes_per_s / GIGA
        return (
            f"{self.device}: {self.flops_per_s / TERA:.3g} TFLOP/s attained, {intra_node:g} GB/s inside a node and "
            f"{inter_node:.3g} between nodes for each rank"
        )


def gpus(
    name: str, peak: float | None, ranks_per_node: int, *, memory: int | None = None, host_memory: int | None = None
) -> Machine | None:
    """Return the hardware of nodes with GPUs; None if ``peak`` or the memory of a GPU is unknown.

    Args:
        name: name of the GPU, as ``torch.cuda.get_device_name()`` returns it.
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
    """Return the whole name of the GPU that ``name``, a short or whole name, means; None for a ``name`` of None.

    If several GPUs have this name, return the one whose memory is nearest to ``memory_gib``, in GiB. An unknown name
    with a ``memory_gib`` is returned unchanged, because a plan needs no other figure of the GPU.

    Raises:
        ConfigError: ``memory_gib`` is None, and the name is unknown, or means several GPUs with different memory.
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
    """Return the hardware of nodes with ``ranks_per_node`` ranks, which compute on CPUs. ``memory`` is the host memory
    of a rank in bytes, of which its tensors may use the share ``ROOM``."""
    rates = links(CPU_LINK_GB_PER_S, CPU_LINK_GB_PER_S / ranks_per_node)
    return Machine("CPU", CPU_FLOPS_PER_S, int(ROOM * memory), ranks_per_node, *rates)


def links(inside: float, between: float) -> tuple[Link, Link]:
    """Return two links of a rank, with assumed latencies: inside of a node with the bandwidth ``inside``, and between
    nodes with the bandwidth ``between``, in GB/s."""
    return Link(INTRA_NODE_LATENCY_S, inside * GIGA), Link(INTER_NODE_LATENCY_S, between * GIGA)


def with_network(machine: Machine, network: Network) -> Machine:
    """Return ``machine`` with the measured links of ``network``. A link that was not measured does not change.

    The ranks of a node share its network adapters. If the measurement had k ranks per node, and ``machine`` has n, the
    measured bandwidth between nodes is multiplied by k / n.
    """
    share = network.ranks_per_node / machine.ranks_per_node
    inside, between = (network.tiers.get(tier) for tier in TIERS)
    return replace(
        machine,
        intra_node=measured_link(inside, 1.0) if inside else machine.intra_node,
        inter_node=measured_link(between, share) if between else machine.inter_node,
    )


def measured_link(fits: Mapping[str, LinkFit], share: float) -> Link:
    """Return a link with the latencies that were measured, and the measured bandwidths times ``share``. ``fits`` maps a
    collective to its measured figures, and is not empty.

    A collective that was not measured gets the values of a send, or else of the first measured collective.
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
        """Return the seconds of ``collective`` (one of ``launch.runs.measured.COLLECTIVES``) with ``size`` bytes. The
        method for each collective says which tensor has this size."""
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
        """Return the seconds of an all-reduce of a few numbers, which is its latency.

        If all-reduces were measured, the latency is the measured one. Otherwise it is computed for a tree of ranks,
        which NCCL uses in large groups.
        """
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
    """Return size and link of the group of ranks along the neighboring mesh axes ``names``.

    Ranks are numbered along the innermost axis first, and fill the nodes in this order. Each rank has its own share of
    its node's network adapters: a ring with several ranks on a node uses the shares of all these ranks.
    """
    sizes = dims.sizes
    inner = list(sizes)[list(sizes).index(names[-1]) + 1 :]
    stride, ranks = math.prod(sizes[name] for name in inner), math.prod(sizes[name] for name in names)
    return strided_group(machine, ranks, stride)


def strided_group(machine: Machine, ranks: int, stride: int) -> Group:
    """Return size and link of a group of ``ranks`` ranks. The numbers of consecutive ranks of the group differ by
    ``stride``."""
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
