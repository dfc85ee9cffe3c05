"""Loading from the memory of the nodes: the newest checkpoint of which every part is whole, on any nodes.

A damaged copy of a part is replaced by the other copy. If no copy is left, the checkpoint is passed over.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from gpt.checkpoint.folders import LoadedCheckpoint
from gpt.checkpoint.formats import decode_index, read_tensors
from gpt.checkpoint.memory import ABOUT, REPORT, MemorySaves
from gpt.checkpoint.messages import run_on_all_ranks, run_on_first_rank
from gpt.checkpoint.part import Report, rank_file
from launch.worker.memory import CHUNK, Place, StoreClient

BUFFER = 1 << 20


class NotInMemoryError(Exception):
    """There is no checkpoint in memory that could be loaded; the message says why."""


@dataclass
class HeldSave:
    """A checkpoint in memory, as far as the nodes of this start have it."""

    save: str
    step: int
    world_size: int
    parts: dict[int, dict[Place, dict[str, int]]]
    """Rank -> store that has its part -> name of a file -> its bytes."""

    def missing(self) -> list[int]:
        """List the ranks whose part is on no node."""
        return [rank for rank in range(self.world_size) if not self.parts.get(rank)]

    def sources(self, of_ranks: Sequence[Place]) -> dict[int, Place]:
        """Choose the store that each part is read from: that of the node where its rank is now, if possible."""
        near = {rank: of_ranks[rank] if rank < len(of_ranks) else None for rank in self.parts}
        return {rank: near[rank] if near[rank] in held else min(held, key=str) for rank, held in self.parts.items()}  # type: ignore[misc]


def find_held(saves: MemorySaves) -> HeldSave:
    """Find the newest checkpoint of which the stores have every part. Collective.

    Raises:
        NotInMemoryError: there is none; on every rank.
    """
    found = merge_inventories(run_on_all_ranks(lambda: _inventory(saves), saves.group), saves.of_ranks)
    why = "the memory of these nodes holds none"
    for held in sorted(found, key=lambda held: -held.step):
        missing = held.missing()
        if not missing:
            return held
        why = f"of step {held.step} the parts of ranks {', '.join(map(str, missing))} are on no node"
    raise NotInMemoryError(why)


def merge_inventories(told: Sequence[Sequence[dict[str, Any]]], of_ranks: Sequence[Place]) -> list[HeldSave]:
    """Join the inventories of the stores, each sent by one rank of its node."""
    found: dict[str, HeldSave] = {}
    for place, saves in zip(of_ranks, told, strict=True):
        for entry in saves:
            held = found.setdefault(entry["save"], HeldSave(entry["save"], entry["step"], entry["world_size"], {}))
            for rank, files in entry["parts"]:
                held.parts.setdefault(rank, {})[place] = files
    return list(found.values())


def _inventory(saves: MemorySaves) -> list[dict[str, Any]]:
    """Return the inventory of this node's store; only the first rank of a node reads it."""
    if saves.of_ranks.index(saves.own) != dist.get_rank(saves.group):
        return []
    with StoreClient(saves.own, saves.secret) as store:
        return list(store.ask("inventory")["saves"])


def load_held(saves: MemorySaves, held: HeldSave, state: Any) -> LoadedCheckpoint:
    """Fill ``state`` from a checkpoint in memory, once the copies that are read are verified. Collective.

    Raises:
        NotInMemoryError: some part has no sound copy; on every rank.
        CheckpointError: it does not fit the state, or a store has died in the meantime; on every rank.
    """
    damaged = verify_held(saves, held)
    sources = held.sources(saves.of_ranks)
    files = {name: (rank, size) for rank, place in sources.items() for name, size in held.parts[rank][place].items()}
    rank_states: list[dict[str, Any]] = []

    def read_descriptions(stores: HeldFiles) -> bytes:
        reports = [stores.read(rank, REPORT).decode() for rank in range(held.world_size)]
        return json.dumps({"about": stores.read(0, ABOUT).decode(), "reports": reports}).encode()

    with HeldFiles(saves, held, sources, files) as stores:
        told = run_on_first_rank(lambda: read_descriptions(stores).decode(), saves.group)
        described = json.loads(told)
        about = json.loads(described["about"])

        def read_own() -> None:
            if held.world_size == dist.get_world_size(saves.group):
                rank = dist.get_rank(saves.group)
                content = io.BytesIO(stores.read(rank, rank_file(rank)))
                rank_states.append(torch.load(content, map_location="cpu", weights_only=True))

        metadata = decode_index(about["index"])
        items = [item for text in described["reports"] for item in Report.decode(text.encode()).items]
        metadata.storage_data = {item.index: item.storage_data for item in items}
        run_on_all_ranks(lambda: read_tensors(HeldReader(metadata, stores), state, saves.group), saves.group)
        run_on_all_ranks(read_own, saves.group)
    own = rank_states[0] if rank_states else None
    damage = f"other copies were taken than {'; '.join(damaged)}" if damaged else None
    return LoadedCheckpoint(held.step, about["meta"], held.world_size, own, is_from_memory=True, memory_damage=damage)


