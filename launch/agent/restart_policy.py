"""Restart policy: restart in place, requeue or stop, by how an attempt ended. A pure function of the event log.

Owns the causes, their limits and the rule of progress. Must not know how a restart or a requeue is done.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from launch.config import RestartLimits
from launch.errors import ConfigError, RepeatedFailureError
from launch.runs.events import Events
from launch.scheduler.client import JobDetails

EARLY_S = 60.0
SLACK_S = 1.0


class Cause(StrEnum):
    """Cause of an attempt's end. Each has a limit of its own, so that preemptions never eat up the limit of crashes."""

    finished = "finished"
    cancelled = "cancelled"
    """By the user: scancel, launch.cancel, a STOP file."""
    budget = "budget"
    """By the agent: a cap of ``budget`` was reached."""
    preempted = "preempted"
    timed_out = "timed_out"
    node_failed = "node_failed"
    out_of_memory = "out_of_memory"
    diverged = "diverged"
    """A loss that is no finite number: the same data and weights give it again, unless a device has miscalculated."""
    crashed = "crashed"
    hung = "hung"
    requested = "requested"
    """By the ranks, which left with the exit status that means: saved, put me back into the queue."""
    repeated = "repeated"
    """By the ranks, which have gone back and tried again by themselves as often as they were allowed to."""
    refused = "refused"
    """By the ranks: what was asked for cannot work, as a rule before the first step, and would be refused again."""


class Action(StrEnum):
    """Action after an attempt."""

    stop = "stop"
    restart = "restart"
    """Start the ranks again inside the allocation, without the queue."""
    requeue = "requeue"


@dataclass(frozen=True)
class Decision:
    """Action that follows an attempt, with its reason for people."""

    action: Action
    reason: str


WANTED = (Cause.finished, Cause.cancelled, Cause.budget)
"""Causes after which the run is where it was meant to end: it does not start again, and nothing has failed."""
LEAVES_THE_NODES = (Cause.preempted, Cause.timed_out, Cause.requested)
"""Causes that take the allocation away, or give it back; only the queue brings nodes."""
FROM_OUTSIDE = (Cause.preempted, Cause.node_failed)
"""Causes that say nothing about the run where they come before its first step. A time limit that comes so early would
come so again, and ranks that ask for the queue do it by themselves."""
NO_CHECKPOINT = (
    "the program is not said to have checkpoints, so it would run again from its first step "
    "(script.resumes=true where it looks for its own checkpoint when it starts)"
)
BATCH_SCRIPT_ENDED = ("NonZeroExitCode", "JobLaunchFailure", "RaisedSignal")
"""Slurm's reasons of a job that ended because its batch script did. A job that somebody has cancelled has none."""


def decide(
    events: Events, cause: Cause, limits: RestartLimits, without_progress: int, resumes: bool = True, *,
    forgive_after_s: float | None = None,
) -> Decision:  # fmt: skip
    """Decide what follows the attempt that just ended for ``cause``.

    Args:
        events: the event log, the ``attempt_ended`` of this attempt included.
        limits: how often each cause may come.
        without_progress: after so many attempts in a row that saved nothing new the run stops.
        resumes: whether a new start goes on from a checkpoint; without one no new start is made.
        forgive_after_s: seconds after which a failure no longer counts, if a newer checkpoint was saved; None: never.
    """
    if cause in WANTED:
        return Decision(Action.stop, str(cause))
    if cause is Cause.refused:
        return Decision(Action.stop, "it would be refused again")
    if cause is Cause.repeated:
        return Decision(Action.stop, "the ranks have tried again by themselves, and it came again")
    if not resumes:
        return Decision(Action.stop, NO_CHECKPOINT)
    stuck = attempts_without_progress(events)
    if stuck >= without_progress:
        return Decision(Action.stop, f"{stuck} attempts in a row saved nothing new (resilience.max_without_progress)")
    ends = [end for end in attempt_ends(events) if end["cause"] == cause]
    seen = sum(not is_forgiven(end, events, forgive_after_s) for end in ends)
    forgiven = f"; {len(ends) - seen} before newer checkpoints are forgiven" if seen < len(ends) else ""
    limit = getattr(limits, cause)
    if limit is not None and seen > limit:
        return Decision(Action.stop, f"{cause} {seen} times, and resilience.max_restarts.{cause}={limit}{forgiven}")
    action = Action.requeue if cause in LEAVES_THE_NODES else Action.restart
    return Decision(action, f"{cause}, {seen} of {'any number' if limit is None else limit}{forgiven}")


