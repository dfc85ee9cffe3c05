"""All Slurm commands that the launcher runs, with timeouts, retries, and errors that quote Slurm."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from launch.errors import CommandFailedError

# The parser of ``scontrol show ... --oneliner``, which prints ``Key=value`` pairs. Values may contain spaces.


KEY = r"[A-Z][\w:/]*="
"""Pattern of a key in the output of scontrol, such as ``JobState=``, ``AllocNode:Sid=`` and ``CPUs/Task=``."""
FIELD = re.compile(rf"(?:^|(?<=\s))({KEY})(.*?)(?=\s+{KEY}|\s*$)")
JOB_NAME = re.compile(r"(?<=\s)JobName=(.*?)(?=\s+UserId=)")


def parse_fields(line: str) -> dict[str, str]:
    """Return the fields in one line of ``scontrol show --oneliner``: key -> value.

    Some values, such as OS, Reason and Command, contain spaces. So a value ends where the next key begins. Names,
    comments and paths of users may contain text that looks like a key. Therefore the job's name is removed first. Of
    several equal keys the first is used, because comments and paths come last in the line.
    """
    name = JOB_NAME.search(line)
    if name is not None:
        line = line[: name.start()] + line[name.end() :].lstrip()
    fields = {"JobName": name.group(1)} if name is not None else {}
    for key, value in FIELD.findall(line):
        fields.setdefault(key.removesuffix("="), value)
    return fields


# Slurm's commands.


TIMEOUT_S = 30.0
RETRIES = 3
BUSY = (
    *("socket timed out", "unable to contact", "resource temporarily unavailable", "zero bytes were transmitted"),
    *("connection refused", "communication connection failure", "in standby mode", "connection timed out"),
    # A command prints these if its connection breaks, for example because the controller stops or has just started.
    *("connection reset", "broken pipe", "message receive failure", "message send failure", "unexpected message"),
    *("communication shutdown failure", "communication send failure", "communication receive failure"),
    # The network or munge is being restarted.
    *("no route to host", "network is unreachable", "failed to connect to authentication agent"),
)
"""Parts of Slurm's errors, in lower case, after which the same command may succeed later."""

GONE = ("invalid job id", "already completing or completed")
"""Parts of Slurm's errors, in lower case, about a job that is over or forgotten."""


class SlurmError(CommandFailedError):
    """Raised if a Slurm command fails. The message contains the output of the command."""


class SlurmBusyError(SlurmError):
    """Raised if a controller did not answer. The same command may succeed later."""


class JobGoneError(SlurmError):
    """Raised if a job is over, or if Slurm has forgotten the job."""


def run(*command: str, timeout_s: float = TIMEOUT_S, retries: int = RETRIES) -> str:
    """Run a Slurm command and return its standard output.

    Args:
        command: program and arguments.
        timeout_s: longest wait for one try in seconds.
        retries: number of tries.

    Raises:
        SlurmBusyError: the controller did not answer in time in any try.
        JobGoneError: the job is over, or Slurm has forgotten it.
        SlurmError: the command is not installed, or fails for another reason.
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
        # squeue of 24.11 prints nothing if the controller closes the connection.
        if done.returncode == -signal.SIGPIPE:
            problem = "its connection to the controller ended (SIGPIPE)"
            continue
        # scontrol ping reports on standard output which controllers are down.
        problem = done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}"
        if not any(text in problem.lower() for text in BUSY):
            is_gone = any(text in problem.lower() for text in GONE)
            raise (JobGoneError if is_gone else SlurmError)(f"{' '.join(command)}: {problem}")
    raise SlurmBusyError(f"{' '.join(command)}: {problem}")


def missing_configuration() -> str:
    """Return an error text if SLURM_CONF names a file that does not exist; else "".

    Without this check, Slurm's commands would search for the file for ten seconds.
    """
    named = os.environ.get("SLURM_CONF")
    if not named or Path(named).is_file():
        return ""
    return f"SLURM_CONF={named}, and there is no such file: unset SLURM_CONF, or export it with the cluster's own"


def run_undisturbed(command: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command that neither Ctrl-C nor a SIGTERM can interrupt. Returns its exit status and output.

    After ``timeout_s`` seconds the command is killed, and subprocess.TimeoutExpired is raised.

    Slurm sends SIGTERM to all processes of a job that is requeued or preempted, including the command that requeues it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # The command inherits the mask.
    try:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**os.environ, "SLURM_TIME_FORMAT": "standard"},  # A format that the user has set could not be parsed.
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


NOT_CONFIGURED = "configuration source"
"""Part of the error of Slurm's commands on a machine that belongs to no cluster."""


