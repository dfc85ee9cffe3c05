"""Requeue a run that a fault interrupted. The batch script calls this module after srun has failed.

    python -m launch.agent.after_step STATUS RUN_DIR              STATUS: the exit status of srun
    python -m launch.agent.after_step STATUS FOLDER --submitit    FOLDER: submitit's folder with the job's pickle

Slurm ends a step with its agents if a node reboots before Slurm has declared it DOWN ("io error and missing step").
srun itself can also be killed; the agents then continue. If the agents have decided on the end, this module requeues
nothing. The module does not import torch.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.core.utils import DelayedSubmission, JobPaths

from launch.agent.__main__ import on_event
from launch.agent.node import Node, RunContext, is_gone, start_time
from launch.agent.outcome import (
    apply_decision,
    cut_short,
    events_of,
    pending_action,
    requeue_job,
    wait_for_controller,
)
from launch.agent.policy import WANTED, Action, Cause, RunFailedError, has_stopped, hosts_to_avoid
from launch.config.compose import read_point
from launch.errors import CommandParser, refusing
from launch.plan.budget import last_heartbeat
from launch.runs.events import last_event, select_events
from launch.runs.folder import RunFolder
from launch.slurm import client as scheduler

POLL_S = 1.0


def requeue_unless_ended(context: RunContext, status: int) -> int:
    """Requeue the job if its agents were killed before the run ended. Returns the exit status of the batch script.

    The result is 0 if the run has finished, or was stopped by a user or a budget; else ``status``, the exit status of
    srun.

    Raises:
        RunFailedError: the run has failed and does not start again. The event log has the reason.
        SlurmError: Slurm's controller does not know the job, or did not answer for hours.
    """
    folder, node = context.folder, context.node
    events = events_of(folder, node)
    if not events and has_stopped(context.events()):  # The run stopped in an earlier start of this shared job.
        return 0
    if last_event(events, "attempt_ended").get("cause") in WANTED:
        return 0
    action = pending_action(events, status)
    if action is None:
        return status
    job = wait_for_controller(context, lambda: scheduler.job_details(node.slurm_job))
    if not job.is_running or job.restarts != node.restarts:  # cancelled, preempted or requeued meanwhile
        return status
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Slurm's requeue sends it, and more events follow.
    if action is Action.requeue:  # An agent decided this, and was killed before Slurm received its request.
        requeue_job(context, Cause(last_event(events, "decided")["cause"]), hosts_to_avoid(events))
        return status
    attempt, cause = cut_short(context, events)
    apply_decision(context, attempt, cause, f"the agents' starter ended with exit status {status}", step_has_ended=True)
    return 0 if cause in WANTED else status


def wait_for_agents(context: RunContext) -> None:
    """Wait, without a limit, until the agent of the head node has ended.

    If srun was killed, Slurm's step with the agents can still run.
    """
    is_recorded = False
    while True:
        events = events_of(context.folder, context.node)
        started = last_event(events, "agent_started", "head_replaced")
        if not started or not is_alive(context, started, events):
            return
        if not is_recorded:
            cause = "srun has ended, and the agents continue"
            context.record("srun_lost", job=started["job"], cause=cause)
            is_recorded = True
        time.sleep(POLL_S)


def is_alive(context: RunContext, last: dict[str, Any], events: Sequence[dict[str, Any]]) -> bool:
    """Return whether the agent of the newest head node still runs.

    The first head node of a job is this host, so this function looks for the process of the agent. A later head node is
    another host. Its agent counts as ended after ``resilience.rendezvous_timeout_s`` without a heartbeat.

    Args:
        context: run and node.
        last: newest event about the agent of the head node: ``agent_started`` or ``head_replaced``.
        events: all events of this start of the job.
    """
    if last["event"] == "head_replaced":
        seen = max(last["time"], last_heartbeat(context.folder) or 0.0)
        is_silent = time.time() - seen > context.config.resilience.rendezvous_timeout_s
        return not is_silent and not select_events(events, "agent_ended")
    pid = last["pid"]
    return not is_gone(pid) and start_time(pid) == last["pid_started"]


def submitted_run_dirs(folder: str, node: Node) -> list[str]:
    """Return the run folders that submitit's pickle of this job, or of this element of a job array, names.

    ``folder`` is submitit's folder with the pickle.
    """
    return [*DelayedSubmission.load(JobPaths(folder, node.slurm_job).submitted_pickle).args]


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Requeue each run of the job that should continue. Returns the exit status of the batch script.

    The result is 0 if each run has finished, or was stopped by a user or a budget; else the exit status of srun.
    """
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
    contexts = [RunContext(folder, node, read_point(folder)) for folder in folders]
    for context in contexts:  # All agents of a job save before a requeue ends the last of them.
        wait_for_agents(context)
    statuses = []
    for context in contexts:
        try:
            with on_event(context):
                statuses.append(requeue_unless_ended(context, args.status))
        except (RunFailedError, scheduler.SlurmError) as error:
            print(error, file=sys.stderr)
            statuses.append(args.status)
    return max(statuses)


if __name__ == "__main__":
    sys.exit(main())
