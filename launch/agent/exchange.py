"""Messages between the agents of a job: a signed store, heartbeats, and agreement on the step of a stop or save."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
import torch.distributed as dist
from msgspec.structs import replace

from launch.agent.health import Fault
from launch.agent.node import (
    Node,
    RendezvousRound,
    RunningClock,
    Term,
    address_towards,
    claim_term,
    newest_term,
    presence_file,
)
from launch.agent.policy import RunFailedError
from launch.runs.folder import RunFolder
from launch.runs.process import HeartbeatFile, Request

# Torch's store for the agents of a job: open on one address, and only signed messages count.


BACKLOG = 4096
"""Maximum number of connections that wait to be accepted. All agents, or ranks, of a large job connect together."""


def derive(token: str, purpose: str) -> str:
    """Derive a name of 32 hexadecimal digits for ``purpose`` from the job's token.

    Only this job can compute the name, and the name does not reveal the token.
    """
    return hmac.new(token.encode(), purpose.encode(), hashlib.sha256).hexdigest()[:32]


def open_tcp_store(address: str, timeout: timedelta) -> dist.TCPStore:
    """Return a new store of torch that listens on a free port of ``address`` only. Torch's default is all addresses.

    ``timeout`` is the longest wait of each operation of the store.
    """
    server = socket.create_server((address, 0), backlog=BACKLOG)
    port = server.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=server.detach()
    )


def free_port(address: str) -> int:
    """Return a port of ``address`` that no process uses now."""
    with socket.create_server((address, 0)) as server:
        return int(server.getsockname()[1])


class SignedStore:
    """Store of signed messages between agents. Each key has one writer.

    Args:
        store: torch's store that contains the messages.
        token: secret of the job.
        name: purpose of these messages. A message that was signed for another purpose or key is ignored.
    """

    def __init__(self, store: dist.Store, token: str, name: str) -> None:
        self._store = dist.PrefixStore(derive(token, f"keys of {name}"), store)
        self._secret = derive(token, f"messages of {name}").encode()
        self.foreign = ""
        """Key of a value that was ignored because no agent of this job has signed it; empty if there was none."""

    def set(self, key: str, message: str) -> None:
        """Sign ``message`` and write it under ``key``."""
        self._store.set(key, self._sign(key, message.encode()) + message)

    def read(self, keys: Sequence[str]) -> list[str | None]:
        """Return the messages of ``keys``, in order; None for a key without a message of this job. Does not wait."""
        if len(keys) > 1 and self._store.check(list(keys)):
            values = self._store.multi_get(list(keys))
        else:
            # No agent has written some of many keys yet, or a stranger has deleted them: ``multi_get`` would wait. This
            # operation returns the value at once. It writes an empty value only if no message arrives meanwhile.
            values = [self._store.compare_set(key, "", "") for key in keys]
        return [self._verify(key, value) for key, value in zip(keys, values, strict=True)]

    def _sign(self, key: str, message: bytes) -> str:
        return hmac.new(self._secret, key.encode() + b"\0" + message, hashlib.sha256).hexdigest()

    def _verify(self, key: str, value: bytes) -> str | None:
        if not value:
            return None
        signature, message = value[:64], value[64:]
        if hmac.compare_digest(signature, self._sign(key, message).encode()):
            return message.decode()
        self.foreign = key
        return None


# The way in which the agents of a job find the store: an endpoint file in the run folder, which the head node writes.


@dataclass(frozen=True)
class RendezvousEndpoint:
    """Connection of this node to the store of the agents, during one term of a head node."""

    store: dist.TCPStore
    address: str
    """Address of this node, as the other nodes reach it."""
    term: Term


def open_endpoint(folder: RunFolder, node: Node, timeout_s: float, answer_s: float) -> RendezvousEndpoint:
    """Open the agents' store on the first node, or connect another node to the store. Returns the connection.

    The first node is the first head node. It takes a free port, and writes address and port into the file of the first
    term. Other nodes wait for this file, and use the file of the newest term. The files also contain the job's token,
    so only the user of the job can read them.

    Args:
        folder: folder of the run.
        node: this node.
        timeout_s: longest wait in seconds until the first term's file is written.
        answer_s: longest wait in seconds for an answer of the store.

    Raises:
        TimeoutError: the first node did not write the file in time.
        dist.DistError: the store did not answer in time.
    """
    if node.index == 0:
        address = node.own_address()
        store = open_tcp_store(address, timedelta(seconds=answer_s))
        first = Term(node.index, address, store.port, secrets.token_hex(32))
        claim_term(folder, node.job, first)  # A requeued job has another name.
        return RendezvousEndpoint(store, address, first)
    deadline = time.monotonic() + timeout_s
    while (term := newest_term(folder, node.job)) is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the head node of this job did not open its store in {timeout_s:g} s")
        time.sleep(exchange_interval_s(node.count))  # All agents look into one folder of a shared filesystem.
    return connect(term, answer_s)


def connect(term: Term, answer_s: float) -> RendezvousEndpoint:
    """Connect to the store of ``term``. Raises dist.DistError if the store does not answer in ``answer_s`` seconds."""
    timeout = timedelta(seconds=answer_s)
    store = dist.TCPStore(term.address, term.port, is_master=False, wait_for_workers=False, timeout=timeout)
    return RendezvousEndpoint(store, address_towards(term.address), term)


FIRST_S, EACH_S = 0.2, 0.1
"""Node i claims the next term ``FIRST_S + i * EACH_S`` seconds after the loss of the head node."""
ALONE_S = 2.0
"""Additional wait in seconds before a node claims the next term, unless more than half of the nodes have lost the head
node.

