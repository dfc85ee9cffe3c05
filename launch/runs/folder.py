"""The run folder: paths of the files of a run, functions that read and write them, and errors for damaged files.

Files are JSON that is replaced as a whole, and JSON lines that are appended.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import hashlib
import json
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from pathlib import Path
from shlex import quote
from typing import IO, Any

from ..errors import ConfigError

# Files: JSON that is replaced as a whole, and JSON lines that are appended.


class ReportFile(Enum):
    """Format of a report's file.

    ``tensorboard`` is a folder of event files. TensorBoard shows it as a run named Scaling (of a sweep) or Summary (of
    a single run).
    """

    md = "md"
    csv = "csv"
    png = "png"
    svg = "svg"
    json = "json"
    html = "html"
    tensorboard = "tensorboard"


NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
"""Error numbers of a filesystem, or of its server, without file locks."""


def deny_others_writing() -> None:
    """Set the umask so that only the owner can write to files of this process and of its children.

    The permissions to read stay as the user set them. Call this function at the start of a command, because the umask
    applies to the whole process.
    """
    os.umask(os.umask(0o077) | 0o022)


def make_folder(path: Path) -> None:
    """Make a folder that only its owner can write to, even if a default ACL of its parent allows others to write."""
    path.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    if mode & 0o022:
        path.chmod(mode & ~0o022)


def numbers_in(folder: Path, prefix: str = "", suffix: str = "") -> list[int]:
    """Return the numbers in the names of a folder's entries, between ``prefix`` and ``suffix``, in ascending order."""
    names = (path.name.removeprefix(prefix).removesuffix(suffix) for path in folder.glob(f"{prefix}*{suffix}"))
    return sorted(int(name) for name in names if name.isdigit())


def make_numbered(folder: Path) -> Path:
    """Make the next numbered folder in ``folder`` (0001, 0002, ...) and return its path.

    No two calls get the same number.
    """
    number = max(numbers_in(folder), default=0)
    while True:
        number += 1
        path = folder / f"{number:04d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path


def append_json_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append each of ``values`` as one line, all in one write. Several processes and hosts may append to one file.

    O_APPEND is not atomic on NFS, so the file is locked around the write. A filesystem without locks, such as Lustre
    mounted without ``flock``, has O_APPEND alone. If a crash left an incomplete last line, a line break is written
    first, so that no new line is lost.
    """
    data = b"".join(json.dumps(value).encode() + b"\n" for value in values)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+", buffering=0) as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
        append_whole(file.fileno(), end_of_torn_line(file.fileno()) + data)


def append_whole(descriptor: int, data: bytes) -> None:
    """Append all of ``data`` to an open file to which no other process writes now.

    If a full disk takes only a part of ``data``, remove the part again. Otherwise a later call would write the lines of
    the part a second time.

    Raises:
        OSError: ``data`` cannot be written.
    """
    size = os.fstat(descriptor).st_size
    try:
        written = 0
        while written < len(data):
            written += os.write(descriptor, data[written:])
    except OSError:
        with suppress(OSError):
            os.ftruncate(descriptor, size)
        raise


def open_to_append(path: Path) -> int:
    """Open a file of lines for its only writer and return the descriptor. Ends an incomplete last line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    os.write(descriptor, end_of_torn_line(descriptor))
    return descriptor


