"""Jobs of a save that write to the disk, and writers that do these jobs: in this process while training waits, or in a
second process during training."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException

from gpt import checkpoint as folders
from gpt.checkpoint import Manifest, Retention, write_manifest
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
from gpt.checkpoint.upkeep import Upkeep, UpkeepPlan
from launch.runs.folder import keep_unwritten, say
from launch.runs.process import die_with_parent

# Jobs: a rank makes a job, and its writer does the job, in the background or at once. A job takes the writer's state
# as its last argument; all other arguments are bound by ``functools.partial``, which can be pickled.


@dataclass
class WriterState:
    """Objects that a writer keeps between jobs."""

    staged: SharedMemory | None = None
    """Shared memory with the tensors of the newest staged part; None before the first staged part."""
    plan: WritePlan | None = None
    """Newest plan of the tensors that this rank writes; None before the first plan."""
    upkeep: Upkeep | None = None
    """Thread for the upkeep of committed checkpoints, in rank 0's writer; None before the first upkeep."""

    def whole(self, part: RankPart | StagedPart) -> RankPart:
        """Return a part with its tensors. The tensors of a staged part become views of the shared memory."""
        if isinstance(part, RankPart):
            return part
        assert self.staged is not None
        return part.load(self.staged, self.plan)


Job = Callable[[WriterState], Any]


def write_rank(temporary: Path, step: int, part: RankPart | StagedPart, is_first: bool, state: WriterState) -> None:
    """Write the part of one rank for the checkpoint of ``step`` into the folder ``temporary``.

    Args:
        temporary: folder of the save.
        step: step of the checkpoint.
        part: the part, as ``Writer.stage`` has returned it.
        is_first: True on rank 0, which first deletes the temporary folders of killed saves.
        state: state of the writer.

    Raises:
        FileExistsError: the step already has a checkpoint; raised on rank 0.
        OSError: the files could not be written, for example because the disk is full.
    """
    if is_first:
        folders.begin(temporary, step)
    else:
        temporary.mkdir(parents=True, exist_ok=True)
    write_part(state.whole(part), temporary)


def commit_save(temporary: Path, about: Manifest, may_commit: Callable[[], bool], state: WriterState) -> Path | None:
    """Commit a checkpoint that all ranks have written: write index and manifest, and rename the folder. For rank 0.

    Args:
        temporary: folder of the save.
        about: manifest of the checkpoint, still without time and files.
        may_commit: called just before the rename; if it returns False, nothing is committed.
        state: state of the writer.

    Returns:
        The committed folder; None if ``may_commit`` returned False.

    Raises:
        FileNotFoundError: rank 0 does not see a file that another rank has written, or sees only a part of it.
    """
    names = [report_name(rank) for rank in range(about.world_size)]
    reports = [Report.decode((temporary / name).read_bytes()) for name in names]
    files = {name: entry for report in reports for name, entry in sorted(report.files.items())}
    for name, entry in files.items():
        path = temporary / name
        if not path.is_file() or path.stat().st_size != entry.size:
            raise FileNotFoundError(f"{path}, written by another rank, is not seen by rank 0: is the folder shared?")
    if state.plan is not None and state.plan.metadata is not None and any(report.items for report in reports):
        files |= write_index(state.plan.metadata, [report.items for report in reports], temporary)
    for name in names:
        (temporary / name).unlink()
    write_manifest(temporary, replace(about, time=time.time(), files=files))
    return folders.commit(temporary, about.step) if may_commit() else None


def remove_save(temporary: Path, keeps: Retention, frees: bool, state: WriterState) -> None:
    """Delete the folder of a failed save. For rank 0, after all ranks have stopped writing into it.

    ``frees`` is True if the disk is full. Then one checkpoint fewer than the rule ``keeps`` is kept, but at least one.
    ``state`` is the state of the writer.
    """
    folders.remove_folder(temporary)
    if frees:
        folders.retire(temporary.parent, keeps.with_more(-1))


def tend_saved(
    folder: Path, keeps: Retention, plan: UpkeepPlan | None, committed: int | None, back_to: int | None,
    state: WriterState,
) -> None:  # fmt: skip
    """Add work to the upkeep of checkpoints, whose thread is started if necessary. For rank 0.

    Args:
        folder: folder of the run's checkpoints.
        keeps: rule for the checkpoints to keep.
        plan: settings of the upkeep. With None, only the checkpoints that ``keeps`` does not keep are deleted.
        committed: step of a newly committed checkpoint; None if there is none.
        back_to: step to which the run has gone back; copies of later steps are deleted. None if the run has not gone
            back.
        state: state of the writer.
    """
    if plan is None:
        folders.retire(folder, keeps)
        return
    if state.upkeep is None:
        state.upkeep = Upkeep(plan)
    state.upkeep.add(committed, back_to)


# Writers that do the jobs of a save: this process at once, or a second process during training.
#
# The second process is forked, so it costs no imports and shares the rank's memory of them. A thread would hold the
# interpreter's lock while it packs tensors, and so delay the next step.