Without this majority, the waiting node may be the one that is cut off. The head node can then begin a term without the
waiting node during the wait.
"""
VOTERS = 16
"""Largest number of nodes that ``is_majority`` counts."""


def is_majority(folder: RunFolder, node: Node, term: Term) -> bool:
    """Return whether more than half of the nodes have lost contact with the head node of ``term``.

    ``node`` is this node, which has lost the contact. Nodes that ``term`` names as lost do not count. Of the other
    nodes, only the first ``VOTERS`` count, because the first nodes are the first that may claim the next term.
    """
    lost = dict(term.lost)
    voters = [index for index in range(node.count) if index not in lost][:VOTERS]
    others = (index for index in voters if index not in (node.index, term.head))
    present = sum(presence_file(folder, node.job, term.head, index).exists() for index in others)
    return 2 * (1 + present) > len(voters)


def next_endpoint(folder: RunFolder, node: Node, gone: Term, why: str, answer_s: float) -> RendezvousEndpoint:
    """Return the connection to the next head node, after the loss of the head node.

    Claims the next term for this node, or connects to the node that has claimed the term first.

    Args:
        folder: folder of the run.
        node: this node.
        gone: term of the lost head node.
        why: reason for which the head node counts as lost.
        answer_s: longest wait in seconds for an answer of a store.

    Raises:
        RunFailedError: this node itself counts as lost, or no node continues the run.
    """
    address, began = node.own_address(), time.monotonic()
    first = began + FIRST_S + EACH_S * node.index
    may_claim = node.index < node.count  # The node of a spare job is not in the job that would continue the run.
    store = open_tcp_store(address, timedelta(seconds=answer_s))
    while True:
        newest = newest_term(folder, node.job) or gone
        if node.index in dict(newest.lost):
            raise RunFailedError(f"{node.host} was cut off, and the run continues without it: {why}")
        if newest.head != gone.head:
            try:
                return connect(newest, answer_s)
            except dist.DistError as error:  # The next head node is lost, too.
                gone, why = newest, str(error).partition("\n")[0]
        elif not may_claim and time.monotonic() - began > 2 * answer_s + ALONE_S:
            raise RunFailedError(f"no node of {node.job} continues the run: {why}")
        elif may_claim and time.monotonic() >= first + (0.0 if is_majority(folder, node, newest) else ALONE_S):
            # The head node may have begun this term itself, when it lost other nodes.
            lost = (*newest.lost, (gone.head, why))
            own = Term(node.index, address, store.port, gone.token, newest.number + 1, lost)
            if claim_term(folder, node.job, own):
                return RendezvousEndpoint(store, address, own)
        time.sleep(exchange_interval_s(node.count))


# Messages. Every agent writes its message several times a second. The head node reads all messages; the other agents
# read the message of the head node.


class RequestState(msgspec.Struct, frozen=True):
    """State of one kind of request (stop or save) on one node, which the agent of the node reports to the head node.

    Between two steps, each rank polls: the rank looks into its heartbeat file for a request.
    """

    wants: int = 0
    """Largest value that the ranks of the node, and its agent, have requested; 0 if none.

    For a stop, the value is a signal number, or ``FROM_FILE`` for the file STOP. For a save, the value is the number of
    saves that were requested so far.
    """
    held: int = 0
    """Number of the ticket for which all ranks of the node wait at their next poll; 0 if none.

    A ticket is a decision of the head node (``Ticket``).
    """
    most: int = 0
    """Largest number of polls that a rank of the node has made."""
    least: int = 0
    """Smallest number of polls that a rank of the node has made; 0 until each rank of the node has polled.

    The head node begins a further save only if this number has reached ``Ticket.at`` of the previous save on every
    node. Then every rank has obeyed the previous save.
    """


class Ticket(msgspec.Struct, frozen=True):
    """Decision of the head node on one request (stop or save): all ranks obey the request at the same poll.

    A poll is one look of a rank for requests, between two steps.
    """

    number: int = 0
    """Number of the ticket: 1 for the first, then 1 more than ``at`` of the previous ticket; 0: there is no ticket."""
    at: int = 0
    """Number of the poll at which all ranks obey. Smaller than ``number`` until the agents have agreed on the poll."""
    cause: int = 0
    """Request that the ticket grants, as a number: the largest ``RequestState.wants`` of all nodes.

    For a stop, it is a signal number, or ``FROM_FILE``. For a save, it is the number of saves requested so far.
    """


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """State of one agent, which it sends to the other agents.

    Only the head node sets ``all_left``, ``tickets``, ``begun``, ``round``, ``again``, ``over`` and ``failure``.
    """

    beat: int = -1
    """Number of this message, from 0; -1 if none was sent."""
    host: str = ""
    switches: tuple[str, ...] = ()
    """Names of the switches above this node (``Node.switches``)."""
    ready: int = -1
    """Number of the round for which this node is ready; -1 if none."""
    faults: tuple[Fault, ...] = ()
    """Faults that the health check of this node found before the agent set ``ready``; empty for a healthy node."""
    failed: int = -1
    """Newest round in which ranks of this node have failed; -1 if none."""
    left: int = -1
    """Newest round in which all ranks of this node have left without a failure; -1 if none."""
    all_left: int = -1
    """Newest round in which the ranks of all members have left without a failure. -1 if none, and on all but the head
    node.
    """
    bye: bool = False
    """True if the agent is leaving the group of agents."""
    agreement: int = -1
    """Number of the round whose ranks are meant in ``reports`` and ``tickets``; -1 if there are no such ranks."""
    reports: tuple[RequestState, ...] = ()
    """One report for each kind of ``Request``, in the order of this enumeration."""
    tickets: tuple[Ticket, ...] = ()
    """Newest ticket for each kind of ``Request``, in the same order; empty on all but the head node."""
    begun: int = -1
    """Number of ``round``; -1 if none has begun."""
    round: RendezvousRound | None = None
    """Newest round that has begun; None if none has.

    A round names all its members and is long. So the store has it under a key of its own, which each agent reads once.
    """
    again: int = -1
    """Newest round after which the ranks start again in a next round; -1 if none."""
    over: bool = False
    """True if there are no further rounds."""
    failure: str | None = None
    """Reason for which the run has failed; None if it has not failed."""


NO_MESSAGE = Message()
DECODER = msgspec.json.Decoder(Message)
ROUND_KEY = "round"


# Heartbeats: the thread that exchanges the messages.


INTERVAL_S = 0.1
LONGEST_INTERVAL_S = 0.5
EXCHANGES_PER_S = 800
"""Number of exchanges that 80 to 400 agents together make in a second.

