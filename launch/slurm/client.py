"""Every Slurm command that the launcher runs, with timeouts, retries, and errors that quote Slurm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

# The one parser of what ``scontrol show ... --oneliner`` prints: ``Key=value`` pairs, whose values may hold blanks.


KEY = r"[A-Z][\w:/]*="
"""Such as ``JobState=``, ``AllocNode:Sid=`` and ``CPUs/Task=``."""
FIELD = re.compile(rf"(?:^|(?<=\s))({KEY})(.*?)(?=\s+{KEY}|\s*$)")
JOB_NAME = re.compile(r"(?<=\s)JobName=(.*?)(?=\s+UserId=)")


def parse_fields(line: str) -> dict[str, str]:
    """Read the fields of one line.

    A value (OS, Reason, Command) ends where the next key begins. What users choose may look like a key itself: the name
    of a job, which comes early, is taken out first, and of fields that come twice the first holds, since comments and
    paths come last.
    """
    name = JOB_NAME.search(line)
    if name is not None:
        line = line[: name.start()] + line[name.end() :].lstrip()
    fields = {"JobName": name.group(1)} if name is not None else {}
    for key, value in FIELD.findall(line):
        fields.setdefault(key.removesuffix("="), value)
    return fields


# Every Slurm command the launcher runs, with timeouts, retries for a busy controller, and errors with what it
# printed.


TIMEOUT_S = 30.0
RETRIES = 3
BUSY = (
    *("socket timed out", "unable to contact", "resource temporarily unavailable", "zero bytes were transmitted"),
    *("connection refused", "communication connection failure", "in standby mode", "connection timed out"),
    # What a command prints whose connection ends halfway, as when the controller stops or has only just started.
    *("connection reset", "broken pipe", "message receive failure", "message send failure", "unexpected message"),
    *("communication shutdown failure", "communication send failure", "communication receive failure"),
    # The network, or munge, is being restarted.
    *("no route to host", "network is unreachable", "failed to connect to authentication agent"),
)
"""Parts of Slurm's errors after which the same command may succeed, in lower case."""

GONE = "invalid job id"
"""Part of Slurm's error about a job that it has forgotten."""


class SlurmError(RuntimeError):
    """A Slurm command that failed, with what it printed."""


class SlurmBusyError(SlurmError):
    """A controller that did not answer: the same command may work later."""


def run(*command: str, timeout_s: float = TIMEOUT_S, retries: int = RETRIES) -> str:
    """Run a Slurm command; its output.

    Raises:
        SlurmBusyError: it did not answer in time, ``retries`` times.
        SlurmError: it is not installed, or fails for another reason.
    """
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]} is not installed on this machine")
    if gone := missing_configuration():
        raise SlurmError(gone)
    problem = ""
    for attempt in range(retries):
        if attempt:
            time.sleep(2.0**attempt)
        try:
            done = run_undisturbed(command, timeout_s)
        except subprocess.TimeoutExpired:
            problem = f"no answer in {timeout_s:g} s"
            continue
        if done.returncode == 0:
            return done.stdout
        if done.returncode == -signal.SIGPIPE:  # squeue of 24.11 says nothing where the controller hangs up
            problem = "its connection to the controller ended (SIGPIPE)"
            continue
        # scontrol ping says on standard output which controllers are down.
        problem = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        if not any(text in problem.lower() for text in BUSY):
            raise SlurmError(f"{' '.join(command)}: {problem}")
    raise SlurmBusyError(f"{' '.join(command)}: {problem}")


def missing_configuration() -> str:
    """Say that the file is gone by which Slurm's commands find their cluster; nothing where it is there, or not named.

    They would look for it for ten seconds each.
    """
    named = os.environ.get("SLURM_CONF")
    if not named or Path(named).is_file():
        return ""
    return f"SLURM_CONF={named}, and there is no such file: unset SLURM_CONF, or export it with the cluster's own"


def run_undisturbed(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command that neither Ctrl-C nor a SIGTERM ends halfway.

    Slurm sends SIGTERM to everything in a job that is requeued or preempted, the command that requested it included.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # what is started inherits the mask
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},  # a user's own would not be understood
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def controller_answers() -> bool:
    """Return whether sbatch is installed and a Slurm controller can be reached from here."""
    return controller_problem() is None


