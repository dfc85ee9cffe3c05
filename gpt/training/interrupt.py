"""Being told to stop, and not outliving one's parent.

Owns the signal handlers of a training process. A handler only sets a flag; the loop asks for it between steps, where
all ranks agree. SIGUSR1 is left alone: NCCL uses it.
"""

from __future__ import annotations

import ctypes
import os
import signal
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT)
PR_SET_PDEATHSIG = 1  # linux/prctl.h


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


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process ``parent``, is gone (Linux prctl).

    A rank whose agent was killed would otherwise train on, unwatched, and write into a run that has moved on.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before the call
        os.kill(os.getpid(), signal.SIGKILL)
