"""Step records of ranks as columns of numbers, read ahead on every core."""

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

# Step records of one rank as columns: numbers of chosen fields, without a dictionary for each record.


Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

BLOCK = 1 << 16
"""Bytes that are decoded together: they stay in a core's cache while they are looked at."""
ATTEMPT = re.compile(rb'"attempt": ?(\d{1,9})[,}]')
"""Attempt in a line that is cut or garbled otherwise."""


@dataclass(frozen=True)
class RecordColumns:
    """Records of one rank in step order, each step once; arrays of [records]. A number that is unknown is NaN."""

    steps: Integers
    attempts: Integers
    known: Mapping[str, Flags]
    """Field -> where a record has a number there. Like ``values`` not to be written to: fields may share an array."""
    values: Mapping[str, Floats]
    last: dict[str, Any]
    """The record of the last step, whole; empty where there is no record."""
    unread: tuple[int | None, ...] = ()
    """Attempt of each line that is no record, in the order of the file; None where nothing in the file tells it."""
    has_open_end: bool = False
    """True where the last of these is the end of the file, without its newline: it may be being written."""

    def __len__(self) -> int:
        return len(self.steps)


def read_columns(path: Path, fields: Sequence[str], *, every: bool = False) -> RecordColumns:
    """Read the numbers of ``fields`` from the records of one rank; no file has no records.

    The same records count as for ``records.read_records``: lines torn by a crash are passed over and counted, and of a
    step that was done again the record of the later attempt counts; with ``every`` all are there, as the file has them.
    """
    names = tuple(dict.fromkeys(("step", "attempt", *fields)))
    parts = [_read_block(start, block, names) for start, block in _blocks(path)] or [_read_lines(0, b"", names)]
    known = np.concatenate([part.known for part in parts], axis=1)
    values = np.concatenate([part.values for part in parts], axis=1)
    kept = None if every or (np.diff(values[0]) > 0).all() else latest_records(values[0], values[1])
    size = values.shape[1]
    last = _record(path, parts, size - 1 if kept is None else int(kept[-1])) if size else {}
    if kept is not None:
        known, values = known[:, kept], values[:, kept]
    # A process that reads for another one sends what it found: fields that are nowhere, or everywhere, only once.
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
        last=last,
        unread=_unread(parts),
        has_open_end=parts[-1].has_open_end,
    )


def _unread(parts: Sequence[_Part]) -> tuple[int | None, ...]:
    """Return the attempts of the lines that are no records: where these do not tell, that of the record before.

    Before the first record it is that one's.
    """
    if not any(part.unread for part in parts):
        return ()
    found: list[int | None] = []
    attempt = next((int(part.values[1, 0]) for part in parts if len(part.lines)), None)
    for part in parts:
        found += [attempt if told is None else told for told in part.unread]
        if len(part.lines):
            attempt = int(part.values[1, -1])
    return tuple(found)


def latest_records(steps: Floats, attempts: Floats) -> Integers:
    """Indices of the records that count, by step: of the latest attempt, and of its lines the last."""
    order = np.lexsort((np.arange(len(steps)), attempts, steps))
    is_last: Integers = order[np.append(np.diff(steps[order]) > 0, True)]
    return is_last


def _blocks(path: Path) -> Iterator[tuple[int, bytes]]:
    """Whole lines of a file, ``BLOCK`` bytes of it at a time, and where each begins; a last line without its end is
    a line. No file: nothing."""
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
            if not end:  # what a writer adds to its last line meanwhile is no line
                return
            start += len(block)


@dataclass
class _Part:
    """Records of a block in the order of the file; arrays of [fields, records]."""

    start: int
    """Where the block begins in the file."""
    size: int
    """Bytes of it."""
    lines: Integers
    """Line of each record in the block."""
    known: Flags
    values: Floats
    unread: Sequence[int | None] = ()
    """Attempt of each other line, where it or a record before it in the block tells; blank ones are left out."""
    has_open_end: bool = False
    """True where the last of these has no newline."""


def _record(path: Path, parts: Sequence[_Part], index: int) -> dict[str, Any]:
    """Read one record of all parts whole."""
    for part in parts:
        if index < len(part.lines):
            break
        index -= len(part.lines)
    with path.open("rb") as file:
        file.seek(part.start)
        found: dict[str, Any] = json.loads(file.read(part.size).split(b"\n")[part.lines[index]])
    return found


