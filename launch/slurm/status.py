"""Status of runs: state of the job, event log, newest steps, and reason of the end. Changes no run."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from shlex import quote
from typing import Any

from gpt_launch import as_typed
from launch.agent.policy import WANTED, Action
from launch.errors import ConfigError
from launch.plan.plan import Plan, next_job, record_found
from launch.runs.events import (
    Events,
    failure_text,
    fewer_nodes,
    first_failure,
    last_command,
    last_event,
    last_index,
    select_events,
)
from launch.runs.find import labels_inside
from launch.runs.folder import RunFolder, is_full, read_plan
from launch.runs.records import recent_records
from launch.slurm.client import RETRIES, JobState, SlurmError
from launch.slurm.jobs import ACTIVE, Job, LocalQueueEntry, SlurmJob, agent_logs, ask_queue, find_unrecorded, job_of
from launch.slurm.limits import advice
from launch.why.facts import job_event
from launch.why.rules import Verdict, find_verdict

NOT_ASKED = JobState("UNKNOWN")
OVER = ("finished", "failed", "stopped", "cancelled", "budget_exceeded", "placement_timeout")
"""States of a run that has ended and does not start again by itself."""
NO_MORE_STEPS = ("attempt_ended", "started", "finished", "stopped")
"""Events after which no further step of the attempt is expected."""
QUIET_S, QUIET_STEPS = 15.0, 10
"""Shortest time without a new step that a status reports: QUIET_S seconds, or the time of QUIET_STEPS steps.

The longer of the two counts. The agents need longer to be sure that a node is lost (``resilience.node_timeout_s``).
"""

# Outcome of a run by its event log alone.

DECISIVE = ("submitted", "moved", "requeued", "agent_started", "started", "agent_ended")
"""Names of events that say whether an agent works on the run, or will do so.

The newest such event in the log counts.
"""
PLACED = ("submitted", "moved", "gave_up", "stayed")
"""Names of events that say at which candidate (such as a partition) the job of a point waits, or that it was given up.

