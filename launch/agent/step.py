"""Start of a run's agents as a step of a Slurm job that the user holds (``launch.slurm.allocation``)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from launch.agent.node import OWNER, TOKEN
from launch.config.compose import read_point
from launch.plan.placement import agent_words
from launch.runs.folder import RunFolder
from launch.slurm import client as scheduler

OF_THIS_PROCESS = (TOKEN, OWNER, "CUDA_VISIBLE_DEVICES")
"""Variables of the process that starts a step. They mean nothing on the nodes of the step."""


def run_step(run_dir: str, job: str, shares: bool) -> None:
    """Run the agents of a run as a step of a job, and pass each SIGTERM on to them. Returns when the step has ended.

    Args:
        run_dir: folder of the run.
        job: id of the job.
        shares: True to share CPUs and GPUs with other steps; False to wait until no other step uses them.
    """
    config = read_point(RunFolder(run_dir))
    name = f"launch-{os.getpid()}"
    words = ["srun", f"--jobid={job}", f"--job-name={name}", f"--nodes={config.nodes_asked}", "--ntasks-per-node=1"]
    # The agent is the only task of a node, and uses all CPUs of the job there.
    words += ["--overlap"] if shares else []
    words += ["--cpu-bind=none", "--kill-on-bad-exit=0", "--no-kill", "--wait=0", *config.cluster.srun_args]
    words += agent_words(config.cluster, Path.cwd(), Path(run_dir), python=sys.executable)
    env = {
        key: value
        for key, value in os.environ.items()
        if key not in OF_THIS_PROCESS and not key.startswith("SUBMITIT_")
    }
    process = subprocess.Popen(words, env=env, stdin=subprocess.DEVNULL, start_new_session=True)

    def pass_on(*_: object) -> None:
        steps = scheduler.run("squeue", "--steps", "--noheader", "--format=%i %j", "--jobs", job).splitlines()
        mine = [step.split()[0] for step in steps if step.split()[1:] == [name]]
        if mine:
            scheduler.scancel(mine[0], "--signal=TERM")
        else:  # srun still waits for the nodes
            process.terminate()

    signal.signal(signal.SIGTERM, pass_on)
    if process.wait():
        raise SystemExit(f"srun left with status {process.returncode}")
