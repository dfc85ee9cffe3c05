"""Rendezvous of the node agents: who takes part in each start of the ranks, and which nodes are lost.

The head node decides, and the other agents follow its state. If there are more nodes than a run needs, the rest are
spares and wait.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import timedelta

import torch.distributed as dist

from launch.agent.exchange import (
    POLL_S,
    Heartbeat,
    Message,
    SignedStore,
    open_endpoint,
    open_store,
    read_endpoint,
    write_endpoint,
)
from launch.agent.health import (
    Fault,
    HeadNodeLostError,
    HealthCheck,
    LostNode,
    NodesMissingError,
    RendezvousRound,
    SickNode,
    SickNodesError,
    describe,
    record_sick_nodes,
)
from launch.agent.node import Node
from launch.agent.policy import NO_HOSTS, GroupSizes, RunFailedError, reasons, record_size
from launch.config import Config
from launch.runs.folder import RunFolder, writing_into

SPARE_WAIT_S = 10.0
"""Time that a round with enough nodes waits for the rest of them."""
SPARE_CHECK_S = 60.0
"""Between two health checks of a spare that waits for its turn."""
ROOM_POLL_S = 2.0
ASK_SLURM_S = 30.0
"""Between two questions to Slurm whether nodes that have not come are the job's still."""
ECHO_S = 8.0
"""After a lost connection that no rank explains, a node that says nothing for so long is taken for the reason."""
GOODBYE_S = 10.0
OVER_S = 5.0


