"""Scrubbing: the newest checkpoint is read again after it was written, as disks lose bits without a word.

Owns the reading, in slices between the other jobs of the writer, and what follows damage: the checkpoint is set aside
and told of, and those before it stay. Only once the newest is known to be whole are others deleted. Must not know who
is told.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path

from gpt.checkpoint import folders
from gpt.checkpoint.jobs import Memory, Retention
from gpt.checkpoint.manifest import DamagedError, FileSum, compare, damage_or_raise, read_manifest

SLICE = 1 << 22
"""Bytes that are read at a time; the next job of a save waits for one of these at most."""


@dataclass(frozen=True)
class Scrub:
    """Begin to verify the checkpoint of a step, and delete others when it is whole; on rank 0, after a commit.

    An unfinished scrub of an earlier step is given up, and so are those that would have come again.
    """

    folder: Path
    step: int
    keeps: Retention
    tell: Callable[[int, str, bool], None]
    """Called with the step and the damage of a checkpoint that was set aside, and whether it was whole before."""
    every_s: float = 0.0
    """Seconds after which it is read again while it is the newest; 0 for once."""

    def run(self, memory: Memory) -> None:
        """Leave the reading to the time between jobs; where there is none, as in a rank, only delete."""
        if memory.has_idle_time:
            is_behind = memory.rest_s() == 0
            memory.idle_work, memory.idle_at = scrub(self, memory), 0.0
            if is_behind:  # else checkpoints that are never read to their end would fill the disk
                retire(self.folder, self.keeps, memory.sound, more=1)
        else:
            retire(self.folder, self.keeps, memory.sound)


def scrub(job: Scrub, memory: Memory) -> Generator[float]:
    """Verify a checkpoint slice by slice, do what follows, and begin again after ``every_s`` while it is whole."""
    path = folders.final_for(job.folder, job.step)
    while True:
        try:
            damage = yield from find_damage_in(path)
        except OSError:
            retire(job.folder, job.keeps, memory.sound, more=1)  # nothing is known, and the disk must not fill up
            raise
        if not path.exists():  # the run has gone back
            return
        if damage:
            folders.set_aside(path, damage)
            was_whole = memory.sound == job.step
            job.tell(job.step, f"{path.name}: {damage}", was_whole)
            if was_whole:
                memory.sound = None
        else:
            memory.sound = job.step
        retire(job.folder, job.keeps, memory.sound)
        if damage or not job.every_s:
            return
        yield job.every_s


def retire(folder: Path, keeps: Retention, sound: int | None, more: int = 0) -> None:
    """Delete the checkpoints that are no longer kept, but never ``sound``, the newest that was found whole."""
    kept = replace(keeps, last=keeps.last + more)
    folders.retire(folder, kept, frozenset() if sound is None else {sound})


def find_damage_in(path: Path) -> Generator[float, None, str]:
    """Compare all files of a checkpoint with its manifest, slice by slice; returns what is damaged.

    Raises:
        OSError: the filesystem refused for a reason that says nothing about the files.
    """
    try:
        manifest = read_manifest(path)
    except DamagedError as damage:
        return str(damage)
    wrong = []
    for name, expected in sorted(manifest.files.items()):
        try:
            found = yield from sum_slowly(path / name)
        except OSError as error:
            wrong.append(damage_or_raise(error, name))
            continue
        difference = compare(name, found, expected)
        if difference is not None:
            wrong.append(difference)
    return "; ".join(wrong)


def sum_slowly(path: Path) -> Generator[float, None, FileSum]:
    """Compute size and sha256 of a file, slice by slice, from the disk and not from what this host still has of it."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # it was synced, so all of it can go
        while content := file.read(SLICE):
            digest.update(content)
            size += len(content)
            yield 0.0
    return FileSum(size, digest.hexdigest())