def end_of_torn_line(descriptor: int) -> bytes:
    """Return a line break if the last line of a file has none, because a crash cut the line off; otherwise no bytes."""
    size = os.fstat(descriptor).st_size
    return b"\n" if size and os.pread(descriptor, 1, size - 1) != b"\n" else b""


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects in the lines of a JSONL file.

    Damaged lines are skipped. Yields nothing if the file does not exist.
    """
    try:
        lines = path.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return
    yield from parse_json_lines(lines)


def parse_json_lines(lines: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in ``lines``. Lines without a JSON object are skipped."""
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def write_atomically(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file so that its content is always either the old content or all of ``data``, even after a crash.

    Args:
        path: path of the file; missing folders are made.
        data: the whole content.
        mode: permissions of the file from its creation, minus the umask; 0o600 if only the owner may read the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # left behind by a killed process of the same number
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any, mode: int = 0o666) -> None:
    """Write ``value`` atomically as indented JSON. ``mode`` has the permissions of the file, minus the umask."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode(), mode)


def is_own(file: IO[bytes]) -> bool:
    """Return whether this user owns an open file, and no other user may write into the file.

    The check protects readers of pickles, which are code.
    """
    found = os.fstat(file.fileno())
    return found.st_uid == os.getuid() and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def read_json(path: Path) -> dict[str, Any]:
    """Return the dictionary in a JSON file; empty if the file does not exist or contains anything else."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


# Lines that do not fit on a full filesystem. An agent or a rank keeps them in memory, in order, and continues.


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EIO)
"""Error numbers of a filesystem that is full, over its quota, or failing."""
KEPT = 10_000
"""Largest number of lines that are kept for one file; the oldest lines are dropped first."""

_kept: dict[Path, deque[Mapping[str, Any]]] = {}
_lock = threading.Lock()
_keeps = False


def keep_unwritten() -> None:
    """Make ``append_lines`` keep lines in memory while the filesystem is full, over its quota or failing (``NO_ROOM``).

    Agents and ranks call this function. At their end, they try to write the lines a last time.
    """
    global _keeps
    if not _keeps:
        _keeps = True
        atexit.register(tell_unwritten)


def append_lines(path: Path, values: Iterable[Mapping[str, Any]]) -> None:
    """Append each of ``values`` to the file ``path``, as a line of JSON.

    After ``keep_unwritten``, lines are kept in memory while the filesystem is full, over its quota or failing
    (``NO_ROOM``). The next call for the same file writes the kept lines first.

    Raises:
        OSError: the lines can neither be written nor be kept in memory.
    """
    with _lock:
        waiting = _kept.get(path, deque(maxlen=KEPT))
        lines = [*waiting, *values]
        try:
            append_json_lines(path, lines)
        except OSError as error:
            if not _keeps or error.errno not in NO_ROOM:
                raise
            if path not in _kept:
                say(f"{path} cannot be written: {error.strerror}; what belongs there is kept until there is room")
            _kept[path] = deque(lines, maxlen=KEPT)
            return
        if _kept.pop(path, None) is not None:
            say(f"{path} is written again, {len(waiting)} lines late")


def has_written(path: Path, value: Any, mode: int = 0o666) -> bool:
    """Write a JSON file, and return True. Return False if it cannot be written because of an error in ``NO_ROOM``: the
    filesystem is full, over its quota, or failing.

    ``mode`` has the permissions of the file, minus the umask.

    Raises:
        OSError: the file cannot be written because of another error.
    """
    try:
        write_json(path, value, mode)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        return False
    return True


def unwritten(path: Path) -> list[dict[str, Any]]:
    """Return the lines that this process keeps in memory for the file ``path``, oldest first, as parsed JSON."""
    with _lock:
        return [json.loads(json.dumps(value)) for value in _kept.get(path, ())]


def write_unwritten() -> None:
    """Try again to write the lines that are kept in memory."""
    for path in list(_kept):
        append_lines(path, [])


def tell_unwritten() -> None:
    """Try a last time to write the lines that are kept in memory. Print those that still cannot be written, with the
    path of their file, on standard error."""
    write_unwritten()
    for path, lines in _kept.items():
        for value in lines:
            say(f"not in {path}: {json.dumps(value)}")


def say(text: str) -> None:
    """Print ``text`` on standard error. Ignores errors, because the log may be on the same full filesystem."""
    try:
        print(text, file=sys.stderr, flush=True)
    except OSError:
        return


