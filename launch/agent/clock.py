"""A clock that stands still while the process does, by which silence of others is measured. Torch-free.

``scontrol suspend`` stops the agents of all nodes alike: what they did not say meanwhile is nobody's fault.
"""

from __future__ import annotations

import threading
import time

TICK_S = 0.5
PAUSED_S = 5.0
"""A tick that is so late has not waited for a processor: the process was stopped."""


class RunningClock:
    """Seconds that this process has been running, counted by a thread, as nothing else tells a pause from a wait."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._count, name="clock", daemon=True)
        self._thread.start()

    def now(self) -> float:
        """Seconds so far, at most ``TICK_S`` behind."""
        return self._seconds

    def close(self) -> None:
        """Count no further."""
        self._over.set()

    def _count(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_S):
            now = time.monotonic()
            self._seconds += now - last if now - last <= PAUSED_S else TICK_S
            last = now