In one exchange, one agent reads the messages of other agents and writes its own. With fewer agents, each agent
exchanges every ``INTERVAL_S`` seconds; with more agents, every ``LONGEST_INTERVAL_S`` seconds.
"""
QUICK_S = 0.02
"""Seconds between two exchanges while ranks wait for an agreement on the step of a stop or save."""
QUICK_EXCHANGES_PER_S = 8000
"""Number of exchanges that 160 to 4,000 agents together make in a second while ranks wait for an agreement."""
QUICK_READS_PER_S = 16_000
"""Number of messages that the head node of 320 to 8,000 agents reads in a second while ranks wait for an agreement."""
POLL_S = 0.1
"""Seconds between two checks of an agent that waits for its ranks, or for messages of other agents."""


def exchange_interval_s(count: int) -> float:
    """Return the seconds between two exchanges of one agent. ``count`` is the number of agents.

    The more agents there are, the less often each agent exchanges.
    """
    return min(LONGEST_INTERVAL_S, max(INTERVAL_S, count / EXCHANGES_PER_S))


def heartbeat_key(index: int) -> str:
    """Return the store's key of the message of node ``index``."""
    return f"heartbeat/{index}"


class Heartbeat:
    """Thread that sends this agent's message several times a second, and keeps the newest messages of other agents.

    Args:
        index: index of this node in the job.
        count: number of agents.
        store: store of the messages.
        head: index of the head node.
    """

    def __init__(self, index: int, count: int, store: SignedStore, head: int = 0) -> None:
        self._index = index
        self._interval_s = exchange_interval_s(count)
        self._is_head = index == head
        quick = QUICK_READS_PER_S if self._is_head else QUICK_EXCHANGES_PER_S
        self._quick_s = min(max(QUICK_S, count / quick), self._interval_s)
        self._others = [i for i in range(count) if i != head] if self._is_head else [head]
        self.store = store
        self._own = Message()
        self.agreement: Agreement | None = None
        """Agreement of the newest round, which is one start of the ranks; None before the first round.

        The heartbeat thread adds the fields of the agreement to every message.
        """
        self.received: dict[int, Message] = {}
        """Index of a node -> its newest message.

        The head node has the messages of all other nodes. The other nodes have only those of the head node.
        """
        self._when: dict[int, float] = {}
        self._clock = RunningClock()
        self.lost_connection: str | None = None
        """Error of the store's client if the head node's store is gone; else None."""
        self._wake = threading.Event()
        self._sent = threading.Condition()
        self._rounds = 0
        self._over = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def publish(self, **fields: Any) -> None:
        """Set fields of this agent's ``Message`` from now on, and exchange messages at once."""
        self._own = replace(self._own, **fields)
        self._wake.set()

    def of(self, index: int) -> Message:
        """Return the newest message of node ``index``; an empty message if none has arrived."""
        return self._own if index == self._index else self.received.get(index, NO_MESSAGE)

    def flush(self, timeout_s: float) -> bool:
        """Wait at most ``timeout_s`` seconds until all published fields are sent. Returns whether all fields were sent.

        False means for example that the store is gone.
        """
        with self._sent:
            goal = self._rounds + 2  # The exchange that runs now may have begun before the last ``publish``.
            self._wake.set()
            self._sent.wait_for(lambda: self._rounds >= goal or self.lost_connection is not None, timeout_s)
            return self._rounds >= goal

    def silence(self, index: int) -> float | None:
        """Return the seconds since the last message of node ``index``; None if no message has arrived.

        Time in which this process was stopped does not count.
        """
        when = self._when.get(index)
        return None if when is None else self._clock.now() - when

    def close(self) -> None:
        """End the heartbeat thread."""
        self._over = True
        self._wake.set()
        self._thread.join(timeout=2 * LONGEST_INTERVAL_S)
        self._clock.close()

    def exchange(self) -> float:
        """Receive the messages of the other agents, and send this agent's message.

        During an agreement, thousands of agents wait for one store. So an agent, unless it is the head node's, leaves
        out three messages: it sends nothing until its ranks wait, reads nothing when it then reports this, and sends
        nothing when it receives the step.

        Returns the seconds until the next exchange.
        """
        agreement = self.agreement
        waited, reports = (agreement.is_under_way, agreement.has_to_report) if agreement else (False, False)
        if self._is_head or not reports:
            self._receive()
        fields = agreement.turn(self.received) if agreement else {}
        needless = agreement is not None and (agreement.has_to_report or (waited and not agreement.is_under_way))
        if self._is_head or not needless:
            self._send(fields)
        if agreement is None or not agreement.is_under_way:
            return self._interval_s
        return min(self._quick_s, BARRIER_S) if agreement.has_to_report else self._quick_s

    def _run(self) -> None:
        try:
            while not self._over:
                self._wake.wait(self.exchange())
                self._wake.clear()
        except RuntimeError as error:  # dist.DistError is a RuntimeError.
            with self._sent:
                self.lost_connection = str(error).partition("\n")[0]
                self._sent.notify_all()

    def _receive(self) -> None:
        keys = [heartbeat_key(index) for index in self._others]
        for index, text in zip(self._others, self.store.read(keys), strict=True):
            message, last = DECODER.decode(text) if text else NO_MESSAGE, self.of(index)
            # A stranger can also put an earlier message back, whose signature is valid.
            if message.beat > last.beat:
                if message.begun >= 0:
                    message = replace(message, round=self._newest_round(message.begun, last.round))
                self._when[index] = self._clock.now()
                self.received[index] = message

    def _newest_round(self, begun: int, known: RendezvousRound | None) -> RendezvousRound | None:
        """Return the newest round that has begun.

        Args:
            begun: number of this round, by a message of the head node.
            known: round that this agent has read last; None if none. This round is returned if it is not older than
                ``begun``, or if the store does not have the round ``begun`` yet.
        """
        if known is None or known.number < begun:
            (text,) = self.store.read([ROUND_KEY])
            return msgspec.json.decode(text, type=RendezvousRound) if text else known
        return known

    def _send(self, fields: Mapping[str, Any]) -> None:
        own = replace(self._own, beat=self._rounds, **fields)
        if own.round is not None:  # A stranger may have overwritten it.
            self.store.set(ROUND_KEY, msgspec.json.encode(own.round).decode())
            own = replace(own, begun=own.round.number, round=None)
        self.store.set(heartbeat_key(self._index), msgspec.json.encode(own).decode())
        with self._sent:
            self._rounds += 1
            self._sent.notify_all()