def verify_held(saves: MemorySaves, held: HeldSave) -> list[str]:
    """Verify the copies that will be read, and take damaged ones out of the checkpoint; return a line for each."""
    ranks, own = dist.get_world_size(saves.group), dist.get_rank(saves.group)
    verified: set[tuple[int, Place]] = set()
    damaged: list[str] = []
    while True:
        sources = held.sources(saves.of_ranks)
        open_copies = sorted((rank, place) for rank, place in sources.items() if (rank, place) not in verified)
        if not open_copies:
            return damaged
        mine = [(rank, place) for rank, place in open_copies if rank % ranks == own]

        def verify(mine: Sequence[tuple[int, Place]] = mine) -> list[tuple[int, str]]:
            return [(rank, why) for rank, place in mine if (why := _damage(saves, held, rank, place))]

        found = dict(pair for of_rank in run_on_all_ranks(verify, saves.group) for pair in of_rank)
        for rank, place in open_copies:
            verified.add((rank, place))
            if rank in found:
                damaged.append(f"the part of rank {rank} at {place}: {found[rank]}")
                del held.parts[rank][place]
        if held.missing():
            raise NotInMemoryError(f"step {held.step} is damaged: {'; '.join(damaged)}")


def _damage(saves: MemorySaves, held: HeldSave, rank: int, place: Place) -> str:
    try:
        with StoreClient(place, saves.secret) as store:
            wrong = store.ask("verify", save=held.save, rank=rank)["damaged"]
    except OSError as error:
        return str(error)
    return f"{', '.join(wrong)} with a wrong checksum" if wrong else ""


def forget_others(saves: MemorySaves, save: str) -> None:
    """Have the stores free the memory of all saves but ``save``; of all, if none has that name. Collective."""

    def forget() -> None:
        with StoreClient(saves.own, saves.secret) as store:
            store.ask("keep", save=save)

    run_on_all_ranks(forget, saves.group)


def discard_held_after(saves: MemorySaves, step: int) -> None:
    """Have the stores forget a checkpoint of a later step than ``step``, to which the run goes back. Collective."""
    try:
        held = find_held(saves)
    except NotInMemoryError:
        return
    forget_others(saves, held.save if held.step <= step else "")


class HeldFiles(FileSystem):
    """torch's file system over the parts of a checkpoint in memory, each read from its verified copy.

    Args:
        saves: gives the secret.
        held: the checkpoint.
        sources: store of each rank's part.
        files: name of a file -> rank whose part it belongs to, and its bytes.
    """

    def __init__(
        self, saves: MemorySaves, held: HeldSave, sources: dict[int, Place], files: dict[str, tuple[int, int]]
    ) -> None:
        self._secret, self._held, self._sources, self._files = saves.secret, held, sources, files
        self._clients: dict[Place, StoreClient] = {}
        self._stack = ExitStack()

    def __enter__(self) -> HeldFiles:
        return self

    def __exit__(self, *args: object) -> None:
        self._stack.close()

    def read(self, rank: int, name: str) -> bytes:
        """Read a whole file of a rank's part."""
        size = self._held.parts[rank][self._sources[rank]][name]
        return self._store(rank).read_all(self._held.save, rank, name, size)

    @contextmanager
    def create_stream(self, path: Any, mode: str) -> Iterator[Any]:
        """Open a file to read."""
        name = Path(path).as_posix()
        rank, size = self._files[name]
        yield io.BufferedReader(_HeldStream(self._store(rank), self._held.save, rank, name, size), BUFFER)

    def _store(self, rank: int) -> StoreClient:
        place = self._sources[rank]
        if place not in self._clients:
            self._clients[place] = self._stack.enter_context(StoreClient(place, self._secret))
        return self._clients[place]


class _HeldStream(io.RawIOBase):
    """A file in a memory store, whose bytes are fetched when they are read."""

    def __init__(self, store: StoreClient, save: str, rank: int, name: str, size: int) -> None:
        self._store, self._where, self._size = store, (save, rank, name), size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        wanted = max(0, min(view.nbytes, self._size - self._at, CHUNK))
        if wanted:
            view[:wanted] = self._store.read(*self._where, self._at, wanted)
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
