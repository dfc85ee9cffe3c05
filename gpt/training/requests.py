"""What a running training process is asked for: by signals, and by files that somebody puts into the run folder.

Owns the files STOP and SAVE, and the fence against an attempt that a later one has replaced. Rank 0 looks; the loop
lets all ranks agree.
"""

from __future__ import annotations

import time
from pathlib import Path

from gpt.checkpoint import OutdatedAttemptError
from gpt.parallel.world import World
from gpt.training.interrupt import StopFlag
from launch.runs.folder import RunFolder

LOOK_S = 1.0  # a look asks a shared filesystem; once a second is soon enough


class Requests:
    """Asked once a step. ``stop`` and ``save`` are what this rank knows, before the ranks agree."""

    def __init__(self, folder: RunFolder, world: World, attempt: int, flag: StopFlag) -> None:
        self._folder = folder
        self._is_first = world.is_first
        self._attempt = attempt
        self._flag = flag
        self._looked = 0.0
        self.stop_file = False
        self.save = False

    @property
    def stop(self) -> bool:
        """Whether this rank was told to save and leave."""
        return self._flag.signal is not None or self.stop_file

    @property
    def signal_name(self) -> str | None:
        """The signal that told it, if one did."""
        return self._flag.signal.name if self._flag.signal is not None else None

    def look(self) -> None:
        """On rank 0, now and then: look into the run folder.

        Raises:
            OutdatedAttemptError: a later attempt has taken the run over; this one must not touch it any more.
        """
        if not self._is_first or time.monotonic() - self._looked < LOOK_S:
            return
        self._looked = time.monotonic()
        if not self.is_current():
            raise OutdatedAttemptError(f"attempt {self._attempt} was replaced by a later one")
        self.stop_file = self._file("STOP").exists()
        self.save = self._file("SAVE").exists()

    def is_current(self) -> bool:
        """Whether no later attempt has begun."""
        return max(self._folder.attempts(), default=0) <= self._attempt

    def done(self, save: bool, stop: bool) -> None:
        """After the save: take the files away that asked for it, so that the next start does not obey them again."""
        if not self._is_first:
            return
        for name, wanted in (("SAVE", save and self.save), ("STOP", stop and self.stop_file)):
            if wanted:
                self._file(name).unlink(missing_ok=True)
        self.save = False

    def _file(self, name: str) -> Path:
        return self._folder.path / name