class AgentGroup:
    """The agents of one job, as the agent of this node sees them."""

    def __init__(
        self, folder: RunFolder, node: Node, config: Config, heartbeat: Heartbeat, address: str, token: str
    ) -> None:
        self._folder = folder
        self._node = node
        self._sizes = GroupSizes.of_run(folder, config) if node.is_head else GroupSizes(config.nodes)
        self._limits = config.resilience
        self.heartbeat = heartbeat
        self.address = address
        """Address of this node, as the others reach it."""
        self.token = token
        """Secret that the agents of this job share."""
        self._foreign = ""
        self._failed = -1
        self._health = HealthCheck(folder.path, config.resilience.health_check, config.cluster.gpus_per_node)
        self._sick: dict[int, SickNode] = {}
        self.lost: dict[int, LostNode] = {}
        """On the head node: those that take no more part in this job."""
        self._stores: list[dist.TCPStore] = []  # stay open for ranks that are still leaving the round before

    # On every node.

    def next_round(self, number: int, avoid: Mapping[str, str] = NO_HOSTS) -> RendezvousRound | None:
        """Agree on round ``number``, counted from 0. None where the run is over.

        Every node checks its health first, and tells what it found; a sick one takes no part.

        Args:
            avoid: hosts that take part only if there are no others, each with the reason (head node).

        Raises:
            NodesMissingError: on the head node, where too few nodes are left.
            SickNodesError: on the head node, where too few of them are healthy.
            HeadNodeLostError: elsewhere, where the head node is lost.
            RunFailedError: elsewhere, where the run has failed and does not start again.
        """
        faults = self._examine(number)
        self._tell_health(number, faults)
        if self._node.is_head:
            self._note_sick(0, faults)
        return self._open_round(number, avoid) if self._node.is_head else self._await_round(number)

    def _examine(self, number: int) -> list[Fault]:
        """Check this node; a full filesystem that all share is waited for, as runs go on when there is room again."""
        deadline = time.monotonic() + (self._limits.rendezvous_timeout_s / 2 if number else 0)
        faults = self._health.examine()
        while faults and all(fault.is_shared for fault in faults) and time.monotonic() < deadline:
            time.sleep(ROOM_POLL_S)
            faults = self._health.examine()
        return faults

    def _tell_health(self, number: int, faults: Sequence[Fault]) -> None:
        """Come to round ``number``, as healthy or as sick."""
        self.heartbeat.say(host=self._node.host, ready=number, faults=[asdict(fault) for fault in faults])

    def tell_failed(self, number: int) -> None:
        """Let the others end their ranks of round ``number`` now rather than at the timeout of a collective."""
        self._note_failure(number)
        self.heartbeat.say(failed=number)
        if self._node.is_head:
            self.heartbeat.publish(failed=number)

    def has_failed(self, number: int) -> bool:
        """Return whether ranks of another node have failed in round ``number``."""
        self._record_foreign()
        failed = any(self._said(index, "failed") >= number for index in list(self.heartbeat.heard))
        if failed:
            self._note_failure(number)
            if self._node.is_head:
                self.heartbeat.publish(failed=number)
        return failed

    def _note_failure(self, number: int) -> None:
        """Hurry from the first word of a failure in round ``number`` on: what follows is waited for on every node."""
        if number > self._failed:
            self._failed = number
            self.heartbeat.hurry()

    def close(self) -> None:
        """Leave. The head node lets the others hear its last message before its store closes."""
        self.heartbeat.say(bye=True)
        if not self.head_is_lost():
            self.heartbeat.flush(OVER_S)
        deadline = time.monotonic() + GOODBYE_S
        if self._node.is_head:
            while time.monotonic() < deadline and any(not w.get("bye") for i, w in self._present()):
                time.sleep(POLL_S)
        self.heartbeat.close()

    def _record_foreign(self) -> None:
        """Enter into the event log, once, that somebody else writes into the agents' store."""
        if self._foreign or not self.heartbeat.foreign:
            return
        self._foreign = self.heartbeat.foreign
        cause = "a message in the agents' store that no agent of this job wrote was passed over"
        self._folder.record_event("foreign_message", host=self._node.host, key=self._foreign, cause=cause)

    # On the head node.

    def end(self, failure: str | None = None) -> None:
        """The job's work on the run is over: tell those that wait for the next round, and why if it failed."""
        write_endpoint(self._folder, self._node, over=True, failure=failure)
        self.heartbeat.publish(over=True, failure=failure)

    def find_silent(self, rdzv: RendezvousRound) -> list[LostNode]:
        """Members of a round from which nothing was heard for ``resilience.node_timeout_s``; they are lost."""
        limit = self._limits.node_timeout_s
        return [self._lose(i, self._silence_text(i)) for i in rdzv.members if i and self._silence(i) > limit]

    def find_reason(self, rdzv: RendezvousRound) -> list[LostNode]:
        """After a connection was lost: ask every other member for a heartbeat, and lose those that give none."""
        waiting = {index: self._said(index, "beat") for index in rdzv.members if index and index not in self.lost}
        limit = min(ECHO_S, self._limits.node_timeout_s)
        deadline = time.monotonic() + limit
        while waiting and time.monotonic() < deadline:
            time.sleep(self.heartbeat.poll_s)
            waiting = {i: beat for i, beat in waiting.items() if self._said(i, "beat") < beat + 2}
        asked = f"no answer in {limit:.0f} s after a connection between the ranks was lost"
        return [self._lose(index, f"{asked}, {self._silence_text(index)}") for index in waiting]

    @property
    def can_go_on(self) -> bool:
        """Return whether there are enough nodes for another round."""
        return self.next_size is not None

    @property
    def next_size(self) -> int | None:
        """Number of nodes that the next round can have, as far as they are healthy; None where too few are left."""
        return self._sizes.largest(self._node.count - len(self.lost))

    def _open_round(self, number: int, avoid: Mapping[str, str]) -> RendezvousRound:
        here = self._gather(number)
        sick = list(self._sick.values())
        order = sorted(here, key=lambda i: (i != 0, self._host(i) in avoid, i))
        members = tuple(sorted(order[: self._sizes.largest(len(here))]))
        timeout = timedelta(seconds=self._limits.rendezvous_timeout_s)
        store = open_store(self.address, timeout)
        self._stores.append(store)
        with writing_into(self._folder.path):
            attempt = self._folder.create_attempt()
        rdzv = RendezvousRound(number, attempt, members, self.address, store.port)
        self.heartbeat.publish(start=asdict(rdzv))
        if self._node.count > self._sizes.full or len(here) > len(members):
            hosts = {
                "hosts": [self._host(i) for i in members],
                "spares": [self._host(i) for i in here if i not in members],
            }
            self._folder.record_event("members", attempt=rdzv.attempt, **hosts)
        missing = {one.host: f"lost, {one.why}" for one in self.lost.values()}
        missing |= {one.host: f"sick, {describe(one.faults)}" for one in sick}
        record_size(self._folder, attempt, self._sizes, [self._host(i) for i in members], missing)
        record_sick_nodes(self._folder, attempt, sick)
        there = {self._host(index): index in members for index in here}
        for event, takes_part in (("avoided", False), ("not_avoided", True)):
            named = {host: why for host, why in avoid.items() if there.get(host) is takes_part}
            if named:
                self._folder.record_event(event, attempt=rdzv.attempt, hosts=list(named), cause=reasons(named))
        return rdzv

    def _gather(self, number: int) -> list[int]:
        """Wait for the nodes: for all that are left, a while longer than needed for spares; return the healthy ones."""
        began = asked = time.monotonic()
        while (size := self.next_size) is not None:
            ready = self._ready(number)
            absent = [i for i in range(1, self._node.count) if i not in ready and i not in self.lost]
            waited = time.monotonic() - began
            healthy = {0, *ready} - self._sick.keys()
            # Who is absent may come: with fewer nodes a round is made if there are no more.
            is_enough = len(healthy) >= (size if absent else self._sizes.least)
            if 0 in healthy and is_enough and (not absent or waited > SPARE_WAIT_S):
                return sorted(healthy)
            if not absent:
                raise SickNodesError(tuple(self._sick[index] for index in sorted(self._sick)))
            for index in absent:
                came = self.heartbeat.silence(index) is not None
                if self._silence(index) > self._limits.node_timeout_s:
                    self._lose(index, self._silence_text(index))
                elif waited > self._limits.rendezvous_timeout_s:
                    self._lose(index, f"{'not ready' if came else 'did not show up'} in {waited:.0f} s")
            if time.monotonic() - asked > ASK_SLURM_S:
                taken, asked = self._node.taken_hosts(), time.monotonic()
                for index in absent:
                    if index not in self.lost and self._host(index) in taken:
                        self._lose(index, "Slurm has taken it from the job, as one that does not answer")
            time.sleep(self.heartbeat.poll_s)
        raise NodesMissingError(f"{self._node.count - len(self.lost)} nodes left, and {self._sizes.least} are needed")

    def _ready(self, number: int) -> set[int]:
        """The other nodes that have come to this round, healthy or not; notes what those that are not have found."""
        # One that came to this round long before the others, as a spare does, may be gone by now.
        here = [(i, m) for i, m in self._present() if self._silence(i) <= self._limits.node_timeout_s]
        ready = {index: message for index, message in here if message.get("ready", -1) >= number}
        for index, message in ready.items():
            self._note_sick(index, [Fault(**fault) for fault in message.get("faults", ())])
        for index in self._sick.keys() - {0, *ready}:
            del self._sick[index]
        return set(ready)

    def _note_sick(self, index: int, faults: Sequence[Fault]) -> None:
        self._sick.pop(index, None)
        if faults:
            self._sick[index] = SickNode(index, self._host(index), tuple(faults))

    def _present(self) -> Iterator[tuple[int, Message]]:
        """The other nodes that were heard and are not lost."""
        yield from [(index, message) for index, message in list(self.heartbeat.heard.items()) if index not in self.lost]

    def _silence(self, index: int) -> float:
        return self.heartbeat.silence(index) or 0.0  # one that never came is given rendezvous_timeout_s

    def _said(self, index: int, field: str) -> int:
        return int(self.heartbeat.heard.get(index, {}).get(field, -1))

    def _host(self, index: int) -> str:
        if index == 0:
            return self._node.host
        return str(self.heartbeat.heard.get(index, {}).get("host") or self._node.host_of(index))

    def _silence_text(self, index: int) -> str:
        return f"nothing heard for {self._silence(index):.0f} s"

    def _lose(self, index: int, why: str) -> LostNode:
        self.lost[index] = LostNode(index, self._host(index), why)
        return self.lost[index]

    # On the other nodes.

    def _await_round(self, number: int) -> RendezvousRound | None:
        checked = time.monotonic()
        while True:
            if time.monotonic() - checked > SPARE_CHECK_S:  # a spare may wait for days
                self._tell_health(number, self._health.examine())
                checked = time.monotonic()
            leader_state = self.heartbeat.heard.get(0, {})
            if leader_state.get("over"):
                raise_failure(leader_state)
                return None
            told = leader_state.get("start")
            if told is not None and told["number"] >= number:
                return RendezvousRound(**{**told, "members": tuple(told["members"])})
            if self.head_is_lost():
                raise_failure(self._last_message())
                return None
            if number:
                self.has_failed(number - 1)  # a spare hurries, too: nothing else tells it that it is wanted
            time.sleep(self.heartbeat.poll_s)

    @property
    def announced_attempt(self) -> int | None:
        """Newest attempt that the head node has announced, as far as this node has heard; None for none."""
        told = self.heartbeat.heard.get(0, {}).get("start")
        return None if told is None else int(told["attempt"])

    def head_is_lost(self) -> bool:
        """Return whether the head node, which decides, has fallen silent."""
        silent = self.heartbeat.silence(0)
        return self.heartbeat.hung_up or (silent is not None and silent > self._limits.node_timeout_s)

    def _last_message(self) -> Message:
        """Return the endpoint file where it says that the head node left at the end of the run; else it is lost."""
        why = self._silence_text(0)
        if self.heartbeat.hung_up:
            silent = f", {why}" if self._silence(0) >= 1 else ""
            why = f"its connection ended ({self.heartbeat.hung_up_because}){silent}"
        deadline = time.monotonic() + OVER_S
        while time.monotonic() < deadline:
            told = read_endpoint(self._folder, self._node) or {}
            if told.get("over"):
                return told
            time.sleep(POLL_S)
        raise HeadNodeLostError(why)


def raise_failure(last_message: Message) -> None:
    """Raise RunFailedError where the head node's last message is that the run failed."""
    if last_message.get("failure"):
        raise RunFailedError(last_message["failure"])


@contextmanager
def join(folder: RunFolder, node: Node, config: Config) -> Iterator[AgentGroup]:
    """Find the other agents of this job for the length of a ``with`` block.

    Raises:
        TimeoutError: the head node did not show up in ``resilience.rendezvous_timeout_s``.
    """
    limits = config.resilience
    endpoint = open_endpoint(folder, node, limits.rendezvous_timeout_s, limits.node_timeout_s)
    heartbeat = Heartbeat(node.index, node.count, SignedStore(endpoint.store, endpoint.token, "heartbeats"))
    group = AgentGroup(folder, node, config, heartbeat, endpoint.address, endpoint.token)
    try:
        yield group
    finally:
        group.close()
