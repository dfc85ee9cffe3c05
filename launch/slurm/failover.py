"""Placement failover: a job that is pending too long is cancelled, and its run is submitted at the next candidate.

The run folder and the queue have all that a move needs, so any process can continue a move: the launcher that watches
its points, or ``launch.move``. A lock admits one process at a time. ``launch.plan.placement`` decides when and to which
candidate.
"""

from __future__ import annotations

import fcntl
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from launch.errors import duration_text
from launch.plan.placement import decide, waiting_since
from launch.plan.plan import Plan, record_submitted
from launch.runs.folder import RunFolder, read_plan
from launch.slurm.client import SlurmBusyError, SlurmError
from launch.slurm.jobs import ACTIVE, SlurmJob, ask_queue, job_of
from launch.slurm.limits import OWN_WISH
from launch.slurm.status import RunStatus, last_placed
from launch.slurm.submit import submit_somewhere

LEAVE_S = 30.0
LEAVE_POLL_S = 0.5


@dataclass
class Move:
    """Move of a pending point to another candidate, or the decision to give the point up."""

    point: RunStatus
    job: SlurmJob
    plan: Plan
    """Plan of the run. Its placement lacks the candidates that sbatch has refused."""
    to: int | None
    """Index of the candidate to move to; None if the point is given up."""
    since: float
    """Time when the point began to wait, over all places, Unix seconds."""
    place: str = ""
    waited: str = ""
    """Time and reason of the wait at the former place, for people."""
    is_out: bool = False
    """True once the job has left the queue."""


class PlacementFailover:
    """Moves points that have been pending too long at their place, or gives them up."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._excused: dict[str, float] = {}
        """Job name -> last time (Unix seconds) when the job was pending for a reason in OWN_WISH."""

    def step(self, points: Sequence[RunStatus]) -> SlurmError | None:
        """Make the moves that are due. Returns None, or Slurm's error; the next call then continues the moves."""
        now = time.time()
        due = [move for point in points if (move := self._due(point, now)) is not None]
        if not due:
            return None
        with ExitStack() as stack:
            stack.enter_context(no_interrupt())
            ours = [move for move in due if stack.enter_context(claim(move.point.folder)) and is_current(move.point)]
            try:
                self._take_out([move for move in ours if not move.is_out], now)
                for move in ours:
                    if move.is_out and move.to is not None:
                        self._submit(move, move.to)
            except SlurmError as error:
                return error
        return None

    def _due(self, point: RunStatus, now: float) -> Move | None:
        """Return the move of a point that is due now, or that another process has begun; else None."""
        job, status = point.job, point.job_status
        plan = promised(point) if isinstance(job, SlurmJob) and point.state in ACTIVE else None
        if plan is None or not plan.placement.is_watched:
            return None
        assert isinstance(job, SlurmJob)
        if point.state == "running":
            record_stay(point)
            return None
        events = point.events()
        if status.phase == "over":
            last = last_placed(events)
            if last is None or last["event"] != "moved":  # Another process has just moved the point.
                return None
            return Move(point, job, plan, last["candidate"], last["waiting_since"], is_out=True)
        if status.since is None:
            return None
        if status.reason in OWN_WISH:
            self._excused[job.name] = now
            return None
        excused = self._excused.get(job.name, 0.0)
        at = next(e["candidate"] for e in reversed(events) if e["event"] == "submitted")
        here, since = max(status.since, excused), max(waiting_since(events, status.since), excused)
        leaves, to = decide(plan.placement, at, now - here, now - since)
        if not leaves:
            return None
        place = plan.placement.candidates[at].name
        reason = f" ({status.reason})" if status.reason else ""
        waited = f"{duration_text(now - here)} in {place or 'the queue'}{reason}"
        return Move(point, job, plan, to, since, place, waited)

    def _take_out(self, moves: Sequence[Move], now: float) -> None:
        """Record the moves, cancel the pending jobs, and wait at most LEAVE_S seconds until they have left the queue.

        The record comes first, so that another process can continue the moves after a crash. Sets ``Move.is_out``.
        """
        for move in moves:
            known = {"job_id": move.job.job_id, "from": move.place, "waiting_since": move.since}
            last = last_placed(move.point.events())
            if move.to is None:
                cause = f"{duration_text(now - move.since)} in the queue, at last {move.waited}"
                move.point.folder.record_event("gave_up", **known, cause=cause)
            # Otherwise the move is already recorded.
            elif last is None or last["event"] != "moved" or last["candidate"] != move.to:
                to = move.plan.placement.candidates[move.to].name
                move.point.folder.record_event("moved", **known, to=to, candidate=move.to, cause=move.waited)
                self._console.print(f"{move.point.name}: waited {move.waited}, moves to {to}")
        for move in moves:
            move.job.take_out()
        deadline = time.monotonic() + LEAVE_S
        left = list(moves)
        while left:
            queue = ask_queue(move.job for move in left)
            states = [(move, move.job.status(queue)) for move in left]
            for move, state in states:
                move.is_out = state.state in ("GONE", "CANCELLED")
            left = [move for move, state in states if state.phase == "pending" or state.state == "COMPLETING"]
            if not left or time.monotonic() > deadline:
                break
            time.sleep(LEAVE_POLL_S)
        for move in moves:
            if not move.is_out:
                record_stay(move.point)

    def _submit(self, move: Move, to: int) -> None:
        """Submit a point at candidate ``to``, or at the next candidate that sbatch does not refuse.

        If sbatch refuses the point at every candidate, the point is given up.
        """
        point, candidates = move.point, move.plan.placement.candidates
        try:
            done = submit_somewhere([move.plan], to)
        except SlurmBusyError:
            raise
        except SlurmError as error:
            cause = f"sbatch refuses it everywhere; at last: {error}"
            point.folder.record_event("gave_up", waiting_since=move.since, cause=cause)
            return
        for refused, why in done.refused.items():
            point.folder.record_event("refused", candidate=refused, cause=why)
            self._console.print(f"{point.name}: {candidates[refused].name} is skipped from now on: {why}")
        (job,) = done.jobs
        record_submitted(move.plan, job.job_id, done.candidate, moved=True)
        point.job = job
        self._console.print(f"{point.name}: job {job.name} at {candidates[done.candidate].name}")
        if point.is_cancelled:  # The job started at the moment of its move.
            job.kill()


