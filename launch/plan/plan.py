"""Plan of one point: its nodes, its resources, and its worst case in node-hours and cost.

The module also refuses a point that cannot work, writes the run folder, and records submissions in the event log.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from shlex import quote
from typing import Any

import msgspec
from omegaconf import DictConfig, OmegaConf

from launch.config import ClusterKind, Config
from launch.config.compose import not_in_point, workload_of
from launch.errors import ConfigError
from launch.plan.budget import Use
from launch.plan.placement import Placement, copy_path, place_point, worst_case
from launch.runs import compose
from launch.runs.compose import choose_folder, refuse_other_run
from launch.runs.environment import visible_gpus
from launch.runs.events import (
    Continuation,
    Events,
    apply_continuation,
    is_finished,
    plan_continuation,
    select_events,
)
from launch.runs.folder import RunFolder, read_plan, write_json, writing_into
from launch.runs.overrides import PLACE_KEYS, without_key
from launch.workload import PlanRequest, Workload, WorkloadPlan


@dataclass(frozen=True)
class Plan:
    """Plan of one point.

    Node-hours, GPU-hours and cost are the worst case of one start of the job, until its time limit. A requeued job may
    start again, until ``budget`` or the limits of ``resilience.max_restarts`` end the run.
    """

    point: str
    run_dir: str
    cluster: str
    nodes: int
    spares: int
    ranks_per_node: int
    world_size: int
    timeout_min: int
    node_hours: float
    gpu_hours: float | None
    """Worst case in GPU-hours; None if the number of GPUs per node is not known."""
    cost: float | None
    """GPU-hours times cluster.price_per_gpu_hour; None if either is unknown."""
    slurm: dict[str, Any]
    """Resources at the chosen candidate, as submitit's parameters. Points with equal resources share a job array."""
    placement: Placement
    workload: str
    """Name of the workload."""
    promised: WorkloadPlan
    """What the workload plans, such as steps and memory. Its ``facts`` are keys at the root of ``plan.json``."""
    spare_jobs: int = 0
    """Largest number of spare jobs. A spare job has one node, which replaces a lost node of this job."""
    command_run_dirs: tuple[str, ...] = ()
    """Run folders of all points of the command. These points share its budget."""
    job_points: tuple[str, ...] = ()
    """Names of the run folders that share the job, in the order of its tasks; empty if the point has its own job."""
    code: str | None = None
    """Path of the copy of the code from which the job runs; None if the job runs from the checkout."""
    warnings: tuple[str, ...] = ()
    """Warnings of the workload, and warnings of the launcher about earlier attempts."""
    label: str = ""
    """Text that distinguishes the point from the other points of its command, for people."""
    finished: bool = False
    """True if the run is finished, so that it is not submitted."""
    goes_on: Continuation = field(default_factory=Continuation)
    """How the run continues; by default from its newest checkpoint."""

    expected_s: float | None = None
    """Expected duration in seconds of the steps that are left, without start-up; None if not known."""
    expected_by: str = ""
    """Text for people on how ``expected_s`` was found: measured in this run, or estimated."""

    @property
    def title(self) -> str:
        """Name of the point for people."""
        return self.label or self.point

    @property
    def nodes_asked(self) -> int:
        """Number of nodes of the allocation, spares included."""
        return self.nodes + self.spares

    @property
    def max_steps(self) -> int | None:
        """Number of steps of the whole run; None if the workload does not know it."""
        return self.promised.max_steps

    @property
    def worst(self) -> Use:
        """Largest use that one start of the job can cause: all its nodes until the time limit."""
        return Use(self.node_hours, self.gpu_hours, self.cost)

    @property
    def facts(self) -> Mapping[str, Any]:
        """Values that the workload adds to the plan (name -> value), for programs that read ``plan.json``."""
        return self.promised.facts

    def as_dict(self) -> dict[str, Any]:
        """Return the content of ``plan.json``: ``facts``, which the workload adds, then the fields of the plan."""
        known = asdict(self)
        return {"max_steps": self.max_steps, **known["promised"].pop("facts"), **known}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Plan:
        """Return the plan in the content of a ``plan.json``.

        Raises msgspec.ValidationError if a field is missing or wrong.
        """
        own = {entry.name for entry in fields(cls)}
        facts = {key: value for key, value in known.items() if key not in {*own, "max_steps"}}
        return msgspec.convert({**known, "promised": {**known.get("promised", {}), "facts": facts}}, cls)

    def choose_candidate(self, index: int) -> Plan:
        """Return this plan with the resources of the candidate with this index."""
        return replace(self, slurm=self.placement.candidates[index].slurm)

    def replace_placement(self, placement: Placement) -> Plan:
        """Return this plan with another placement, at its first possible candidate."""
        assert placement.possible
        worst = worst_case(placement, self.nodes_asked, self.timeout_min, self.spare_jobs)
        changed = replace(self, placement=placement, gpu_hours=worst.gpu_hours, cost=worst.cost)
        return changed.choose_candidate(placement.possible[0])


