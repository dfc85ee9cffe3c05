"""The keys that every run has, the folder of a run, and the step from which a run continues."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from launch.errors import ConfigError
from launch.runs.compose import flatten, plain, read_config
from launch.runs.events import Events, is_finished, planned_steps
from launch.runs.files import read_json, read_json_lines, write_atomically
from launch.runs.folder import RunFolder, writing_into
from launch.runs.overrides import (
    NOT_IN_POINT,
    former_point_name,
    in_former_spelling,
    point_keys,
    point_name,
    read_overrides,
)
from launch.runs.records import is_record, recent_records

# A checkpoint on disk, whoever wrote it: what ``launch.verify`` asks of a workload.


@dataclass(frozen=True)
class SavedCheckpoint:
    """Description of one checkpoint on disk, and how to check it."""

    path: Path
    step: int | None
    """Step that a run would go on from; None of one that no run will load."""
    size: int
    """Bytes that checking it reads."""
    find_damage: Callable[[Callable[[int], None]], tuple[str, ...] | None]
    """Read all of it, telling the bytes as it goes. Returns what is damaged, a line each; None where it is deleted."""


# Going on with a run otherwise than where it stopped: from an earlier checkpoint, or beyond its end.


LAST = "last"
"""Value of ``resume_from`` that means the newest checkpoint."""


@dataclass(frozen=True)
class Continuation:
    """Way in which a command goes on with the run of a folder."""

    back_to: int | None = None
    """Step of the checkpoint that the run goes back to; None where it goes on from the newest one."""
    last: int | None = None
    """Last step that is kept aside when it goes back."""
    extends: int | None = None
    """Steps after which the run was finished, where it is now to make more."""

    def text(self, max_steps: int | None) -> str:
        """Say for people what happens to the run; empty where it goes on where it stopped."""
        parts = []
        if self.back_to is not None:
            kept = f"; steps {self.back_to + 1} to {self.last} are kept in aside/" if self.last else ""
            parts.append(f"back to the checkpoint of step {self.back_to}{kept}")
        if self.extends is not None:
            parts.append(f"on to step {max_steps}, after it was finished at step {self.extends}")
        return ", and ".join(parts)


def refuse_resume_from(value: Any, fresh: bool) -> None:
    """Raise ConfigError where ``resume_from`` names no checkpoint, or is typed with ``fresh=true``."""
    if value is None:
        return
    if value != LAST and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        found = f"resume_from={value}"
        raise ConfigError(found, "the step of a checkpoint, or last for the newest one", "resume_from=last, or null")
    if fresh:
        raise ConfigError(
            f"resume_from={value} with fresh=true",
            "a run that goes on from a checkpoint, or one that begins in a new folder",
            f"resume_from={value} alone; or fresh=true init_from=RUN_DIR, for a new run with the weights of another",
        )


def plan_continuation(
    folder: RunFolder, resume_from: Any, max_steps: int | None, saved: Iterable[SavedCheckpoint]
) -> Continuation:
    """Tell what a command would do with the run of a folder; changes nothing.

    Args:
        folder: of the run; it need not be there where ``resume_from`` is None.
        resume_from: step of a checkpoint, ``last``, or None.
        max_steps: steps of the whole run, as asked for now; None where nobody knows them.
        saved: its checkpoints; read only where they matter.

    Raises:
        ConfigError: there is no such checkpoint, or the run has made more steps than it is to make.
    """
    events = folder.read_events()
    before = planned_steps(events)
    finished = is_finished(events)
    extends = before if finished and max_steps is not None and before is not None and max_steps > before else None
    if resume_from is None:
        if max_steps is not None:
            refuse_shorter(folder, max_steps, last_step(folder, ()))
        return Continuation(extends=extends)
    checkpoints = list(saved)
    back_to = find_step(folder, resume_from, checkpoints)
    if max_steps is not None:
        refuse_shorter(folder, max_steps, back_to)
    last = last_step(folder, checkpoints)
    if last <= back_to:
        return Continuation(extends=extends)
    return Continuation(back_to, last, extends)


def find_step(folder: RunFolder, resume_from: Any, saved: Sequence[SavedCheckpoint]) -> int:
    """Return the step of the checkpoint that ``resume_from`` names.

    Raises:
        ConfigError: the run has none of that step.
    """
    steps = sorted(one.step for one in saved if one.step is not None)
    if not steps:
        there = f"{folder.path} has no checkpoint" if folder.path.is_dir() else f"there is no run in {folder.path}"
        raise ConfigError(
            f"resume_from={resume_from}, and {there}",
            "the folder of a run that has saved",
            "run_dir=FOLDER of such a run (python -m launch.status lists them), or the command without resume_from",
        )
    if resume_from == LAST:
        return steps[-1]
    if resume_from not in steps:
        near = min(steps, key=lambda step: (abs(step - resume_from), step))
        raise ConfigError(
            f"resume_from={resume_from}, and {folder.path} has no checkpoint of that step",
            f"one of its checkpoints: {', '.join(map(str, steps))}",
            f"resume_from={near}",
        )
    return int(resume_from)


def refuse_shorter(folder: RunFolder, max_steps: int, done: int) -> None:
    """Raise ConfigError where a run has made more steps than it is now to make in all."""
    if max_steps < done:
        raise ConfigError(
            f"{folder.path} has made {done} steps, and now it is to have {max_steps}",
            f"at least {done} steps in all, or a checkpoint that is not beyond them to go back to",
            f"optim.max_steps={done}, or resume_from=STEP with a step up to {max_steps}, or fresh=true",
        )


def last_step(folder: RunFolder, saved: Iterable[SavedCheckpoint]) -> int:
    """Return the last step that a run has recorded, or has a checkpoint of; 0 where it has none."""
    recorded = [record["step"] for record in recent_records(folder.metrics(0))]
    return max([*recorded, *(one.step for one in saved if one.step is not None)], default=0)


def apply_continuation(
    folder: RunFolder, goes_on: Continuation, max_steps: int | None, saved: Iterable[SavedCheckpoint]
) -> None:
    """Enter into the event log how a run goes on, and keep aside what it goes back from. Deletes nothing.

    To be called while nothing works on the run. Killed in between, the same command does what is left.

    Raises:
        ConfigError: the folder cannot be written.
    """
    with writing_into(folder.path):
        if goes_on.back_to is not None:
            number = next_aside(folder)
            # First, so that a run that was finished counts as such no longer.
            folder.record_event("resumed_from", step=goes_on.back_to, last=goes_on.last, aside=f"aside/{number.name}")
            set_records_aside(folder, goes_on.back_to, number)
            later = [one for one in saved if one.step is not None and one.step > goes_on.back_to]
            for one in sorted(later, key=lambda one: -(one.step or 0)):  # the newest first: no load then finds a gap
                move(one.path, number / folder.checkpoints.name / one.path.name)
        if goes_on.extends is not None:
            folder.record_event("extended", step=goes_on.extends, max_steps=max_steps)


def next_aside(folder: RunFolder) -> Path:
    """Make the next folder for history that a run goes back from."""
    number = 1
    while True:
        path = folder.aside / f"{number:04d}"
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path


def set_records_aside(folder: RunFolder, step: int, aside: Path) -> None:
    """Move the step records after ``step`` of all ranks into ``aside``, with the views that were made of them."""
    for view in (folder.steps_csv, folder.run_json):  # made again at the next start
        if view.exists():
            shutil.copy2(view, aside / view.name)
    for rank in folder.metric_ranks():
        path = folder.metrics(rank)
        kept: list[dict[str, Any]] = []
        later: list[dict[str, Any]] = []
        for line in read_json_lines(path):
            (later if is_record(line) and line["step"] > step else kept).append(line)
        if later:
            write_atomically(aside / path.parent.name / path.name, as_lines(later))
            write_atomically(path, as_lines(kept))


def as_lines(values: Iterable[dict[str, Any]]) -> bytes:
    """Write values as JSON lines."""
    return b"".join(json.dumps(value).encode() + b"\n" for value in values)


def move(path: Path, to: Path) -> None:
    """Move a folder within the run's filesystem; one that is gone has been moved already."""
    to.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        path.rename(to)


