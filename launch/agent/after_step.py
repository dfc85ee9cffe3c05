"""Requeue from the batch script after srun has failed: a run that a fault interrupted is requeued.

    python -m launch.agent.after_step STATUS RUN_DIR              STATUS: the exit status of srun
    python -m launch.agent.after_step STATUS FOLDER --submitit    FOLDER: submitit's, with the job's pickle

Slurm ends a step with its agents if a node reboots before Slurm has declared it DOWN ("io error and missing step").
srun itself can also be killed; the agents then continue. This module distinguishes both cases from an end that
the agents have decided. It does not import torch.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, JobPaths

from launch.agent import node as processes
from launch.agent.__main__ import on_event
from launch.agent.node import Node, RunContext
from launch.agent.outcome import apply_decision, cause_of_stop, requeue_job, wait_for_controller
from launch.agent.policy import WANTED, Action, Cause, RunFailedError, has_stopped, hosts_to_avoid, open_attempts
from launch.config import CHAIN
from launch.config.compose import read_point
from launch.errors import CommandParser, refusing
from launch.runs.events import events_since_submission, select_events
from launch.runs.folder import RunFolder
from launch.slurm import client as scheduler

POLL_S = 1.0
KILLED = 128
"""Exit statuses above this value mean that a signal has ended the process."""


def requeue_unless_ended(context: RunContext, status: int) -> int:
    """Requeue the job if its agents were killed before the run ended. Returns the exit status of the batch script.

    Raises:
        RunFailedError: the run ends here, and the event log has the reason.
    """
    folder, node = context.folder, context.node
    events = events_of(folder, node)
    if not events and has_stopped(context.events()):  # in an earlier start of a job that several points share
        return 0
    ends = select_events(events, "attempt_ended")
    if ends and ends[-1]["cause"] in WANTED:
        return 0
    action = pending_action(events, status)
    if action is None:
        return status
    job = wait_for_controller(folder, lambda: scheduler.job_details(node.slurm_job))
    if not job.is_running or job.restarts != node.restarts:  # cancelled, preempted or requeued meanwhile
        return status
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm's requeue sends it, and more events follow.
    if action is Action.requeue:  # An agent decided this, and was killed before Slurm received its request.
        decided = select_events(events, "decided")[-1]
        requeue_job(context, Cause(decided["cause"]), hosts_to_avoid(events))
        return status
    attempt, cause = cut_short(context, events)
    apply_decision(context, attempt, cause, f"the agents' starter ended with exit status {status}", step_has_ended=True)
    return 0 if cause in WANTED else status


def wait_for_agents(folder: RunFolder, node: Node) -> None:
    """Wait until the head node's agent on this host has ended. Slurm's step can continue after srun was killed."""
    is_recorded = False
    while True:
        started = select_events(events_of(folder, node), "agent_started")
        if not started or not is_alive(started[-1]):
            return
        if not is_recorded:
            folder.record_event("srun_lost", job=started[-1]["job"], cause="srun has ended, and the agents continue")
            is_recorded = True
        time.sleep(POLL_S)


def is_alive(started: dict[str, Any]) -> bool:
    """Return whether the agent of an event ``agent_started`` still runs on this host."""
    pid = started["pid"]
    return not processes.is_gone(pid) and processes.start_time(pid) == started["pid_started"]


def events_of(folder: RunFolder, node: Node) -> list[dict[str, Any]]:
    """Return the events since the agents of this start of the job began; empty if the agents did not begin."""
    events = events_since_submission(folder.read_events())
    this_start = node.job.rpartition("-")[0] + "-"  # The agents of a batch script without a step have no such event.
    began = [e for e in select_events(events, "agent_started") if e["job"].startswith(this_start)]
    return events[events.index(began[-1]) :] if began else []


def pending_action(events: Sequence[dict[str, Any]], status: int) -> Action | None:
    """Return the action that is still to be done after the agents have ended; None if there is none.

    It is ``requeue`` if an agent decided to requeue the job, but did not. It is ``restart`` if the agents were killed
    before they decided.

    Args:
        events: events since the agents of this start of the job began.
        status: exit status of srun, or of ``launch.agent.hosts``.
    """
    if not events:  # The job was killed before the agents began. A refusal by the agents would come again.
        return Action.restart if status > KILLED else None
    if select_events(events, "requeue_failed") or select_events(events, "requeued", by=CHAIN):
        return None
    last = [{}, *select_events(events, "decided", "started")][-1]
    if last.get("action", Action.restart) != Action.restart:  # "started" has no action
        return Action.requeue if last["action"] == Action.requeue else None
    return None if select_events(events, "agent_ended") else Action.restart


def cut_short(context: RunContext, events: Sequence[dict[str, Any]]) -> tuple[int | None, Cause]:
    """Return the number of the killed attempt (None if no ranks had started) and the cause of its end."""
    attempt = ([None, *open_attempts(events)])[-1]
    if select_events(events, "budget_reached"):
        return attempt, Cause.budget
    if context.events("cancelled") or select_events(events, "signalled", "agent_stopped"):
        return attempt, cause_of_stop(context, attempt)
    return attempt, Cause.node_failed


def submitted_run_dirs(folder: str, node: Node) -> list[str]:
    """Return the run folders from submitit's pickle of this job, or of this element of a job array."""
    return [*DelayedSubmission.load(JobPaths(folder, node.slurm_job).submitted_pickle).args]


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Return the exit status of the batch script: 0 if the run ended as requested, else the exit status of srun."""
    parser = CommandParser(
        prog="python -m launch.agent.after_step",
        description="After srun has failed in a batch script: requeue a run that should continue.",
    )
    parser.add_argument("status", type=int, metavar="STATUS", help="the exit status of srun")
    parser.add_argument("folder", metavar="FOLDER", help="the folder of the run")
    parser.add_argument("--submitit", action="store_true", help="FOLDER is submitit's folder with the job's pickle")
    args = parser.parse_args(arguments)
    node = Node.from_env()
    run_dirs = submitted_run_dirs(args.folder, node) if args.submitit else [args.folder]
    folders = [RunFolder(Path(run_dir).absolute()) for run_dir in run_dirs]
    for folder in folders:  # All agents of a job save before a requeue ends the last of them.
        wait_for_agents(folder, node)
    statuses = [end_of_run(RunContext(folder, node, read_point(folder)), args.status) for folder in folders]
    return max(statuses)


def end_of_run(context: RunContext, status: int) -> int:
    """Requeue the job of a run that should continue, and return the exit status of the batch script for this run."""
    try:
        with on_event(context):
            return requeue_unless_ended(context, status)
    except (RunFailedError, scheduler.SlurmError) as error:
        print(error, file=sys.stderr)
        return status


if __name__ == "__main__":
    sys.exit(main())
