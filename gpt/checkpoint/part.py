"""What one rank writes for a checkpoint (a part): the plan of its tensors, its files, and its copy in shared memory."""

from __future__ import annotations

import copy
import hashlib
import io
import json
import logging
import mmap
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter, _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult

from gpt.checkpoint import FileSum, sync_folder


@dataclass(frozen=True)
class WritePlan:
    """Plan of the tensors that one rank writes for a checkpoint."""

    key: int
    """Number of this plan, unique in this process."""
    items: SavePlan
    """torch's list of the tensors, or chunks of tensors, to write."""
    metadata: Metadata | None
    """Index of the tensors of all ranks, without their positions in files; None except on rank 0."""


# The part of a checkpoint that one rank writes; the bytes are summed on their way to the disk.
#
# No process group is needed, so that any process can write.


COPY_AHEAD = 10_000_000
"""Largest number of bytes that torch copies from a GPU before it writes them; torch's default."""
PROBE_BYTES = 1 << 16


@dataclass
class RankPart:
    """What one rank writes for a checkpoint: tensors by a plan, and other files."""

    rank: int
    plan: WritePlan | None = None
    """Plan of the tensors; None if there are only other files."""
    data: list[Any] = field(default_factory=list)
    """What is written for each item of the plan, in the order of the items: a tensor, or a BytesIO for another value.
    """
    files: dict[str, Any] = field(default_factory=dict)
    """Path in the folder of the checkpoint -> content: bytes are written unchanged, other values by ``torch.save``."""


@dataclass
class Report:
    """Report of what a rank has written for a checkpoint."""

    files: dict[str, FileSum]
    """Path in the folder of the checkpoint -> size and checksum."""
    items: list[WriteResult] = field(default_factory=list)
    """File and position of each planned tensor."""
    about: dict[str, Any] | None = None
    """Facts about the whole checkpoint: ``meta`` (the values saved with it) and ``index`` (where each tensor is).

    Only rank 0 reports them, and only for a checkpoint in memory; otherwise None.
    """

    def encode(self) -> bytes:
        """Return the report as JSON. Rank 0 reads the reports of other ranks, and reading JSON runs no code that a file
        may contain."""
        items = [
            [i.index.fqn, i.index.offset, i.index.index, i.storage_data.relative_path, i.storage_data.offset,
             i.storage_data.length]
            for i in self.items
        ]  # fmt: skip
        files = {name: asdict(entry) for name, entry in self.files.items()}
        return json.dumps({"files": files, "items": items, "about": self.about}).encode()

    @staticmethod
    def decode(text: bytes) -> Report:
        """Return the report that ``encode`` has encoded."""
        found = json.loads(text)
        items = [
            WriteResult(MetadataIndex(fqn, offset, index), length, _StorageInfo(path, start, length))
            for fqn, offset, index, path, start, length in found["items"]
        ]
        files = {name: FileSum(**entry) for name, entry in found["files"].items()}
        return Report(files, items, found["about"])


def report_name(rank: int) -> str:
    """Return the name of the file with a rank's report, which is in the folder of a save until the commit."""
    return f".report_{rank:05d}.json"


def write_part(part: RankPart, folder: Path) -> None:
    """Write a part and its report into ``folder``, and sync all files to disk.

    Raises:
        OSError: the files could not be written, for example because the disk is full.
    """
    files = SummingFiles()
    try:
        items = [] if part.plan is None else write_items(part, part.plan, folder, files)
        for name, content in part.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            with files.create_stream(folder / name, "wb") as stream:
                write_content(content, stream)
                stream.flush()
                os.fsync(stream.fileno())
        for parent in {folder, *((folder / name).parent for name in part.files)}:
            sync_folder(parent)
        named = {path.relative_to(folder).as_posix(): entry for path, entry in files.sums.items()}
        with (folder / report_name(part.rank)).open("wb") as file:
            file.write(Report(named, items).encode())
            file.flush()
            os.fsync(file.fileno())
    except Exception:
        probe(folder, part.rank)  # torch's writer says "unexpected pos" if a disk is full
        raise