def aside_records(folder: RunFolder, rank: int) -> list[Path]:
    """List the files of step records of a rank that the run has gone back from, oldest first."""
    return sorted(folder.aside.glob(f"[0-9]*/{folder.metrics(rank).parent.name}/{folder.metrics(rank).name}"))


def refuse_alive(folder: RunFolder) -> None:
    """Raise ConfigError where ranks of the newest attempt run on this machine, whoever started them.

    For ranks without a launcher, of which no queue knows; of those of other machines nothing can be told here.
    """
    attempt = max(folder.attempts(), default=0)
    events = folder.read_events()
    if not attempt or has_ended(events, attempt):
        return
    known = read_json(folder.environment(attempt))
    here = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    for rank in known.get("ranks", ()):
        pid = rank.get("pid")
        if pid is not None and rank.get("machine") == here and began_before(int(pid), float(known.get("time", 0.0))):
            raise ConfigError(
                f"{folder.path} is being worked on by process {pid}, rank {rank.get('rank')} of attempt {attempt}",
                "a run that nothing works on, before it goes back to an earlier checkpoint",
                f"kill {pid}, which has it save and leave; then the same command",
            )


def has_ended(events: Events, attempt: int) -> bool:
    """Tell whether the event log has an end of an attempt."""
    ends = ("finished", "stopped", "rank_failed", "attempt_ended")
    return any(event["event"] in ends and event.get("attempt") == attempt for event in events)