@lru_cache
def _decoder(names: tuple[str, ...]) -> msgspec.json.Decoder[Any]:
    """Return the decoder of records of which ``names`` are wanted, in that order, the first two integers."""
    # Attributes have names of their own: a field of a script's records may have a name that Python would not take.
    attributes = [f"field_{index}" for index in range(len(names))]
    kinds = [
        (attribute, int) if index < 2 else (attribute, float | None, math.nan)
        for index, attribute in enumerate(attributes)
    ]
    # Rows hold no references to each other, and live for a block: nothing for the collector to look at.
    row = msgspec.defstruct("Row", kinds, rename=dict(zip(attributes, names, strict=True)), gc=False)
    return msgspec.json.Decoder(row)


def _read_block(start: int, block: bytes, names: tuple[str, ...]) -> _Part:
    """Read the records among some whole lines; the first two of ``names`` are step and attempt."""
    ends = np.count_nonzero(np.frombuffer(block, np.uint8) == ord("\n"))  # several times as fast as bytes.count
    size = ends + (not block.endswith(b"\n"))
    try:
        rows = _decoder(names).decode_lines(block)
        # As many values as lines are one in each. Text that is no ASCII may be no UTF-8 either, which is not looked at.
        if len(rows) == size and block.isascii():
            values = _table(rows, len(names)).T
            return _Part(start, len(block), np.arange(size), ~np.isnan(values), values)
    except (msgspec.DecodeError, OverflowError):
        pass  # of these lines some are torn, or hold what is no number, or numbers that only Python writes: NaN
    return _read_lines(start, block, names)


def _table(rows: Sequence[Any], fields: int) -> Floats:
    """Return the numbers of decoded rows, as [records, fields]."""
    try:  # all fields at once, which is two to three times as fast as one after another
        return np.fromiter(chain.from_iterable(map(astuple, rows)), np.float64, len(rows) * fields).reshape(-1, fields)
    except TypeError:  # null in some records, which is not known either
        return np.array([*map(astuple, rows)], np.float64)


def _read_lines(start: int, block: bytes, names: tuple[str, ...]) -> _Part:
    """Read the records of a block of which some lines are for Python to judge, line by line."""
    decoder = _decoder(names)
    lines, table, unread = list[int](), list[list[float | None]](), list[int | None]()
    at = -1
    for number, line in enumerate(block.split(b"\n")):
        try:
            if not line.isascii():
                raise msgspec.DecodeError
            row = decoder.decode(line)
            numbers = [None if value is None or math.isnan(value) else value for value in astuple(row)]
        except (msgspec.DecodeError, OverflowError):
            if (parsed := _parse(line, names)) is None:
                if line.strip():
                    at = number
                    unread.append(_attempt_of(line, table[-1][1] if table else None))
                continue
            numbers = parsed
        lines.append(number)
        table.append(numbers)
    values = np.array(table, np.float64).reshape(-1, len(names)).T
    known = np.array([[value is not None for value in numbers] for numbers in table], np.bool_)
    known = known.reshape(-1, len(names)).T
    return _Part(start, len(block), np.array(lines, np.int64), known, values, unread, at == number)


def _attempt_of(line: bytes, before: float | None) -> int | None:
    """Attempt that a line which is no record belongs to: what it tells itself, or that of the record before."""
    told = ATTEMPT.search(line)
    if told:
        return int(told[1])
    return None if before is None else int(before)


def _parse(text: bytes, names: tuple[str, ...]) -> list[float | None] | None:
    """Read one line as JSON; None where it is no record, and for each field that is no number."""
    try:
        record = json.loads(text)
    except ValueError:
        return None
    if not isinstance(record, dict) or not is_record(record):
        return None
    numbers = [_number(record.get(name)) for name in names]
    return None if None in numbers[:2] else numbers  # such a step is no number of any run


def _number(value: object) -> float | None:
    """Return a number as a double; None where it is none, or larger than any."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


# Files of many ranks read ahead of their use, in their order: on every core where there is much to read.


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
