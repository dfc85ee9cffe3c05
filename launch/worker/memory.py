"""In-memory checkpoints as a rank sees them: its connection to the memory stores that the agents keep beside the ranks.

Both ends first prove that they know the run's token. Messages are JSON, signed and numbered; bytes after a message have
a SHA-256 sum. Nothing is unpickled. A file is cut into chunks, and its sum is that of the sums of its chunks, so
that each byte is hashed once, however many stores receive it. Standard library only.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

STORE = "LAUNCH_MEMORY_STORE"
"""Variable of an agent's ranks: ``address:port`` of the memory store of their node."""
SECRET = "LAUNCH_MEMORY_SECRET"
"""Variable of an agent's ranks: the secret of the memory stores of this job, derived from its token."""
CHUNK = 1 << 22
"""Bytes that are sent, hashed and read at a time."""
TIMEOUT_S = 60.0
"""Longest silence of the other end, which also hashes what it is asked to verify."""
LONGEST_MESSAGE = 1 << 26
NONCE = 32
MAC = 32


class StoreError(ConnectionError):
    """A memory store does not do what it is asked to, or the other end does not know the run's token."""


@dataclass(frozen=True)
class Place:
    """Address of a memory store."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


def own_store(environment: Mapping[str, str] = os.environ) -> tuple[Place, str] | None:
    """Return the memory store of this rank's node, and the secret of all of them; None where no agent keeps one."""
    told, secret = environment.get(STORE), environment.get(SECRET)
    if not told or not secret:
        return None
    host, _, port = told.rpartition(":")
    return Place(host, int(port)), secret


class Channel:
    """One end of a connection between two processes that know the same secret.

    Raises:
        StoreError: the other end does not.
    """

    def __init__(self, connection: socket.socket, secret: str, is_store: bool) -> None:
        self._connection = connection
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        key = secret.encode()
        mine = secrets.token_bytes(NONCE)
        # The rank proves itself first: a stranger who asks learns nothing but a random number.
        if is_store:
            connection.sendall(mine)
            theirs = self._take(NONCE)
            nonces = mine + theirs
            _demand(self._take(MAC), _sign(key, b"rank", nonces))
            connection.sendall(_sign(key, b"store", nonces))
        else:
            nonces = self._take(NONCE) + mine
            connection.sendall(mine + _sign(key, b"rank", nonces))
            _demand(self._take(MAC), _sign(key, b"store", nonces))
        session = _sign(key, b"session", nonces)
        self._keys = [_sign(session, name, b"") for name in ((b"store", b"rank") if is_store else (b"rank", b"store"))]
        self._counts = [0, 0]

    def send(self, message: Mapping[str, Any], payload: bytes | memoryview = b"", digest: str = "") -> None:
        """Send a message, and bytes after it.

        Args:
            message: plain JSON.
            payload: the bytes.
            digest: their SHA-256, where it is known already.
        """
        size = memoryview(payload).nbytes
        if size:
            told = {"size": size, "sha256": digest or hashlib.sha256(payload).hexdigest()}
            message = {**message, "payload": told}
        text = json.dumps(message).encode()
        mac = self._mac(0, text)
        self._connection.sendall(struct.pack(">I", len(text)) + mac + text)
        if size:
            self._connection.sendall(payload)

    def receive(self) -> tuple[dict[str, Any], bytearray]:
        """Receive a message, and the bytes after it, both as they were sent.

        Raises:
            StoreError: they are not.
            EOFError: the other end has closed the connection.
        """
        (length,) = struct.unpack(">I", self._take(4))
        if length > LONGEST_MESSAGE:
            raise StoreError(f"a message of {length} bytes")
        mac, text = self._take(MAC), self._take(length)
        _demand(mac, self._mac(1, text))
        message = json.loads(text)
        told = message.pop("payload", None)
        if told is None:
            return message, bytearray()
        if told["size"] > CHUNK:
            raise StoreError(f"a payload of {told['size']} bytes")
        payload = self._take_payload(told["size"])
        if hashlib.sha256(payload).hexdigest() != told["sha256"]:
            raise StoreError("bytes that are not those that were sent")
        return {**message, "sha256": told["sha256"]}, payload

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()

    def _mac(self, direction: int, text: bytes) -> bytes:
        self._counts[direction] += 1
        return _sign(self._keys[direction], struct.pack(">Q", self._counts[direction]), text)

    def _take(self, size: int) -> bytes:
        return bytes(self._take_payload(size))

    def _take_payload(self, size: int) -> bytearray:
        taken = bytearray(size)
        view = memoryview(taken)
        while view:
            count = self._connection.recv_into(view)
            if not count:
                raise EOFError("the other end has closed the connection")
            view = view[count:]
        return taken


