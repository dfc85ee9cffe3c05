"""Lines that a full filesystem did not take: kept in memory, in their order, by a process that must not end for them.

A rank, and the agent that watches it, go on without their event log: what it lacks is written as soon as there is room,
and told on standard error at the end where there never was. A command of the launcher must not: what it has done has to
stand in the event log, so there the error is raised. Owns which errors these are. Standard library only.
"""

from __future__ import annotations

import atexit
import errno
import json
import os
import sys
import threading
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from launch.runs.files import append_json_lines, write_json

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Errors of a filesystem that is full, over its quota, or that fails: they say nothing about what was to be written."""
KEPT = 10_000
"""Lines that are kept for one file; the oldest go first."""

_kept: dict[Path, deque[Mapping[str, Any]]] = {}
_lock = threading.Lock()
_keeps = False


def keep_unwritten() -> None:
    """From here on this process, an agent or a rank, keeps the lines that a full filesystem does not take."""
    global _keeps
    if not _keeps:
        _keeps = True
        atexit.register(tell_unwritten)


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append ``values`` as JSON lines, after those that are still kept for the same file.

    Raises:
        OSError: they cannot be written, and this process keeps none, or for a reason that is not among ``NO_ROOM``.
    """
    with _lock:
        waiting = _kept.get(path, deque(maxlen=KEPT))
        lines = [*waiting, *values]
        try:
            append_json_lines(path, lines)
        except OSError as error:
            if not _keeps or error.errno not in NO_ROOM:
                raise
            if path not in _kept:
                say(f"{path} cannot be written: {error.strerror}; what belongs there is kept until there is room")
            _kept[path] = deque(lines, maxlen=KEPT)
            return
        if _kept.pop(path, None) is not None:
            say(f"{path} is written again, {len(waiting)} lines late")


def has_written(path: Path, value: Any, mode: int = 0o666) -> bool:
    """Write a JSON file as ``write_json`` does; False where a full filesystem does not take it, to be tried again.

    Raises:
        OSError: for a reason that is not among ``NO_ROOM``.
    """
    try:
        write_json(path, value, mode)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return False
    return True


def unwritten(path: Path) -> list[dict[str, Any]]:
    """Lines of a file that this process still keeps, as a reader of the file will see them."""
    with _lock:
        return [json.loads(json.dumps(value)) for value in _kept.get(path, ())]


def write_unwritten() -> None:
    """Try again to write what is kept."""
    for path in list(_kept):
        append_lines(path, [])


def tell_unwritten() -> None:
    """Try a last time to write what is kept, and tell on standard error what could not be."""
    write_unwritten()
    for path, lines in _kept.items():
        for value in lines:
            say(f"not in {path}: {json.dumps(value)}")


def say(text: str) -> None:
    """Print on standard error, where it can be printed: the log that it leads to may be on the same full filesystem."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def is_full(folder: Path) -> bool:
    """Tell whether the filesystem of a folder has no room left, as far as it says: quotas it does not tell."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < FULL_BYTES


FULL_BYTES = 64 * 1024
"""Less is no room: not for the blocks of one small file."""
