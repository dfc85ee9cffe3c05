"""The manifest of a checkpoint: the size and checksum of every file, and what the checkpoint is of.

Owns ``manifest.json`` and the judgement whether a file is what it was. torch's own loaders accept a flipped bit without
a word, so this is what protects. Torch-free. Must not know who wrote the files.
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NAME = "manifest.json"
FORMAT = 1
TENSORS = {"kind": "tensors"}
"""Contents of a checkpoint: whole tensors by name. Those that do not say are such."""
DEEPSPEED = "deepspeed"
"""The kind of contents that DeepSpeed writes."""


class DamagedError(Exception):
    """A checkpoint is not what was saved; says which file and why."""


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """All that a checkpoint must contain. ``meta`` is the caller's, plain JSON."""

    step: int
    world_size: int
    time: float
    """Unix time of the save, seconds."""
    meta: dict[str, Any]
    files: dict[str, FileSum]
    """By path in the folder."""
    contents: dict[str, Any] = field(default_factory=lambda: dict(TENSORS))
    """What the files are: ``kind``, and what that kind of files has to say."""


def sum_file(path: Path) -> FileSum:
    """Read a file once, in bounded memory."""
    with path.open("rb") as file:
        return FileSum(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of ``folder`` and make everything in the folder last."""
    with (folder / NAME).open("wb") as file:
        file.write(_encode({"format": FORMAT, **dataclasses.asdict(manifest)}))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of ``folder``.

    Raises:
        DamagedError: it is missing, or not byte for byte what was written.
        RuntimeError: it is sound, but of another version of this program.
    """
    try:
        raw = (folder / NAME).read_bytes()
    except OSError as error:
        raise DamagedError(_damage_or_raise(error, NAME)) from error
    try:
        value = json.loads(raw)
        if _encode({key: entry for key, entry in value.items() if key != "sha256"}) != raw:
            raise DamagedError(f"{NAME} has a wrong checksum")
    except (ValueError, AttributeError) as error:
        raise DamagedError(f"{NAME} is not a manifest ({error})") from error
    if value["format"] != FORMAT:
        raise RuntimeError(f"{folder / NAME} has format {value['format']}, and this program reads {FORMAT}")
    files = {name: FileSum(**entry) for name, entry in value["files"].items()}
    contents = value.get("contents", TENSORS)
    return Manifest(value["step"], value["world_size"], value["time"], value["meta"], files, contents)


def find_damage(path: Path, expected: FileSum) -> str | None:
    """What is wrong with a file, by its entry in the manifest; None where nothing is.

    Raises:
        OSError: the filesystem refused for a reason that says nothing about the file.
    """
    try:
        found = sum_file(path)
    except OSError as error:
        return _damage_or_raise(error, path.name)
    if found.size != expected.size:
        return f"{path.name} has {found.size} bytes instead of {expected.size}"
    return None if found == expected else f"{path.name} has a wrong checksum"


def sync_folder(path: Path) -> None:
    """Make the names in a folder last; some network filesystems cannot, and need not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _encode(body: dict[str, Any]) -> bytes:
    """The bytes of a manifest: JSON with a checksum of the rest, so that the file also protects itself."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=1) + "\n").encode()


def _damage_or_raise(error: OSError, name: str) -> str:
    """The damage an error stands for; raised again where it may go away (a stale handle, no memory, no rights)."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return f"{name} is missing"
    if error.errno == errno.EIO:
        return f"{name} cannot be read back from the disk"
    raise error
