"""Terms: which node is the head of a job. A term is a file in the run folder that only one node can create.

The first term is that of node 0. A node that has lost the head node claims the next term, and so does a head node that
has lost other nodes. The filesystem lets one node succeed, and the other nodes follow. So two halves of a job that do
not reach each other never both continue.
"""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import msgspec

from launch.agent.node import Node
from launch.runs.files import has_written, numbers_in
from launch.runs.folder import RunFolder

ROOM_POLL_S = 2.0
WITHOUT_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS)
"""Errors of filesystems that have no hard links, such as some object stores. A folder is created in place of a link."""


class Term(msgspec.Struct, frozen=True):
    """One term: the head node, and the place of the agents' store there."""

    head: int
    address: str
    port: int
    token: str
    """Secret of this start of the job, with which its agents sign their messages. The same in all terms."""
    number: int = 0
    lost: tuple[tuple[int, str], ...] = ()
    """Index of each node that is lost, and the reason. These nodes take no further part in this job."""


def newest_term(folder: RunFolder, job: str) -> Term | None:
    """Return the newest term of the start of the job that is named ``job``; None before the first term."""
    place = folder.path / ".launch"
    # An NFS client reads the list of a folder anew, but may look up a single name in its cache.
    numbers = numbers_in(place, f"{job}.", ".json")
    return msgspec.json.decode(_file(folder, job, numbers[-1]).read_bytes(), type=Term) if numbers else None


def claim_term(folder: RunFolder, job: str, term: Term) -> bool:
    """Write the file of a term. Returns False if another node has already written that file.

    Waits while the filesystem is full.
    """
    file = _file(folder, job, term.number)
    own = file.with_name(f".{file.name}.{term.head}")
    while not has_written(own, msgspec.structs.asdict(term), mode=0o600):
        time.sleep(ROOM_POLL_S)
    try:
        os.link(own, file)
    except FileExistsError:
        return own.stat().st_nlink == 2  # NFS repeats a request that succeeded if the answer was lost.
    except OSError as error:
        if error.errno not in WITHOUT_LINKS:
            raise
        try:  # If this node dies between the two calls, no node begins another term.
            file.with_suffix(".claimed").mkdir()
        except FileExistsError:
            return False
        own.rename(file)
    finally:
        own.unlink(missing_ok=True)
    return True


def is_replaced(folder: RunFolder, node: Node) -> bool:
    """Return whether the newest term of the job belongs to another node."""
    term = newest_term(folder, node.job)
    return term is not None and term.head != node.index


def presence_file(folder: RunFolder, job: str, head: int, index: int) -> Path:
    """Return the file by which node ``index`` shows that it still runs, but has lost head node ``head``."""
    return folder.path / ".launch" / f"{job}.without-{head}.{index}"


def _file(folder: RunFolder, job: str, number: int) -> Path:
    return folder.path / ".launch" / f"{job}.{number}.json"
