"""What becomes of a submitted point: a Slurm job, an element of a job array, or agents on this machine.

Owns asking a job how it is, asking it to leave, and ending it; by the job's id, so that any process can, not only the
one that submitted it. Must not know how a job is submitted, nor what its ledger says.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from submitit.core.utils import JobPaths

from gpt.run_folder import RunFolder
from launch import scheduler
from launch.scheduler import JobState

SECOND_SIGNAL_S = 0.5  # two signals that are pending at the same time count as one


@dataclass(frozen=True)
class Standing:
    """``queued``, ``running``, ``over``, or ``unknown`` where it cannot be told from here; and why."""

    state: str
    detail: str = ""
    partition: str = ""
    """Where it waits."""
    since: float | None = None
    """When it began to wait there, Unix seconds; None where nothing can take it out of the queue."""
    reason: str = ""
    """Why it waits, in Slurm's word."""


class Job(Protocol):
    """A submitted point."""

    job_id: str

    def standing(self, queue: Mapping[str, JobState]) -> Standing:
        """How it is. ``queue`` is what squeue said, asked once for all jobs."""
        ...

    def stop(self, state: str) -> None:
        """Ask for a save and an end, or take it out of the queue; ``state`` is its standing's."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...


def submitit_folder(run_dir: str | Path) -> Path:
    """Where submitit keeps its pickles and the agents' logs: beside the points, on the shared filesystem."""
    return Path(run_dir).parent / ".submitit"


def agent_logs(run_dir: str | Path, job_id: str, node: int) -> list[Path]:
    """What the agent of a node printed: standard output and standard error. They may not be there."""
    paths = JobPaths(submitit_folder(run_dir) / "%j", job_id, node)
    return [Path(paths.stdout), Path(paths.stderr)]


class SlurmJob:
    """A Slurm job, or one element of a job array."""

    def __init__(self, job_id: str) -> None:
        self.job_id = job_id

    def standing(self, queue: Mapping[str, JobState]) -> Standing:
        """Over, where the controller has forgotten it, some minutes after its end."""
        known = queue.get(self.job_id)
        if known is None:
            return Standing("over")
        if known.is_over:
            return Standing("over", "" if known.state == "COMPLETED" else known.state)
        if not known.is_waiting:
            return Standing("running", "" if known.state == "RUNNING" else known.state)
        starts = f"starts {known.start}" if known.start else ""
        reason = known.reason.replace("None", "")
        detail = ", ".join(part for part in (reason, starts) if part)
        pending = known.state == "PENDING"  # and not, say, waiting for its nodes to boot
        return Standing("queued", detail, known.partition, known.submitted if pending else None, reason)

    def stop(self, state: str) -> None:
        """A job that waits is taken out of the queue; the agents of one that runs turn SIGTERM into a save."""
        if state == "queued":
            scheduler.cancel(self.job_id, only_waiting=True)
        else:
            scheduler.signal_job(self.job_id, "TERM")

    def kill(self) -> None:
        """Slurm sends SIGTERM, and SIGKILL after its KillWait."""
        scheduler.cancel(self.job_id)


class LocalJob:
    """The agents of a point on one machine, under a controller process of submitit."""

    def __init__(self, job_id: str, host: str, process: subprocess.Popen[bytes] | None = None) -> None:
        self.job_id = job_id
        self._host = host
        self._process = process
        """Given by the launcher that started it, which has to ask after its child for it to go."""
        self._asked = False

    @property
    def is_alive(self) -> bool:
        """Whether the controller runs."""
        return is_local_job(int(self.job_id)) if self._process is None else self._process.poll() is None

    def standing(self, queue: Mapping[str, JobState]) -> Standing:
        """Known on the machine it runs on only."""
        if self._host != os.uname().nodename:
            return Standing("unknown", f"local run on {self._host}; ask there")
        return Standing("running" if self.is_alive else "over")

    def stop(self, state: str) -> None:
        """The controller hands SIGTERM on to every agent."""
        self._asked = True
        self._terminate()

    def kill(self) -> None:
        """A second SIGTERM has the agents end their ranks at once."""
        if not self._asked:
            self.stop("running")
            time.sleep(SECOND_SIGNAL_S)
        self._terminate()

    def _terminate(self) -> None:
        if self._host == os.uname().nodename and self.is_alive:
            try:
                os.kill(int(self.job_id), signal.SIGTERM)
            except ProcessLookupError:  # it has just ended
                return


def is_local_job(pid: int) -> bool:
    """Whether process ``pid`` is a submitit controller that still runs."""
    try:
        return b"submitit.local._local" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def job_of(event: Mapping[str, Any]) -> Job:
    """The job of a ledger's ``submitted`` event."""
    if event["cluster"] == "local":
        return LocalJob(str(event["job_id"]), str(event.get("host")))
    return SlurmJob(str(event["job_id"]))


def ask_queue(jobs: Iterable[Job | None], retries: int = scheduler.RETRIES) -> dict[str, JobState]:
    """What squeue says of those jobs that are Slurm's, in one question. Raises SlurmError."""
    return scheduler.job_states((job.job_id for job in jobs if isinstance(job, SlurmJob)), retries)


def running_job(events: Sequence[Mapping[str, Any]]) -> str | None:
    """The job that still works on a run folder, from its ledger, or None."""
    submitted = [e for e in events if e["event"] == "submitted"]
    if not submitted:
        return None
    job = job_of(submitted[-1])
    standing = job.standing(ask_queue([job]))
    if standing.state not in ("queued", "running"):
        return None
    kind = "process" if isinstance(job, LocalJob) else "job"
    return f"{kind} {job.job_id}, {standing.state}"


class Waiting:
    """A local point that waits for the ones before it, noted in its folder while its launcher lives."""

    def __init__(self, folder: RunFolder) -> None:
        self._note = folder.path / ".launch" / "waiting"

    def enter(self, events_before: int) -> None:
        """Note that this process will start the point, and how many events are history by then."""
        self._note.parent.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        self._note.write_text(f"{os.uname().nodename} {pid} {process_start(pid)} {events_before}")

    def leave(self) -> None:
        """The point starts, or never will."""
        self._note.unlink(missing_ok=True)

    def since(self) -> int | None:
        """The number of events that are history; None where the point does not wait, or its launcher is gone."""
        try:
            host, pid, start, events_before = self._note.read_text().split()
        except (FileNotFoundError, ValueError):
            return None
        lives = host == os.uname().nodename and process_start(int(pid)) == start
        return int(events_before) if lives else None


def process_start(pid: int) -> str | None:
    """When a process started, in clock ticks since boot: with its id it names a process for good. None: not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (FileNotFoundError, ProcessLookupError):
        return None
