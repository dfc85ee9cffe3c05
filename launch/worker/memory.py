"""In-memory checkpoints: the memory store of a node, the client of a rank, and the messages between the two.

    python -m gpt_launch launch.worker.memory AGENT          a store, started by the agent AGENT; ends with this agent

Ranks send their own part of a checkpoint to the store of their node and to that of another node. While ranks restart, a
store keeps the last checkpoint that all ranks have agreed on. A store also contains the checkpoint that is being sent.
The files are in anonymous memory, so nothing is left behind when the processes of a node are killed.

Both ends first prove that they know the secret of the stores. Messages are JSON, signed and numbered; bytes after a
message have a SHA-256 sum. Nothing is unpickled. A file is cut into chunks, so that each byte is hashed once, for all
stores that receive it. Standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from ..runs.process import become_helper

STORE = "LAUNCH_MEMORY_STORE"
"""Environment variable of the ranks: ``address:port`` of the memory store of their node."""
SECRET = "LAUNCH_MEMORY_SECRET"
"""Environment variable of the ranks: the secret of this job's memory stores, derived from the job's token."""
CHUNK = 1 << 22
"""Number of bytes that are sent, hashed and read at a time."""
TIMEOUT_S = 60.0
"""Longest wait in seconds of a rank for bytes from a store, which may hash whole files before it answers. A store waits
as long for the handshake of a rank."""
LONGEST_MESSAGE = 1 << 26
NONCE = 32
MAC = 32


class StoreError(ConnectionError):
    """Raised if a store cannot do a request, or the other process does not know the secret of the stores."""


@dataclass(frozen=True)
class Place:
    """Network address of a memory store."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def own_store() -> tuple[Place, str] | None:
    """Return the memory store of this rank's node, and the secret of all stores; None if the agent runs no store."""
    place, secret = os.environ.get(STORE), os.environ.get(SECRET)
    if not place or not secret:
        return None
    host, _, port = place.rpartition(":")
    return Place(host, int(port)), secret


# The messages.


class Channel:
    """One end of a connection between a rank and a store. Both prove that they know the same secret.

    ``is_store`` is True at the store's end.

    Raises:
        StoreError: the other process does not know the secret.
    """

    def __init__(self, connection: socket.socket, secret: str, is_store: bool) -> None:
        self._connection = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key, nonce = secret.encode(), secrets.token_bytes(NONCE)
        # The rank proves first that it knows the secret: a stranger receives only a random number.
        if is_store:
            connection.sendall(nonce)
            nonces = bytes(nonce + self._take(NONCE))
            _compare(self._take(MAC), _sign(key, b"rank", nonces))
            connection.sendall(_sign(key, b"store", nonces))
        else:
            nonces = bytes(self._take(NONCE) + nonce)
            connection.sendall(nonce + _sign(key, b"rank", nonces))
            _compare(self._take(MAC), _sign(key, b"store", nonces))
        session = _sign(key, b"session", nonces)
        self._keys = [_sign(session, name, b"") for name in ((b"store", b"rank") if is_store else (b"rank", b"store"))]
        self._counts = [0, 0]

    def send(self, message: Mapping[str, Any], payload: bytes | memoryview = b"", digest: str = "") -> None:
        """Send a message, and bytes after it.

        Args:
            message: object of plain JSON values.
            payload: bytes to send after the message, at most ``CHUNK``.
            digest: SHA-256 of ``payload`` in hexadecimal digits; empty to compute it here.
        """
        size = memoryview(payload).nbytes
        if size:
            about = {"size": size, "sha256": digest or hashlib.sha256(payload).hexdigest()}
            message = {**message, "payload": about}
        text = json.dumps(message).encode()
        self._connection.sendall(struct.pack(">I", len(text)) + self._mac(0, text) + text)
        if size:
            self._connection.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytearray]:
        """Return the next message and the bytes after it. The SHA-256 of the bytes is in the message as ``sha256``.

        Raises:
            StoreError: the message or the bytes were changed on the way.
            EOFError: the other end has closed the connection.
        """
        (length,) = struct.unpack(">I", self._take(4))
        if length > LONGEST_MESSAGE:
            raise StoreError(f"a message of {length} bytes")
        mac, text = self._take(MAC), self._take(length)
        _compare(mac, self._mac(1, text))
        message: dict[str, Any] = json.loads(text)
        about = message.pop("payload", None)
        if about is None:
            return message, bytearray()
        if about["size"] > CHUNK:
            raise StoreError(f"a payload of {about['size']} bytes")
        payload = self._take(about["size"])
        if hashlib.sha256(payload).hexdigest() != about["sha256"]:
            raise StoreError("the bytes are not those that were sent")
        return {**message, "sha256": about["sha256"]}, payload

    def close(self) -> None:
        self._connection.close()

    def _mac(self, direction: int, text: bytes | bytearray) -> bytes:
        self._counts[direction] += 1
        return _sign(self._keys[direction], struct.pack(">Q", self._counts[direction]), text)

    def _take(self, size: int) -> bytearray:
        taken = bytearray(size)
        view = memoryview(taken)
        while view:
            count = self._connection.recv_into(view)
            if not count:
                raise EOFError("the other end has closed the connection")
            view = view[count:]
        return taken


