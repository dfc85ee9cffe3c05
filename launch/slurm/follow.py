"""Watch of points until they end: progress on the terminal, start of local points, stop by Ctrl-C or ``cancel``."""

from __future__ import annotations

import getpass
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from gpt_launch import as_typed
from launch.agent.node import STOP_FILE
from launch.config import Config
from launch.config.compose import default_grace_period_s
from launch.errors import ConfigError, duration_text
from launch.plan.plan import record_submitted
from launch.runs.compose import read_config
from launch.runs.events import damaged_text, events_since_submission, saves_that_count, select_events, unsaved_text
from launch.runs.folder import RunFolder
from launch.runs.records import throughput
from launch.slurm.client import SlurmBusyError, SlurmError
from launch.slurm.failover import fail_over
from launch.slurm.jobs import Job, LocalJob, LocalQueueEntry, SlurmJob
from launch.slurm.status import RunStatus, has_left_job, poll
from launch.slurm.submit import start_local

POLL_S = 0.5
PLAIN_LINE_S = 10.0
STOP_POLL_S = 2.0
AGENT_S = 5.0  # After grace_period_s the agents end their ranks, and then record the end.
LAST_WAIT_S = 120.0  # Slurm kills KillWait (30 s by default) after scancel, and then cleans up.


# Progress on the terminal.


def speed_text(record: dict[str, object]) -> str:
    """Return the throughput in a step record as text with its unit; "" if no throughput was recorded."""
    speed = throughput(record)
    return "" if speed is None else f"{speed[0]:,.{0 if speed[0] >= 100 else 1}f} {speed[1]}/s"


def quiet_text(seconds: float) -> str:
    """Return a text with the possible reasons why a run has made no step for ``seconds``."""
    return f"no step for {seconds:.0f} s: an evaluation, a checkpoint, a hang, or a lost node"


def state_text(point: RunStatus) -> str:
    """Return the state of a point as text, with the reason.

    If the run has fewer nodes than requested, the text also has the number of nodes.
    """
    fewer = point.fewer_nodes() if point.state == "running" else None
    on = "" if fewer is None else f"{fewer['nodes']} of {fewer['asked']} nodes"
    details = ", ".join(part for part in (point.detail, on) if part)
    return f"{point.state} ({details})" if details else point.state


def plain_line(point: RunStatus) -> str:
    """Return one line of text for a point: name, state, step, throughput, loss and remaining time, as far as known."""
    step, total = point.latest.get("step"), point.max_steps
    known = []
    if step is not None or total is not None:
        known.append(f"step {step or 0}" + ("" if total is None else f"/{total}"))
    if speed := speed_text(point.latest):
        known.append(f" {speed:>18}")
    if point.latest.get("loss") is not None:
        known.append(f" loss {point.latest['loss']:.4f}")
    if point.quiet_s is not None:
        unsaved = unsaved_text(point.events())
        known.append(f" {quiet_text(point.quiet_s)}" if unsaved is None else f" waits, and tries again: {unsaved}")
    elif point.eta_s and not point.is_over:
        known.append(f" ETA {duration_text(round(point.eta_s))}")
    return f"{point.name:<24} {state_text(point):<9} {' '.join(known)}".rstrip()


def news(point: RunStatus) -> Iterator[str]:
    """Yield texts on a running point: restarts, failed saves, damage, changed code, or a job that cannot start."""
    events = point.events()
    causes = {event["attempt"]: event["cause"] for event in select_events(events, "verdict", "head_replaced")}
    for event in events:
        attempt = event.get("attempt")
        if event["event"] == "code_changed":
            change = f"changed since attempt {event.get('since')}: {event.get('cause')}"
            if point.plan is None or not any(change in warning for warning in point.plan.warnings):
                yield f"attempt {attempt}: {change}"
        elif event["event"] == "decided" and event["action"] == "restart":
            cause = causes.get(attempt) or event.get("cause")
            yield f"attempt {attempt} ended ({cause}), restart in place: {event['reason']}"
        elif event["event"] == "save_failed":
            yield f"the checkpoint of step {event.get('step')} could not be written: {event.get('cause')}"
    yield from (text for text in (damaged_text(events), point.advice) if text)


