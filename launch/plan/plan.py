"""One point of a sweep -> Plan: what it will use, and a refusal where it cannot work."""

from __future__ import annotations

import dataclasses
import os
import shutil
import stat
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from shlex import quote
from typing import Any

from omegaconf import DictConfig, OmegaConf

from launch.config import ClusterKind, Config
from launch.config.compose import not_in_point, workload_of
from launch.errors import ConfigError
from launch.plan import code_copy
from launch.plan.placement import Placement, place, refuse_local_container, worst_case
from launch.runs import compose
from launch.runs.events import Continuation, apply_continuation, is_finished, plan_continuation
from launch.runs.files import write_json
from launch.runs.folder import RunFolder, writing_into
from launch.runs.identity import choose_folder, refuse_other_run
from launch.runs.overrides import PLACE_KEYS, without_key
from launch.workload import PlanRequest, Workload, WorkloadPlan

# GPUs of this machine, counted without torch, and the refusal of spares on it.


def refuse_local_spares(config: Config) -> None:
    """Raise ConfigError if spare nodes are asked of this one machine."""
    if config.spare_nodes:
        raise ConfigError(
            f"spare_nodes={config.spare_nodes} with agents on this machine (cluster=local)",
            "a Slurm cluster: nodes on one machine are lost together",
            "spare_nodes=0, or cluster=slurm",
        )


def local_gpus() -> int:
    """GPUs of this machine that may be used, counted without torch."""
    named = _named_gpus()
    if named is not None:
        return len([name for name in named if name not in ("", "-1")])
    return len(list(Path("/proc/driver/nvidia/gpus").glob("*")))


def visible_gpus() -> list[int]:
    """Indices of the visible GPUs; those that CUDA_VISIBLE_DEVICES names in another way are left out."""
    named = _named_gpus()
    if named is not None:
        return [int(name) for name in named if name.isdigit()]
    return list(range(local_gpus()))


def _named_gpus() -> list[str] | None:
    """The devices in CUDA_VISIBLE_DEVICES; None if it is not set, and all GPUs may be used."""
    names = os.environ.get("CUDA_VISIBLE_DEVICES")
    return None if names is None else [name.strip() for name in names.split(",")]


def local_gpu_name() -> str | None:
    """Name of the first GPU of this machine, from the driver's files."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text().splitlines():
            if line.startswith("Model:"):
                return line.removeprefix("Model:").strip()
    return None


# Refusal of a ``launch.on_event`` that no agent could run, as far as the login node can tell.


def refuse_missing_command(config: Config) -> None:
    """Raise ConfigError if the program of ``launch.on_event`` is not there, or cannot be run.

    In a container the agent has other programs than this machine, which are not looked for.
    """
    command = config.launch.on_event_command
    if not command or config.cluster.container is not None or shutil.which(command[0]) is not None:
        return
    program, here = command[0], Path(command[0]).absolute()
    found = f"launch.on_event, and no program {program} on the PATH"
    fix = "launch.on_event=PATH"
    if here.is_file() and os.access(here, os.X_OK):  # named as one of the PATH, and lies here
        fix = quote(f"launch.on_event=[{','.join([str(here), *command[1:]])}]")
    elif here.is_file():
        found, fix = f"launch.on_event={program}, a file that is not executable", f"chmod +x {quote(str(here))}"
    elif os.sep in program:
        found = f"launch.on_event={program}, which is no file"
    raise ConfigError(
        found, "a program on the PATH, or the path of one that the nodes see too", f"{fix}, or launch.on_event=null"
    )


# Refusal of folders in which somebody else could change what a job runs.


JOBS = ".submitit"
"""Folder beside the points with submitit's pickles and the agents' logs."""
SLURM_JOBS = "slurm"
"""Folder in it for those of Slurm's jobs, whose numbers may be those of processes here."""
ELSEWHERE = "on-"
"""Beginning of the folder in it for those of another cluster's jobs, before the name of the cluster."""


def refuse_exposed(run_dir: Path) -> None:
    """Raise ConfigError if others can put something into the folders that a job of ``run_dir`` reads.

    Pickles are code, so nobody else may write beside them, the group included. In the folder of the run, and the one
    above, a group may share its work; a sticky bit (as /tmp has it) keeps what is there from being replaced.
    """
    jobs = run_dir.parent / JOBS
    for folder in (jobs, jobs / SLURM_JOBS, *jobs.glob(f"{ELSEWHERE}*")):
        refuse_writable(folder, stat.S_IWGRP | stat.S_IWOTH)
    refuse_writable(run_dir, stat.S_IWOTH)
    refuse_writable(run_dir.parent, stat.S_IWOTH, unless=stat.S_ISVTX)


