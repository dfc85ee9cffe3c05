"""Every Slurm command the launcher runs, with timeouts, retries for a busy controller, and errors in words.

Owns the talk with Slurm other than sbatch, which is submitit's. Must not know what a run is.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

TIMEOUT_S = 30.0
RETRIES = 3
BUSY = ("socket timed out", "unable to contact", "resource temporarily unavailable", "zero bytes were transmitted")


class SlurmError(RuntimeError):
    """A Slurm command that failed, with what it printed."""


def run(*words: str, timeout_s: float = TIMEOUT_S, retries: int = RETRIES) -> str:
    """What a Slurm command prints.

    Raises:
        SlurmError: it is not installed, does not answer in time, or fails for another reason than a busy controller.
    """
    if shutil.which(words[0]) is None:
        raise SlurmError(f"{words[0]} is not installed on this machine")
    problem = ""
    for attempt in range(retries):
        if attempt:
            time.sleep(2.0**attempt)
        try:
            done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            problem = f"no answer in {timeout_s:g} s"
            continue
        if done.returncode == 0:
            return done.stdout
        problem = done.stderr.strip() or f"exit status {done.returncode}"
        if not any(word in problem.lower() for word in BUSY):
            break
    raise SlurmError(f"{' '.join(words)}: {problem}")


def controller_answers() -> bool:
    """Whether sbatch is installed and a Slurm controller can be reached from here."""
    if shutil.which("sbatch") is None:
        return False
    try:
        return "UP" in run("scontrol", "ping", timeout_s=10.0, retries=1)
    except SlurmError:
        return False


@dataclass(frozen=True)
class JobState:
    """What squeue says of a job. ``state`` is Slurm's word (PENDING, RUNNING, COMPLETED, ...)."""

    state: str
    reason: str

    @property
    def is_over(self) -> bool:
        """Whether the job will not run again by itself."""
        active = (
            "PENDING",
            "RUNNING",
            "CONFIGURING",
            "COMPLETING",
            "SUSPENDED",
            "REQUEUED",
            "REQUEUE_HOLD",
            "RESIZING",
        )
        return self.state not in (*active, "REQUEUE_FED", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT")


def job_states(job_ids: Iterable[str]) -> dict[str, JobState]:
    """States of jobs (``123`` or ``123_4``) by id, from squeue: works without accounting.

    A job that the controller has already forgotten (MinJobAge after its end) is absent.
    """
    wanted = set(job_ids)
    roots = sorted({job.split("_")[0] for job in wanted})
    if not roots:
        return {}
    try:
        text = run("squeue", "--noheader", "--array", "--states=all", "--jobs", ",".join(roots), "--format=%i|%T|%r")
    except SlurmError as error:
        if "invalid job id" in str(error).lower():
            return {}
        raise
    rows = [line.strip().split("|", 2) for line in text.splitlines() if line.count("|") >= 2]
    return {job: JobState(state, reason) for job, state, reason in rows if job in wanted}


def cancel(job_id: str) -> None:
    """Cancel one job, or one element of an array."""
    run("scancel", job_id)


@dataclass(frozen=True)
class JobDetails:
    """What the controller knows of one job while it exists. Times are Unix seconds; None where Slurm says none."""

    state: str
    is_preempted: bool
    """Whether Slurm has chosen it to make room for another job."""
    restarts: int
    """How often it was put back into the queue, this time included where that has just happened."""
    start_time: float | None
    end_time: float | None
    """When its time limit ends it, or when it ended."""
    time_limit_s: float | None


def job_details(job_id: str) -> JobDetails:
    """Ask the controller for one job, or one element of an array (``123_4``).

    Raises:
        SlurmError: it does not answer, or has forgotten the job.
    """
    text = run("scontrol", "show", "job", "--oneliner", job_id)
    fields = dict(word.split("=", 1) for word in text.split() if "=" in word)
    return JobDetails(
        state=fields.get("JobState", "UNKNOWN"),
        is_preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"),
        restarts=int(fields.get("Restarts", "0")),
        start_time=unix_time(fields.get("StartTime", "Unknown")),
        end_time=unix_time(fields.get("EndTime", "Unknown")),
        time_limit_s=seconds(fields.get("TimeLimit", "UNLIMITED")),
    )


def unix_time(text: str) -> float | None:
    """A time as Slurm prints it, in the zone of this machine."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def seconds(text: str) -> float | None:
    """A length of time as Slurm prints it, ``1-02:03:04``; None where there is no limit."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        return None
    hours, minutes, rest = (int(part) for part in parts)
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def requeue(job_id: str) -> None:
    """Put a running job, or one element of an array, back into the queue."""
    run("scontrol", "requeue", job_id)
