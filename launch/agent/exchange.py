"""Messages between the agents of a job: a signed store, heartbeats, and agreement on the step of a stop or save."""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from launch.agent.node import Node, RunningClock, address_towards
from launch.runs.files import has_written
from launch.runs.folder import RunFolder
from launch.runs.heartbeat import HeartbeatFile, Request

# Torch's store as the agents of a job use it: open on one address, and believed only where a message is signed.


BACKLOG = 4096
"""Connections that may wait to be accepted: all agents, or ranks, of a large job come at the same time."""


def new_token() -> str:
    """Draw the token of a job."""
    return secrets.token_hex(32)


def derive(token: str, purpose: str) -> str:
    """Derive a name from the token that nobody else can tell, and that does not give the token away."""
    return hmac.new(token.encode(), purpose.encode(), hashlib.sha256).hexdigest()[:32]


def open_store(address: str, timeout: timedelta) -> dist.TCPStore:
    """Open a store on a free port of ``address`` alone: torch's own choice is every address of the machine."""
    server = socket.create_server((address, 0), backlog=BACKLOG)
    port = server.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=server.detach()
    )


class SignedStore:
    """Messages of agents in a store, each under a key with one writer.

    Args:
        store: where they lie.
        token: of the job.
        name: of this use of the store; a message is worth nothing under another name or key.
    """

    def __init__(self, store: dist.Store, token: str, name: str) -> None:
        self._store = dist.PrefixStore(derive(token, f"keys of {name}"), store)
        self._secret = derive(token, f"messages of {name}").encode()
        self.foreign = ""
        """Key of a value that was passed over, as it is not signed; empty if there was none."""

    def set(self, key: str, message: str) -> None:
        """Leave a message."""
        self._store.set(key, self._sign(key, message.encode()) + message)

    def read(self, keys: Sequence[str]) -> list[str | None]:
        """Read the messages of ``keys``; None for those that nobody of this job has left.

        Does not wait: where one of the keys is missing, all are None.
        """
        if not keys or not self._store.check(list(keys)):
            return [None] * len(keys)
        return [self._verify(key, value) for key, value in zip(keys, self._store.multi_get(list(keys)), strict=True)]

    def open_keys(self, keys: Sequence[str]) -> None:
        """Make keys under which nothing is said yet, where they are missing: a stranger can delete them, too."""
        if self._store.check(list(keys)):
            return
        for key in keys:
            self._store.compare_set(key, "", "")  # in one: what comes meanwhile is not overwritten

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


# Heartbeats between the agents of a job: each tells its state twice a second, and reads that of the leader.


INTERVAL_S = 0.5
QUICK_S = 0.02
"""Between two exchanges while ranks wait for an agreement."""
HURRY_S = 10.0
"""Time after a failure in which the agents exchange quickly; they meet again within it, or something else is broken."""
HURRYING = 16
"""Agents that may exchange at full speed then; more of them do so the more slowly, as all ask the head node."""
POLL_S = 0.2
"""Between two looks at what the thread has heard, where nobody is in a hurry."""
LEADER_STATE = "leader_state"
Message = dict[str, Any]


def quick_s(count: int) -> float:
    """Seconds between two exchanges of an agent in a hurry, if there are ``count`` of them."""
    return min(INTERVAL_S, QUICK_S * max(1.0, count / HURRYING))


def heartbeat_key(index: int) -> str:
    """Key under which the agent of node ``index`` writes."""
    return f"heartbeat/{index}"


@dataclass(frozen=True)
class RendezvousEndpoint:
    """The store in which the agents of a job find each other."""

    store: dist.TCPStore
    address: str
    """Address of this node, as the others reach it."""
    token: str
    """Secret of this start of the job, by which its agents know each other's messages."""


