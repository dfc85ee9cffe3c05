"""The run folder: the path of each file of a run, its event log, and refusals of damaged files."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

from ..errors import ConfigError
from .files import append_lines, parse_json_lines, read_json_lines, unwritten


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
        """Overrides of this point, a YAML list."""
        return self.path / ".hydra" / "overrides.yaml"

    @property
    def plan(self) -> Path:
        """Plan of the run, as promised before its start."""
        return self.path / "plan.json"

    @property
    def events(self) -> Path:
        """The event log."""
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

    @property
    def aside(self) -> Path:
        """History that the run has gone back from by ``resume_from``, a numbered folder each time."""
        return self.path / "aside"

    def attempt(self, number: int) -> Path:
        """Folder of one (re)start, counted from 1."""
        return self.path / "attempts" / f"{number:04d}"

    def environment(self, attempt: int) -> Path:
        """Environment of one attempt: hosts, devices, software, commit."""
        return self.attempt(attempt) / "environment.json"

    def ds_config(self, attempt: int) -> Path:
        """DeepSpeed config of one attempt."""
        return self.attempt(attempt) / "ds_config.json"

    def log(self, attempt: int, rank: int) -> Path:
        """Everything one rank printed in one attempt."""
        return self.attempt(attempt) / "logs" / f"rank_{rank:05d}.log"

    def metrics(self, rank: int) -> Path:
        """The step records of one rank, over all attempts."""
        return self.path / "metrics" / f"rank_{rank:05d}.jsonl"

    def telemetry(self, node: int) -> Path:
        """GPU telemetry of one node, over all attempts."""
        return self.path / "telemetry" / f"node_{node:05d}.jsonl"

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
        """Append one event to the event log, with the time (Unix seconds).

        An agent or a rank keeps it where the filesystem has no room for it (``launch.runs.files``).
        """
        append_lines(self.events, [{"time": time.time(), "event": event, **details}])

    def read_events(self) -> list[dict[str, Any]]:
        """All events, oldest first, with those that this process could not write yet. Other lines are passed over."""
        return [event for event in (*read_json_lines(self.events), *unwritten(self.events)) if is_event(event)]

    def unread_events(self) -> int:
        """Count the lines of the event log that are no events, blank ones aside.

        The last one is not counted while it has no end: it may be being written.
        """
        try:
            data = self.events.read_bytes()
        except OSError:
            return 0
        lines = [line for line in data[: data.rfind(b"\n") + 1].splitlines() if line.strip()]
        return len(lines) - sum(map(is_event, parse_json_lines(lines)))


def is_event(value: dict[str, Any]) -> bool:
    """Tell an event from a line that something else has left in the event log."""
    return isinstance(value.get("event"), str) and isinstance(value.get("time"), int | float)


def is_newest_attempt(folder: RunFolder, attempt: int) -> bool:
    """Return whether no later attempt of a run than ``attempt`` has begun. Asks the filesystem."""
    return max(folder.attempts(), default=0) <= attempt


# Files of a run folder that are not as they were written, or cannot be written at all: refusals that name the file.


FIXES = {
    "config.yaml": "the same command with fresh=true, for a new folder beside it; or the file from a backup",
    "plan.json": "the same command again when no job of the run is left, which writes it anew",
    "overrides.yaml": "rm {path}; without it a report names the point by its folder",
    "sweep.json": "rm {path}; sweeps/ beside it has every sweep, and without it a report takes all runs",
    "events.jsonl": "the file from a backup; without it, squeue --me and scancel JOB for a job that still runs",
}
"""Name of a file -> what to type where it is damaged."""


def damaged(path: Path, why: str) -> ConfigError:
    """Return the refusal of a file that is not as it was written."""
    fix = FIXES.get(path.name, "the file from a backup").format(path=quote(str(path)))
    return ConfigError(f"{path}, which is damaged: {why}", "the file as it was written with the run", fix)


def read_plan(folder: RunFolder) -> dict[str, Any]:
    """Read ``plan.json``; empty if there is none, as of a run that ``gpt.train`` made.

    Raises:
        ConfigError: it is damaged.
    """
    return _mapping(folder.plan, read_strictly(folder.plan)) if folder.plan.exists() else {}


def read_strictly(path: Path) -> Any:
    """Read the value in a JSON or YAML file.

    Raises:
        ConfigError: it cannot be read, or holds something else.
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
    """Read the mapping in a JSON or YAML file. Raises ConfigError if it holds none."""
    return _mapping(path, read_strictly(path))


def _mapping(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise damaged(path, "it is empty" if not value else "it holds no keys")
    return value


def unreadable(path: Path, error: BaseException) -> ConfigError:
    """Return the refusal of a file that raised ``error`` when it was read."""
    if isinstance(error, OSError):
        return damaged(path, str(error.strerror))
    if not path.read_bytes().strip():
        return damaged(path, "it is empty")
    return damaged(path, " ".join(str(error).split()))


@contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Refuse in the ``with`` block, in three parts, where the files of a run cannot be written.

    Raises:
        ConfigError: in place of an OSError.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"{error.filename or folder} cannot be written: {error.strerror}",
            "a folder that this user may write into, with room, on a filesystem that all nodes see",
            "output_dir=FOLDER, or run_dir=FOLDER",
        ) from error
