"""Start of a run's agents as a step of a Slurm job that was not submitted for this run alone.

The job is the user's own (``launch.slurm.allocation``), or that of several points (``cluster.points_per_job``).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch.agent.node import OWNER, SHARES_JOB, TOKEN
from launch.config.compose import read_point
from launch.plan.placement import agent_words
from launch.process import share
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


def take_part(run_dirs: Sequence[str]) -> str:
    """Return the run folder of this task. If several points share the job, take this task's part of the node.

    The process binds itself to its part of the job's CPUs, and its environment describes a job with this part alone.
    """
    if len(run_dirs) == 1:
        return run_dirs[0]
    env, parts = os.environ, len(run_dirs)
    part = int(env["SLURM_PROCID"])
    cpus = sorted(os.sched_getaffinity(0))
    # Where Slurm does not confine jobs to CPUs, another job on the node would bind itself to the same CPUs.
    if len(cpus) <= int(env["SLURM_CPUS_ON_NODE"]):
        os.sched_setaffinity(0, share(cpus, part, parts) or cpus)
    env |= {"SLURM_PROCID": "0", "SLURM_NTASKS": "1", SHARES_JOB: "1"}
    if gpus := env.get("CUDA_VISIBLE_DEVICES"):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(share(gpus.split(","), part, parts))
    for name in ("SLURM_CPUS_ON_NODE", "SLURM_MEM_PER_NODE"):
        if whole := env.get(name):
            env[name] = str(max(1, int(whole) // parts))
    return run_dirs[part]
