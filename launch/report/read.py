"""Read the files of a run folder: step records as columns of numbers, and the environment of an attempt.

``read_ahead`` reads many files in several processes.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import multiprocessing
import os
import shlex
import signal
import threading
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np
import numpy.typing as npt
from msgspec.structs import astuple

from launch.errors import counted
from launch.runs.folder import RunFolder
from launch.runs.process import die_with_parent
from launch.runs.records import is_record

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]

# Step records of one rank.


BLOCK = 1 << 16
"""Number of bytes of a file of step records that are decoded in one call. They fit into the cache of a core."""
MOST_ATTEMPTS = 1 << 24
"""Factor of the step in ``RecordColumns.keys``. It is larger than every attempt number."""


@dataclass(frozen=True)
class RecordColumns:
    """Records of one rank in step order, each step once, as arrays of shape [records]."""

    steps: Integers
    attempts: Integers
    values: Mapping[str, Floats]
    """Field -> its numbers, [records], NaN where a record has no number.

    Read only: several fields may share one array.
    """
    unread: int = 0
    """Number of damaged lines. A last line without a newline does not count: the rank may still write it."""

    def __len__(self) -> int:
        return len(self.steps)

    @property
    def keys(self) -> Integers:
        """One number for each record, [records]. The numbers sort records by step, then by attempt."""
        return self.steps * MOST_ATTEMPTS + self.attempts


def read_columns(path: Path, fields: Sequence[str], *, every: bool = False) -> RecordColumns:
    """Return the numbers of ``fields`` in the records of one rank; no records if there is no file.

    Damaged lines are skipped. A step that several attempts made has only the record of its latest attempt, as in
    ``records.read_records``. With ``every``, all records of such a step are returned, in file order.
    """
    names = tuple(dict.fromkeys(("step", "attempt", *fields)))
    tables: list[Floats] = [np.empty((len(names), 0))]
    unread = 0
    for text in _whole_lines(path):
        table = _decode(text, names)
        if table is None:
            table, skipped = _decode_lines(text, names)
            unread += skipped
        tables.append(table)
    values = np.concatenate(tables, axis=1)
    if not every and (np.diff(values[0]) <= 0).any():
        # The last line of the latest attempt of each step counts. The sort is stable.
        order = np.lexsort((values[1], values[0]))
        values = values[:, order[np.append(np.diff(values[0][order]) > 0, True)]]
    # Reader processes send these arrays: all fields without a number share one array, which is sent once.
    unknown = np.full(values.shape[1], np.nan)
    return RecordColumns(
        steps=values[0].astype(np.int64),
        attempts=values[1].astype(np.int64),
        values={name: unknown if np.isnan(of).all() else of for name, of in zip(names[2:], values[2:], strict=True)},
        unread=unread,
    )


def _whole_lines(path: Path) -> Iterator[bytes]:
    """Yield blocks of whole lines of about ``BLOCK`` bytes each. The last line of the file may lack its newline."""
    try:
        file = path.open("rb")
    except (FileNotFoundError, NotADirectoryError):
        return
    with file:
        while text := file.read(BLOCK):
            text += file.readline()
            yield text
            if not text.endswith(b"\n"):  # A rank may still write the rest of this line: half a line does not count.
                return


@lru_cache
def _decoder(names: tuple[str, ...]) -> msgspec.json.Decoder[Any]:
    """Return a decoder that reads the fields ``names`` of a record; the first two are the step and the attempt."""
    # The attributes have generated names: a field of a script's records may have a name that Python does not allow.
    attributes = [f"field_{index}" for index in range(len(names))]
    kinds = [(name, int) if at < 2 else (name, float | None, math.nan) for at, name in enumerate(attributes)]
    # Rows have no references to each other and live for one block, so the garbage collector need not track them.
    row = msgspec.defstruct("Row", kinds, rename=dict(zip(attributes, names, strict=True)), gc=False)
    return msgspec.json.Decoder(row)


def _decode(text: bytes, names: tuple[str, ...]) -> Floats | None:
    """Return the numbers in whole lines, [fields, lines]; None if a line is damaged or a field is not a number."""
    try:
        rows = _decoder(names).decode_lines(text)
        # Counting newlines in an array is several times as fast as bytes.count.
        lines = np.count_nonzero(np.frombuffer(text, np.uint8) == ord("\n")) + (not text.endswith(b"\n"))
        # One record a line. msgspec does not check that text is UTF-8.
        if len(rows) == lines and text.isascii():
            try:  # All fields at once: two to three times as fast as one after another.
                numbers = np.fromiter(chain.from_iterable(map(astuple, rows)), np.float64, len(rows) * len(names))
            except TypeError:  # Some records contain null.
                numbers = np.array([*map(astuple, rows)], np.float64)
            return numbers.reshape(-1, len(names)).T
    except (msgspec.DecodeError, OverflowError):
        pass  # A line is damaged, or has NaN (which only Python's JSON reads), or a field that is no number.
    return None


def _decode_lines(text: bytes, names: tuple[str, ...]) -> tuple[Floats, int]:
    """Return the numbers of the records in whole lines, [fields, records], and the number of damaged lines.

    This function is slower than ``_decode``, but it also accepts damaged lines, which it skips. A field that is not a
    number becomes NaN. ``names`` are the fields.
    """
    table, unread = list[list[float]](), 0
    for line in io.BytesIO(text):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        numbers = [_number(record.get(name)) for name in names] if isinstance(record, dict) else [math.nan]
        if isinstance(record, dict) and is_record(record) and not np.isnan(numbers[:2]).any():
            table.append(numbers)
        else:
            unread += bool(line.strip()) and line.endswith(b"\n")
    return np.array(table, np.float64).reshape(-1, len(names)).T, unread


def _number(value: object) -> float:
    """Return ``value`` as a float; NaN if it is no number or too large."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


