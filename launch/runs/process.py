"""The process of a rank: its fast start and exit, its end with its parent, and its heartbeat. Standard library only."""

from __future__ import annotations

import ctypes
import gc
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

# Fast start and exit of processes that import torch.
#
# Importing torch makes some 300,000 objects that exist as long as the process. Python's collector of reference cycles
# visits them during the import and at the exit. These visits take about 40 % of the time in which a rank starts and
# ends. So the collector is paused while such libraries are imported.


@contextmanager
def lasting_imports() -> Iterator[None]:
    """Pause the garbage collector during a ``with`` block that imports large libraries.

    After the block, the collector never visits the objects that existed when the block ended (``gc.freeze``).
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
    """Return part ``part``, from 0, of ``items``, which are divided into ``parts`` consecutive, nearly equal parts."""
    return items[len(items) * part // parts : len(items) * (part + 1) // parts]


MOST_COMPILERS = 8
"""Largest number of processes in which a rank compiles. Models have few different kernels."""


def set_default_threads(ranks: int) -> None:
    """Set environment variables so that each rank uses one OpenMP thread, as with torchrun, and few compiler processes.

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
    """Return the value of PYTHONHASHSEED for a run's seed: the seed modulo 2**32, the range of Python."""
    return str(seed % 2**32)


PR_SET_PDEATHSIG = 1  # linux/prctl.h


def die_with_parent(parent: int) -> None:
    """Make the kernel kill this process (SIGKILL) when its parent, process ``parent``, ends (Linux prctl).

    Otherwise a rank whose agent was killed would continue unwatched, and write into the folder of a run that other
    processes continue.
    """
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # The parent died before the call.
        os.kill(os.getpid(), signal.SIGKILL)


def become_helper(parent: int) -> None:
    """Make this process live exactly as long as its parent, process ``parent``.

    The kernel kills this process when the parent ends. This process ignores SIGTERM, SIGINT, SIGHUP and other signals
    that Slurm or a terminal sends to all processes at once.
    """
    for name in ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2"):
        signal.signal(signal.Signals[name], signal.SIG_IGN)
    die_with_parent(parent)


# The heartbeat of a rank: numbers in a file on its node, mapped into memory by the rank and by its agent.
#
# Every number is one aligned word of 8 bytes with a single writer, so a reader never sees half a number and nothing is
# locked. The rank writes that it runs, its phase, and how often it has polled for a request to stop or to save; the
# agent answers. Ranks of many nodes reach the same answer at the same step as follows:
#
# 1. A rank increments its count of polls (``calls``) before it reads whether its agent has set ``hold``.
# 2. If a stop or a save is requested, all agents set ``hold`` for their ranks. A rank that polls from now on waits.
# 3. Some tens of milliseconds later every agent reads the ``calls`` of its ranks. A rank that did not see ``hold`` has
#    written its count by then: the delay replaces a memory barrier on both sides.
# 4. The largest count of all nodes plus one becomes ``at``: the poll that all ranks answer with yes. No rank can have
#    answered it already. Ranks that wait continue, and so does a rank that was inside a long step all the time.
#
# ``hold`` is a ticket: a rank waits while ``hold`` > ``at``, and the next request takes a ticket above the last ``at``.
# ``launch.agent.exchange`` has the agents' half.


ENVIRONMENT = "LAUNCH_HEARTBEAT_DIR"
BEAT_S = 1.0
WAIT_S = 0.005
"""Polling interval in seconds of a rank that waits for the agents to agree on a step."""
FROM_FILE = 1000
"""Cause of a stop that a file requested. Smaller numbers are signals."""

BEAT, MOVED = 0, 1  # floats, seconds of the monotonic clock, which all processes of a machine share
PID, STEP, PHASE, CAUSE = 2, 3, 4, 5
REQUESTS = 6
CALLS, WANTS, HOLD, AT = 0, 1, 2, 3
SIZE = 8 * 16
HEARTBEAT = struct.Struct("=ddqqq")


class Phase(IntEnum):
    """Activity of a rank. ``starting``, ``saving`` and ``leaving`` may take long without progress."""

    starting = 0
    training = 1
    evaluating = 2
    saving = 3
    leaving = 4


class Request(IntEnum):
    """Kind of request that all ranks obey at the same step. A stop is final; a save can be repeated."""

    stop = 0
    save = 1


@dataclass(frozen=True)
class RankHeartbeat:
    """Last heartbeat of a rank, and its last progress. Times are seconds of the monotonic clock."""

    ran_at: float
    """Time of the last heartbeat."""
    moved_at: float
    """Time of the last progress; 0 if the rank never reported progress."""
    pid: int
    step: int
    """Number of steps done."""
    phase: Phase


