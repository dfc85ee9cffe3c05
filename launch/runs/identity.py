"""The keys that every run has, the folder of a run, and the step from which a run continues."""

from __future__ import annotations

import dataclasses
import os
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from launch.errors import ConfigError
from launch.runs.compose import flatten, plain, read_config
from launch.runs.events import refuse_resume_from
from launch.runs.folder import RunFolder
from launch.runs.overrides import (
    NOT_IN_POINT,
    point_keys,
    point_name,
    read_overrides,
)
from launch.schema import key

# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class RunConfig:
    """Config that every run has, whatever it computes and whatever starts it."""

    name: str = key("run", "Folder under output_dir for the points of one sweep.")
    output_dir: str = key("outputs", "Folder for all runs.")
    run_dir: Optional[str] = key(None, "Folder of this run; null derives it from output_dir, name and the overrides.")
    fresh: bool = key(False, "Start over in a new folder instead of resuming.")
    resume_from: Any = key(
        None,
        "Step of a checkpoint of the existing run from which it resumes, or last for the newest. Later checkpoints"
        " and records are moved aside. Typed again it goes back again.",
    )
    require_same_code: bool = key(
        False, "Refuse to resume if the code or a library has changed since the last attempt, instead of warning."
    )

    def validate(self) -> None:
        """Raise ConfigError if ``name`` cannot be that of a folder and of a job, or ``resume_from`` a checkpoint."""
        refuse_name(self.name)
        refuse_resume_from(self.resume_from, self.fresh)


UNUSABLE = re.compile(r"[%\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that a run's path and name cannot have. Slurm and submitit replace ``%j`` by the number of a job, and read
a backslash as an escape; a line break would end a line of the batch script."""


def refuse_name(name: str) -> None:
    """Raise ConfigError unless ``name`` can be one folder under output_dir, and the name of a job."""
    usable = re.sub(r"^-+", "", UNUSABLE.sub("_", name).replace("/", "_"))
    if name != usable or name in ("", ".", ".."):
        raise ConfigError(
            f"name={name!r}",
            "the name of one folder under output_dir, and of the job: no slash, backslash, % or control character in "
            "it, and no dash before it",
            f"name={shlex.quote(usable.strip('._') or 'run')}",
        )


def refuse_path(path: Path) -> None:
    """Raise ConfigError if the path of a run folder has characters that stand for something else in a job."""
    found = UNUSABLE.search(str(path))
    if found is not None:
        raise ConfigError(
            f"{found[0]!r} in the run's path {str(path)!r}",
            "a path without %, backslash and control characters, which mean something else in a batch script",
            "output_dir=FOLDER, or run_dir=FOLDER, with another path",
        )


def choose_folder(
    config: RunConfig, overrides: Sequence[str], not_in_point: Sequence[str], length: Sequence[str] = ()
) -> RunFolder:
    """The folder of a run: ``run_dir``, or ``<output_dir>/<name>/<point>``.

    With ``fresh`` a new generation, ``<point>~2``, ``<point>~3``, ...; without it the newest there is, so that the
    same command continues where the last one stopped. With ``resume_from`` the run that is there, whatever its length.

    Args:
        config: keys of the run.
        overrides: as typed.
        not_in_point: keys that do not tell runs apart.
        length: keys that say how many steps a run makes.

    Raises:
        ConfigError: a job could not have such a path; or ``resume_from`` is typed, and several runs differ in their
            length alone.
    """
    folder = newest_folder(config, overrides, not_in_point)
    if config.resume_from is None or config.run_dir is not None or folder.config.exists():
        return folder
    return folder_of_other_length(folder, overrides, (*not_in_point, *length)) or folder


def folder_of_other_length(folder: RunFolder, overrides: Sequence[str], exclude: Sequence[str]) -> RunFolder | None:
    """Return the run in the same folder with the same overrides, apart from keys to ``exclude``; None if there is none.

    Raises:
        ConfigError: there are several.
    """
    exclude = (*exclude, *NOT_IN_POINT)  # also where ranks look for it whose command knows no keys of the launcher
    wanted = point_keys(overrides, exclude)
    newest: dict[str, RunFolder] = {}
    for path in sorted(folder.path.parent.glob("*"), key=generation_of):
        beside = RunFolder(path)
        if beside.overrides.exists() and point_keys(read_overrides(beside), exclude) == wanted:
            newest[GENERATION.sub("", path.name)] = beside
    if len(newest) > 1:
        raise ConfigError(
            f"several runs of this point, of different lengths: {', '.join(run.point for run in newest.values())}",
            "the folder of the one that is to go on",
            shlex.quote(f'run_dir="{next(iter(newest.values())).path}"'),
        )
    return next(iter(newest.values()), None)


GENERATION = re.compile(r"~(\d+)$")


def generation_of(path: Path) -> int:
    """Number of a generation of a run: 1 of its first folder."""
    found = GENERATION.search(path.name)
    return int(found[1]) if found else 1


def newest_folder(config: RunConfig, overrides: Sequence[str], not_in_point: Sequence[str]) -> RunFolder:
    """The folder of a run by its name: its newest generation, or with ``fresh`` the next one."""
    above = Path(config.output_dir).expanduser() / config.name  # a ~ in the name is part of it
    own = above / point_name(overrides, not_in_point)
    base = (own if config.run_dir is None else Path(config.run_dir).expanduser()).absolute()
    refuse_path(base)
    generations = [1] if base.exists() else []
    generations += [
        int(p.name.rsplit("~", 1)[1]) for p in base.parent.glob(f"{glob_escape(base.name)}~*") if p.is_dir()
    ]
    newest = max(generations, default=0) + (1 if config.fresh else 0)
    folder = base if newest <= 1 else base.with_name(f"{base.name}~{newest}")
    refuse_file_in_place(folder)
    return RunFolder(folder)


def refuse_file_in_place(folder: Path) -> None:
    """Raise ConfigError if a run folder cannot be created: a file is in its path, or the folder above is read-only."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(
            f"{there}, a file in the path of the run folder {folder}"
            if there != folder
            else f"{folder}, which is a file",
            "a folder for the run, or a path where nothing is yet",
            "output_dir=FOLDER, or run_dir=FOLDER",
        )
    is_of_kernel = there.parts[1:2] in (("proc",), ("sys",))  # where even root, for whom W_OK holds, creates nothing
    if there != folder and (is_of_kernel or not os.access(there, os.W_OK | os.X_OK)):
        expected = "a folder in which this user may create others"
        raise ConfigError(f"{folder}, which cannot be created in {there}", expected, "output_dir=FOLDER")