def write_items(
    part: RankPart, plan: WritePlan, folder: Path, files: FileSystem, syncs: bool = True
) -> list[WriteResult]:
    """Write the planned tensors of a part, as torch.distributed.checkpoint does. Return file, position and length of
    each tensor.

    Args:
        part: the part.
        plan: plan of its tensors.
        folder: folder into which ``files`` writes; an empty path if the files have no folder.
        files: file system that opens each file, such as ``SummingFiles``.
        syncs: True to sync each file to disk.
    """
    # Copies ahead are only for GPUs. In a process without a GPU they would start one.
    ahead = COPY_AHEAD if torch.cuda.is_initialized() else 0
    writer = FileSystemWriter(folder, sync_files=syncs, per_thread_copy_ahead=ahead)
    writer.fs = files
    data = {item.index: entry for item, entry in zip(plan.items.items, part.data, strict=True)}
    planner = cast(SavePlanner, SimpleNamespace(resolve_data=lambda item: data[item.index]))  # data is resolved already
    return writer.write_data(plan.items, planner).wait()


def write_index(metadata: Metadata, items: Sequence[Sequence[WriteResult]], folder: Path) -> dict[str, FileSum]:
    """Write the index of the tensors of all ranks into ``folder``. Return name -> size and checksum for the file of the
    index.

    ``items`` has the positions of the tensors in files, for each rank.
    """
    files = SummingFiles()
    writer = FileSystemWriter(folder, sync_files=True)
    writer.fs = files
    writer.finish(copy.copy(metadata), [list(of_rank) for of_rank in items])  # finish() changes its argument
    (entry,) = files.sums.values()
    return {".metadata": entry}


def write_content(content: Any, stream: Any) -> None:
    """Write ``content`` into ``stream``: bytes unchanged, other values by ``torch.save``."""
    if isinstance(content, bytes):
        stream.write(content)
    else:
        torch.save(content, stream)


def rank_file(rank: int) -> str:
    """Return the name of the file, in a checkpoint, with the state of one rank alone."""
    return f"rank_{rank:05d}.pt"


def encode_rank_state(rank_state: dict[str, Any]) -> bytes:
    """Return the state that only one rank has, such as that of its random generators, as bytes of ``torch.save``.

    The values are tensors and plain Python values, which ``torch.load`` with ``weights_only=True`` can read.

    Raises:
        Exception: torch's error, if ``torch.load`` with ``weights_only=True`` cannot read the bytes.
    """
    stream = io.BytesIO()
    torch.save(rank_state, stream)
    stream.seek(0)
    torch.load(stream, weights_only=True)
    return stream.getvalue()


class SummingFiles(FileSystem):
    """File system for torch.distributed.checkpoint that records size and sha256 of each written file in ``sums``, by
    path."""

    def __init__(self) -> None:
        self.sums: dict[Path, FileSum] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[Any]:
        """Return a context that yields a stream to write a file, and at its end records the size and sha256 of the
        file."""
        with super().create_stream(path, mode) as stream:
            summing = _SummingStream(stream)
            yield summing
            summing.flush()
        self.sums[Path(path)] = FileSum(summing.size, summing.digest.hexdigest())


class _SummingStream:
    """Stream for writing a file from beginning to end, which counts its bytes and computes their sha256."""

    def __init__(self, stream: io.IOBase) -> None:
        self._stream = stream
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> int:
        """Write ``data``, and return the number of its bytes."""
        length = memoryview(data).nbytes
        self._stream.write(data)  # type: ignore[attr-defined]
        self.digest.update(data)
        self.size += length
        return length

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self.size

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the inner stream, such as ``flush`` or ``fileno``."""
        return getattr(self._stream, name)

    def close(self) -> None:
        """Do nothing: the code that has opened the file closes it."""


def probe(folder: Path, rank: int) -> None:
    """Write and delete a small file in ``folder``. Raise OSError if the filesystem is full or broken. The name of the
    file has ``rank``, so that each rank has a file of its own."""
    path = folder / f".probe_{rank:05d}"
    with path.open("wb") as file:
        file.write(bytes(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    path.unlink()


# The copy of a state in host memory that another process can read, taken while training waits.
#
# The memory is allocated at the first save, grows when a state does, and every save uses it again.


log = logging.getLogger(__name__)

ALIGNMENT = 64
ROOM_FOR_TEXT = 1 << 16
"""Bytes that new shared memory has in addition, because the pickled text of a part may become longer in later saves."""
TENSOR, PLAN = "tensor", "plan"


class SharedMemory:
    """Memory that two processes share. It has no name in a filesystem, so it is freed when both processes end.

    Args:
        size: size in bytes, at least 1.
        descriptor: file descriptor of memory that another process has made; None makes new memory.
        pin: True to lock the pages, for faster copies from a GPU.
    """

    def __init__(self, size: int, descriptor: int | None = None, pin: bool = False) -> None:
        self.descriptor = os.memfd_create("checkpoint") if descriptor is None else descriptor
        if descriptor is None:
            os.ftruncate(self.descriptor, size)
        self.size = size
        self._map = mmap.mmap(self.descriptor, size)
        self._bytes = torch.frombuffer(self._map, dtype=torch.uint8)
        self.is_pinned = pin and self._pin()

    def view(self, offset: int, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Return a tensor that is a view of the memory, from byte ``offset`` on."""
        count = dtype.itemsize * torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=offset).view(dtype).view(shape)

    def close(self) -> None:
        """Close the memory. It is freed when there are no views of it any more."""
        if self.is_pinned and int(torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr())):
            take_cuda_error()
        os.close(self.descriptor)

    def _pin(self) -> bool:
        error = torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), self.size, 0)
        if int(error):
            log.warning(
                "the %d bytes to stage checkpoints in cannot be pinned, so copies from the GPU take longer", self.size
            )
            take_cuda_error()
        return not int(error)


