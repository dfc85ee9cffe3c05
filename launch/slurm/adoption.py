"""Jobs that sbatch has taken and that no event log names, as their launcher died in between: found and adopted.

A job that runs has entered itself (``launch.plan.preflight``). One that waits is known by submitit's pickle of it,
which names its run folder. One for which submitit did not get as far finds no pickle, and ends by itself after
a minute. Owns finding them; status, logs, cancel, move and a second launch then treat them as the run's job.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from shlex import quote

from submitit.core.utils import DelayedSubmission, JobPaths

from launch.errors import ConfigError
from launch.plan.plan import ELSEWHERE, Plan
from launch.plan.preflight import record_found
from launch.runs.events import refuse_alive
from launch.runs.folder import RunFolder
from launch.slurm.handles import LocalJob, SlurmJob, ask_queue, job_of, slurm_layouts, submitit_folder
from launch.slurm.status import RunStatus, poll

ACTIVE = ("pending", "running")
SUBMITTED = "_submitted.pkl"
"""End of the name of submitit's pickle of a job, after the job's id."""


def adopt_found(points: Sequence[RunStatus], *, by: str | None = None) -> None:
    """Give points that no job works on, as far as they know, the job that waits for them; and bring them up to date.

    Args:
        points: after a poll.
        by: command that enters the job into the event log, as it is going to act on it; None only looks.

    Raises:
        SlurmError: there may be such jobs, and Slurm does not answer.
    """
    found = []
    for point in points:
        job = None if point.state in ACTIVE else find_unrecorded(point.folder)
        if job is None:
            continue
        point.found = job
        point.events_before = len(point.folder.read_events())
        point.attempts_before = max(point.folder.attempts(), default=0)
        if by is not None:
            record_found(point.folder, job.job_id, point.nodes or 1, by)
        found.append(point)
    if found:
        poll(found)


def running_job(folder: RunFolder, own: str | None = None) -> str | None:
    """Name the job that still works on a run folder, or waits to; None where there is none, or it is our ``own``.

    Raises:
        SlurmError: Slurm does not answer.
    """
    submitted = [e for e in folder.read_events() if e["event"] == "submitted"]
    for job in (job_of(submitted[-1]) if submitted else None, find_unrecorded(folder)):
        if job is not None and job.job_id != own:
            status = job.status(ask_queue([job]))
            if status.state in ACTIVE:
                return f"{'process' if isinstance(job, LocalJob) else 'job'} {job.name}, {status.state}"
    return None


def refuse_running(plan: Plan, own: str | None = None) -> None:
    """Raise ConfigError where an earlier submission still works on the same folder; ``own`` is this process's job.

    Before a run goes back also where its ranks were started by hand.
    """
    running = running_job(RunFolder(plan.run_dir), own)
    if running is not None:
        waits = running.endswith("pending") and plan.placement.is_watched
        move = f"; where its launcher is gone, python -m launch.move {quote(plan.run_dir)} moves it on" if waits else ""
        raise ConfigError(
            f"{plan.run_dir} is being worked on by {running}",
            "one job for a run folder",
            f"wait for it or cancel it; fresh=true makes a new folder{move}",
        )
    if plan.goes_on.back_to is not None:
        refuse_alive(RunFolder(plan.run_dir))


def find_unrecorded(folder: RunFolder) -> SlurmJob | None:
    """Find the newest job in Slurm's queue that is for a run and that no event names. Raises SlurmError."""
    events = folder.read_events()
    known = {job_of(event).name for event in events if event["event"] == "submitted"}
    jobs = {job.name: (job, pickle) for job, pickle in submitted_jobs(folder.path) if job.name not in known}
    # Whose job it is stands in its pickle: Slurm is asked about this run's jobs alone, and mostly there is none.
    own = [job for job, pickle in jobs.values() if run_dir_of(pickle) == str(folder.path)]
    queue = ask_queue(own)
    ours = [job for job in own if job.status(queue).state in ACTIVE]
    return max(ours, key=lambda job: [int(number) for number in job.job_id.split("_")], default=None)


def submitted_jobs(run_dir: Path) -> Iterator[tuple[SlurmJob, Path]]:
    """Yield the Slurm jobs that submitit has submitted for the runs of a sweep, each with its pickle."""
    elsewhere = (path.name.removeprefix(ELSEWHERE) for path in submitit_folder(run_dir).glob(f"{ELSEWHERE}*"))
    for cluster in (None, *elsewhere):
        for layout in slurm_layouts(run_dir, cluster):
            for pickle in layout.parent.glob(f"{layout.name.replace('%j', '[0-9]*')}/[0-9]*{SUBMITTED}"):
                job = SlurmJob(pickle.name.removesuffix(SUBMITTED), cluster)
                if is_batch_script(JobPaths(layout, job.array_id).submission_file):
                    yield job, pickle


def is_batch_script(path: Path) -> bool:
    """Tell the script of a Slurm job from submitit's empty one of agents on this machine, named by a process."""
    return path.is_file() and path.stat().st_size > 0


@cache  # one never changes, and every point of a sweep asks about those of all
def run_dir_of(pickle: Path) -> str | None:
    """Read the run folder that a job of ours is for; None where the pickle is of something else, or not whole.

    A pickle that others could have written is not opened: it would run their code. Their runs can be looked at.
    """
    try:
        with pickle.open("rb") as file:
            told = os.fstat(file.fileno())
            if told.st_uid != os.getuid() or told.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            # By its descriptor, as in a folder of others another file may have taken its place.
            arguments = DelayedSubmission.load(f"/proc/self/fd/{file.fileno()}").args
    except Exception:  # whatever unpickling raises
        return None
    return arguments[0] if arguments and isinstance(arguments[0], str) else None
