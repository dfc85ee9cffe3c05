"""Submission of plans through submitit: order of the jobs, job arrays, local processes, and the dry run."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import signal
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

import submitit
from rich.console import Console
from submitit.core.utils import FailedJobError

from gpt_launch.agent import run as run_agent
from gpt_launch.agent import run_step
from launch.agent.hosts import hosts_of
from launch.agent.node import HOSTS, OWNER, TOKEN, VISIBLE_GPUS, start_time
from launch.config import CHAIN, Config
from launch.config.compose import read_point, workload_of
from launch.errors import ConfigError, counted
from launch.plan.placement import RUNS_FROM, next_candidate, running_from
from launch.plan.plan import JOBS, Plan, unfinished
from launch.plan.preflight import plan_text, worst_case_text
from launch.runs.environment import visible_gpus
from launch.runs.events import select_events
from launch.runs.find import find_runs
from launch.runs.folder import RunFolder, make_folder, read_plan
from launch.runs.process import share
from launch.slurm.client import (
    BUSY,
    SlurmBusyError,
    SlurmError,
    held_job,
    is_in_step,
    max_array_size,
    missing_configuration,
)
from launch.slurm.jobs import LocalJob, SlurmJob, batch_parameters, sbatch_text, slurm_folder, submitit_folder
from launch.slurm.status import RunStatus, find_run_statuses, poll

# Order of the jobs of a command: job arrays, points that share a job, and points one after another.


def shapes(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Return the plans in groups. The plans of a group request the same resources at every candidate.

    So one job array can run a group. Plans that share one job are a group of their own. The groups are in order of
    first appearance. No array is larger than Slurm's MaxArraySize.
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
"""Options of srun for agents that share a job: the end of one agent ends no other; each binds itself to its CPUs."""


def share_jobs(plans: Sequence[Plan], most: int) -> list[Plan]:
    """Return the plans, changed so that up to ``most`` plans with equal resources share a job
    (``cluster.points_per_job``).

    The job requests the sum of its points' resources. Plans of finished runs and of local runs do not change.
    """
    shared = dict[str, Plan]()
    for group in shapes([plan for plan in unfinished(plans) if plan.cluster == "slurm"]) if most > 1 else ():
        for part in chunks(group, most):
            names = tuple(plan.point for plan in part)
            shared |= {plan.run_dir: share_job(plan, names) for plan in part if len(part) > 1}
    return [shared.get(plan.run_dir, plan) for plan in plans]


def share_job(plan: Plan, names: tuple[str, ...]) -> Plan:
    """Return ``plan``, changed so that its job runs several points, each with the resources of ``plan``.

    ``names`` are the names of the points' run folders.
    """

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
        dependency: text for sbatch --dependency, such as ``afterany:12:13``.
        options: further options of sbatch, each used only if the user has not set it.
    """

    def add(slurm: dict[str, Any]) -> dict[str, Any]:
        own = {**options, **slurm["additional_parameters"]}
        every = filter(None, [own.pop("dependency", None), slurm.get("dependency"), dependency])
        return {"dependency": ",".join(every), "additional_parameters": own}

    return plan.replace_placement(plan.placement.change_slurm(add))


def in_line(plans: Sequence[Plan], before: Sequence[SlurmJob]) -> list[Plan]:
    """Return plans with equal resources, changed so that they run one after another, and after the jobs ``before``."""
    jobs = dict.fromkeys(job.job_id.split("_")[0] for job in before)  # An array as a whole.
    after = [depend(plan, f"afterany:{':'.join(jobs)}") if jobs else plan for plan in plans]
    one_by_one = {"array_parallelism": 1}
    return [plan.replace_placement(plan.placement.change_slurm(lambda slurm: one_by_one)) for plan in after]


# Points after other runs (``launch.after``).