def take_cuda_error() -> None:
    """Clear the error of a failed CUDA call, which the next kernel would raise."""
    with suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(1)  # torch has no call that only clears the error


@dataclass(frozen=True)
class StagedPart:
    """Part that was copied into shared memory: its tensors, and after them pickled text that describes the part."""

    offset: int
    """Position of the text in the memory, in bytes."""
    length: int
    """Length of the text in bytes."""

    def load(self, memory: SharedMemory, plan: WritePlan | None) -> RankPart:
        """Return the part. Its tensors are views of ``memory``, not copies. Its plan is ``plan``; None for a part
        without planned tensors."""
        text = memory.view(self.offset, torch.uint8, (self.length,)).numpy().tobytes()
        part = _Unpickler(text, memory, plan).load()
        assert isinstance(part, RankPart)
        return part


def stage(part: RankPart, memory: SharedMemory | None) -> tuple[StagedPart, SharedMemory]:
    """Copy a part into shared memory. Return the staged part, and the memory: ``memory``, or a new and larger one if
    ``memory`` is None or too small. A memory that is too small is closed. All copies are complete when this function
    returns."""
    pickler = _Pickler()
    pickler.dump(part)
    text = pickler.stream.getbuffer()
    size = pickler.size + len(text)
    if memory is None or memory.size < size:
        if memory is not None:
            memory.close()
        memory = SharedMemory(size + ROOM_FOR_TEXT, pin=any(tensor.is_cuda for tensor, _ in pickler.places))
    for tensor, offset in pickler.places:
        memory.view(offset, tensor.dtype, tuple(tensor.shape)).copy_(tensor, non_blocking=memory.is_pinned)
    # The text is also sent through the memory. With a pipe, the rank would wait while the writer still deletes files.
    staged = StagedPart(pickler.size, len(text))
    memory.view(staged.offset, torch.uint8, (staged.length,)).copy_(torch.frombuffer(text, dtype=torch.uint8))
    for device in {tensor.device for tensor, _ in pickler.places if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
    return staged, memory


class _Pickler(pickle.Pickler):
    """Pickler for a part that leaves out its plan, and writes an offset in shared memory for each tensor instead of
    its bytes."""

    def __init__(self) -> None:
        self.stream = io.BytesIO()
        super().__init__(self.stream, pickle.HIGHEST_PROTOCOL)
        self.places: list[tuple[Tensor, int]] = []
        self.size = 0
        self._known: dict[Any, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """Return a tuple that describes a tensor or the plan; None for other values, which are pickled."""
        if isinstance(value, WritePlan):
            return (PLAN,)
        if not isinstance(value, Tensor):
            return None
        tensor = value.detach()
        # Tensors that share their memory, as tied weights do, are copied once.
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride(), tensor.device)
        if key not in self._known or not tensor.numel():
            self._known[key] = self.size
            self.places.append((tensor, self.size))
            self.size += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return (TENSOR, self._known[key], tensor.dtype, tuple(tensor.shape))


class _Unpickler(pickle.Unpickler):
    """Unpickler for the text of ``_Pickler``. The text comes from this rank itself, not over a network."""

    def __init__(self, text: bytes, memory: SharedMemory, plan: WritePlan | None) -> None:
        super().__init__(io.BytesIO(text))
        self._memory, self._plan = memory, plan

    def persistent_load(self, pid: Any) -> Any:
        """Return the tensor or plan that a tuple of ``persistent_id`` describes."""
        if pid[0] == PLAN:
            return self._plan
        _, offset, dtype, shape = pid
        return self._memory.view(offset, dtype, shape)