def is_full(folder: Path) -> bool:
    """Return whether the filesystem of a folder is full; False if this cannot be read. Quotas are not considered."""
    try:
        found = os.statvfs(folder)
    except OSError:
        return False
    return found.f_bavail * found.f_frsize < FULL_BYTES


FULL_BYTES = 64 * 1024
"""Number of free bytes below which a filesystem counts as full: the blocks of a small file."""


# The run folder.


def log_name(rank: int) -> str:
    """Return the name of the file with the output of a rank."""
    return f"rank_{rank:05d}.log"


class RunFolder:
    """Paths of the files of a run in its folder, ``<output_dir>/<name>/<point>``. The constructor creates nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.point = self.path.name
        """Name of this point of the sweep."""
        self.config = self.path / ".hydra" / "config.yaml"
        """YAML file with the composed config of the run, at the path where Hydra writes it."""
        self.overrides = self.path / ".hydra" / "overrides.yaml"
        """YAML file with the list of the overrides of this run."""
        self.plan = self.path / "plan.json"
        """JSON file with the plan of the run, written before its start."""
        self.events = self.path / "events.jsonl"
        """JSONL file of the event log."""
        self.tensorboard = self.path / "tensorboard"
        """Folder of rank 0's event files for TensorBoard."""
        self.steps_csv = self.path / "steps.csv"
        """CSV file with the step records of rank 0."""
        self.run_json = self.path / "run.json"
        """JSON file with the config, steps, evaluations, checkpoints and summary of the run."""
        self.checkpoints = self.path / "checkpoints"
        """Folder of the checkpoints, with a folder for each saved step."""
        self.tokenizer = self.path / "tokenizer"
        """Folder with the tokenizer of the run; absent if the data names none."""
        self.aside = self.path / "aside"
        """Folder of step records and checkpoints that the run no longer uses, because it returned to an earlier step.

        Each return has a numbered folder there.
        """

    def attempt(self, number: int) -> Path:
        """Return the folder of an attempt. An attempt is one start of the ranks, counted from 1."""
        return self.path / "attempts" / f"{number:04d}"

    def environment(self, attempt: int) -> Path:
        """Return the path of the JSON file with hosts, devices, software and commit of an attempt."""
        return self.attempt(attempt) / "environment.json"

    def ds_config(self, attempt: int) -> Path:
        """Return the path of the JSON file with the DeepSpeed config of an attempt."""
        return self.attempt(attempt) / "ds_config.json"

    def log(self, attempt: int, rank: int) -> Path:
        """Return the path of the file with everything that a rank printed in an attempt."""
        return self.attempt(attempt) / "logs" / log_name(rank)

    def metrics(self, rank: int) -> Path:
        """Return the path of the JSONL file with the step records of a rank, over all attempts."""
        return self.path / "metrics" / f"rank_{rank:05d}.jsonl"

    def telemetry(self, node: int) -> Path:
        """Return the path of the JSONL file with the GPU samples of a node, over all attempts."""
        return self.path / "telemetry" / f"node_{node:05d}.jsonl"

    def attempts(self) -> list[int]:
        """Return the numbers of all attempts, oldest first."""
        return numbers_in(self.path / "attempts")

    def create_attempt(self) -> int:
        """Make the folder of the next attempt and return the number of the attempt.

        No two processes get the same number.
        """
        made = make_numbered(self.path / "attempts")
        (made / "logs").mkdir()
        return int(made.name)

    def metric_ranks(self) -> list[int]:
        """Return the numbers of the ranks that have step records, ascending."""
        return numbers_in(self.path / "metrics", "rank_", ".jsonl")

    def record_event(self, event: str, **details: Any) -> None:
        """Append one event to the event log. The time (Unix seconds) is added.

        If the filesystem is full, an agent or a rank keeps the event in memory (``keep_unwritten``).
        """
        append_lines(self.events, [{"time": time.time(), "event": event, **details}])

    def read_events(self) -> list[dict[str, Any]]:
        """Return the events in the event log, oldest first, then the events that this process could not write yet.

        Damaged lines are skipped.
        """
        return [event for event in (*read_json_lines(self.events), *unwritten(self.events)) if is_event(event)]

    def tracker_id(self, rank: int = 0) -> str:
        """Return the id of a rank in an experiment tracker, 32 letters and digits.

        The id is the same in every attempt. A new run in the same folder, after this run was deleted, has another id.
        """
        first = next(iter(self.read_events()), {})
        digest = hashlib.sha256(f"{self.path} {first.get('time')}".encode()).hexdigest()
        return f"{digest[:24]}{rank:08d}"

    def unread_events(self) -> int:
        """Return the number of lines of the event log that are neither events nor blank.

        A last line without an end is not counted, because a process may still be writing the line.
        """
        try:
            data = self.events.read_bytes()
        except OSError:
            return 0
        lines = [line for line in data[: data.rfind(b"\n") + 1].splitlines() if line.strip()]
        return len(lines) - sum(map(is_event, parse_json_lines(lines)))


