"""Copies of checkpoints in an object store, or on any filesystem that fsspec reaches, by a URL.

A store has no renames, so the manifest is written last and removed first: a copy without a manifest does not count.
Torch-free. fsspec is loaded on first use, as a run without copies needs none.
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
"""Longest wait, in seconds, for a target's answer before a run is submitted."""


class Target:
    """Place of the copies of one run's checkpoints, on another filesystem.

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
        """List the steps that have a copy, ascending."""
        return [step for step in self._begun() if self.fs.exists(self._file(step, NAME))]

    def manifest(self, step: int) -> Manifest:
        """Read the manifest of the copy of the checkpoint of ``step``.

        Raises:
            DamagedError: some byte differs from the saved one, or the manifest is of another step.
        """
        return self._decode(step, self.fs.cat_file(self._file(step, NAME)))

    def put(self, path: Path, may_commit: Callable[[], bool]) -> int | None:
        """Copy a checkpoint to the target, its manifest last.

        Each file is compared with the manifest before it is sent; then the sizes at the target are compared.

        Args:
            path: folder of the checkpoint.
            may_commit: called just before the manifest is written; False leaves the manifest out.

        Returns:
            The bytes sent, 0 if the target already has this copy; None if the checkpoint no longer exists.

        Raises:
            DamagedError: a file differs from the saved one.
            PermissionError: ``may_commit`` returned False.
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
        """Fetch a copy into the folder ``temporary``, synced to disk and verified.

        Raises:
            DamagedError: some file differs from the saved one.
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
        """Read a whole copy, and return a line for each fault; None if the copy was deleted in the meantime.

        Args:
            step: step of the copy.
            told: called with the number of bytes that were read since the last call.
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
        """Delete the copies that the rule ``keeps`` does not keep, and unfinished copies."""
        kept = kept_steps(self.steps(), keeps, self.manifest)
        for step in self._begun():  # also unfinished copies, since only one copy is made at a time
            if step not in kept:
                self.remove(step)

    def discard_after(self, step: int) -> None:
        """Delete the copies of all steps after ``step``, because the run continues from ``step``."""
        for later in self._begun():
            if later > step:
                self.remove(later)

    def probe(self) -> None:
        """Write, read and delete a small file at the target; an error of the filesystem is raised."""
        place = f"{self.root}/.probe_{os.urandom(4).hex()}"
        self._make_folder(self.root)
        self.fs.pipe_file(place, b"probe")
        if self.fs.cat_file(place) != b"probe":
            raise OSError(f"{place} holds something else than was written")
        self.fs.rm_file(place)
        self._remove_folder(self.root)

    def _begun(self) -> list[int]:
        """List the steps of which the target has any file, ascending."""
        self.fs.invalidate_cache()
        try:
            names = [str(entry).rstrip("/").rsplit("/", 1)[-1] for entry in self.fs.ls(self.root, detail=False)]
        except FileNotFoundError:
            return []
        return sorted(folders.step_of(Path(name)) for name in names if folders.COMMITTED.fullmatch(name))

    @property
    def _has_folders(self) -> bool:
        """True if the target has real folders; in an object store a folder is only part of a name, or a bucket."""
        return self.url.partition("://")[0] not in INSTALLS

    def _make_folder(self, place: str) -> None:
        if self._has_folders:
            self.fs.makedirs(place, exist_ok=True)

    def _remove_folder(self, place: str) -> None:
        """Remove a folder, if it is empty."""
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
    """Return the target of a run's copies, named by the last two folders of its path: ``NAME/POINT``."""
    return Target(url, f"{run_folder.parent.name}/{run_folder.name}")


T = TypeVar("T")


def start_aside(action: Callable[[], T]) -> Future[T]:
    """Run ``action`` in a thread, which may never end; return the future of its result or failure."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(action())
        except BaseException as error:  # each library of a filesystem has its own errors
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def check_target(url: str, run_folder: Path) -> None:
    """Raise ConfigError unless a small file can be written to the target, read and deleted within ``ANSWER_S``."""
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
    """Return type and message of an error in one line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def saved_checkpoints(folder: Path) -> Iterator[SavedCheckpoint]:
    """Yield the checkpoints in ``folder``, newest first, then damaged checkpoints that a load has set aside."""
    for path in reversed(folders.list_committed(folder)):
        yield checkpoint_at(path)
    for path in folders.list_set_aside(folder):
        yield SavedCheckpoint(path, None, 0, lambda told: ("set aside: a load found it damaged",))


def saved_copies(url: str | None, run_folder: Path) -> Iterator[SavedCheckpoint]:
    """Yield the copies of a run's checkpoints, newest first.

    Raises:
        ConfigError: ``url`` is None, or the target cannot be reached.
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
    """Describe the checkpoint in ``path`` by its manifest. The files are read only when the description's check is
    called."""
    step = folders.step_of(path)
    try:
        manifest = read_manifest(path)
    except (DamagedError, RuntimeError) as error:
        damage = str(error)
        return SavedCheckpoint(path, step, 0, lambda told: damage_now(path, damage))
    size = sum(entry.size for entry in manifest.files.values())
    return SavedCheckpoint(path, step, size, lambda told: verify_folder(path, step, manifest, told))


def verify_folder(path: Path, step: int, manifest: Manifest, told: Callable[[int], None]) -> tuple[str, ...] | None:
    """Compare every file with the manifest.

    Args:
        path: folder of the checkpoint.
        step: step in the folder's name.
        manifest: sizes and checksums of the saved files.
        told: called with the number of bytes that were read since the last call.

    Returns:
        One line for each fault, empty if all files are whole; None if the run has deleted the checkpoint in the
        meantime.
    """
    wrong = [] if manifest.step == step else [f"{NAME} is that of step {manifest.step}"]
    for name, entry in sorted(manifest.files.items()):
        damage = find_damage(path / name, entry)
        if damage is not None:
            wrong.append(damage)
        told(entry.size)
    return damage_now(path, *wrong) if wrong else ()


def damage_now(path: Path, *damage: str) -> tuple[str, ...] | None:
    """Return ``damage``; None if the checkpoint no longer exists, because then its deletion looked like damage."""
    return damage if path.exists() else None
