"""What one point asks of Slurm at each of its places, and what it uses there at worst.

Owns the translation from our keys to submitit's. Pure functions of the config; asks no Slurm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from launch.config import Config
from launch.plan import code_copy as snapshot
from launch.plan import placement
from launch.plan.budget import Use, use_of
from launch.plan.placement import Candidate, Placement


def place(config: Config, code: Path | None = None) -> Placement:
    """The candidates of ``cluster.placement``, each with what is asked there; without a list the cluster itself.

    ``code`` is the copy of the code that the job runs from, if it runs from one.
    """
    candidates = [
        Candidate(name, slurm_resources(there, code), placement.gpus_of(there), there.cluster.price_per_gpu_hour)
        for name, there in placement.configs(config)
    ]
    cluster = config.cluster
    return Placement(tuple(candidates), cluster.retry_interval_min, cluster.give_up_after_min)


def slurm_resources(config: Config, code: Path | None) -> dict[str, Any]:
    """What is asked of Slurm for this point, in the words of submitit's Slurm executor. One task a node: the agent."""
    cluster = config.cluster
    # Since Slurm 22.05 srun does not take --cpus-per-task over from sbatch, and the agent could be left with one CPU.
    srun_args = [f"--cpus-per-task={cluster.cpus_per_task}"] if cluster.cpus_per_task else []
    # A node that is lost must not take the others, and with them the spare that would replace it.
    srun_args += ["--no-kill", "--kill-on-bad-exit=0", "--wait=0"] if config.spares else []
    srun_args += cluster.srun_args
    asked: dict[str, Any] = {
        "job_name": config.name,
        "nodes": config.nodes_asked,
        "ntasks_per_node": 1,
        "time": cluster.timeout_min,
        "signal_delay_s": cluster.signal_delay_s,
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "exclude": cluster.exclude,
        "gres": cluster.gres,
        "gpus_per_node": cluster.gpus_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "mem": f"{round(cluster.mem_gb * 1000)}MB" if cluster.mem_gb else None,
        "comment": cluster.comment,
        "array_parallelism": cluster.array_parallelism,
        "setup": [*cluster.setup, *(snapshot.shell_lines(code) if code else [])] or None,
        "srun_args": srun_args or None,
        "additional_parameters": {
            "requeue" if config.resilience.requeue else "no_requeue": True,
            **({"no_kill": True} if config.spares else {}),
            **({"clusters": cluster.cluster} if cluster.cluster else {}),
            **cluster.additional_parameters,
        },
    }
    return {key: value for key, value in asked.items() if value is not None}


def worst_case(placed: Placement, nodes: int, timeout_min: int) -> Use:
    """What one start of the job uses at most: all nodes, to the time limit, where that is most."""
    hours = timeout_min / 60
    uses = [use_of(hours, nodes, c.gpus, c.price_per_gpu_hour) for c in placed.candidates if not c.never]
    gpu_hours = [use.gpu_hours for use in uses if use.gpu_hours is not None]
    costs = [use.cost for use in uses if use.gpu_hours is not None]
    known = [cost for cost in costs if cost is not None]
    return Use(hours * nodes, max(gpu_hours, default=None), max(known) if known and len(known) == len(costs) else None)