def glob_escape(name: str) -> str:
    """``name`` with the characters that mean something to glob taken literally."""
    return re.sub(r"([*?[])", r"[\1]", name)


def refuse_other_run(folder: RunFolder, config: Any, schema: type, resumable: Sequence[str]) -> None:
    """Raise ConfigError if ``folder`` already holds a run with other settings.

    Args:
        folder: of the run.
        config: of this command.
        schema: dataclass whose fields are compared; ``config`` has them all.
        resumable: keys, or groups of keys, that may change between the attempts of one run.
    """
    if not folder.config.exists():
        refuse_lost_config(folder)
        return
    values = dataclasses.asdict(config)
    there = flatten(dataclasses.asdict(read_config(folder, schema)))
    here = flatten({field.name: values[field.name] for field in dataclasses.fields(schema)})
    changed = [key for key in here if here[key] != there.get(key) and not may_change(key, resumable)]
    changed = [key for key in changed if not is_left_open(here[key])]
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{folder.path} holds a run with {key}={plain(there.get(key))}, and now {key}={plain(here[key])}",
            "the same settings, to go on with that run",
            f"fresh=true, for a new folder beside it (or {key}={plain(there.get(key))}, to go on)",
        )


def is_left_open(value: Any) -> bool:
    """Return whether a key is ``auto``: a run continues with the value that was chosen when it began."""
    return isinstance(value, Enum) and value.name == "auto"


def refuse_lost_config(folder: RunFolder) -> None:
    """Raise ConfigError if a run has been in ``folder`` whose config is gone: its checkpoints may be another's."""
    there = [path.name for path in (folder.path / "attempts", folder.checkpoints) if path.exists()]
    if there:
        raise ConfigError(
            f"{folder.path} with {' and '.join(there)} of a run, but no {folder.config.relative_to(folder.path)}",
            "the config of that run, to go on with it",
            "fresh=true, for a new folder beside it; or the file from a backup",
        )


def may_change(key: str, resumable: Sequence[str]) -> bool:
    """Return whether ``key``, or a group that it is in, is among ``resumable``."""
    return any(f"{key}.".startswith(f"{allowed}.") for allowed in resumable)
