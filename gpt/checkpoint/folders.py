"""Checkpoint folders and their manifests: sizes and checksums of files, commit, retention, deletion. Torch-free."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# A loaded checkpoint, as it is described to the training.


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Description of a loaded checkpoint; its tensors are in the state that was passed to ``load``."""

    step: int
    meta: dict[str, Any]
    world_size: int
    rank_state: dict[str, Any] | None
    """State that this rank saved for itself; None if the number of ranks has changed."""
    set_aside: tuple[str, ...] = ()
    """Newer checkpoints that were damaged, a line with name and reason for each."""
    is_from_memory: bool = False
    """True if it was loaded from the memory of the nodes."""
    fetched_for: str | None = None
    """Reason why it was fetched from a copy elsewhere; None if it was not."""
    memory_damage: str | None = None
    """Reason why memory gave no checkpoint, or another copy of a part; None if there is none, or no memory is used."""


# The manifest of a checkpoint: the size and checksum of every file, and the run and step it belongs to.


NAME = "manifest.json"
FORMAT = 1
TENSORS = {"kind": "tensors"}
"""Contents of a checkpoint of whole tensors by name; also those of a manifest without this key."""
DEEPSPEED = "deepspeed"
"""Kind of the contents that DeepSpeed writes."""


class DamagedError(Exception):
    """Damage of a checkpoint: the message names the file and its fault."""


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of a checkpoint. ``meta`` is the caller's plain JSON."""

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
        DamagedError: it is missing, or some byte differs from the saved one.
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
        DamagedError: some byte differs from the saved one.
        RuntimeError: it is sound, but of another version of this program.
    """
    try:
        value = json.loads(raw)
        # Encoded again and compared byte for byte: this finds a flipped bit anywhere, also in a key or a space.
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
    """Compare a file with its entry in the manifest; return the damage, None if there is none.

    Raises:
        OSError: the filesystem refused for a reason that says nothing about the file.
    """
    try:
        found = sum_file(path)
    except OSError as error:
        return damage_or_raise(error, path.name)
    return find_difference(path.name, found, expected)


def find_difference(name: str, found: FileSum, expected: FileSum) -> str | None:
    """Return the fault of a file that has the sum ``found``; None if it is the saved file."""
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
    """Name the damage behind an error; raise the error again if it may disappear (stale handle, memory, rights)."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        return f"{name} is missing"
    if error.errno == errno.EIO:  # the disk cannot return the bytes, now or later
        return f"{name} cannot be read back from the disk"
    raise error


# Life of checkpoint folders: ``step_00000100`` is begun, committed, set aside, deleted. Called on one rank.
#
# - ``.saving_step_00000100_<token>``: being written, or the rest of a killed save.
# - ``step_00000100``: complete; the rename that gives it this name is the commit.
# - ``step_00000100.corrupt``: found damaged; never deleted and never read again.
# - ``.deleting_step_00000100_<token>``: no longer kept, or the rest of a killed deletion.
# - ``.converting_step_00000100_<token>``: a copy in another form, for the time of reading.
# - ``.fetching_step_00000100_<token>``: being fetched from a copy elsewhere.


log = logging.getLogger(__name__)

COMMITTED = re.compile(r"step_(\d{8,})")
SET_ASIDE = re.compile(r"step_\d{8,}\.corrupt(\.\d+)?")
VALIDATION_LOSS = "val_loss"
"""Key in a manifest's ``meta`` of the loss that was measured in the step of the save."""
LEFT_OVER = re.compile(r"\.(saving|deleting|converting|fetching)_step_\d{8,}_[0-9a-f]{8}")


@dataclass(frozen=True)
class Retention:
    """Checkpoints that are kept."""

    last: int
    """Number of the newest checkpoints."""
    every: int = 0
    """Steps that are multiples of this are kept for good; 0 keeps none."""
    best: int = 0
    """Number of the checkpoints with the lowest validation loss, if it was measured in the step of the save."""


def list_committed(folder: Path) -> list[Path]:
    """List the folders that have a step's name, oldest first."""
    return sorted((path for path in _entries(folder) if COMMITTED.fullmatch(path.name)), key=step_of)


def steps(folder: Path) -> list[int]:
    """List the steps that have a checkpoint, ascending; without its manifest a checkpoint does not exist."""
    return [step_of(path) for path in list_committed(folder) if (path / NAME).is_file()]


def is_empty(folder: Path) -> bool:
    """Tell whether no checkpoint was ever begun in the folder, or none of its content is left."""
    return not _entries(folder)


def list_set_aside(folder: Path) -> list[Path]:
    """List the checkpoints that were found damaged and set aside, now or in an earlier attempt."""
    return [path for path in _entries(folder) if SET_ASIDE.fullmatch(path.name)]


def step_of(path: Path) -> int:
    """Read the step in a committed folder's name."""
    match = COMMITTED.fullmatch(path.name)
    assert match, path
    return int(match[1])