def dependency_on(typed: str) -> str:
    """Return the text for sbatch --dependency on the jobs of other runs; "" if these runs are over.

    Args:
        typed: value of ``launch.after``: the path of a run folder or of a folder of runs. ``afterok:`` (the default)
            or ``afterany:`` may precede the path.

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
    """Return whether a point may get another job: at another candidate of its placement, or the next of a chain."""
    if read_point(point.folder).resilience.requeue == CHAIN:
        return True
    return point.state == "pending" and len(read_plan(point.folder).get("placement", {}).get("candidates", ())) > 1


def start_after(plan: Plan, typed: str | None) -> Plan:
    """Return ``plan``, changed so that its job starts after the runs of ``launch.after``.

    ``typed`` is the value of this key; None if the job need not wait.

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


# Submission.


INHERITED = ("SLURM_", "SBATCH_", "SRUN_", "PMI_", "PMIX_", "TORCHELASTIC_", "SUBMITIT_")
"""Beginnings of the names of environment variables that a job must not inherit."""
INHERITED_NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"),
    RUNS_FROM,
)
KEPT = ("SLURM_CONF", "SLURM_CLUSTERS")
"""Variables that ``clean_environment`` does not hide, because they select the cluster for all commands of Slurm."""


@contextmanager
def clean_environment() -> Iterator[None]:
    """Hide environment variables of an enclosing job or launcher during a ``with`` block.

    Without this, a new job would inherit the names and the CPU binding of the enclosing job. An inherited
    SLURM_CPU_BIND alone made runs three times slower.
    """
    hidden = {
        name: os.environ.pop(name)
        for name in list(os.environ)
        if (name.startswith(INHERITED) or name in INHERITED_NAMES) and name not in KEPT
    }
    try:
        yield
    finally:
        os.environ.update(hidden)


def submit_slurm(plans: Sequence[Plan]) -> list[SlurmJob]:
    """Submit plans with equal resources.

    One plan becomes a plain job. Several become a job array, or the one job that they share. Returns one job for each
    plan, in the order of the plans. Plans that share a job get the same job.

    Raises:
        SlurmBusyError: the controller did not answer.
        SlurmError: sbatch refused.
    """
    if gone := missing_configuration():  # sbatch would search for the file for ten seconds.
        raise SlurmError(gone)
    folder, resources = slurm_folder(plans[0].run_dir), batch_parameters(plans[0])
    run_dirs, names = [plan.run_dir for plan in plans], plans[0].job_points
    try:
        jobs = submit_calls(folder, resources, run_agent, [run_dirs] if names else [[one] for one in run_dirs])
        return [replace(jobs[0], points=names) for _ in plans] if names else jobs
    except FailedJobError as error:
        busy = any(text in str(error).lower() for text in BUSY)
        raise (SlurmBusyError if busy else SlurmError)(f"sbatch: {error}") from error


def submit_calls(
    folder: Path, resources: Mapping[str, Any], function: Callable[..., object], arguments: Sequence[Sequence[str]]
) -> list[SlurmJob]:
    """Submit calls of a function: several calls as a job array, one call as a plain job.

    Every task of a job makes the call of this job. Returns the jobs, in the order of ``arguments``.

    Args:
        folder: folder for submitit's files; made before sbatch runs, since a job may start at once.
        resources: parameters of submitit's Slurm executor; ``python`` is the command line of the jobs' Python.
        function: function that every task calls.
        arguments: arguments of the function for each job.

    Raises:
        submitit.core.utils.FailedJobError: sbatch refused.
    """
    make_folder(folder.parent)
    make_folder(folder)
    executor = submitit.SlurmExecutor(folder=folder, python=resources.get("python"))
    executor.update_parameters(**{key: value for key, value in resources.items() if key != "python"})
    said = redirect_stderr(io.StringIO())  # submitit also prints the text of its error.
    with clean_environment(), said, executor.batch() if len(arguments) > 1 else nullcontext():
        jobs = [executor.submit(function, *words) for words in arguments]
    for job in jobs:
        job.paths.submitted_pickle.chmod(0o600)  # Readable by this user only.
    return [SlurmJob(job.job_id) for job in jobs]


@dataclass(frozen=True)
class Submission:
    """Submitted jobs of plans with equal resources, and the index of the candidate where sbatch accepted them."""

    candidate: int
    jobs: list[SlurmJob]
    refused: dict[int, str]
    """Index of each candidate where sbatch refused the jobs -> reason."""


