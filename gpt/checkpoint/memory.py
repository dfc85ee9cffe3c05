"""Checkpoints in the memory of the nodes: each rank's part is sent to the memory stores of its node and of the next.

A memory store is a server of the launcher's agent on each node. The nodes form a ring, so that any one of them may be
lost. A save that fails is given up, since the next one is due soon. A load takes the newest checkpoint of which the
stores have an undamaged copy of every part. If there is none, a checkpoint is loaded from disk.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from gpt.checkpoint import LoadedCheckpoint, messages
from gpt.checkpoint.formats import decode_index, encode_index, read_tensors
from gpt.checkpoint.messages import CheckpointError, run_on_all_ranks, run_on_first_rank
from gpt.checkpoint.part import RankPart, Report, StagedPart, rank_file, write_content, write_items
from gpt.checkpoint.writer import Writer, WriterState
from launch.errors import ConfigError
from launch.worker.memory import Place, StoreClient, Upload, own_store

REPORT = "report.json"
"""Name of a rank's report, which is one of the files in its part. The report says in which file, and at which position,
each tensor of the part is. The report of rank 0 also has the ``meta`` of the save and the index of all tensors. The
stores themselves record step, number of ranks, files and checksums."""


# Saving: the jobs of a rank's writer.


@dataclass(frozen=True)
class MemorySave:
    """Description of a save to the memory stores."""

    save: str
    """Name of the checkpoint in the stores, the same on all ranks."""
    step: int
    world_size: int
    """Number of ranks that save."""
    meta: dict[str, Any]
    """``Manifest.meta`` of the checkpoint, as plain JSON."""
    places: tuple[Place, ...]
    """Addresses of the memory stores that get this rank's part."""
    secret: str
    """Secret that all memory stores require."""


def send(about: MemorySave, part: RankPart | StagedPart, state: WriterState) -> None:
    """Send the files of this rank's part to the memory stores ``about.places``. ``state`` is the state of the
    writer."""
    part = state.whole(part)
    where = {"save": about.save, "rank": part.rank}
    with ExitStack() as stack:
        stores = [stack.enter_context(StoreClient(place, about.secret)) for place in about.places]
        for store in stores:
            store.ask("begin", **where, step=about.step, world_size=about.world_size)
        files = SentFiles(stores, about.save, part.rank)
        items = [] if part.plan is None else write_items(part, part.plan, Path(), files, syncs=False)
        report = Report({}, items)
        if part.plan is not None and part.plan.metadata is not None:
            report.about = {"meta": about.meta, "index": encode_index(part.plan.metadata)}
        for name, content in (*part.files.items(), (REPORT, report.encode())):
            with files.create_stream(name, "wb") as stream:
                write_content(content, stream)
        for store in stores:
            store.ask("finish", **where)


def confirm(about: MemorySave, state: WriterState) -> None:
    """Tell the memory stores ``about.places`` that all ranks have sent their parts. No rank waits for this."""
    for place in about.places:
        with StoreClient(place, about.secret) as store:
            store.ask("commit", save=about.save)


