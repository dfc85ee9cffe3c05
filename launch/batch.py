"""Preparation of a run inside a job that the launcher of this project has not submitted.

Such a job runs the user's own batch script, or was started by another launcher plugin of Hydra, such as submitit.

    python -m launch.batch KEY=VALUE ...                 in a batch script: plans for its nodes, prints the run folder
    python -m launch.batch --nodes 2 KEY=VALUE ...       before sbatch: plans for two nodes, prints the run folder
    python -m launch.batch --submitted FOLDER JOB        after sbatch: records the job, so that status shows the run

The module makes the run folder; the agents then run as in any other job.
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

import gpt_launch.own_names  # noqa: F401
from gpt_launch.agent import run as run_agent
from launch.agent.node import Node
from launch.config import CHAIN, ClusterKind, Config
from launch.config.compose import compose_launch, read_point, require_config_dir, typed_config
from launch.errors import CommandParser, ConfigError, refusing
from launch.plan.placement import agent_words
from launch.plan.plan import Plan, is_recorded, make_plan, record_found, record_submitted, write_run
from launch.plan.preflight import plan_text
from launch.runs.folder import RunFolder, deny_others_writing
from launch.runs.overrides import typed_value, without_key
from launch.slurm import client as scheduler
from launch.slurm import limits
from launch.slurm.jobs import refuse_running
from launch.slurm.resolve import choose_gpus, refuse_without_srun, says_gpus

PLAN_TIMEOUT_S = 300.0
"""Longest wait in seconds for the plan that the first task of a job writes. Tasks of one job start within minutes."""
PLAN_POLL_S = 0.2


def job_overrides(overrides: Sequence[str], job: Mapping[str, str]) -> list[str]:
    """Return the overrides with the nodes and GPUs of the job added.

    Args:
        overrides: overrides as typed.
        job: Slurm's environment variables of the job, by name.

    Raises:
        ConfigError: this is no Slurm job, or ``nodes`` contradicts the job.
    """
    nodes = job.get("SLURM_JOB_NUM_NODES")
    if nodes is None:
        raise ConfigError(
            "no SLURM_JOB_NUM_NODES in the environment", "to run inside a Slurm job", "sbatch slurm/multi_node.sh ..."
        )
    args = list(overrides)
    if "SLURM_RESTART_COUNT" in job:  # A requeued job continues in the folder of its first start.
        args = [arg for arg in without_key(args, "resume_from") if arg.lstrip("+") != "fresh=true"]
    spares = typed_value(args, "spare_nodes") or "0"
    used = str(int(nodes) - int(spares)) if spares.isdigit() else nodes
    typed = typed_value(args, "nodes")
    if typed is None:
        args.append(f"nodes={used}")
    elif typed != used:
        raise ConfigError(
            f"nodes={typed} spare_nodes={spares} in a job of {nodes} nodes",
            "as many nodes in all",
            f"sbatch --nodes={int(typed) + int(spares) if (typed + spares).isdigit() else typed} ...",
        )
    gpus = job.get("SLURM_GPUS_ON_NODE")
    if gpus and typed_value(args, "cluster.gpus_per_node") is None:
        args.append(f"cluster.gpus_per_node={gpus}")
    return args


def make_run_in_job(
    overrides: Sequence[str],
    config_dir: Path | None = None,
    job: Mapping[str, str] = os.environ,
    *,
    ahead: bool = False,
) -> Plan:
    """Plan a run for the nodes of a job and write its folder. Returns the plan.

    Args:
        overrides: overrides as typed.
        config_dir: folder of the user's own config files; None if there is none.
        job: Slurm's environment variables of the job, by name; by default those of this process.
        ahead: True if the job is not submitted yet.

    Raises:
        ConfigError: the run cannot work, or another job works on it.
    """
    args = job_overrides(overrides, job)
    composed = compose_launch(args, config_dir)
    if not ahead and typed_value(args, "cluster.timeout_min") is None:
        with suppress(scheduler.SlurmError):  # sbatch's --time sets the limit, not a key of the run.
            limit_s = scheduler.job_details(job["SLURM_JOB_ID"]).time_limit_s
            composed.cluster.timeout_min = math.ceil(limit_s / 60) if limit_s else composed.cluster.timeout_min
    config = typed_config(composed)
    refuse_snapshot(config)
    refuse_without_srun(config)
    if config.resilience.requeue == CHAIN:
        raise ConfigError(
            f"resilience.requeue={CHAIN} inside a job of your own",
            "python -m launch, which knows what to ask for the next job of the run",
            f"python -m launch ... resilience.requeue={CHAIN}; or resilience.requeue=true",
        )
    config.cluster.placement = []  # The job already has its nodes.
    refuse_idle_gpus(config, job)
    plan = make_plan(config, args, ClusterKind.slurm)
    if ahead:
        refuse_running(plan)
    elif plan.goes_on.back_to is not None:
        refuse_running(plan, own=job["SLURM_JOB_ID"])
    write_run(plan, composed, args)
    if not ahead and "SLURM_RESTART_COUNT" not in job:
        record_submitted(plan, job["SLURM_JOB_ID"])
    return plan


def refuse_idle_gpus(config: Config, job: Mapping[str, str]) -> None:
    """Raise ConfigError if the job requests no GPUs although every node of its partition has GPUs."""
    is_open = config.launch.check_limits and not says_gpus(config)
    if not is_open or limits.torch_version().endswith("+cpu"):
        return
    partition = job.get("SLURM_JOB_PARTITION") or job.get("SBATCH_PARTITION")
    cluster = replace(config.cluster, partition=partition, constraint=None)
    number, _ = choose_gpus(replace(config, cluster=cluster), limits.ask_slurm())
    if number is not None:
        raise ConfigError(
            f"a job without GPUs, on nodes that all have {number} or more",
            "GPUs that the job requests, one rank on each: without them the ranks compute on CPUs",
            f"sbatch --gpus-per-node={number} ..., as before; or cluster.gpus_per_node=0, for CPUs",
        )


def refuse_snapshot(config: Config) -> None:
    """Raise ConfigError if the config requests a copy of the code, which only a submission by the launcher makes."""
    if config.copy_code:
        raise ConfigError(
            "copy_code=true inside a job",
            "python -m launch, which copies the code when it submits; a job without a copy runs the code of its start",
            "python -m launch ... copy_code=true; or require_same_code=true, to refuse code that has changed",
        )


def run_task(composed: DictConfig) -> None:
    """Run the agent of one node for the config ``composed``. This process is a task of another Hydra launcher's job.

    Raises:
        ConfigError: that launcher has started more or fewer tasks than the run has nodes.
    """
    deny_others_writing()
    config = typed_config(composed)
    refuse_snapshot(config)
    node = Node.from_env()
    asked = config.nodes_asked
    if node.count != asked:
        raise ConfigError(
            f"nodes={config.nodes} spare_nodes={config.spare_nodes}, and the launcher started {node.count} tasks",
            "one task, the agent, for each node",
            f"nodes={node.count - config.spare_nodes}, or hydra.launcher.nodes={asked} hydra.launcher.tasks_per_node=1 "
            f"(submitit_local: hydra.launcher.tasks_per_node={asked})",
        )
    output = Path(HydraConfig.get().runtime.output_dir)
    composed.run_dir = str(output)
    kind = ClusterKind.slurm if node.is_slurm else ClusterKind.local
    args = HydraConfig.get().overrides.task
    plan = make_plan(typed_config(composed), args, kind)
    if node.index == 0:
        write_run(plan, composed, args)
    else:
        wait_for_plan(RunFolder(output))
    run_agent(str(output))


def wait_for_plan(folder: RunFolder, timeout_s: float = PLAN_TIMEOUT_S) -> None:
    """Wait at most ``timeout_s`` seconds until the first task of the job has written the run folder.

    ``plan.json`` is the last file of the run folder that the first task writes.

    Raises:
        ConfigError: there is no plan in time, because the first task refused the run, or because the nodes do not share
            the folder.
    """
    deadline = time.monotonic() + timeout_s
    while not folder.plan.exists():
        if time.monotonic() > deadline:
            raise ConfigError(
                f"no {folder.plan} after {timeout_s:g} s",
                "the plan that the job's first task writes, in a folder that all nodes share",
                "hydra.sweep.dir=FOLDER, one that all nodes share; the log of the first task has the reason",
            )
        time.sleep(PLAN_POLL_S)


@refusing
def main() -> int:
    """Plan a run for a job, and print the run folder on standard output. Without ``--nodes``, also print the plan.

    The plan goes to standard error. With ``--submitted``, the command plans nothing, but records jobs in their run
    folders. With ``--agent-command``, it plans nothing, but prints what srun starts on each node, one word a line.
    Returns the exit status: 0, or 2 if the run is refused.
    """
    deny_others_writing()
    parser = CommandParser(prog="python -m launch.batch", description="Plan a run for the nodes of this Slurm job.")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for python -m launch")
    parser.add_argument("--config-dir", "-cd", metavar="FOLDER", help="as for python -m launch")
    parser.add_argument("--nodes", metavar="N", help="nodes of a job that is not submitted yet, in place of this job")
    parser.add_argument("--gpus-per-node", metavar="N", help="GPUs of that job; default: none")
    parser.add_argument(
        "--submitted",
        nargs=2,
        action="append",
        metavar=("FOLDER", "JOB"),
        help="record a waiting job in its run folder",
    )
    parser.add_argument(
        "--agent-command", metavar="FOLDER", help="print what srun starts on each node for a run, a word a line"
    )
    words = parser.parse_intermixed_args()
    if words.agent_command:
        run = RunFolder(Path(words.agent_command).absolute())
        print(*agent_words(read_point(run).cluster, Path.cwd(), run.path), sep="\n")
        return 0
    if words.submitted:
        for run_dir, job_id in words.submitted:
            # A job that started at once has already recorded itself.
            if not is_recorded(RunFolder(run_dir).read_events(), [job_id]):
                record_found(RunFolder(run_dir), job_id, 1, by="launch.batch")
        return 0
    folder = require_config_dir(words.config_dir)
    if words.nodes is not None:
        job = {"SLURM_JOB_NUM_NODES": words.nodes, "SLURM_GPUS_ON_NODE": words.gpus_per_node or ""}
        job |= {name: os.environ[name] for name in ("SBATCH_PARTITION",) if name in os.environ}
        plan = make_run_in_job(words.overrides, folder, job, ahead=True)
    else:
        plan = make_run_in_job(words.overrides, folder)
        print(plan_text(plan), file=sys.stderr)
    print(plan.run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