NICENESS = 10
"""Niceness (nice(2)) of the writer process, so that it only uses CPU time that the ranks do not need."""
CLOSING_S = 10.0
"""Longest time, in seconds, that the end of a stopped run waits for the upkeep of checkpoints. The next start of the
run does the rest."""
BEAT_S = 1.0
IGNORED = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""Signals that the writer process ignores: they request that a rank saves and stops, and a save needs the writer."""


@dataclass(frozen=True)
class Result:
    """Result of a job."""

    value: Any = None
    """Value that the job returned; None if it failed."""
    failure: str | None = None
    """Error of the job as text; None if it succeeded."""
    ended: float = field(default_factory=time.monotonic)
    """Time of the end of the job, of time.monotonic, in seconds. All processes of a machine share this clock."""


def do(job: Job, state: WriterState) -> Result:
    """Do a job, and return its result. An error that the job raises is part of the result."""
    try:
        return Result(job(state))
    except (Exception, CheckpointException) as error:  # torch's CheckpointException is a BaseException
        return Result(failure=explain(error))


class Writer:
    """Writer that does every job in this process, when the job is submitted.

    Jobs are done in their order. ``poll`` and ``wait`` return only the result of the last submitted job.
    """

    is_background = False
    """True if another process does the jobs while training continues; the same on all ranks."""

    def __init__(self) -> None:
        self.patience_s = CLOSING_S
        """Longest time, in seconds, that ``close`` waits for submitted jobs and for the upkeep of checkpoints."""
        self.beat: Callable[[], None] = lambda: None
        """Called about once a second while ``close`` waits."""
        self._state = WriterState()
        self._result: Result | None = None

    def stage(self, part: RankPart) -> RankPart | StagedPart:
        """Return ``part`` in the form that jobs need. A background writer copies its tensors into shared memory, so
        that training may change them after this call."""
        self._state.plan = part.plan
        return part

    def submit(self, job: Job) -> None:
        """Do a job, or make the background process do it. ``poll`` and ``wait`` return its result."""
        self._result = do(job, self._state)

    def poll(self) -> Result | None:
        """Return the result of the last submitted job. Return None if the job has not ended, or if its result was
        already returned."""
        result, self._result = self._result, None
        return result

    def wait(self) -> Result:
        """Wait for the end of the last submitted job, and return its result, which tells whether the job failed.

        Call it only if there is a job whose result was not returned yet.
        """
        result = self.poll()
        assert result is not None, "no job was submitted"
        return result

    def close(self) -> None:
        """End the writer. Wait at most ``patience_s`` seconds for submitted jobs and for the upkeep of checkpoints."""
        if self._state.upkeep is not None:
            self._await(self._state.upkeep.close)
        self._state = WriterState()

    def _await(self, is_done: Callable[[float], bool]) -> None:
        until = time.monotonic() + self.patience_s
        while not is_done(min(BEAT_S, max(0.0, until - time.monotonic()))):
            if time.monotonic() >= until:
                if self.patience_s:
                    say("checkpoints were not all read again or copied; the next start of the run copies the newest")
                return
            self.beat()


class ProcessWriter(Writer):
    """Writer that does jobs in a process of its own, which the constructor forks. Create it before this process uses
    threads or devices.

    If the writer process dies, its last job counts as failed, and later jobs are done in this process.
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

    def submit(self, job: Job) -> None:
        self._ticket += 1
        self._result = None
        if self.pid:
            self._send(("job", self._ticket, job))
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

    def close(self) -> None:
        if self.pid:
            with contextlib.suppress(EOFError, OSError):
                self._connection.send(("end",))
                self._await(lambda wait_s: self._connection.poll(wait_s) and self._connection.recv()[0] == "ended")
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
        """Kill the writer process if it still runs. Return its exit status as ``os.waitpid`` does; 0 if unknown."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)
        try:
            _, status = os.waitpid(self.pid, 0)
        except ChildProcessError:  # other code in this process has read its status
            status = 0
        self.pid = 0
        return status


@contextlib.contextmanager
def open_writer(asynchronous: bool, beat: Callable[[], None]) -> Iterator[Writer]:
    """Return a context that yields this rank's writer of checkpoints, and closes it at its end.

    With ``asynchronous`` the writer is a process of its own on Linux; otherwise, and on other systems, this process
    writes while training waits. ``beat`` is called about once a second while the end of the context waits for submitted
    jobs and for the upkeep of checkpoints.
    """
    writer: Writer = ProcessWriter() if asynchronous and hasattr(os, "memfd_create") else Writer()
    writer.beat = beat
    try:
        yield writer
    except BaseException:
        writer.patience_s = 0.0  # the agent waits for the exit of this rank
        raise
    finally:
        writer.close()


def _run_forked(connection: Connection, theirs: Connection, parent: int) -> None:
    """Do the jobs from ``connection`` in the forked writer process, until the rank ends it. Never returns. ``theirs``
    is the end of the connection that belongs to the rank, and ``parent`` the process id of the rank."""
    try:
        die_with_parent(parent)
        theirs.close()
        for number in IGNORED:
            signal.signal(number, signal.SIG_IGN)
        os.nice(NICENESS)
        gc.freeze()  # a collection would copy every page of the rank's objects
        torch.set_num_threads(1)  # the threads of the rank do not exist here
        keep_unwritten()
        serve(connection)
    except BaseException as error:
        with contextlib.suppress(OSError):
            sys.stderr.write(explain(error) + "\n")
            sys.stderr.flush()
    finally:
        os._exit(0)


def serve(connection: Connection) -> None:
    """Receive jobs from a connection and do them, one after another, until the connection is closed or the rank
    requests the end."""
    state = WriterState()
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        kind = message[0]
        if kind == "plan":
            state.plan = message[1]
        elif kind == "memory":
            if state.staged is not None:
                state.staged.close()
            state.staged = SharedMemory(message[1], recv_handle(connection))
        elif kind == "end":
            while state.upkeep is not None and not state.upkeep.close(BEAT_S):
                pass  # the rank ends this process when its patience is over
            connection.send(("ended",))
            return
        else:
            connection.send(("done", message[1], do(message[2], state)))
