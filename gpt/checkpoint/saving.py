"""Saves of a run: the copy of the state, the votes of the ranks, the commit, and the later reading of saved files."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gpt.checkpoint import folders, messages
from gpt.checkpoint.folders import DamagedError, FileSum, Retention, damage_or_raise, find_difference, read_manifest
from gpt.checkpoint.formats import Format
from gpt.checkpoint.messages import CheckpointError, explain
from gpt.checkpoint.part import RankPart, StagedPart, encode_rank_state, rank_file
from gpt.checkpoint.writer import Commit, Remove, Result, Retire, Write, Writer, WriterState
from launch.errors import ConfigError
from launch.runs.files import NO_ROOM

# The save in flight on one rank: its state, its vote, and its outcome.


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed."""

    step: int
    path: Path
    write_s: float
    """Seconds from the start of the save to its commit; training waited only while the state was copied."""


@dataclass(frozen=True)
class FailedWrite:
    """A failed write of a checkpoint, which is tried again."""

    step: int
    cause: str
    failures: int
    """Number of failed writes since the last checkpoint."""
    has_room: bool
    """False if the disk was full, over its quota or broken."""


@dataclass(frozen=True)
class Vote:
    """One rank's vote on the save in flight; ``Saves.count`` takes the sums over all ranks."""

    phase: int
    """Number of the phase that the vote is about, the same on all ranks; 0: no save is in flight."""
    done: int = 0
    failed: int = 0


class Phase(Enum):
    """Phase of a save in flight."""

    write = "write"
    commit = "commit"


@dataclass
class InFlight:
    """The save in flight, as one rank knows it."""

    step: int
    meta: dict[str, Any]
    may_commit: Callable[[], bool]
    started: float
    part: RankPart | StagedPart | None
    """None if this rank's part could not be collected, so that each try fails."""
    temporary: Path
    phase: Phase = Phase.write
    result: Result | None = None


def stage_state(
    step: int,
    state: Any,
    rank_state: dict[str, Any],
    fmt: Format,
    writer: Writer,
    group: dist.ProcessGroup | None,
) -> RankPart | StagedPart:
    """Collect this rank's part of a state and pass it to the writer, which may copy it. Collective.

    Raises:
        Exception: an error of the format or of the writer.
    """
    collected = fmt.collect(step, state, group)
    collected.files[rank_file(dist.get_rank(group))] = encode_rank_state(rank_state)
    return writer.stage(collected)


# Scrubbing: the newest checkpoint is read again after it was written, as disks lose bits without an error.
#
# Other checkpoints are deleted only once the newest is known to be whole.


SLICE = 1 << 22
"""Bytes that are read at a time; the next job of a save waits for at most one such reading."""


@dataclass(frozen=True)
class Scrub:
    """Job of rank 0's writer after a commit: verify the new checkpoint, then delete those no longer kept.

    An unfinished scrub of an earlier step is given up, and so are its planned repetitions.
    """

    folder: Path
    step: int
    keeps: Retention
    tell: Callable[[int, str, bool], None]
    """Called with step and damage of a checkpoint that was set aside, and True if it was found whole before."""
    every_s: float = 0.0
    """Seconds after which the checkpoint is read again while it is the newest; 0 reads it once."""

    def run(self, state: WriterState) -> None:
        """Verify between later jobs; a writer without a process of its own only deletes."""
        if state.has_idle_time:
            is_behind = state.rest_s() == 0
            state.idle_work, state.idle_at = scrub(self, state), 0.0
            if is_behind:  # otherwise checkpoints that are never read to their end would fill the disk
                self.retire(state, more=1)
        else:
            self.retire(state)

    def retire(self, state: WriterState, more: int = 0) -> None:
        """Delete the checkpoints that are no longer kept, but never the newest that was found whole.

        ``more``: number of newest checkpoints that are kept in addition.
        """
        keeps = replace(self.keeps, last=self.keeps.last + more)
        folders.retire(self.folder, keeps, frozenset() if state.sound is None else {state.sound})


