"""The batch script of a job, and private parts of submitit behind one door: its text, and the process of a local job.

submitit has no public way to see a script without submitting it. A test compares what is used here with the installed
version; where it fails after an update, this is the file to change.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from submitit.slurm.slurm import _make_sbatch_string

from launch.jobs.handles import slurm_folder
from launch.plan.placement import cluster_of
from launch.plan.plan import Plan

SUBMISSION = "submitit.core._submit"
"""Module that submitit's batch scripts run on every node."""
AFTER_STEP = "launch.agent.after_step"
"""Module that they run where srun has failed."""


def batch_parameters(plan: Plan) -> dict[str, Any]:
    """Parameters of submitit for a job: the plan's resources, and lines that look at the run where srun has failed.

    A user's own ``set -e`` must not skip those, and a trap would take the place of a user's own.
    """
    python, folder = shlex.quote(sys.executable), shlex.quote(str(jobs_folder(plan)))
    after = f'{python} -m {AFTER_STEP} "$status" {folder} --submitit'
    setup = [*plan.slurm.get("setup", []), "set +e"]
    return {**plan.slurm, "setup": setup, "teardown": ["status=$?", f'[ "$status" -eq 0 ] || exec {after}']}


def sbatch_text(plans: Sequence[Plan]) -> str:
    """The batch script that submitit writes for plans of one shape. Needs no Slurm."""
    folder = jobs_folder(plans[0])
    parameters = batch_parameters(plans[0])
    python = parameters.pop("python", None) or shlex.quote(sys.executable)
    command = f"{python} -u -m {SUBMISSION} {shlex.quote(str(folder))}"
    count = len(plans) if len(plans) > 1 else None
    text = _make_sbatch_string(command=command, folder=folder, map_count=count, **parameters)
    assert isinstance(text, str)
    return text


def jobs_folder(plan: Plan) -> Path:
    """Folder of submitit's files of a job."""
    return slurm_folder(plan.run_dir, cluster_of(plan.slurm))


def controller_process(job: Any) -> subprocess.Popen[bytes]:
    """The controller of a local job, which its parent has to wait for to see it end."""
    process = job._process
    assert isinstance(process, subprocess.Popen)
    return process
