"""Checkpoints: saved whole or not at all, verified before they are loaded, loadable on any number of ranks.

This module has the folders of checkpoints and their manifests: sizes and checksums of files, commit, retention,
deletion. ``manager`` saves and loads the checkpoints of a run. A save uses ``formats`` (the files), ``part`` (what this
rank writes) and ``writer`` (the process that writes it). This module, ``target`` and ``upkeep`` import no torch,
because the login node uses them.
"""

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
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Descriptions of saves and of a loaded checkpoint, for the training loop.


@dataclass(frozen=True)
class Votes:
    """Status of the save in flight on one rank, as numbers. Each training step sums them over all ranks."""

    phase: int = 0
    """Number of the phase to which ``figures`` belong, counted over all saves; 0 if no save is in flight. A save has
    two phases: all ranks write, then rank 0 commits."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Name -> number. While a save is in flight, ``done`` is 1 if this rank has completed its work of the phase, and
    ``failed`` is 1 if its work has failed; otherwise they are 0. The names are the same on all ranks."""


@dataclass(frozen=True)
class Saved:
    """Outcome of a save: the checkpoint is committed."""

    step: int
    write_s: float
    """Seconds from the start of the save to its commit. Training waited for only a part of this time."""
    in_memory: bool
    """True if the checkpoint is in the memory of the nodes, False if it is on disk."""


@dataclass(frozen=True)
class FailedSave:
    """Outcome of a try of a save: it failed. A save to disk is tried again; a save to memory is given up."""

    step: int
    cause: str
    """``rank N: ERROR`` of the lowest rank that failed."""
    failures: int
    """For a save to disk: number of failed tries since the last commit to disk. For a save to memory: 1."""
    in_memory: bool
    """True for a save to the memory of the nodes, False for a save to disk."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Description of a loaded checkpoint. Its tensors are in the argument of ``CheckpointManager.load``."""

    step: int
    meta: dict[str, Any]
    """``Manifest.meta`` of the checkpoint."""
    world_size: int
    """Number of ranks that saved the checkpoint."""
    rank_state: dict[str, Any] | None
    """State of this rank alone, such as that of its random generators, as it was saved. None if the number of ranks has
    changed."""
    set_aside: tuple[str, ...] = ()
    """One line, with name and damage, for each damaged checkpoint that the load found before this one. Those on disk
    were renamed. Damaged copies in ``checkpoint.copy_to`` also have a line."""
    is_from_memory: bool = False
    """True if the checkpoint was loaded from the memory of the nodes."""
    fetched_for: str | None = None
    """If the checkpoint is a copy that was fetched from ``checkpoint.copy_to``: the reason why none on the disk was
    loaded. None if the checkpoint was on the disk or in memory."""
    memory_damage: str | None = None
    """Damage of the checkpoints in the memory of the nodes, as text. For a checkpoint from disk this is the
    reason why none in memory was loaded. For a checkpoint from memory it names the damaged parts, whose other copies
    were loaded. None if no part was damaged, or if the run keeps no checkpoints in memory."""


# The manifest of a checkpoint: the size and checksum of every file, and its run and step.


NAME = "manifest.json"
FORMAT = 1
TENSORS = {"kind": "tensors"}
"""Value of ``Manifest.contents`` for a checkpoint in the default format: its files have whole tensors by name."""
DEEPSPEED = "deepspeed"
"""Value of the key ``kind`` in ``Manifest.contents`` for a checkpoint in DeepSpeed's own files."""


class DamagedError(Exception):
    """A checkpoint is damaged. The message names the file and its damage."""


@dataclass(frozen=True)
class FileSum:
    """Size in bytes and sha256 of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Content of ``manifest.json`` of a checkpoint."""

    step: int
    world_size: int
    """Number of ranks that saved the checkpoint."""
    time: float
    """Unix time of the save, in seconds."""
    meta: dict[str, Any]
    """State of the run that the caller of the save stores with the tensors, as plain JSON: config, position in the
    data."""
    files: dict[str, FileSum]
    """Path in the folder of the checkpoint -> size and checksum."""
    contents: dict[str, Any] = field(default_factory=lambda: dict(TENSORS))
    """Contents of the files. The key ``kind`` has the format: ``tensors`` (whole tensors by name, the default) or
    ``deepspeed`` (DeepSpeed's own files). For ``deepspeed``, further keys have the settings of DeepSpeed on which the
    sharding depends; for ``tensors``, there are none."""