class StoreClient:
    """A rank's line to one memory store, for the length of a ``with`` block.

    Raises:
        OSError: nobody answers there, or the other end does not know the secret.
    """

    def __init__(self, place: Place, secret: str) -> None:
        self.place = place
        connection = socket.create_connection((place.host, place.port), timeout=TIMEOUT_S)
        try:
            self._channel = Channel(connection, secret, is_store=False)
        except EOFError as error:
            connection.close()
            raise StoreError(f"the memory store at {place} refuses this rank: another token") from error
        except BaseException:
            connection.close()
            raise

    def __enter__(self) -> StoreClient:
        return self

    def __exit__(self, *args: object) -> None:
        self._channel.close()

    def ask(self, op: str, **arguments: Any) -> dict[str, Any]:
        """Have something done, and return the answer.

        Raises:
            StoreError: it cannot be done; the message says why.
        """
        return self._ask(op, arguments)[0]

    def tell(self, op: str, payload: bytes | memoryview, digest: str, **arguments: Any) -> None:
        """Send bytes and wait for no answer: what goes wrong with them is heard with the next one."""
        try:
            self._channel.send({"op": op, **arguments}, payload, digest)
        except (BrokenPipeError, ConnectionResetError):
            self._answer()  # it says why it has hung up
            raise

    def read(self, save: str, rank: int, name: str, offset: int, size: int) -> bytearray:
        """Read a part of a file, of at most ``CHUNK`` bytes; it comes as it lies there, or not at all."""
        where = {"save": save, "rank": rank, "name": name, "offset": offset, "size": size}
        return self._ask("read", where)[1]

    def read_all(self, save: str, rank: int, name: str, size: int) -> bytes:
        """Read a whole file of ``size`` bytes."""
        parts = [self.read(save, rank, name, at, min(CHUNK, size - at)) for at in range(0, size, CHUNK)]
        return b"".join(parts)

    def _ask(self, op: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], bytearray]:
        self._channel.send({"op": op, **arguments})
        return self._answer()

    def _answer(self) -> tuple[dict[str, Any], bytearray]:
        try:
            answer, payload = self._channel.receive()
        except EOFError as error:
            raise StoreError(f"the memory store at {self.place} is gone") from error
        if "error" in answer:
            raise StoreError(f"the memory store at {self.place}: {answer['error']}")
        return answer, payload


class Upload:
    """A file on its way into several stores at once; written from its beginning to its end.

    Args:
        stores: lines to them, on each of which the part of ``rank`` in ``save`` was begun.
        save: of the checkpoint.
        rank: whose part the file belongs to.
        name: of the file.
    """

    def __init__(self, stores: Sequence[StoreClient], save: str, rank: int, name: str) -> None:
        self._stores = stores
        self._where = {"save": save, "rank": rank, "name": name}
        self._pending = bytearray()
        self._sums = FileSums()
        self.size = 0

    def write(self, data: Any) -> int:
        """Send ``data``, in whole chunks as they come together; returns its bytes."""
        view = memoryview(data).cast("B")
        length = view.nbytes
        self.size += length
        while view:
            piece = view[: CHUNK - len(self._pending)]
            view = view[len(piece) :]
            if len(piece) == CHUNK:  # sent from where it lies
                self._send(piece)
                continue
            self._pending += piece
            if len(self._pending) == CHUNK:
                self._flush()
        return length

    def tell(self) -> int:
        """Return the bytes written so far."""
        return self.size

    def flush(self) -> None:
        """Do nothing: chunks are sent whole."""

    def close(self) -> None:
        """Send the rest."""

    def end(self) -> None:
        """Send the rest, and tell the stores that the file is whole, with its sum."""
        self._flush()
        for store in self._stores:
            store.ask("end", **self._where, size=self.size, total=self._sums.total())

    def _flush(self) -> None:
        if self._pending:
            self._send(memoryview(self._pending))
            self._pending = bytearray()

    def _send(self, piece: memoryview) -> None:
        digest = self._sums.add(piece)
        for store in self._stores:
            store.tell("append", piece, digest, **self._where)


class FileSums:
    """Sum of a file: the SHA-256 of the SHA-256 sums of its chunks."""

    def __init__(self) -> None:
        self._total = hashlib.sha256()

    def add(self, chunk: bytes | memoryview) -> str:
        """Add the next chunk; returns its own sum."""
        digest = hashlib.sha256(chunk)
        self.note(digest.hexdigest())
        return digest.hexdigest()

    def note(self, digest: str) -> None:
        """Add the next chunk by its sum."""
        self._total.update(bytes.fromhex(digest))

    def total(self) -> str:
        """Return the sum of the file so far."""
        return self._total.hexdigest()


def _sign(key: bytes, purpose: bytes, content: bytes) -> bytes:
    return hmac.new(key, purpose + b"\0" + content, hashlib.sha256).digest()


def _demand(found: bytes, expected: bytes) -> None:
    if not hmac.compare_digest(found, expected):
        raise StoreError("the other end does not know the token of this run")
