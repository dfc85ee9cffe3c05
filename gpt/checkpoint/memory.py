"""Checkpoints in the memory of the nodes: each rank's part goes to the store of its node and of the next node.

The nodes form a ring, so that any one of them may be lost. A checkpoint that fails is given up, since the next one is
due soon. ``memory_load`` loads checkpoints.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem

from gpt.checkpoint import messages
from gpt.checkpoint.formats import Format, encode_index
from gpt.checkpoint.messages import explain
from gpt.checkpoint.part import Part, Report, StagedPart, write_items
from gpt.checkpoint.saving import InFlight, Vote, take_over
from gpt.checkpoint.writer import Memory, Result, Writer
from launch.errors import ConfigError
from launch.worker.memory import Place, StoreClient, Upload, own_store

ABOUT = "about.json"
"""File of rank 0's part: the caller's ``meta`` and the index of the tensors.

The stores themselves know the rest of a manifest: step, number of ranks, files and checksums.
"""
REPORT = "report.json"
"""File of each part: the places of its tensors in its files."""


@dataclass(frozen=True)
class SavedInMemory:
    """A checkpoint in memory that all ranks have agreed on."""

    step: int
    write_s: float
    """Seconds from its beginning to the agreement; training waited only for the copy."""


@dataclass(frozen=True)
class FailedInMemory:
    """A checkpoint in memory that was given up."""

    step: int
    cause: str


@dataclass(frozen=True)
class Send:
    """Send the part of one rank to the stores that must hold it."""

    save: str
    step: int
    world_size: int
    meta: dict[str, Any]
    part: Part | StagedPart
    places: tuple[Place, ...]
    secret: str

    def run(self, memory: Memory) -> None:
        """Send all files of the part."""
        part = self.part
        if isinstance(part, StagedPart):
            assert memory.staged is not None
            part = part.load(memory.staged, memory.plan)
        where = {"save": self.save, "rank": part.rank}
        with ExitStack() as stack:
            stores = [stack.enter_context(StoreClient(place, self.secret)) for place in self.places]
            for store in stores:
                store.ask("begin", **where, step=self.step, world_size=self.world_size)
            files = SentFiles(stores, self.save, part.rank)
            items = [] if part.plan is None else write_items(part, part.plan, Path(), files, syncs=False)
            for name, content in part.files.items():
                files.send(name, content)
            files.send(REPORT, Report({}, items).encode())
            if part.plan is not None and part.plan.metadata is not None:
                index = encode_index(part.plan.metadata)
                files.send(ABOUT, json.dumps({"meta": self.meta, "index": index}).encode())
            for store in stores:
                store.ask("finish", **where)


@dataclass(frozen=True)
class Confirm:
    """Report to the stores that hold a part that all ranks have agreed on its save. No rank waits for this."""

    save: str
    places: tuple[Place, ...]
    secret: str

    def run(self, memory: Memory) -> None:
        """Report to each store, before the next part is sent there."""
        for place in self.places:
            with StoreClient(place, self.secret) as store:
                store.ask("commit", save=self.save)


@dataclass(frozen=True)
class _Sending:
    """The save in flight, as one rank knows it."""

    save: str
    step: int
    started: float


class SentFiles(FileSystem):
    """torch's file system, whose files are sent to memory stores."""

    def __init__(self, stores: Sequence[StoreClient], save: str, rank: int) -> None:
        self._to = (stores, save, rank)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file to write; the file is whole when it is closed."""
        upload = Upload(*self._to, Path(path).as_posix())
        yield upload
        upload.end()

    def send(self, name: str, content: Any) -> None:
        """Send one file: bytes as they are, other content as ``torch.save`` encodes it."""
        with self.create_stream(name, "wb") as stream:
            if isinstance(content, bytes):
                stream.write(content)
            else:
                torch.save(content, stream)


class MemorySaves:
    """The checkpoints in memory of one run. All methods but ``vote`` are collective.

    Args:
        group: gloo group of all ranks, for the control messages.
        fmt: format of the state; its parts are tensors by name.
        writer: sends this rank's part, while no other of its jobs is waited for.
        own: memory store of this rank's node.
        secret: of all stores.
    """

    def __init__(self, group: dist.ProcessGroup | None, fmt: Format, writer: Writer, own: Place, secret: str) -> None:
        self.group = group
        self.format = fmt
        self.writer = writer
        self.secret = secret
        self.own = own
        self.of_ranks: list[Place] = messages.all_gather(own, group)
        """Memory store of each rank's node."""
        self.places = neighbors(own, self.of_ranks)
        """Memory stores that this rank's part is written into."""
        self._token = str(messages.all_gather(secrets.token_hex(8), group)[0])
        self._phases = 0
        self._result: Result | None = None
        self._pending: _Sending | None = None

    @property
    def is_pending(self) -> bool:
        """True while a part is on its way; the same on all ranks."""
        return self._pending is not None

    def start(self, step: int, state: Any, rank_state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Take a state over, and begin to send it. The writer must have no other job.

        Raises:
            CheckpointError: the state cannot be planned; on every rank.
        """
        started = time.monotonic()
        part, failure = None, None
        try:
            part = take_over(step, state, rank_state, self.format, self.writer, self.group)
        except Exception as error:  # the other ranks learn of it by the votes
            failure = explain(error)
        self._begin(step, meta, started, part, failure)

    def start_again(self, saved: InFlight) -> None:
        """Begin to send the state that was written to the disk, from the copy that was taken for the disk."""
        self._begin(saved.step, saved.meta, time.monotonic(), saved.part, None)

    def vote(self) -> Vote:
        """Return this rank's vote on the save in flight; its phases are negative. Waits for nothing."""
        if self._pending is None:
            return Vote(0)
        if self._result is None:
            self._result = self.writer.poll()
        if self._result is None:
            return Vote(-self._phases)
        has_failed = self._result.failure is not None
        return Vote(-self._phases, done=int(not has_failed), failed=int(has_failed))

    def count(self, phase: int, done: float, failed: float) -> SavedInMemory | FailedInMemory | None:
        """Add the votes of all ranks, summed, in the same order on all of them.

        Returns:
            The outcome of the save, once; None while it is open.
        """
        if self._pending is None or phase != -self._phases or done + failed < dist.get_world_size(self.group):
            return None
        return self._end(bool(failed))

    def finish(self) -> SavedInMemory | FailedInMemory | None:
        """Wait for the save in flight; None if there is none."""
        if self._pending is None:
            return None
        if self._result is None:
            self._result = self.writer.wait()
        return self._end(any(messages.all_gather(self._result.failure is not None, self.group)))

    def _begin(
        self, step: int, meta: dict[str, Any], started: float, part: Part | StagedPart | None, failure: str | None
    ) -> None:
        self._phases += 1
        save = hashlib.sha256(f"{self._token} {self._phases}".encode()).hexdigest()[:16]
        self._pending = _Sending(save, step, started)
        self._result = Result(failure=failure) if part is None else None
        if part is not None:
            ranks = dist.get_world_size(self.group)
            self.writer.submit(Send(save, step, ranks, meta, part, self.places, self.secret))

    def _end(self, has_failed: bool) -> SavedInMemory | FailedInMemory:
        pending, result = cast(_Sending, self._pending), cast(Result, self._result)
        self._pending = self._result = None
        if not has_failed:
            self.writer.submit(Confirm(pending.save, self.places, self.secret))
            return SavedInMemory(pending.step, result.ended - pending.started)
        told = messages.all_gather(result.failure, self.group)
        rank, cause = next((rank, text) for rank, text in enumerate(told) if text is not None)
        return FailedInMemory(pending.step, f"rank {rank}: {cause.splitlines()[0]}")


def neighbors(own: Place, of_ranks: Sequence[Place]) -> tuple[Place, ...]:
    """Return the stores that hold a rank's part: its own node's, and that of the next node in the ring, if any.

    Args:
        own: store of the rank's node.
        of_ranks: store of each rank's node, by rank.
    """
    ring = list(dict.fromkeys(of_ranks))
    following = ring[(ring.index(own) + 1) % len(ring)]
    return (own,) if following == own else (own, following)


def open_memory(group: dist.ProcessGroup | None, fmt: Format, writer: Writer | None) -> MemorySaves | None:
    """Find the memory stores of all nodes; None if one of them could not be started. Collective.

    Raises:
        ConfigError: there is no launcher that keeps memory stores.
    """
    own = own_store()
    found = messages.all_gather(own is not None, group)
    if not any(found) or writer is None or not writer.is_background:
        raise ConfigError(
            "checkpoint.in_memory=true, and no memory store on this node",
            "agents of the launcher, on Linux, which keep one on each node",
            "python -m launch with the same words, or checkpoint.in_memory=false",
        )
    if not all(found):
        return None
    assert own is not None
    return MemorySaves(group, fmt, writer, *own)