NOT_CONFIGURED = "configuration source"
"""Part of what Slurm's commands say where they are installed and belong to no cluster."""


def controller_problem() -> str | None:
    """Say why no job can be submitted from here.

    Returns:
        None where a controller answers; an empty text where this machine belongs to no cluster, as sbatch is not
        installed or was never told of one; else what is wrong with the cluster's controller.
    """
    if shutil.which("sbatch") is None:
        return ""
    try:
        said = run("scontrol", "ping", timeout_s=10.0, retries=1)
    except SlurmError as error:
        return "" if NOT_CONFIGURED in str(error) else str(error)
    return None if "UP" in said else said.strip() or "scontrol ping says nothing"


WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
"""Slurm's states of jobs that have yet to start, or to start again."""
WORKING = ("RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")


@dataclass(frozen=True)
class JobState:
    """State of a job by squeue. ``state`` is Slurm's name, GONE if Slurm has forgotten the job, or UNKNOWN."""

    state: str
    reason: str = ""
    """Reason for which the job waits, as Slurm names it."""
    nodes: str = ""
    """Names of its nodes, as Slurm abbreviates them; empty while it has none."""
    start: str = ""
    """Time of its start, or the expected one; empty where Slurm does not know."""
    partition: str = ""
    submitted: float | None = None
    """Time when it was submitted, or put back into the queue, in Unix seconds."""

    @property
    def phase(self) -> str:
        """``pending``, ``running``, ``over``, or ``unknown``. A job that is over will not run again by itself."""
        known = {"UNKNOWN": "unknown", **dict.fromkeys(WAITING, "pending"), **dict.fromkeys(WORKING, "running")}
        return known.get(self.state, "over")

    @property
    def detail(self) -> str:
        """Reason and expected start of a pending job; else Slurm's state if it is not the usual one."""
        if self.phase in ("pending", "unknown"):
            return ", ".join(part for part in (self.reason, f"starts {self.start}" if self.start else "") if part)
        return "" if self.state in ("RUNNING", "COMPLETED", "GONE") else self.state

    @property
    def since(self) -> float | None:
        """Time when the job began to wait, Unix seconds; None where nothing can take it out of the queue."""
        return self.submitted if self.state == "PENDING" else None  # and not, say, while its nodes boot


def cluster_option(cluster: str | None) -> tuple[str, ...]:
    """The option that has a command talk to another cluster, through slurmdbd; none for the local one."""
    return () if cluster is None else (f"--clusters={cluster}",)


def job_states(job_ids: Iterable[str], retries: int = RETRIES, cluster: str | None = None) -> dict[str, JobState]:
    """States of jobs of one cluster by id, with one squeue for all of them: works without accounting.

    An element of an array goes by ``123_4``, or by the number of its own that its script finds in SLURM_JOB_ID.

    A job that the controller has already forgotten (MinJobAge after its end) is absent. Raises SlurmError.
    """
    wanted = set(job_ids)
    roots = sorted({job.split("_")[0] for job in wanted})
    if not roots:
        return {}
    options = ("--noheader", "--array", "--states=all", "--format=%i|%A|%T|%r|%N|%S|%P|%V")
    try:
        text = run("squeue", *cluster_option(cluster), *options, "--jobs", ",".join(roots), retries=retries)
    except SlurmError as error:
        if GONE in str(error).lower():
            return {}
        raise
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.count("|") == 7]
    return {
        job: JobState(state, reason.replace("None", ""), nodes, start.replace("N/A", ""), partition, unix_time(since))
        for name, number, state, reason, nodes, start, partition, since in rows
        for job in {name, number} & wanted
    }


def output_file(job_id: str, cluster: str | None = None) -> Path | None:
    """Path of the output of a job's batch script; None if Slurm has forgotten the job, or names no file."""
    try:
        found = job_fields(job_id, cluster=cluster).get("StdOut")
    except SlurmError as error:
        if GONE in str(error).lower():
            return None
        raise
    return Path(found) if found else None


