"""Members of the agent group: who takes part in a start of the ranks, and who is lost, sick or missing.

Owns the records that the agents agree on and their text for people. Must not know how they agree. Torch-free.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from launch.agent.health import Fault, describe
from launch.runs.folder import RunFolder


@dataclass(frozen=True)
class RendezvousRound:
    """One start of the ranks: its participants and its store, the same for every agent."""

    number: int
    attempt: int
    members: tuple[int, ...]
    """Indices of the nodes that take part; a node's place among them is its place among the ranks."""
    address: str
    port: int
    """Port of the ranks' store: a fresh one on the head node for each round."""

    def place(self, index: int) -> int:
        """Return the place of a node among the members."""
        return self.members.index(index)

    def ranks(self, index: int, on_node: int) -> range:
        """Return the ranks of a node, each node having ``on_node``."""
        return range(self.place(index) * on_node, (self.place(index) + 1) * on_node)


@dataclass(frozen=True)
class LostNode:
    """A node of which nothing is heard any more."""

    index: int
    host: str
    why: str


@dataclass(frozen=True)
class SickNode:
    """A node that does not take part in a start, with what was found on it."""

    index: int
    host: str
    faults: tuple[Fault, ...]


class NodesMissingError(RuntimeError):
    """There are not enough nodes left for a round."""


class SickNodesError(RuntimeError):
    """All nodes that are left are here, and too few of them are healthy, or the head node, which decides, is not."""

    def __init__(self, sick: tuple[SickNode, ...]) -> None:
        super().__init__("; ".join(f"{one.host}: {describe(one.faults)}" for one in sick))
        self.sick = sick


class HeadNodeLostError(RuntimeError):
    """The head node, which decides, does not answer; the message says since when."""


def record_lost_nodes(folder: RunFolder, attempt: int | None, lost: Iterable[LostNode]) -> None:
    """Write into the event log that nodes are lost, by name."""
    for one in lost:
        folder.record_event("node_lost", attempt=attempt, node=one.index, host=one.host, cause=one.why)


def record_sick_nodes(folder: RunFolder, attempt: int | None, sick: Iterable[SickNode]) -> None:
    """Write into the event log that nodes are sick, by name."""
    for one in sick:
        folder.record_event("node_sick", attempt=attempt, node=one.index, host=one.host, cause=describe(one.faults))


def lost_text(lost: Iterable[LostNode]) -> str:
    """The lost nodes, for people."""
    return "; ".join(f"node {one.host} is lost: {one.why}" for one in lost)
