"""Handles of submitted jobs: a Slurm job, an array element, or local agents; and the batch script of a job."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from submitit.core.utils import JobPaths
from submitit.slurm.slurm import _make_sbatch_string

from launch.agent import node as processes
from launch.plan.placement import cluster_of
from launch.plan.plan import ELSEWHERE, JOBS, SLURM_JOBS, Plan
from launch.runs.folder import RunFolder
from launch.slurm import client as scheduler
from launch.slurm.client import JobState

# Handles of submitted jobs: a Slurm job, an element of a job array, or agents on this machine.


CONTROLLER = "submitit.local._local"
"""Module that submitit starts as the controller of a local job, by which its process is known."""
SECOND_SIGNAL_S = 0.5  # two signals that are pending at the same time count as one


@dataclass(frozen=True)
class JobStatus:
    """``pending``, ``running``, ``over``, or ``unknown`` where it cannot be told from here; and why."""

    state: str
    detail: str = ""
    partition: str = ""
    """Partition in which the job waits."""
    since: float | None = None
    """Time when it began to wait there, Unix seconds; None where nothing can take it out of the queue."""
    reason: str = ""
    """Reason for which the job waits, as Slurm names it."""


class Job(Protocol):
    """A submitted point."""

    job_id: str

    @property
    def name(self) -> str:
        """Name that no other job has: its id, and the cluster that counts so where that is not the local one."""
        ...

    def status(self, queue: Mapping[str, JobState]) -> JobStatus:
        """Return its status. ``queue`` is what squeue said of jobs by name, asked once for all of them."""
        ...

    def stop(self, state: str) -> None:
        """Ask for a save and an end, or take it out of the queue; ``state`` is that of its status."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...


def submitit_folder(run_dir: str | Path) -> Path:
    """Folder of submitit's pickles and the agents' logs: beside the points, on the shared filesystem."""
    return Path(run_dir).parent / JOBS


def slurm_folder(run_dir: str | Path, cluster: str | None = None) -> Path:
    """Folder of submitit's pickles and the agents' logs of Slurm jobs; ``cluster`` names another than the local one.

    One for all jobs of a sweep, and not one for each: submitit would make that only when sbatch has answered, by when
    the job may have started, and Slurm fails a job without a word whose log it cannot open.
    """
    return submitit_folder(run_dir) / (f"{ELSEWHERE}{cluster}" if cluster else SLURM_JOBS)


def slurm_layouts(run_dir: str | Path, cluster: str | None = None) -> tuple[Path, Path]:
    """Folders of submitit's files of Slurm jobs, in this version and in earlier ones; ``%j`` is the number of a job."""
    earlier = slurm_folder(run_dir, cluster) if cluster else submitit_folder(run_dir)
    return slurm_folder(run_dir, cluster), earlier / "%j"


def agent_logs(run_dir: str | Path, job: Job, node: int) -> list[Path]:
    """Paths of the standard output and error of a node's agent. They may not be there."""
    folder = submitit_folder(run_dir)  # earlier versions had a folder in it for each job
    layouts = slurm_layouts(run_dir, job.cluster) if isinstance(job, SlurmJob) else (folder, folder / "%j")
    possible = [JobPaths(layout, job.job_id, node) for layout in layouts]
    paths = next((paths for paths in possible if paths.stdout.exists()), possible[0])
    return [Path(paths.stdout), Path(paths.stderr)]


class SlurmJob:
    """A Slurm job, or one element of a job array; of another cluster where ``cluster`` names one."""

    def __init__(self, job_id: str, cluster: str | None = None) -> None:
        self.job_id = job_id
        self.cluster = cluster

    @property
    def name(self) -> str:
        """Id of the job, as sbatch prints it"""
        return self.job_id if self.cluster is None else f"{self.job_id} on cluster {self.cluster}"

    @property
    def array_id(self) -> str:
        """Id of the whole array where the job is an element of one"""
        return self.job_id.split("_")[0]

    def status(self, queue: Mapping[str, JobState]) -> JobStatus:
        """Over, where the controller has forgotten it, some minutes after its end."""
        known = queue.get(self.name)
        if known is None:
            return JobStatus("over")
        if known.is_over:
            return JobStatus("over", "" if known.state == "COMPLETED" else known.state)
        if not known.is_waiting:
            return JobStatus("running", "" if known.state == "RUNNING" else known.state)
        starts = f"starts {known.start}" if known.start else ""
        reason = known.reason.replace("None", "")
        detail = ", ".join(part for part in (reason, starts) if part)
        pending = known.state == "PENDING"  # and not, say, waiting for its nodes to boot
        return JobStatus("pending", detail, known.partition, known.submitted if pending else None, reason)

    def stop(self, state: str) -> None:
        """A job that waits is taken out of the queue; the agents of one that runs turn SIGTERM into a save."""
        if state == "pending":
            self.take_out()
        else:
            scheduler.signal_job(self.job_id, "TERM", self.cluster)

    def take_out(self) -> None:
        """Take it out of the queue; one that has started meanwhile is left alone."""
        scheduler.cancel(self.job_id, self.cluster, only_waiting=True)

    def kill(self) -> None:
        """Slurm sends SIGTERM, and SIGKILL after its KillWait."""
        scheduler.cancel(self.job_id, self.cluster)


