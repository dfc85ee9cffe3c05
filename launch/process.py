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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Pause the garbage collector in a ``with`` block that imports large libraries.

    After the block, the collector never visits the objects that exist by then.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_on:
            gc.enable()


Item = TypeVar("Item")


def share(items: Sequence[Item], part: int, parts: int) -> Sequence[Item]:
    """Return part ``part``, from 0, of ``items`` in ``parts`` consecutive parts, whose sizes differ by one at most."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


MOST_COMPILERS = 8
"""Largest number of processes in which a rank compiles. More are not needed: models have few different kernels."""


def set_default_threads(ranks: int) -> None:
    """Set OMP_NUM_THREADS to 1 for ranks, as torchrun does, and limit the processes in which each compiles.

    By default, torch's compiler would start one process for each CPU of the node in each rank, at most 32. Variables
    that the user has set do not change. Call this function before the libraries are loaded, since they read the
    variables only then.

    Args:
        ranks: number of ranks on this node.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    each = len(os.sched_getaffinity(0)) // ranks
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(min(MOST_COMPILERS, max(1, each))))


def hash_seed(seed: int) -> str:
    """Return the value of PYTHONHASHSEED for a run's seed: the seed modulo 2**32, which is what Python accepts."""
    return str(seed % 2**32)


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process (SIGKILL) when its parent, process ``parent``, ends (Linux prctl).

    Otherwise a rank whose agent was killed would continue unwatched, and write into the folder of a run that other
    processes continue.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # The parent died before the call.
        os.kill(os.getpid(), signal.SIGKILL)


def become_helper(parent: int) -> None:
    """End this process together with ``parent``, and ignore signals to a whole job or terminal, such as SIGTERM."""
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    die_with_parent(parent)
