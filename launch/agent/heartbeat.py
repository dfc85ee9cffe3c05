"""Heartbeats between the agents of a job: each tells its state twice a second, and reads that of the leader.

For some seconds after ranks have failed they exchange quickly: each message on the way to the next start is awaited.

Owns the store that the head node holds, the thread that talks to it, and the measure of silence. The main thread of an
agent never waits for the network. Must not know what is made of silence, nor what the messages mean.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from launch.agent.clock import RunningClock
from launch.agent.node import Node, address_towards
from launch.agent.signed_store import SignedStore, new_token, open_store
from launch.runs.folder import RunFolder
from launch.runs.unwritten import has_written

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
    """Seconds between two exchanges of an agent in a hurry, where there are ``count`` of them."""
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
        """Tell whether an answer is urgent."""

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
        """Key of a message that was passed over, since no agent of this job wrote it; empty where there was none."""
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
    """Read what the head node has written so far; None where there is nothing yet."""
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
