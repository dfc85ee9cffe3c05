"""Fast start and exit of processes that import torch. The module itself does not import torch.

Importing torch makes some 300,000 objects that exist as long as the process. Python's collector of reference cycles
visits them during the import and at the exit. These visits take about 40 % of the time in which a rank starts and ends.
So the collector is paused while such libraries are imported.
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Import large libraries in a ``with`` block: the garbage collector pauses, and later ignores their objects."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def set_default_threads() -> None:
    """Set OMP_NUM_THREADS to 1 for ranks if it is not set, as torchrun does. Libraries read it when they are loaded."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def hash_seed(seed: int) -> str:
    """Return the value of PYTHONHASHSEED for a run's seed. Python accepts 32 bits."""
    return str(seed % 2**32)


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when process ``parent``, its parent, is gone (Linux prctl).

    Otherwise a rank whose agent was killed would continue without a watch, and write into a run that other processes
    continue.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # The parent died before the call.
        os.kill(os.getpid(), signal.SIGKILL)


def become_helper(parent: int) -> None:
    """Have this process end with its ``parent``, and ignore the signals that reach a whole job or terminal."""
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    die_with_parent(parent)
