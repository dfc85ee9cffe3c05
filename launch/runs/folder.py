"""The run folder: the path of each file of a run, its event log, and refusals of damaged files."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from ..errors import ConfigError
from .files import append_lines, make_numbered, numbers_in, parse_json_lines, read_json_lines, unwritten


class RunFolder:
    """Paths of the files of a run, below ``<output_dir>/<name>/<point>``. The constructor creates nothing."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.point = self.path.name
        """Name of this point of the sweep."""
        self.config = self.path / ".hydra" / "config.yaml"
        """Composed config of the run, Hydra's own file."""
        self.overrides = self.path / ".hydra" / "overrides.yaml"
        """Overrides of this point, a YAML list."""
        self.plan = self.path / "plan.json"
        """Plan of the run, written before its start."""
        self.events = self.path / "events.jsonl"
        """Event log."""
        self.tensorboard = self.path / "tensorboard"
        """Event files of rank 0 for TensorBoard."""
        self.steps_csv = self.path / "steps.csv"
        """Step records of rank 0 as a CSV table."""
        self.run_json = self.path / "run.json"
        """The whole run as one JSON document."""
        self.checkpoints = self.path / "checkpoints"
        """Folder of the checkpoints, with a folder for each saved step."""
        self.tokenizer = self.path / "tokenizer"
        """Tokenizer of the run, if the data names one."""
        self.aside = self.path / "aside"
        """Numbered folders with later records and checkpoints, one for each return to an earlier checkpoint."""

    def attempt(self, number: int) -> Path:
        """Return the folder of an attempt, one start of the ranks, counted from 1."""
        return self.path / "attempts" / f"{number:04d}"

    def environment(self, attempt: int) -> Path:
        """Return the path of the JSON file with hosts, devices, software and commit of an attempt."""
        return self.attempt(attempt) / "environment.json"

    def ds_config(self, attempt: int) -> Path:
        """Return the path of the JSON file with the DeepSpeed config of an attempt."""
        return self.attempt(attempt) / "ds_config.json"

    def log(self, attempt: int, rank: int) -> Path:
        """Return the file with everything that a rank printed in an attempt."""
        return self.attempt(attempt) / "logs" / f"rank_{rank:05d}.log"

    def metrics(self, rank: int) -> Path:
        """Return the file of the step records of a rank, over all attempts."""
        return self.path / "metrics" / f"rank_{rank:05d}.jsonl"

    def telemetry(self, node: int) -> Path:
        """Return the file of the GPU samples of a node, over all attempts."""
        return self.path / "telemetry" / f"node_{node:05d}.jsonl"

    def attempts(self) -> list[int]:
        """Return the numbers of all attempts, oldest first."""
        return numbers_in(self.path / "attempts")

    def create_attempt(self) -> int:
        """Make the folder of the next attempt and return its number. Two processes never get the same number."""
        made = make_numbered(self.path / "attempts")
        (made / "logs").mkdir()
        return int(made.name)

    def metric_ranks(self) -> list[int]:
        """Return the ranks that have step records, in order."""
        return numbers_in(self.path / "metrics", "rank_", ".jsonl")

    def record_event(self, event: str, **details: Any) -> None:
        """Append one event to the event log, with the time (Unix seconds).

        If the filesystem is full, an agent or a rank keeps the event in memory (``launch.runs.files``).
        """
        append_lines(self.events, [{"time": time.time(), "event": event, **details}])

    def read_events(self) -> list[dict[str, Any]]:
        """Return all events, oldest first, then events that this process could not write yet. Skips damaged lines."""
        return [event for event in (*read_json_lines(self.events), *unwritten(self.events)) if is_event(event)]

    def tracker_id(self, rank: int = 0) -> str:
        """Return the id of a rank's run in an experiment tracker, 32 letters and digits.

        The id is the same in every attempt. A run in the same folder, after this run was deleted, has another id.
        """
        first = next(iter(self.read_events()), {})
        digest = hashlib.sha256(f"{self.path} {first.get('time')}".encode()).hexdigest()
        return f"{digest[:24]}{rank:08d}"

    def unread_events(self) -> int:
        """Count the lines of the event log that are neither events nor blank.

        A last line without an end is not counted, because a process may still be writing the line.
        """
        try:
            data = self.events.read_bytes()
        except OSError:
            return 0
        lines = [line for line in data[: data.rfind(b"\n") + 1].splitlines() if line.strip()]
        return len(lines) - sum(map(is_event, parse_json_lines(lines)))


def is_event(value: dict[str, Any]) -> bool:
    """Return whether a line of the event log is an event: it has a name and a time."""
    return isinstance(value.get("event"), str) and isinstance(value.get("time"), int | float)


def is_newest_attempt(folder: RunFolder, attempt: int) -> bool:
    """Return whether ``attempt`` is the newest attempt of a run. Reads the filesystem."""
    return max(folder.attempts(), default=0) <= attempt


# Refusals of damaged files, and of folders that cannot be written. Each names the file.


FIXES = {
    "config.yaml": "the same command with fresh=true, for a new folder beside it; or the file from a backup",
    "plan.json": "the same command again when no job of the run is left, which writes it anew",
    "overrides.yaml": "rm {path}; without it a report names the point by its folder",
    "sweep.json": "rm {path}; sweeps/ beside it has every sweep, and without it a report takes all runs",
    "events.jsonl": "the file from a backup; without it, squeue --me and scancel JOB for a job that still runs",
}
"""Name of a file -> text of what to type if the file is damaged."""


def damaged(path: Path, why: str) -> ConfigError:
    """Return a ConfigError for a damaged file. ``why`` describes the damage."""
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
        raise damaged(path, "it is empty" if not value else "it holds no keys")
    return value


def unreadable(path: Path, error: BaseException) -> ConfigError:
    """Return a ConfigError for a file that raised ``error`` when it was read."""
    if isinstance(error, OSError):
        return damaged(path, str(error.strerror))
    if not path.read_bytes().strip():
        return damaged(path, "it is empty")
    return damaged(path, " ".join(str(error).split()))


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Raise ConfigError in place of an OSError of the ``with`` block, which writes the files of a run."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be written: {error.strerror}",
            "a folder that this user may write into, with room, on a filesystem that all nodes see",
            "output_dir=FOLDER, or run_dir=FOLDER",
        ) from error
