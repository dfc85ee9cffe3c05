"""Further jobs of a run: placement failover, the next job of a chain, and spare jobs.

Placement failover moves a run to another place: a job that is pending too long is cancelled, and its run is submitted
at its next candidate, such as another partition. ``launch.plan.placement`` decides when, and to which candidate. The
run folder and Slurm's queue contain all that a move needs. So any process can continue a move that another process has
begun: the launcher that watches the run, or ``launch.move``. A lock admits one process at a time.

A chain continues a run in a next job, in place of a requeue. A spare job has one node, which joins a running job.
"""

from __future__ import annotations

import fcntl
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from submitit.core.utils import FailedJobError

import gpt_launch.own_names  # noqa: F401
from gpt_launch.agent import run_spare
from launch.agent.node import Node
from launch.agent.policy import hosts_to_avoid
from launch.errors import CommandParser, duration_text, refusing
from launch.plan.placement import decide, waiting_since
from launch.plan.plan import Plan, record_next_job, record_submitted
from launch.runs.events import events_since_submission, last_event
from launch.runs.folder import RunFolder, deny_others_writing, read_plan
from launch.slurm.client import SlurmBusyError, SlurmError, job_details
from launch.slurm.jobs import ACTIVE, SlurmJob, ask_queue, slurm_folder
from launch.slurm.limits import OWN_WISH
from launch.slurm.status import RunStatus, find_run_status, last_placed
from launch.slurm.submit import Submission, depend, submit_calls, submit_somewhere

LEAVE_S = 30.0
LEAVE_POLL_S = 0.5


def fail_over(points: Sequence[RunStatus], console: Console) -> SlurmError | None:
    """Move each run that has waited too long at its candidate to the next candidate of its placement.

    A run that has waited too long in all is given up. Returns None, or the error of Slurm that interrupted the moves;
    the next call then continues them.
    """
    try:
        for point in points:
            plan = promised(point) if isinstance(point.job, SlurmJob) and point.state in ACTIVE else None
            if plan is None or not plan.placement.is_watched:
                continue
            if point.state == "running":
                record_stay(point)
                continue
            with no_interrupt(), claim(point.folder) as is_ours:
                if is_ours and is_current(point):
                    move_if_due(point, plan, console)
    except SlurmError as error:
        return error
    return None


def move_if_due(point: RunStatus, plan: Plan, console: Console) -> None:
    """Move a pending point that has waited long enough, or continue a move that another process has begun.

    A move is recorded before it begins, so that another process can continue the move after a crash. ``plan`` is the
    plan that ``promised`` returns. Raises SlurmError if Slurm does not answer.
    """
    status, events, now = point.job_status, point.events(), time.time()
    last = last_placed(events)
    is_moving = last.get("event") == "moved"
    if status.phase == "over":
        if is_moving:  # Otherwise another process has just moved the point.
            submit_moved(point, plan, last["candidate"], last["waiting_since"], console)
        return
    if status.since is None or status.reason in OWN_WISH:
        return
    at = last_event(events, "submitted")["candidate"]
    since = waiting_since(events, status.since)
    leaves, to = decide(plan.placement, at, now - status.since, now - since)
    if not leaves:
        return
    place, job = plan.placement.candidates[at].name, point.job
    assert isinstance(job, SlurmJob)
    reason = f" ({status.reason})" if status.reason else ""
    waited = f"{duration_text(now - status.since)} in {place or 'the queue'}{reason}"
    known = {"job_id": job.job_id, "from": place, "waiting_since": since}
    if to is None:
        cause = f"{duration_text(now - since)} in the queue, at last {waited}"
        point.folder.record_event("gave_up", **known, cause=cause)
    elif not is_moving or last["candidate"] != to:  # Otherwise the move is already recorded.
        name = plan.placement.candidates[to].name
        point.folder.record_event("moved", **known, to=name, candidate=to, cause=waited)
        console.print(f"{point.name}: waited {waited}, moves to {name}")
    if not has_left(job):
        record_stay(point)
    elif to is not None:
        submit_moved(point, plan, to, since, console)


def submit_moved(point: RunStatus, plan: Plan, to: int, since: float, console: Console) -> None:
    """Submit a point that has left the queue at candidate ``to``, or at the next candidate that sbatch accepts.

    Gives the point up if sbatch refuses it everywhere. ``since`` is the Unix time when the point began to wait.

    Raises:
        SlurmBusyError: the controller did not answer.
    """
    try:
        done = submit_somewhere([plan], to)
    except SlurmBusyError:
        raise
    except SlurmError as error:
        cause = f"sbatch refuses it everywhere; at last: {error}"
        point.folder.record_event("gave_up", waiting_since=since, cause=cause)
        return
    (job,) = done.jobs
    record_accepted(point, plan, job, done, console, moved=True)
    if point.is_cancelled:  # The job started at the moment of its move.
        job.kill()


def record_accepted(
    point: RunStatus, plan: Plan, job: SlurmJob, done: Submission, console: Console, **more: Any
) -> None:
    """Record and print that sbatch accepted ``job`` for a point, and at which candidates it was refused before.

    ``done`` has the accepting and the refusing candidates. ``more`` are further fields of the event ``submitted``.
    """
    point.job = job
    record_submitted(plan, job.job_id, done.candidate, **more)
    candidates = plan.placement.candidates
    for refused, why in done.refused.items():
        point.folder.record_event("refused", candidate=refused, cause=why)
        console.print(f"{point.name}: {candidates[refused].name} is skipped from now on: {why}")
    place = candidates[done.candidate].name
    console.print(f"{point.name}: job {job.job_id}" + (f" at {place}" if place else ""))


