"""Stop of submitted runs: request a save, and end what has not left in time.

``launch.cancel`` and Ctrl-C at the launcher use it. The event log has the cancel before any signal is sent, so that the
end is never mistaken for a preemption.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Sequence

from rich.console import Console

from launch.config import Config
from launch.config.compose import default_grace_period_s
from launch.errors import ConfigError
from launch.runs.compose import read_config
from launch.slurm.client import SlurmBusyError, SlurmError
from launch.slurm.handles import Job, LocalJob
from launch.slurm.status import RunStatus, poll, saved_step

POLL_S = 0.5
SLURM_POLL_S = 2.0
AGENT_S = 5.0  # the agents end their ranks after grace_period_s themselves, and then write down what came of it
LAST_WAIT_S = 120.0  # Slurm kills KillWait (30 s by default) after scancel, and then cleans up


class Stop:
    """One point on its way out."""

    def __init__(self, point: RunStatus, *, now: bool = False) -> None:
        grace_s = grace_period_s(point) + AGENT_S
        self.point = point
        self.error: SlurmError | None = None
        """Error for which the run cannot be ended."""
        self.kill_at = time.monotonic() + (0.0 if now else grace_s)
        self.unmarked = ""
        """Reason for which the event log lacks the cancel."""
        self._now = now
        self._asked: Job | None = None
        self._killed: Job | None = None

    @property
    def is_done(self) -> bool:
        """Return whether there is nothing left to do, or nothing that can be done."""
        return self.point.is_over or self.error is not None

    def mark(self) -> None:
        """Enter the cancel into the event log, once for each job."""
        job_id = None if self.point.job is None else self.point.job.job_id
        if not any(e["event"] == "cancelled" and e["job_id"] == job_id for e in self.point.events()):
            who = f"{getpass.getuser()}@{os.uname().nodename}"
            try:
                self.point.folder.record_event("cancelled", job_id=job_id, by=who, now=self._now)
            except OSError as error:
                # Without it the agents would take SIGTERM for a preemption. A job that scancel ends, Slurm calls so.
                self.kill_at = min(self.kill_at, time.monotonic())
                self.unmarked = f"{self.point.name}: ended without a save, as its event log cannot say why: {error}"

    def push(self) -> None:
        """Do what is next: ask once, and end what has not left in time. Raises SlurmError."""
        self.mark()
        job = self.point.job
        if job is None:
            return
        if time.monotonic() >= self.kill_at:
            if self._killed is not job:
                job.kill()
                self._killed = job
        elif self.point.state == "pending":
            job.stop("pending")  # again at every poll: it may have started at the same moment
        elif self._asked is not job and not self._was_heard():
            job.stop("running")
            self._asked = job

    def _was_heard(self) -> bool:
        """Return whether the agents know already, if the answer to an earlier scancel was lost: a second one kills."""
        names = [e["event"] for e in self.point.events()]
        return "signalled" in names[names.index("cancelled") :]


def grace_period_s(point: RunStatus) -> float:
    """Seconds that the agents of a run give its ranks to save; the default's where its config is damaged or gone."""
    try:
        return read_config(point.folder, Config).resilience.grace_period_s
    except ConfigError as error:
        point.damage = point.damage or error.found
        return default_grace_period_s()


def stop_points(points: Sequence[RunStatus], console: Console, *, now: bool = False) -> list[Stop]:
    """Have the points save and leave, end what is left, and wait until they are over or cannot be ended."""
    stops = [Stop(point, now=now) for point in points if not point.is_over]
    for stop in stops:
        stop.mark()
        if stop.unmarked:
            console.print(stop.unmarked, highlight=False, markup=False)
    said = False
    while left := [stop for stop in stops if not stop.is_done]:
        busy = push_all(left) or poll([stop.point for stop in left], retries=1)
        if busy is not None and not said:
            console.print(f"{busy}\nasking again until Slurm answers", highlight=False, markup=False)
            said = True
        for stop in left:
            if not stop.is_done and time.monotonic() > stop.kill_at + LAST_WAIT_S:
                stop.error = busy or SlurmError("not over long after it was ended")
        local = any(isinstance(stop.point.job, LocalJob) for stop in left)
        time.sleep(0.0 if all(stop.is_done for stop in left) else POLL_S if local else SLURM_POLL_S)
    return stops


def push_all(stops: Sequence[Stop]) -> SlurmError | None:
    """Push every point a step further. A controller that does not answer for one is returned, and asked again later."""
    busy = None
    for stop in stops:
        try:
            stop.push()
        except SlurmBusyError as error:
            busy = error
        except SlurmError as error:
            stop.error = error
    return busy


def stop_on_ctrl_c(points: Sequence[RunStatus], console: Console) -> None:
    """The orderly stop at the first Ctrl-C; the second ends the runs at once."""
    text = leaving_text([point for point in points if not point.is_over])
    console.print(f"stopping: {text}; Ctrl-C again ends them now", highlight=False, markup=False)
    try:
        stops = stop_points(points, console)
    except KeyboardInterrupt:
        stops = stop_points(points, console, now=True)
    for stop in stops:
        console.print(outcome_text(stop), highlight=False, markup=False)


def leaving_text(points: Sequence[RunStatus]) -> str:
    """Describe for people what running programs are told, and what is saved: a checkpoint where they have one."""
    resuming = [point.name for point in points if point.resumes]
    others = [point.name for point in points if not point.resumes]
    within = f"within {max((grace_period_s(point) for point in points), default=0.0) + AGENT_S:g} s"
    saves = f"save a checkpoint and leave, {within}"
    lose = "told to leave, and go on from no checkpoint: only what they write themselves is kept (script.resumes=false)"
    if not others:
        return f"the runs {saves}"
    if not resuming:
        return f"the runs are {lose}"
    return f"{', '.join(resuming)} {saves}; {', '.join(others)} are {lose}"


def next_start_text(points: Sequence[RunStatus]) -> str:
    """Say what the same command would do with stopped runs."""
    fresh = [point.name for point in points if not point.resumes]
    if not fresh:
        return "the same command goes on from the last checkpoint"
    those = "" if len(fresh) == len(points) else f" of {', '.join(fresh)}"
    rest = "" if not those else ", and goes on from the last checkpoint of the others"
    return f"the same command runs the program{those} from its beginning{rest}"


def outcome_text(stop: Stop) -> str:
    """Describe for people how a stopped run ended."""
    point = stop.point
    if stop.error is not None:
        return f"{point.name}: could not be ended: {stop.error}"
    step = point.latest.get("step")
    head = f"{point.name}: {point.state}" + (f" after step {step}" if step else "")
    saved = saved_step(point.folder.read_events())
    if point.state == "finished" or not point.resumes or (saved is None and not step):
        return head
    return f"{head}; {'nothing was saved' if saved is None else f'the last checkpoint is of step {saved}'}"
