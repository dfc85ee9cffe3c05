"""Rendezvous of the agents: which nodes take part in each start of the ranks, and which nodes are lost.

The head node decides, and the other agents follow its messages. Nodes beyond the number that the run needs are spares
and wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from itertools import zip_longest

import torch.distributed as dist
from msgspec.structs import replace

from launch.agent.exchange import (
    POLL_S,
    Heartbeat,
    Message,
    RendezvousEndpoint,
    SignedStore,
    free_port,
    next_endpoint,
    open_tcp_store,
)
from launch.agent.health import RUN_FOLDER, HealthCheck
from launch.agent.node import (
    HeadNodeLostError,
    NodeProblem,
    RendezvousRound,
    RunContext,
    TooFewNodesError,
    claim_term,
    is_replaced,
    presence_file,
    problems_text,
)
from launch.agent.policy import NO_HOSTS, AlreadyDecidedError, RunFailedError, reasons, refuse_replaced
from launch.runs.events import ALL_NODES, FEWER_NODES, fewer_nodes
from launch.runs.folder import read_plan, writing_into

SPARE_WAIT_S = 10.0
"""Seconds for which a round with enough nodes waits for further nodes."""
ROOM_POLL_S = 2.0
ECHO_S = 8.0
"""Longest wait in seconds for signs of life of the other nodes, after a connection between ranks broke.

A node that is silent for so long counts as lost.
"""
FLUSH_S = 5.0
JOIN_S = 1.5
"""Seconds for which the next head node waits for nodes that have not yet noticed the loss of the previous head node."""
MINORITY_S = 2.0
"""Seconds for which a head node waits after it has lost the connection to most nodes at once.

