"""The memory store of a node: a process beside the agent that keeps checkpoints in memory while ranks restart.

    python -m gpt_launch launch.worker.memory_store AGENT          started by the agent; ends with it

Ranks send their own part of a checkpoint to the store of their node and to that of another node. The files are in
anonymous memory, so nothing is left behind when the node's processes are killed. The store keeps one checkpoint that
all ranks have agreed on, and the one that is being sent. It listens on the address that the job uses, and answers only
clients that know the job's token. Torch-free.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from launch.process import die_with_parent
from launch.worker.memory import CHUNK, SECRET, STORE, TIMEOUT_S, Channel, FileSums, StoreError

NICENESS = 10
"""The store gets what the ranks leave of the CPUs."""
BACKLOG = 4096
CLOSING_S = 5.0
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that ask a job to save and leave; the store leaves with its agent."""


class StoredFile:
    """A file in memory."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("memory_checkpoint")
        self._sums = FileSums()
        self.size = 0
        self.sum = ""
        """Sum of the file as it was sent; empty until it is whole."""

    def append(self, content: bytearray, digest: str) -> None:
        """Append a chunk whose sum was checked."""
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._sums.note(digest)
        self.size += len(content)

    def end(self, size: int, total: str) -> None:
        """Take note that the file is whole.

        Raises:
            StoreError: it is not that of the rank.
        """
        if (self.size, self._sums.total()) != (size, total):
            raise StoreError("a file that is not the one that was sent")
        self.sum = total

    def read(self, offset: int, size: int) -> bytes:
        """Read a part."""
        return os.pread(self._descriptor, min(size, CHUNK), offset)

    def is_sound(self) -> bool:
        """Read all of it, and compare it with its sum."""
        sums = FileSums()
        for offset in range(0, self.size, CHUNK):
            sums.add(self.read(offset, CHUNK))
        return bool(self.sum) and sums.total() == self.sum

    def close(self) -> None:
        """Give the memory back."""
        os.close(self._descriptor)


@dataclass
class StoredSave:
    """A checkpoint, as far as this store holds it."""

    step: int
    world_size: int
    is_committed: bool = False
    """True once all ranks have agreed that all parts are where they belong."""
    parts: dict[int, dict[str, StoredFile]] = field(default_factory=dict)
    """Rank -> name -> file."""
    whole: set[int] = field(default_factory=set)
    """Ranks whose part is complete."""


class Store:
    """Contents of a memory store, with a method for each request that it answers."""

    def __init__(self) -> None:
        self._saves: dict[str, StoredSave] = {}
        self._lock = threading.Lock()

    def begin(self, save: str, rank: int, step: int, world_size: int) -> dict[str, Any]:
        """Begin the part of a rank. Of saves that were never agreed on there is one at most, the newest."""
        with self._lock:
            self._drop({name for name, held in self._saves.items() if name != save and not held.is_committed})
            held = self._saves.setdefault(save, StoredSave(step, world_size))
            for former in held.parts.pop(rank, {}).values():
                former.close()
            held.whole.discard(rank)
            held.parts[rank] = {}
        return {}

    def append(self, save: str, rank: int, name: str, content: bytearray, digest: str) -> None:
        """Append a chunk to a file, which is made where it is the first."""
        with self._lock:
            files = self._part(save, rank)
            if name not in files:
                files[name] = StoredFile()
            file = files[name]
        file.append(content, digest)

    def end(self, save: str, rank: int, name: str, size: int, total: str) -> dict[str, Any]:
        """Note that a file is whole."""
        with self._lock:
            self._part(save, rank).setdefault(name, StoredFile()).end(size, total)
        return {}

    def finish(self, save: str, rank: int) -> dict[str, Any]:
        """Note that the part of a rank is whole."""
        with self._lock:
            if not all(file.sum for file in self._part(save, rank).values()):
                raise StoreError(f"the part of rank {rank} is not whole")
            self._saves[save].whole.add(rank)
        return {}

    def commit(self, save: str) -> dict[str, Any]:
        """Note that all ranks have agreed on a save, which takes the place of all others.

        Each rank says so, and only the first time it counts: by the last one others may be sending the next.
        """
        with self._lock:
            held = self._saves.get(save)
            if held is None or held.is_committed:
                return {}
            held.is_committed = True
            self._drop(self._saves.keys() - {save})
        return {}

    def keep(self, save: str) -> dict[str, Any]:
        """Give back the memory of all saves but one; of that too if there is none of that name."""
        with self._lock:
            self._drop(self._saves.keys() - {save})
        return {}

    def inventory(self) -> dict[str, Any]:
        """Tell what is held: whole parts of saves that were agreed on."""
        with self._lock:
            return {
                "saves": [
                    {
                        "save": name,
                        "step": held.step,
                        "world_size": held.world_size,
                        "parts": [
                            [rank, {file: at.size for file, at in held.parts[rank].items()}]
                            for rank in sorted(held.whole)
                        ],
                    }
                    for name, held in self._saves.items()
                    if held.is_committed
                ]
            }

    def verify(self, save: str, rank: int) -> dict[str, Any]:
        """Read the part of a rank, and name the files that are not what was sent."""
        with self._lock:
            files = dict(self._part(save, rank))
        return {"damaged": sorted(name for name, file in files.items() if not file.is_sound())}

    def read(self, save: str, rank: int, name: str, offset: int, size: int) -> bytes:
        """Read a part of a file."""
        with self._lock:
            file = self._part(save, rank).get(name)
        if file is None:
            raise StoreError(f"rank {rank} has no file {name}")
        return file.read(offset, size)

    def _part(self, save: str, rank: int) -> dict[str, StoredFile]:
        if save not in self._saves or rank not in self._saves[save].parts:
            raise StoreError(f"no part of rank {rank} in this save")
        return self._saves[save].parts[rank]

    def _drop(self, names: set[str]) -> None:
        for name in names:
            for files in self._saves.pop(name).parts.values():
                for file in files.values():
                    file.close()


REQUESTS = ("begin", "end", "finish", "commit", "keep", "inventory", "verify")


def answer(store: Store, channel: Channel) -> None:
    """Do what one rank asks for, until it hangs up, or something cannot be done."""
    while True:
        message, content = channel.receive()
        op, digest = message.pop("op"), message.pop("sha256", "")
        try:
            if op == "append":
                store.append(content=content, digest=digest, **message)
            elif op == "read":
                channel.send({}, store.read(**message))
            elif op in REQUESTS:
                channel.send(getattr(store, op)(**message))
            else:
                raise StoreError(f"no request {op!r}")
        except (StoreError, OSError, TypeError) as error:
            channel.send({"error": str(error)})
            return


def serve(store: Store, listener: socket.socket, secret: str) -> None:
    """Answer all ranks that know the secret, each in a thread."""

    def meet(connection: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError, ValueError), connection:
            connection.settimeout(TIMEOUT_S)  # also of a stranger, who says nothing
            channel = Channel(connection, secret, is_store=True)
            connection.settimeout(None)  # a rank that computes; the kernel tells where it has died
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            answer(store, channel)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=meet, args=(connection,), daemon=True).start()


def main() -> None:
    """Serve until the agent closes standard input, or dies."""
    die_with_parent(int(sys.argv[1]))
    for number in IGNORED:
        signal.signal(number, signal.SIG_IGN)
    os.nice(NICENESS)
    told = json.loads(sys.stdin.readline())  # not by the command line, which everybody can read
    with socket.create_server((told["address"], 0), backlog=BACKLOG) as listener:
        print(listener.getsockname()[1], flush=True)
        threading.Thread(target=serve, args=(Store(), listener, told["secret"]), daemon=True).start()
        sys.stdin.read()
    os._exit(0)


class MemoryStore:
    """The memory store of this agent, for the length of a ``with`` block. Started when it is first requested."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._place = ""

    def __enter__(self) -> MemoryStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def environment(self, address: str, secret: str) -> Mapping[str, str]:
        """Return what ranks have to know of the store, which listens on ``address``; one that has died is replaced.

        A store that cannot be started is told on standard error, and the ranks do without.
        """
        if self._process is None or self._process.poll() is not None:
            self._start(address, secret)
        return {STORE: self._place, SECRET: secret}

    def close(self) -> None:
        """End the store; what it holds is gone."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None and process.stdout is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        try:
            process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()

    def _start(self, address: str, secret: str) -> None:
        self.close()
        words = [sys.executable, "-m", "gpt_launch", "launch.worker.memory_store", str(os.getpid())]
        process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._process = process
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(json.dumps({"address": address, "secret": secret}) + "\n")
            process.stdin.flush()
            port = process.stdout.readline().strip()
        except OSError:
            port = ""
        self._place = f"{address}:{port}" if port else ""
        if not port:
            print("launch: no checkpoints in memory: the memory store does not start", file=sys.stderr)
            self.close()


if __name__ == "__main__":
    main()