def is_event(value: dict[str, Any]) -> bool:
    """Return whether the object in a line of the event log is an event: it has a name and a time."""
    return isinstance(value.get("event"), str) and isinstance(value.get("time"), int | float)


def is_newest_attempt(folder: RunFolder, attempt: int) -> bool:
    """Return whether ``attempt`` is the newest attempt of a run. Reads the filesystem."""
    return max(folder.attempts(), default=0) <= attempt


# Refusals of damaged files, and of folders that cannot be written. Each names the file.


FIXES = {
    "config.yaml": "the same command with fresh=true, for a new folder next to it; or the file from a backup",
    "plan.json": "the same command again when no job of the run is left, which writes the file again",
    "overrides.yaml": "rm {path}; without it a report names the point by its folder",
    "sweep.json": "rm {path}; the folder sweeps/ next to it has every sweep, and without it a report takes all runs",
    "events.jsonl": "the file from a backup; without it, squeue --me and scancel JOB for a job that still runs",
}
"""Name of a file -> what a user can type if the file is damaged."""


def damaged(path: Path, why: str) -> ConfigError:
    """Return the ConfigError for a damaged file. ``why`` describes the damage."""
    fix = FIXES.get(path.name, "the file from a backup").format(path=quote(str(path)))
    return ConfigError(f"{path}, which is damaged: {why}", "the file as it was written with the run", fix)


def read_plan(folder: RunFolder) -> dict[str, Any]:
    """Return the content of ``plan.json``; empty if there is no such file, as in a run of ``gpt.train``.

    Raises:
        ConfigError: the file is damaged.
    """
    return read_mapping(folder.plan) if folder.plan.exists() else {}


def read_strictly(path: Path) -> Any:
    """Return the content of a JSON or YAML file.

    Raises:
        ConfigError: the file cannot be read or parsed.
    """
    try:
        data = path.read_bytes()
        if path.suffix == ".json":
            return json.loads(data)
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    import yaml  # a rank imports this module, and its Python may have the standard library alone

    try:
        return yaml.safe_load(data.decode())
    except (ValueError, yaml.YAMLError) as error:
        raise unreadable(path, error) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the mapping in a JSON or YAML file. Raises ConfigError if the file has no mapping."""
    value = read_strictly(path)
    if not isinstance(value, dict) or not value:
        raise damaged(path, "it is empty" if not value else "it has no keys")
    return value


def unreadable(path: Path, error: BaseException) -> ConfigError:
    """Return the ConfigError for a file that raised ``error`` when it was read."""
    if isinstance(error, OSError):
        return damaged(path, str(error.strerror))
    if not path.read_bytes().strip():
        return damaged(path, "it is empty")
    return damaged(path, " ".join(str(error).split()))


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Turn an OSError of the ``with`` block, which writes into the run folder ``folder``, into ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be written: {error.strerror}",
            "a folder that this user may write into, with room, on a filesystem that all nodes see",
            "output_dir=FOLDER, or run_dir=FOLDER",
        ) from error
