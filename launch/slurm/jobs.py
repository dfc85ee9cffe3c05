"""Submitted jobs: handles of Slurm jobs and of local agents, their files, and jobs that no event log names.

sbatch may accept a job whose launcher dies before it records the job. Such a job is found by submitit's pickle, which
names its run folder; status, logs, cancel, move and a second launch then treat it as the job of its run.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, JobPaths
from submitit.slurm.slurm import _make_sbatch_string

from launch.agent import node as processes
from launch.errors import ConfigError
from launch.plan.plan import JOBS, SLURM_JOBS, Plan
from launch.runs.events import refuse_alive, select_events
from launch.runs.folder import RunFolder, is_own
from launch.slurm import client as scheduler
from launch.slurm.client import JobState

SECOND_SIGNAL_S = 0.5  # Two signals that are pending at the same time count as one.
ACTIVE = ("pending", "running")


@dataclass(frozen=True)
class SlurmJob:
    """A Slurm job, or one element of a job array."""

    job_id: str
    points: tuple[str, ...] = ()
    """Names of the run folders of the points that share the job. Task i of the job is the agent of ``points[i]``.

    Empty for a job of one point.
    """

    def status(self, queue: Mapping[str, JobState]) -> JobState:
        """Return the state of the job in ``queue`` (job id -> state); GONE if the queue does not have the job.

        Slurm forgets jobs soon after they end.
        """
        return queue.get(self.job_id, JobState("GONE"))

    def stop(self, phase: str) -> None:
        """Cancel the job if ``phase`` is ``pending``; otherwise request its agents to save and leave, by SIGTERM."""
        if phase == "pending":
            self.take_out()
        else:
            # Not repeated: a second signal would end ranks that are saving.
            # A batch script without srun has the agents, and passes SIGURG on as SIGTERM. Other shells ignore it.
            scheduler.scancel(self.job_id, "--signal=URG", "--batch", retries=1)
            scheduler.scancel(self.job_id, "--signal=TERM", retries=1)

    def take_out(self) -> None:
        """Cancel the job if it is still pending."""
        scheduler.scancel(self.job_id, "--state=PENDING")

    def kill(self) -> None:
        """Cancel the job: Slurm sends SIGTERM, and SIGKILL after its KillWait."""
        scheduler.scancel(self.job_id)


@dataclass
class LocalJob:
    """The agents of a point that runs without a job of its own, under a controller process of submitit."""

    job_id: str
    """Process id of the controller."""
    host: str
    """Host name of the machine on which the controller runs."""
    started: str | None = None
    """Start time of the controller, since the kernel reuses process ids; None if the controller ended at once."""
    process: subprocess.Popen[bytes] | None = None
    """The controller process, in the launcher that started it; None in other processes."""
    _is_asked: bool = False

    @property
    def is_alive(self) -> bool:
        """Return whether the controller runs.

        Other processes than its launcher identify the controller by process id and start time. The command line is not
        used, because it is empty until exec has ended, which takes some 20 ms under load.
        """
        if self.process is not None:
            return self.process.poll() is None
        pid = int(self.job_id)
        return processes.start_time(pid) == self.started and not processes.is_gone(pid)

    def status(self, queue: Mapping[str, JobState]) -> JobState:
        """Return the state RUNNING or GONE; UNKNOWN if the controller is on another machine. ``queue`` is not used."""
        if self.host != os.uname().nodename:
            return JobState("UNKNOWN", f"local run on {self.host}; ask there")
        return JobState("RUNNING" if self.is_alive else "GONE")

    def stop(self, phase: str) -> None:
        """Send SIGTERM to the controller, which forwards the signal to every agent. ``phase`` is not used."""
        self._is_asked = True
        if self.host == os.uname().nodename and self.is_alive:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(int(self.job_id), signal.SIGTERM)

    def kill(self) -> None:
        """Make the agents end their ranks at once, which they do after a second SIGTERM.

        Send SIGTERM twice to the controller, or once if ``stop`` has already sent the first.
        """
        if not self._is_asked:
            self.stop("running")
            time.sleep(SECOND_SIGNAL_S)
        self.stop("running")


Job = SlurmJob | LocalJob


def start_launcher(words: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start ``python -m gpt_launch`` with the arguments ``words``, and return its process.

    The process survives the end of the terminal. The output of the process is appended to ``log``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-u", "-m", "gpt_launch", *words]
    with log.open("ab") as file:
        return subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )


def job_of(event: Mapping[str, Any]) -> Job:
    """Return the handle of the job that a ``submitted`` event records."""
    job_id = str(event.get("job_id"))
    if event.get("cluster") != "slurm":
        host = str(event.get("host", "a machine that its event log does not name"))
        return LocalJob(job_id, host, started=event.get("pid_started"))
    return SlurmJob(job_id, tuple(event.get("points", ())))


def ask_queue(jobs: Iterable[Job | None], retries: int = scheduler.RETRIES) -> dict[str, JobState]:
    """Return job id -> state for the Slurm jobs among ``jobs``, with one squeue, in at most ``retries`` tries.

    Raises SlurmError if squeue fails.
    """
    return scheduler.job_states((job.job_id for job in jobs if isinstance(job, SlurmJob)), retries)


class LocalQueueEntry:
    """File in the run folder of a local point that waits for earlier points. It is valid while its launcher runs."""

    def __init__(self, folder: RunFolder) -> None:
        self._note = folder.path / ".launch" / "waiting"

    def enter(self, events_before: int) -> None:
        """Write the file. It says that this process will start the point later.

        ``events_before`` is the number of events that the event log had before the point was submitted.
        """
        self._note.parent.mkdir(parents=True, exist_ok=True)
        pid = os.getpid()
        self._note.write_text(f"{os.uname().nodename} {pid} {processes.start_time(pid)} {events_before}")

    def leave(self) -> None:
        """Remove the file that ``enter`` has written: the point starts now or will never start."""
        self._note.unlink(missing_ok=True)

    def events_before(self) -> int | None:
        """Return the number that ``enter`` has stored: the events before the point was submitted.

        None if the point does not wait, or if its launcher has ended.
        """
        try:
            host, pid, start, events_before = self._note.read_text().split()
            lives = host == os.uname().nodename and processes.start_time(int(pid)) == start
            return int(events_before) if lives else None
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError):
            return None


# Files of jobs, next to the run folders on the shared filesystem.


def submitit_folder(run_dir: str | Path) -> Path:
    """Return the folder with submitit's pickles and the agents' logs of local jobs. It contains ``slurm_folder``."""
    return Path(run_dir).parent / JOBS


def slurm_folder(run_dir: str | Path) -> Path:
    """Return the folder with submitit's pickles and the agents' logs of Slurm jobs.

    All jobs of a sweep share one folder. submitit would make a folder for each job only after sbatch has answered. By
    then the job may have started, and Slurm silently fails a job whose log it cannot open.
    """
    return submitit_folder(run_dir) / SLURM_JOBS


def agent_logs(run_dir: str | Path, job: Job, node: int) -> list[Path]:
    """Return the paths of the standard output and of the standard error of a node's agent, in this order.

    ``node`` is the index of the node in the run. The files may not exist.
    """
    folder = slurm_folder(run_dir) if isinstance(job, SlurmJob) else submitit_folder(run_dir)
    if isinstance(job, SlurmJob) and job.points:
        node += job.points.index(Path(run_dir).name)
    paths = JobPaths(folder, job.job_id, node)
    return [Path(paths.stdout), Path(paths.stderr)]


# Batch scripts. submitit's private names are used here, and in ``submit.start_local``, which needs the process.


SUBMISSION = "submitit.core._submit"
"""Module that submitit's batch scripts run on every node."""
AFTER_STEP = "gpt_launch launch.agent.after_step"
"""Command that requeues the runs of a job after a fault. A batch script runs it if srun has failed.

In a job that several points share, the batch script also runs it after a success of srun.
"""