def scrub(job: Scrub, state: WriterState) -> Generator[float]:
    """Verify a checkpoint slice by slice, set it aside if damaged, and delete those no longer kept.

    Yields the seconds until the next slice. A whole checkpoint is verified again after ``every_s`` seconds.
    """
    path = folders.final_for(job.folder, job.step)
    while True:
        try:
            damage = yield from find_damage_in(path)
        except OSError:
            job.retire(state, more=1)  # the result is unknown, and the disk must not fill up
            raise
        if not path.exists():  # the run has gone back
            return
        if damage:
            folders.set_aside(path, damage)
            was_whole = state.sound == job.step
            job.tell(job.step, f"{path.name}: {damage}", was_whole)
            if was_whole:
                state.sound = None
        else:
            state.sound = job.step
        job.retire(state)
        if damage or not job.every_s:
            return
        yield job.every_s


def find_damage_in(path: Path) -> Generator[float, None, str]:
    """Compare all files of a checkpoint with its manifest, slice by slice; return the damage, empty if there is none.

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
        difference = find_difference(name, found, expected)
        if difference is not None:
            wrong.append(difference)
    return "; ".join(wrong)


def sum_slowly(path: Path) -> Generator[float, None, FileSum]:
    """Compute size and sha256 of a file from the disk, not from this host's cache; yield 0.0 after each slice."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # it was synced, so all can go
        while content := file.read(SLICE):
            digest.update(content)
            size += len(content)
            yield 0.0
    return FileSum(size, digest.hexdigest())


# Saves of a run, at most one in flight: staged while all ranks wait, written and committed during training.
#
# Each rank's writer writes its files and a report into one temporary folder. When all have, the writer of rank 0 makes
# the manifest of their reports and renames the folder, which is the commit. No message of its own says that all have:
# each rank gives its ``Vote`` to the training loop, which sums the votes with its figures. ``count`` is called with the
# sums, in the same order on every rank. ``finish`` waits instead. A write that fails is tried again, into another
# folder and from the same copy.


RETRY_S = 5.0
"""Seconds from the first failed write to the next; each later wait is twice as long."""
LONGEST_RETRY_S = 300.0
HURRIED_RETRY_S = 1.0
"""Seconds to the next try while training waits for the save, or has to end."""


class OutdatedAttemptError(CheckpointError):
    """A save was refused since a later attempt owns the run; nothing was committed."""


