"""Further jobs of a run, which its agents submit (``launch.agent.outcome``).

On a cluster that does not requeue jobs, the next job starts when the present job has ended. It has the resources of the
first job, and continues the run in the same run folder. A spare job has one node, which joins the agents of the job.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec
from submitit.core.utils import FailedJobError

import gpt_launch.own_names  # noqa: F401
from gpt_launch.agent import run_spare
from launch.agent.node import Node
from launch.agent.policy import hosts_to_avoid
from launch.plan.plan import Plan, record_next_job
from launch.runs.events import events_since_submission, select_events
from launch.runs.folder import RunFolder, deny_others_writing
from launch.slurm.client import SlurmError, job_details
from launch.slurm.dependency import depend
from launch.slurm.failover import promised
from launch.slurm.jobs import slurm_folder
from launch.slurm.status import find_run_status
from launch.slurm.submit import submit_calls, submit_somewhere


def plan_of(folder: RunFolder) -> Plan:
    """Return the plan of a run for another job. Raises SlurmError if no candidate is left for the job."""
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
    at = select_events(folder.read_events(), "submitted")[-1]["candidate"]
    done = submit_somewhere([depend(plan, f"afterany:{after}")], at)
    record_next_job(folder, done.jobs[0].job_id, after, done.candidate)


def submit_spare_job(folder: RunFolder, job_id: str, node: Node) -> None:
    """Submit a job of one node that joins the agents of the job ``job_id``, and record it as ``spare_job_submitted``.

    The spare job gets none of that job's hosts. Its time limit is the time that is left to that job.

    Args:
        folder: the run folder.
        job_id: Slurm's id of the job.
        node: identity of the node that joins.

    Raises:
        SlurmError: sbatch refuses, or the controller does not answer.
    """
    plan, events = plan_of(folder), events_since_submission(folder.read_events())
    at = select_events(events, "submitted")[-1]["candidate"]
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


def main(arguments: Sequence[str] | None = None) -> None:
    """Submit a further job of a run. Ends with a message of Slurm, and exit status 1, if Slurm does not accept it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("job", metavar="JOB", help="the present job of the run")
    parser.add_argument("--spare", metavar="NODE", help="submit a spare job with this identity, as JSON")
    args = parser.parse_args(arguments)
    deny_others_writing()
    try:
        if args.spare is None:
            submit_next_job(RunFolder(args.run), args.job)
        else:
            submit_spare_job(RunFolder(args.run), args.job, msgspec.json.decode(args.spare, type=Node))
    except SlurmError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
