"""Being told to stop, and not outliving one's parent.

Owns the signal handlers of a training process. A handler only sets a flag; the loop asks for it between steps, where
all ranks agree. SIGUSR1 is left alone: NCCL uses it.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType

from gpt.checkpoint import OutdatedAttemptError
from gpt.parallel.distributed import World
from launch.runs.folder import RunFolder

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)


class StopFlag:
    """Set by SIGTERM, SIGUSR2 or SIGINT; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    def install(self) -> None:
        """Take the signals over from whoever handled them."""
        for number in STOP_SIGNALS:
            signal.signal(number, self._handle)

    def retire(self) -> None:
        """Ignore the signals from now on: all is done, and the process is about to end.

        Python gives them their default back while it ends. A signal that came then, as a second one to a rank that had
        saved, killed it: a failure to its agent, while the agents of ranks that had ended well waited for this one.
        """
        for number in STOP_SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal is signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)


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