The newest such event in the log counts, until an agent starts.
"""


def outcome(events: Events) -> str:
    """Return the state of a run whose job is over: finished, failed, stopped, cancelled or budget_exceeded.

    A run without a recorded end has failed.
    """
    names = {e["event"] for e in events}
    ended = next((e for e in events if e["event"] in ("cancelled", "budget_reached")), None)
    attempts = [e["attempt"] for e in events if e.get("attempt") is not None]
    # A failure after a cancel, or at a cap of the budget, is a consequence of it.
    before = events if ended is None else events[: events.index(ended)]
    if attempts and first_failure(before, max(attempts)):
        return "failed"
    if "finished" in names:
        return "finished"
    if ended is not None:
        return "cancelled" if ended["event"] == "cancelled" else "budget_exceeded"
    return "stopped" if why_not_restarted(events) is None and names & {"stopped", "agent_stopped"} else "failed"


def agent_has_left(events: Events) -> bool:
    """Return whether the agent has recorded that the run ends, and has ended itself."""
    last = last_event(events, *DECISIVE)
    if last.get("event") != "agent_ended" or last.get("cause") == "killed":
        return False
    decision = last_event(events_since_start(events), "decided", "requeue_failed")
    return decision.get("event") == "requeue_failed" or decision.get("action") == Action.stop


def has_left_job(events: Events) -> bool:
    """Return whether a point no longer uses the job that it shares: it has ended, or was cancelled before it began."""
    waits = last_event(events, *DECISIVE).get("event") not in ("agent_started", "started")
    return agent_has_left(events) or (waits and bool(select_events(events, "cancelled")))


def why_not_restarted(events: Events) -> str | None:
    """Return the recorded reason why a failed or interrupted run does not start again; None if there is none."""
    last = last_event(events, "decided", "requeue_failed", "started")
    if last.get("event") == "requeue_failed":
        return str(last["cause"])
    return str(last["reason"]) if last.get("action") == Action.stop and last["cause"] not in WANTED else None


def state_between_places(events: Events, is_out: bool) -> tuple[str, str] | None:
    """Return state and detail of a point that moves to another candidate, or was given up; None for other points.

    ``is_out`` is True if the last job of the point has left the queue.
    """
    last = last_placed(events)
    if last.get("event") == "gave_up":
        return "placement_timeout", str(last["cause"])
    if last.get("event") == "moved" and is_out and not select_events(events, "cancelled"):
        return "pending", f"moves to {last['to']}"
    return None


def last_placed(events: Events) -> dict[str, Any]:
    """Return the newest event of ``PLACED``; empty if there is none, or if an agent of the point started afterwards."""
    last = last_event(events, *PLACED, "agent_started", "started")
    return last if last.get("event") in PLACED else {}


def events_since_start(events: Events) -> Events:
    """Return the events from the last ``started`` on; all events if there is none."""
    return events[max(0, last_index(events, "started")) :]


# State of a run as last seen.


@dataclass
class RunStatus:
    """State of one run at the last poll.

    "This submission" is the run's last submission, or the one that its launcher is about to make.
    """

    folder: RunFolder
    job: Job | None = None
    """Job of the run; None before the submission."""
    nodes: int | None = None
    """Requested number of nodes; None if unknown."""
    max_steps: int | None = None
    """Requested number of steps of the whole run; None if unknown."""
    plan: Plan | None = None
    """Plan of a point that this process submits; None for other runs."""
    attempts_before: int = 0
    """Number of attempts before this submission. Their records are ignored."""
    events_before: int = 0
    """Number of events before this submission."""
    found: Job | None = None
    """Active Slurm job of the run that the event log does not name (``find_unrecorded``); None if there is none."""
    state: str = "pending"
    """State of the run: ``pending``, ``running``, one of OVER, ``not started``, or ``unknown``."""
    detail: str = ""
    """Reason why the run waits, or Slurm's state at its end."""
    damage: str = ""
    """Description of a damaged file in the run folder; empty if there is none.

    The status is found without this file.
    """
    job_status: JobState = NOT_ASKED
    """Last known state of the job."""
    latest: dict[str, Any] = field(default_factory=dict)
    """Newest step record of rank 0 since this submission; empty if there is none."""
    eta_s: float | None = None
    """Expected seconds until the last step; None if unknown."""
    quiet_s: float | None = None
    """Seconds since the newest step of a running attempt, if that is much longer than a step takes; else None."""
    part: int = 0
    """Number, from 0, of the share of this machine on which a local point runs (``launch.parallel``)."""
    label: str = ""
    """Name of the point among the points of its sweep; empty to use the name of its folder."""

    @property
    def name(self) -> str:
        """Name of the point for people."""
        return self.label or self.folder.point

    def events(self) -> list[dict[str, Any]]:
        """Return the run's events since this submission, oldest first."""
        return self.folder.read_events()[self.events_before :]

    def attempts(self) -> list[int]:
        """Return the numbers of the attempts since this submission."""
        return [number for number in self.folder.attempts() if number > self.attempts_before]

    @property
    def is_cancelled(self) -> bool:
        """Return whether the run was cancelled since this submission."""
        return bool(select_events(self.events(), "cancelled"))

    @property
    def is_over(self) -> bool:
        """Return whether the run has ended and will not start again."""
        return self.state in OVER

    @property
    def advice(self) -> str:
        """Return why the run waits and what to type, if waiting alone would never start the run; otherwise ""."""
        if self.state != "pending" or not isinstance(self.job, SlurmJob):
            return ""
        problem = advice(self.job_status.reason, self.job.job_id, quote(str(self.folder.path)))
        return "" if problem is None else problem.warning().removeprefix("warning: ")

    def fewer_nodes(self) -> dict[str, Any] | None:
        """Return the fields ``nodes``, ``asked`` and ``cause`` of the newest attempt's event ``fewer_nodes``.

        ``asked`` is the requested number of nodes. None if the newest attempt runs on all requested nodes.
        """
        event = fewer_nodes(self.events()).get(max(self.attempts(), default=0))
        return event and {key: event[key] for key in ("nodes", "asked", "cause")}

    def failure(self, attempt: int | None = None) -> dict[str, Any] | None:
        """Return the event of the first failure of an attempt; None if the attempt has no failure.

        ``attempt`` is the number of the attempt; None for the newest attempt since this submission.
        """
        attempt = attempt or max(self.attempts(), default=None)
        return None if attempt is None else first_failure(self.folder.read_events(), attempt)


def new_run_status(plan: Plan) -> RunStatus:
    """Return the status of a run that this process is about to submit."""
    folder = RunFolder(plan.run_dir)
    return RunStatus(
        folder,
        nodes=plan.nodes,
        max_steps=plan.max_steps,
        plan=plan,
        attempts_before=max(folder.attempts(), default=0),
        events_before=len(folder.read_events()),
        label=plan.label,
    )


def find_run_statuses(folders: Sequence[RunFolder]) -> list[RunStatus]:
    """Return the status of each run, with its label among the runs of its sweep."""
    found = [find_run_status(folder) for folder in folders]
    labels = labels_inside({point.folder.path.parent for point in found})
    for point in found:
        point.label = labels.get(point.folder.path, "")
    return found


def find_run_status(folder: RunFolder) -> RunStatus:
    """Return the status of a run since its last submission, with its job. ``poll`` sets the state later.

    If the run waits in the queue of a local launcher, the last submission is the one that this launcher will make.
    """
    events, damage = folder.read_events(), ""
    plan: dict[str, Any] = {}
    try:
        plan = read_plan(folder)
    except ConfigError as error:
        damage = error.found
    # Without a plan, as in a run without the launcher, the ranks record these values.
    for event in () if plan else events:
        plan |= {key: event[key] for key in ("max_steps", "nodes") if event.get(key) is not None}
    waits_from = LocalQueueEntry(folder).events_before()
    start = last_command(events) if waits_from is None else waits_from
    point = RunStatus(
        folder,
        nodes=plan.get("nodes"),
        max_steps=plan.get("max_steps"),
        attempts_before=max((e["attempt"] for e in events[:start] if e.get("attempt") is not None), default=0),
        events_before=start,
        damage=damage,
    )
    adopt_job(point)
    return point


# Updates from the queue, the event log and the step records.


def poll(points: Sequence[RunStatus], retries: int = RETRIES, *, trust_log: bool = False) -> SlurmError | None:
    """Update the status of points, with one squeue for all of them.

    Args:
        points: status objects, which are changed.
        retries: number of tries of squeue; 1 for callers that poll again anyway.
        trust_log: True to take the state of a run from its event log alone, if its agents have recorded the end there.
            Slurm's queue soon forgets such jobs. Commands that show runs set True; commands that wait until jobs are
            gone set False.

    Returns:
        The error if Slurm did not answer, else None. Without an answer, points keep their states.
    """
    for point in points:
        adopt_job(point)
    known = {id(point) for point in points if trust_log and agent_has_left(point.events())}
    try:
        queue, problem = ask_queue((point.job for point in points if id(point) not in known), retries), None
    except SlurmError as error:
        queue, problem = {}, error
    for point in points:
        if problem is None or not isinstance(point.job, SlurmJob) or id(point) in known:
            update(point, queue)
        update_steps(point)  # After the outcome: a run that is over has made its last step.
    return problem


def adopt_job(point: RunStatus) -> None:
    """Set the job of a point to the newest job in its event log: any process may have submitted or moved the point."""
    events = point.events()
    submitted = select_events(events, "submitted")
    if not submitted:
        point.job = point.found or point.job
        return
    newest = job_of(submitted[-1])
    following = following_job(events, newest)
    if following is not None and (point.job == following or point.job_status.phase == "over"):
        newest = following
    if point.job is None or (isinstance(point.job, SlurmJob) and newest.job_id != point.job.job_id):
        point.job = newest


def following_job(events: Events, job: Job) -> SlurmJob | None:
    """Return the job that continues a run after ``job`` (``resilience.requeue=chain``); None if there is none."""
    job_id = next_job(events, job.job_id)
    return None if job_id is None else SlurmJob(job_id)


def adopt_found(points: Sequence[RunStatus], *, by: str | None = None) -> None:
    """Find jobs that no event log names, for points without an active job, and update these points.

    Args:
        points: status objects after a poll.
        by: name of the command that records the job in the event log; None to show the job without recording it.

    Raises:
        SlurmError: such jobs may exist, but Slurm does not answer.
    """
    adopted = []
    for point in points:
        job = None if point.state in ACTIVE else find_unrecorded(point.folder)
        if job is None:
            continue
        point.found = job
        point.events_before = len(point.folder.read_events())
        point.attempts_before = max(point.folder.attempts(), default=0)
        if by is not None:
            record_found(point.folder, job.job_id, point.nodes or 1, by)
        adopted.append(point)
    if adopted:
        poll(adopted)


def update(point: RunStatus, queue: Mapping[str, JobState]) -> None:
    """Set state and detail of a point from the queue (job id -> state) and the event log."""
    if point.job is None:
        point.state, point.detail = state_without_job(point)
    else:
        status = point.job.status(queue)
        if isinstance(point.job, SlurmJob) and point.job.points and has_left_job(point.events()):
            status = JobState("GONE")  # The job continues for its other points.
        point.job_status = status
        point.state, point.detail = status.phase, status.detail
        if point.state == "running" and last_event(point.events(), *DECISIVE).get("cluster") == "allocation":
            point.state, point.detail = "pending", "until no other run uses the nodes of its job"
        if status.phase == "over":
            is_out = status.state in ("CANCELLED", "GONE")
            events = point.events()
            following = following_job(events, point.job)
            chained = None if following is None else ("pending", f"continues in job {following.job_id}")
            placed = chained or state_between_places(events, is_out)
            point.state, point.detail = placed or (outcome(events), status.detail)
            if point.detail.lower() == point.state:  # Slurm has the same state under another name.
                point.detail = ""
            if point.state == "failed" and status.state != "CANCELLED" and (silent := silence(point)):
                point.detail = ", ".join(part for part in (point.detail, silent) if part)
    if point.state == "budget_exceeded":
        point.detail = last_event(point.events(), "budget_reached")["cause"]


def silence(point: RunStatus) -> str:
    """Return an explanation for a Slurm job whose agents left neither an event nor output; "" for other jobs."""
    path, started = point.folder.path, select_events(point.events(), "agent_started")
    if started or not isinstance(point.job, SlurmJob) or printed_logs(point):
        return ""
    return (
        f"its agents wrote nothing: the nodes may not see {path}, or may not write there; "
        f"srun --nodes={point.nodes or 1} ls -ld {quote(str(path))} shows it, "
        "and output_dir=FOLDER puts runs on a filesystem that all nodes mount"
    )


def printed_logs(point: RunStatus) -> list[Path]:
    """Return the paths of the non-empty logs of the agent on the first node: standard error, then standard output."""
    logs = [] if point.job is None else agent_logs(point.folder.path, point.job, 0)[::-1]
    return [log for log in logs if log.is_file() and log.stat().st_size]


def state_without_job(point: RunStatus) -> tuple[str, str]:
    """Return state and detail of a point that waits on this machine, or of a run that no launcher started."""
    if LocalQueueEntry(point.folder).events_before() is not None:
        return ("cancelled", "") if point.is_cancelled else ("pending", "after the points before it")
    if has_ended(point) or point.is_cancelled:
        return outcome(point.events()), ""
    return ("unknown", "not submitted by the launcher") if point.attempts() else ("not started", "")


def has_ended(point: RunStatus) -> bool:
    """Return whether the event log has an end or a failure of the newest attempt."""
    ends = ("finished", "stopped", "cancelled", "budget_reached")
    return bool(select_events(events_since_start(point.events()), *ends) or point.failure())


def update_from_event_log(points: Sequence[RunStatus]) -> None:
    """Set the states of points on Slurm from their event logs. For use when Slurm does not answer."""
    for point in points:
        events = point.events()
        if isinstance(point.job, SlurmJob) and not agent_has_left(events):
            given_up = state_between_places(events, is_out=False)
            point.state = given_up[0] if given_up else outcome(events) if has_ended(point) else "unknown"
            point.detail = "" if point.is_over else "Slurm does not answer"
            point.eta_s = None


def update_steps(point: RunStatus) -> None:
    """Read the newest steps of a point.

    For a running point, also set ``eta_s``, or ``quiet_s`` if the next step is late.
    """
    point.eta_s = point.quiet_s = None
    new = [r for r in recent_records(point.folder.metrics(0)) if r["attempt"] > point.attempts_before]
    if not new:
        return
    point.latest = new[-1]
    smaller = {attempt: event["nodes"] for attempt, event in fewer_nodes(point.events()).items()}
    # Steps on another number of nodes take a different time.
    same = [r for r in new if smaller.get(r["attempt"]) == smaller.get(point.latest["attempt"])]
    times = [record["step_time_s"] for record in same if record.get("step_time_s") is not None]
    if not times or point.state != "running":
        return
    usual, last = statistics.median(times), point.latest["time"]
    age = time.time() - last
    if age < max(QUIET_S, QUIET_STEPS * usual):
        point.eta_s = None if point.max_steps is None else (point.max_steps - point.latest["step"]) * usual
    elif not any(e["event"] in NO_MORE_STEPS and e["time"] > last for e in point.events()):
        point.quiet_s = age


# Explanations of ends for people.


def verdict_of(point: RunStatus) -> Verdict | None:
    """Return the verdict on the cause of a point's newest failure; None if the point did not fail."""
    if point.state != "failed" and (point.is_over or point.failure() is None):
        return None
    return find_verdict(point.folder, [job_event(point.job_status.state)] if point.job_status.phase == "over" else ())


def explain_end(point: RunStatus) -> str:
    """Return a text on why a point did not finish. It names the log with more details, and ends with the verdict."""
    verdict = verdict_of(point)
    text = _explain_end(point)
    # A refusal in the text has the same advice.
    return text if verdict is None or f"type next: {verdict.fix}" in text else as_typed(f"{text}\n{verdict}")


def _explain_end(point: RunStatus) -> str:
    head = f"{point.name} {point.state}" + (f" ({point.detail})" if point.detail else "")
    failed = point.state == "failed"
    if failed and is_full(point.folder.path):
        lacks = "has no room: its event log may lack the last events; make room there before the same command"
        head = f"the filesystem of {point.folder.path} {lacks}\n{head}"
    why = why_not_restarted(point.events())
    last = f"\nnot started again: {why}" if why is not None else ""
    refused = last_event(events_since_start(point.events()), "start_refused")
    if refused:  # The log of a start after the attempt that failed.
        return f"{head}:\n{refused['cause']}{last}"
    failure = point.failure() if failed else None
    if failure is not None:
        return f"{head}: {failure_text(failure)}{last}"
    if last:
        return f"{head}{last}"
    if point.state == "placement_timeout":
        return f"{head}; the same command submits it again"
    for log in printed_logs(point) if failed else []:
        lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        return f"{head}; the last lines of the first agent ({log}):\n{lines}"
    return f"{head}; nothing was recorded in {point.folder.path}" if failed and not silence(point) else head
