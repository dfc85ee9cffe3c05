"""Upkeep of committed checkpoints: verify, delete, and copy them to another filesystem; and fetch a copy. Imports no
torch."""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from gpt import checkpoint as folders
from gpt.checkpoint import DamagedError, Retention, read_manifest
from gpt.checkpoint.target import Target, describe_error, target_of, verify_folder
from launch.runs.folder import RunFolder, is_newest_attempt, say

# Upkeep during training: a thread of rank 0's writer, so that neither steps nor saves wait for it.


FINISHED_S = 600.0
"""Longest time, in seconds, for which the end of a finished run waits for the copy of the last checkpoint."""
FIRST_RETRY_S = 5.0
"""Seconds from the first failed try of a copy to the next one. Each later wait is twice as long, at most
``LONGEST_RETRY_S``."""
LONGEST_RETRY_S = 300.0
LAST_TRIES = 3
"""Number of consecutive failed tries of a copy, at the end of training, after which the copy is given up."""


@dataclass(frozen=True)
class UpkeepPlan:
    """Settings of the upkeep of checkpoints in one attempt of a run."""

    folder: RunFolder
    attempt: int
    keeps: Retention
    """Rule for the checkpoints, and the copies, to keep."""
    scrubs: bool
    """True to verify each checkpoint after its commit, since disks can lose bits without an error."""
    copy_to: str | None
    """URL for copies; None makes no copies."""


class Upkeep:
    """Thread that verifies, deletes and copies checkpoints as the settings ``plan`` request. If several checkpoints
    wait for the thread, only the newest of them is verified and copied."""

    def __init__(self, plan: UpkeepPlan) -> None:
        self._plan = plan
        self._folder = plan.folder.checkpoints
        self._requests: queue.Queue[tuple[int | None, int | None] | None] = queue.Queue()
        self._lock = threading.Lock()
        self._sound: int | None = None
        """Step of the newest checkpoint that was verified and is undamaged; None before the first."""
        self._unread: int | None = None
        """Step of the newest checkpoint, if it still has to be verified; else None."""
        self._uncopied: int | None = None
        """Step of the newest checkpoint, if it still has to be copied; else None."""
        self._copying: int | None = None
        """Step of the checkpoint that is being copied, which must not be deleted; else None."""
        self._back_to: int | None = None
        """Step from which the run continues, if copies of later steps still have to be deleted; else None."""
        self._target: Target | None = None
        self._failures = 0
        self._is_ending = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def add(self, committed: int | None, back_to: int | None) -> None:
        """Add work for the thread.

        Args:
            committed: step of a newly committed checkpoint; None if there is none.
            back_to: step to which the run has gone back; copies of later steps are deleted. None if the run has not
                gone back.
        """
        if committed is not None:
            # Deletion waits until a new checkpoint is known to be whole. If the reading is behind, the checkpoints
            # that are never read must not fill the disk.
            if not self._plan.scrubs:
                self._retire()
            elif self._unread is not None:
                self._retire(more=1)
            self._unread = committed if self._plan.scrubs else None
        self._requests.put((committed, back_to))

    def close(self, wait_s: float) -> bool:
        """Request that the thread does its remaining work and ends, and wait at most ``wait_s`` seconds for its end.
        Return True if the thread has ended."""
        if not self._is_closed:
            self._is_closed = True
            self._requests.put(None)
        self._thread.join(wait_s)
        return not self._thread.is_alive()

    def _serve(self) -> None:
        while True:
            self._take_requests()
            if (step := self._unread) is not None:
                self._scrub(step)
                if self._unread == step:
                    self._unread = None
            if self._plan.copy_to is not None and (self._uncopied is not None or self._back_to is not None):
                self._copy(self._plan.copy_to)
            if self._is_ending and (not 0 < self._failures < LAST_TRIES):
                return

    def _take_requests(self) -> None:
        """Wait for a request of ``add`` or ``close``, or for the time of the next try of a copy. Then read all waiting
        requests."""
        wait_s = None
        if self._failures:
            wait_s = min(LONGEST_RETRY_S, FIRST_RETRY_S * 2 ** (self._failures - 1))
        try:
            while True:
                request = self._requests.get(timeout=wait_s)
                wait_s = 0.0
                if request is None:
                    self._is_ending = True
                    continue
                committed, back_to = request
                if committed is not None:
                    self._uncopied = committed
                if back_to is not None:
                    self._back_to = back_to
                    if self._uncopied is not None and self._uncopied > back_to:
                        self._uncopied = None
        except queue.Empty:
            pass

    def _scrub(self, step: int) -> None:
        """Verify the checkpoint of ``step``, and rename it if it is damaged. Then delete the checkpoints that the rule
        does not keep. If the checkpoint of ``step`` cannot be read, the rule keeps one more of the newest
        checkpoints."""
        path = folders.final_for(self._folder, step)
        try:
            manifest = read_manifest(path)
            for name in manifest.files:
                drop_cached(path / name)
            damage = verify_folder(path, step, manifest, lambda size: None)
        except DamagedError as error:
            damage = (str(error),) if path.exists() else None
        except OSError as error:
            say(f"the checkpoint of step {step} could not be read again: {error}")
            damage = None
        if damage is None:  # the checkpoint was deleted meanwhile, or could not be read
            self._retire(more=1)
            return
        if damage:
            cause = "; ".join(damage)
            folders.set_aside(path, cause)
            self._record("checkpoint_set_aside", step=step, cause=f"{path.name}: {cause}")
            say(f"the checkpoint of step {step} is damaged: {cause}")
            self._uncopied = None if self._uncopied == step else self._uncopied
        else:
            self._sound = step
        self._retire()

    def _retire(self, more: int = 0) -> None:
        """Delete the checkpoints that the rule does not keep, except for ``more`` additional ones.

        The newest verified checkpoint, and the one that is being copied, are never deleted.
        """
        keeps = self._plan.keeps.with_more(more)
        spared = {step for step in (self._sound, self._copying) if step is not None}
        with self._lock:
            folders.retire(self._folder, keeps, spared)

    def _copy(self, url: str) -> None:
        """Do the waiting work on the copies at ``url``: delete copies of steps after the one to which the run has gone
        back, copy the newest checkpoint, and delete copies that the rule does not keep.

        If this fails, the remaining work is done at the next try. There is no next try if the checkpoint is damaged. If
        a later attempt of the run has started, nothing is done.
        """
        step = self._copying = self._uncopied
        may_commit = partial(is_newest_attempt, self._plan.folder, self._plan.attempt)
        try:
            if may_commit():  # otherwise a later attempt makes the copies
                self._work_at_target(url, step, may_commit)
        except Exception as error:  # each library of a filesystem has its own errors
            is_damaged = isinstance(error, DamagedError)
            cause = f"the checkpoint is damaged: {error}" if is_damaged else describe_error(error)
            self._failures += 1
            self._target = None
            self._record("copy_failed", step=step, cause=cause, failures=self._failures)
            say(f"the checkpoint of step {step} could not be copied to {url}: {cause}")
            if not is_damaged:  # another try would find the same damage; a load will set the checkpoint aside
                return
        finally:
            self._copying = None
        self._uncopied, self._back_to, self._failures = None, None, 0
        if self._unread is None:  # the rule may no longer keep the copied checkpoint
            self._retire()

    def _work_at_target(self, url: str, step: int | None, may_commit: Callable[[], bool]) -> None:
        if self._target is None:
            self._target = target_of(url, self._plan.folder.path)
        if self._back_to is not None:
            self._target.discard_after(self._back_to)
            self._back_to = None
        if step is None:
            return
        began = time.monotonic()
        sent = self._target.put(folders.final_for(self._folder, step), may_commit)
        if sent:
            copy_s = time.monotonic() - began
            self._record("copied", step=step, bytes=sent, copy_s=copy_s, failures=self._failures)
            self._target.retire(self._plan.keeps)

    def _record(self, event: str, **details: object) -> None:
        self._plan.folder.record_event(event, attempt=self._plan.attempt, **details)


