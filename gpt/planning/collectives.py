"""Cost of collectives: the alpha-beta (latency and bandwidth) model of a ring.

An all-gather or reduce-scatter of n bytes over a ring of k ranks takes k - 1 steps of n / k bytes, an all-reduce twice
as many (Thakur, Rabenseifner and Gropp, 2005, sections 4.1 and 4.5; NCCL's performance notes count so). Trees have less
latency in large groups; they are modeled for a few numbers only.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpt.planning.hardware import Link, Machine
from gpt.topology.dims import ParallelDims
from launch.runs.measured import COLLECTIVES, LinkFit


@dataclass(frozen=True)
class Group:
    """A process group, and the slowest link of its ring."""

    ranks: int
    link: Link

    def seconds(self, collective: str, size: float) -> float:
        """Return the seconds of one of ``launch.runs.measured.COLLECTIVES`` with ``size`` bytes."""
        fit = LinkFit(*self.link.rates(collective), curve=self.link.curves.get(collective, ()))
        return fit.seconds(collective, self.ranks, size)

    def all_gather(self, size: float) -> float:
        """Return the seconds of an all-gather of ``size`` bytes in all."""
        return self.seconds("all_gather", size)

    def reduce_scatter(self, size: float) -> float:
        """Return the seconds of a reduce-scatter of ``size`` bytes in all."""
        return self.seconds("reduce_scatter", size)

    def all_reduce(self, size: float) -> float:
        """Return the seconds of an all-reduce of ``size`` bytes."""
        return self.seconds("all_reduce", size)

    def agree(self) -> float:
        """Return the seconds of an all-reduce of a few numbers: over a tree, as NCCL does it, or as it was measured."""
        if "all_reduce" in self.link.measured:
            return self.all_reduce(0.0)
        return 2 * math.ceil(math.log2(self.ranks)) * self.link.latency_s

    def all_to_all(self, size: float) -> float:
        """Return the seconds of an all-to-all in which each rank has ``size`` bytes."""
        return self.seconds("all_to_all", size)

    def send(self, size: float) -> float:
        """Return the seconds of sending ``size`` bytes to a neighbor."""
        return self.seconds("send", size)


def group(dims: ParallelDims, machine: Machine, names: Sequence[str]) -> Group:
    """Return the group of ranks along neighboring mesh axes.

    Ranks are numbered along the innermost axis first, and placed on nodes in this order. Each rank has its own share of
    its node's network adapters: a ring with several ranks on a node uses the shares of all of them.
    """
    sizes = dims.sizes
    inner = list(sizes)[list(sizes).index(names[-1]) + 1 :]
    stride, ranks = math.prod(sizes[name] for name in inner), math.prod(sizes[name] for name in names)
    return strided_group(machine, ranks, stride)


def strided_group(machine: Machine, ranks: int, stride: int) -> Group:
    """Return the group of every ``stride``-th rank."""
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