def unfinished(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans of runs that are not finished."""
    return [plan for plan in plans if not plan.finished]


def make_plan(
    config: Config,
    overrides: Sequence[str],
    kind: ClusterKind,
    sweep_sizes: Sequence[int] = (),
    gpu_type: str | None = None,
) -> Plan:
    """Return the plan of one point. Writes nothing.

    Args:
        config: config of the point.
        overrides: overrides as typed for the point.
        kind: ``local``, ``slurm``, ``allocation`` or ``hosts``.
        sweep_sizes: numbers of ranks of all points of the command.
        gpu_type: type of the GPUs where the point may run, as Slurm names it; None if not known.

    Raises:
        ConfigError: the point cannot work.
    """
    config.validate()
    workload, is_local = workload_of(config), kind is ClusterKind.local
    folder = choose_folder(config, overrides, not_in_point(workload), workload.length)
    refuse_unknown_checkpoints(config, workload, folder)
    refuse_exposed(folder.path)
    refuse_missing_command(config)
    refuse_other_run(folder, config, workload.schema, (*PLACE_KEYS, *workload.resumable))
    if is_local:
        refuse_slurm_only(config)
    gpus = visible_gpus() if is_local else []
    request = PlanRequest(
        overrides=tuple(overrides),
        folder=folder,
        is_local=is_local,
        nodes=config.nodes,
        ranks_per_node=config.ranks_on_node,
        cluster=config.cluster,
        local_gpus=len(gpus),
        local_gpu_name=gpus[0].name if gpus else None,
        gpu_type=gpu_type,
        sweep_sizes=tuple(sweep_sizes),
        min_nodes=config.resilience.min_nodes,
    )
    promised = workload.plan(config, request)
    refuse_fewer_nodes(config, workload.name, promised)
    # If no key of the config sets the length of a program, max_steps only measures its progress.
    max_steps = promised.max_steps if workload.length else None
    goes_on = plan_continuation(folder, config.resume_from, max_steps, workload.checkpoints(folder) or ())
    tree = workload.code(config)
    code = copy_path(folder.path, tree) if config.copy_code else None
    placed = place_point(config, folder.path, code if tree.has_launcher else None, promised.resumes)
    worst = worst_case(placed, config.nodes_asked, config.cluster.timeout_min, config.spare_jobs)
    return Plan(
        point=folder.point,
        run_dir=str(folder.path),
        cluster=kind.name,
        nodes=config.nodes,
        spares=config.spare_nodes,
        spare_jobs=config.spare_jobs,
        ranks_per_node=config.ranks_on_node,
        world_size=config.world_size,
        timeout_min=config.cluster.timeout_min,
        node_hours=worst.node_hours,
        gpu_hours=worst.gpu_hours,
        cost=worst.cost,
        slurm=placed.candidates[0].slurm,
        placement=placed,
        workload=workload.name,
        promised=promised,
        code=None if code is None else str(code),
        finished=goes_on == Continuation() and is_finished(folder.read_events()),
        goes_on=goes_on,
        warnings=promised.warnings,
    )


def write_run(plan: Plan, composed: DictConfig, overrides: Sequence[str]) -> None:
    """Create the run folder with the complete config, the overrides, and the plan.

    If the run continues from another checkpoint than its newest, later records and checkpoints are first moved aside
    (``apply_continuation``). No process may work on the run.

    Raises:
        ConfigError: the folder cannot be written.
    """
    folder = RunFolder(plan.run_dir)
    apply_continuation(folder, plan.goes_on, plan.max_steps, workload_of(composed).checkpoints(folder) or ())
    composed.resume_from = None  # The change is done now: a later start of the same job must not repeat it.
    write_settled(plan, folder, composed, overrides)
    with writing_into(folder.path):
        write_json(folder.plan, plan.as_dict())


def write_settled(plan: Plan, folder: RunFolder, composed: DictConfig, overrides: Sequence[str]) -> None:
    """Write the config of a point into ``folder``, with the values that the workload's plan has chosen (``settled``).

    ``composed`` is the composed config of the point. This function also sets the values in ``composed``.
    """
    for key, value in plan.promised.settled.items():
        OmegaConf.update(composed, key, value, merge=True)
    compose.write_config(folder, composed, without_key(overrides, "resume_from"))


# Refusals of a point, before anything is written.


JOBS = ".submitit"
"""Name of the folder, in the parent folder of the runs, with submitit's pickles and the agents' logs."""
SLURM_JOBS = "slurm"
"""Name of the folder in JOBS for Slurm's jobs, whose ids may equal process ids of local jobs."""


def refuse_slurm_only(config: Config) -> None:
    """Raise ConfigError if the config of a run on this machine has spares or a container, because both need Slurm."""
    for key, number in {"spare_nodes": config.spare_nodes, "spare_jobs": config.spare_jobs}.items():
        if number:
            raise ConfigError(
                f"{key}={number} with agents on this machine (cluster=local)",
                "a Slurm cluster: nodes on one machine are lost together",
                f"{key}=0, or cluster=slurm",
            )
    if config.cluster.container is not None:
        raise ConfigError(
            f"cluster.container={config.cluster.container} with agents on this machine (cluster=local)",
            "a Slurm cluster, whose srun starts the container on each node",
            "cluster=slurm; or the whole command in the container: apptainer exec IMAGE python -m launch ...",
        )


def refuse_missing_command(config: Config) -> None:
    """Raise ConfigError if the program of ``launch.on_event`` does not exist, or cannot be executed.

    Programs inside a container are not checked.
    """
    command = config.launch.on_event_command
    if not command or config.cluster.container is not None or shutil.which(command[0]) is not None:
        return
    program = command[0]
    raise ConfigError(
        f"launch.on_event, and no program {program} on the PATH that you may execute",
        "a program on the PATH, or the path of one that the nodes see too",
        f"launch.on_event=/PATH/OF/{quote(Path(program).name)}, or launch.on_event=null",
    )


def refuse_exposed(run_dir: Path) -> None:
    """Raise ConfigError if other users can write into the folders that a job of ``run_dir`` reads.

    Pickles are code, so no other user and no group may write into their folder. A group may write into the run's
    folder and its parent. All users may write into the parent if it has the sticky bit (as /tmp), which protects
    existing files.
    """
    jobs = run_dir.parent / JOBS
    for folder in (jobs, jobs / SLURM_JOBS):
        refuse_writable(folder, stat.S_IWGRP | stat.S_IWOTH)
    refuse_writable(run_dir, stat.S_IWOTH)
    refuse_writable(run_dir.parent, stat.S_IWOTH, unless=stat.S_ISVTX)


def refuse_writable(folder: Path, bits: int, unless: int = 0) -> None:
    """Raise ConfigError if ``folder`` has one of the permission ``bits``. Does nothing if the folder is missing.

    A folder that has one of the bits in ``unless``, such as the sticky bit, is accepted.
    """
    try:
        mode = folder.stat().st_mode
    except OSError:  # The folder is missing or unreadable: writing to it is refused later.
        return
    if mode & bits and not mode & unless:
        raise ConfigError(
            f"{folder} with mode {stat.S_IMODE(mode):04o}: others can change in it what your jobs run",
            "a folder that no other user can write to",
            f"chmod -R go-w {quote(str(folder))}, or output_dir=FOLDER for another one",
        )


def refuse_fewer_nodes(config: Config, workload: str, promised: WorkloadPlan) -> None:
    """Raise ConfigError if ``resilience.min_nodes`` is set for a program that cannot continue with fewer nodes.

    ``workload`` is the name of the workload, and ``promised`` its plan of the point.
    """
    if not config.may_shrink:
        return
    found, fix = f"resilience.min_nodes={config.resilience.min_nodes}", "resilience.min_nodes=null"
    if not promised.resumes:
        found += ", and a program that is not said to have checkpoints to resume from"
        raise ConfigError(found, "a program that resumes", f"script.resumes=true, or {fix}")
    if not promised.fewer_nodes:
        found += f", and workload {workload}, which does not say with how many fewer nodes it could continue"
        raise ConfigError(found, "fewer_nodes in the plan of the workload (docs/workloads.md)", fix)


def refuse_unknown_checkpoints(config: Config, workload: Workload, folder: RunFolder) -> None:
    """Raise ConfigError if ``resume_from`` is set for a program whose checkpoints the launcher does not know."""
    if config.resume_from is not None and workload.checkpoints(folder) is None:
        raise ConfigError(
            f"resume_from={config.resume_from} with workload={workload.name}, whose checkpoints are the program's own",
            "a workload that lists its checkpoints (docs/workloads.md), as gpt does",
            "an option of the program that names the checkpoint, such as script.options.resume_from=PATH",
        )


# The ``submitted`` event of a run: its job, and the place of the job.


def record_submitted(plan: Plan, job_id: str, candidate: int = 0, **more: Any) -> None:
    """Record a submission in the event log, unless the agent of the job has already done so (``record_found``).

    Args:
        plan: plan of the run.
        job_id: id of the Slurm job, or of the process.
        candidate: index of the candidate that accepted the job.
        more: further fields of the event. ``moved`` is True if the run was pending at another candidate before. ``by``
            is the name of the command that found the job. ``pid_started`` is the start time of a local process, which
            distinguishes it from a later process with the same id.
    """
    folder = RunFolder(plan.run_dir)
    if plan.cluster == "slurm" and is_recorded([e for e in folder.read_events() if "by" in e], [job_id]):
        return
    where = {"cluster": plan.cluster, "job_id": job_id, "host": os.uname().nodename, "nodes": plan.nodes}
    more |= {"points": plan.job_points} if plan.job_points else {}
    chosen = plan.placement.candidates[candidate]
    place = {
        "placement": chosen.name or None,
        "partition": chosen.slurm.get("partition"),
        "gpus": chosen.gpus,
        "price_per_gpu_hour": chosen.price_per_gpu_hour,
    }
    known = {key: value for key, value in place.items() if value is not None}
    folder.record_event("submitted", **where, candidate=candidate, **known, **more)


def record_found(folder: RunFolder, job_id: str, nodes: int, by: str) -> None:
    """Record a Slurm job whose launcher ended before it recorded the job.

    If the job belongs to a move or to a chain, the recorded candidate is that of the move or the chain. Otherwise it is
    the first possible candidate. This may be wrong, because it is not known which candidates sbatch refused.

    Args:
        folder: folder of the run.
        job_id: id of the job.
        nodes: number of nodes of the job, recorded if the run has no readable plan.
        by: name of the command that found the job.
    """
    ends = select_events(folder.read_events(), "submitted", "moved", "next_job")
    is_move = ends and (ends[-1]["event"] == "moved" or (ends[-1].get("after") and ends[-1]["job_id"] == job_id))
    last = ends[-1] if is_move else None
    more = {"by": by, **({"moved": True} if last else {})}
    try:
        plan = Plan.from_dict(read_plan(folder))
        candidate = last["candidate"] if last else (plan.placement.possible or [0])[0]
        record_submitted(replace(plan, run_dir=str(folder.path), cluster="slurm"), job_id, candidate, **more)
    except (ConfigError, msgspec.ValidationError, IndexError):  # Without a plan, the job can still be cancelled.
        found = {"cluster": "slurm", "job_id": job_id, "host": os.uname().nodename, "nodes": nodes, "candidate": 0}
        folder.record_event("submitted", **found, **more)


def record_next_job(folder: RunFolder, job_id: str | None, after: str, candidate: int = 0) -> None:
    """Record ``job_id`` as the job that continues a run when the job ``after`` has ended.

    ``job_id`` is None to record that this next job was cancelled. ``candidate`` is the index of the candidate that
    accepted the next job.
    """
    folder.record_event("next_job", job_id=job_id, after=after, candidate=candidate)


def next_job(events: Events, after: str) -> str | None:
    """Return the id of the job that continues a run when the job ``after`` has ended; None if there is none."""
    found = [event["job_id"] for event in select_events(events, "next_job", after=after)]
    return str(found[-1]) if found and found[-1] is not None else None


def is_recorded(events: Events, names: Collection[str]) -> bool:
    """Return whether ``events`` has the submission of a job with an id in ``names``."""
    return any(event["event"] == "submitted" and str(event.get("job_id")) in names for event in events)
