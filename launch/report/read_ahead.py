"""Files of many ranks read ahead of their use, in their order: on every core where there is much to read.

Owns the choice between processes and threads. Must not know what is in the files.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import TypeVar

from launch.process import die_with_parent

Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 2
"""Threads that read: while one file is looked at, the next one comes from the filesystem."""
MOST_PROCESSES = 8
"""More of them read faster than one process takes what they read."""
TOGETHER = 4
"""Files that a process reads before it hands them over: one by one took a tenth more processor time in all."""
MUCH = 128 << 20
"""Bytes from which processes, which read on every core, make up for their start."""


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], size: int) -> Iterator[tuple[Item, Result]]:
    """Yield each item with what ``read`` makes of it, in order; a few more are under way meanwhile.

    Args:
        read: a pure function, which reads a file; its result can be pickled.
        items: what is read.
        size: bytes of all files together.
    """
    readers = processes_for(size)
    together = TOGETHER if readers else 1
    with executor(readers) as pool:
        ahead: deque[tuple[tuple[Item, ...], Future[list[Result]]]] = deque()
        left = iter(items)
        while group := tuple(islice(left, together)):
            ahead.append((group, pool.submit(_read_all, read, group)))
            if len(ahead) > max(readers, THREADS):
                first, found = ahead.popleft()
                yield from zip(first, found.result(), strict=True)
        for first, found in ahead:
            yield from zip(first, found.result(), strict=True)


def _read_all(read: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [read(item) for item in items]


def processes_for(size: int) -> int:
    """Number of processes that read so many bytes; 0 where threads do.

    A process with threads must not be forked: a lock that one of them holds would stay locked.
    """
    cores = len(os.sched_getaffinity(0))
    if size < MUCH or cores < 2 or threading.active_count() > 1:
        return 0
    return min(cores, MOST_PROCESSES)


def executor(processes: int) -> Executor:
    """Return so many forked processes, which end with this one; threads where it is none."""
    if not processes:
        return ThreadPoolExecutor(THREADS)
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(processes, mp_context=fork, initializer=become_reader, initargs=(os.getpid(),))


def become_reader(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)


def size_of(paths: Iterable[Path]) -> int:
    """Bytes of some files; those that are gone have none."""
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total
