"""Runs on nodes that the user already has: those of a Slurm job, as in a shell of salloc, or the hosts of a hostfile.

The points run one after another. In a job, each point is a step of the job. A process of submitit on this machine
starts the agents of a point, so that status and cancel work as for a local run.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from launch.agent.hosts import check_hosts, hosts_of, read_hostfile
from launch.config import Config
from launch.errors import ConfigError, counted
from launch.slurm import client as scheduler
from launch.slurm.limits import gres


def held_job() -> str | None:
    """Return the id of the Slurm job that this process runs in; None outside of a job, and in the rank of a run."""
    return None if "LAUNCH_AGENT_PID" in os.environ else os.environ.get("SLURM_JOB_ID")


FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Step ids from here on are of batch scripts and of the shells of salloc, which hold no resources (slurm.h)."""


def is_in_step() -> bool:
    """Return whether this process runs in a step of its job, as under ``srun --pty bash``.

    Such a step occupies the CPUs that the steps of the points need.
    """
    return int(os.environ.get("SLURM_STEP_ID", FIRST_SPECIAL_STEP)) < FIRST_SPECIAL_STEP


def fit_job(config: Config) -> str:
    """Change the config of a point so that the point fits the job that this process runs in.

    The point gets the GPUs of the job's nodes, and the time that the job has left. It is not requeued.

    Returns:
        Description of the job for people.

    Raises:
        ConfigError: this process runs in no job, the job has too few nodes, or Slurm does not describe the job.
    """
    job = held_job()
    if job is None:
        raise ConfigError(
            "cluster.kind=allocation outside of a Slurm job", "a shell of salloc, or a batch script", "cluster=slurm"
        )
    try:
        fields = scheduler.job_fields(job)
    except scheduler.SlurmError as error:
        raise ConfigError(
            f"job {job}, and Slurm does not describe it: {error}",
            "a controller that answers",
            "the same command when scontrol ping says UP",
        ) from error
    nodes, ends = int(fields["NumNodes"].split("-")[0]), scheduler.unix_time(fields.get("EndTime", ""))
    if config.nodes_asked > nodes:
        spares = f" spare_nodes={config.spare_nodes}" if config.spare_nodes else ""
        raise ConfigError(
            f"nodes={config.nodes}{spares} inside job {job}, which has {counted(nodes, 'node')}",
            "at most the nodes of the job in which this command runs",
            f"nodes={max(1, nodes - config.spare_nodes)}; or cluster=slurm, which submits another job",
        )
    refuse_without_srun(config)
    if config.cluster.gpus_per_node is None:
        asked = fields.get("TresPerNode", "").replace("gres:", "gres/")
        config.cluster.gpus_per_node = sum(part.count for part in gres(asked) if part.name == "gpu") or None
    left_min = config.cluster.timeout_min if ends is None else max(1, int((ends - time.time()) // 60))
    config.cluster.timeout_min, config.cluster.placement = left_min, []
    config.resilience.requeue = False
    return f"inside job {job}: {counted(nodes, 'node')}, {left_min} min left; cluster=slurm submits another job"


def fit_hosts(config: Config) -> str:
    """Set the ranks per node of a point to the smallest number of slots of its hosts, unless the config sets them.

    Returns:
        Description of the hosts for people.

    Raises:
        ConfigError: the hostfile is wrong or has too few hosts, or a host cannot take part.
    """
    if config.ranks_per_node is None and config.cluster.gpus_per_node is None:
        slots = list(read_hostfile(config).values())[: config.nodes_asked]
        config.ranks_per_node = min(slots, default=0) or None
    hosts = hosts_of(config)
    if not config.dry_run:
        check_hosts(hosts, Path(config.run_dir or config.output_dir).absolute())
    return f"on {', '.join(hosts)}, by ssh: {counted(config.ranks_on_node, 'rank')} on each"


def refuse_without_srun(config: Config) -> None:
    """Raise ConfigError if srun does not start the agents, by the config of a run inside the user's own job."""
    if not config.cluster.by_srun:
        raise ConfigError(
            "cluster.start or cluster.hostfile in a batch script of your own, or cluster.start in a job that you hold",
            "srun, or the hosts of a file",
            "scontrol show hostnames > hosts; then python -m launch cluster=local cluster.hostfile=hosts ...",
        )
