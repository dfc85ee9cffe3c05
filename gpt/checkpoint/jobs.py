"""Steps of a save that touch the disk, each by one process and at its own time: write, commit, clean up, delete.

Owns the order of what happens in the folder of a checkpoint. A job is made by the rank and done by its writer, in the
background or at once. Must not know how the ranks agree on when which job is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from gpt.checkpoint import folders
from gpt.checkpoint.folders import Retention
from gpt.checkpoint.manifest import Manifest, write_manifest
from gpt.checkpoint.part import Part, Report, report_name, write_index, write_part
from gpt.checkpoint.plans import WritePlan
from gpt.checkpoint.staging import SharedMemory, StagedPart


@dataclass
class Memory:
    """State of a writer between jobs: the memory that parts are staged in, and the newest plan."""

    staged: SharedMemory | None = None
    plan: WritePlan | None = None
    has_idle_time: bool = False
    """True in a process that has nothing else to do between jobs."""
    idle_work: Generator[float] | None = None
    """Work for that time, in slices, each of which yields the seconds until the next one is due."""
    idle_at: float = 0.0
    """Time, by time.monotonic, at which the next slice is due."""
    sound: int | None = None
    """Step of the newest checkpoint that was read again and found whole."""

    def rest_s(self) -> float | None:
        """Return the seconds until the next slice of idle work is due, 0 where it is; None where there is no more."""
        return None if self.idle_work is None else max(0.0, self.idle_at - time.monotonic())


class Job(Protocol):
    """Interface of a job; picklable where it is done by another process."""

    def run(self, memory: Memory) -> Any:
        """Do the job."""
        ...


@dataclass(frozen=True)
class Write:
    """Write the part of one rank into a temporary folder."""

    temporary: Path
    step: int
    part: Part | StagedPart
    is_first: bool

    def run(self, memory: Memory) -> None:
        """Make the folder, after what killed saves have left is gone, and write."""
        if self.is_first:
            folders.begin(self.temporary, self.step)
        else:
            self.temporary.mkdir(parents=True, exist_ok=True)
        part = self.part
        if isinstance(part, StagedPart):
            assert memory.staged is not None
            part = part.load(memory.staged, memory.plan)
        write_part(part, self.temporary)


@dataclass(frozen=True)
class Commit:
    """Give a folder that all ranks have written its index, its manifest and its name; on rank 0."""

    temporary: Path
    step: int
    world_size: int
    meta: dict[str, Any]
    contents: dict[str, Any]
    may_commit: Callable[[], bool]

    def run(self, memory: Memory) -> Path | None:
        """Return the committed folder; None where the attempt is outdated."""
        reports = [Report.decode((self.temporary / report_name(rank)).read_bytes()) for rank in range(self.world_size)]
        files = {name: entry for report in reports for name, entry in sorted(report.files.items())}
        for name, entry in files.items():
            path = self.temporary / name
            if not path.is_file() or path.stat().st_size != entry.size:
                raise FileNotFoundError(
                    f"{path}, written by another rank, is not seen by rank 0: is the folder shared?"
                )
        if memory.plan is not None and memory.plan.metadata is not None and any(report.items for report in reports):
            files |= write_index(memory.plan.metadata, [report.items for report in reports], self.temporary)
        for rank in range(self.world_size):
            (self.temporary / report_name(rank)).unlink()
        manifest = Manifest(self.step, self.world_size, time.time(), self.meta, files, self.contents)
        write_manifest(self.temporary, manifest)
        return folders.commit(self.temporary, self.step) if self.may_commit() else None


@dataclass(frozen=True)
class Remove:
    """Remove the folder of a save that failed; on rank 0, when no rank writes there any more."""

    temporary: Path
    keeps: Retention
    frees: bool
    """Delete the checkpoint that the failed one was to replace as well, unless it is the last: the disk is full."""

    def run(self, memory: Memory) -> None:
        """Remove, and free what retention allows."""
        folders.remove(self.temporary)
        if self.frees:
            folders.retire(self.temporary.parent, replace(self.keeps, last=max(1, self.keeps.last - 1)))


@dataclass(frozen=True)
class Retire:
    """Delete the checkpoints that are no longer kept; on rank 0, after a commit."""

    folder: Path
    keeps: Retention

    def run(self, memory: Memory) -> None:
        """Delete."""
        folders.retire(self.folder, self.keeps)
