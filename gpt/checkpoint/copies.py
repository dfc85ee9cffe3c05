"""Copies of checkpoints on another filesystem: the process that makes them, and their use by rank 0. Torch-free."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import IO, Any

from gpt.checkpoint import folders
from gpt.checkpoint.folders import DamagedError, Retention
from gpt.checkpoint.target import Target, describe_error, target_of
from launch.process import die_with_parent
from launch.runs.files import keep_unwritten, say
from launch.runs.folder import RunFolder, is_newest_attempt

# The first rank's side: it starts the process that copies, and fetches a copy back at a start.


FINISHED_S = 600.0
"""Longest wait, in seconds, at the end of training for the copy of the last checkpoint."""
STOPPED_S = 10.0
"""Longest wait, in seconds, for that copy if the job has to stop; the next start of the run makes a missing copy."""
BEAT_S = 1.0
TRIES = 4
RETRY_S = 2.0


class Copies:
    """The process that copies the checkpoints of one attempt, as rank 0 controls it.

    All methods do nothing before ``start``, which only rank 0 calls.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self.patience_s = FINISHED_S

    def start(self, run_folder: Path, attempt: int, url: str, keeps: Retention) -> None:
        """Start the process that copies to ``url``; if that fails, print a warning, and nothing is copied."""
        job = CopyJob(str(run_folder), attempt, url, keeps, os.getpid())
        # Python is started anew: a fork of a rank has locks of threads that do not exist in the fork.
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gpt_launch", "gpt.checkpoint.copies", job.encode()],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a Ctrl-C is for the ranks
            )
        except OSError as error:  # training is worth more than its copies
            say(f"the process that copies checkpoints cannot be started ({error}); nothing is copied")

    def copy(self, step: int) -> None:
        """Request a copy of the checkpoint of ``step``; return before it is made."""
        self._ask({"copy": step})

    def discard_after(self, step: int) -> None:
        """Request the deletion of the copies of steps after ``step``, from which the run continues."""
        self._ask({"discard_after": step})

    def close(self, patience_s: float, beat: Callable[[], None]) -> None:
        """End the process: wait at most ``patience_s`` seconds for its last copy, then kill it.

        ``beat`` is called about once a second during the wait.
        """
        process, self._process = self._process, None
        if process is None:
            return
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.close()
        until = time.monotonic() + patience_s
        while process.poll() is None and time.monotonic() < until:
            beat()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(BEAT_S, max(0.0, until - time.monotonic())))
        if process.poll() is None:
            process.kill()
            process.wait()
            say("the newest checkpoint was not copied yet; the next start of the run copies it")

    def _ask(self, request: dict[str, Any]) -> None:
        if self._process is None:
            return
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        except OSError:  # it was killed, say for want of memory: training continues
            say(f"the process that copies checkpoints is gone (status {self._process.poll()}); copies end here")
            self._process = None


@contextlib.contextmanager
def open_copies(beat: Callable[[], None]) -> Iterator[Copies]:
    """Yield this rank's ``Copies``, and close it at the end; after an exception do not wait for the last copy.

    ``beat`` is called about once a second while the last copy is made.
    """
    copies = Copies()
    try:
        yield copies
    except BaseException:
        copies.close(0.0, beat)
        raise
    copies.close(copies.patience_s, beat)


@dataclass(frozen=True)
class Fetched:
    """Result of the search for the newest whole copy of a checkpoint."""

    path: Path | None
    """Folder of the fetched checkpoint, among the others of the run; None if no copy is whole."""
    damaged: tuple[str, ...] = ()
    """Newer copies that are damaged: one line with step and damage for each."""


class Fetch:
    """Search for the newest whole copy in a thread, while the ranks go on to report that they are alive.

    Args:
        folder: folder of the checkpoints.
        connect: opens the target.
    """

    def __init__(self, folder: Path, connect: Callable[[], Target]) -> None:
        self._found: Fetched | None = None
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(folder, connect), daemon=True)
        self._thread.start()

    def look(self) -> Fetched | None:
        """Wait at most ``BEAT_S`` seconds for the result; None if the search is not finished.

        Raises:
            OSError: the target cannot be read, or the disk cannot be written.
        """
        self._thread.join(BEAT_S)
        if self._failure is not None:
            raise OSError(
                f"found: no checkpoint on this disk, and the copies cannot be read ({describe_error(self._failure)})\n"
                f"expected: copies to go on from, or to know that there are none\n"
                f"type next: the same command again, or with checkpoint.copy_to=null to begin without them"
            ) from self._failure
        return self._found

    def _run(self, folder: Path, connect: Callable[[], Target]) -> None:
        for tried in range(TRIES):
            try:
                self._found = fetch_newest(folder, connect())
                return
            except Exception as error:  # each library behind a target has errors of its own
                failure = error
                folders.sweep(folder)
            if tried + 1 < TRIES:
                time.sleep(RETRY_S * 2**tried)  # time for the target to come back
        self._failure = failure


def fetch_newest(folder: Path, target: Target) -> Fetched:
    """Fetch the newest whole copy into ``folder``, which holds the run's checkpoints."""
    damaged: list[str] = []
    for step in reversed(target.steps()):
        temporary = folders.begin_temporary(folder, "fetching", step)
        try:
            target.fetch(step, temporary)
        except DamagedError as damage:
            folders.remove_folder(temporary)
            damaged.append(f"the copy of step {step}: {damage}")
        else:
            return Fetched(folders.commit(temporary, step), tuple(damaged))
    return Fetched(None, tuple(damaged))


# The process that copies a run's checkpoints during training, one at a time and the newest first.
#
#     python -m gpt.checkpoint.copies JOB
#
# It is a process of its own, since uploads hold the interpreter's lock, and fsspec's threads would not outlive a fork.
# It reads requests from its standard input, and enters its results in the event log of the run.


