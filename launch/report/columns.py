"""Step records of ranks as columns of numbers, and files of many ranks read ahead on every core."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import astuple

from launch.process import die_with_parent
from launch.runs.records import is_record

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BLOCK = 1 << 16
"""Bytes that are decoded together: they stay in a core's cache while they are read."""
ATTEMPT = re.compile(rb'"attempt": ?(\d{1,9})[,}]')
"""Attempt in a line that is cut or garbled otherwise."""


@dataclass(frozen=True)
class RecordColumns:
    """Records of one rank in step order, each step once; arrays of [records]. An unknown number is NaN."""

    steps: Integers
    attempts: Integers
    known: Mapping[str, Flags]
    """Field -> True where a record has a number. Read only, like ``values``: fields may share an array."""
    values: Mapping[str, Floats]
    last: dict[str, Any]
    """The whole record of the last step; empty if there is no record."""
    unread: tuple[int | None, ...] = ()
    """Attempt of each line that is no record, in the order of the file; None if the file does not say."""
    has_open_end: bool = False
    """True if the last unread line is the end of the file without a newline: a rank may be writing it."""

    def __len__(self) -> int:
        return len(self.steps)


@dataclass
class _Block:
    """Records of one block of a file, in its order; arrays of [fields, records]."""

    start: int
    """Offset of the block in the file, bytes."""
    size: int
    lines: Integers
    """Line number of each record in the block."""
    known: Flags
    values: Floats
    unread: Sequence[int | None] = ()
    """Attempt of each other line that is not blank; None if neither the line nor a record before it says."""
    has_open_end: bool = False


def read_columns(path: Path, fields: Sequence[str], *, every: bool = False) -> RecordColumns:
    """Return the numbers of ``fields`` in the records of one rank; no records if there is no file.

    The same records count as in ``records.read_records``: torn lines are counted and skipped, and a repeated step has
    the record of its latest attempt. With ``every`` all records are returned in the order of the file.
    """
    names = tuple(dict.fromkeys(("step", "attempt", *fields)))
    blocks = [_decode(start, text, names) for start, text in _whole_lines(path)] or [_decode_lines(0, b"", names)]
    known = np.concatenate([block.known for block in blocks], axis=1)
    values = np.concatenate([block.values for block in blocks], axis=1)
    last = values.shape[1] - 1
    if not every and (np.diff(values[0]) <= 0).any():
        kept = latest_records(values[0], values[1])
        known, values, last = known[:, kept], values[:, kept], int(kept[-1])
    # Reader processes send these arrays: an array that is all known, or all unknown, is sent only once.
    size = values.shape[1]
    everywhere, nowhere, unknown = np.ones(size, np.bool_), np.zeros(size, np.bool_), np.full(size, np.nan)
    counts = known.sum(axis=1).tolist()
    return RecordColumns(
        steps=values[0].astype(np.int64),
        attempts=values[1].astype(np.int64),
        known={
            name: everywhere if counts[index] == size else known[index] if counts[index] else nowhere
            for index, name in enumerate(names)
        },
        values={name: values[index] if counts[index] else unknown for index, name in enumerate(names)},
        last=_record(path, blocks, last) if size else {},
        unread=_attempts_of_unread(blocks),
        has_open_end=blocks[-1].has_open_end,
    )


def latest_records(steps: Floats, attempts: Floats) -> Integers:
    """Return the indices of the records that count, by step: the last line of the latest attempt."""
    order = np.lexsort((np.arange(len(steps)), attempts, steps))
    is_last: Integers = order[np.append(np.diff(steps[order]) > 0, True)]
    return is_last