def signal_job(job_id: str, name: str, cluster: str | None = None) -> None:
    """Send a signal to everything that runs of one job, or of one element of an array. Nothing where it is gone.

    Never sent twice by itself: the second one would end ranks that are saving.
    """
    unless_gone("scancel", *cluster_option(cluster), f"--signal={name}", job_id, retries=1)


def cancel(job_id: str, cluster: str | None = None, *, only_waiting: bool = False) -> None:
    """Cancel one job, or one element of an array; with ``only_waiting`` not if it has started meanwhile."""
    unless_gone("scancel", *cluster_option(cluster), *(["--state=PENDING"] if only_waiting else []), job_id)


def unless_gone(*command: str, retries: int = RETRIES) -> None:
    """Run a command about a job; that the job is over or forgotten is no error."""
    try:
        run(*command, retries=retries)
    except SlurmError as error:
        if not any(text in str(error).lower() for text in (GONE, "already completing or completed")):
            raise


@dataclass(frozen=True)
class JobDetails:
    """Details of one job by the controller, while it exists. Times are Unix seconds; None where Slurm says none."""

    state: str
    is_preempted: bool
    """True where Slurm has chosen it to make room for another job."""
    restarts: int
    """Number of times it was put back into the queue, this time included where that has just happened."""
    start_time: float | None
    end_time: float | None
    """Time at which its time limit ends it, or at which it ended."""
    time_limit_s: float | None
    reason: str = ""
    """Reason for which it waits, or ended, as Slurm names it; ``None`` where it was cancelled."""


def job_details(job_id: str, retries: int = RETRIES) -> JobDetails:
    """Ask the controller for one job, or one element of an array (``123_4``).

    Raises:
        SlurmError: it does not answer, or has forgotten the job.
    """
    fields = job_fields(job_id, retries)
    return JobDetails(
        state=fields.get("JobState", "UNKNOWN"),
        is_preempted=fields.get("PreemptTime", "None") not in ("None", "Unknown", "N/A"),
        restarts=int(fields.get("Restarts", "0")),
        start_time=unix_time(fields.get("StartTime", "Unknown")),
        end_time=unix_time(fields.get("EndTime", "Unknown")),
        time_limit_s=seconds(fields.get("TimeLimit", "UNLIMITED")),
        reason=fields.get("Reason", ""),
    )


def unix_time(text: str) -> float | None:
    """A time as Slurm prints it, in the zone of this machine."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def seconds(text: str) -> float | None:
    """A length of time as Slurm prints it, ``1-02:03:04``; None if there is no limit."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        return None
    hours, minutes, rest = (int(part) for part in parts)
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + rest


def requeue(job_id: str) -> None:
    """Put a running job, or one element of an array, back into the queue."""
    run("scontrol", "requeue", job_id)


def nodes_left(job_id: str, retries: int = RETRIES) -> set[str]:
    """Names of the nodes that a running job has now: Slurm takes those that fail from one that requested --no-kill.

    Raises:
        SlurmError: it does not answer, or has forgotten the job.
    """
    names = job_fields(job_id, retries).get("NodeList", "(null)")
    return set() if names == "(null)" else set(run("scontrol", "show", "hostnames", names, retries=retries).split())


def usable_nodes(job_id: str) -> set[str]:
    """Names of the nodes of a job's partitions that are not down, drained or failing. Raises SlurmError."""
    fields = job_fields(job_id)
    states = "idle,allocated,mixed,completing,planned,reserved"
    text = run("sinfo", "--noheader", "--Node", "--format=%N", f"--states={states}", "--partition", fields["Partition"])
    return set(text.split())


def exclude(job_id: str, hosts: Iterable[str]) -> None:
    """Keep a job that waits away from hosts, besides those that it was kept away from before. Raises SlurmError."""
    before = job_fields(job_id).get("ExcNodeList", "(null)")
    names = [] if before == "(null)" else run("scontrol", "show", "hostnames", before).split()
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(sorted({*names, *hosts}))}")


def job_fields(job_id: str, retries: int = RETRIES, cluster: str | None = None) -> dict[str, str]:
    """Return the fields that ``scontrol show job`` prints, by name. Raises SlurmError."""
    at = cluster_option(cluster)
    return parse_fields(run("scontrol", *at, "show", "job", "--oneliner", job_id, retries=retries))