FIRST_RETRY_S = 5.0
"""Seconds from the first failure to the next try; each later wait is twice as long."""
LONGEST_RETRY_S = 300.0
LAST_TRIES = 3
"""Failures in a row after which the last copy is given up, once training has ended."""
NICENESS = 10


@dataclass(frozen=True)
class CopyJob:
    """Argument of the process that copies: the run, the attempt, the target and the copies to keep."""

    run_folder: str
    attempt: int
    url: str
    keeps: Retention
    parent: int
    """Process id of rank 0; when that process ends, the process that copies is killed."""

    def encode(self) -> str:
        """Encode the job as JSON, for a command line."""
        return json.dumps(asdict(self))

    @staticmethod
    def decode(text: str) -> CopyJob:
        """Decode the result of ``encode``."""
        value = json.loads(text)
        return CopyJob(**value | {"keeps": Retention(**value["keeps"])})


class Copier:
    """Work of the process that copies: of the requested checkpoints it copies the newest.

    A failure is recorded in the event log and tried again.

    Args:
        folder: folder of the checkpoints.
        connect: opens the target; called again after a failure.
        keeps: copies that stay at the target.
        may_commit: returns False if a later attempt owns the run.
        tell: records an event, by its name and details, in the event log.
        wait: waits for the next request, at most the given seconds (None: no limit); returns the request, or None
            if none came.
    """

    def __init__(
        self,
        folder: Path,
        connect: Callable[[], Target],
        keeps: Retention,
        may_commit: Callable[[], bool],
        tell: Callable[..., None],
        wait: Callable[[float | None], dict[str, Any] | None],
    ) -> None:
        self._folder, self._connect, self._keeps = folder, connect, keeps
        self._may_commit, self._tell, self._wait = may_commit, tell, wait
        self._target: Target | None = None
        self._step: int | None = None
        self._back_to: int | None = None
        self._is_ending = False
        self._failures = 0

    def serve(self) -> None:
        """Serve requests until their end, and until the last copy is made or given up."""
        while True:
            if self._step is None and self._back_to is None:
                if self._is_ending:
                    return
                self._take(self._wait(None))
                continue
            while not self._is_ending and (request := self._wait(0.0)) is not None:  # only the newest is copied
                self._take(request)
            if not self._work():
                if self._is_ending and self._failures >= LAST_TRIES:
                    return
                self._take(self._wait(min(LONGEST_RETRY_S, FIRST_RETRY_S * 2 ** (self._failures - 1))))

    def _take(self, request: dict[str, Any] | None) -> None:
        if request is None:
            return
        if "copy" in request:
            self._step = request["copy"]
        elif "discard_after" in request:
            self._back_to = request["discard_after"]
            if self._step is not None and self._step > request["discard_after"]:
                self._step = None
        else:
            self._is_ending = True

    def _work(self) -> bool:
        """Delete and copy as requested; return False if this failed and must be tried again."""
        step = self._step
        try:
            if not self._may_commit():  # a later attempt has a copier of its own
                self._step = self._back_to = None
                return True
            if self._target is None:
                self._target = self._connect()
            if self._back_to is not None:
                self._target.discard_after(self._back_to)
                self._back_to = None
            if step is not None:
                self._copy(self._target, step)
                self._step = None
            self._failures = 0
            return True
        except DamagedError as damage:  # another try would find the same damage; a load will set the checkpoint aside
            self._tell("copy_failed", step=step, cause=f"the checkpoint is damaged: {damage}", failures=1)
            self._step = None
            return True
        except Exception as error:  # each library behind a target has errors of its own
            self._failures += 1
            self._tell("copy_failed", step=step, cause=describe_error(error), failures=self._failures)
            return False

    def _copy(self, target: Target, step: int) -> None:
        started = time.monotonic()
        sent = target.put(folders.final_for(self._folder, step), self._may_commit)
        if sent:
            copy_s = time.monotonic() - started
            self._tell("copied", step=step, bytes=sent, copy_s=copy_s, failures=self._failures)
            target.retire(self._keeps)


def read_requests(stream: IO[str], into: queue.Queue[dict[str, Any]]) -> None:
    """Put each request of ``stream``, a line of JSON, into the queue; put ``{"end": True}`` after the last one."""
    for line in stream:
        into.put(json.loads(line))
    into.put({"end": True})


def main() -> int:
    """Serve requests until the standard input is closed and the last copy made; return the exit status 0."""
    job = CopyJob.decode(sys.argv[1])
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # the rank that has to leave decides when this process ends
    die_with_parent(job.parent)
    os.nice(NICENESS)
    keep_unwritten()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # all files of a checkpoint are open at once
    folder = RunFolder(Path(job.run_folder))
    requests: queue.Queue[dict[str, Any]] = queue.Queue()
    threading.Thread(target=read_requests, args=(sys.stdin, requests), daemon=True).start()

    def wait(seconds: float | None) -> dict[str, Any] | None:
        try:
            return requests.get(timeout=seconds) if seconds != 0.0 else requests.get_nowait()
        except queue.Empty:
            return None

    def tell(event: str, **details: Any) -> None:
        folder.record_event(event, attempt=job.attempt, **details)
        if event == "copy_failed":
            say(f"the checkpoint of step {details['step']} could not be copied to {job.url}: {details['cause']}")

    Copier(
        folder.checkpoints,
        partial(target_of, job.url, folder.path),
        job.keeps,
        partial(is_newest_attempt, folder, job.attempt),
        tell,
        wait,
    ).serve()
    return 0


if __name__ == "__main__":
    sys.exit(main())