class SentFiles(FileSystem):
    """File system for torch.distributed.checkpoint that sends each written file to memory stores.

    Args:
        stores: connections to the stores that get the files.
        save: name of the checkpoint in the stores.
        rank: rank of this process; its part of the checkpoint gets the files.
    """

    def __init__(self, stores: Sequence[StoreClient], save: str, rank: int) -> None:
        self._to = (stores, save, rank)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Return a context that yields a stream to write a file. At its end, the stores have the whole file."""
        upload = Upload(*self._to, Path(path).as_posix())
        yield upload
        upload.end()


# The stores of a run, and loading from them.


class MemoryStores:
    """Checkpoints in the memory stores of all nodes. All methods are collective.

    Args:
        group: gloo group of all ranks, for messages.
        own: address of the memory store of this rank's node.
        secret: secret that all memory stores require.
    """

    def __init__(self, group: dist.ProcessGroup | None, own: Place, secret: str) -> None:
        self.group = group
        self.secret = secret
        self.own = own
        self.of_ranks: list[Place] = messages.all_gather(own, group)
        """Address of the memory store of each rank's node, in the order of ranks."""
        self.places = neighbors(own, self.of_ranks)
        """Addresses of the memory stores that get this rank's part."""

    def load(self, state: Any, at_least: int) -> tuple[LoadedCheckpoint | None, str | None]:
        """Load the newest checkpoint in memory into ``state``, and then delete all other checkpoints in memory. If no
        checkpoint can be loaded, nothing is deleted.

        Args:
            state: tensors that are filled in place.
            at_least: lowest step that is loaded: that of the newest checkpoint on disk.

        Returns:
            (description of the checkpoint, None); or (None, reason as text) if no checkpoint was loaded.
        """
        try:
            held = self._find()
            if held.step < at_least:
                return None, f"memory holds step {held.step}, and the disk step {at_least}"
            loaded = self._read(held, state)
        except (_NotInMemoryError, CheckpointError) as error:
            return None, str(error).splitlines()[0]
        self.keep(held.save)
        return loaded, None

    def keep(self, save: str) -> None:
        """Delete all checkpoints in the memory stores except the one with the name ``save``. An empty name deletes
        all."""

        def keep() -> None:
            with StoreClient(self.own, self.secret) as store:
                store.ask("keep", save=save)

        run_on_all_ranks(keep, self.group)

    def _find(self) -> _HeldSave:
        """Return the newest checkpoint of which the stores have an undamaged copy of every part.

        Raises:
            _NotInMemoryError: there is no such checkpoint; raised on every rank.
        """
        found: dict[str, _HeldSave] = {}
        copies = run_on_all_ranks(self._verify_share, self.group)
        for place, of_rank in zip(self.of_ranks, copies, strict=True):
            for save, step, world_size, rank, files, wrong in of_rank:
                held = found.setdefault(save, _HeldSave(save, step, world_size))
                if wrong:
                    held.damaged.append(f"the part of rank {rank} at {place}: {wrong} with a wrong checksum")
                else:
                    held.parts.setdefault(rank, {})[place] = files
        why = "the memory of these nodes holds none"
        for held in sorted(found.values(), key=lambda held: -held.step):
            missing = [rank for rank in range(held.world_size) if rank not in held.parts]
            if not missing:
                return held
            why = f"of step {held.step} the parts of ranks {', '.join(map(str, missing))} are on no node"
            if held.damaged:
                why = f"step {held.step} is damaged: {'; '.join(held.damaged)}"
        raise _NotInMemoryError(why)

    def _verify_share(self) -> list[tuple[str, int, int, int, dict[str, int], str]]:
        """Verify some of the parts in the memory store of this node; the ranks of the node share the work.

        Returns:
            A tuple for each part: name of the checkpoint; its step; number of ranks that saved it; rank that saved the
            part; files of the part, name -> size in bytes; names of its damaged files as text, empty if there are none.
        """
        on_node = [rank for rank, place in enumerate(self.of_ranks) if place == self.own]
        share = slice(on_node.index(dist.get_rank(self.group)), None, len(on_node))
        with StoreClient(self.own, self.secret) as store:
            return [
                (entry["save"], entry["step"], entry["world_size"], rank, files,
                 ", ".join(store.ask("verify", save=entry["save"], rank=rank)["damaged"]))
                for entry in store.ask("inventory")["saves"]
                for rank, files in entry["parts"][share]
            ]  # fmt: skip

    def _read(self, held: _HeldSave, state: Any) -> LoadedCheckpoint:
        """Load the checkpoint ``held`` into ``state``, from undamaged copies of its parts. Return its description.

        Raises:
            CheckpointError: the parts do not fit ``state``, or a memory store has died; raised on every rank.
        """
        rank_states: list[dict[str, Any]] = []
        with ExitStack() as stack:
            files = HeldFiles(held, self, stack)
            texts = run_on_first_rank(
                lambda: [files.read(rank, REPORT).decode() for rank in range(held.world_size)], self.group
            )
            reports = [Report.decode(text.encode()) for text in texts]
            about = reports[0].about
            assert about is not None
            metadata = decode_index(about["index"])
            metadata.storage_data = {item.index: item.storage_data for report in reports for item in report.items}

            def read() -> None:
                read_tensors(HeldReader(metadata, files), state, self.group)
                if held.world_size == dist.get_world_size(self.group):
                    rank = dist.get_rank(self.group)
                    content = io.BytesIO(files.read(rank, rank_file(rank)))
                    rank_states.append(torch.load(content, map_location="cpu", weights_only=True))

            run_on_all_ranks(read, self.group)
        own = rank_states[0] if rank_states else None
        damage = f"other copies were taken than {'; '.join(held.damaged)}" if held.damaged else None
        return LoadedCheckpoint(
            held.step, about["meta"], held.world_size, own, is_from_memory=True, memory_damage=damage
        )