# Files of many ranks, read ahead of their use and returned in order.


Item = TypeVar("Item")
Result = TypeVar("Result")

MOST_PROCESSES = 8
"""Largest number of reading processes. More processes would wait for the single process that uses their results."""
TOGETHER = 4
"""Number of files whose records a process sends together. Sending each file alone took a tenth more processor time."""
MUCH = 128 << 20
"""Number of bytes above which several reading processes take less time than one, in spite of their start."""


def read_ahead(read: Callable[[Item], Result], items: Sequence[Item], size: int) -> Iterator[Result]:
    """Yield ``read(item)`` for each item in order.

    If ``size`` is ``MUCH`` or more, forked processes read the next items ahead. If this process has one CPU or several
    threads, it reads all items itself, because a lock of another thread would stay locked in a forked process.

    Args:
        read: pure function that reads a file and returns a value that can be pickled.
        items: arguments of ``read``.
        size: bytes of all files together.
    """
    readers = min(len(os.sched_getaffinity(0)), MOST_PROCESSES)
    if size < MUCH or readers < 2 or threading.active_count() > 1:
        yield from map(read, items)
        return
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(readers, mp_context=fork, initializer=_start_reader, initargs=(os.getpid(),)) as pool:
        ahead: deque[Iterator[Result]] = deque()
        for start in range(0, len(items), TOGETHER):
            ahead.append(pool.map(read, items[start : start + TOGETHER], chunksize=TOGETHER))
            if len(ahead) > readers:
                yield from ahead.popleft()
        for results in ahead:
            yield from results


