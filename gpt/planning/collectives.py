"""What it takes a group of ranks to exchange bytes: latency and bandwidth of a ring (alpha and beta).

A ring of k ranks hands n bytes round in k - 1 steps of n / k each, twice for a sum that all get (Thakur, Rabenseifner
and Gropp, 2005, sections 4.1 and 4.5; NCCL's own performance notes count so). Trees have less latency in large groups;
they are not modelled.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from gpt.planning.hardware import Link, Machine
from gpt.topology.dims import ParallelDims


@dataclass(frozen=True)
class Group:
    """Ranks that exchange something, and the slowest link of their ring."""

    ranks: int
    link: Link

    def all_gather(self, size: float) -> float:
        """Seconds until each has all of ``size`` bytes, of which each had a part; or the sum of such a part."""
        return (self.ranks - 1) * (self.link.latency_s + size / self.ranks / self.link.bytes_per_s)

    def all_reduce(self, size: float) -> float:
        """Seconds until each has the sum of ``size`` bytes."""
        return 2 * self.all_gather(size)

    def all_to_all(self, size: float) -> float:
        """Seconds until each has sent every other its part of ``size`` bytes."""
        return self.all_gather(size)

    def send(self, size: float) -> float:
        """Seconds until ``size`` bytes are with a neighbour."""
        return self.link.latency_s + size / self.link.bytes_per_s


def group(dims: ParallelDims, machine: Machine, names: Sequence[str]) -> Group:
    """The ranks along neighbouring dimensions of the grid.

    Ranks are numbered along the innermost dimension first, and nodes take them in this order. Ranks of one node share
    its network adapters: a ring that has several of them there sends through as many.
    """
    sizes = dims.sizes
    inner = list(sizes)[list(sizes).index(names[-1]) + 1 :]
    stride, ranks = math.prod(sizes[name] for name in inner), math.prod(sizes[name] for name in names)
    return strided_group(machine, ranks, stride)


def strided_group(machine: Machine, ranks: int, stride: int) -> Group:
    """A group of every ``stride``-th rank."""
    if ranks * stride <= machine.ranks_per_node:
        return Group(ranks, machine.intra_node)
    together = max(1, min(ranks, machine.ranks_per_node // stride))
    rate = together * machine.inter_node.bytes_per_s
    if together > 1:
        rate = min(rate, machine.intra_node.bytes_per_s)
    return Group(ranks, Link(machine.inter_node.latency_s, rate))
