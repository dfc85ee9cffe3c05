"""Chain of jobs: submit the next job of a run, which starts when the present one has ended.

The agents of a run start this module on a cluster that does not requeue jobs (``launch.agent.outcome``). The next job
has the resources of the first one, and continues the run in the same run folder.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import gpt_launch.own_names  # noqa: F401
from launch.plan.plan import record_next_job
from launch.runs.events import select_events
from launch.runs.files import deny_others_writing
from launch.runs.folder import RunFolder
from launch.slurm.client import SlurmError
from launch.slurm.dependency import depend
from launch.slurm.failover import promised
from launch.slurm.status import find_run_status
from launch.slurm.submit import submit_somewhere


def submit_next_job(folder: RunFolder, after: str) -> None:
    """Submit a job that continues a run after the job ``after``, and record it as ``next_job``. Raises SlurmError."""
    plan = promised(find_run_status(folder))
    if plan is None:
        raise SlurmError(f"{folder.plan} names no place for another job")
    at = select_events(folder.read_events(), "submitted")[-1]["candidate"]
    done = submit_somewhere([depend(plan, f"afterany:{after}")], at)
    record_next_job(folder, done.jobs[0].job_id, after, done.candidate)


def main(arguments: Sequence[str] | None = None) -> None:
    """Submit the next job of a run. Ends with a message of Slurm, and exit status 1, if Slurm does not accept it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run folder")
    parser.add_argument("job", metavar="JOB", help="the job after which the next one starts")
    args = parser.parse_args(arguments)
    deny_others_writing()
    try:
        submit_next_job(RunFolder(args.run), args.job)
    except SlurmError as error:
        raise SystemExit(str(error)) from error


if __name__ == "__main__":
    main()