SETUP_FAILED = (
    """trap 'status=$?; [ "${#BASH_SOURCE[@]}" -gt 1 ] || { """
    """printf "launch: status %s of the line of cluster.setup: %s\\n" "$status" "$(sed -n "${LINENO}p" "$0")" >&2; """
    """exit "$status"; }' ERR"""
)
"""Lines of shell that make the first failed line of ``cluster.setup`` end the job.

A failure in a file that such a line sources does not end the job if the file itself succeeds.
"""


def batch_parameters(plan: Plan) -> dict[str, Any]:
    """Return submitit's parameters of a job: the plan's resources, and ``AFTER_STEP``, which runs after srun.

    If the lines of ``cluster.setup`` contain ``set -e``, a failure of srun would skip ``AFTER_STEP``. Therefore ``set
    +e`` follows these lines. A trap that runs ``AFTER_STEP`` is no alternative, because it would replace a trap of the
    user.
    """
    python, folder = shlex.quote(sys.executable), shlex.quote(str(slurm_folder(plan.run_dir)))
    after = f'{python} -m {AFTER_STEP} "$status" {folder} --submitit'
    own = plan.slurm.get("setup", [])
    setup = [*([SETUP_FAILED, *own, "trap - ERR"] if own else []), "set +e"]
    # The agents of a shared job leave its requeue to the batch script.
    condition = "" if plan.job_points else '[ "$status" -eq 0 ] || '
    return {**plan.slurm, "setup": setup, "teardown": ["status=$?", f"{condition}exec {after}"]}


