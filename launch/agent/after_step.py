"""The look of a batch script at its run after srun has failed: a run whose end nobody wanted goes back into the queue.

    python -m launch.agent.after_step STATUS RUN_DIR                STATUS: the exit status of srun
    python -m launch.agent.after_step STATUS FOLDER --submitit      FOLDER: submitit's, with the job's pickle

srun ends a step, agents included, where a node reboots before Slurm has called it down ("io error and missing step"),
and it can itself be killed, which leaves the agents at work. Owns telling these from an end that the agents have
brought about; what follows is decided as everywhere. Torch-free.
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
from launch.agent.main import on_event
from launch.agent.node import Node, RunContext
from launch.agent.outcome import apply_decision, cause_of_stop, requeue, wait_for_controller
from launch.agent.policy import WANTED, Action, Cause, RunFailedError, hosts_to_avoid, points_beside
from launch.config.compose import read_point
from launch.errors import CommandParser, refusing
from launch.runs.events import events_since_submission
from launch.runs.folder import RunFolder
from launch.slurm import client as scheduler

POLL_S = 1.0
KILLED = 128
"""Exit statuses above are those of a process that a signal has ended."""


def requeue_unless_ended(context: RunContext, status: int) -> int:
    """Requeue the job where its agents were killed in the middle, and return the exit status of the batch script.

    Raises:
        RunFailedError: the run ends here, and the event log has the reason.
    """
    folder, node = context.folder, context.node
    wait_for_agents(folder, node)
    events = events_of(folder, node)
    ends = [e for e in events if e["event"] == "attempt_ended"]
    if ends and ends[-1]["cause"] in WANTED:
        return 0
    action = pending_action(events, status)
    if action is None or not still_runs(folder, node):
        return status
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # comes with the requeue, and there is more to be done then
    if action is Action.requeue:  # decided by an agent that was killed before Slurm knew
        decided = next(e for e in reversed(events) if e["event"] == "decided")
        avoid = hosts_to_avoid(events, points_beside(folder))
        requeue(context, Cause(decided["cause"]), avoid)
        return status
    attempt, cause = cut_short(context, events)
    apply_decision(context, attempt, cause, f"srun ended with exit status {status}", in_step=False)
    return 0 if cause in WANTED else status


def wait_for_agents(folder: RunFolder, node: Node) -> None:
    """Wait while the head node's agent, which runs on this host, works on: Slurm's step needs no srun."""
    said = False
    while True:
        started = [e for e in events_of(folder, node) if e["event"] == "agent_started"]
        if not started or not is_alive(started[-1]):
            return
        if not said:
            folder.record_event("srun_lost", job=started[-1]["job"], cause="srun has ended, and the agents work on")
            said = True
        time.sleep(POLL_S)


def is_alive(started: dict[str, Any]) -> bool:
    """Tell whether the agent of an ``agent_started`` runs on this host."""
    pid = started["pid"]
    return not processes.is_gone(pid) and processes.start_time(pid) == started["pid_started"]


def events_of(folder: RunFolder, node: Node) -> list[dict[str, Any]]:
    """The events since the agents of this start of the job began; none where they did not."""
    events = events_since_submission(folder.read_events())
    this_start = node.job.rpartition("-")[0] + "-"  # without the step
    began = [i for i, e in enumerate(events) if e["event"] == "agent_started" and e["job"].startswith(this_start)]
    return events[began[-1] :] if began else []


def pending_action(events: Sequence[dict[str, Any]], status: int) -> Action | None:
    """Return the action left undone: ``requeue`` decided and not done, ``restart`` of a run in the middle, or None."""
    if not events:  # killed before they began; what they refuse themselves, they would refuse again
        return Action.restart if status > KILLED else None
    names = [e["event"] for e in events]
    decided = next((e for e in reversed(events) if e["event"] == "decided"), None)
    is_last = decided is not None and "started" not in names[events.index(decided) :]
    if "requeue_failed" in names:
        return None
    if decided is not None and is_last and decided["action"] != Action.restart:
        return Action.requeue if decided["action"] == Action.requeue else None
    return None if "agent_ended" in names else Action.restart


def still_runs(folder: RunFolder, node: Node) -> bool:
    """Tell whether Slurm leaves the job to this script: it was not cancelled, preempted or requeued meanwhile."""
    job = wait_for_controller(folder, lambda: scheduler.job_details(node.slurm_job))
    return job.state == "RUNNING" and job.restarts == node.restarts


def cut_short(context: RunContext, events: Sequence[dict[str, Any]]) -> tuple[int | None, Cause]:
    """The attempt that was killed, None where the ranks had not started, and the cause of its end."""
    names = {e["event"] for e in events}
    ended = {e["attempt"] for e in events if e["event"] == "attempt_ended"}
    running = [e["attempt"] for e in events if e["event"] == "started" and e["attempt"] not in ended]
    attempt = running[-1] if running else None
    if "budget_reached" in names:
        return attempt, Cause.budget
    by_hand = any(e["event"] == "cancelled" for e in context.events())
    if by_hand or "signalled" in names or "agent_stopped" in names:
        return attempt, cause_of_stop(context, attempt)
    return attempt, Cause.node_failed


def run_dir_of(folder: str, node: Node) -> str:
    """The run folder that submitit's pickle of this job, or of this element of an array, holds."""
    return str(DelayedSubmission.load(JobPaths(folder, node.slurm_job).submitted_pickle).args[0])


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status of the batch script: 0 where the run ended as it was meant to, else that of srun."""
    parser = CommandParser(
        prog="python -m launch.agent.after_step",
        description="After srun has failed in a batch script: put a run that should go on back into the queue.",
    )
    parser.add_argument("status", type=int, metavar="STATUS", help="the exit status of srun")
    parser.add_argument("folder", metavar="FOLDER", help="the folder of the run")
    parser.add_argument("--submitit", action="store_true", help="FOLDER is submitit's, where the job's pickle lies")
    args = parser.parse_args(arguments)
    node = Node.from_env(None)
    folder = RunFolder(Path(run_dir_of(args.folder, node) if args.submitit else args.folder).absolute())
    config = read_point(folder)
    try:
        with on_event(folder, config):
            return requeue_unless_ended(RunContext(folder, node, config), args.status)
    except (RunFailedError, scheduler.SlurmError) as error:
        print(error, file=sys.stderr)
        return args.status


if __name__ == "__main__":
    sys.exit(main())
