"""The manifest of a checkpoint: the size and checksum of every file, and the run and step it belongs to.

Owns ``manifest.json`` and the check of a file against it. torch's own loaders accept a flipped bit silently, so this
is the protection. Torch-free. Must not know who wrote the files.
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
"""Contents of a checkpoint of whole tensors by name; also those of a manifest that names none."""
DEEPSPEED = "deepspeed"
"""Kind of the contents that DeepSpeed writes."""


class DamagedError(Exception):
    """Damage of a checkpoint: names the file, and what is wrong with it."""


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint. ``meta`` is the caller's, plain JSON."""

    step: int
    world_size: int
    time: float
    """Unix time of the save, seconds."""
    meta: dict[str, Any]
    files: dict[str, FileSum]
    """Path in the folder -> size and checksum."""
    contents: dict[str, Any] = field(default_factory=lambda: dict(TENSORS))
    """Format of the files: its ``kind``, and the other keys of that kind."""


def sum_file(path: Path) -> FileSum:
    """Compute size and sha256 of a file in one reading, in bounded memory."""
    with path.open("rb") as file:
        return FileSum(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest of ``folder``, and sync it and the names in the folder to disk."""
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
        raise DamagedError(damage_or_raise(error, NAME)) from error
    return decode_manifest(raw, folder / NAME)


def decode_manifest(raw: bytes, path: Path) -> Manifest:
    """Decode and check the content of a manifest, which was read from ``path``.

    Raises:
        DamagedError: it is not byte for byte what was written.
        RuntimeError: it is sound, but of another version of this program.
    """
    try:
        value = json.loads(raw)
        # Encoded again and compared byte for byte: a flipped bit anywhere shows, also in a key or a space.
        if _encode({key: entry for key, entry in value.items() if key != "sha256"}) != raw:
            raise DamagedError(f"{NAME} has a wrong checksum")
    except (ValueError, AttributeError) as error:
        raise DamagedError(f"{NAME} is not a manifest ({error})") from error
    if value["format"] != FORMAT:  # sound, so no DamagedError: the checkpoint must not be set aside
        raise RuntimeError(f"{path} has format {value['format']}, and this program reads {FORMAT}")
    files = {name: FileSum(**entry) for name, entry in value["files"].items()}
    contents = value.get("contents", TENSORS)
    return Manifest(value["step"], value["world_size"], value["time"], value["meta"], files, contents)


def find_damage(path: Path, expected: FileSum) -> str | None:
    """Compare a file with its entry in the manifest; returns the damage, or None where there is none.

    Raises:
        OSError: the filesystem refused for a reason that says nothing about the file.
    """
    try:
        found = sum_file(path)
    except OSError as error:
        return damage_or_raise(error, path.name)
    return compare(path.name, found, expected)


def compare(name: str, found: FileSum, expected: FileSum) -> str | None:
    """Return what is wrong with a file that has the sum ``found``; None where it is the one that was saved."""
    if found.size != expected.size:
        return f"{name} has {found.size} bytes instead of {expected.size}"
    return None if found == expected else f"{name} has a wrong checksum"


def sync_folder(path: Path) -> None:
    """Sync the names in a folder to disk; some network filesystems cannot, and need not."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _encode(body: dict[str, Any]) -> bytes:
    """Encode a manifest as JSON with a checksum of the rest, so that the file protects itself, too."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=1) + "\n").encode()


def damage_or_raise(error: OSError, name: str) -> str:
    """Name the damage behind an error; raises the error again where it may go away (stale handle, memory, rights)."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return f"{name} is missing"
    if error.errno == errno.EIO:  # the disk does not give the bytes back, now or later
        return f"{name} cannot be read back from the disk"
    raise error