def _sign(key: bytes, purpose: bytes, content: bytes | bytearray) -> bytes:
    return hmac.new(key, purpose + b"\0" + content, hashlib.sha256).digest()


def _compare(found: bytes | bytearray, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise StoreError("the other end does not know the token of this run")


# The rank's side.


class StoreClient:
    """Connection of a rank to one memory store, for the duration of a ``with`` block.

    Raises:
        OSError: no store answers, or the other end does not know the secret.
    """

    def __init__(self, place: Place, secret: str) -> None:
        self.place = place
        connection = socket.create_connection((place.host, place.port), timeout=TIMEOUT_S)
        try:
            self._channel = Channel(connection, secret, is_store=False)
        except BaseException as error:
            connection.close()
            if isinstance(error, EOFError):
                raise StoreError(f"the memory store at {place} refuses this rank: another token") from error
            raise

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and return the answer.

        ``op`` is the name of a method of ``Store``, with its ``arguments``.

        Raises:
            StoreError: the store cannot do the request; the message says why.
        """
        self._send({"op": op, **arguments})
        return self._answer()[0]

    def append(self, payload: bytes | memoryview, digest: str, **arguments: Any) -> None:
        """Send a chunk of a file without waiting for an answer.

        If the store refuses the chunk, the next call that waits for an answer raises StoreError.

        Args:
            payload: the chunk, at most ``CHUNK`` bytes.
            digest: SHA-256 of the chunk in hexadecimal digits.
            arguments: ``save``, ``rank`` and ``name`` of the file.
        """
        self._send({"op": "append", **arguments}, payload, digest)

    def read_all(self, save: str, rank: int, name: str, size: int) -> bytes:
        """Return the content of a rank's file in the checkpoint ``save``. ``size`` is its number of bytes.

        Raises StoreError if the store cannot read the file.
        """
        parts = []
        for at in range(0, size, CHUNK):
            part = {"offset": at, "size": min(CHUNK, size - at)}
            self._send({"op": "read", "save": save, "rank": rank, "name": name, **part})
            parts.append(self._answer()[1])
        return b"".join(parts)

    def _send(self, message: Mapping[str, Any], payload: bytes | memoryview = b"", digest: str = "") -> None:
        try:
            self._channel.send(message, payload, digest)
        except (BrokenPipeError, ConnectionResetError):
            self._answer()  # The answer has the reason for which the store has closed the connection.
            raise

    def _answer(self) -> tuple[dict[str, Any], bytearray]:
        try:
            answer, payload = self._channel.receive()
        except EOFError as error:
            raise StoreError(f"the memory store at {self.place} is gone") from error
        if "error" in answer:
            raise StoreError(f"the memory store at {self.place}: {answer['error']}")
        return answer, payload


class Upload:
    """A file that is written in pieces, and sent to several stores at once.

    Args:
        stores: clients of the stores. Each has sent the request ``begin`` for ``rank`` and ``save``.
        save: name of the checkpoint.
        rank: rank that owns the file.
        name: name of the file.
    """

    def __init__(self, stores: Sequence[StoreClient], save: str, rank: int, name: str) -> None:
        self._stores = stores
        self._where = {"save": save, "rank": rank, "name": name}
        self._pending = bytearray()
        self.size = 0

    def write(self, data: Any) -> int:
        """Append ``data``, and send each chunk as soon as it is complete. Returns the number of bytes in ``data``."""
        view = memoryview(data).cast("B")
        length = view.nbytes
        self.size += length
        while view:
            piece = view[: CHUNK - len(self._pending)]
            view = view[len(piece) :]
            if len(piece) == CHUNK:  # without a copy
                self._send(piece)
                continue
            self._pending += piece
            if len(self._pending) == CHUNK:
                self.end()
        return length

    def tell(self) -> int:
        return self.size

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def end(self) -> None:
        """Send the last chunk of the file, which may be empty. Does not wait for an answer.

        The caller then sends the request ``finish``. Its answer shows that the stores have received the file.
        """
        self._send(memoryview(self._pending))
        self._pending = bytearray()

    def _send(self, piece: memoryview) -> None:
        digest = hashlib.sha256(piece).hexdigest()
        for store in self._stores:
            store.append(piece, digest, **self._where)


# The store.


NICENESS = 10
"""Niceness of the store's process, so that the store uses only CPU time that ranks leave."""
BACKLOG = 4096
REQUESTS = ("begin", "finish", "commit", "keep", "inventory", "verify")


class StoredFile:
    """A file of a checkpoint in anonymous memory of the store, to which chunks are appended."""

    def __init__(self) -> None:
        self._descriptor = os.memfd_create("memory_checkpoint")
        self._sums = hashlib.sha256()
        self.size = 0

    def append(self, content: bytearray, digest: str) -> None:
        view = memoryview(content)
        while view:
            view = view[os.write(self._descriptor, view) :]
        self._sums.update(bytes.fromhex(digest))
        self.size += len(content)

    def read(self, offset: int, size: int) -> bytes:
        return os.pread(self._descriptor, min(size, CHUNK), offset)

    def is_damaged(self) -> bool:
        """Return whether the file has changed since it was received."""
        sums = hashlib.sha256()
        for offset in range(0, self.size, CHUNK):
            sums.update(hashlib.sha256(self.read(offset, CHUNK)).digest())
        return sums.digest() != self._sums.digest()

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass
class StoredSave:
    """Parts of one checkpoint that the store has received."""

    step: int
    world_size: int
    is_committed: bool = False
    """True if all ranks have agreed that the checkpoint is complete."""
    parts: dict[int, dict[str, StoredFile]] = field(default_factory=dict)
    """Rank -> file name -> file."""


class Store:
    """Content of a memory store, with a method for each request of a rank."""

    def __init__(self) -> None:
        self._saves: dict[str, StoredSave] = {}
        self._lock = threading.RLock()

    def begin(self, save: str, rank: int, step: int, world_size: int) -> None:
        """Begin an empty part of ``rank`` in the checkpoint ``save`` of step ``step``, made by ``world_size`` ranks.

        All other checkpoints that are not committed are dropped.
        """
        with self._lock:
            self._drop([name for name, held in self._saves.items() if name != save and not held.is_committed])
            held = self._saves.setdefault(save, StoredSave(step, world_size))
            for former in held.parts.get(rank, {}).values():
                former.close()
            held.parts[rank] = {}

    def append(self, save: str, rank: int, name: str, content: bytearray, digest: str) -> None:
        """Append a chunk to a file; the first chunk creates the file. ``digest`` is the SHA-256 of the chunk.

        Raises StoreError if the store has no part of ``rank`` in the checkpoint ``save``.
        """
        with self._lock:
            files = self._part(save, rank)
            if name not in files:
                files[name] = StoredFile()
        files[name].append(content, digest)

    def finish(self, save: str, rank: int) -> None:
        """Answer a rank that has sent all chunks of its files, so that the rank knows that the store has received them.

        Raises StoreError if the store has no part of ``rank`` in the checkpoint ``save``.
        """
        with self._lock:
            self._part(save, rank)

    def commit(self, save: str) -> None:
        """Mark the checkpoint ``save`` as committed, because all ranks have agreed on it, and drop all others.

        Each rank sends this request, but only the first request has an effect. A later request must not drop the next
        checkpoint, which other ranks may already send.
        """
        with self._lock:
            held = self._saves.get(save)
            if held is not None and not held.is_committed:
                held.is_committed = True
                self.keep(save)

    def keep(self, save: str) -> None:
        """Drop all checkpoints except ``save``."""
        with self._lock:
            self._drop(self._saves.keys() - {save})

    def inventory(self) -> dict[str, Any]:
        """Return ``{"saves": list}``, with the name, step, world size and parts of each committed checkpoint.

        A part is a pair: the rank, and file name -> size in bytes.
        """
        with self._lock:
            saves = []
            for name, held in self._saves.items():
                if held.is_committed:
                    parts = [
                        [rank, {f: file.size for f, file in held.parts[rank].items()}] for rank in sorted(held.parts)
                    ]
                    about = {"save": name, "step": held.step, "world_size": held.world_size}
                    saves.append({**about, "parts": parts})
            return {"saves": saves}

    def verify(self, save: str, rank: int) -> dict[str, Any]:
        """Return ``{"damaged": names}``: the files of a rank in the checkpoint ``save`` whose checksum is wrong.

        Raises StoreError if the store has no part of ``rank`` in ``save``.
        """
        with self._lock:
            files = dict(self._part(save, rank))
        return {"damaged": [name for name, file in sorted(files.items()) if file.is_damaged()]}

    def read(self, save: str, rank: int, name: str, offset: int, size: int) -> bytes:
        with self._lock:
            file = self._part(save, rank)[name]
        return file.read(offset, size)

    def _part(self, save: str, rank: int) -> dict[str, StoredFile]:
        if save not in self._saves or rank not in self._saves[save].parts:
            raise StoreError(f"no part of rank {rank} in this save")
        return self._saves[save].parts[rank]

    def _drop(self, names: Collection[str]) -> None:
        for name in names:
            for files in self._saves.pop(name).parts.values():
                for file in files.values():
                    file.close()


def answer_rank(store: Store, channel: Channel) -> None:
    """Answer the requests of one rank until the rank closes the connection or a request fails."""
    while True:
        message, content = channel.receive()
        op, digest = message.pop("op"), message.pop("sha256", "")
        try:
            if op == "append":
                store.append(content=content, digest=digest, **message)
            elif op == "read":
                channel.send({}, store.read(**message))
            elif op in REQUESTS:
                channel.send(getattr(store, op)(**message) or {})
            else:
                raise StoreError(f"no request {op!r}")
        except (OSError, TypeError, KeyError) as error:
            channel.send({"error": str(error)})
            return


def serve_ranks(store: Store, listener: socket.socket, secret: str) -> None:
    """Accept connections without end, each in a thread of its own.

    The thread answers a rank that knows the secret, and closes every other connection.
    """

    def meet(connection: socket.socket) -> None:
        with suppress(OSError, EOFError, ValueError), connection:
            connection.settimeout(TIMEOUT_S)  # A stranger who sends nothing must not block the thread.
            channel = Channel(connection, secret, is_store=True)
            connection.settimeout(None)  # A rank is silent while it computes; the kernel reports a rank that has died.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            answer_rank(store, channel)

    while True:
        connection, _ = listener.accept()
        threading.Thread(target=meet, args=(connection,), daemon=True).start()


def main() -> None:
    """Start a store, print its port, and serve ranks until the agent closes standard input or dies.

    Standard input has one line of JSON: the address to listen on, and the secret.
    """
    become_helper(int(sys.argv[1]))
    os.nice(NICENESS)
    address, secret = json.loads(sys.stdin.readline())  # Not in the command line, which every user can read.
    with socket.create_server((address, 0), backlog=BACKLOG) as listener:
        print(listener.getsockname()[1], flush=True)
        threading.Thread(target=serve_ranks, args=(Store(), listener, secret), daemon=True).start()
        sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
