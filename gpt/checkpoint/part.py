"""Part of a checkpoint that one rank writes, and its writing: sums are computed of the bytes on their way to the disk.

Owns the files of a rank and its report, by which the writer of rank 0 learns of them. Needs no process group, so that
any process can write. Must not know how the ranks agree.
"""

from __future__ import annotations

import copy
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from gpt.checkpoint.manifest import FileSum, sync_folder
from gpt.checkpoint.plans import WritePlan

COPY_AHEAD = 10_000_000
"""Bytes that are copied from a GPU ahead of their writing, as torch's default has it."""
PROBE_BYTES = 1 << 16


@dataclass
class Part:
    """Files of one rank: its share of a planned state, and files of its own."""

    rank: int
    plan: WritePlan | None = None
    data: list[Any] = field(default_factory=list)
    """Tensors and BytesIO of the plan's items, in their order."""
    files: dict[str, Any] = field(default_factory=dict)
    """Path in the folder -> what torch.save takes; bytes are written as they are."""


@dataclass
class Report:
    """Files that a rank has written, and the places of its items in them."""

    files: dict[str, FileSum]
    items: list[WriteResult] = field(default_factory=list)

    def encode(self) -> bytes:
        """Encode as JSON: rank 0 reads what other ranks have written, and that must run no code."""
        items = [
            [i.index.fqn, i.index.offset, i.index.index, i.storage_data.relative_path, i.storage_data.offset,
             i.storage_data.length]
            for i in self.items
        ]  # fmt: skip
        return json.dumps(
            {"files": {name: asdict(entry) for name, entry in self.files.items()}, "items": items}
        ).encode()

    @staticmethod
    def decode(text: bytes) -> Report:
        """Read what ``encode`` made."""
        found = json.loads(text)
        items = [
            WriteResult(MetadataIndex(fqn, offset, index), length, _StorageInfo(path, start, length))
            for fqn, offset, index, path, start, length in found["items"]
        ]
        return Report({name: FileSum(**entry) for name, entry in found["files"].items()}, items)


def report_name(rank: int) -> str:
    """Name of a rank's report, in the folder until it is committed."""
    return f".report_{rank:05d}.json"


def write_part(part: Part, folder: Path) -> None:
    """Write the files of a part and its report into ``folder``, synced to disk.

    Raises:
        OSError: the filesystem did not take them.
    """
    files = SummingFiles()
    try:
        items = [] if part.plan is None else write_items(part, part.plan, folder, files)
        for name, content in part.files.items():
            write_file(folder / name, content, files)
        for parent in {folder, *((folder / name).parent for name in part.files)}:
            sync_folder(parent)
        named = {path.relative_to(folder).as_posix(): entry for path, entry in files.sums.items()}
        with (folder / report_name(part.rank)).open("wb") as file:
            file.write(Report(named, items).encode())
            file.flush()
            os.fsync(file.fileno())
    except Exception:
        probe(folder, part.rank)  # torch's writer says "unexpected pos" where a disk is full
        raise


def write_items(part: Part, plan: WritePlan, folder: Path, files: FileSystem, syncs: bool = True) -> list[WriteResult]:
    """Write the planned items as torch.distributed.checkpoint does; returns their places.

    Args:
        part: of one rank.
        plan: of its items.
        folder: that their files are named in.
        files: opens them.
        syncs: sync each to its disk.
    """
    # Copies ahead are for GPUs only, and would start one in a process that has none to do with it.
    ahead = COPY_AHEAD if torch.cuda.is_initialized() else 0
    writer = FileSystemWriter(folder, sync_files=syncs, per_thread_copy_ahead=ahead)
    writer.fs = files
    planner = cast(SavePlanner, _Resolved(plan.items.items, part.data))
    return writer.write_data(plan.items, planner).wait()


def write_index(metadata: Metadata, items: Sequence[Sequence[WriteResult]], folder: Path) -> dict[str, FileSum]:
    """Write the index of all ranks' tensors; returns the sum of its file."""
    files = SummingFiles()
    writer = FileSystemWriter(folder, sync_files=True)
    writer.fs = files
    writer.finish(copy.copy(metadata), [list(of_rank) for of_rank in items])  # it fills in what it is given
    (entry,) = files.sums.values()
    return {".metadata": entry}


def write_file(path: Path, content: Any, files: SummingFiles) -> None:
    """Write one file, synced to disk; what could not be read back later fails now."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.create_stream(path, "wb") as stream:
        if isinstance(content, bytes):
            stream.write(content)
        else:
            torch.save(content, stream)
        stream.flush()
        os.fsync(stream.fileno())


def rank_file(rank: int) -> str:
    """Name of the file of a rank's own state."""
    return f"rank_{rank:05d}.pt"


def encode_rank_state(rank_state: dict[str, Any]) -> bytes:
    """Encode a rank's own state, tensors and plain values, as ``torch.load`` with ``weights_only`` reads it.

    Raises:
        Exception: it could not be loaded later; torch's own.
    """
    stream = io.BytesIO()
    torch.save(rank_state, stream)
    stream.seek(0)
    torch.load(stream, weights_only=True)
    return stream.getvalue()


class _Resolved:
    """Planner whose items are resolved already."""

    def __init__(self, items: Sequence[WriteItem], data: Sequence[Any]) -> None:
        self._data: Mapping[MetadataIndex, Any] = {item.index: entry for item, entry in zip(items, data, strict=True)}

    def resolve_data(self, item: WriteItem) -> Any:
        """Return the tensor or the bytes of an item."""
        return self._data[item.index]


class SummingFiles(FileSystem):
    """torch's file system, which computes size and sha256 of what is written, by path."""

    def __init__(self) -> None:
        self.sums: dict[Path, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file to write; its sum is there when it is closed."""
        with super().create_stream(path, mode) as stream:
            summing = _SummingStream(stream)
            yield summing
            summing.flush()
        self.sums[Path(path)] = FileSum(summing.size, summing.digest.hexdigest())


class _SummingStream:
    """Stream that is written from its beginning to its end, and summed on the way."""

    def __init__(self, stream: io.IOBase) -> None:
        self._stream = stream
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write and sum ``data``."""
        length = memoryview(data).nbytes
        self._stream.write(data)  # type: ignore[attr-defined]
        self.digest.update(data)
        self.size += length
        return length

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self.size

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if not self._stream.closed:
            self._stream.flush()

    def fileno(self) -> int:
        """Return the file's descriptor."""
        return self._stream.fileno()

    def close(self) -> None:
        """Do nothing: the file is closed by whoever opened it."""


def probe(folder: Path, rank: int) -> None:
    """Raise the OSError of a filesystem that does not take another block."""
    path = folder / f".probe_{rank:05d}"
    with path.open("wb") as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()
