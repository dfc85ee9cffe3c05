"""Copy of a state in host memory that another process can read, taken while training waits.

Owns the memory, which both processes map, and the text in which tensors are places in it. It is allocated at the first
save, grows when a state does, and is used again by every save. Must not know what the tensors are.
"""

from __future__ import annotations

import io
import logging
import mmap
import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gpt.checkpoint.part import Part
from gpt.checkpoint.plans import WritePlan

log = logging.getLogger(__name__)

ALIGNMENT = 64
ROOM_FOR_TEXT = 1 << 16
"""Bytes for a text that grows, as numbers in it do, so that the memory need not."""
MOST_THREADS = 4
"""Threads that copy at a time: more of them find no more bandwidth."""
FEW_BYTES = 1 << 24
"""Bytes that are copied before a thread has started."""
TENSOR, PLAN = "tensor", "plan"


class SharedMemory:
    """Memory without a name in any file system, so that a killed process leaves none behind.

    Args:
        descriptor: that of the memory, as another process has made it; None makes a new one of ``size`` bytes.
        size: bytes, at least one.
        pin: lock its pages for copies from a GPU.
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
        """Return the tensor at a place, over the same memory, with a storage of its own size."""
        count = dtype.itemsize * torch.Size(shape).numel()
        if not count:
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=torch.uint8, count=count, offset=offset).view(dtype).view(shape)

    def close(self) -> None:
        """Give the memory back, once its last view is gone."""
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
    """Take away the error of a call of CUDA that has failed: CUDA keeps it, and the next kernel would raise it."""
    with suppress(RuntimeError):
        torch.empty(1, device="cuda").fill_(1)  # torch has no call that does only that


@dataclass(frozen=True)
class StagedPart:
    """Part whose tensors lie in shared memory."""

    offset: int
    """Place of the text in which the tensors are named, behind them."""
    length: int

    def load(self, memory: SharedMemory, plan: WritePlan | None) -> Part:
        """Return the part, its tensors views of ``memory``."""
        text = memory.view(self.offset, torch.uint8, (self.length,)).numpy().tobytes()
        part = _Unpickler(text, memory, plan).load()
        assert isinstance(part, Part)
        return part


def stage(part: Part, memory: SharedMemory | None) -> tuple[StagedPart, SharedMemory]:
    """Copy the tensors of a part into shared memory; returns the part and the memory, a larger one where it has to be.

    Waits for copies from a GPU, and for nothing else.
    """
    pickler = _Pickler()
    pickler.dump(part)
    text = pickler.stream.getbuffer()
    size = pickler.size + len(text)
    if memory is None or memory.size < size:
        if memory is not None:
            memory.close()
        memory = SharedMemory(size + ROOM_FOR_TEXT, pin=any(tensor.is_cuda for tensor, _ in pickler.places))
    copy_into(memory, [place for place in pickler.places if not place[0].is_cuda])
    devices = set()
    for tensor, offset in pickler.places:
        if tensor.is_cuda:
            memory.view(offset, tensor.dtype, tuple(tensor.shape)).copy_(tensor, non_blocking=memory.is_pinned)
            devices.add(tensor.device)
    # The text goes this way too: a pipe would make the rank wait where the writer still deletes.
    staged = StagedPart(pickler.size, len(text))
    memory.view(staged.offset, torch.uint8, (staged.length,)).copy_(torch.frombuffer(text, dtype=torch.uint8))
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return staged, memory


def copy_into(memory: SharedMemory, places: Sequence[tuple[Tensor, int]], threads: int | None = None) -> None:
    """Copy tensors of the host to their places, by as many threads as this rank has cores, and at most four.

    One core moves fewer bytes than memory takes. torch's own threads would outlive the copy, and a process that is
    forked off this one later could not use them.
    """

    def copy(place: tuple[Tensor, int]) -> None:
        tensor, offset = place
        memory.view(offset, tensor.dtype, tuple(tensor.shape)).copy_(tensor)

    if threads is None:
        threads = min(MOST_THREADS, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if threads < 2 or sum(tensor.nbytes for tensor, _ in places) < FEW_BYTES:
        for place in places:
            copy(place)
        return
    with ThreadPoolExecutor(threads) as pool:
        # The largest first, so that all end at about the same time; list() raises what a copy raised.
        list(pool.map(copy, sorted(places, key=lambda place: -place[0].nbytes)))


class _Pickler(pickle.Pickler):
    """Pickling in which tensors and the plan are left out, and named by their places."""

    def __init__(self) -> None:
        self.stream = io.BytesIO()
        super().__init__(self.stream, pickle.HIGHEST_PROTOCOL)
        self.places: list[tuple[Tensor, int]] = []
        self.size = 0
        self._known: dict[Any, int] = {}

    def persistent_id(self, value: Any) -> Any:
        """Return the place of a tensor or plan; None of anything else, which is pickled."""
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
    """Reading of what ``_Pickler`` wrote, in the process that this rank has forked off itself."""

    def __init__(self, text: bytes, memory: SharedMemory, plan: WritePlan | None) -> None:
        super().__init__(io.BytesIO(text))
        self._memory, self._plan = memory, plan

    def persistent_load(self, pid: Any) -> Any:
        """Return the tensor or plan that a place names."""
        if pid[0] == PLAN:
            return self._plan
        _, offset, dtype, shape = pid
        if not torch.Size(shape).numel():
            return torch.empty(shape, dtype=dtype)
        return self._memory.view(offset, dtype, shape)