def sbatch_text(plans: Sequence[Plan]) -> str:
    """Return the batch script that submitit writes for plans with equal resources. Needs no Slurm."""
    folder = slurm_folder(plans[0].run_dir)
    parameters = batch_parameters(plans[0])
    python = parameters.pop("python", None) or shlex.quote(sys.executable)
    command = f"{python} -u -m {SUBMISSION} {shlex.quote(str(folder))}"
    count = len(plans) if len(plans) > 1 and not plans[0].job_points else None
    text = _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters)
    assert isinstance(text, str)
    return text


# Jobs that still work on a run folder, including jobs that no event log names.


SUBMITTED = "_submitted.pkl"
"""End of the file name of submitit's pickle of a job. The beginning is the job's id."""


def refuse_running(plan: Plan, own: str | None = None) -> None:
    """Raise ConfigError if a job other than ``own`` works on the run folder, or is pending for it.

    ``own`` is the id of a job; None to refuse every job. If the plan takes the run back to an earlier step, ranks on
    this machine that a user has started without the launcher are also refused.

    Raises:
        SlurmError: Slurm does not answer.
    """
    folder = RunFolder(plan.run_dir)
    submitted = select_events(folder.read_events(), "submitted")
    for job in (job_of(submitted[-1]) if submitted else None, find_unrecorded(folder)):
        phase = "over" if job is None or job.job_id == own else job.status(ask_queue([job])).phase
        if job is None or phase not in ACTIVE:
            continue
        kind = "process" if isinstance(job, LocalJob) else "job"
        waits = phase == "pending" and plan.placement.is_watched
        move = f"; if its launcher is gone, python -m launch.move {shlex.quote(plan.run_dir)} moves it" if waits else ""
        raise ConfigError(
            f"{plan.run_dir} is being worked on by {kind} {job.job_id}, {phase}",
            "one job for a run folder",
            f"wait for it or cancel it; fresh=true makes a new folder{move}",
        )
    if plan.goes_on.back_to is not None:
        refuse_alive(folder)


def find_unrecorded(folder: RunFolder) -> SlurmJob | None:
    """Return the newest active Slurm job of a run that the event log does not name; None if there is none.

    Raises SlurmError if Slurm does not answer.
    """
    known = {str(event.get("job_id")) for event in select_events(folder.read_events(), "submitted")}
    own = []
    for pickle in slurm_folder(folder.path).glob(f"[0-9]*{SUBMITTED}"):
        job = SlurmJob(pickle.name.removesuffix(SUBMITTED))
        # The pickles name the run, so that squeue asks only for jobs of this run; mostly there are none.
        if job.job_id not in known and str(folder.path) in run_dirs_of(pickle):
            own.append(job)
    queue = ask_queue(own)
    ours = [job for job in own if job.status(queue).phase in ACTIVE]
    return max(ours, key=lambda job: [int(number) for number in job.job_id.split("_")], default=None)


@cache  # A pickle never changes, and every point of a sweep reads the pickles of all points.
def run_dirs_of(pickle: Path) -> Sequence[str]:
    """Return the run folders of a job from its pickle; empty if the pickle is incomplete or has no run.

    A pickle that other users could have written is not opened, because it could run their code.
    """
    try:
        with pickle.open("rb") as file:
            if not is_own(file):
                return ()
            # Opened by its descriptor: in a folder of other users, another file may have replaced the pickle.
            arguments = DelayedSubmission.load(f"/proc/self/fd/{file.fileno()}").args
    except Exception:  # Unpickling can raise any exception.
        return ()
    return [argument for argument in arguments if isinstance(argument, str)]