def controller_problem() -> str | None:
    """Return the reason why no job can be submitted from this machine.

    Returns:
        None if a controller answers; empty if this machine belongs to no cluster (sbatch is not installed, or not
        configured); else the problem of the cluster's controller.
    """
    if shutil.which("sbatch") is None:
        return ""
    try:
        said = run("scontrol", "ping", timeout_s=10.0, retries=1)
    except SlurmError as error:
        return "" if NOT_CONFIGURED in str(error) else str(error)
    return None if "UP" in said else said.strip() or "scontrol ping says nothing"


WAITING = ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT")
"""Slurm's states of jobs that will start, or start again."""
WORKING = ("RUNNING", "COMPLETING", "SUSPENDED", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED")
"""Slurm's states of jobs that have nodes."""
PHASES = {"UNKNOWN": "unknown", **dict.fromkeys(WAITING, "pending"), **dict.fromkeys(WORKING, "running")}
"""Slurm's state of a job -> phase of ``JobState``. A job in a state that is not a key is over."""


@dataclass(frozen=True)
class JobState:
    """State of a job as squeue reports it.

    ``state`` is Slurm's name of the state, GONE (forgotten by Slurm) or UNKNOWN.
    """

    state: str
    reason: str = ""
    """Reason for which the job waits, as Slurm names it."""
    nodes: str = ""
    """Names of the job's nodes, abbreviated by Slurm; empty if it has none."""
    start: str = ""
    """Start time of the job as Slurm prints it, an expected time for a pending job; empty if Slurm does not know."""
    partition: str = ""
    submitted: float | None = None
    """Time when the job was submitted or requeued, Unix seconds; None if not known."""

    @property
    def phase(self) -> str:
        """Return ``pending``, ``running``, ``over`` or ``unknown``.

        A job that is over does not start again by itself.
        """
        return PHASES.get(self.state, "over")

    @property
    def detail(self) -> str:
        """Return a text on the job.

        In phase ``pending`` or ``unknown``: why the job waits, and when it should start. If a dependency of the job can
        never be satisfied: Slurm's state and this reason. For other jobs: Slurm's state, but an empty text for RUNNING,
        COMPLETED and GONE.
        """
        if self.phase in ("pending", "unknown"):
            return ", ".join(part for part in (self.reason, f"starts {self.start}" if self.start else "") if part)
        if self.reason == "DependencyNeverSatisfied":
            return f"{self.state}: {self.reason}"
        return "" if self.state in ("RUNNING", "COMPLETED", "GONE") else self.state

    @property
    def since(self) -> float | None:
        """Return when the job began to wait, Unix seconds; None if its state is not PENDING."""
        return self.submitted if self.state == "PENDING" else None  # A job whose nodes boot, for example, cannot move.


def job_states(job_ids: Iterable[str], retries: int = RETRIES) -> dict[str, JobState]:
    """Return job id -> state, with one squeue for all jobs. Works without accounting.

    The id of an array element is ``123_4``, or the number in SLURM_JOB_ID of its script. A job is absent from the
    result if the controller has forgotten it, which happens MinJobAge after its end.

    Args:
        job_ids: ids of the jobs.
        retries: number of tries.

    Raises:
        SlurmError: squeue fails in every try.
    """
    wanted = set(job_ids)
    roots = sorted({job.split("_")[0] for job in wanted})
    if not roots:
        return {}
    options = ("--noheader", "--array", "--states=all", "--format=%i|%A|%T|%r|%N|%S|%P|%V")
    try:
        text = run("squeue", *options, "--jobs", ",".join(roots), retries=retries)
    except JobGoneError:
        return {}
    rows = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.count("|") == 7]
    return {
        job: JobState(state, reason.replace("None", ""), nodes, start.replace("N/A", ""), partition, unix_time(since))
        for name, number, state, reason, nodes, start, partition, since in rows
        for job in {name, number} & wanted
    }


ARRAY_SIZE = 1001
"""Slurm's default of MaxArraySize."""


def max_array_size() -> int:
    """Return the largest number of jobs in an array (MaxArraySize), at least 1; ARRAY_SIZE if Slurm does not answer."""
    try:
        found = re.search(r"^MaxArraySize\s*=\s*(\d+)", run("scontrol", "show", "config"), re.MULTILINE)
    except SlurmError:
        return ARRAY_SIZE
    return max(1, int(found[1])) if found else ARRAY_SIZE


def output_file(job_id: str) -> Path | None:
    """Return the path of the output of a job's batch script; None if Slurm has forgotten the job or the path.

    Raises SlurmError if Slurm does not answer.
    """
    try:
        found = job_fields(job_id).get("StdOut")
    except JobGoneError:
        return None
    return Path(found) if found else None


