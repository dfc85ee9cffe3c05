"""A small training of two or more ranks over gloo, in which one rank has a fault of a chosen kind.

``faulty.py KIND STEP RANK [FOLDER]``: the fault of this kind comes on this rank in this step; ``none`` for no fault.
``FOLDER`` is for files of the fault. Every rank records its steps. The fault is the only thing that ends a run before
its last step, so its kind, rank and step are known.
"""

from __future__ import annotations

import ctypes
import datetime
import os
import resource
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from launch import worker

KIND, AT, WHERE = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
FOLDER = Path(sys.argv[4]) if len(sys.argv) > 4 else Path()
STEPS = 12
FOREVER_S = 3600.0


class Samples(Dataset[torch.Tensor]):
    """Random rows. With the fault, a worker of the loader dies in the middle, or a row is not a number."""

    def __init__(self, is_faulty: bool) -> None:
        self._is_faulty = is_faulty

    def __len__(self) -> int:
        return STEPS

    def __getitem__(self, index: int) -> torch.Tensor:
        if self._is_faulty and index == AT - 1:
            if KIND == "dead_worker":
                os.kill(os.getpid(), 9)
            if KIND == "slow_worker":
                time.sleep(FOREVER_S)
            if KIND == "nan_batch":
                return torch.full((8,), float("nan"))
        return torch.randn(8, generator=torch.Generator().manual_seed(index))


def batches(is_faulty: bool) -> Iterator[torch.Tensor]:
    """Yield the batches of this rank, from a worker process where the fault is about one."""
    workers = 1 if KIND in ("dead_worker", "slow_worker") else 0
    yield from DataLoader(Samples(is_faulty), num_workers=workers)


def take_locks_in_two_orders() -> None:
    """Hold two locks in this thread and another, each of which wants the other one."""
    a_lock, b_lock, both = threading.Lock(), threading.Lock(), threading.Barrier(2)

    def other() -> None:
        with b_lock:
            both.wait()
            a_lock.acquire()

    threading.Thread(target=other, daemon=True).start()
    with a_lock:
        both.wait()
        b_lock.acquire()


def read_shard(path: Path) -> bytes:
    """Read a file that never has more bytes, as a filesystem that hangs."""
    with path.open("r+b", buffering=0) as file:  # a FIFO that has a writer, this process
        return file.read(1)


def compute_long() -> int:
    """Compute for as long as somebody waits."""
    total = 0
    while True:
        for number in range(1000):
            total += number * number


def hold_the_gil() -> None:
    """Call compiled code that sleeps and does not release the GIL."""
    ctypes.PyDLL(None).sleep(int(FOREVER_S))


def take_memory() -> None:
    """Take memory without end."""
    taken = []
    while True:
        taken.append(b"x" * (64 << 20))


def fill_disk(folder: Path) -> None:
    """Write more than a small filesystem holds."""
    with (folder / f"dump_{os.getpid()}").open("wb") as file:
        while True:
            file.write(bytes(1 << 20))


def cut_links() -> None:
    """Shut the TCP connections of this process to other ranks, as a lost link does."""
    for descriptor in Path("/proc/self/fd").iterdir():
        try:
            with socket.socket(fileno=os.dup(int(descriptor.name))) as link:
                link.getpeername()
                if link.family == socket.AF_INET:
                    link.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue


def flip_bit(weights: torch.Tensor) -> None:
    """Flip the highest bit of the exponent of one weight."""
    (bits,) = struct.unpack("<I", struct.pack("<f", float(weights[0]) or 1.0))
    (value,) = struct.unpack("<f", struct.pack("<I", bits | 0x7F800000 & ~0x800000 | 1 << 30))
    weights[0] = value


def disturb(weights: torch.Tensor) -> None:
    """Make the fault of the chosen kind."""
    if KIND == "size":
        dist.all_reduce(torch.ones(64))
    elif KIND == "kind":
        dist.broadcast(torch.ones(8), 0)
    elif KIND == "leave":
        os._exit(0)
    elif KIND == "deadlock":
        take_locks_in_two_orders()
    elif KIND == "slow_disk":
        os.mkfifo(FOLDER / "shard")
        read_shard(FOLDER / "shard")
    elif KIND == "slow_cpu":
        compute_long()
    elif KIND == "gil":
        hold_the_gil()
    elif KIND == "bit_flip":
        flip_bit(weights)
    elif KIND == "oom_kill":
        take_memory()
    elif KIND == "memory_error":
        resource.setrlimit(resource.RLIMIT_AS, (used := 2 << 30, used))
        take_memory()
    elif KIND == "lost_link":
        cut_links()
    elif KIND == "full_disk":
        fill_disk(FOLDER)
    elif KIND == "exit":
        sys.exit(3)
    elif KIND == "missing_file":
        (FOLDER / "no_such_shard.bin").read_bytes()
    elif KIND == "segfault":
        ctypes.string_at(0)


def main() -> None:
    run = worker.attach()
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=30))
    is_faulty = run.rank == WHERE and KIND != "none"
    weights = torch.zeros(8)
    for step, batch in enumerate(batches(is_faulty), 1):
        run.phase("training", step - 1)
        if is_faulty and step == AT:
            disturb(weights)
        gradient = weights - batch[0]
        loss = float((gradient**2).mean())
        run.record(step, loss=loss)
        dist.all_reduce(gradient)
        weights -= 0.1 * gradient / run.world_size
        if loss != loss or loss > 1e30:
            run.flush()
            raise FloatingPointError(f"the loss of step {step} is {loss}")
        time.sleep(0.02)
    run.finished(STEPS)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