def temporary_for(folder: Path, step: int, token: str) -> Path:
    """Name the folder that a checkpoint is written into; all its writers know the ``token``, 8 hexadecimal digits."""
    return folder / f".saving_{final_for(folder, step).name}_{token}"


def begin(temporary: Path, step: int) -> None:
    """Create the folder to write a checkpoint into, after removing what killed saves have left.

    Raises:
        FileExistsError: the step has its checkpoint already.
    """
    folder = temporary.parent
    sweep(folder, keep=temporary)
    final = final_for(folder, step)
    if is_committed(folder, step):
        raise FileExistsError(f"{final} is there already; a step is saved once")
    if final.exists():
        set_aside(final, f"{NAME} is missing")
    temporary.mkdir(parents=True, exist_ok=True)  # writers of other ranks may have begun


def is_committed(folder: Path, step: int) -> bool:
    """Tell whether a step has its checkpoint."""
    return (final_for(folder, step) / NAME).is_file()


def begin_temporary(folder: Path, what: str, step: int) -> Path:
    """Create an empty folder for work on a checkpoint, and return its path.

    ``what`` names the work: ``converting`` or ``fetching``.
    """
    # A token of its own: a process of an earlier attempt never writes into the same folder.
    temporary = folder / f".{what}_{final_for(folder, step).name}_{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, step: int) -> Path:
    """Give a finished folder, manifest included, its final name; return its path."""
    final = final_for(temporary.parent, step)
    temporary.rename(final)
    try:
        sync_folder(final.parent)
    except OSError as error:  # the folder has its name all the same; a second try would find the checkpoint
        log.warning("%s may not outlive a power cut: %s", final, error)
    return final


def set_aside(path: Path, why: str) -> None:
    """Move a damaged checkpoint out of the way and warn about it."""
    name, number = f"{path.name}.corrupt", 1
    while path.with_name(name).exists():
        number += 1
        name = f"{path.name}.corrupt.{number}"
    try:
        path.rename(path.with_name(name))
    except FileNotFoundError:
        return  # a process of an earlier attempt was faster
    log.warning("checkpoint %s is damaged (%s): set aside as %s", path, why, name)


def kept_steps(saved: list[int], keeps: Retention, read: Callable[[int], Manifest]) -> set[int]:
    """Choose the steps whose checkpoints are kept.

    Args:
        saved: steps that have a checkpoint, ascending.
        keeps: the checkpoints to keep.
        read: reads the manifest of a step; called only if validation losses decide.
    """
    kept = {*saved[-keeps.last :], *(step for step in saved if keeps.every and step % keeps.every == 0)}
    return kept | set(_best(saved, keeps.best, read) if keeps.best else ())


def retire(folder: Path, keeps: Retention, spared: Set[int] = frozenset()) -> None:
    """Delete all checkpoints but those that are kept, and those of ``spared`` steps."""
    saved = steps(folder)
    kept = spared | kept_steps(saved, keeps, lambda step: read_manifest(final_for(folder, step)))
    for step in saved:
        if step not in kept:
            try:
                _delete(final_for(folder, step))
            except OSError as error:
                log.warning("%s cannot be deleted yet: %s", final_for(folder, step), error)


def discard_after(folder: Path, step: int) -> None:
    """Delete the checkpoints of later steps: the run goes back, and will save those steps again."""
    for path in list_committed(folder):
        if step_of(path) > step:
            _delete(path)


def _delete(path: Path) -> None:
    # The name is removed first: a half-deleted folder is never taken for a checkpoint.
    doomed = path.with_name(f".deleting_{path.name}_{secrets.token_hex(4)}")
    path.rename(doomed)
    remove_folder(doomed)


def _best(saved: list[int], number: int, read: Callable[[int], Manifest]) -> list[int]:
    """Return the steps with the lowest validation loss among those evaluated; of equal ones the newest."""
    losses = []
    for step in saved:
        try:
            loss = read(step).meta.get(VALIDATION_LOSS)
        except (DamagedError, OSError, RuntimeError):
            continue  # no load takes it either
        if isinstance(loss, float) and math.isfinite(loss):
            losses.append((loss, -step))
    return [-step for _, step in sorted(losses)[:number]]


def sweep(folder: Path, keep: Path | None = None) -> None:
    """Remove the temporary folders of killed saves, deletions and conversions, except ``keep``."""
    for path in _entries(folder):
        if LEFT_OVER.fullmatch(path.name) and path != keep:
            remove_folder(path)


def remove_folder(path: Path) -> None:
    """Delete a folder; files that cannot be deleted now remain for the next sweep."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be removed yet: %s", path, error)


def final_for(folder: Path, step: int) -> Path:
    """Name the folder of a checkpoint that is complete."""
    return folder / f"step_{step:08d}"


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
