"""Copies of a run's checkpoints elsewhere, as its first rank has them made, and as a start fetches them back.

Owns the process beside the first rank that copies, how long its end is waited for, and the choice of the copy that a
start goes on from. Torch-free. Must not know how a copy is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpt.checkpoint import folders
from gpt.checkpoint.copier import CopyJob
from gpt.checkpoint.folders import Retention
from gpt.checkpoint.manifest import DamagedError
from gpt.checkpoint.target import Target, describe
from launch.runs.files import say

FINISHED_S = 600.0
"""Longest wait, at the end of training, for the copy of the last checkpoint."""
STOPPED_S = 10.0
"""Longest wait where the run was asked to leave; a copy that is not made then is made by the next start."""
BEAT_S = 1.0
TRIES = 4
RETRY_S = 2.0


class Copies:
    """Copier of one attempt, on its first rank; nothing before ``start``, and on the others."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.patience_s = FINISHED_S

    def start(self, run_folder: Path, attempt: int, url: str, keeps: Retention) -> None:
        """Start the process that copies."""
        job = CopyJob(str(run_folder), attempt, url, keeps, os.getpid())
        # Python is started anew: a fork of a rank has locks of threads that are not there.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpt_launch", "gpt.checkpoint.copier", job.encode()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a Ctrl-C is for the ranks
            )
        except OSError as error:  # training is worth more than its copies
            say(f"the process that copies checkpoints cannot be started ({error}); nothing is copied")

    def copy(self, step: int) -> None:
        """Have the checkpoint of a step copied; waits for nothing."""
        self._ask({"copy": step})

    def discard_after(self, step: int) -> None:
        """Have the copies of later steps deleted: the run goes back, or on from there."""
        self._ask({"discard_after": step})

    def close(self, patience_s: float, beat: Callable[[], None]) -> None:
        """Wait for the copier to finish, for ``patience_s`` seconds at most, and end it; calls ``beat`` meanwhile."""
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        until = time.monotonic() + patience_s
        while process.poll() is None and time.monotonic() < until:
            beat()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(BEAT_S, max(0.0, until - time.monotonic())))
        if process.poll() is None:
            process.kill()
            process.wait()
            say("the newest checkpoint was not copied yet; the next start of the run copies it")

    def _ask(self, request: dict[str, Any]) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:  # it was killed, say for want of memory: training goes on
            say(f"the process that copies checkpoints is gone (status {self._process.poll()}); copies end here")
            self._process = None


@contextlib.contextmanager
def open_copies(beat: Callable[[], None]) -> Iterator[Copies]:
    """Make the copier of this rank, and end it after use: at once where training has failed.

    ``beat`` is called about once a second while its end is waited for.
    """
    copies = Copies()
    try:
        yield copies
    except BaseException:
        copies.close(0.0, beat)
        raise
    copies.close(copies.patience_s, beat)


@dataclass(frozen=True)
class Fetched:
    """Outcome of looking for a copy."""

    path: Path | None
    """The checkpoint, whole and in its place; None where there is no copy at all."""
    damaged: tuple[str, ...] = ()
    """Newer copies that are not what was saved, a line each."""


class Fetch:
    """Search for the newest copy that is whole, in a thread, so that its ranks can show that they live.

    Args:
        folder: folder of the checkpoints.
        connect: opens the target.
    """

    def __init__(self, folder: Path, connect: Callable[[], Target]) -> None:
        self._found: Fetched | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(folder, connect), daemon=True)
        self._thread.start()

    def look(self) -> Fetched | None:
        """Wait a moment for the outcome; None where it is still open.

        Raises:
            OSError: the target cannot be read, or the disk cannot be written.
        """
        self._thread.join(BEAT_S)
        if self._failure is not None:
            raise OSError(
                f"found: no checkpoint on this disk, and the copies cannot be read ({describe(self._failure)})\n"
                f"expected: copies to go on from, or to know that there are none\n"
                f"type next: the same command again, or with checkpoint.copy_to=null to begin without them"
            ) from self._failure
        return self._found

    def _run(self, folder: Path, connect: Callable[[], Target]) -> None:
        for tried in range(TRIES):
            try:
                self._found = fetch_newest(folder, connect())
                return
            except Exception as error:  # of whatever library reaches the target
                failure = error
                folders.sweep(folder)
            if tried + 1 < TRIES:
                time.sleep(RETRY_S * 2**tried)  # the target's, not another thread's, time to come back
        self._failure = failure


def fetch_newest(folder: Path, target: Target) -> Fetched:
    """Fetch the newest copy that is whole, and give it its place among the checkpoints of ``folder``."""
    damaged: list[str] = []
    for step in reversed(target.steps()):
        temporary = folders.begin_fetch(folder, step)
        try:
            target.fetch(step, temporary)
        except DamagedError as damage:
            folders.remove(temporary)
            damaged.append(f"the copy of step {step}: {damage}")
        else:
            return Fetched(folders.commit(temporary, step), tuple(damaged))
    return Fetched(None, tuple(damaged))