class Saves:
    """The saves of one run on disk, at most one in flight.

    Args:
        folder: the folder of the checkpoints; every rank sees it.
        keeps: checkpoints that are kept.
        group: gloo group of all ranks, for the control messages.
        fmt: format of the state on disk.
        writer: writes this rank's part.
        give_up_after_s: seconds from the first failed write after which another failure is raised; 0 raises the first.
    """

    def __init__(
        self,
        folder: Path,
        keeps: Retention,
        group: dist.ProcessGroup | None,
        fmt: Format,
        writer: Writer,
        give_up_after_s: float,
    ) -> None:
        self.folder = folder
        self.keeps = keeps
        self.group = group
        self.format = fmt
        self.writer = writer
        self.give_up_after_s = give_up_after_s
        self.tell_damage: Callable[[int, str, bool], None] | None = None
        """Called with step and damage of a checkpoint, and True if it was found whole before. Picklable.

        None if checkpoints are not read again.
        """
        self.scrub_every_s = 0.0
        """Seconds after which the newest checkpoint is read once more; 0 reads it once after each save."""
        self.failures = 0
        self._failing_since = 0.0
        self._retry_at = 0.0
        self._phases = 0
        self._names = 0
        self._token: str | None = None
        self._pending: InFlight | None = None
        self.committed: InFlight | None = None
        """The last committed save, while it may be sent to the memory stores; else None. The same on all ranks.

        The copy stays until another state is taken over.
        """

    @property
    def is_pending(self) -> bool:
        """True while a save is in flight; the same on all ranks."""
        return self._pending is not None

    @property
    def is_failing(self) -> bool:
        """True if the save in flight has failed, and one of a newer state may replace it; the same on all ranks."""
        return self._pending is not None and self.failures > 0 and self._pending.phase is Phase.write

    def start(
        self, step: int, state: Any, rank_state: dict[str, Any], meta: dict[str, Any], may_commit: Callable[[], bool]
    ) -> None:
        """Begin to write a state to disk. Collective. No other save may be in flight, unless it is failing.

        Raises:
            CheckpointError: the state cannot be planned; on every rank.
        """
        assert self._pending is None or self.is_failing
        if self._token is None:
            self._token = str(messages.all_gather(secrets.token_hex(8), self.group)[0])
        started = time.monotonic()
        self.committed = None
        part: RankPart | StagedPart | None = None
        failure: str | None = None
        try:
            part = stage_state(step, state, rank_state, self.format, self.writer, self.group)
        except CheckpointError:
            raise
        except Exception as error:  # the other ranks must learn of it by the votes, as of failed writes
            failure = explain(error)
        self._pending = InFlight(step, meta, may_commit, started, part, self._name(step))
        self._begin(Phase.write)
        if part is None:
            self._pending.result = Result(failure=failure)
        else:
            self._write(max(0.0, self._retry_at - time.monotonic()))

    def vote(self) -> Vote:
        """Return this rank's vote on the save in flight, without waiting."""
        pending = self._pending
        if pending is None:
            return Vote(0)
        if pending.result is None and self._takes_part():
            pending.result = self.writer.poll()
        if pending.result is None or not self._takes_part():
            return Vote(self._phases)
        has_failed = self._failure(pending) is not None
        return Vote(self._phases, done=int(not has_failed), failed=int(has_failed))

    def count(self, phase: int, done: float, failed: float) -> Saved | FailedWrite | None:
        """Evaluate the summed votes of all ranks. Every rank must call this with the same sums in the same order.

        Returns:
            The outcome of the save, once; None while it is not decided.

        Raises:
            CheckpointError: saves have failed for ``give_up_after_s`` seconds; on every rank.
            ConfigError: the same, because the disk is full or broken; on every rank.
            OutdatedAttemptError: ``may_commit`` returned False; on every rank.
        """
        pending = self._pending
        if pending is None or phase != self._phases:
            return None  # the vote is of a phase that has ended
        voters = dist.get_world_size(self.group) if pending.phase is Phase.write else 1
        if done + failed < voters:
            return None  # while some rank writes there, the folder stays
        return self._end_phase(pending, bool(failed), hurries=False)

    def finish(self, hurries: bool = True) -> Saved | FailedWrite | None:
        """Wait for the outcome of the save in flight; None if there is none. Collective; call again after a failure.

        Args:
            hurries: True to try again ``HURRIED_RETRY_S`` after each failure; False to wait longer each time.
        """
        while (pending := self._pending) is not None:
            if pending.result is None and self._takes_part():
                pending.result = self.writer.wait()
            has_failed = self._failure(pending) is not None
            found = self._end_phase(pending, any(messages.all_gather(has_failed, self.group)), hurries)
            if found is not None:
                return found
        return None

    def give_up(self) -> None:
        """Forget the save in flight; the checkpoint before it stays the newest. Every rank has to call this."""
        if self._pending is not None and dist.get_rank(self.group) == 0:
            # A rank that still writes may create the folder anew: then the next save removes it.
            self.writer.submit(Remove(self._pending.temporary, self.keeps, frees=False))
        self._pending = None

    def _end_phase(self, pending: InFlight, has_failed: bool, hurries: bool) -> Saved | FailedWrite | None:
        is_first = dist.get_rank(self.group) == 0
        if has_failed:
            return self._fail(pending, hurries)
        if pending.phase is Phase.write:
            self._begin(Phase.commit)
            if is_first:
                contents = self.format.describe()
                ranks = dist.get_world_size(self.group)
                commit = Commit(pending.temporary, pending.step, ranks, pending.meta, contents, pending.may_commit)
                self.writer.submit(commit)
            return None
        self._pending, self.committed = None, pending
        self.failures, self._retry_at = 0, 0.0
        ended = time.monotonic() if pending.result is None else pending.result.ended
        if is_first:
            self.writer.submit(
                Retire(self.folder, self.keeps)
                if self.tell_damage is None
                else Scrub(self.folder, pending.step, self.keeps, self.tell_damage, self.scrub_every_s)
            )
        path = folders.final_for(self.folder, pending.step)
        return Saved(pending.step, path, ended - pending.started)

    def _fail(self, pending: InFlight, hurries: bool) -> FailedWrite:
        """Start a failed save again, and return the failure. Collective, once all ranks know of a failure.

        Args:
            pending: the save in flight.
            hurries: True if the next try starts after ``HURRIED_RETRY_S``; False if each try waits longer.

        Raises:
            OutdatedAttemptError: a later attempt owns the run.
            CheckpointError: saves have failed for ``give_up_after_s`` seconds.
            ConfigError: the same, because the disk has no room.
        """
        now = time.monotonic()
        if not self.failures:
            self._failing_since = now
        self.failures += 1
        own = self._failure(pending)
        cause = messages.first_failure(own, self.group)
        failing_s = messages.all_gather(now - self._failing_since, self.group)[0]  # rank 0's clock decides
        has_room = room_error(cause) is None
        is_outdated = OUTDATED in cause
        is_over = is_outdated or failing_s >= self.give_up_after_s
        if dist.get_rank(self.group) == 0:
            self.writer.submit(Remove(pending.temporary, self.keeps, frees=not has_room and not is_over))
        if is_over:
            if dist.get_rank(self.group) == 0:
                self.writer.wait()
            self._pending = None
            self._raise(pending.step, cause, is_outdated)
        delay = HURRIED_RETRY_S if hurries else min(LONGEST_RETRY_S, RETRY_S * 2 ** (self.failures - 1))
        self._retry_at = now + delay
        pending.temporary = self._name(pending.step)
        self._begin(Phase.write)
        if pending.part is None:
            pending.result = Result(failure=own)
        else:
            self._write(delay)
        return FailedWrite(pending.step, cause, self.failures, has_room)

    def _raise(self, step: int, cause: str, is_outdated: bool) -> None:
        if is_outdated:
            raise OutdatedAttemptError(f"step {step} is not saved: a later attempt owns this run")
        why = room_error(cause)
        if why is None:
            raise CheckpointError(cause)
        before = max(folders.steps(self.folder), default=None)
        raise ConfigError(
            f"the checkpoint of step {step} cannot be written into {self.folder}: {why}",
            f"room for {self.keeps.last + 1} checkpoints (checkpoint.keep_last={self.keeps.last}, and the new one)",
            f"df -h {self.folder.parent}, remove what is not needed, or checkpoint.keep_last=1; then the same command, "
            f"which {'begins anew' if before is None else f'goes on from step {before}'}",
        )

    def _begin(self, phase: Phase) -> None:
        assert self._pending is not None
        self._phases += 1
        self._pending.phase, self._pending.result = phase, None

    def _write(self, delay_s: float) -> None:
        pending = self._pending
        assert pending is not None and pending.part is not None
        is_first = dist.get_rank(self.group) == 0
        self.writer.submit(Write(pending.temporary, pending.step, pending.part, is_first), delay_s)

    def _failure(self, pending: InFlight) -> str | None:
        """Return this rank's failure or None; after the rename, which is the commit, failures do not count."""
        result = pending.result
        if result is None or pending.phase is Phase.write:
            return None if result is None else result.failure
        if result.failure is None:
            return OUTDATED if result.value is None else None
        return None if folders.is_committed(self.folder, pending.step) else result.failure

    def _takes_part(self) -> bool:
        """True if this rank has work in the current phase: every rank writes, and only rank 0 commits."""
        assert self._pending is not None
        return self._pending.phase is Phase.write or dist.get_rank(self.group) == 0

    def _name(self, step: int) -> Path:
        """Return a new temporary folder for a save, the same on all ranks."""
        self._names += 1
        token = hashlib.sha256(f"{self._token} {self._names}".encode()).hexdigest()[:8]
        return folders.temporary_for(self.folder, step, token)


OUTDATED = "a later attempt owns this run"


def room_error(cause: str) -> str | None:
    """Return the system's message if a save failed since the filesystem is full or broken; else None."""
    line = cause.splitlines()[0]
    return next((os.strerror(number) for number in NO_ROOM if f"[Errno {number}]" in line), None)
