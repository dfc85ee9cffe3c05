"""Copies of checkpoints in an object store, or on another filesystem that fsspec supports, by a URL.

An object store cannot rename folders, so the manifest is written last and removed first: a copy without a manifest does
not count. Imports no torch, and fsspec only for a run with copies.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TypeVar

from gpt import checkpoint as folders
from gpt.checkpoint import (
    NAME,
    DamagedError,
    FileSum,
    Manifest,
    Retention,
    decode_manifest,
    find_damage,
    find_difference,
    kept_steps,
    read_manifest,
    sync_folder,
)
from gpt.config.optim import INSTALLS
from launch.errors import ConfigError
from launch.runs.events import SavedCheckpoint

SLICE = 1 << 22
ANSWER_S = 60.0
"""Longest time, in seconds, that ``check_target`` waits for the filesystem."""


class Target:
    """Copies of the checkpoints of one run, on another filesystem.

    Args:
        url: value of ``checkpoint.copy_to``.
        name: path below ``url`` for the copies of this run.

    Raises:
        ImportError: the package of the filesystem is not installed.
        ValueError: fsspec knows no such filesystem.
    """

    def __init__(self, url: str, name: str) -> None:
        import fsspec

        # An instance of its own: fsspec's cached instances would be shared with the process that this one was forked
        # from.
        self.fs, root = fsspec.core.url_to_fs(url, skip_instance_cache=True)
        self.root = f"{root.rstrip('/')}/{name}"
        self.url = f"{url.rstrip('/')}/{name}"

    def steps(self) -> list[int]:
        """Return the steps that have a complete copy, ascending."""
        return [step for step in self._begun() if self.fs.exists(self._file(step, NAME))]

    def manifest(self, step: int) -> Manifest:
        """Return the manifest of the copy of a step.

        Raises:
            DamagedError: the manifest is damaged, or is that of another step.
        """
        return self._decode(step, self.fs.cat_file(self._file(step, NAME)))

    def put(self, path: Path, may_commit: Callable[[], bool]) -> int | None:
        """Copy a checkpoint, its manifest last. Each file is verified before it is sent; after all files are sent, the
        sizes of the copies are compared with the manifest.

        Args:
            path: folder of the checkpoint.
            may_commit: called just before the manifest is written. If it returns False, the copy stays incomplete.

        Returns:
            The number of bytes of the copied files; 0 if this copy already exists; None if the checkpoint no longer
            exists.

        Raises:
            DamagedError: a file of the checkpoint is damaged.
            PermissionError: ``may_commit`` returned False.
            OSError: the size of a copy is wrong, or the filesystem failed.
        """
        step = folders.step_of(path)
        try:
            manifest, raw = read_manifest(path), (path / NAME).read_bytes()
            if self.fs.exists(self._file(step, NAME)):
                if self.fs.cat_file(self._file(step, NAME)) == raw:
                    return 0
                self.remove(step)  # the run made this step again
            for name, expected in manifest.files.items():
                if (damage := find_damage(path / name, expected)) is not None:
                    raise DamagedError(damage)
                place = self._file(step, name)
                self._make_folder(place.rsplit("/", 1)[0])
                self.fs.put_file(str(path / name), place)
        except (DamagedError, FileNotFoundError):
            if path.exists():
                raise
            return None
        self.fs.invalidate_cache()
        for name, expected in manifest.files.items():
            size = self.fs.info(self._file(step, name))["size"]
            if size != expected.size:
                raise OSError(f"{self.url}: {name} has {size} bytes there instead of {expected.size}")
        if not may_commit():
            raise PermissionError("a later attempt owns this run")
        self.fs.pipe_file(self._file(step, NAME), raw)
        return sum(entry.size for entry in manifest.files.values())

    def fetch(self, step: int, temporary: Path) -> None:
        """Copy the files of the copy of a step into the folder ``temporary``, sync them to disk, and verify them.

        Raises:
            DamagedError: some file is damaged.
        """
        raw = self.fs.cat_file(self._file(step, NAME))
        manifest = self._decode(step, raw)
        for name, expected in manifest.files.items():
            path = temporary / name
            path.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(self._file(step, name), str(path))
            with path.open("rb") as file:
                os.fsync(file.fileno())
            if (damage := find_damage(path, expected)) is not None:
                raise DamagedError(damage)
        (temporary / NAME).write_bytes(raw)
        sync_folder(temporary)

    def find_damage(self, step: int, told: Callable[[int], None]) -> tuple[str, ...] | None:
        """Read all files of the copy of a step, and compare them with its manifest.

        Args:
            step: step of the copy.
            told: called with the number of bytes that were read since the last call.

        Returns:
            One line for each damaged file, empty if there is none; None if the copy was deleted in the meantime.
        """
        try:
            manifest = self.manifest(step)
            found = []
            for name, expected in manifest.files.items():
                digest, size = hashlib.sha256(), 0
                with self.fs.open(self._file(step, name), "rb", block_size=SLICE) as stream:
                    while content := stream.read(SLICE):
                        told(len(content))
                        digest.update(content)
                        size += len(content)
                found.append(find_difference(name, FileSum(size, digest.hexdigest()), expected))
        except (DamagedError, FileNotFoundError) as error:
            return (str(error),) if self.fs.exists(self._file(step, NAME)) else None
        return tuple(damage for damage in found if damage is not None)

    def remove(self, step: int) -> None:
        """Delete the copy of a step, its manifest first."""
        folder = self._file(step)
        if self.fs.exists(f"{folder}/{NAME}"):
            self.fs.rm_file(f"{folder}/{NAME}")
        found = self.fs.find(folder, withdirs=True, detail=True)
        for place in sorted(found, reverse=True):  # one by one: a name with brackets would be taken for a pattern
            if found[place]["type"] != "directory":
                self.fs.rm_file(place)
        for place in sorted({*found, folder}, reverse=True):  # a folder comes after its content
            if place == folder or found[place]["type"] == "directory":
                self._remove_folder(place)

    def retire(self, keeps: Retention) -> None:
        """Delete the copies that the rule ``keeps`` does not keep, and incomplete copies."""
        kept = kept_steps(self.steps(), keeps, self.manifest)
        for step in self._begun():  # also unfinished copies, since only one copy is made at a time
            if step not in kept:
                self.remove(step)

    def discard_after(self, step: int) -> None:
        """Delete the copies of all steps after ``step``, also incomplete copies. The run continues from ``step``."""
        for later in self._begun():
            if later > step:
                self.remove(later)

    def probe(self) -> None:
        """Write, read and delete a small file in the folder of the copies, as a test.

        Raises:
            Exception: any error of the filesystem; OSError if it returns other bytes than were written.
        """
        place = f"{self.root}/.probe_{os.urandom(4).hex()}"
        self._make_folder(self.root)
        self.fs.pipe_file(place, b"probe")
        if self.fs.cat_file(place) != b"probe":
            raise OSError(f"{place} holds something else than was written")
        self.fs.rm_file(place)
        self._remove_folder(self.root)

    def _begun(self) -> list[int]:
        """Return the steps that have a complete or an incomplete copy, ascending."""
        self.fs.invalidate_cache()
        try:
            names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(folders.step_of(Path(name)) for name in names if folders.COMMITTED.fullmatch(name))

    @property
    def _has_folders(self) -> bool:
        """True if the filesystem has folders that must be made and can be deleted. An object store has none: only
        buckets, and names of objects that look like paths."""
        return self.url.partition("://")[0] not in INSTALLS

    def _make_folder(self, place: str) -> None:
        if self._has_folders:
            self.fs.makedirs(place, exist_ok=True)

    def _remove_folder(self, place: str) -> None:
        """Delete a folder if it is empty."""
        if self._has_folders:
            with contextlib.suppress(OSError):
                self.fs.rmdir(place)

    def _file(self, step: int, name: str = "") -> str:
        return f"{self.root}/{folders.final_for(Path(), step).name}/{name}".rstrip("/")

    def _decode(self, step: int, raw: bytes) -> Manifest:
        manifest = decode_manifest(raw, Path(NAME))
        outside = [name for name in manifest.files if name.startswith("/") or ".." in PurePosixPath(name).parts]
        if manifest.step != step or outside:
            raise DamagedError(
                f"{NAME} is that of step {manifest.step}, with the files {outside} outside of its folder"
            )
        return manifest


def target_of(url: str, run_folder: Path) -> Target:
    """Return the target for the copies of a run: a folder below ``url`` with the last two names of ``run_folder``.

    Raises:
        ImportError: the package of the filesystem is not installed.
        ValueError: fsspec knows no such filesystem.
    """
    return Target(url, f"{run_folder.parent.name}/{run_folder.name}")


T = TypeVar("T")


def start_aside(action: Callable[[], T]) -> Future[T]:
    """Start ``action`` in a thread. Return the future of its result. The process may end before the thread does."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # each library of a filesystem has its own errors
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def check_target(url: str, run_folder: Path) -> None:
    """Write, read and delete a small file at the place for a run's copies, as a test. Raise ConfigError if this fails,
    or takes longer than ``ANSWER_S`` seconds. ``url`` is the ``checkpoint.copy_to`` of the run."""
    probe = start_aside(lambda: target_of(url, run_folder).probe())
    wait([probe], ANSWER_S)
    failure = probe.exception() if probe.done() else TimeoutError(f"no answer in {ANSWER_S:.0f} s")
    if failure is None:
        return
    fix = "the address, network and credentials put right, or checkpoint.copy_to=null"
    if isinstance(failure, ImportError):
        fix = f"pip install {INSTALLS.get(url.partition('://')[0], 'the package that the message names')}"
    raise ConfigError(
        f"checkpoint.copy_to={url} cannot be written ({describe_error(failure)})",
        "a place that fsspec can reach from here, and credentials in the environment that may write there",
        fix,
    ) from failure


