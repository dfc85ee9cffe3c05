"""Placement failover: a job that waits for too long is taken out of the queue, and its run submitted elsewhere.

Everything it needs is in the run folder and in the queue, so that any process can go on with it, and a lock lets one at
a time: the launcher that watches its points, or ``launch.move``. When a point moves, and where to, is
``launch.plan.placement``'s to say.
"""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.plan.placement import Candidate, Placement, Step, decide, minutes, waiting_since, waits_for_room
from launch.plan.plan import Plan
from launch.plan.preflight import record_submitted
from launch.runs.folder import RunFolder, read_plan
from launch.slurm.client import JobState, SlurmBusyError, SlurmError
from launch.slurm.handles import SlurmJob, ask_queue, job_of
from launch.slurm.status import RunStatus, last_placed
from launch.slurm.stop import Stop
from launch.slurm.submit import shapes, submit_somewhere

LEAVE_S = 30.0
LEAVE_POLL_S = 0.5


@dataclass
class PendingRun:
    """A point in the queue, or between two places."""

    point: RunStatus
    plan: Plan
    """Plan of the run, its placement without the candidates that sbatch has refused."""
    at: int
    """The candidate it waits in, or is on its way to."""
    since_here: float
    since: float
    """Time when it began to wait here, and at all, Unix seconds."""

    @property
    def name(self) -> str:
        """The name of the point."""
        return self.point.name

    @property
    def place(self) -> Candidate:
        """Candidate in which the run waits."""
        return self.plan.placement.candidates[self.at]

    @property
    def is_between(self) -> bool:
        """Return whether it was taken out of the queue and is not in it again."""
        return self.point.job_status.state == "over"

    def step(self, now: float) -> Step:
        """Decide whether it stays, moves, or is given up."""
        return decide(self.plan.placement, self.at, now - self.since_here, now - self.since)