def submit_somewhere(plans: Sequence[Plan], candidate: int) -> Submission:
    """Submit plans with equal resources at the candidate with this index, or at the next one that sbatch accepts.

    Raises:
        SlurmBusyError: the controller did not answer.
        SlurmError: sbatch refused the plans at every candidate.
    """
    placement, refused = plans[0].placement, dict[int, str]()
    while True:
        try:
            return Submission(candidate, submit_slurm([plan.choose_candidate(candidate) for plan in plans]), refused)
        except SlurmBusyError:
            raise
        except SlurmError as error:
            refused[candidate] = refusal_text(error)
            placement = placement.rule_out(candidate, refused[candidate])
            following = next_candidate(placement, candidate)
            if following is None and len(refused) == 1:
                raise
            if following is None:
                reasons = (f"\n  {placement.candidates[index].name}: {why}" for index, why in refused.items())
                raise SlurmError(f"sbatch refuses it at every candidate:{''.join(reasons)}") from error
            candidate = following


def refusal_text(error: SlurmError) -> str:
    """Return sbatch's own error messages from an error of submitit."""
    found = re.findall(r"sbatch: (?:error: |(?=unrecognized option))(.+)", str(error))
    return "; ".join(dict.fromkeys(line.strip() for line in found)) or str(error)


def remove_unused(run_dirs: Sequence[str]) -> None:
    """Remove run folders for which no job was submitted, and the folder of the sweep if it is then empty."""
    for run_dir in run_dirs:
        if not select_events(RunFolder(run_dir).read_events(), "submitted"):
            shutil.rmtree(run_dir, ignore_errors=True)
    for group in {Path(run_dir).parent for run_dir in run_dirs}:
        if group.is_dir() and {path.name for path in group.iterdir()} <= {JOBS}:
            shutil.rmtree(group, ignore_errors=True)


UNREACHED = ("unable to contact slurm controller (connect failure)", "connection refused")
"""Parts of sbatch's errors that show that no controller was reached."""


def may_have_taken(error: SlurmError) -> bool:
    """Return whether Slurm may have accepted a job although sbatch failed, because the answer was late."""
    is_unreached = any(text in str(error).lower() for text in UNREACHED)
    return isinstance(error, SlurmBusyError) and not is_unreached


def explain_refusal(plan: Plan, error: SlurmError) -> ConfigError:
    """Return the ConfigError for a job that sbatch did not accept, with the error of sbatch."""
    said = refusal_text(error)
    if isinstance(error, SlurmBusyError) or missing_configuration():
        return ConfigError(
            f"point {plan.title}, and no Slurm controller takes its job: {missing_configuration() or said}",
            "a controller that answers",
            "the same command when scontrol ping says UP; python -m launch.status first, which finds a job that was "
            "taken although the answer was late; cluster=local runs it here",
        )
    found = f"point {plan.title}, and sbatch refuses its job: {said}"
    option = re.search(r"unrecognized option '--([\w-]+)", said)
    if option is not None:
        fix = f"the same without {option[1]} in cluster.additional_parameters"
        return ConfigError(found, "options of this cluster's sbatch (sbatch --help)", fix)
    doctor = "python -m launch.doctor, with the same arguments: it compares them with what the cluster has"
    return ConfigError(found, "resources that this cluster gives to you", doctor)