def refuse_writable(folder: Path, bits: int, unless: int = 0) -> None:
    """Raise ConfigError if a folder is there and has one of the mode ``bits``, and none of ``unless``."""
    try:
        mode = folder.stat().st_mode
    except OSError:  # not there; or not to be looked at, which is told when it is written to
        return
    if mode & bits and not mode & unless:
        raise ConfigError(
            f"{folder} with mode {stat.S_IMODE(mode):04o}: others can change in it what your jobs run",
            "a folder that nobody else can write to",
            f"chmod -R go-w {quote(str(folder))}, or output_dir=FOLDER for another one",
        )


# One point of a sweep -> Plan: what it will use, and a refusal where it cannot work.


@dataclass(frozen=True)
class Plan:
    """Plan of one point. GPU-hours and cost are the worst case of one start of the job, the whole time limit
    used: a requeued job starts anew, until ``budget`` ends it, or more failures than ``resilience.max_restarts`` allows
    between two checkpoints, or in ``resilience.forgive_after_s``."""

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
    """None where the nodes are not said to have GPUs."""
    cost: float | None
    """GPU-hours times cluster.price_per_gpu_hour; None where one of them is not known."""
    slurm: dict[str, Any]
    """The resources requested from Slurm, as submitit's parameters; points with the same ones share a job array."""
    placement: Placement
    """Candidates that the point may go to, and when it does; ``slurm`` is what is asked at one of its candidates."""
    workload: str
    """Name of the kind of program."""
    promised: WorkloadPlan
    """Promises of the workload. Its facts stand at the root of ``plan.json``."""
    command_run_dirs: tuple[str, ...] = ()
    """The run folders of all points of the command, which share its budget."""
    code: str | None = None
    """The copy of the code that the job runs from; None if it runs from where it was submitted."""
    warnings: tuple[str, ...] = ()
    """Those of the workload, and preflight warnings from earlier attempts."""
    label: str = ""
    """Label that sets the point apart from the others of its command, for people."""
    finished: bool = False
    """True where the run is finished already: nothing of it is submitted."""
    goes_on: Continuation = field(default_factory=Continuation)
    """Continuation of the run, where that is not from where it stopped."""

    expected_s: float | None = None
    """Expected time of the next start, seconds; None where nothing is known of it."""
    expected_by: str = ""
    """Source of the expected time, for people."""

    @property
    def title(self) -> str:
        """Name of the point for people."""
        return self.label or self.point

    @property
    def nodes_asked(self) -> int:
        """Nodes of the allocation, spares included."""
        return self.nodes + self.spares

    @property
    def max_steps(self) -> int | None:
        """Steps of the whole run; None where the workload does not know them."""
        return self.promised.max_steps

    @property
    def facts(self) -> Mapping[str, Any]:
        """Facts of the workload, for programs."""
        return self.promised.facts

    def as_dict(self) -> dict[str, Any]:
        """The plan as JSON holds it: the workload's facts stand beside the launcher's own."""
        known = asdict(self)
        return {"max_steps": self.max_steps, **known["promised"].pop("facts"), **known}

    @classmethod
    def from_dict(cls, known: Mapping[str, Any]) -> Plan:
        """Read back what ``plan.json`` holds, of an earlier version too."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        own = {key: value for key, value in known.items() if key in names}
        own |= {key: tuple(own.get(key, ())) for key in ("command_run_dirs", "warnings")}
        facts = {key: value for key, value in known.items() if key not in {*names, "max_steps"}}
        promised = {"max_steps": known.get("max_steps"), **own.get("promised", {}), "facts": facts}
        promised |= {key: tuple(promised.get(key, ())) for key in ("warnings", "fewer_nodes")}
        promised["notes"] = {label: tuple(lines) for label, lines in promised.get("notes", {}).items()}
        workload = own.get("workload", "")
        parts = {
            "promised": WorkloadPlan(**promised),
            "placement": Placement.from_dict(known["placement"]),
            "goes_on": Continuation(**own.get("goes_on", {})),
        }
        return cls(**{**own, "workload": workload, **parts})

    def choose_candidate(self, index: int) -> Plan:
        """Return this plan as submitted to a candidate of its placement."""
        return replace(self, slurm=self.placement.candidates[index].slurm)

    def replace_placement(self, placement: Placement) -> Plan:
        """Return this plan with another placement, submitted to its first candidate where the point could run."""
        assert placement.possible
        worst = worst_case(placement, self.nodes_asked, self.timeout_min)
        changed = replace(self, placement=placement, gpu_hours=worst.gpu_hours, cost=worst.cost)
        return changed.choose_candidate(placement.possible[0])


def unfinished(plans: Sequence[Plan]) -> list[Plan]:
    """The points that have steps ahead of them: what is finished takes no nodes to say so."""
    return [plan for plan in plans if not plan.finished]


def make_plan(
    config: Config,
    overrides: Sequence[str],
    kind: ClusterKind,
    sweep_sizes: Sequence[int] = (),
    gpu_type: str | None = None,
) -> Plan:
    """Plan one point for a cluster of ``kind`` (local or slurm).

    Args:
        config: of the point.
        overrides: as typed for the point.
        kind: where it runs.
        sweep_sizes: numbers of ranks of all points of the command.
        gpu_type: of the GPUs where the point may go, as Slurm names it; None if it is not known.

    Raises:
        ConfigError: the point cannot work.
    """
    config.validate()
    workload = workload_of(config)
    folder = choose_folder(config, overrides, not_in_point(workload), workload.length)
    refuse_unknown_checkpoints(config, workload, folder)
    refuse_exposed(folder.path)
    refuse_missing_command(config)
    refuse_other_run(folder, config, workload.schema, (*PLACE_KEYS, *workload.resumable))
    if kind is ClusterKind.local:
        refuse_local_spares(config)
        refuse_local_container(config)
    promised = workload.plan(config, plan_request(config, overrides, folder, kind, sweep_sizes, gpu_type))
    refuse_fewer_nodes(config, workload.name, promised)
    # Of a program whose length is no key of its config, a number of steps is what it is watched by.
    max_steps = promised.max_steps if workload.length else None
    goes_on = plan_continuation(folder, config.resume_from, max_steps, workload.checkpoints(folder) or ())
    tree = workload.code(config)
    code = code_copy.place(folder.path, tree) if config.copy_code else None
    placed = place(config, folder.path, code if tree.has_launcher else None, promised.resumes)
    worst = worst_case(placed, config.nodes_asked, config.cluster.timeout_min)
    return Plan(
        point=folder.point,
        run_dir=str(folder.path),
        cluster=kind.name,
        nodes=config.nodes,
        spares=config.spare_nodes,
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


def plan_request(
    config: Config, overrides: Sequence[str], folder: RunFolder, kind: ClusterKind, sweep_sizes: Sequence[int],
    gpu_type: str | None,
) -> PlanRequest:  # fmt: skip
    """Make the request by which a workload plans a point."""
    is_local = kind is ClusterKind.local
    return PlanRequest(
        overrides=tuple(overrides),
        folder=folder,
        is_local=is_local,
        nodes=config.nodes,
        ranks_per_node=config.ranks_on_node,
        cluster=config.cluster,
        local_gpus=local_gpus() if is_local else 0,
        local_gpu_name=local_gpu_name() if is_local else None,
        gpu_type=gpu_type,
        sweep_sizes=tuple(sweep_sizes),
        min_nodes=config.resilience.min_nodes,
    )


def refuse_fewer_nodes(config: Config, workload: str, promised: WorkloadPlan) -> None:
    """Raise ConfigError if ``resilience.min_nodes`` asks for what the program cannot do, or does not say it can."""
    if not config.may_shrink:
        return
    found, fix = f"resilience.min_nodes={config.resilience.min_nodes}", "resilience.min_nodes=null"
    if not promised.resumes:
        found += ", and a program that is not said to have checkpoints to go on from"
        raise ConfigError(found, "a program that resumes", f"script.resumes=true, or {fix}")
    if not promised.fewer_nodes:
        found += f", and workload {workload}, which does not say with how many fewer nodes it could go on"
        raise ConfigError(found, "fewer_nodes in what the workload plans (docs/workloads.md)", fix)


def refuse_unknown_checkpoints(config: Config, workload: Workload, folder: RunFolder) -> None:
    """Raise ConfigError if a run is to go back whose checkpoints only its program knows."""
    if config.resume_from is not None and workload.checkpoints(folder) is None:
        raise ConfigError(
            f"resume_from={config.resume_from} with workload={workload.name}, whose checkpoints are the program's own",
            "a workload that lists its checkpoints (docs/workloads.md), as gpt does",
            "an option of the program that names the checkpoint, such as script.options.resume_from=PATH",
        )


def write_run(plan: Plan, composed: DictConfig, overrides: Sequence[str]) -> None:
    """Make the run folder: the config, in which nothing is left open, what was typed, and the plan.

    A run that is to go back, or on beyond its end, is prepared for that: nothing may work on it.

    Raises:
        ConfigError: it cannot be written.
    """
    folder = RunFolder(plan.run_dir)
    apply_continuation(folder, plan.goes_on, plan.max_steps, workload_of(composed).checkpoints(folder) or ())
    composed.resume_from = None  # it is done, and a start of the job in the queue must not do it again
    for key, value in plan.promised.settled.items():
        OmegaConf.update(composed, key, value, merge=True)
    compose.write_config(folder, composed, without_key(overrides, "resume_from"))
    with writing_into(folder.path):
        write_json(folder.plan, plan.as_dict())