def open_endpoint(folder: RunFolder, node: Node, timeout_s: float, answer_s: float) -> RendezvousEndpoint:
    """Open the store on the head node and find it from the others, through the endpoint file in the run folder.

    The head node takes a free port of its address and tells it, so no port is fixed and none can be taken meanwhile.
    The file also holds the job's token, and only its owner can read it.

    Args:
        timeout_s: how long to wait for the head node's endpoint file.
        answer_s: how long an answer of the store may take.

    Raises:
        TimeoutError: the head node did not show up in time.
    """
    timeout = timedelta(seconds=answer_s)
    if not node.is_head:
        told = wait_for_endpoint(folder, node, timeout_s, lambda endpoint: "token" in endpoint)
        store = dist.TCPStore(told["address"], told["port"], is_master=False, wait_for_workers=False, timeout=timeout)
        return RendezvousEndpoint(store, address_towards(told["address"]), told["token"])
    address, token = node.own_address(), new_token()
    store = open_store(address, timeout)
    deadline = time.monotonic() + timeout_s
    while not write_endpoint(folder, node, address=address, port=store.port, token=token):
        if time.monotonic() > deadline:
            raise TimeoutError(f"no room for {endpoint_file(folder, node)} in {timeout_s:.0f} s")
        time.sleep(POLL_S)
    return RendezvousEndpoint(store, address, token)


class Conversation(Protocol):
    """A source of further messages for the heartbeat thread, worked out from what it heard."""

    @property
    def is_under_way(self) -> bool:
        """Return whether an answer is urgent."""

    def turn(self, heard: Mapping[int, Message]) -> tuple[Message, Message]:
        """Work out what to say and, on the head node, what to add to the leader state."""


class Heartbeat:
    """One agent's heartbeat, and those it hears. Everything that is read here is what the thread heard last."""

    def __init__(self, index: int, count: int, store: SignedStore) -> None:
        self._index = index
        self._quick_s = quick_s(count)
        self._hurries_until = 0.0
        self._others = range(1, count) if index == 0 else range(1)
        self._store = store
        self._mine: Message = {}
        self._leader_state: Message = {}
        self.conversation: Conversation | None = None
        """Asked before every exchange, in the heartbeat thread."""
        self.heard: dict[int, Message] = {}
        """Last messages of the others: on the head node of every agent, elsewhere the leader state as 0."""
        self._when: dict[int, float] = {}
        self._clock = RunningClock()
        self.hung_up = False
        """True where the head node's store is gone."""
        self.hung_up_because = ""
        """Message of the store's client then."""
        self._wake = threading.Event()
        self._sent = threading.Condition()
        self._rounds = 0
        self._over = False
        self._thread = threading.Thread(target=self._talk, name="heartbeat", daemon=True)
        self._thread.start()

    def say(self, **fields: Any) -> None:
        """Say this from now on, as the agent of this node."""
        self._mine = {**self._mine, **fields}
        self._wake.set()

    def publish(self, **fields: Any) -> None:
        """On the head node: make this part of the leader state from now on."""
        self._leader_state = {**self._leader_state, **fields}
        self._wake.set()

    def wake(self) -> None:
        """Have the next exchange now."""
        self._wake.set()

    def hurry(self) -> None:
        """Exchange quickly for ``HURRY_S`` from now on: ranks wait for what the agents tell each other."""
        self._hurries_until = time.monotonic() + HURRY_S
        self._wake.set()

    @property
    def poll_s(self) -> float:
        """Seconds after which a look at what was heard may find something new."""
        return min(POLL_S, self._interval_s)

    @property
    def _interval_s(self) -> float:
        return self._quick_s if time.monotonic() < self._hurries_until else INTERVAL_S

    def flush(self, timeout_s: float) -> bool:
        """Wait until what was said before is through. False where the store is gone."""
        with self._sent:
            goal = self._rounds + 2  # the round under way may have begun before
            self._wake.set()
            return self._sent.wait_for(lambda: self._rounds >= goal or self.hung_up, timeout_s) and not self.hung_up

    def silence(self, index: int) -> float | None:
        """Seconds since node ``index`` was last heard, without those in which this process was stopped; None: never."""
        when = self._when.get(index)
        return None if when is None else self._clock.now() - when

    def close(self) -> None:
        """Say no more."""
        self._over = True
        self._wake.set()
        self._thread.join(timeout=2 * INTERVAL_S)
        self._clock.close()

    def _talk(self) -> None:
        try:
            while not self._over:
                conversation = self.conversation
                message, leader_state = conversation.turn(self.heard) if conversation is not None else ({}, {})
                self._exchange(message, leader_state)
                with self._sent:
                    self._rounds += 1
                    self._sent.notify_all()
                is_urgent = conversation is not None and conversation.is_under_way
                self._wake.wait(QUICK_S if is_urgent else self._interval_s)
                self._wake.clear()
        except RuntimeError as error:  # dist.DistError is one
            self.hung_up_because = str(error).partition("\n")[0]
            self.hung_up = True
            with self._sent:
                self._sent.notify_all()

    @property
    def foreign(self) -> str:
        """Key of a message that was passed over, since no agent of this job wrote it; empty if there was none."""
        return self._store.foreign

    def _exchange(self, message: Message, leader_state: Message) -> None:
        store = self._store
        store.set(heartbeat_key(self._index), json.dumps({**self._mine, **message, "beat": self._rounds}))
        keys = [LEADER_STATE]
        if self._index == 0:
            store.set(LEADER_STATE, json.dumps({**self._leader_state, **leader_state, "beat": self._rounds}))
            keys = [heartbeat_key(index) for index in self._others]
            store.open_keys(keys)
        for index, answer in zip(self._others, store.read(keys), strict=True):
            said = json.loads(answer) if answer else {}
            last = self.heard.get(index, {}).get("beat", -1)
            if said and said["beat"] > last:  # a stranger can put an earlier one back, which is signed, too
                self._when[index] = self._clock.now()
                self.heard[index] = said


