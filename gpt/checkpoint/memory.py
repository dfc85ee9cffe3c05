"""Checkpoints in the memory of the nodes: each rank's part goes to the store of its node and of the next node.

The nodes form a ring, so that any one of them may be lost. A checkpoint that fails is given up, since the next one is
due soon. A load takes the newest checkpoint of which every part is whole, on any nodes. A damaged copy of a part is
replaced by the other copy; if no copy is left, the checkpoint is loaded from disk.
"""

from __future__ import annotations

import hashlib
import io
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
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from gpt.checkpoint import messages
from gpt.checkpoint.folders import LoadedCheckpoint
from gpt.checkpoint.formats import Format, decode_index, encode_index, read_tensors
from gpt.checkpoint.messages import CheckpointError, explain, run_on_all_ranks, run_on_first_rank
from gpt.checkpoint.part import RankPart, Report, StagedPart, rank_file, write_content, write_items
from gpt.checkpoint.saving import InFlight, Vote, stage_state
from gpt.checkpoint.writer import Result, Writer, WriterState
from launch.errors import ConfigError
from launch.worker.memory import CHUNK, Place, StoreClient, Upload, own_store

ABOUT = "about.json"
"""File of rank 0's part: the caller's ``meta`` and the index of the tensors.

The stores themselves know the rest of a manifest: step, number of ranks, files and checksums.
"""
REPORT = "report.json"
"""File of each part: the positions of its tensors in its files."""
BUFFER = 1 << 20


# Saving: the jobs of a rank's writer, and the agreement of the ranks.


@dataclass(frozen=True)
class SavedInMemory:
    """A checkpoint in memory that all ranks have agreed on."""

    step: int
    write_s: float
    """Seconds from the start of the save to the agreement; training waited only while the state was copied."""


@dataclass(frozen=True)
class FailedInMemory:
    """A checkpoint in memory that failed, and is not tried again."""

    step: int
    cause: str


@dataclass(frozen=True)
class Send:
    """Job of a rank's writer: send the part of this rank to the memory stores ``places``."""

    save: str
    step: int
    world_size: int
    meta: dict[str, Any]
    part: RankPart | StagedPart
    places: tuple[Place, ...]
    secret: str

    def run(self, state: WriterState) -> None:
        """Send all files of the part to each memory store."""
        part = state.whole(self.part)
        where = {"save": self.save, "rank": part.rank}
        with ExitStack() as stack:
            stores = [stack.enter_context(StoreClient(place, self.secret)) for place in self.places]
            for store in stores:
                store.ask("begin", **where, step=self.step, world_size=self.world_size)
            files = SentFiles(stores, self.save, part.rank)
            items = [] if part.plan is None else write_items(part, part.plan, Path(), files, syncs=False)
            contents = part.files | {REPORT: Report({}, items).encode()}
            if part.plan is not None and part.plan.metadata is not None:
                about = {"meta": self.meta, "index": encode_index(part.plan.metadata)}
                contents[ABOUT] = json.dumps(about).encode()
            for name, content in contents.items():
                with files.create_stream(name, "wb") as stream:
                    write_content(content, stream)
            for store in stores:
                store.ask("finish", **where)


@dataclass(frozen=True)
class Confirm:
    """Job of a rank's writer: report to the stores that all ranks have sent their parts. No rank waits for this."""

    save: str
    places: tuple[Place, ...]
    secret: str

    def run(self, state: WriterState) -> None:
        """Report to each of ``places``, before the next part is sent there."""
        for place in self.places:
            with StoreClient(place, self.secret) as store:
                store.ask("commit", save=self.save)


