"""Quick starts and ends of processes that import torch. Torch-free.

Importing torch makes some 300,000 objects that exist as long as the process. Python's collector of reference cycles
visits them again and again during the import, and once more at the exit. That takes about 40 % of the time in which a
rank starts and ends. So the collector is paused while such libraries are imported.
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
    """Import lasting libraries in a ``with`` block: the collector pauses, and ignores their objects afterwards."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


def set_default_threads() -> None:
    """Give ranks one thread each, as torchrun does, where OMP_NUM_THREADS is not set; libraries read it when loaded."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def hash_seed(seed: int) -> str:
    """PYTHONHASHSEED for a run's seed; Python takes 32 bits."""
    return str(seed % 2**32)


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent, process ``parent``, is gone (Linux prctl).

    A rank whose agent was killed would otherwise continue, unwatched, and write into a run that others continue.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # the parent died before the call
        os.kill(os.getpid(), signal.SIGKILL)
