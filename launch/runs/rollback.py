"""Going on with a run otherwise than where it stopped: from an earlier checkpoint, or beyond its end.

Owns what ``resume_from`` and a larger number of steps mean for a run folder: the refusals, and what is kept aside. Is
handed the checkpoints, whoever wrote them. Torch-free.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.errors import ConfigError
from launch.runs.damage import writing_into
from launch.runs.events import Events, is_finished, planned_steps
from launch.runs.files import read_json, read_json_lines, write_atomically
from launch.runs.folder import RunFolder
from launch.runs.records import is_record, recent_records
from launch.runs.saved import SavedCheckpoint

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