class Display:
    """Progress of points on the terminal.

    A line is printed for each new state of a point, for each of its news, and every PLAIN_LINE_S seconds for its steps.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._shown: dict[int, tuple[str, int, float]] = {}
        self._printed: set[tuple[int, str]] = set()
        self._has_problem = False

    def show(self, point: RunStatus) -> None:
        """Print the state of a point if something has changed, and each of its news once."""
        for text in news(point):
            if (id(point), text) not in self._printed:
                self._printed.add((id(point), text))
                self.console.print(f"warning: {point.name}: {text}")
        step = int(point.latest.get("step", 0))
        state, last_step, at = self._shown.get(id(point), ("", -1, 0.0))
        moved = step != last_step and time.monotonic() - at >= PLAIN_LINE_S
        seen = f"{state_text(point)}{' without steps' if point.quiet_s is not None else ''}"
        if seen != state or moved:
            self._shown[id(point)] = (seen, step, time.monotonic())
            self.console.print(plain_line(point))

    def show_problem(self, problem: SlurmError | None) -> None:
        """Print once that Slurm does not answer, and once that it answers again.

        ``problem`` is the error of the last poll; None if Slurm answered.
        """
        if problem is not None and not self._has_problem:
            self.console.print(f"{problem}\nthe jobs continue; asking again until Slurm answers")
        elif problem is None and self._has_problem:
            self.console.print("Slurm answers again")
        self._has_problem = problem is not None


# From the submission to the end.


def watch_points(
    points: Sequence[RunStatus],
    console: Console,
    slurm_poll_s: float,
    *,
    stops_at_failure: bool = False,
    parallel: int = 1,
) -> None:
    """Follow the points until they end, and start local points in order.

    Args:
        points: status of submitted points, or of points that wait on this machine.
        console: console for progress and news.
        slurm_poll_s: seconds between two polls of Slurm. A poll that fails is repeated: the jobs continue.
        stops_at_failure: True to cancel the other points when one has failed.
        parallel: number of local points that run at the same time.
    """
    display = Display(console)
    with explain_sigterm(console):
        while watched := [point for point in points if not point.is_over]:
            start_local_points(watched, parallel)
            display.show_problem(poll(watched, retries=1) or fail_over(watched, console))
            for point in watched:
                display.show(point)
            failed = next((point for point in watched if point.state == "failed"), None)
            if stops_at_failure and failed is not None:
                console.print(f"{failed.name} failed, and launch.stop_at_first_failure=true: stopping the other points")
                for stop in stop_points(points, console):
                    console.print(outcome_text(stop))
            # Many users share the controller, so it is polled less often than this machine.
            time.sleep(slurm_poll_s if all(isinstance(point.job, SlurmJob) for point in watched) else POLL_S)


@contextmanager
def explain_sigterm(console: Console) -> Iterator[None]:
    """Print what happens to the runs if SIGTERM ends this process during a ``with`` block."""

    def leave(number: int, frame: object) -> None:
        ends = "runs on this machine save a checkpoint if they can, and end"
        console.print(as_typed(f"terminated by SIGTERM: Slurm jobs continue (python -m launch.status); {ends}"))
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def start_local_points(points: Sequence[RunStatus], parallel: int) -> None:
    """Start local points in order, as long as fewer than ``parallel`` run at the same time."""
    local = [p for p in points if p.plan is not None and p.plan.cluster != "slurm" and not p.is_over]
    free = [part for part in range(parallel) if part not in {p.part for p in local if p.job is not None}]
    for point in (point for point in local if point.job is None):
        if not free:
            return
        LocalQueueEntry(point.folder).leave()
        if point.is_cancelled:
            point.state = "cancelled"
            continue
        assert point.plan is not None
        point.part = free.pop(0)
        point.job = start_local(point.plan, point.part, parallel)
        point.state = "running"
        record_submitted(point.plan, point.job.job_id, pid_started=point.job.started)
        if point.is_cancelled:  # The point was cancelled at the moment of its start.
            Stop(point).push()


# The stop of submitted runs. The cancel is in the event log before any signal is sent, so that the end never looks like
# a preemption.


class Stop:
    """The cancel of one run: a request to save, then the end of the job if the run does not end in time."""

    def __init__(self, point: RunStatus, *, now: bool = False) -> None:
        self.point = point
        self.error: SlurmError | None = None
        """Error because of which the run cannot be ended; None if there is no such error."""
        self.kill_at = time.monotonic() + (0.0 if now else grace_period_s(point) + AGENT_S)
        """Time of the monotonic clock at which the job is ended."""
        self.unmarked = ""
        """Reason for which the cancel could not be recorded in the event log; empty if it was recorded."""
        self._now = now
        self._asked: Job | None = None
        self._killed: Job | None = None

    @property
    def is_done(self) -> bool:
        """Return whether the run is over, or cannot be ended."""
        return self.point.is_over or self.error is not None

    def mark(self) -> None:
        """Record the cancel in the event log, once for each job of the run.

        Without this record, agents would take the request to stop for a preemption. So if the event log cannot be
        written, ``unmarked`` gets the reason, and the job is ended at once, without a save.
        """
        job_id = None if self.point.job is None else self.point.job.job_id
        if not select_events(self.point.events(), "cancelled", job_id=job_id):
            who = f"{getpass.getuser()}@{os.uname().nodename}"
            try:
                self.point.folder.record_event("cancelled", job_id=job_id, by=who, now=self._now)
            except OSError as error:
                # Without the record, agents would take SIGTERM for a preemption. After scancel, the state is CANCELLED.
                self.kill_at = min(self.kill_at, time.monotonic())
                self.unmarked = f"{self.point.name}: ended without a save, as its event log cannot say why: {error}"

    def push(self) -> None:
        """Do the next step of the cancel: request a save once, and end the job after its grace period.

        A job that several points share is not ended while another of these points uses it. Raises SlurmError if Slurm
        does not answer.
        """
        self.mark()
        job = self.point.job
        if job is None:
            return
        others, shares = others_in_job(self.point), isinstance(job, SlurmJob) and job.points
        if time.monotonic() >= self.kill_at and not others:
            if self._killed is not job:
                job.kill()
                self._killed = job
        elif self.point.state == "pending":
            if not others:
                job.stop("pending")  # At every poll: the job may have started at the same moment.
        elif shares:
            if self._asked is not job:  # A signal would reach the agents of all points.
                (self.point.folder.path / STOP_FILE).touch()
                self._asked = job
        elif self._asked is not job:
            names = [e["event"] for e in self.point.events()]
            # The agents already have the request if only the answer to an earlier scancel was lost. A second signal
            # would kill.
            if "signalled" not in names[names.index("cancelled") :]:
                job.stop("running")
                self._asked = job


def grace_period_s(point: RunStatus) -> float:
    """Return the seconds that the agents of a run give their ranks to save (``resilience.grace_period_s``).

    If the config is damaged or missing, return the default of this key.
    """
    try:
        return read_config(point.folder, Config).resilience.grace_period_s
    except ConfigError as error:
        point.damage = point.damage or error.found
        return default_grace_period_s()


def stop_points(points: Sequence[RunStatus], console: Console, *, now: bool = False) -> list[Stop]:
    """Cancel the points, and wait until each is over or cannot be ended.

    Runs may save before they end. With ``now``, they end at once. Returns one Stop for each point that was not over.
    """
    stops = [Stop(point, now=now) for point in points if not point.is_over]
    for stop in stops:
        stop.mark()
        if stop.unmarked:
            console.print(stop.unmarked)
    said = False
    while left := [stop for stop in stops if not stop.is_done]:
        busy: SlurmError | None = None
        for stop in left:
            try:
                stop.push()
            except SlurmBusyError as error:
                busy = error
            except SlurmError as error:
                stop.error = error
        busy = busy or poll([stop.point for stop in left], retries=1)
        if busy is not None and not said:
            console.print(f"{busy}\nasking again until Slurm answers")
            said = True
        for stop in left:
            if not stop.is_done and time.monotonic() > stop.kill_at + LAST_WAIT_S:
                stop.error = busy or SlurmError("not over long after it was ended")
        if not all(stop.is_done for stop in left):
            time.sleep(POLL_S if any(isinstance(stop.point.job, LocalJob) for stop in left) else STOP_POLL_S)
    for stop in stops:
        if stop.point.is_over:  # Otherwise the next start of the run would obey the file.
            (stop.point.folder.path / STOP_FILE).unlink(missing_ok=True)
    return stops


def others_in_job(point: RunStatus) -> list[Path]:
    """Return the folders of the other runs in the job of a point, without runs that have ended or are cancelled."""
    found, job = [], point.job
    for name in job.points if isinstance(job, SlurmJob) else ():
        path = point.folder.path.with_name(name)
        events = events_since_submission(RunFolder(path).read_events())
        if name != point.folder.point and not has_left_job(events) and not select_events(events, "cancelled"):
            found.append(path)
    return found


def stop_on_ctrl_c(points: Sequence[RunStatus], console: Console) -> None:
    """Stop the points, after a first Ctrl-C. A second Ctrl-C ends the runs at once."""
    text = leaving_text([point for point in points if not point.is_over])
    console.print(f"stopping: {text}; Ctrl-C again ends them now")
    try:
        stops = stop_points(points, console)
    except KeyboardInterrupt:
        stops = stop_points(points, console, now=True)
    for stop in stops:
        console.print(outcome_text(stop))


def leaving_text(points: Sequence[RunStatus]) -> str:
    """Return a text: the longest time that points need to leave after a request to stop, and what they save before."""
    longest = max((grace_period_s(point) for point in points), default=0.0) + AGENT_S
    return f"the runs leave within {longest:g} s, and those that can resume save a checkpoint before"


def outcome_text(stop: Stop) -> str:
    """Return a text on how a stopped run ended, with its last checkpoint."""
    point = stop.point
    if stop.error is not None:
        return f"{point.name}: could not be ended: {stop.error}"
    step = point.latest.get("step")
    head = f"{point.name}: {point.state}" + (f" after step {step}" if step else "")
    saved = max((save["step"] for save in saves_that_count(point.folder.read_events())), default=None)
    if point.state == "finished" or (saved is None and not step):
        return head
    return f"{head}; {'nothing was saved' if saved is None else f'the last checkpoint is of step {saved}'}"