def began_before(pid: int, when: float) -> bool:
    """Tell whether a process runs that had begun by ``when``, Unix seconds: another may have got its number since."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    except (OSError, IndexError, StopIteration):
        return False
    return int(booted.split()[1]) + ticks / os.sysconf("SC_CLK_TCK") <= when + 1.0


# The keys that every run has, its folder, which follows from them, and the refusal of a folder with another run in
# it.


# OmegaConf 2.3 reads the annotations of a schema at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


@dataclass
class RunConfig:
    """Config that every run has, whatever it computes and whatever starts it."""

    name: str = "run"
    """Folder under output_dir that holds the points of one sweep."""
    output_dir: str = "outputs"
    run_dir: Optional[str] = None
    """The folder of this run; null derives it from output_dir, name and the overrides."""
    fresh: bool = False
    """Start over in a new folder instead of resuming."""
    resume_from: Any = None
    """Go on with the run that is there from its checkpoint of this step, or ``last`` for the newest; what came later is
    kept aside. It is found whatever number of steps was typed for it. Typed again it goes back again."""
    require_same_code: bool = False
    """Refuse to go on where the code or a library has changed since the attempt before, instead of warning."""
    strict: Optional[bool] = None
    """Former name of require_same_code."""

    def validate(self) -> None:
        """Raise ConfigError where ``name`` cannot be that of a folder and of a job, or ``resume_from`` a checkpoint."""
        refuse_name(self.name)
        refuse_resume_from(self.resume_from, self.fresh)


UNUSABLE = re.compile(r"[%\\\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that cannot be in a run's path, nor in its name: to Slurm and submitit ``%j`` stands for the number of a
job, and a backslash says that nothing does; a line break would end a line of the batch script."""


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
    """Raise ConfigError where the path of a run folder has characters that stand for something else in a job."""
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
    same command goes on where the last one stopped. With ``resume_from`` the run that is there, whatever its length.

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
    """The run beside ``folder`` for which the same was typed, but for keys to ``exclude``; None where there is none.

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
    formers = (
        above / point_name(map(in_former_spelling, overrides), not_in_point),
        above / former_point_name(overrides, not_in_point),
    )
    former = next((folder for folder in formers if folder.is_dir()), None)
    if config.run_dir is None and not base.exists() and former is not None:
        base = former.absolute()  # made by the same command, when its keys had other names
    generations = [1] if base.exists() else []
    generations += [
        int(p.name.rsplit("~", 1)[1]) for p in base.parent.glob(f"{glob_escape(base.name)}~*") if p.is_dir()
    ]
    newest = max(generations, default=0) + (1 if config.fresh else 0)
    folder = base if newest <= 1 else base.with_name(f"{base.name}~{newest}")
    refuse_file_in_place(folder)
    return RunFolder(folder)


def refuse_file_in_place(folder: Path) -> None:
    """Raise ConfigError where a file has the place of a run folder, or of a folder above it."""
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise ConfigError(
            f"{there}, a file in the path of the run folder {folder}"
            if there != folder
            else f"{folder}, which is a file",
            "a folder for the run, or a path where nothing is yet",
            "output_dir=FOLDER, or run_dir=FOLDER",
        )


def glob_escape(name: str) -> str:
    """``name`` with the characters that mean something to glob taken literally."""
    return re.sub(r"([*?[])", r"[\1]", name)


def refuse_other_run(folder: RunFolder, config: Any, schema: type, resumable: Sequence[str]) -> None:
    """Raise ConfigError where ``folder`` already holds a run with other settings.

    Args:
        folder: of the run.
        config: what was asked for now.
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
    """Tell whether a key says ``auto``: a run goes on with what was chosen when it began."""
    return isinstance(value, Enum) and value.name == "auto"


def refuse_lost_config(folder: RunFolder) -> None:
    """Raise ConfigError where a run has been in ``folder`` whose config is gone: its checkpoints may be another's."""
    there = [path.name for path in (folder.path / "attempts", folder.checkpoints) if path.exists()]
    if there:
        raise ConfigError(
            f"{folder.path} with {' and '.join(there)} of a run, but no {folder.config.relative_to(folder.path)}",
            "the config of that run, to go on with it",
            "fresh=true, for a new folder beside it; or the file from a backup",
        )


def may_change(key: str, resumable: Sequence[str]) -> bool:
    """Tell whether ``key``, or a group that it is in, is among ``resumable``."""
    return any(f"{key}.".startswith(f"{allowed}.") for allowed in resumable)