def neighbors(own: Place, of_ranks: Sequence[Place]) -> tuple[Place, ...]:
    """Return the addresses of the memory stores that get a rank's part: the store of the rank's node, and the store of
    the next node. If there is only one node, the result has only the store of this node.

    Args:
        own: address of the store of the rank's node.
        of_ranks: address of the store of each rank's node, in the order of ranks.
    """
    ring = list(dict.fromkeys(of_ranks))
    following = ring[(ring.index(own) + 1) % len(ring)]
    return (own,) if following == own else (own, following)


def open_memory(group: dist.ProcessGroup | None, writer: Writer | None) -> MemoryStores | None:
    """Return the memory stores of all nodes; None if some nodes have a store, and others have none. Collective.

    Args:
        group: gloo group of all ranks; None means the default group.
        writer: writer of this rank's checkpoints. It must be a process of its own.

    Raises:
        ConfigError: no node has a memory store; or ``writer`` is None, or writes in this process.
    """
    own = own_store()
    found = messages.all_gather(own is not None, group)
    if not any(found) or writer is None or not writer.is_background:
        raise ConfigError(
            "checkpoint.memory_interval above 0, and no memory store on this node",
            "agents of the launcher, on Linux, which keep one on each node",
            "python -m launch with the same words, or checkpoint.memory_interval=0",
        )
    if not all(found):
        return None
    assert own is not None
    return MemoryStores(group, *own)


# Reading the parts in the stores.


class _NotInMemoryError(Exception):
    """No checkpoint in memory can be loaded. The message has the reason."""


@dataclass
class _HeldSave:
    """A checkpoint in memory, as it was found in the memory stores."""

    save: str
    """Name of the checkpoint."""
    step: int
    world_size: int
    """Number of ranks that saved the checkpoint."""
    parts: dict[int, dict[Place, dict[str, int]]] = field(default_factory=dict)
    """Undamaged copies of parts: rank of a part -> address of a store -> name of a file -> size in bytes."""
    damaged: list[str] = field(default_factory=list)
    """One line for each damaged copy of a part."""


class HeldFiles(FileSystem):
    """File system for torch.distributed.checkpoint that reads the files of a checkpoint in memory.

    The part of rank N is read from the memory store of the node on which rank N now runs, if this store has an
    undamaged copy of the part. If not, the part is read from another store.

    Args:
        held: the checkpoint.
        stores: the memory stores of all nodes.
        stack: context that keeps the connections to the stores open. They are closed when the caller closes it.
    """

    def __init__(self, held: _HeldSave, stores: MemoryStores, stack: ExitStack) -> None:
        self._held, self._secret = held, stores.secret
        near = dict(enumerate(stores.of_ranks))
        self._sources = {
            rank: near[rank] if near.get(rank) in copies else min(copies, key=str)
            for rank, copies in held.parts.items()
        }
        self._ranks = {name: rank for rank, place in self._sources.items() for name in held.parts[rank][place]}
        self._clients: dict[Place, StoreClient] = {}
        self._stack = stack

    def read(self, rank: int, name: str) -> bytes:
        """Return the content of the file ``name`` in the part of the rank ``rank``."""
        place = self._sources[rank]
        if place not in self._clients:
            self._clients[place] = self._stack.enter_context(StoreClient(place, self._secret))
        return self._clients[place].read_all(self._held.save, rank, name, self._held.parts[rank][place][name])

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Return a context that yields a stream to read a file, received whole from its store."""
        name = Path(path).as_posix()
        yield io.BytesIO(self.read(self._ranks[name], name))


class HeldReader(FileSystemReader):
    """torch's reader of checkpoints, for a checkpoint in memory. The index of the tensors is not read from a file: it
    is the argument ``metadata`` of the constructor. ``files`` reads the files with the tensors."""

    def __init__(self, metadata: Metadata, files: FileSystem) -> None:
        super().__init__(".")
        self.fs = files
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the argument ``metadata`` of the constructor; other arguments are ignored."""
        self._metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return self._metadata