def endpoint_file(folder: RunFolder, node: Node) -> Path:
    """Path of the endpoint file of this start of the job; a requeued one has another."""
    return folder.path / ".launch" / f"{node.job}.json"


def write_endpoint(folder: RunFolder, node: Node, **fields: Any) -> bool:
    """On the head node: add to the endpoint file; False where a full filesystem does not take it.

    It holds the job's token, so nobody else may read it.
    """
    return has_written(endpoint_file(folder, node), {**(read_endpoint(folder, node) or {}), **fields}, mode=0o600)


def read_endpoint(folder: RunFolder, node: Node) -> dict[str, Any] | None:
    """Read what the head node has written so far; None if there is nothing yet."""
    path = endpoint_file(folder, node)
    try:
        told = json.loads(path.read_text())
    except FileNotFoundError:
        # Listing the folder makes an NFS client look again instead of answering from its cache.
        list(path.parent.glob("*"))
        return None
    assert isinstance(told, dict)
    return told


def wait_for_endpoint(
    folder: RunFolder, node: Node, timeout_s: float, wanted: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Read the head node's endpoint file as soon as it holds what is ``wanted``.

    Raises:
        TimeoutError: it did not come.
    """
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        told = read_endpoint(folder, node)
        if told is not None and wanted(told):
            return told
        time.sleep(POLL_S)
    raise TimeoutError(f"the head node of this job did not write {endpoint_file(folder, node)} in {timeout_s:g} s")


# The agents' half of a request that all ranks obey at the same step: a stop, or a save.


SETTLE_S = 0.05
"""From setting ``hold`` to reading the counts. A processor shows a write to the others in microseconds."""
ANSWER_S = 5.0
"""After so long the head node decides without the nodes that have not answered; the run is about to lose them."""
RequestMessage = Mapping[str, Any]


@dataclass(frozen=True)
class Report:
    """One node's part in the agreement on one kind of request."""

    wants: int = 0
    """Largest wish: a signal, or how many saves were requested."""
    held: int = 0
    """Ticket for which all ranks of the node wait, if they ask."""
    most: int = 0
    """Largest count of questions."""
    least: int = 0
    """Smallest count, 0 where a rank has yet to start: it would miss an earlier save if the next one were agreed on."""


@dataclass
class Decision:
    """Decision of the head node about one kind of request."""

    ticket: int = 0
    at: int = 0
    cause: int = 0
    taken: int = 0
    """Wish that the last ticket was drawn for."""
    since: float = 0.0


class Agreement:
    """One agent's part, for one start of the ranks.

    Args:
        start: number of the start; messages about another one are passed over.
        index: this node, among those of the job; 0 is the head node.
        members: the nodes that take part in the start.
        ranks: the files of this node's ranks.
    """

    def __init__(self, start: int, index: int, members: Sequence[int], ranks: Sequence[HeartbeatFile]) -> None:
        self._start = start
        self._index = index
        self._members = members
        self._ranks = ranks
        self._stop_cause = 0
        self._held = dict.fromkeys(Request, (0, 0.0))
        self._decisions = {request: Decision() for request in Request}
        self._is_under_way = False

    @property
    def is_under_way(self) -> bool:
        """Return whether ranks may be waiting, so that the agents should talk quickly."""
        return self._is_under_way

    def want_stop(self, number: int) -> None:
        """Wish for a stop because of signal ``number``, as the agent of this node."""
        self._stop_cause = self._stop_cause or number

    def turn(self, heard: Mapping[int, RequestMessage]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Do what can be done now. Returns what to say, and on the head node what to add to the leader state.

        Args:
            heard: what other agents said last, by node; elsewhere than on the head node its leader state, as 0.
        """
        own = {request: self._report(request) for request in Request}
        report = {"start": self._start, **{request.name: asdict(own[request]) for request in Request}}
        leader_state: dict[str, Any] = {}
        if self._index == 0:
            others = {index: self._message_of(heard, index) for index in self._members if index != 0}
            for request in Request:
                reports = [Report(**said[request.name]) for said in others.values() if said]
                self._decide(request, [own[request], *reports])
            leader_state = {"start": self._start}
            leader_state |= {r.name: [d.ticket, d.at, d.cause] for r, d in self._decisions.items()}
        self._obey(leader_state or self._message_of(heard, 0))
        return {"requests": report}, {"requests": leader_state}

    def _message_of(self, heard: Mapping[int, RequestMessage], index: int) -> RequestMessage:
        message: RequestMessage = heard.get(index, {}).get("requests") or {}
        return message if message.get("start") == self._start else {}

    def _report(self, request: Request) -> Report:
        wishes = [file.wants(request) for file in self._ranks]
        if request is Request.stop:
            wishes.append(self._stop_cause)
        ticket, since = self._held[request]
        held = ticket if ticket and time.monotonic() >= since + SETTLE_S else 0  # before the counts are read
        calls = [file.calls(request) for file in self._ranks]
        return Report(max(wishes, default=0), held, max(calls, default=0), min(calls, default=0))

    def _decide(self, request: Request, reports: Sequence[Report]) -> None:
        """On the head node: draw a ticket where somebody wants one, and settle the one that is out."""
        decided, now = self._decisions[request], time.monotonic()
        wish = max(report.wants for report in reports)
        if decided.ticket > decided.at:
            settled = [report for report in reports if report.held >= decided.ticket]
            if len(settled) == len(self._members) or (settled and now > decided.since + ANSWER_S):
                decided.at = max(decided.ticket, 1 + max(report.most for report in settled))
        elif wish > decided.taken and (decided.at == 0 or self._may_follow(request, decided, reports)):
            decided.ticket, decided.taken, decided.cause, decided.since = decided.at + 1, wish, wish, now

    def _may_follow(self, request: Request, decided: Decision, reports: Sequence[Report]) -> bool:
        """Return whether another request may come: never after a stop; after a save once every rank has had it."""
        all_there = len(reports) == len(self._members)
        return request is Request.save and all_there and min(r.least for r in reports) >= decided.at

    def _obey(self, leader_state: RequestMessage) -> None:
        """Hand the head node's decisions to the ranks of this node."""
        under_way = False
        for request in Request:
            ticket, at, cause = leader_state.get(request.name, (0, 0, 0))
            if ticket > self._held[request][0]:
                for file in self._ranks:
                    file.set_hold(request, ticket)
                self._held[request] = (ticket, time.monotonic())
            if at:
                for file in self._ranks:
                    file.set_at(request, at, cause)
            under_way = under_way or ticket > at or self._is_wanted(request, at)
        self._is_under_way = under_way

    def _is_wanted(self, request: Request, at: int) -> bool:
        """Return whether this node waits for the first ticket of a stop; a save has time."""
        wishes = [self._stop_cause, *(file.wants(request) for file in self._ranks)]
        return request is Request.stop and at == 0 and max(wishes) > 0
