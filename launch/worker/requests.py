"""Requests that lie in the run folder: the files STOP and SAVE, and the attempt that has replaced this one.

A thread of rank 0 looks for them, since a shared filesystem may be slow. Standard library only.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from pathlib import Path

from launch.runs.heartbeat import FROM_FILE, Request

LOOK_S = 1.0
"""Between two looks into the run folder, which may be on a shared filesystem."""


class FolderRequests:
    """Last look into the run folder, and which of its requests were obeyed.

    Args:
        want: hands a request on to the agent, with its cause or number.
        is_current: tells whether no later attempt of the run has begun. Asks the filesystem.
        is_stopping: tells whether this rank is leaving, so that nothing more is looked for.
    """

    def __init__(
        self, want: Callable[[Request, int], None], is_current: Callable[[], bool], is_stopping: Callable[[], bool]
    ) -> None:
        self._want = want
        self._is_current = is_current
        self._is_stopping = is_stopping
        self._lock = threading.Lock()
        self._save_file = False
        self._saves_wanted = 0
        self._saves_obeyed = 0
        self.stop_file = False
        """True once the file STOP was seen."""
        self.is_outdated = False
        """True once a later attempt was seen."""

    def watch(self, folder: Path) -> None:
        """Look into the folder now and then, from a thread."""
        threading.Thread(target=self._look_on, args=(folder,), name="requests", daemon=True).start()

    @property
    def has_save(self) -> bool:
        """True where a save is wanted that was not yet obeyed."""
        return self._saves_wanted > self._saves_obeyed

    def obey_save(self) -> None:
        """Note that the save that is wanted now is being made."""
        self._saves_obeyed = self._saves_wanted

    def clear(self, folder: Path) -> None:
        """Take away the files whose requests were obeyed, so that the next start does not obey them again."""
        with self._lock:  # else the thread might see a file that is about to go, and take it for a new request
            if self._save_file and self._saves_obeyed == self._saves_wanted:
                (folder / "SAVE").unlink(missing_ok=True)
                self._save_file = False
            if self.stop_file and self._is_stopping():
                (folder / "STOP").unlink(missing_ok=True)

    def _look_on(self, folder: Path) -> None:
        while not (self._is_stopping() or self.is_outdated):
            with contextlib.suppress(OSError), self._lock:  # the next look may succeed
                self._look(folder)
            time.sleep(LOOK_S)

    def _look(self, folder: Path) -> None:
        self.is_outdated = not self._is_current()
        if not self.stop_file and (folder / "STOP").exists():
            self.stop_file = True
            self._want(Request.stop, FROM_FILE)
        if not self._save_file and (folder / "SAVE").exists():
            self._save_file = True
            self._saves_wanted += 1
            self._want(Request.save, self._saves_wanted)