def _whole_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the bytes of about ``BLOCK`` bytes of whole lines; the last line may lack its newline."""
    try:
        file = path.open("rb", buffering=0)
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        start = 0
        while block := file.read(BLOCK):
            while (end := block.rfind(b"\n") + 1) == 0 and (more := file.read(BLOCK)):
                block += more
            if end and end < len(block):  # the rest is read again with the lines that it belongs to
                block = block[:end]
                file.seek(start + end)
            yield start, block
            if not end:  # what a rank adds to its last line meanwhile is no line
                return
            start += len(block)


def _record(path: Path, blocks: Sequence[_Block], index: int) -> dict[str, Any]:
    """Return one whole record, by its index among the records of all blocks."""
    for block in blocks:
        if index < len(block.lines):
            break
        index -= len(block.lines)
    with path.open("rb") as file:
        file.seek(block.start)
        found: dict[str, Any] = json.loads(file.read(block.size).split(b"\n")[block.lines[index]])
    return found


def _attempts_of_unread(blocks: Sequence[_Block]) -> tuple[int | None, ...]:
    """Return the attempts of the lines that are no records: by the line, or the record before, or the first record."""
    found: list[int | None] = []
    attempt = next((int(block.values[1, 0]) for block in blocks if len(block.lines)), None)
    for block in blocks:
        found += [attempt if stated is None else stated for stated in block.unread]
        if len(block.lines):
            attempt = int(block.values[1, -1])
    return tuple(found)


@lru_cache
def _decoder(names: tuple[str, ...]) -> msgspec.json.Decoder[Any]:
    """Return the decoder of the fields ``names`` of a record, of which the first two are integers."""
    # Attributes have names of their own: a field of a script's records may have a name that Python does not allow.
    attributes = [f"field_{index}" for index in range(len(names))]
    kinds = [
        (attribute, int) if index < 2 else (attribute, float | None, math.nan)
        for index, attribute in enumerate(attributes)
    ]
    # Rows hold no references to each other, and live for a block: the garbage collector has nothing to do.
    row = msgspec.defstruct("Row", kinds, rename=dict(zip(attributes, names, strict=True)), gc=False)
    return msgspec.json.Decoder(row)


def _decode(start: int, text: bytes, names: tuple[str, ...]) -> _Block:
    """Return the records of some whole lines; the first two of ``names`` are step and attempt."""
    ends = np.count_nonzero(np.frombuffer(text, np.uint8) == ord("\n"))  # several times as fast as bytes.count
    size = ends + (not text.endswith(b"\n"))
    try:
        rows = _decoder(names).decode_lines(text)
        # As many values as lines: one in each line. Text that is not ASCII may be no UTF-8, which msgspec ignores.
        if len(rows) == size and text.isascii():
            try:  # all fields at once: two to three times as fast as one after another
                numbers = np.fromiter(chain.from_iterable(map(astuple, rows)), np.float64, size * len(names))
            except TypeError:  # null in some records: unknown
                numbers = np.array([*map(astuple, rows)], np.float64)
            values = numbers.reshape(-1, len(names)).T
            return _Block(start, len(text), np.arange(size), ~np.isnan(values), values)
    except (msgspec.DecodeError, OverflowError):
        pass  # some lines are torn, or have NaN, which only Python's JSON knows, or a field that is no number
    return _decode_lines(start, text, names)


def _decode_lines(start: int, text: bytes, names: tuple[str, ...]) -> _Block:
    """Return the same as ``_decode`` with Python's JSON, line by line."""
    lines, table, unread = list[int](), list[list[float | None]](), list[int | None]()
    is_last_unread = False
    for line_number, line in enumerate(text.split(b"\n")):
        numbers = _numbers(line, names)
        is_last_unread = numbers is None and bool(line.strip())
        if numbers is not None:
            lines.append(line_number)
            table.append(numbers)
        elif is_last_unread:
            stated, before = ATTEMPT.search(line), table[-1][1] if table else None
            unread.append(int(stated[1]) if stated else None if before is None else int(before))
    values = np.array(table, np.float64).reshape(-1, len(names)).T
    known = np.array([[value is not None for value in numbers] for numbers in table], np.bool_)
    known = known.reshape(-1, len(names)).T
    return _Block(start, len(text), np.array(lines, np.int64), known, values, unread, is_last_unread)


def _numbers(line: bytes, names: tuple[str, ...]) -> list[float | None] | None:
    """Return the number of each field in one line, None for a field without one; None if it is no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not is_record(record):
        return None
    numbers: list[float | None] = []
    for name in names:
        value = record.get(name)
        try:
            numbers.append(None if isinstance(value, bool) or not isinstance(value, int | float) else float(value))
        except OverflowError:
            numbers.append(None)
    return None if None in numbers[:2] else numbers  # no run has such a step


# Files of many ranks, read ahead of their use and returned in order.


Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = 2
"""Reading threads: while one file is reduced, the next one comes from the filesystem."""
MOST_PROCESSES = 8
"""More reading processes deliver faster than one process reduces."""
TOGETHER = 4
"""Files that a process reads before it sends them: one by one took a tenth more processor time in all."""
MUCH = 128 << 20
"""Bytes from which reading processes, one a core, make up for their start."""


def read_ahead(read: Callable[[Item], Result], items: Iterable[Item], size: int) -> Iterator[tuple[Item, Result]]:
    """Yield each item with the result of ``read``, in order, while a few more are read.

    Args:
        read: a pure function that reads a file; its result can be pickled.
        items: arguments of ``read``.
        size: bytes of all files together.
    """
    readers = processes_for(size)
    left = iter(items)
    with executor(readers) as pool:
        ahead: deque[tuple[tuple[Item, ...], Future[list[Result]]]] = deque()
        while True:
            group = tuple(islice(left, TOGETHER if readers else 1))
            if group:
                ahead.append((group, pool.submit(_read_all, read, group)))
            if not ahead:
                return
            if not group or len(ahead) > max(readers, THREADS):
                first, found = ahead.popleft()
                yield from zip(first, found.result(), strict=True)


def _read_all(read: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    return [read(item) for item in items]


def processes_for(size: int) -> int:
    """Return the number of processes that read ``size`` bytes; 0 if threads do.

    A process with threads must not be forked: a lock that one of its threads has would stay locked.
    """
    cores = len(os.sched_getaffinity(0))
    if size < MUCH or cores < 2 or threading.active_count() > 1:
        return 0
    return min(cores, MOST_PROCESSES)


def executor(processes: int) -> Executor:
    """Return a pool of forked processes, which end with this one; of threads if ``processes`` is 0."""
    if not processes:
        return ThreadPoolExecutor(THREADS)
    fork = multiprocessing.get_context("fork")
    return ProcessPoolExecutor(processes, mp_context=fork, initializer=become_reader, initargs=(os.getpid(),))


def become_reader(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)


def size_of(paths: Iterable[Path]) -> int:
    """Return the bytes of some files; files that are gone have none."""
    total = 0
    for path in paths:
        try:
            total += path.stat().st_size
        except OSError:
            continue
    return total