class SentFiles(FileSystem):
    """torch's file system for writing, which sends each file to all given memory stores."""

    def __init__(self, stores: Sequence[StoreClient], save: str, rank: int) -> None:
        self._to = (stores, save, rank)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Yield a stream to write a file; the stores have the whole file when the context ends."""
        upload = Upload(*self._to, Path(path).as_posix())
        yield upload
        upload.end()


@dataclass(frozen=True)
class _Sending:
    """The save in flight, as one rank knows it."""

    save: str
    step: int
    started: float


class MemorySaves:
    """The checkpoints in memory of one run. All methods but ``vote`` are collective.

    Args:
        group: gloo group of all ranks, for the control messages.
        fmt: format of the state; its parts are tensors by name.
        writer: sends this rank's part; it must have no other job when a save starts.
        own: memory store of this rank's node.
        secret: secret that all memory stores require.
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
        """True while a save is in flight; the same on all ranks."""
        return self._pending is not None

    def start(self, step: int, state: Any, rank_state: dict[str, Any], meta: dict[str, Any]) -> None:
        """Copy this rank's state, and begin to send the copy to the stores. The writer must have no other job.

        Raises:
            CheckpointError: the state cannot be planned; on every rank.
        """
        started = time.monotonic()
        part, failure = None, None
        try:
            part = stage_state(step, state, rank_state, self.format, self.writer, self.group)
        except Exception as error:  # the other ranks learn of it by the votes
            failure = explain(error)
        self._begin(step, meta, started, part, failure)

    def start_again(self, saved: InFlight) -> None:
        """Begin to send the state of a save that is on disk now, from the copy that was made for the disk."""
        self._begin(saved.step, saved.meta, time.monotonic(), saved.part, None)

    def vote(self) -> Vote:
        """Return this rank's vote on the save in flight, without waiting. Its phase is negative, on disk positive."""
        if self._pending is None:
            return Vote(0)
        if self._result is None:
            self._result = self.writer.poll()
        if self._result is None:
            return Vote(-self._phases)
        has_failed = self._result.failure is not None
        return Vote(-self._phases, done=int(not has_failed), failed=int(has_failed))

    def count(self, phase: int, done: float, failed: float) -> SavedInMemory | FailedInMemory | None:
        """Evaluate the summed votes of all ranks. Every rank must call this with the same sums in the same order.

        Args:
            phase: ``Vote.phase`` of the votes.
            done: sum of ``Vote.done`` over all ranks.
            failed: sum of ``Vote.failed`` over all ranks.

        Returns:
            The outcome of the save, once, when all ranks have voted; None before.
        """
        if self._pending is None or phase != -self._phases or done + failed < dist.get_world_size(self.group):
            return None
        return self._end(bool(failed))

    def finish(self) -> SavedInMemory | FailedInMemory | None:
        """Wait for the save in flight on all ranks, and return its outcome; None if no save is in flight."""
        if self._pending is None:
            return None
        if self._result is None:
            self._result = self.writer.wait()
        return self._end(any(messages.all_gather(self._result.failure is not None, self.group)))

    def _begin(
        self, step: int, meta: dict[str, Any], started: float, part: RankPart | StagedPart | None, failure: str | None
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
        return FailedInMemory(pending.step, messages.first_failure(result.failure, self.group).splitlines()[0])

    # Loading.

    def load(self, state: Any, at_least: int) -> tuple[LoadedCheckpoint | None, str | None]:
        """Fill ``state`` from the newest checkpoint in memory, and free the memory of all others.

        Returns:
            The checkpoint and None; or None and the reason why memory has none of step ``at_least`` or later.
        """
        try:
            held = self._find()
            if held.step < at_least:
                return None, f"memory holds step {held.step}, and the disk step {at_least}"
            loaded = self._read(held, self._verify(held), state)
        except (_NotInMemoryError, CheckpointError) as error:
            return None, str(error).splitlines()[0]
        self.keep(held.save)
        return loaded, None

    def keep(self, save: str) -> None:
        """Have the stores delete all saves except the one with the id ``save``; all, if none has that id."""

        def keep() -> None:
            with StoreClient(self.own, self.secret) as store:
                store.ask("keep", save=save)

        run_on_all_ranks(keep, self.group)

    def discard_after(self, step: int) -> None:
        """Have the stores delete all saves if the newest is of a step after ``step``, to which the run goes back."""
        try:
            held = self._find()
        except _NotInMemoryError:
            return
        self.keep(held.save if held.step <= step else "")

    def _find(self) -> _HeldSave:
        """Return the newest checkpoint of which the stores have every part.

        Raises:
            _NotInMemoryError: there is no such checkpoint; on every rank.
        """

        def list_own() -> list[dict[str, Any]]:
            if self.of_ranks.index(self.own) != dist.get_rank(self.group):
                return []  # the first rank of a node reads its store
            with StoreClient(self.own, self.secret) as store:
                return list(store.ask("inventory")["saves"])

        found: dict[str, _HeldSave] = {}
        for place, saves in zip(self.of_ranks, run_on_all_ranks(list_own, self.group), strict=True):
            for entry in saves:
                held = found.setdefault(entry["save"], _HeldSave(entry["save"], entry["step"], entry["world_size"], {}))
                for rank, files in entry["parts"]:
                    held.parts.setdefault(rank, {})[place] = files
        why = "the memory of these nodes holds none"
        for held in sorted(found.values(), key=lambda held: -held.step):
            missing = held.missing()
            if not missing:
                return held
            why = f"of step {held.step} the parts of ranks {', '.join(map(str, missing))} are on no node"
        raise _NotInMemoryError(why)

    def _verify(self, held: _HeldSave) -> list[str]:
        """Verify the copies to read, and remove damaged copies from ``held``; return a line for each damaged copy.

        Raises:
            _NotInMemoryError: some part has no sound copy; on every rank.
        """
        ranks, own = dist.get_world_size(self.group), dist.get_rank(self.group)
        verified: set[tuple[int, Place]] = set()
        damaged: list[str] = []
        while to_verify := sorted(held.sources(self.of_ranks).items() - verified):

            def verify(copies: Sequence[tuple[int, Place]] = to_verify) -> list[tuple[int, str]]:
                found = ((rank, self._damage(held, rank, place)) for rank, place in copies if rank % ranks == own)
                return [(rank, damage) for rank, damage in found if damage]

            found = dict(pair for of_rank in run_on_all_ranks(verify, self.group) for pair in of_rank)
            for rank, place in to_verify:
                verified.add((rank, place))
                if rank in found:
                    damaged.append(f"the part of rank {rank} at {place}: {found[rank]}")
                    del held.parts[rank][place]
            if held.missing():
                raise _NotInMemoryError(f"step {held.step} is damaged: {'; '.join(damaged)}")
        return damaged

    def _damage(self, held: _HeldSave, rank: int, place: Place) -> str:
        try:
            with StoreClient(place, self.secret) as store:
                wrong = store.ask("verify", save=held.save, rank=rank)["damaged"]
        except OSError as error:
            return str(error)
        return f"{', '.join(wrong)} with a wrong checksum" if wrong else ""

    def _read(self, held: _HeldSave, damaged: list[str], state: Any) -> LoadedCheckpoint:
        """Fill ``state`` from verified copies of the parts.

        Raises:
            CheckpointError: the parts do not fit ``state``, or a store has died in the meantime; on every rank.
        """
        rank_states: list[dict[str, Any]] = []
        with HeldFiles(held, held.sources(self.of_ranks), self.secret) as stores:

            def describe() -> list[str]:
                return [stores.read(rank, REPORT).decode() for rank in range(held.world_size)] + [
                    stores.read(0, ABOUT).decode()
                ]

            *reports, text = run_on_first_rank(describe, self.group)
            about = json.loads(text)
            metadata = decode_index(about["index"])
            items = [item for report in reports for item in Report.decode(report.encode()).items]
            metadata.storage_data = {item.index: item.storage_data for item in items}

            def read() -> None:
                read_tensors(HeldReader(metadata, stores), state, self.group)
                if held.world_size == dist.get_world_size(self.group):
                    rank = dist.get_rank(self.group)
                    content = io.BytesIO(stores.read(rank, rank_file(rank)))
                    rank_states.append(torch.load(content, map_location="cpu", weights_only=True))

            run_on_all_ranks(read, self.group)
        own = rank_states[0] if rank_states else None
        damage = f"other copies were taken than {'; '.join(damaged)}" if damaged else None
        return LoadedCheckpoint(
            held.step, about["meta"], held.world_size, own, is_from_memory=True, memory_damage=damage
        )


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
    """Connect to the memory stores of all nodes; None if some node has no store. Collective.

    Raises:
        ConfigError: no node has a memory store, or this rank's writer is not a process of its own.
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


# Reading the parts that the stores hold.


class _NotInMemoryError(Exception):
    """There is no checkpoint in memory that could be loaded; the message says why."""


@dataclass
class _HeldSave:
    """A checkpoint in memory: the copies of its parts that the present nodes hold."""

    save: str
    step: int
    world_size: int
    parts: dict[int, dict[Place, dict[str, int]]]
    """Rank -> store that has its part -> name of a file -> size in bytes."""

    def missing(self) -> list[int]:
        """List the ranks whose part is on no node."""
        return [rank for rank in range(self.world_size) if not self.parts.get(rank)]

    def sources(self, of_ranks: Sequence[Place]) -> dict[int, Place]:
        """Return the store to read each rank's part from: that of the rank's present node, if it has the part."""
        near = dict(enumerate(of_ranks))
        return {rank: near[rank] if near.get(rank) in held else min(held, key=str) for rank, held in self.parts.items()}


class HeldFiles(FileSystem):
    """torch's file system over the parts of a checkpoint in memory, each read from its verified copy.

    Args:
        held: the checkpoint.
        sources: store of each rank's part.
        secret: secret that the stores require.
    """

    def __init__(self, held: _HeldSave, sources: dict[int, Place], secret: str) -> None:
        self._save, self._sources, self._secret = held.save, sources, secret
        self._sizes = {rank: held.parts[rank][place] for rank, place in sources.items()}
        self._ranks = {name: rank for rank, sizes in self._sizes.items() for name in sizes}
        self._clients: dict[Place, StoreClient] = {}
        self._stack = ExitStack()

    def __enter__(self) -> HeldFiles:
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()

    def read(self, rank: int, name: str) -> bytes:
        """Return the whole content of one file of a rank's part."""
        return self._store(rank).read_all(self._save, rank, name, self._sizes[rank][name])

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Yield a stream that reads a file from its store."""
        name = Path(path).as_posix()
        rank = self._ranks[name]
        stream = _HeldStream(self._store(rank), (self._save, rank, name), self._sizes[rank][name])
        yield io.BufferedReader(stream, BUFFER)

    def _store(self, rank: int) -> StoreClient:
        place = self._sources[rank]
        if place not in self._clients:
            self._clients[place] = self._stack.enter_context(StoreClient(place, self._secret))
        return self._clients[place]


class _HeldStream(io.RawIOBase):
    """A file in a memory store, whose bytes are fetched when they are read."""

    def __init__(self, store: StoreClient, file: tuple[str, int, str], size: int) -> None:
        self._store, self._file, self._size = store, file, size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence] + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(view.nbytes, self._size - self._at, CHUNK))
        if wanted:
            view[:wanted] = self._store.read(*self._file, self._at, wanted)
            self._at += wanted
        return wanted


class HeldReader(FileSystemReader):
    """torch's reader, which gets the index as an argument instead of reading it from a file."""

    def __init__(self, metadata: Metadata, files: FileSystem) -> None:
        super().__init__(".")
        self.fs = files
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata
