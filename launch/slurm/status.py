"""Status of a run: the state of its job, its event log, its newest steps, and why it ended."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from shlex import quote
from typing import Any

from rich.console import Console

from launch.agent.policy import WANTED, Action, Cause
from launch.errors import ConfigError
from launch.plan.plan import Plan
from launch.runs.events import failure_text, fewer_nodes, first_failure, last_command, saves_that_count
from launch.runs.files import is_full
from launch.runs.find import labels_inside
from launch.runs.folder import RunFolder, read_plan
from launch.runs.records import recent_records
from launch.slurm.client import RETRIES, JobState, SlurmError
from launch.slurm.handles import Job, JobStatus, LocalQueueEntry, SlurmJob, agent_logs, ask_queue, job_of
from launch.slurm.limits import advice

# Outcome of a run by its event log alone: over or not, in which state, and why it does not start again.


DECISIVE = ("submitted", "moved", "requeued", "agent_started", "started", "agent_ended")
"""Events of which the last one tells whether an agent works on the run, or is going to."""
ENDED = {"finished", "stopped", "cancelled", "budget_reached"}
PLACED = ("submitted", "moved", "gave_up", "stayed")
"""Events that say where a point waits: the last of them holds."""


def outcome(events: Sequence[dict[str, Any]]) -> str:
    """State of a run whose job is over, by its event log; silence is a failure."""
    names = {e["event"] for e in events}
    ended = next((e for e in events if e["event"] in ("cancelled", "budget_reached")), None)
    attempts = [e["attempt"] for e in events if e.get("attempt") is not None]
    # What fails after a cancel, or at the cap, failed because of it.
    before = events if ended is None else events[: events.index(ended)]
    if attempts and first_failure(before, max(attempts)):
        return "failed"
    if "finished" in names:
        return "finished"
    if ended is not None:
        return "cancelled" if ended["event"] == "cancelled" else "budget_exceeded"
    if why_not_restarted(events) is not None:
        return "failed"
    return "stopped" if names & {"stopped", "agent_stopped"} else "failed"


def has_ended(events: Sequence[dict[str, Any]]) -> bool:
    """Return whether the event log shows that nothing more will happen: the agent decided to stop, and left."""
    last = next((e for e in reversed(events) if e["event"] in DECISIVE), None)
    if last is None or last["event"] != "agent_ended" or last.get("cause") == "killed":
        return False
    decisions = [e for e in events_since_start(events) if e["event"] in ("decided", "requeue_failed")]
    return bool(decisions) and (decisions[-1]["event"] == "requeue_failed" or decisions[-1]["action"] == Action.stop)


def why_not_restarted(events: Sequence[dict[str, Any]]) -> str | None:
    """The reason in the event log for which a run that was interrupted, or failed, stays so."""
    last = next((e for e in reversed(events) if e["event"] in ("decided", "requeue_failed", "started")), None)
    if last is None or last["event"] == "started":
        return None
    if last["event"] == "requeue_failed":
        return str(last["cause"])
    # A decision of a former release does not name the cause; that was then told by the ranks alone.
    is_unwanted = last["action"] == Action.stop and last.get("cause", Cause.finished) not in WANTED
    return str(last["reason"]) if is_unwanted else None


def state_between_places(events: Sequence[dict[str, Any]], is_out: bool) -> tuple[str, str] | None:
    """State and detail of a point whose launcher took it out of the queue, to put it elsewhere or for good."""
    last = last_placed(events)
    if last is not None and last["event"] == "gave_up":
        return "placement_timeout", str(last["cause"])
    if last is not None and last["event"] == "moved" and is_out and all(e["event"] != "cancelled" for e in events):
        return "pending", f"on its way to {last['to']}"
    return None


def last_placed(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last event that says where the point waits; None if it ran after that."""
    for event in reversed(events):
        if event["event"] in PLACED:
            return event
        if event["event"] in ("agent_started", "started"):
            return None
    return None


def events_since_start(events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Events from the last ``started`` on."""
    return events[max((i for i, e in enumerate(events) if e["event"] == "started"), default=0) :]


def saved_step(events: Sequence[dict[str, Any]]) -> int | None:
    """The step of the newest checkpoint that the event log knows of."""
    return max((save["step"] for save in saves_that_count(events)), default=None)


# Status of a run: the state of its job, what its event log says, and its newest steps.


OVER = ("finished", "failed", "stopped", "cancelled", "budget_exceeded", "placement_timeout")
TOLD = ("attempt_ended", "started", "finished", "stopped")
"""Events after which nobody expects a further step of the attempt."""
QUIET_S, QUIET_STEPS = 15.0, 10
"""Time without a step, in seconds and in steps, after which a status says so; the agents need longer to be sure of a
lost node (``resilience.node_timeout_s``)."""

STALE_S, STALE_STEPS = 5.0, 4
"""Time since the newest step, in seconds and in steps, after which its throughput is shown with its age, and no end of
the run is foretold: steps are recorded at once, and a restart takes longer."""


@dataclass
class RunStatus:
    """State of one run, as last seen."""

    folder: RunFolder
    job: Job | None = None
    """None where nothing was submitted, or not yet."""
    nodes: int | None = None
    max_steps: int | None = None
    plan: Plan | None = None
    """Of a point that this process submits."""
    attempts_before: int = 0
    """Attempts there were before this submission: their records are history."""
    events_before: int = 0
    """Events there were before this submission."""
    found: Job | None = None
    """Job that waits and that the event log does not name (``launch.slurm.adoption``)."""
    state: str = "pending"
    """pending, running, one of OVER, ``not started``, or ``unknown``."""
    detail: str = ""
    """Reason for which the run waits, or Slurm's state of its end."""
    damage: str = ""
    """Damage of a file of the run folder that the status can do without."""
    job_status: JobStatus = field(default_factory=lambda: JobStatus("unknown"))
    """Last known status of its job."""
    latest: dict[str, Any] = field(default_factory=dict)
    """The newest record of rank 0 since this submission."""
    eta_s: float | None = None
    quiet_s: float | None = None
    """Seconds since the newest step of a running attempt, where that is far more than a step takes; otherwise None."""
    stale_s: float | None = None
    """Seconds since the newest step of a running point, where the next one should have been made: what was measured
    until then says nothing of now; otherwise None."""
    label: str = ""
    """Label that sets the point apart from those beside it; empty where its folder's name does."""
    resumes: bool = True
    """False of a program that has no checkpoint to save or to go on from."""

    @property
    def name(self) -> str:
        """Name of the point for people."""
        return self.label or self.folder.point

    def events(self) -> list[dict[str, Any]]:
        """Read the events since this submission."""
        return self.folder.read_events()[self.events_before :]

    def attempts(self) -> list[int]:
        """Numbers of the attempts since this submission."""
        return [number for number in self.folder.attempts() if number > self.attempts_before]

    @property
    def is_over(self) -> bool:
        """Return whether nothing more will happen."""
        return self.state in OVER

    @property
    def advice(self) -> str:
        """Reason for which it waits, and what to type, where no waiting would start it; otherwise empty."""
        if self.state != "pending" or not isinstance(self.job, SlurmJob):
            return ""
        return advice(self.job_status.reason, self.job.job_id, quote(str(self.folder.path)), self.job.cluster)

    def why_not_restarted(self) -> str | None:
        """Reason for which a run does not start again; None if it continues, or ended as it was meant to."""
        return why_not_restarted(self.events())

    def sick_nodes(self) -> list[dict[str, Any]]:
        """Nodes that the newest start has left out, or that have kept it from beginning: host and cause of each."""
        newest = max(self.attempts(), default=0)
        told = [e for e in self.events() if e["event"] == "node_sick"]
        now = [e for e in events_since_start(self.events()) if e in told]  # of a start that did not begin, where any
        return [{"host": e["host"], "cause": e["cause"]} for e in now or told if e in now or e["attempt"] == newest]

    def fewer_nodes(self) -> dict[str, Any] | None:
        """Number of nodes that the newest attempt runs on, and why they are fewer than asked; None where they are not.

        Keys: ``nodes``, ``asked`` and ``cause``.
        """
        event = fewer_nodes(self.events()).get(max(self.attempts(), default=0))
        return event and {key: event[key] for key in ("nodes", "asked", "cause")}

    def start_refusal(self) -> str | None:
        """Refusal of the newest start of the ranks, in three parts; None if it was not refused."""
        told = [e["cause"] for e in events_since_start(self.events()) if e["event"] == "start_refused"]
        return told[-1] if told else None

    def failure(self, attempt: int | None = None) -> dict[str, Any] | None:
        """The first failure of an attempt; by default of the newest since this submission."""
        attempt = attempt or max(self.attempts(), default=None)
        return None if attempt is None else first_failure(self.folder.read_events(), attempt)


def new_run_status(plan: Plan) -> RunStatus:
    """Status of a run that is about to be submitted."""
    folder = RunFolder(plan.run_dir)
    return RunStatus(
        folder,
        nodes=plan.nodes,
        max_steps=plan.max_steps,
        plan=plan,
        attempts_before=max(folder.attempts(), default=0),
        events_before=len(folder.read_events()),
        label=plan.label,
        resumes=plan.promised.resumes,
    )


def find_run_statuses(folders: Sequence[RunFolder]) -> list[RunStatus]:
    """Status of the runs of folders, each with its label among the runs that lie beside it."""
    found = [find_run_status(folder) for folder in folders]
    labels = labels_inside({point.folder.path.parent for point in found})
    for point in found:
        point.label = labels.get(point.folder.path, "")
    return found


def find_run_status(folder: RunFolder) -> RunStatus:
    """Status of the run of a folder since its last submission, or since the one that waits to be made."""
    events = folder.read_events()
    plan, damage = promised(folder, events)
    start = LocalQueueEntry(folder).events_before()
    if start is None:
        start = last_command(events)
    point = RunStatus(
        folder,
        nodes=plan.get("nodes"),
        max_steps=plan.get("max_steps"),
        attempts_before=max((e["attempt"] for e in events[:start] if e.get("attempt") is not None), default=0),
        events_before=start,
        damage=damage,
        resumes=(plan.get("promised") or {}).get("resumes", True),
    )
    adopt_job(point)
    return point


def promised(folder: RunFolder, events: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], str]:
    """Read ``plan.json``, or as much of it as the ranks have told at their start; and what is wrong with the file."""
    damage = ""
    try:
        plan = read_plan(folder)
        if plan:
            return plan, ""
    except ConfigError as error:
        damage = error.found
    known: dict[str, Any] = {}
    for event in events:
        known |= {key: event[key] for key in ("max_steps", "nodes") if event.get(key) is not None}
    return known, damage


def poll(points: Sequence[RunStatus], retries: int = RETRIES, *, trust_log: bool = False) -> SlurmError | None:
    """Bring the points up to date, with one question to Slurm for all of them.

    Args:
        retries: 1 for who asks again anyway.
        trust_log: leave out of the question what ended by its event log, which tells more than a queue that forgets:
            for who looks at runs, and not for who waits until their jobs are gone.

    Returns:
        Why Slurm did not answer, or None. The points that it was asked about then keep the state they had.
    """
    for point in points:
        adopt_job(point)
    settled = {id(point) for point in points if trust_log and has_ended(point.events())}
    try:
        queue, problem = ask_queue((point.job for point in points if id(point) not in settled), retries), None
    except SlurmError as error:
        queue, problem = {}, error
    for point in points:
        if problem is None or not isinstance(point.job, SlurmJob) or id(point) in settled:
            update(point, queue)
        read_steps(point)  # after the outcome: a run that is over has made its last step
    return problem


def update(point: RunStatus, queue: Mapping[str, JobState]) -> None:
    """Set state and detail from the queue and the event log."""
    if point.job is None:
        point.state, point.detail = state_without_job(point)
    else:
        point.job_status = status = point.job.status(queue)
        point.state, point.detail = status.state, status.detail
        if status.state == "over":
            known = queue.get(point.job.name)
            out = known is None or known.state == "CANCELLED"
            events = point.events()
            point.state, point.detail = state_between_places(events, out) or (outcome(events), status.detail)
            if point.detail.lower() == point.state:  # Slurm's word for the same
                point.detail = ""
            if point.state == "failed" and status.detail != "CANCELLED" and is_silent(point):
                point.detail = ", ".join(part for part in (point.detail, silence_text(point)) if part)
        if point.state == "budget_exceeded":
            point.detail = next(e["cause"] for e in reversed(point.events()) if e["event"] == "budget_reached")


def is_silent(point: RunStatus) -> bool:
    """Return whether the agents of a Slurm job left no word at all: neither an event nor a line of output."""
    if not isinstance(point.job, SlurmJob):
        return False
    logs = agent_logs(point.folder.path, point.job, 0)
    started = any(event["event"] == "agent_started" for event in point.events())
    return not started and not any(log.is_file() and log.stat().st_size for log in logs)


def silence_text(point: RunStatus) -> str:
    """Explain why a job may have left no word, and what tells."""
    path = point.folder.path
    return (
        f"its agents left no word: the nodes may not see {path}, or may not write there; "
        f"srun --nodes={point.nodes or 1} ls -ld {quote(str(path))} tells, "
        "and output_dir=FOLDER puts runs on a filesystem that all nodes mount"
    )


def adopt_job(point: RunStatus) -> None:
    """Find the job of a point that some process has submitted, or moved."""
    submitted = [e for e in point.events() if e["event"] == "submitted"]
    if not submitted:
        point.job = point.found or point.job
        return
    newest = job_of(submitted[-1])
    if point.job is None or (isinstance(point.job, SlurmJob) and newest.name != point.job.name):
        point.job = newest


def state_without_job(point: RunStatus) -> tuple[str, str]:
    """State and detail of a point that waits here, or of a run that nobody submitted, as with ``gpt.train``."""
    events = point.events()
    cancelled = any(e["event"] == "cancelled" for e in events)
    if LocalQueueEntry(point.folder).events_before() is not None:
        return ("cancelled", "") if cancelled else ("pending", "after the points before it")
    if cancelled or point.failure() or {"finished", "stopped"} & {e["event"] for e in events_since_start(events)}:
        return outcome(events), ""
    return ("unknown", "not submitted by the launcher") if point.attempts() else ("not started", "")


def update_from_event_log(points: Sequence[RunStatus]) -> None:
    """Set the states of Slurm's points without Slurm, as far as their event logs go."""
    for point in points:
        events = point.events()
        if isinstance(point.job, SlurmJob) and not has_ended(events):
            ended = ENDED & {e["event"] for e in events_since_start(events)}
            timed_out = state_between_places(events, is_out=False)
            point.state = timed_out[0] if timed_out else outcome(events) if ended or point.failure() else "unknown"
            point.detail = "" if point.is_over else "Slurm does not answer"
            point.eta_s = None


def read_steps(point: RunStatus) -> None:
    """Read the newest steps, and from their times when the rest of a running point will be done."""
    point.eta_s = point.quiet_s = point.stale_s = None
    records = recent_records(point.folder.metrics(0))
    new = [record for record in records if record["attempt"] > point.attempts_before]
    if new:
        point.latest = new[-1]
        sizes = fewer_nodes(point.events())
        now = [r for r in new if size_of(r, sizes) == size_of(new[-1], sizes)]  # others take longer, or less long
        times = [record["step_time_s"] for record in now if record.get("step_time_s") is not None]
        if times and point.state == "running":
            usual = statistics.median(times)
            age = time.time() - point.latest["time"]
            point.stale_s = age if age > max(STALE_S, STALE_STEPS * usual) else None
            point.quiet_s = time_without_step(point, usual)
            if point.max_steps is not None and point.stale_s is None:
                point.eta_s = (point.max_steps - point.latest["step"]) * usual


def size_of(record: Mapping[str, Any], fewer: Mapping[int, Mapping[str, Any]]) -> int | None:
    """Return the number of nodes that a step was made on, where it was fewer than requested; else None."""
    event = fewer.get(record["attempt"])
    return None if event is None else int(event["nodes"])


def time_without_step(point: RunStatus, usual: float) -> float | None:
    """Seconds since the newest step, where steps take ``usual`` seconds and should have been made; otherwise None."""
    quiet = time.time() - point.latest["time"]
    if quiet < max(QUIET_S, QUIET_STEPS * usual):
        return None
    told = any(e["event"] in TOLD and e["time"] > point.latest["time"] for e in point.events())
    return None if told else quiet


# Endings of runs in words: why a point did not finish, and which log to read on. Changes nothing.


def show_progress_problems(points: Sequence[RunStatus], console: Console) -> None:
    """Say where ``script.progress`` did not find what it was meant to."""
    for point in points:
        causes = [event["cause"] for event in point.events() if event["event"].startswith("progress_")]
        for cause in dict.fromkeys(causes):
            console.print(f"warning: {point.name}: {cause}", highlight=False, markup=False)


def explain(point: RunStatus) -> str:
    """Explain why a point did not finish, and name the log to read on."""
    failure = point.failure() if point.state == "failed" else None
    head = f"{point.name} {point.state}" + (f" ({point.detail})" if point.detail else "")
    if point.state == "failed" and is_full(point.folder.path):
        lacks = "has no room: its event log may lack the last events; make room there before the same command"
        head = f"the filesystem of {point.folder.path} {lacks}\n{head}"
    why = point.why_not_restarted()
    last = f"\nnot started again: {why}" if why is not None else ""
    refusal = point.start_refusal()
    if refusal is not None:  # of a start after the attempt that failed
        return f"{head}:\n{refusal}{last}"
    if failure is not None:
        return f"{head}: {failure_text(failure)}{last}"
    if last:
        return f"{head}{last}"
    logs = agent_logs(point.folder.path, point.job, 0)[::-1] if point.job is not None else []
    log = next((log for log in logs if log.is_file() and log.stat().st_size), None)
    if log is not None and point.state == "failed":
        lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        return f"{head}; the first agent's last words ({log}):\n{lines}"
    if point.state == "failed" and not is_silent(point):
        return f"{head}; nothing was recorded in {point.folder.path}"
    if point.state == "placement_timeout":
        return f"{head}; the same command submits it again"
    return head