def side_by_side(typed: Any, plans: Sequence[Plan]) -> int:
    """Return the number of points that run at the same time on this machine.

    Args:
        typed: value of ``launch.parallel``: a number, or ``auto``. With ``auto``, as many points run as fit on this
            machine, if each rank needs one GPU; on a machine without GPUs, one CPU.
        plans: plans of the command.

    Raises:
        ConfigError: the value is not a number, or larger than the number of this machine's GPUs (without GPUs, CPUs).
    """
    here = [plan.world_size for plan in plans if plan.cluster == "local"]
    room, unit = (len(visible_gpus()), "GPU") if visible_gpus() else (len(os.sched_getaffinity(0)), "CPU")
    if typed != "auto" and (type(typed) is not int or typed < 1 or (here and typed > room)):
        has = f", and this machine has {counted(room, unit)}"
        raise ConfigError(f"launch.parallel={typed}{has}", f"1 to {room}, or auto", "launch.parallel=auto")
    if not here:
        return 1
    return max(1, room // max(here)) if typed == "auto" else int(typed)


@contextmanager
def on_cpus(cpus: Sequence[int]) -> Iterator[None]:
    """Bind the processes that start during a ``with`` block to these CPUs."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start_local(plan: Plan, part: int = 0, parts: int = 1) -> LocalJob:
    """Start the agents of a point that gets no Slurm job of its own.

    ``plan.cluster`` decides where the agents run: on this machine (``local``), on the hosts of the hostfile
    (``hosts``), or on the nodes of the Slurm job in which this process runs (``allocation``). The agents ignore Ctrl-C,
    which the launcher handles. Returns the handle of the controller process, which submitit starts for the agents.

    Args:
        plan: plan of the point.
        part: number of the share of this machine's CPUs and GPUs that the point gets, from 0.
        parts: number of shares.
    """
    code = None
    if plan.code is not None:
        config = read_point(RunFolder(plan.run_dir))
        code = Path(plan.code) if workload_of(config).code(config).has_launcher else None
    folder = submitit_folder(plan.run_dir)
    make_folder(folder)
    # One folder for all jobs: submitit would make a job's folder only after the start of its controller.
    hosts, starter = list[str](), None
    if plan.cluster == "hosts":
        hosts = hosts_of(read_point(RunFolder(plan.run_dir)))
        starter = plan.slurm["python"].partition(" ")[2]  # without the first word, which is a function of batch scripts
    os.environ[HOSTS] = ",".join(hosts)
    executor = submitit.LocalExecutor(folder=folder, max_num_timeout=0, python=starter)
    # submitit hides all other GPUs.
    gpus = share([int(gpu.index) for gpu in visible_gpus() if gpu.index.isdigit()], part, parts)
    cpus = share(sorted(os.sched_getaffinity(0)), part, parts) or sorted(os.sched_getaffinity(0))
    job_id = held_job() if plan.cluster == "allocation" else None
    executor.update_parameters(
        tasks_per_node=plan.nodes if plan.cluster == "local" else 1,
        timeout_min=plan.timeout_min,
        gpus_per_node=len(gpus),
        visible_gpus=gpus,
    )
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:  # maybe by UUID, which submitit does not take
        names = share([gpu.strip() for gpu in named.split(",")], part, parts)
        os.environ[VISIBLE_GPUS] = ",".join(names) if gpus else ""
    os.environ[TOKEN] = uuid.uuid4().hex
    os.environ[OWNER] = str(os.getpid())
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with clean_environment(), running_from(code), on_cpus(cpus):
            step = (run_agent, plan.run_dir) if job_id is None else (run_step, plan.run_dir, job_id, is_in_step())
            job: Any = executor.submit(*step)
            job.paths.submitted_pickle.chmod(0o600)
    finally:
        signal.signal(signal.SIGINT, handler)
    return LocalJob(job.job_id, os.uname().nodename, start_time(job._process.pid), job._process)


# The dry run.


def show_plans(plans: Sequence[Plan], configs: Sequence[Config], console: Console) -> None:
    """Print the plan of every point, and one batch script for all points with equal resources (dry run)."""
    for plan in plans:
        console.print(plan_text(plan))
    console.print(worst_case_text(plans, configs))
    for number, group in enumerate(shapes([plan for plan in plans if not plan.finished])):
        if configs[0].launch.sequential:
            group = in_line(group, [SlurmJob("JOBID")] if number else [])
        names = ", ".join(plan.title for plan in group)
        kind = f"job array of {len(group)}" if len(group) > 1 else "job"
        kind = f"job of {len(group)} points on one node" if group[0].job_points else kind
        here = "" if group[0].cluster == "slurm" else ", as cluster=slurm would submit it"
        console.print(f"\nsbatch text of the {kind}{here}: {names}")
        console.print(sbatch_text(group))
    console.print("dry_run=true: nothing was submitted or written")