def sum_file(path: Path) -> FileSum:
    """Return size and sha256 of a file. The file is read in pieces, never whole into memory."""
    with path.open("rb") as file:
        return FileSum(os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest())


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write ``manifest.json`` into ``folder``, and sync the file and the folder to disk."""
    with (folder / NAME).open("wb") as file:
        file.write(_encode({"format": FORMAT, **dataclasses.asdict(manifest)}))
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of the checkpoint in ``folder``, verify its own checksum, and return it.

    Raises:
        DamagedError: the manifest is missing, or some byte differs from the saved one.
        RuntimeError: the manifest is undamaged, but of another version of this program.
    """
    try:
        raw = (folder / NAME).read_bytes()
    except OSError as error:
        raise DamagedError(damage_or_raise(error, NAME)) from error
    return decode_manifest(raw, folder / NAME)


def decode_manifest(raw: bytes, path: Path) -> Manifest:
    """Decode the bytes of a manifest, verify its own checksum, and return it. ``path`` is named in errors.

    Raises:
        DamagedError: some byte differs from the saved one.
        RuntimeError: the manifest is undamaged, but of another version of this program.
    """
    try:
        value = json.loads(raw)
        # Encoding it again and comparing each byte finds a flipped bit anywhere, also in a key or a space.
        if _encode({key: entry for key, entry in value.items() if key != "sha256"}) != raw:
            raise DamagedError(f"{NAME} has a wrong checksum")
    except (ValueError, AttributeError) as error:
        raise DamagedError(f"{NAME} is not a manifest ({error})") from error
    if value["format"] != FORMAT:  # sound, so no DamagedError: the checkpoint must not be set aside
        raise RuntimeError(f"{path} has format {value['format']}, and this program reads {FORMAT}")
    files = {name: FileSum(**entry) for name, entry in value["files"].items()}
    return Manifest(value["step"], value["world_size"], value["time"], value["meta"], files, value["contents"])


def find_damage(path: Path, expected: FileSum) -> str | None:
    """Return the damage of the file at ``path`` as text; None if its size and checksum are as ``expected``.

    Raises:
        OSError: the file cannot be read, for a reason that may be temporary.
    """
    try:
        found = sum_file(path)
    except OSError as error:
        return damage_or_raise(error, path.name)
    return find_difference(path.name, found, expected)


def find_difference(name: str, found: FileSum, expected: FileSum) -> str | None:
    """Return text on how the size or checksum ``found`` of the file ``name`` differs from ``expected``; None if both
    are equal."""
    if found.size != expected.size:
        return f"{name} has {found.size} bytes instead of {expected.size}"
    return None if found == expected else f"{name} has a wrong checksum"


def sync_folder(path: Path) -> None:
    """Sync the list of names in a folder to disk, so that new and renamed files survive a power failure. Do nothing if
    the filesystem does not support this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def _encode(body: dict[str, Any]) -> bytes:
    """Return a manifest as JSON. The key ``sha256`` is the checksum of all other keys; it shows damage of the manifest
    itself."""
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return (json.dumps(body | {"sha256": digest}, indent=1) + "\n").encode()


def damage_or_raise(error: OSError, name: str) -> str:
    """Return the damage of a file as text if ``error`` shows damage: the file is missing, or the disk cannot return its
    bytes. Raise ``error`` again if it has another cause, which may be temporary. ``error`` was raised when the file
    ``name`` was read."""
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
# - ``.converting_step_00000100_<token>``: a conversion to whole tensors, deleted when it has been read.
# - ``.fetching_step_00000100_<token>``: being fetched from a copy elsewhere.


log = logging.getLogger(__name__)

COMMITTED = re.compile(r"step_(\d{8,})")
SET_ASIDE = re.compile(r"step_\d{8,}\.corrupt(\.\d+)?")
VALIDATION_LOSS = "val_loss"
"""Key of the validation loss, nats per token, in ``Manifest.meta``. Only checkpoints of evaluated steps have it."""
LEFT_OVER = re.compile(r"\.(saving|deleting|converting|fetching)_step_\d{8,}_[0-9a-f]{8}")


@dataclass(frozen=True)
class Retention:
    """Rule for the checkpoints to keep: the ``last`` newest, and the ``best`` by validation loss."""

    last: int | None
    """Number of the newest checkpoints to keep; None keeps all."""
    best: int = 0
    """Number of checkpoints with the lowest validation loss to keep. Only checkpoints of evaluated steps count."""

    def with_more(self, more: int) -> Retention:
        """Return a rule with ``last`` larger by ``more``, which may be negative. The new ``last`` is at least 1; a
        ``last`` of None stays None."""
        return self if self.last is None else dataclasses.replace(self, last=max(1, self.last + more))


def list_committed(folder: Path) -> list[Path]:
    """Return the folders of committed checkpoints (``step_00000100``) in ``folder``, by ascending step; an empty list
    if ``folder`` does not exist."""
    return sorted((path for path in _entries(folder) if COMMITTED.fullmatch(path.name)), key=step_of)


def steps(folder: Path) -> list[int]:
    """Return the steps that have a committed checkpoint in ``folder``, ascending. A checkpoint without a manifest does
    not count."""
    return [step_of(path) for path in list_committed(folder) if (path / NAME).is_file()]


def list_set_aside(folder: Path) -> list[Path]:
    """Return the folders of damaged checkpoints in ``folder``: those that a load or the upkeep has renamed to
    ``.corrupt``. Empty if there are none."""
    return [path for path in _entries(folder) if SET_ASIDE.fullmatch(path.name)]


def step_of(path: Path) -> int:
    """Return the step in the name of the folder of a committed checkpoint."""
    match = COMMITTED.fullmatch(path.name)
    assert match, path
    return int(match[1])


def begin(temporary: Path, step: int) -> None:
    """Create the folder ``temporary``, in which the checkpoint of ``step`` is written.

    First, delete the temporary folders of killed saves. If the final folder of the step exists and has no manifest,
    rename it to ``NAME.corrupt``, as ``set_aside`` does.

    Raises:
        FileExistsError: the step already has a checkpoint.
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
    """Return True if the step has a committed checkpoint in ``folder``."""
    return (final_for(folder, step) / NAME).is_file()