def describe_error(error: BaseException) -> str:
    """Return the type of an error, and the first line of its message, as one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def saved_checkpoints(folder: Path) -> Iterator[SavedCheckpoint]:
    """Yield descriptions of the checkpoints in ``folder``, newest first, then of damaged checkpoints that were
    renamed."""
    for path in reversed(folders.list_committed(folder)):
        yield checkpoint_at(path)
    for path in folders.list_set_aside(folder):
        yield SavedCheckpoint(path, None, 0, lambda told: ("set aside: a load found it damaged",))


def saved_copies(url: str | None, run_folder: Path) -> Iterator[SavedCheckpoint]:
    """Yield descriptions of the copies of a run's checkpoints, newest first. ``url`` is its ``checkpoint.copy_to``.

    Raises:
        ConfigError: ``url`` is None, or its filesystem cannot be used.
    """
    if url is None:
        raise ConfigError(
            f"--copies of {run_folder}, which makes none",
            "a run with checkpoint.copy_to",
            f"python -m launch.verify {run_folder}",
        )
    check_target(url, run_folder)
    target = target_of(url, run_folder)
    for step in reversed(target.steps()):
        try:
            size = sum(entry.size for entry in target.manifest(step).files.values())
        except DamagedError:
            size = 0
        path = folders.final_for(Path(target.url), step)  # for its name
        yield SavedCheckpoint(path, step, size, partial(target.find_damage, step))


def checkpoint_at(path: Path) -> SavedCheckpoint:
    """Return a description of the checkpoint in ``path``: step, size in bytes, and a function that verifies its files.
    The size is 0 if the manifest is damaged or of another version."""
    step = folders.step_of(path)
    try:
        manifest = read_manifest(path)
    except (DamagedError, RuntimeError) as error:
        damage = str(error)
        return SavedCheckpoint(path, step, 0, lambda told: damage_now(path, damage))
    size = sum(entry.size for entry in manifest.files.values())
    return SavedCheckpoint(path, step, size, lambda told: verify_folder(path, step, manifest, told))


def verify_folder(path: Path, step: int, manifest: Manifest, told: Callable[[int], None]) -> tuple[str, ...] | None:
    """Compare every file of a checkpoint with its manifest.

    Args:
        path: folder of the checkpoint.
        step: step in the folder's name.
        manifest: manifest of the checkpoint.
        told: called with the number of bytes that were read since the last call.

    Returns:
        One line for each damaged file, empty if there is none; None if the checkpoint was deleted in the meantime.
    """
    wrong = [] if manifest.step == step else [f"{NAME} is that of step {manifest.step}"]
    for name, entry in sorted(manifest.files.items()):
        damage = find_damage(path / name, entry)
        if damage is not None:
            wrong.append(damage)
        told(entry.size)
    return damage_now(path, *wrong) if wrong else ()


def damage_now(path: Path, *damage: str) -> tuple[str, ...] | None:
    """Return ``damage``, the damage that was found in the folder ``path``, if the folder still exists. Return None if
    not: the checkpoint was deleted while its files were read, and is not damaged."""
    return damage if path.exists() else None
