"""Files of a run folder: JSON that is replaced as a whole, and JSON lines that are appended.

Owns what makes them safe against crashes and second writers. Standard library only. Must not know what they say.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any


def append_json_line(path: Path, value: Mapping[str, Any]) -> None:
    """Append ``value`` as one line. Several processes and hosts may append to the same file."""
    append_json_lines(path, [value])


def append_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append each of ``values`` as one line, all in one write.

    O_APPEND is not atomic on NFS, so the file is locked around the write. A line torn by a crash is closed first, so
    that it spoils itself only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        torn = b""
        if size:
            file.seek(size - 1)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + b"".join(json.dumps(value).encode() + b"\n" for value in values))


def open_to_append(path: Path) -> int:
    """Open a file of lines for its only writer; a line torn by a crash is closed first. Returns the descriptor."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        os.write(descriptor, b"\n")
    return descriptor


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a JSONL file; a line torn by a crash is passed over. No file: nothing."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that a reader, or a crash, sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a file; empty where there is no such file, or something else in it."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}