class LocalJob:
    """The agents of a point on one machine, under a controller process of submitit."""

    def __init__(
        self, job_id: str, host: str, process: subprocess.Popen[bytes] | None = None, started: str | None = None
    ) -> None:
        self.job_id = job_id
        self._host = host
        self.started = processes.start_time(process.pid) if process is not None else started
        """When its controller started, as ``processes.start_time``: the kernel gives process ids out again, and no
        signal may reach the run that has this one by now. None where an event log of earlier versions does not say."""
        self._process = process
        """Given by the launcher that started it, which has to ask after its child for it to go."""
        self._asked = False

    @property
    def name(self) -> str:
        """The number of its controller's process."""
        return self.job_id

    @property
    def is_alive(self) -> bool:
        """Return whether the controller runs."""
        return is_local_job(int(self.job_id), self.started) if self._process is None else self._process.poll() is None

    def status(self, queue: Mapping[str, JobState]) -> JobStatus:
        """Known on the machine it runs on only."""
        if self._host != os.uname().nodename:
            return JobStatus("unknown", f"local run on {self._host}; ask there")
        return JobStatus("running" if self.is_alive else "over")

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


def is_local_job(pid: int, started: str | None = None) -> bool:
    """Return whether process ``pid`` is a submitit controller that still runs, that which ``started`` then if given."""
    try:
        is_controller = CONTROLLER.encode() in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
    return is_controller and started in (None, processes.start_time(pid))


def job_of(event: Mapping[str, Any]) -> Job:
    """The job of an event log's ``submitted`` event."""
    if event["cluster"] == "local":
        return LocalJob(str(event["job_id"]), str(event.get("host")), started=event.get("pid_started"))
    return SlurmJob(str(event["job_id"]), event.get("slurm_cluster"))


def ask_queue(jobs: Iterable[Job | None], retries: int = scheduler.RETRIES) -> dict[str, JobState]:
    """Ask squeue for the states of Slurm's jobs by name, once for each cluster. Raises SlurmError."""
    by_cluster: dict[str | None, set[str]] = {}
    for job in jobs:
        if isinstance(job, SlurmJob):
            by_cluster.setdefault(job.cluster, set()).add(job.job_id)
    return {
        SlurmJob(number, cluster).name: state
        for cluster, numbers in by_cluster.items()
        for number, state in scheduler.job_states(numbers, retries, cluster).items()
    }


class LocalQueueEntry:
    """A local point that waits for the ones before it, noted in its folder while its launcher lives."""

    def __init__(self, folder: RunFolder) -> None:
        self._note = folder.path / ".launch" / "waiting"

    def enter(self, events_before: int) -> None:
        """Note that this process will start the point, and how many events are history by then."""
        self._note.parent.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        self._note.write_text(f"{os.uname().nodename} {pid} {processes.start_time(pid)} {events_before}")

    def leave(self) -> None:
        """The point starts, or never will."""
        self._note.unlink(missing_ok=True)

    def events_before(self) -> int | None:
        """The number of events that are history; None where the point does not wait, or its launcher is gone."""
        try:
            host, pid, start, events_before = self._note.read_text().split()
            lives = host == os.uname().nodename and processes.start_time(int(pid)) == start
            return int(events_before) if lives else None
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
            return None


# The batch script of a job, and private parts of submitit behind one door: its text, and the process of a local job.


SUBMISSION = "submitit.core._submit"
"""Module that submitit's batch scripts run on every node."""
AFTER_STEP = "gpt_launch launch.agent.after_step"
"""Command that they run where srun has failed."""


def batch_parameters(plan: Plan) -> dict[str, Any]:
    """Parameters of submitit for a job: the plan's resources, and lines that look at the run where srun has failed.

    A user's own ``set -e`` must not skip those, and a trap would take the place of a user's own.
    """
    python, folder = shlex.quote(sys.executable), shlex.quote(str(jobs_folder(plan)))
    after = f'{python} -m {AFTER_STEP} "$status" {folder} --submitit'
    setup = [*plan.slurm.get("setup", []), "set +e"]
    return {**plan.slurm, "setup": setup, "teardown": ["status=$?", f'[ "$status" -eq 0 ] || exec {after}']}


def sbatch_text(plans: Sequence[Plan]) -> str:
    """The batch script that submitit writes for plans of one shape. Needs no Slurm."""
    folder = jobs_folder(plans[0])
    parameters = batch_parameters(plans[0])
    python = parameters.pop("python", None) or shlex.quote(sys.executable)
    command = f"{python} -u -m {SUBMISSION} {shlex.quote(str(folder))}"
    count = len(plans) if len(plans) > 1 else None
    text = _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters)
    assert isinstance(text, str)
    return text


def jobs_folder(plan: Plan) -> Path:
    """Folder of submitit's files of a job."""
    return slurm_folder(plan.run_dir, cluster_of(plan.slurm))


def controller_process(job: Any) -> subprocess.Popen[bytes]:
    """The controller of a local job, which its parent has to wait for to see it end."""
    process = job._process
    assert isinstance(process, subprocess.Popen)
    return process