Then the head node itself is probably cut off. While it waits, one of the other nodes can become the head node.
"""
TERM_POLL_S = 1.0


class AgentGroup:
    """Membership of this node's agent in the group of all agents of the job, for one term, until ``close``.

    ``endpoint`` is the connection to the agents' store in this term.
    """

    def __init__(self, context: RunContext, endpoint: RendezvousEndpoint) -> None:
        node, config = context.node, context.config
        self._context = context
        self._node = node
        self._head = node.head
        self._limits = config.resilience
        promised = (read_plan(context.folder).get("promised") or {}) if node.is_head and config.may_shrink else {}
        self._sizes: Sequence[int] = (config.nodes, *(promised.get("fewer_nodes") or ()))
        """Numbers of nodes with which the run can start, by its plan, largest first."""
        self.address = endpoint.address
        """Address at which the other nodes reach this node."""
        self._late = range(node.count, node.count + node.late)
        """Indices of the nodes that may join from spare jobs."""
        self._term = endpoint.term
        self._saw_term = 0.0
        self._log_size = -1
        self.token = endpoint.term.token
        """Secret that the agents of this job share."""
        # A message of another term, which a stranger could put back, has another signature.
        signed = SignedStore(endpoint.store, self.token, f"heartbeats at {endpoint.store.host}:{endpoint.store.port}")
        self.heartbeat = Heartbeat(node.index, node.count + node.late, signed, node.head)
        self._health = HealthCheck(context.folder.path, self._limits, config.cluster.gpus_per_node)
        self._has_recorded_foreign = False
        lost = endpoint.term.lost if node.is_head else ()
        self._head_before = lost[-1][0] if lost else None
        self.lost = {index: NodeProblem(index, node.host_of(index), why) for index, why in lost}
        """Lost nodes by index, in the order of the losses; empty except on the head node.

        Lost nodes take no further part in this job.
        """
        self._stores: list[dist.TCPStore] = []  # Stores stay open for ranks that are still leaving the previous round.

    # On every node.

    def next_round(self, number: int, avoid: Mapping[str, str] = NO_HOSTS) -> RendezvousRound | None:
        """Agree with the other agents on round ``number``, one start of the ranks. Returns None if the run is over.

        Every node checks its health first and publishes the result. A sick node takes no part.

        Args:
            number: number of the round, from 0.
            avoid: on the head node, hosts that take part only if too few other hosts are left, each with the reason.

        Raises:
            TooFewNodesError: on the head node, if too few healthy nodes are left.
            AlreadyDecidedError: on the head node, if another node has become the head node.
            HeadNodeLostError: on the other nodes, if the head node is lost.
            RunFailedError: on the other nodes, if the run has failed and does not start again.
        """
        # The agents wait while a shared filesystem is full: a run continues when there is space again.
        deadline = time.monotonic() + (self._limits.rendezvous_timeout_s / 2 if number else 0)
        faults = self._health.examine()
        while faults and all(fault.part == RUN_FOLDER for fault in faults) and time.monotonic() < deadline:
            time.sleep(ROOM_POLL_S)
            faults = self._health.examine()
        node = self._node
        self.heartbeat.publish(host=node.host, switches=node.switches, ready=number, faults=tuple(faults))
        if node.is_head:
            return self._open_round(number, avoid)
        head = self._await_head(lambda head: head.round is not None and head.round.number >= number)
        return None if head is None else head.round

    def report_failed(self, number: int) -> None:
        """Publish that ranks of this node failed in round ``number``.

        The other agents then end their ranks at once, before a collective times out.
        """
        self.heartbeat.publish(failed=number)

    def has_failed(self, number: int) -> bool:
        """Return whether ranks of another node failed in round ``number``.

        The head node publishes this to all nodes.
        """
        heartbeat = self.heartbeat
        if heartbeat.store.foreign and not self._has_recorded_foreign:
            self._has_recorded_foreign = True
            cause = "a message in the agents' store is not signed by an agent of this job, and was ignored"
            self._context.record("foreign_message", host=self._node.host, key=heartbeat.store.foreign, cause=cause)
        has_failed = any(message.failed >= number for message in list(heartbeat.received.values()))
        if has_failed and self._node.is_head:
            self.report_failed(number)  # The other nodes read only the messages of the head node.
        return has_failed

    def have_left(self, rdzv: RendezvousRound) -> bool:
        """Report that this node's ranks have left a round without a failure.

        Returns whether the ranks of all members of the round have left without a failure.
        """
        heartbeat, number = self.heartbeat, rdzv.number
        heartbeat.publish(left=number)
        if self._node.is_head and all(heartbeat.of(index).left >= number for index in rdzv.members):
            heartbeat.publish(all_left=number)
        return heartbeat.of(self._head).all_left >= number

    def await_end(self, rdzv: RendezvousRound) -> bool:
        """Wait until the head node has recorded the end of a round whose ranks have left without a failure.

        Returns True if the run is over, False if its ranks start again.

        Raises:
            HeadNodeLostError: the head node is lost.
            RunFailedError: the run has failed and does not start again.
        """
        return self._await_head(lambda head: head.again >= rdzv.number) is None

    def next_endpoint(self, why: str) -> RendezvousEndpoint:
        """Return the connection to the store of the next term, after the loss of the head node. ``why`` is the reason.

        Raises:
            RunFailedError: the job is not one of Slurm and cannot continue, or this node itself counts as lost.
        """
        node = self._node
        if not node.is_slurm:
            raise RunFailedError(f"the head node, {node.host_of(self._head)}, is lost: {why}")
        return next_endpoint(self._context.folder, node, self._term, why, self._limits.node_timeout_s)

    def close(self) -> None:
        """Leave the group. The head node waits ``resilience.node_timeout_s`` at most for the other agents to leave."""
        self.heartbeat.publish(bye=True)
        if not self.head_is_lost():
            self.heartbeat.flush(FLUSH_S)
        deadline = time.monotonic() + self._limits.node_timeout_s
        while self._node.is_head and time.monotonic() < deadline:
            if all(message.bye for message in self._present().values()):
                break
            time.sleep(POLL_S)
        self.heartbeat.close()

    # On the head node.

    def end(self, failure: str | None = None) -> None:
        """Tell the other agents that the run is over. ``failure`` is the reason if the run has failed, else None."""
        self.heartbeat.publish(over=True, failure=failure)

    def find_silent(self, rdzv: RendezvousRound) -> list[NodeProblem]:
        """Return the members of a round that were silent longer than ``resilience.node_timeout_s``, and mark them as
        lost.

        Raises:
            AlreadyDecidedError: another node has become the head node.
        """
        if time.monotonic() - self._saw_term > TERM_POLL_S:
            folder, size = self._context.folder, self._context.folder.events.stat().st_size
            if size != self._log_size or is_replaced(folder, self._node):  # A long event log is read only if it grows.
                refuse_replaced(self._context)
            self._log_size, self._saw_term = size, time.monotonic()
        limit = self._limits.node_timeout_s
        return self._lose({i: self._silence_text(i) for i in rdzv.members[1:] if self._silence(i) > limit})

    def find_reason(self, rdzv: RendezvousRound) -> list[NodeProblem]:
        """Find the reason why a connection between ranks of a round broke: return the lost members; empty if none is
        lost.

        The method waits until every member has sent two further messages. A member that does not do so is marked as
        lost. Then the method waits until the other members have reported how their ranks ended. Both waits together
        take ``ECHO_S`` seconds at most.

        Raises:
            AlreadyDecidedError: another node has begun a new term.
        """
        heartbeat, number = self.heartbeat, rdzv.number
        waiting = {index: heartbeat.of(index).beat for index in rdzv.members[1:] if index not in self.lost}
        limit = min(ECHO_S, self._limits.node_timeout_s)
        deadline = time.monotonic() + limit
        while waiting and time.monotonic() < deadline:
            time.sleep(POLL_S)
            waiting = {index: beat for index, beat in waiting.items() if heartbeat.of(index).beat < beat + 2}
        silent = f"no answer in {limit:.0f} s after a connection between the ranks was lost"
        lost = self._lose({index: f"{silent}, {self._silence_text(index)}" for index in waiting})
        others = [heartbeat.of(index) for index in rdzv.members[1:] if index not in self.lost]
        while any(max(one.failed, one.left) < number for one in others) and time.monotonic() < deadline:
            time.sleep(POLL_S)
            others = [heartbeat.of(index) for index in rdzv.members[1:] if index not in self.lost]
        return lost

    @property
    def next_size(self) -> int | None:
        """Return the number of nodes of the next round if all remaining nodes are healthy; None if too few are left."""
        return self._largest_size(len(self._remaining()))

    def can_grow(self, rdzv: RendezvousRound) -> bool:
        """Return whether enough nodes of spare jobs are ready for a next round with more nodes than ``rdzv``."""
        waiting = {i: self.heartbeat.of(i) for i in self._late if i not in self.lost and i not in rdzv.members}
        alive = [m for i, m in waiting.items() if self._silence(i) <= self._limits.node_timeout_s and not m.faults]
        members = len(rdzv.members)
        return (self._largest_size(members + sum(m.ready > rdzv.number for m in alive)) or 0) > members

    def awaited_jobs(self) -> list[int]:
        """Return the indices of the nodes of spare jobs that have not joined and are not lost."""
        return [i for i in self._late if i not in self.lost and self.heartbeat.silence(i) is None]

    def _remaining(self) -> list[int]:
        """Return the indices of the nodes that are not lost. Nodes of spare jobs count only if they have joined."""
        without = self.lost.keys() | set(self.awaited_jobs())
        return [i for i in range(self._late.stop) if i not in without]

    def _largest_size(self, available: int) -> int | None:
        return next((size for size in self._sizes if size <= available), None)

    def _open_round(self, number: int, avoid: Mapping[str, str]) -> RendezvousRound:
        healthy, sick = self._gather(number)
        full, folder = self._sizes[0], self._context.folder
        near = {i: distance(self.heartbeat.of(i).switches, self._node.switches) for i in healthy}
        head = self._head
        order = sorted(healthy, key=lambda i: (i != head, self._host(i) in avoid, near[i], i))
        members = tuple(sorted(order[: self._largest_size(len(healthy))], key=lambda i: (i != head, near[i], i)))
        store = open_tcp_store(self.address, timedelta(seconds=self._limits.rendezvous_timeout_s))
        self._stores.append(store)
        with writing_into(folder.path):
            attempt = folder.create_attempt()
        rdzv = RendezvousRound(number, attempt, members, self.address, store.port, free_port(self.address))
        self.heartbeat.publish(round=rdzv)
        hosts = [self._host(i) for i in members]
        spares = [self._host(i) for i in healthy if i not in members]
        if self._node.count > full or spares:
            self._context.record("members", attempt=attempt, hosts=hosts, spares=spares)
        missing = {one.host: f"lost, {one.why}" for one in self.lost.values()}
        missing |= {one.host: f"sick, {one.why}" for one in sick}
        if len(hosts) < full:
            cause = "; ".join(f"{host}: {why}" for host, why in missing.items())
            self._context.record(FEWER_NODES, attempt=attempt, nodes=len(hosts), asked=full, hosts=hosts, cause=cause)
        elif max((n for n in folder.attempts() if n < attempt), default=0) in fewer_nodes(folder.read_events()):
            self._context.record(ALL_NODES, attempt=attempt, nodes=full, hosts=hosts)
        self._context.record_problems("node_sick", attempt, sick)
        avoided = {host: why for host, why in avoid.items() if host in spares}
        if avoided:
            self._context.record("avoided", attempt=attempt, hosts=list(avoided), cause=reasons(avoided))
        return rdzv

    def _gather(self, number: int) -> tuple[list[int], list[NodeProblem]]:
        """Wait until every node that is not lost is ready, or enough nodes are ready after ``SPARE_WAIT_S`` seconds.

        Returns the indices of the healthy nodes, and the sick nodes. Nodes that do not come in time are marked as lost.

        Raises:
            TooFewNodesError: too few healthy nodes are left.
            AlreadyDecidedError: another node has become the head node.
        """
        node, folder, began = self._node, self._context.folder, time.monotonic()
        while (size := self.next_size) is not None:
            # A spare can reach this round long before the other nodes, and may be gone by now.
            present = {i: m for i, m in self._present().items() if self._silence(i) <= self._limits.node_timeout_s}
            present[self._head] = self.heartbeat.of(self._head)
            ready = {index: message for index, message in present.items() if message.ready >= number}
            sick = []
            for index, faults in sorted((i, message.faults) for i, message in ready.items() if message.faults):
                why, is_shared = "; ".join(f.found for f in faults), all(f.part == RUN_FOLDER for f in faults)
                sick.append(NodeProblem(index, self._host(index), why, is_shared))
            absent = [i for i in self._remaining() if i not in ready]
            waited = time.monotonic() - began
            healthy = sorted(ready.keys() - {one.index for one in sick})
            # An absent node may still arrive: a round with fewer nodes begins only if no node is absent.
            is_enough = len(healthy) >= (size if absent else self._sizes[-1])
            if self._head in healthy and is_enough and (not absent or waited > SPARE_WAIT_S):
                return healthy, sick
            if not absent:
                raise TooFewNodesError(problems_text("sick", sick), sick)
            gone, before = {}, self._head_before
            for index in absent:
                came = self.heartbeat.silence(index) is not None
                # A node of the former term may come late: its ranks need time to end.
                is_expected = came or before is None or presence_file(folder, node.job, before, index).exists()
                if self._silence(index) > self._limits.node_timeout_s:
                    gone[index] = self._silence_text(index)
                elif waited > (self._limits.rendezvous_timeout_s if is_expected else JOIN_S):
                    gone[index] = f"{'not ready' if came else 'did not show up'} in {waited:.0f} s"
            self._context.record_problems("node_lost", None, self._lose(gone))
            time.sleep(POLL_S)
        raise TooFewNodesError(f"{len(self._remaining())} nodes left, and {self._sizes[-1]} are needed")

    def _present(self) -> dict[int, Message]:
        """Return index -> message of each other node that has sent a message and is not lost."""
        return {i: message for i, message in list(self.heartbeat.received.items()) if i not in self.lost}

    def _silence(self, index: int) -> float:
        return self.heartbeat.silence(index) or 0.0  # For a node that never arrived, rendezvous_timeout_s applies.

    def _silence_text(self, index: int) -> str:
        return f"silent for {self._silence(index):.0f} s"

    def _host(self, index: int) -> str:
        return self.heartbeat.of(index).host or self._node.host_of(index)

    def _lose(self, why: Mapping[int, str]) -> list[NodeProblem]:
        """Mark nodes as lost, and begin a new term without these nodes. Returns the lost nodes.

        ``why`` maps the index of each lost node to the reason.

        Raises:
            AlreadyDecidedError: another node has begun the new term.
        """
        node, folder = self._node, self._context.folder
        if not why:
            return []
        others = [i for i in self._remaining() if i != node.index]
        silent = sum(i in why or self._silence(i) > self._limits.node_timeout_s / 2 for i in others)
        if node.is_slurm and silent > 1 + len(others) - silent:
            time.sleep(MINORITY_S)
        found = [NodeProblem(index, self._host(index), text) for index, text in why.items()]
        lost = (*self._term.lost, *why.items())
        term = replace(self._term, number=self._term.number + 1, lost=lost)
        if not claim_term(folder, node.job, term):
            raise AlreadyDecidedError(f"{node.host} was cut off, and another node is the head node now")
        self._term = term
        self.lost |= {one.index: one for one in found}
        return found

    # On the other nodes.

    def _await_head(self, has_come: Callable[[Message], bool]) -> Message | None:
        """Wait for a message of the head node for which ``has_come`` returns True, and return it; None if the run is
        over.

        Raises:
            HeadNodeLostError: the head node is lost.
            RunFailedError: the run has failed and does not start again.
        """
        while True:
            head = self.heartbeat.of(self._head)
            if head.failure:
                raise RunFailedError(head.failure)
            if head.over:
                return None
            if has_come(head):
                return head
            if self.head_is_lost():
                connection = self.heartbeat.lost_connection
                why = self._silence_text(self._head) if connection is None else f"its connection ended ({connection})"
                raise HeadNodeLostError(why)
            time.sleep(POLL_S)

    def head_is_lost(self) -> bool:
        """Return whether this node has lost the head node; False on the head node itself.

        The head node is lost if its store is gone, or if it was silent for more than ``resilience.node_timeout_s``.
        This node then creates its ``presence_file``, which shows the next head node that this node runs.
        """
        if self._node.is_head:
            return False
        silent = self.heartbeat.silence(self._head)
        is_lost = self.heartbeat.lost_connection is not None or (silent or 0.0) > self._limits.node_timeout_s
        if is_lost:
            presence_file(self._context.folder, self._node.job, self._head, self._node.index).touch()
        return is_lost


def distance(switches: Sequence[str], head: Sequence[str]) -> list[tuple[bool, str]]:
    """Return a key by which nodes are sorted: nodes that share the most switches with the head node come first.

    Args:
        switches: names of the switches above a node, the topmost first.
        head: names of the switches above the head node, the topmost first.
    """
    return [(switch != other, switch) for switch, other in zip_longest(switches, head, fillvalue="")]
