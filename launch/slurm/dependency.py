"""Order of the jobs of a command: job arrays, points one after another, and points after other runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from shlex import quote
from typing import Any

from launch.config import CHAIN
from launch.config.compose import read_point
from launch.errors import ConfigError
from launch.plan.plan import Plan, unfinished
from launch.runs.find import find_runs
from launch.runs.folder import read_plan
from launch.slurm.client import max_array_size
from launch.slurm.jobs import SlurmJob, submitit_folder
from launch.slurm.status import RunStatus, find_run_statuses, poll


def shapes(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Group plans that one job array can have: those that request the same resources at every candidate.

    Plans that share a job are a group of their own. The groups are in order of first appearance. No array is larger
    than Slurm's MaxArraySize.
    """
    groups: dict[str, list[Plan]] = {}
    for plan in plans:
        asked = [str(submitit_folder(plan.run_dir)), plan.slurm, asdict(plan.placement), plan.job_points]
        key = json.dumps(asked, sort_keys=True, default=str)
        groups.setdefault(key, []).append(plan)
    is_array = any(len(group) > 1 and group[0].cluster == "slurm" for group in groups.values())
    most = max_array_size() if is_array else len(plans)
    return [part for group in groups.values() for part in ([group] if group[0].job_points else chunks(group, most))]


def chunks(plans: Sequence[Plan], most: int) -> list[list[Plan]]:
    """Return the plans in consecutive groups of ``most``; the last group may be smaller."""
    return [[*plans[start : start + most]] for start in range(0, len(plans), most)]


SIDE_BY_SIDE = ["--kill-on-bad-exit=0", "--wait=0", "--cpu-bind=none"]
"""Options of srun for agents that share a job. The end of an agent ends no other; each binds itself to its CPUs."""


def share_jobs(plans: Sequence[Plan], most: int) -> list[Plan]:
    """Return the plans, changed so that up to ``most`` with equal resources share a job (``cluster.points_per_job``).

    The job requests the sum of its points' resources. Plans of finished runs and of local runs do not change.
    """
    shared = dict[str, Plan]()
    for group in shapes([plan for plan in unfinished(plans) if plan.cluster == "slurm"]) if most > 1 else ():
        for part in chunks(group, most):
            names = tuple(plan.point for plan in part)
            shared |= {plan.run_dir: share_job(plan, names) for plan in part if len(part) > 1}
    return [shared.get(plan.run_dir, plan) for plan in plans]


def share_job(plan: Plan, names: tuple[str, ...]) -> Plan:
    """Return a plan whose job has the points with these names of run folders, each with the resources of the plan."""

    def multiply(slurm: dict[str, Any]) -> dict[str, Any]:
        more = {"ntasks_per_node": len(names), "srun_args": [*SIDE_BY_SIDE, *slurm.get("srun_args", [])]}
        if "gpus_per_node" in slurm:
            more["gpus_per_node"] = len(names) * slurm["gpus_per_node"]
        if "mem" in slurm:
            more["mem"] = f"{len(names) * int(slurm['mem'].removesuffix('MB'))}MB"
        return more

    shared = replace(plan, node_hours=plan.node_hours / len(names), job_points=names)
    return shared.replace_placement(plan.placement.change_slurm(multiply))


def depend(plan: Plan, dependency: str, **options: str) -> Plan:
    """Return a plan whose job starts after ``dependency``, and after the dependency that the user has set.

    Args:
        plan: plan of a point.
        dependency: as sbatch --dependency takes it, such as ``afterany:12:13``.
        options: further options of sbatch, if the user did not set them.
    """

    def add(slurm: dict[str, Any]) -> dict[str, Any]:
        own = {**options, **slurm["additional_parameters"]}
        every = filter(None, [own.pop("dependency", None), slurm.get("dependency"), dependency])
        return {"dependency": ",".join(every), "additional_parameters": own}

    return plan.replace_placement(plan.placement.change_slurm(add))


def in_line(plans: Sequence[Plan], before: Sequence[SlurmJob]) -> list[Plan]:
    """Return plans with equal resources, changed so that they run one after another, after the jobs ``before``."""
    jobs = dict.fromkeys(job.job_id.split("_")[0] for job in before)  # An array as a whole.
    after = [depend(plan, f"afterany:{':'.join(jobs)}") if jobs else plan for plan in plans]
    one_by_one = {"array_parallelism": 1}
    return [plan.replace_placement(plan.placement.change_slurm(lambda slurm: one_by_one)) for plan in after]


# Points after other runs (``launch.after``).


def dependency_on(typed: str) -> str:
    """Return the dependency on the jobs of other runs; empty if these runs are over.

    Args:
        typed: value of ``launch.after``: a run folder or a folder of runs, and before it ``afterok:`` or ``afterany:``.

    Raises:
        ConfigError: there are no such runs, or Slurm does not answer; with ``afterok``, a run has ended without being
            finished; or a run that is not over has no job of Slurm, or may get another job.
    """
    head, _, rest = typed.partition(":")
    kind, path = (head, rest) if head in ("afterok", "afterany") else ("afterok", typed)
    points = find_run_statuses(find_runs([Path(path)]))
    problem = poll(points, trust_log=True)
    if problem is not None:
        raise ConfigError(
            f"launch.after={typed}, and Slurm does not say whether these runs are over: {problem}",
            "a controller that answers",
            "the same command when scontrol ping says UP",
        )
    for point in points:
        name = f"launch.after={typed}, and {point.folder.path} is {point.state}"
        if point.is_over and point.state != "finished" and kind == "afterok":
            raise ConfigError(
                name,
                "runs that have finished, run or wait",
                f"the command of that run again, or launch.after=afterany:{quote(path)}, which takes any end",
            )
        if not point.is_over and (not isinstance(point.job, SlurmJob) or may_move(point)):
            raise ConfigError(
                f"{name}, {'and may continue in another job' if may_move(point) else 'without a job of Slurm'}",
                "runs that are over, or whose job keeps its number",
                f"the same command when python -m launch.status {quote(path)} says that they are over",
            )
    jobs = [point.job.job_id for point in points if not point.is_over and point.job is not None]
    return f"{kind}:{':'.join(jobs)}" if jobs else ""


def may_move(point: RunStatus) -> bool:
    """Return whether a point may get another job: at another candidate of its placement, or the next job of a chain."""
    if read_point(point.folder).resilience.requeue == CHAIN:
        return True
    return point.state == "pending" and len(read_plan(point.folder).get("placement", {}).get("candidates", ())) > 1


def start_after(plan: Plan, typed: str | None) -> Plan:
    """Return the plan of a point that waits for the runs of ``launch.after``.

    Raises:
        ConfigError: these runs cannot be waited for, or the point runs on this machine and these runs are not over.
    """
    dependency = "" if typed is None else dependency_on(typed)
    if dependency and plan.cluster == "local":
        raise ConfigError(
            f"launch.after={typed} with agents on this machine, and these runs are not over",
            "a job of Slurm, which can wait for them",
            "the same command when they are over, or cluster=slurm",
        )
    # Slurm cancels the job if a run before it fails. By default, the job would stay in the queue for ever.
    return depend(plan, dependency, kill_on_invalid_dep="yes") if dependency else plan
