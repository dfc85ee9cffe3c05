"""Torch's store as the agents of a job use it: open on one address, and believed only where a message is signed.

A store serves whoever reaches its port, and tells all its keys to whoever asks for them. So it listens on the one
address that the job uses, and what agents tell each other is signed (HMAC-SHA256) with the job's token, which lies in
a file that only the owner of the run can read. What is not signed so is passed over. Must not know what is said.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import socket
from collections.abc import Sequence
from datetime import timedelta

import torch.distributed as dist

BACKLOG = 4096
"""Connections that may wait to be accepted: all agents, or ranks, of a large job come at the same time."""


def new_token() -> str:
    """Draw the token of a job."""
    return secrets.token_hex(32)


def derive(token: str, purpose: str) -> str:
    """Derive a name from the token that nobody else can tell, and that does not give the token away."""
    return hmac.new(token.encode(), purpose.encode(), hashlib.sha256).hexdigest()[:32]


def open_store(address: str, timeout: timedelta) -> dist.TCPStore:
    """Open a store on a free port of ``address`` alone: torch's own choice is every address of the machine."""
    server = socket.create_server((address, 0), backlog=BACKLOG)
    port = server.getsockname()[1]
    return dist.TCPStore(
        address, port, is_master=True, wait_for_workers=False, timeout=timeout, master_listen_fd=server.detach()
    )


class SignedStore:
    """Messages of agents in a store, each under a key with one writer.

    Args:
        store: where they lie.
        token: of the job.
        name: of this use of the store; a message is worth nothing under another name or key.
    """

    def __init__(self, store: dist.Store, token: str, name: str) -> None:
        self._store = dist.PrefixStore(derive(token, f"keys of {name}"), store)
        self._secret = derive(token, f"messages of {name}").encode()
        self.foreign = ""
        """Key of a value that was passed over, as it is not signed; empty where there was none."""

    def set(self, key: str, message: str) -> None:
        """Leave a message."""
        self._store.set(key, self._sign(key, message.encode()) + message)

    def read(self, keys: Sequence[str]) -> list[str | None]:
        """Read the messages of ``keys``; None for those that nobody of this job has left.

        Does not wait: where one of the keys is missing, all are None.
        """
        if not keys or not self._store.check(list(keys)):
            return [None] * len(keys)
        return [self._verify(key, value) for key, value in zip(keys, self._store.multi_get(list(keys)), strict=True)]

    def open_keys(self, keys: Sequence[str]) -> None:
        """Make keys under which nothing is said yet, where they are missing: a stranger can delete them, too."""
        if self._store.check(list(keys)):
            return
        for key in keys:
            self._store.compare_set(key, "", "")  # in one: what comes meanwhile is not overwritten

    def _sign(self, key: str, message: bytes) -> str:
        return hmac.new(self._secret, key.encode() + b"\0" + message, hashlib.sha256).hexdigest()

    def _verify(self, key: str, value: bytes) -> str | None:
        if not value:
            return None
        signature, message = value[:64], value[64:]
        if hmac.compare_digest(signature, self._sign(key, message).encode()):
            return message.decode()
        self.foreign = key
        return None
