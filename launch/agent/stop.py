"""A request to stop, as an agent hears it: a signal, or what it finds out by itself. The handler only sets a flag.

Owns the signals that mean it. Must not know what follows from it. Torch-free.
"""

from __future__ import annotations

import signal
import time
from types import FrameType

OWNER = "LAUNCH_OWNER_PID"
"""Process of the launcher that started a local run; without it the run stops too."""


STOP_FILE = "STOP"
"""File in a run folder that asks its run to save and leave; also what asks an agent then, in place of a signal."""


class StopRequest:
    """SIGTERM or SIGUSR2 ask the ranks to save and leave.

    Without Slurm a second one ends them at once (Ctrl-C twice). Slurm sends several by itself: there only the deadline
    ends them.
    """

    def __init__(self) -> None:
        self.count = 0
        self.name = ""
        self.since = 0.0
        self.interruptible = False
        """True while a signal breaks out of a wait in which there are no ranks to ask."""

    def install(self) -> None:
        """Replace submitit's handlers, which would requeue from inside the handler and on rank 0 only."""
        for number in (signal.SIGTERM, signal.SIGUSR2):
            signal.signal(number, self._handle)
        signal.signal(signal.SIGCONT, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.ask(signal.Signals(number).name)
        if self.interruptible:
            raise InterruptedError(f"{self.name} before the ranks had started")

    def ask(self, name: str) -> None:
        """Note that the run should stop, and why."""
        self.count += 1
        if self.count == 1:
            self.name, self.since = name, time.monotonic()