class PlacementFailover:
    """Moves points that wait, and takes those out of the queue that have waited long enough."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._excused: dict[str, float] = {}
        """Time when a job was last seen to wait for something that is no matter of place."""

    def step(self, points: Sequence[RunStatus]) -> SlurmError | None:
        """Move what is due. A Slurm that does not answer in between is returned; the next step continues from there."""
        now = time.time()
        waiting = [w for point in points if (w := self._waiting(point, now)) is not None]
        due = [w for w in waiting if w.is_between or w.step(now) != Step()]
        if not due:
            return None
        with ExitStack() as stack:
            stack.enter_context(no_interrupt())
            ours = [w for w in due if stack.enter_context(claim(w.point.folder)) and is_current(w)]
            try:
                self._submit(self._take_out(ours, now))
            except SlurmError as error:
                return error
        return None

    def _waiting(self, point: RunStatus, now: float) -> PendingRun | None:
        """The point, where it waits and somebody has to move it or to give up."""
        if not isinstance(point.job, SlurmJob) or point.state not in ("pending", "running"):
            return None
        plan, events = promised(point), point.events()
        if plan is None or not plan.placement.is_watched:
            return None
        if point.state == "running":
            note_that_it_stayed(point)
            return None
        status = point.job_status
        if status.state == "over":
            last = last_placed(events)
            if last is None or last["event"] != "moved":  # somebody else has just moved it
                return None
            return PendingRun(point, plan, last["candidate"], now, last["waiting_since"])
        if status.since is None:
            return None
        if not waits_for_room(status.reason):
            self._excused[point.job.name] = now
            return None
        excused = self._excused.get(point.job.name, 0.0)
        at = next(e["candidate"] for e in reversed(events) if e["event"] == "submitted")
        since = waiting_since(events, status.since)
        return PendingRun(point, plan, at, max(status.since, excused), max(since, excused))

    def _take_out(self, due: Sequence[PendingRun], now: float) -> list[PendingRun]:
        """Take points out of the queue; those that are on their way to another place, with that as theirs."""
        asked = [w for w in due if not w.is_between]
        for w in asked:
            self._note(w, w.step(now), now)
        for w in asked:
            assert isinstance(w.point.job, SlurmJob)
            w.point.job.take_out()
        queue = wait_until_out([w.point for w in asked]) if asked else {}
        on_their_way = [w for w in due if w.is_between]
        for w in asked:
            last = last_placed(w.point.events())
            if not is_out(w.point, queue):
                note_that_it_stayed(w.point)
            elif last is not None and last["event"] == "moved":
                w.at = last["candidate"]
                on_their_way.append(w)
        return on_their_way

    def _note(self, w: PendingRun, step: Step, now: float) -> None:
        """Enter the move into the event log before Slurm hears of it: whoever comes after a crash then knows."""
        assert w.point.job is not None
        waited = f"{minutes(now - w.since_here)} in {w.place.name or 'the queue'}"
        waited += f" ({w.point.job_status.reason})" if w.point.job_status.reason else ""
        known = {"job_id": w.point.job.job_id, "from": w.place.name, "waiting_since": w.since}
        if step.give_up:
            cause = f"{minutes(now - w.since)} in the queue, at last {waited}"
            w.point.folder.record_event("gave_up", **known, cause=cause)
            return
        last = last_placed(w.point.events())
        if last is not None and last["event"] == "moved" and last["candidate"] == step.move_to:
            return  # Slurm did not answer the last time
        assert step.move_to is not None
        to = w.plan.placement.candidates[step.move_to].name
        w.point.folder.record_event("moved", **known, to=to, candidate=step.move_to, cause=waited)
        self._say(f"{w.name}: waited {waited}, moves to {to}")

    def _submit(self, moving: Sequence[PendingRun]) -> None:
        """Submit points to where they are on their way to, one job for each shape."""
        by_folder = {w.plan.run_dir: w for w in moving}
        for candidate in sorted({w.at for w in moving}):
            for group in shapes([w.plan for w in moving if w.at == candidate]):
                self._submit_group([by_folder[plan.run_dir] for plan in group], candidate)

    def _submit_group(self, group: Sequence[PendingRun], candidate: int) -> None:
        """Submit points of one shape, to the first place from ``candidate`` on that sbatch does not refuse."""
        try:
            done = submit_somewhere([w.plan for w in group], candidate)
        except SlurmBusyError:
            raise
        except SlurmError as error:
            for w in group:
                cause = f"sbatch refuses it everywhere; at last: {error}"
                w.point.folder.record_event("gave_up", waiting_since=w.since, cause=cause)
            return
        place = group[0].plan.placement.candidates[done.candidate].name
        for w, job in zip(group, done.jobs, strict=True):
            for refused, why in done.refused.items():
                w.point.folder.record_event("refused", candidate=refused, cause=why)
                self._say(f"{w.name}: {w.plan.placement.candidates[refused].name} is skipped from now on: {why}")
            record_submitted(w.plan, job.job_id, done.candidate, moved=True)
            w.point.job = job
            self._say(f"{w.name}: job {job.name} at {place}")
            if any(e["event"] == "cancelled" for e in w.point.events()):  # in the moment of the move
                Stop(w.point, now=True).push()

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False)


def promised(point: RunStatus) -> Plan | None:
    """The plan of a point, without candidates that sbatch has refused and hosts that failed in it; None if there is
    none to move by. Raises ConfigError if it is damaged."""
    plan = point.plan
    if plan is None:
        known = read_plan(point.folder)
        if "placement" not in known:
            return None
        plan = Plan.from_dict(known)
    placement: Placement = plan.placement
    for event in point.events():
        if event["event"] == "refused":
            placement = placement.rule_out(event["candidate"], event["cause"])
    lost = sorted({host for event in point.events() if event["event"] == "excluded" for host in event["hosts"]})
    if lost:
        placement = placement.exclude_hosts(lost)
    return plan.replace_placement(placement) if placement.possible else None


def is_watched(point: RunStatus) -> bool:
    """Return whether the point needs somebody to move it, or to give up, while it waits."""
    plan = promised(point)
    return plan is not None and plan.placement.is_watched


def note_that_it_stayed(point: RunStatus) -> None:
    """Enter into the event log that a point was not moved, nor given up: it started in the same moment."""
    last = last_placed(point.events())
    if last is not None and last["event"] in ("moved", "gave_up"):
        point.folder.record_event("stayed", cause="it has started meanwhile, or Slurm did not take it out of the queue")


def is_current(w: PendingRun) -> bool:
    """Return whether nobody else has moved the point or cancelled it since it was looked at."""
    events = w.point.events()
    submitted = [job_of(e).name for e in events if e["event"] == "submitted"]
    cancelled = any(e["event"] == "cancelled" for e in events)
    return not cancelled and w.point.job is not None and submitted[-1] == w.point.job.name


@contextmanager
def claim(folder: RunFolder) -> Iterator[bool]:
    """Return whether this process alone moves the point for now."""
    path = folder.path / ".launch" / "moving"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


@contextmanager
def no_interrupt() -> Iterator[None]:
    """Put Ctrl-C off: a job that was submitted and not noted would be nobody's. sbatch, a child, does not get it."""
    asked: list[int] = []
    handler = signal.signal(signal.SIGINT, lambda number, frame: asked.append(number))
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
    if asked:
        raise KeyboardInterrupt


def wait_until_out(points: Sequence[RunStatus]) -> Mapping[str, JobState]:
    """Wait until jobs have left the queue, or run, and say what squeue told at last. Raises SlurmError."""
    deadline = time.monotonic() + LEAVE_S
    while True:
        queue = ask_queue(point.job for point in points)
        known = [queue.get(point.job.name) for point in points if point.job is not None]
        left = [state for state in known if state is not None and (state.is_waiting or state.state == "COMPLETING")]
        if not left or time.monotonic() > deadline:
            return queue
        time.sleep(LEAVE_POLL_S)


def is_out(point: RunStatus, queue: Mapping[str, JobState]) -> bool:
    """Return whether the job of a point was taken out of the queue, rather than having started."""
    assert point.job is not None
    known = queue.get(point.job.name)
    return known is None or known.state == "CANCELLED"


def start_in_background(folders: Sequence[Path], log: Path) -> subprocess.Popen[bytes]:
    """Start ``python -m launch.move`` for runs that go on without their launcher; closing the terminal leaves it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "gpt_launch", "move", *map(str, folders)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