def is_forgiven(end: dict[str, Any], events: Events, forgive_after_s: float | None) -> bool:
    """Tell whether the end of an attempt counts no longer: the run has saved a newer checkpoint since, some time ago.

    A checkpoint alone would let a run fail for ever right after each; the time alone one that waits in the queue.
    """
    if forgive_after_s is None:
        return False
    place = next(number for number, event in enumerate(events) if event is end)
    steps = [(number, event["step"]) for number, event in enumerate(events) if event["event"] == "saved"]
    before = max((step for number, step in steps if number < place), default=-1)
    has_progressed = any(number > place and step > before for number, step in steps)
    return has_progressed and events[-1]["time"] - end["time"] >= forgive_after_s


def attempt_ends(events: Events) -> list[dict[str, Any]]:
    """The ``attempt_ended`` of each attempt, oldest first; of several for one attempt the first holds.

    A node that was cut off and comes back enters an end of its own beside that of the node which took over. A start of
    the job that came to no attempt has one end too.
    """
    ends: dict[object, dict[str, Any]] = {}
    for number, event in enumerate(events):
        if event["event"] == "attempt_ended":
            attempt = event.get("attempt")
            start_of_job = event.get("job", f"event {number}")  # former logs do not name it
            ends.setdefault(start_of_job if attempt is None else attempt, event)
    return list(ends.values())


def attempts_without_progress(events: Events) -> int:
    """Count the last attempts, one after another, that ended without a checkpoint beyond the one they started from.

    None where the run has never told of a checkpoint: nothing is known then of how far it came. Attempts that were
    interrupted from outside before their first step neither count nor forgive.
    """
    if not any(e["event"] == "saved" or (e["event"] == "started" and "from_step" in e) for e in events):
        return 0
    started = {e["attempt"]: e.get("from_step", -1) for e in events if e["event"] == "started"}
    # What lies in the memory of the nodes is not done again either, where the next start is on the same nodes.
    saved = {e["attempt"]: e["step"] for e in events if e["event"] in ("saved", "saved_in_memory")}
    count = 0
    for end in reversed(attempt_ends(events)):
        attempt = end["attempt"]
        if saved.get(attempt, -1) > started.get(attempt, -1):
            break
        count += not is_blameless(end)
    return count


def is_blameless(end: dict[str, Any]) -> bool:
    """Tell whether an attempt was interrupted from outside before its first step, by its ``attempt_ended``."""
    return end["cause"] in FROM_OUTSIDE and end.get("step", -1) is None


def cause_of_signal(job: JobDetails, restarts: int, signal_delay_s: float, now: float) -> Cause:
    """Tell a preemption from a time limit and from a cancel: all three arrive as the same signals.

    While the job runs, a signal is Slurm's announcement. Once it is completing (seen on Slurm 22.05), a requeue has
    raised its count of restarts, the time limit has used its time up, a batch script that died has left its reason, and
    what is left is a cancel, which must never be taken for a preemption and brought back.

    Args:
        job: what the controller says now.
        restarts: how often this job had been requeued when it started.
        signal_delay_s: lead of the signal before the time limit; sbatch may send it up to a minute early.
        now: when the signal came, Unix time.
    """
    if job.state in ("RUNNING", "SUSPENDED"):
        near_the_limit = job.end_time is not None and now > job.end_time - signal_delay_s - EARLY_S
        return Cause.timed_out if near_the_limit and not job.is_preempted else Cause.preempted
    if job.restarts > restarts or job.state == "PENDING":
        return Cause.preempted
    if job.reason.startswith(BATCH_SCRIPT_ENDED):
        return Cause.node_failed
    if job.start_time is None or job.end_time is None or job.time_limit_s is None:
        return Cause.timed_out if job.state == "TIMEOUT" else Cause.cancelled
    used_up = job.end_time - job.start_time >= job.time_limit_s - SLACK_S
    return Cause.timed_out if used_up or job.state == "TIMEOUT" else Cause.cancelled


def cause_of_failure(failure: dict[str, Any] | None) -> Cause:
    """The cause behind the first failure of an attempt, from what the rank or its agent wrote into the event log."""
    text = str(failure.get("cause", "")) if failure else ""
    if text.startswith(f"{ConfigError.__name__}: "):
        return Cause.refused
    if text.startswith(f"{RepeatedFailureError.__name__}: "):
        return Cause.repeated
    if text.startswith(f"{FloatingPointError.__name__}: "):
        return Cause.diverged
    if "OutOfMemoryError" in text or "MemoryError" in text or "out of memory" in text.lower():
        return Cause.out_of_memory
    if failure is not None and failure.get("hung"):
        return Cause.hung
    return Cause.crashed


class RunFailedError(RuntimeError):
    """A run whose ranks did not all finish."""


class RunSettledError(RunFailedError):
    """The end of an attempt that another agent has entered already, which then decides."""
