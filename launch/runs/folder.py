"""The run folder: where each file of a run lies, and the ledger of what happened to it.

Owns the paths and ``events.jsonl``. Torch-free; read by the launcher and the reports. Must not know who writes what.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

NAME_LIMIT = 120  # a folder name holds 255 bytes on common filesystems; leaves room for suffixes


class RunFolder:
    """Paths inside ``<output_dir>/<name>/<point>``. Creates nothing by itself."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @property
    def point(self) -> str:
        """The name of this point of the sweep."""
        return self.path.name

    @property
    def config(self) -> Path:
        """The composed configuration of the run, Hydra's own file."""
        return self.path / ".hydra" / "config.yaml"

    @property
    def overrides(self) -> Path:
        """What was typed to get this point, a YAML list."""
        return self.path / ".hydra" / "overrides.yaml"

    @property
    def plan(self) -> Path:
        """What was promised before the start."""
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        """The ledger."""
        return self.path / "events.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Event files of rank 0."""
        return self.path / "tensorboard"

    @property
    def steps_csv(self) -> Path:
        """Rank 0's step records as a table."""
        return self.path / "steps.csv"

    @property
    def run_json(self) -> Path:
        """The whole run as one value."""
        return self.path / "run.json"

    @property
    def checkpoints(self) -> Path:
        """One folder for each saved step."""
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        """The tokenizer the run is trained with, where that is known."""
        return self.path / "tokenizer"

    def attempt(self, number: int) -> Path:
        """Folder of one (re)start, counted from 1."""
        return self.path / "attempts" / f"{number:04d}"

    def environment(self, attempt: int) -> Path:
        """What one attempt ran on: hosts, devices, software, commit."""
        return self.attempt(attempt) / "environment.json"

    def ds_config(self, attempt: int) -> Path:
        """What one attempt started DeepSpeed with."""
        return self.attempt(attempt) / "ds_config.json"

    def log(self, attempt: int, rank: int) -> Path:
        """Everything one rank printed in one attempt."""
        return self.attempt(attempt) / "logs" / f"rank_{rank:05d}.log"

    def metrics(self, rank: int) -> Path:
        """The step records of one rank, over all attempts."""
        return self.path / "metrics" / f"rank_{rank:05d}.jsonl"

    def attempts(self) -> list[int]:
        """Numbers of the attempts there are, oldest first."""
        return sorted(int(p.name) for p in (self.path / "attempts").glob("[0-9]*") if p.name.isdigit())

    def create_attempt(self) -> int:
        """Make the folder of the next attempt and return its number. Safe against a second creator."""
        number = max(self.attempts(), default=0)
        while True:
            number += 1
            try:
                self.attempt(number).mkdir(parents=True)
            except FileExistsError:
                continue
            (self.attempt(number) / "logs").mkdir()
            return number

    def metric_ranks(self) -> list[int]:
        """Ranks that have step records, in order."""
        return sorted(int(p.stem.removeprefix("rank_")) for p in (self.path / "metrics").glob("rank_*.jsonl"))

    def record_event(self, event: str, **details: Any) -> None:
        """Append one event to the ledger, with the time (Unix seconds)."""
        append_json_line(self.events, {"time": time.time(), "event": event, **details})

    def read_events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return list(read_json_lines(self.events))


def append_json_line(path: Path, value: dict[str, Any]) -> None:
    """Append ``value`` as one line. Several processes and hosts may append to the same file.

    O_APPEND is not atomic on NFS, so the file is locked around the write. A line torn by a crash is closed first, so
    that it spoils itself only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        torn = b""
        if size:
            file.seek(size - 1)
            torn = b"" if file.read(1) == b"\n" else b"\n"
        file.write(torn + json.dumps(value).encode() + b"\n")


def read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the complete lines of a JSONL file; a line torn by a crash is passed over. No file: nothing."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def write_atomically(path: Path, data: bytes) -> None:
    """Write ``data`` so that a reader, or a crash, sees either the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` atomically as indented JSON."""
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """The dictionary in a file; empty where there is no such file, or something else in it."""
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def typed_key(word: str) -> str:
    """The key of an override: ``nodes`` for ``++nodes=2``."""
    return word.split("=", 1)[0].lstrip("+~")


def point_name(overrides: Iterable[str], exclude: Iterable[str]) -> str:
    """Name of a point from what was typed: the same words in any order give the same name.

    ``overrides`` are ``key=value`` strings; those whose key, or a parent of it, is in ``exclude`` say where or when
    a run happens, not what it is. Characters that do not belong in a folder name are replaced and the exact text is
    then kept apart by a hash.
    """
    excluded = set(exclude)
    kept = []
    for word in overrides:
        key = typed_key(word)
        parents = {".".join(key.split(".")[: i + 1]) for i in range(len(key.split(".")))}
        if not parents & excluded:
            kept.append(word)
    exact = ",".join(sorted(kept)) or "default"
    name = re.sub(r"[^A-Za-z0-9_=.,+~-]", "_", exact)
    if name == exact and len(name) <= NAME_LIMIT and not name.startswith("."):
        return name
    digest = hashlib.sha256(exact.encode()).hexdigest()[:8]
    return f"{name[:NAME_LIMIT].lstrip('.')}-{digest}"