def has_left(job: SlurmJob) -> bool:
    """Cancel a pending job, and wait up to LEAVE_S seconds. Returns whether the job has then left the queue.

    False if the job has started meanwhile, or is still in the queue. Raises SlurmError if Slurm does not answer.
    """
    job.take_out()
    deadline = time.monotonic() + LEAVE_S
    while True:
        state = job.status(ask_queue([job]))
        if state.phase != "pending" and state.state != "COMPLETING":
            return state.state in ("GONE", "CANCELLED")
        if time.monotonic() > deadline:
            return False
        time.sleep(LEAVE_POLL_S)


def promised(point: RunStatus) -> Plan | None:
    """Return the plan with which a point may be submitted again: its own plan, or else the plan in its run folder.

    In this plan, the candidates that sbatch has refused are ruled out, and the hosts that failed in the run are
    excluded. None if there is no plan, or if no candidate is left. Raises ConfigError if the plan is damaged.
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
    """Record that a point started during its move and stays where it is. Does nothing if no move was recorded."""
    if last_placed(point.events()).get("event") in ("moved", "gave_up"):
        point.folder.record_event("stayed", cause="it has started meanwhile, or Slurm did not take it out of the queue")


def is_current(point: RunStatus) -> bool:
    """Return whether no other process has moved or cancelled the point since this process last read its state."""
    submitted = last_event(point.events(), "submitted")
    return not point.is_cancelled and point.job is not None and str(submitted["job_id"]) == point.job.job_id


@contextmanager
def claim(folder: RunFolder) -> Iterator[bool]:
    """Lock the run folder for a move during a ``with`` block. Yields False if another process has the lock."""
    path = folder.path / ".launch" / "moving"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_ours = True
        except OSError:
            is_ours = False
        yield is_ours


@contextmanager
def no_interrupt() -> Iterator[None]:
    """Delay Ctrl-C to the end of a ``with`` block, so that each job that sbatch accepts is recorded.

    If the user typed Ctrl-C during the block, KeyboardInterrupt is raised at its end. Ctrl-C does not end sbatch
    either, because its process inherits the signal mask.
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


# Further jobs of a run, which its agents submit (``launch.agent.outcome``). On a cluster that does not requeue jobs,
# the next job starts when the present job has ended. It has the resources of the first job, and continues the run in
# the same run folder. A spare job has one node, which joins the agents of the job.


def plan_of(folder: RunFolder) -> Plan:
    """Return the plan for a further job of a run, without refused candidates and failed hosts (``promised``).

    Raises:
        SlurmError: no candidate is left for the job.
        ConfigError: the plan of the run is damaged.
    """
    plan = promised(find_run_status(folder))
    if plan is None:
        raise SlurmError(f"{folder.plan} names no place for another job")
    return plan


def submit_next_job(folder: RunFolder, after: str) -> None:
    """Submit a job that continues a run after the job ``after``, and record it as ``next_job``.

    Raises:
        SlurmError: Slurm does not accept the job, or the controller does not answer.
    """
    plan = plan_of(folder)
    at = last_event(folder.read_events(), "submitted")["candidate"]
    done = submit_somewhere([depend(plan, f"afterany:{after}")], at)
    record_next_job(folder, done.jobs[0].job_id, after, done.candidate)


def submit_spare_job(folder: RunFolder, job_id: str, node: Node) -> None:
    """Submit a job of one node that joins the agents of the job ``job_id``, and record it as ``spare_job_submitted``.

    The spare job gets none of the hosts of ``job_id``. Its time limit is the time that ``job_id`` has left.

    Args:
        folder: the run folder.
        job_id: Slurm's id of the job.
        node: identity of the node that joins.

    Raises:
        SlurmError: sbatch refuses, or the controller does not answer.
    """
    plan, events = plan_of(folder), events_since_submission(folder.read_events())
    at = last_event(events, "submitted")["candidate"]
    avoid = plan.placement.exclude_hosts(sorted({*node.hosts, *hosts_to_avoid(events)}))
    resources = avoid.candidates[at].slurm
    end = job_details(job_id).end_time
    minutes = resources["time"] if end is None else max(1, math.ceil((end - time.time()) / 60))
    words = {
        key: value for key, value in resources["additional_parameters"].items() if key not in ("requeue", "no_kill")
    }
    asked = {**resources, "nodes": 1, "time": minutes, "additional_parameters": {**words, "no_requeue": True}}
    # In another folder than the pickles of the run's own jobs, by which the launcher finds a job that no event names.
    place = slurm_folder(plan.run_dir) / "spare_jobs"
    try:
        (job,) = submit_calls(place, asked, run_spare, [[plan.run_dir, msgspec.json.encode(node).decode()]])
    except FailedJobError as error:
        raise SlurmError(f"sbatch: {error}") from error
    folder.record_event("spare_job_submitted", job=node.job, node=node.index, job_id=job.job_id)


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Submit a further job of a run: the next job of a chain, or with ``--spare NODE`` a spare job.

    The arguments are the run folder and the id of the run's present job. Returns the exit status: 0, 1 if Slurm does
    not accept the job, 2 if the arguments are wrong.
    """
    parser = CommandParser(prog="launch.slurm.failover", description="Submit a further job of a run.")
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("job", metavar="JOB", help="the present job of the run")
    parser.add_argument("--spare", metavar="NODE", help="submit a spare job with this identity, as JSON")
    args = parser.parse_args(arguments)
    deny_others_writing()
    if args.spare is None:
        submit_next_job(RunFolder(args.run), args.job)
    else:
        submit_spare_job(RunFolder(args.run), args.job, msgspec.json.decode(args.spare, type=Node))
    return 0


if __name__ == "__main__":
    sys.exit(main())