class HeartbeatFile:
    """File of 128 bytes that a rank and its agent map into memory, through which they exchange heartbeats and requests.

    Both may open the file in any order: neither clears the content.

    Raises:
        OSError: the file cannot be created.
    """

    def __init__(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            # Allocates the file's blocks now, because a write into a hole would end in SIGBUS on a full filesystem.
            os.posix_fallocate(descriptor, 0, SIZE)
            view = memoryview(mmap.mmap(descriptor, SIZE))
        finally:
            os.close(descriptor)
        # Items of a view are copied as a whole word, which struct.pack_into does not promise.
        self._times = view.cast("d")
        self._words = view.cast("q")
        self._requests = [self._words[first : first + 4] for first in (REQUESTS, REQUESTS + 4)]
        """For each kind of request, its four numbers in the file, at the indices CALLS, WANTS, HOLD and AT."""
        self._tired_of = 0

    # The rank's side.

    def open_for_rank(self) -> None:
        """Register this process as the rank of the file."""
        self._times[BEAT] = time.monotonic()
        self._words[PID] = os.getpid()  # last: a reader that sees the PID also finds the time

    def beat(self) -> None:
        """Write a heartbeat: the time at which this process, the rank, still runs."""
        self._times[BEAT] = time.monotonic()

    def move(self, step: int, phase: Phase) -> None:
        """Report progress of the loop: ``step`` steps done, and the phase."""
        self._words[STEP] = step
        self._words[PHASE] = phase
        self._times[BEAT] = self._times[MOVED] = time.monotonic()

    def want(self, request: Request, value: int) -> None:
        """Request a stop (``value`` is the signal number or FROM_FILE) or a save (``value`` counts saves)."""
        self._requests[request][WANTS] = value

    def ask(self, request: Request, limit_s: float) -> bool:
        """Count a poll for ``request``, and return whether the rank must obey the request now.

        The agents agree on the number of the poll at which all ranks obey. For a stop, this method returns True at this
        poll and at all later polls; for a save, only at this poll. If a request was made and the agents have not agreed
        yet, this method waits for them, at most ``limit_s`` seconds. After that time it returns True for a stop,
        because the rank has to stop in any case, and False for a save.
        """
        words = self._requests[request]
        calls = words[CALLS] + 1
        words[CALLS] = calls  # before it reads HOLD
        if words[HOLD] > words[AT] and not self._wait(words, limit_s):
            return request is Request.stop
        at = words[AT]
        return calls >= at > 0 if request is Request.stop else calls == at

    def _wait(self, words: memoryview[int], limit_s: float) -> bool:
        deadline = time.monotonic() + limit_s
        while words[HOLD] > words[AT]:
            if words[HOLD] == self._tired_of or time.monotonic() > deadline:
                self._tired_of = words[HOLD]  # a rank waits only once for a ticket
                return False
            self._times[BEAT] = self._times[MOVED] = time.monotonic()
            time.sleep(WAIT_S)
        return True

    @property
    def cause(self) -> int:
        """Number of the signal that caused the agreed stop; ``FROM_FILE`` for a file, 0 if the cause is not known."""
        return self._words[CAUSE]

    # The agent's side.

    @property
    def is_open(self) -> bool:
        """Return whether a rank has opened the file."""
        return self._words[PID] != 0

    def calls(self, request: Request) -> int:
        """Return how often the rank has polled for ``request``."""
        return self._requests[request][CALLS]

    def wants(self, request: Request) -> int:
        """Return the last value that the rank passed to ``want`` for ``request``; 0 if there was none."""
        return self._requests[request][WANTS]

    def set_hold(self, request: Request, ticket: int) -> None:
        """Make the rank wait at its next poll for ``request``, until ``set_at`` has set a poll of at least ``ticket``.

        ``ticket`` is the number that the agent of the head node gives to this request. It is larger than every poll
        that was set before.
        """
        self._requests[request][HOLD] = ticket

    def set_at(self, request: Request, call: int, cause: int = 0) -> None:
        """Set the poll at which the rank obeys ``request``. ``call`` is the number of the poll, from 1.

        ``cause`` of a stop is the number of its signal, or FROM_FILE; 0 for a save.
        """
        if request is Request.stop:
            self._words[CAUSE] = cause
        self._requests[request][AT] = call


def read_heartbeat(path: Path) -> RankHeartbeat | None:
    """Return the last heartbeat in the file ``path``; None before the first heartbeat, and without the file."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < SIZE:
        return None
    ran_at, moved_at, pid, step, phase = HEARTBEAT.unpack_from(data)
    return RankHeartbeat(ran_at, moved_at, pid, step, Phase(phase)) if pid else None
