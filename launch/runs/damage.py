"""Files of a run folder that are not as they were written, or cannot be written at all: refusals that name the file.

Owns what to type next for each of them. What a command can do without, it does without. Torch-free.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shlex import quote
from typing import Any

import yaml

from launch.errors import ConfigError
from launch.runs.folder import RunFolder

FIXES = {
    "config.yaml": "the same command with fresh=true, for a new folder beside it; or the file from a backup",
    "plan.json": "the same command again when no job of the run is left, which writes it anew",
    "overrides.yaml": "rm {path}; without it a report names the point by its folder",
    "sweep.json": "rm {path}; sweeps/ beside it has every sweep, and without it a report takes all runs",
    "events.jsonl": "the file from a backup; without it, squeue --me and scancel JOB for a job that still runs",
}
"""Name of a file -> what to type where it is damaged."""


UNREADABLE = (OSError, ValueError, yaml.YAMLError)
"""Errors of reading JSON or YAML from a file."""


def damaged(path: Path, why: str) -> ConfigError:
    """Return the refusal of a file that is not as it was written."""
    fix = FIXES.get(path.name, "the file from a backup").format(path=quote(str(path)))
    return ConfigError(f"{path}, which is damaged: {why}", "the file as it was written with the run", fix)


def read_plan(folder: RunFolder) -> dict[str, Any]:
    """Read ``plan.json``; empty where there is none, as of a run that ``gpt.train`` made.

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
        return json.loads(data) if path.suffix == ".json" else yaml.safe_load(data.decode())
    except UNREADABLE as error:
        raise unreadable(path, error) from error


def read_mapping(path: Path) -> dict[str, Any]:
    """Read the mapping in a JSON or YAML file. Raises ConfigError where it holds none."""
    return _mapping(path, read_strictly(path))


def _mapping(path: Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        raise damaged(path, "it is empty" if not value else "it holds no keys")
    return value


def unreadable(path: Path, error: BaseException) -> ConfigError:
    """Return the refusal of a file that raised one of ``UNREADABLE``."""
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