def promised(point: RunStatus) -> Plan | None:
    """Return the plan of a point without candidates that sbatch has refused, and without hosts that failed in the run.

    None if no plan with a possible candidate exists. Raises ConfigError if the plan is damaged.
    """
    plan = point.plan
    if plan is None:
        known = read_plan(point.folder)
        if "placement" not in known:
            return None
        plan = Plan.from_dict(known)
    placement, lost = plan.placement, set[str]()
    for event in point.events():
        if event["event"] == "refused":
            placement = placement.rule_out(event["candidate"], event["cause"])
        elif event["event"] == "excluded":
            lost |= set(event["hosts"])
    placement = placement.exclude_hosts(sorted(lost)) if lost else placement
    return plan.replace_placement(placement) if placement.possible else None


def record_stay(point: RunStatus) -> None:
    """Record that a point started during its move, and so keeps its place. Does nothing if no move was recorded."""
    last = last_placed(point.events())
    if last is not None and last["event"] in ("moved", "gave_up"):
        point.folder.record_event("stayed", cause="it has started meanwhile, or Slurm did not take it out of the queue")


def is_current(point: RunStatus) -> bool:
    """Return whether no other process has moved or cancelled the point since the last poll."""
    submitted = [job_of(event).name for event in point.events() if event["event"] == "submitted"]
    return not point.is_cancelled and point.job is not None and submitted[-1] == point.job.name


@contextmanager
def claim(folder: RunFolder) -> Iterator[bool]:
    """Lock the run folder for a move. Yields True if this process has the lock, False if another process has it."""
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
    """Delay Ctrl-C to the end of a ``with`` block, so that each job that sbatch accepts is recorded.

    The process of sbatch inherits the signal mask.
    """
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


def start_in_background(folders: Sequence[Path], log: Path) -> subprocess.Popen[bytes]:
    """Start ``launch.move`` for runs without a launcher, in a process that survives the end of the terminal.

    Its output is appended to ``log``.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-u", "-m", "gpt_launch", "move", *map(str, folders)],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