# The agents' part in a request that all ranks obey at the same step: a stop, or a save.


BARRIER_S = 0.05
"""Seconds for which an agent waits after it has set ``hold`` in the heartbeat files of its ranks.

``hold`` makes a rank wait at its next poll. After these seconds every rank sees ``hold``, since a write is visible to
other processors after microseconds. The agent then reads how often each rank has polled.
"""


class Agreement:
    """One agent's part in the agreement on the step at which all ranks stop or save, for one round.

    ``launch.runs.process`` describes the protocol.

    Args:
        number: number of the round; messages about another round are ignored.
        index: index of this node in the job.
        members: indices of the nodes that take part in the round; the first is the head node.
        ranks: heartbeat files of this node's ranks.
    """

    def __init__(self, number: int, index: int, members: Sequence[int], ranks: Sequence[HeartbeatFile]) -> None:
        self._number = number
        self._index = index
        self._members = members
        self._is_member = frozenset(members).__contains__  # A tuple would be searched for each of thousands of agents.
        self._ranks = ranks
        self._stop_signal = 0
        self._held = dict.fromkeys(Request, (0, 0.0))
        """Kind of request -> number of the ticket for which this node's ranks wait, and the time when they began to
        wait.
        """
        self._tickets = dict.fromkeys(Request, Ticket())
        self.is_under_way = False
        """True while ranks may be waiting, so that the agents should exchange quickly."""
        self.has_to_report = False
        """True while this node has not yet reported that its ranks wait. The report is due after ``BARRIER_S``."""

    def request_stop(self, number: int) -> None:
        """Request a stop on behalf of this node's agent, because of signal ``number``."""
        self._stop_signal = self._stop_signal or number

    def turn(self, received: Mapping[int, Message]) -> dict[str, Any]:
        """Advance the agreements on stops and saves as far as the received messages allow.

        Returns the values of ``agreement``, ``reports`` and ``tickets`` for the next message of this agent.

        Args:
            received: index of a node -> newest message of its agent, as in ``Heartbeat.received``.
        """
        about_this = {i: m for i, m in received.items() if m.agreement == self._number and self._is_member(i)}
        reports = {request: self._report(request) for request in Request}
        head = self._members[0]
        if self._index == head:
            for request in Request:
                others = [message.reports[request] for message in about_this.values()]
                self._tickets[request] = self._decide(request, [reports[request], *others])
        elif head in about_this:
            self._tickets = dict(zip(Request, about_this[head].tickets, strict=True))
        self._obey(reports)
        tickets = tuple(self._tickets.values()) if self._index == head else ()
        return {"agreement": self._number, "reports": tuple(reports.values()), "tickets": tickets}

    def _report(self, request: Request) -> RequestState:
        ticket, since = self._held[request]
        # Set ``hold`` before the counts are read.
        held = ticket if ticket and time.monotonic() >= since + BARRIER_S else 0
        calls = [file.calls(request) for file in self._ranks]
        return RequestState(self._wants(request), held, max(calls, default=0), min(calls, default=0))

    def _wants(self, request: Request) -> int:
        own = self._stop_signal if request is Request.stop else 0
        return max([own, *(file.wants(request) for file in self._ranks)])

    def _decide(self, request: Request, reports: Sequence[RequestState]) -> Ticket:
        """Return the new ticket for ``request``, or the present one if nothing follows from ``reports``.

        Only the head node calls this method. ``reports`` has the newest report of each node that has sent one.
        """
        ticket, all_there = self._tickets[request], len(reports) == len(self._members)
        if ticket.number > ticket.at:
            # Ranks wait for a silent node only as long as their own limit allows.
            if all_there and all(report.held >= ticket.number for report in reports):
                return replace(ticket, at=max(ticket.number, 1 + max(report.most for report in reports)))
            return ticket
        # Nothing follows a stop. A new save may begin after every rank has obeyed the previous save.
        had_last = request is Request.save and all_there and min(report.least for report in reports) >= ticket.at
        wants = max(report.wants for report in reports)
        if wants > ticket.cause and (ticket.at == 0 or had_last):
            return Ticket(ticket.at + 1, ticket.at, wants)
        return ticket

    def _obey(self, reports: Mapping[Request, RequestState]) -> None:
        """Write the tickets (``Ticket``) into the heartbeat files of this node's ranks, so that the ranks obey them.

        Also sets ``is_under_way`` and ``has_to_report``. ``reports`` maps each kind of request to the newest
        report of this node.
        """
        for request, ticket in self._tickets.items():
            is_new = ticket.number > self._held[request][0]
            for file in self._ranks:
                if is_new:
                    file.set_hold(request, ticket.number)
                if ticket.at:
                    file.set_at(request, ticket.at, ticket.cause)
            if is_new:
                self._held[request] = (ticket.number, time.monotonic())
        stop = self._tickets[Request.stop]
        waits_for_first = stop.at == 0 and self._wants(Request.stop) > 0  # Only a stop is urgent: a save may be late.
        waiting = {request for request, ticket in self._tickets.items() if ticket.number > ticket.at}
        self.is_under_way = waits_for_first or bool(waiting)
        self.has_to_report = any(reports[request].held < self._held[request][0] for request in waiting)