def begin_temporary(folder: Path, what: str, step: int) -> Path:
    """Create an empty folder in ``folder``, for work on the checkpoint of a step, and return its path.

    ``what`` names the work: ``converting`` or ``fetching``.
    """
    # A token of its own: a process of an earlier attempt never writes into the same folder.
    temporary = folder / f".{what}_{final_for(folder, step).name}_{secrets.token_hex(4)}"
    temporary.mkdir(parents=True)
    return temporary


def commit(temporary: Path, step: int) -> Path:
    """Commit a save: rename its folder, which already has the manifest, to its final name. Return the new path."""
    final = final_for(temporary.parent, step)
    temporary.rename(final)
    try:
        sync_folder(final.parent)
    except OSError as error:  # the folder has its final name even so; a second try would find the checkpoint
        log.warning("%s may not outlive a power cut: %s", final, error)
    return final


def set_aside(path: Path, why: str) -> None:
    """Rename the folder of a damaged checkpoint to ``NAME.corrupt``, which no load reads. Log a warning with the
    damage ``why``."""
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
    """Return the steps whose checkpoints a rule keeps.

    Args:
        saved: all steps that have a checkpoint, ascending.
        keeps: the rule.
        read: returns the manifest of a step. Called only if the rule uses validation losses. A checkpoint whose
            manifest is damaged or cannot be read has no validation loss.
    """
    if keeps.last is None:
        return set(saved)
    losses = []
    for step in saved if keeps.best else ():
        try:
            loss = read(step).meta.get(VALIDATION_LOSS)
        except (DamagedError, OSError, RuntimeError):
            continue  # no load uses such a checkpoint either
        if isinstance(loss, float) and math.isfinite(loss):
            losses.append((loss, -step))  # of equal losses the newest step
    best = [-step for _, step in sorted(losses)[: keeps.best]]
    return {*saved[-keeps.last :], *best}


def retire(folder: Path, keeps: Retention, spared: Set[int] = frozenset()) -> None:
    """Delete the checkpoints in ``folder`` that the rule ``keeps`` does not keep, except those of the steps ``spared``.
    Log a warning for a checkpoint that cannot be deleted."""
    saved = steps(folder)
    kept = spared | kept_steps(saved, keeps, lambda step: read_manifest(final_for(folder, step)))
    for step in saved:
        if step not in kept:
            try:
                _delete(final_for(folder, step))
            except OSError as error:
                log.warning("%s cannot be deleted yet: %s", final_for(folder, step), error)


def discard_after(folder: Path, step: int) -> None:
    """Delete the checkpoints in ``folder`` of all steps after ``step``. The run continues from ``step``."""
    for path in list_committed(folder):
        if step_of(path) > step:
            _delete(path)


def _delete(path: Path) -> None:
    # The name is removed first: a half-deleted folder is never taken for a checkpoint.
    doomed = path.with_name(f".deleting_{path.name}_{secrets.token_hex(4)}")
    path.rename(doomed)
    remove_folder(doomed)


def sweep(folder: Path, keep: Path | None = None) -> None:
    """Delete the temporary folders in ``folder`` that killed processes have left. The folder ``keep`` is not deleted;
    with None all are deleted."""
    for path in _entries(folder):
        if LEFT_OVER.fullmatch(path.name) and path != keep:
            remove_folder(path)


def remove_folder(path: Path) -> None:
    """Delete a folder with its files. Log a warning if this fails; the next ``sweep`` tries again."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        log.warning("%s cannot be removed yet: %s", path, error)


def final_for(folder: Path, step: int) -> Path:
    """Return the path that the checkpoint of a step has in ``folder`` after its commit."""
    return folder / f"step_{step:08d}"


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []
