"""Jobs of a save, and their writers: this process at once, or a second process during training."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed.checkpoint.api import CheckpointException

from gpt.checkpoint import folders
from gpt.checkpoint.folders import Manifest, Retention, write_manifest
from gpt.checkpoint.messages import explain
from gpt.checkpoint.part import (
    RankPart,
    Report,
    SharedMemory,
    StagedPart,
    WritePlan,
    report_name,
    stage,
    write_index,
    write_part,
)
from launch.process import die_with_parent

# Steps of a save that touch the disk, each by one process and at its own time: write, commit, clean up, delete.
#
# A rank makes a job, and its writer does the job, in the background or at once.


@dataclass
class WriterState:
    """State of a writer between jobs: the memory that parts are staged in, and the newest plan."""

    staged: SharedMemory | None = None
    plan: WritePlan | None = None
    has_idle_time: bool = False
    """True in a process that has no other work between jobs."""
    idle_work: Generator[float] | None = None
    """Work between jobs, in slices; each slice yields the seconds until the next one is due. None: no work."""
    idle_at: float = 0.0
    """Time, by time.monotonic, at which the next slice is due."""
    sound: int | None = None
    """Step of the newest checkpoint that was read again and found whole."""

    def whole(self, part: RankPart | StagedPart) -> RankPart:
        """Return a part with its tensors; those of a staged part are views of this writer's shared memory."""
        if isinstance(part, RankPart):
            return part
        assert self.staged is not None
        return part.load(self.staged, self.plan)

    def rest_s(self) -> float | None:
        """Return the seconds until the next slice of idle work is due, 0 if it is due now; None if no work is left."""
        return None if self.idle_work is None else max(0.0, self.idle_at - time.monotonic())


class Job(Protocol):
    """Interface of a job; picklable if another process does it."""

    def run(self, state: WriterState) -> Any:
        """Do the job, and return its result."""
        ...


@dataclass(frozen=True)
class Write:
    """Write the part of one rank into a temporary folder."""

    temporary: Path
    step: int
    part: RankPart | StagedPart
    is_first: bool

    def run(self, state: WriterState) -> None:
        """Create the folder and write the part into it. The first rank also removes the folders of killed saves."""
        if self.is_first:
            folders.begin(self.temporary, self.step)
        else:
            self.temporary.mkdir(parents=True, exist_ok=True)
        write_part(state.whole(self.part), self.temporary)


@dataclass(frozen=True)
class Commit:
    """Commit a folder that all ranks have written: write index and manifest, and rename it; on rank 0."""

    temporary: Path
    step: int
    world_size: int
    meta: dict[str, Any]
    contents: dict[str, Any]
    may_commit: Callable[[], bool]

    def run(self, state: WriterState) -> Path | None:
        """Return the committed folder; None if the attempt is outdated."""
        reports = [Report.decode((self.temporary / report_name(rank)).read_bytes()) for rank in range(self.world_size)]
        files = {name: entry for report in reports for name, entry in sorted(report.files.items())}
        for name, entry in files.items():
            path = self.temporary / name
            if not path.is_file() or path.stat().st_size != entry.size:
                raise FileNotFoundError(
                    f"{path}, written by another rank, is not seen by rank 0: is the folder shared?"
                )
        if state.plan is not None and state.plan.metadata is not None and any(report.items for report in reports):
            files |= write_index(state.plan.metadata, [report.items for report in reports], self.temporary)
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
    """True if the disk is full: delete the checkpoint that the failed one was to replace, unless it is the last."""

    def run(self, state: WriterState) -> None:
        """Remove the folder, and free the space that retention allows."""
        folders.remove_folder(self.temporary)
        if self.frees:
            folders.retire(self.temporary.parent, replace(self.keeps, last=max(1, self.keeps.last - 1)))


@dataclass(frozen=True)
class Retire:
    """Delete the checkpoints that are no longer kept; on rank 0, after a commit."""

    folder: Path
    keeps: Retention

    def run(self, state: WriterState) -> None:
        """Delete the checkpoints that ``keeps`` does not keep."""
        folders.retire(self.folder, self.keeps)


# Writers that do the jobs of a save: this process at once, or a second process during training.
#
# The second process is forked, so it costs no imports and shares the rank's memory of them. A thread would hold the
# interpreter's lock while it packs tensors, and so delay the next step.


NICENESS = 10
"""Niceness of the writer process: it gets the CPU time that the ranks do not use."""
CLOSING_S = 10.0
"""Longest wait, in seconds, for the last deletions when training ends; the next start of the run does the others."""
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the writer process ignores: they ask a rank to save and stop, and the save needs the writer."""


@dataclass(frozen=True)
class Result:
    """Result of a job: its value, or the failure as text."""

    value: Any = None
    failure: str | None = None
    ended: float = field(default_factory=time.monotonic)
    """End of the job in seconds of ``time.monotonic``, a clock that all processes of a machine share."""


def do(job: Job, state: WriterState) -> Result:
    """Do a job, and return its result; if it raises an error, the result has the error as text."""
    try:
        return Result(job.run(state))
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is a BaseException
        return Result(failure=explain(error))


class Writer:
    """Writer that does every job at once, in this process, from the training state itself.

    ``poll`` and ``wait`` return only the result of the last submitted job; jobs are done in their order.
    """

    is_background = False
    """True if another process does the jobs while this process continues; the same on all ranks."""

    def __init__(self) -> None:
        self._state = WriterState()
        self._result: Result | None = None

    def stage(self, part: RankPart) -> RankPart | StagedPart:
        """Take over a part, and return it as jobs need it: a background writer copies its tensors."""
        self._state.plan = part.plan
        return part

    def submit(self, job: Job, delay_s: float = 0.0) -> None:
        """Have a job done, in the background after ``delay_s`` seconds; ``poll`` and ``wait`` return its result."""
        self._result = do(job, self._state)

    def poll(self) -> Result | None:
        """Return the result of the last submitted job, once; None while there is none."""
        result, self._result = self._result, None
        return result

    def wait(self) -> Result:
        """Wait for the result of the last submitted job, and return it."""
        result = self.poll()
        assert result is not None, "no job was submitted"
        return result

    def close(self, patience_s: float = CLOSING_S) -> None:
        """Wait at most ``patience_s`` seconds for the submitted jobs, and end the writer."""
        self._state = WriterState()


class ProcessWriter(Writer):
    """Writer in a process of its own, forked in the constructor; create it before threads and devices are in use.

    If that process dies, its last job has failed, and all later jobs are done at once in this process.
    """

    is_background = True

    def __init__(self) -> None:
        super().__init__()
        self._connection, theirs = Pipe()
        self._ticket = 0
        parent = os.getpid()
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _run_forked(theirs, self._connection, parent)
        theirs.close()

    def stage(self, part: RankPart) -> RankPart | StagedPart:
        memory, plan = self._state.staged, self._state.plan
        staged, self._state.staged = stage(part, memory)
        self._state.plan = part.plan
        if part.plan is not None and (plan is None or plan.key != part.plan.key):
            self._send(("plan", part.plan))
        if self._state.staged is not memory:
            self._send(("memory", self._state.staged.size), self._state.staged.descriptor)
        return staged

    def submit(self, job: Job, delay_s: float = 0.0) -> None:
        self._ticket += 1
        self._result = None
        if self.pid:
            self._send(("job", self._ticket, delay_s, job))
        else:
            super().submit(job)

    def poll(self) -> Result | None:
        while self.pid and self._result is None and self._connection.poll():
            self._receive()
        return super().poll()

    def wait(self) -> Result:
        while self._result is None:
            self._receive()
        return super().wait()

    def close(self, patience_s: float = CLOSING_S) -> None:
        with contextlib.suppress(EOFError, OSError):
            self._connection.send(("end",))
            while self._connection.poll(patience_s) and self._connection.recv()[0] != "ended":
                pass
        if self.pid:
            self._end()
        self._connection.close()
        if self._state.staged is not None:
            self._state.staged.close()
        super().close()

    def _send(self, message: tuple[Any, ...], descriptor: int | None = None) -> None:
        try:
            self._connection.send(message)
            if descriptor is not None:
                send_handle(self._connection, descriptor, self.pid)
        except OSError:
            self._lose()

    def _receive(self) -> None:
        try:
            _, ticket, result = self._connection.recv()
        except (EOFError, OSError):
            self._lose()
            return
        if ticket == self._ticket:
            self._result = result

    def _lose(self) -> None:
        if self.pid:
            status = self._end()
            cause = f"signal {signal.Signals(status & 127).name}" if status & 127 else f"exit status {status >> 8}"
            self._result = Result(failure=f"the process that writes checkpoints died ({cause})")

    def _end(self) -> int:
        """Kill the writer process, if it still runs; return its status as from ``os.waitpid``."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:  # other code in this process has waited for it
            status = 0
        self.pid = 0
        return status


@contextlib.contextmanager
def open_writer(asynchronous: bool) -> Iterator[Writer]:
    """Yield this rank's writer, and close it at the end; on Linux a process of its own if ``asynchronous``."""
    writer: Writer = ProcessWriter() if asynchronous and hasattr(os, "memfd_create") else Writer()
    try:
        yield writer
    except BaseException:
        writer.close(patience_s=0)  # the agent that waits for this rank must see it leave
        raise
    writer.close()


def _run_forked(connection: Connection, theirs: Connection, parent: int) -> None:
    """Serve as the writer process; never returns."""
    try:
        die_with_parent(parent)
        theirs.close()
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        os.nice(NICENESS)
        gc.disable()  # a collection would copy every page of the rank's objects
        torch.set_num_threads(1)  # the threads of the rank do not exist here
        serve(connection)
    except BaseException as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(explain(error) + "\n")
            sys.stderr.flush()
    finally:
        os._exit(0)


def work_on(state: WriterState) -> None:
    """Do the next slice of ``state.idle_work``; a failure ends that work, and is printed in the log of the rank."""
    assert state.idle_work is not None
    try:
        state.idle_at = time.monotonic() + next(state.idle_work)
    except StopIteration:
        state.idle_work = None
    except Exception as error:
        state.idle_work = None
        sys.stderr.write(explain(error) + "\n")
        sys.stderr.flush()


def serve(connection: Connection) -> None:
    """Do jobs from the connection, one after another, until the other end is closed."""
    state = WriterState(has_idle_time=True)
    waiting: tuple[Any, ...] | None = None
    while True:
        while waiting is None and (rest_s := state.rest_s()) is not None and not connection.poll(rest_s):
            work_on(state)
        # A job that waits for its time is given up when another one comes.
        if waiting is None or connection.poll(waiting[2]):
            try:
                message = connection.recv()
            except EOFError:
                return
        else:
            message, waiting = (*waiting[:2], 0.0, waiting[3]), None
        kind = message[0]
        if kind == "plan":
            state.plan = message[1]
        elif kind == "memory":
            if state.staged is not None:
                state.staged.close()
            state.staged = SharedMemory(message[1], recv_handle(connection))
        elif kind == "end":
            while state.rest_s() == 0:  # as long as the closing rank has patience
                work_on(state)
            connection.send(("ended",))
            return
        elif message[2] > 0:
            waiting = message
        else:
            waiting = None
            connection.send(("done", message[1], do(message[3], state)))