def drop_cached(path: Path) -> None:
    """Remove a synced file from the cache of this host, so that the next reading comes from the disk. Do nothing if the
    file is missing."""
    if path.is_file():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Fetching a copy, at a start that finds no whole checkpoint on the disk.


BEAT_S = 1.0


@dataclass(frozen=True)
class Fetched:
    """Result of ``fetch_newest``."""

    path: Path | None
    """Folder of the fetched checkpoint, next to the other checkpoints of the run; None if no copy is undamaged."""
    damaged: tuple[str, ...] = ()
    """One line, with step and damage, for each newer copy that is damaged."""


def look_for(search: Future[Fetched]) -> Fetched | None:
    """Wait at most ``BEAT_S`` seconds for the result of ``fetch_newest``, and return it; None if it is not there yet.
    ``search`` is the future of this result.

    Raises:
        OSError: the copies cannot be read, or the disk cannot be written.
    """
    wait([search], BEAT_S)
    if not search.done():
        return None
    if (failure := search.exception()) is not None:
        raise OSError(
            f"found: no checkpoint on this disk, and the copies cannot be read ({describe_error(failure)})\n"
            f"expected: copies to go on from, or to know that there are none\n"
            f"type next: the same command again, or with checkpoint.copy_to=null to begin without them"
        ) from failure
    return search.result()


def fetch_newest(folder: Path, target: Target) -> Fetched:
    """Fetch the newest undamaged copy of a checkpoint from ``target`` into ``folder``, the folder of the run's
    checkpoints."""
    damaged: list[str] = []
    for step in reversed(target.steps()):
        temporary = folders.begin_temporary(folder, "fetching", step)
        try:
            target.fetch(step, temporary)
        except DamagedError as damage:
            folders.remove_folder(temporary)
            damaged.append(f"the copy of step {step}: {damage}")
        else:
            return Fetched(folders.commit(temporary, step), tuple(damaged))
    return Fetched(None, tuple(damaged))