def _start_reader(parent: int) -> None:
    """Ignore Ctrl-C in a reader process, and end the process with its parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    die_with_parent(parent)


# Environment of an attempt, as ``environment.json`` records it.


NO_CHANGES = hashlib.sha256(b"").hexdigest()


class RankPlace(msgspec.Struct, frozen=True):
    """Node, host and device of one rank. ``machine`` is the physical machine, which may have several nodes."""

    node: int
    host: str
    machine: str
    device: str
    device_name: str
    cores: int
    threads: int
    # CUDA numbers devices per process: two ranks may both record cuda:0 and have different GPUs.
    gpu: str | None = msgspec.field(default=None, name="device_uuid")


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Environment of one attempt. Batches are in sequences, ``block_size`` in tokens; None means not recorded."""

    ranks: tuple[RankPlace, ...]
    workload: str = "gpt"
    weak_scaling: bool | None = None
    stated_unit: str | None = msgspec.field(default=None, name="unit")
    work_per_step: float | None = None
    """Units of work of all ranks together in a step, as the user stated them; None if the user did not."""
    command_words: list[Any] | None = msgspec.field(default=None, name="command")
    mesh: dict[str, Any] | None = msgspec.field(default=None, name="topology")
    """Parallelism strategy (``strategy``), and the number of ranks along each dimension; None if not recorded."""
    global_batch: int | None = None
    micro_batch: int | None = None
    accumulation: int | None = None
    block_size: int | None = None
    precision: str | None = None
    model: str | None = None
    parameters: int | None = None
    software: dict[str, Any] | None = None
    git: dict[str, Any] | None = None

    @property
    def unit(self) -> str | None:
        """Unit of the throughput: tokens, samples or images; None if not recorded."""
        return self.stated_unit or (None if self.block_size is None else "tokens")

    @property
    def command(self) -> str | None:
        """Command line of a script as a user types it; None if not recorded, and for a Python function."""
        return (
            None
            if self.command_words is None or self.workload == "function"
            else shlex.join(map(str, self.command_words))
        )

    @property
    def topology(self) -> str | None:
        """Strategy and each parallel dimension above 1, such as ``deepspeed_zero0 dp_replicate=2 pp=2``.

        None if not recorded.
        """
        if self.mesh is None:
            return None
        strategy = str(self.mesh["strategy"])
        name = f"deepspeed_{strategy.removeprefix('ds_')}" if strategy.startswith("ds_") else strategy
        return " ".join([name, *(f"{key}={n}" for key, n in self.mesh.items() if isinstance(n, int) and n > 1)])

    @property
    def per_rank_batch(self) -> int | None:
        """Sequences that one rank processes in a step; None if not recorded."""
        known = self.micro_batch is not None and self.accumulation is not None
        return self.micro_batch * self.accumulation if known else None  # type: ignore[operator]

    @property
    def torch(self) -> str | None:
        """Version of PyTorch; None if not recorded."""
        return (self.software or {}).get("torch")

    @property
    def commit(self) -> str | None:
        """Commit of the code; None if not recorded."""
        return (self.git or {}).get("commit")

    @property
    def code(self) -> str | None:
        """First 12 digits of the commit, and a digest of uncommitted changes; None if not recorded."""
        changes = (self.git or {}).get("diff_sha256")
        if self.commit is None:
            return None
        return self.commit[:12] + (f" with changes {changes[:8]}" if changes not in (None, "", NO_CHANGES) else "")

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return len(self.ranks)

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return len({place.node for place in self.ranks})

    @property
    def device_names(self) -> str:
        """Names of the kinds of devices, joined by ``and``."""
        return " and ".join(sorted({place.device_name for place in self.ranks}))

    def setup(self) -> tuple[Any, ...]:
        """Return the properties that affect step times: parallelism, batch, work, precision, model and devices.

        The step times of attempts with equal setups belong together.
        """
        kinds = sorted((place.device_name, place.cores, place.threads) for place in self.ranks)
        machines = len({place.machine for place in self.ranks})
        batch = (self.global_batch, self.per_rank_batch, self.weak_scaling, self.block_size)
        work = (self.unit, self.work_per_step)
        return (self.topology, batch, work, self.precision, self.model, self.parameters, kinds, machines)

    def crowding(self) -> list[str]:
        """Return one phrase, with the hosts, for each way in which ranks shared cores or a GPU.

        Empty if no ranks shared them.
        """
        machines: dict[str, list[RankPlace]] = defaultdict(list)
        for place in self.ranks:
            machines[place.machine].append(place)
        where: dict[str, list[str]] = defaultdict(list)
        for places in machines.values():
            hosts = [place.host for place in places]
            gpus = Counter(place.gpu or place.device for place in places if place.device != "cpu")
            for ranks in dict.fromkeys(gpus.values()):
                if ranks > 1:
                    where[f"{ranks} ranks on one GPU"] += hosts
            on_cpu = [place for place in places if place.device == "cpu"]
            threads, cores = sum(place.threads for place in on_cpu), max((place.cores for place in on_cpu), default=0)
            if threads > cores:
                where[f"{counted(threads, 'thread')} on {counted(cores, 'core')}"] += hosts
        return [f"{what} of {' to '.join(dict.fromkeys((hosts[0], hosts[-1])))}" for what, hosts in where.items()]


def read_environment(run: RunFolder, attempt: int) -> Environment | None:
    """Return the environment of one attempt; None if its file is absent or damaged."""
    try:
        return msgspec.json.decode(run.environment(attempt).read_bytes(), type=Environment)
    except (OSError, msgspec.DecodeError):
        return None