def scancel(job_id: str, *options: str, retries: int = RETRIES) -> None:
    """Cancel one job, or one element of an array. With the option ``--signal=NAME``, send a signal instead.

    ``options`` are options of scancel; ``retries`` is the number of tries. Raises SlurmError if scancel fails, but not
    if the job is over or forgotten.
    """
    with suppress(JobGoneError):
        run("scancel", *options, job_id, retries=retries)


def host_names(hosts: str) -> set[str]:
    """Return the names in a host list of Slurm, such as ``n[1-3],n7``; empty for ``(null)``.

    Raises SlurmError if scontrol fails.
    """
    return set() if hosts == "(null)" else set(run("scontrol", "show", "hostnames", hosts).split())


@dataclass(frozen=True)
class JobDetails:
    """Details of one job that the controller knows. Times are Unix seconds; None if Slurm prints none."""

    state: str
    is_preempted: bool
    """True if the job is being preempted by another job."""
    restarts: int
    """Number of requeues of the job, the latest included."""
    start_time: float | None
    end_time: float | None
    """Time at which a running job reaches its time limit, or at which an ended job ended, Unix seconds."""
    time_limit_s: float | None
    reason: str = ""
    """Slurm's reason why the job waits or has ended; the text ``None`` for a cancelled job."""

    @property
    def is_running(self) -> bool:
        """Return whether the job has its nodes and has not begun to end.

        Slurm shows the state SIGNALING, in place of RUNNING, while it sends a signal to the job.
        """
        return self.state in WORKING and self.state not in ("COMPLETING", "STAGE_OUT")


def job_details(job_id: str, retries: int = RETRIES) -> JobDetails:
    """Return the details of one job, or of one element of an array (``123_4``), in at most ``retries`` tries.

    Raises:
        SlurmError: the controller does not answer, or has forgotten the job.
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


def accounted_state(job_id: str) -> str:
    """Return the state of a job in Slurm's accounting, such as NODE_FAIL.

    "" if accounting does not have the job, or if sacct fails.
    """
    try:
        return run("sacct", "--noheader", "--parsable2", "--allocations", "--format=State", "--jobs", job_id).strip()
    except SlurmError:
        return ""


def unix_time(text: str) -> float | None:
    """Return the Unix seconds of a time that Slurm prints in local time; None for ``Unknown`` and other words."""
    try:
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        return None


def seconds(text: str) -> float | None:
    """Return the seconds of a duration as Slurm prints it, ``1-02:03:04``; None for words such as UNLIMITED."""
    found = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if found is None:
        return None
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return days * 86400 + hours * 3600 + minutes * 60 + rest


def requeue(job_id: str) -> None:
    """Requeue a running job, or one element of an array. Raises SlurmError if Slurm refuses or does not answer."""
    run("scontrol", "requeue", job_id)


def usable_nodes(job_id: str) -> set[str]:
    """Return the names of the nodes in a job's partitions that are not down, drained or failing.

    Raises SlurmError if Slurm does not answer, or has forgotten the job.
    """
    fields = job_fields(job_id)
    states = "idle,allocated,mixed,completing,planned,reserved"
    text = run("sinfo", "--noheader", "--Node", "--format=%N", f"--states={states}", "--partition", fields["Partition"])
    return set(text.split())


def exclude(job_id: str, hosts: Iterable[str]) -> None:
    """Add hosts to the nodes that a pending job must not use. Raises SlurmError if Slurm refuses or does not answer."""
    names = host_names(job_fields(job_id).get("ExcNodeList", "(null)"))
    run("scontrol", "update", f"JobId={job_id}", f"ExcNodeList={','.join(sorted({*names, *hosts}))}")


def job_fields(job_id: str, retries: int = RETRIES) -> dict[str, str]:
    """Return the fields that ``scontrol show job`` prints: name -> text of the value. Tries ``retries`` times.

    Raises SlurmError if Slurm does not answer, or has forgotten the job.
    """
    return parse_fields(run("scontrol", "show", "job", "--oneliner", job_id, retries=retries))


# The job that this process runs in.


def held_job() -> str | None:
    """Return the id of the Slurm job in which this process runs.

    None if it runs in no job, or if an agent of the launcher started it, as a rank.
    """
    return None if "LAUNCH_AGENT_PID" in os.environ else os.environ.get("SLURM_JOB_ID")


FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Smallest id of the steps of batch scripts and of shells of salloc, which hold no resources (slurm.h)."""


def is_in_step() -> bool:
    """Return whether this process runs in a step of its job, as under ``srun --pty bash``.

    Such a step occupies the CPUs that the steps of the points need.
    """
    return int(os.environ.get("SLURM_STEP_ID", FIRST_SPECIAL_STEP)) < FIRST_SPECIAL_STEP
