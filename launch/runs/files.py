"""Files of a run folder: JSON that is replaced as a whole, and JSON lines that are appended."""

from __future__ import annotations

import atexit
import contextlib
import errno
import fcntl
import json
import os
import stat
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import IO, Any


class ReportFile(Enum):
    """Format of a report. ``tensorboard`` is a run in TensorBoard: Scaling for a sweep, Summary for a single run."""

    md = "md"
    csv = "csv"
    png = "png"
    svg = "svg"
    json = "json"
    html = "html"
    tensorboard = "tensorboard"


# Files of a run folder: JSON that is replaced as a whole, and JSON lines that are appended.


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Error numbers of a filesystem, or of its server, without file locks."""


def deny_others_writing() -> None:
    """Set the umask so that only the owner can write to files of this process and of its children.

    The permissions to read stay as the user set them. Call this function at the start of a command, because the umask
    is process-wide.
    """
    os.umask(os.umask(0o077) | 0o022)


def make_folder(path: Path) -> None:
    """Make a folder that only its owner can write to, even if a default ACL of its parent allows others to write."""
    path.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        path.chmod(mode & ~0o022)


def numbers_in(folder: Path, prefix: str = "", suffix: str = "") -> list[int]:
    """Return the numbers between ``prefix`` and ``suffix`` in the names of a folder's entries, ascending."""
    names = (path.name.removeprefix(prefix).removesuffix(suffix) for path in folder.glob(f"{prefix}*{suffix}"))
    return sorted(int(name) for name in names if name.isdigit())


def make_numbered(folder: Path) -> Path:
    """Make and return the next numbered folder in ``folder``: 0001, 0002, ... No two calls get the same number."""
    number = max(numbers_in(folder), default=0)
    while True:
        number += 1
        path = folder / f"{number:04d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path


def append_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append each of ``values`` as one line, all in one write. Several processes and hosts may append to one file.

    O_APPEND is not atomic on NFS, so the file is locked around the write. A filesystem without locks, such as Lustre
    mounted without ``flock``, has O_APPEND alone. A line torn by a crash is ended first, so that no new line is lost.
    """
    data = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        append_whole(file.fileno(), end_of_torn_line(file.fileno()) + data)


def append_whole(descriptor: int, data: bytes) -> None:
    """Append all of ``data`` to a file with no other writer, or nothing if a full disk takes only a part.

    A part that stayed in the file would be written a second time later, and its lines would count twice.

    Raises:
        OSError: ``data`` cannot be written.
    """
    size = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def open_to_append(path: Path) -> int:
    """Open a file of lines for its only writer and return the descriptor. Ends a line that a crash has torn."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    os.write(descriptor, end_of_torn_line(descriptor))
    return descriptor


def end_of_torn_line(descriptor: int) -> bytes:
    """Return the line break that a file lacks whose last line a crash has torn; else nothing."""
    size = os.fstat(descriptor).st_size
    return b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in the lines of a JSONL file, without torn lines. Yields nothing if the file does not exist."""
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from parse_json_lines(lines)


def parse_json_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the objects in the lines of a JSONL file; other lines are skipped."""
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that its content is always either the old content or all of ``data``, even after a crash.

    Args:
        path: path of the file; missing folders are made.
        data: the whole content.
        mode: permissions of the file from its creation, minus the umask; 0o600 if only the owner may read the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left behind by a killed process of the same number
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any, mode: int = 0o666) -> None:
    """Write ``value`` atomically as indented JSON. ``mode``: permissions of the file, minus the umask."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode(), mode)


def is_own(file: IO[bytes]) -> bool:
    """Return whether this user owns an open file, and no other user may write into it. For pickles, which are code."""
    found = os.fstat(file.fileno())
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def read_json(path: Path) -> dict[str, Any]:
    """Return the dictionary in a JSON file; empty if the file does not exist or contains anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# Lines that do not fit on a full filesystem. An agent or a rank keeps them in memory, in order, and continues.


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Error numbers of a filesystem that is full, over its quota, or failing. Other data would fail in the same way."""
KEPT = 10_000
"""Maximum number of lines kept for a file; the oldest lines are dropped first."""

_kept: dict[Path, deque[Mapping[str, Any]]] = {}
_lock = threading.Lock()
_keeps = False


def keep_unwritten() -> None:
    """From now on, keep lines of ``append_lines`` in memory while the filesystem is full. For agents and ranks."""
    global _keeps
    if not _keeps:
        _keeps = True
        atexit.register(tell_unwritten)


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append ``values`` as JSON lines, after the lines for the same file that are kept in memory.

    Raises:
        OSError: the lines cannot be written. If ``keep_unwritten`` was called, only for reasons not in ``NO_ROOM``.
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
    """Write a JSON file; return True if written, False if the filesystem is full.

    Raises:
        OSError: the reason is not in ``NO_ROOM``.
    """
    try:
        write_json(path, value, mode)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return False
    return True


def unwritten(path: Path) -> list[dict[str, Any]]:
    """Return the lines for a file that this process keeps in memory, oldest first, as parsed from JSON."""
    with _lock:
        return [json.loads(json.dumps(value)) for value in _kept.get(path, ())]


def write_unwritten() -> None:
    """Try again to write the lines that are kept in memory."""
    for path in list(_kept):
        append_lines(path, [])


def tell_unwritten() -> None:
    """Try a last time to write the kept lines; print the lines that cannot be written on standard error."""
    write_unwritten()
    for path, lines in _kept.items():
        for value in lines:
            say(f"not in {path}: {json.dumps(value)}")


def say(text: str) -> None:
    """Print ``text`` on standard error. Ignores errors, because the log may be on the same full filesystem."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def is_full(folder: Path) -> bool:
    """Return whether the filesystem of a folder is full; False if this cannot be read. Ignores quotas."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < FULL_BYTES


FULL_BYTES = 64 * 1024
"""Number of free bytes below which a filesystem counts as full. The blocks of a small file need as much."""
