"""The interface between the launcher and the program that it starts.

A workload adds keys to the config, plans a point, and returns the command of a rank. The launcher imports no workload
directly: ``workload._target_`` in the config names the class. ``gpt.workload`` trains GPT models, ``launch.script``
runs any script; docs/workloads.md shows how to write another. Does not import torch.
"""

from __future__ import annotations

import importlib
import inspect
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError
from launch.runs.compose import RunConfig, make_absolute
from launch.runs.environment import ORIGIN, git
from launch.runs.events import SavedCheckpoint
from launch.runs.folder import RunFolder

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from launch.config import ClusterConfig

BEFORE_WORKLOADS = "gpt.workload.GptWorkload"
"""Workload of run folders whose config names no workload. Older versions made them."""


@dataclass(frozen=True)
class PlanRequest:
    """One point of a sweep for which a workload makes a plan."""

    overrides: tuple[str, ...]
    """Arguments that were typed for this point, ``key=value``."""
    folder: RunFolder
    """Folder of the run, which may contain files of earlier attempts."""
    is_local: bool
    """True if agents on this machine stand for nodes; False for nodes of Slurm."""
    nodes: int
    ranks_per_node: int
    cluster: ClusterConfig
    """Keys under ``cluster`` that describe the nodes."""
    local_gpus: int
    """Number of GPUs of this machine that may be used."""
    local_gpu_name: str | None = None
    """Name of this machine's first GPU; None if it has none."""
    gpu_type: str | None = None
    """Type of the nodes' GPUs in Slurm's Gres, such as ``a100``; None if not known.

    It rarely determines their memory.
    """
    sweep_sizes: tuple[int, ...] = ()
    """Number of ranks of each point of the command; empty if not known.

    An override that the plan proposes must be right for all points.
    """
    rate_factor: float = 1.0
    """Factor by which a cost model multiplies the compute rate. ``launch.project`` fits it to measured steps."""
    link_factor: float = 1.0
    """Factor by which a cost model multiplies the bandwidth of all links, and divides latencies.

    ``launch.project`` fits it to measured steps.
    """

    min_nodes: int | None = None
    """Smallest number of nodes with which the run may continue after it has lost nodes; None if it needs all nodes."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def smaller(self) -> list[int]:
        """Numbers of nodes below ``nodes`` with which the run may continue, from the largest to ``min_nodes``."""
        return [] if self.min_nodes is None else list(range(self.nodes - 1, self.min_nodes - 1, -1))


@dataclass(frozen=True)
class WorkloadPlan:
    """What a workload plans for a point. A figure that is not known is None or empty, never zero."""

    rows: Mapping[str, str] = field(default_factory=dict)
    """Rows of the plan for people: title -> text."""
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Longer texts below the rows of the plan: title -> lines."""
    warnings: tuple[str, ...] = ()
    """Warnings about settings that work but are probably a mistake. The plan and each submission show them."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Figures for programs: key at the root of ``plan.json`` -> JSON value."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Dotted key -> value that the plan chose, for keys that the command did not set."""
    max_steps: int | None = None
    """Number of steps of the whole run, from which the remaining time follows; None if not known."""
    checkpoint_bytes: int | None = None
    """Size of one checkpoint in bytes; None if not known."""
    step_s: float | None = None
    """Time of a step in seconds by the workload's cost model; None if there is no model for these nodes."""
    saves_more_often: str = ""
    """Override with which the run saves twice as often, such as ``checkpoint.interval=100``. Messages propose it."""
    checkpoints_kept: int = 1
    """Largest number of checkpoints in the run folder at the same time, including one that is being written."""
    resumes: bool = True
    """True if a new start resumes from a checkpoint, so that an interrupted run may be requeued."""
    uses_cpus: bool | None = None
    """True if the ranks compute on CPUs; None if not known."""
    fewer_nodes: tuple[int, ...] = ()
    """Numbers of nodes from ``PlanRequest.smaller``, largest first, with which the run can continue.

    Such a run continues from a checkpoint of any number of nodes, with the same steps and global batch. If nodes are
    lost, the agents start the ranks with one of these numbers.
    """


@dataclass(frozen=True)
class StepTime:
    """Estimated time of an optimizer step on the slowest rank, in seconds, in parts by cause."""

    compute_s: float
    bubble_s: float = 0.0
    """Time of the pipeline bubble in seconds."""
    communication_s: Mapping[str, float] = field(default_factory=dict)
    """Name, such as an axis of the device mesh -> seconds of communication that does not overlap computation."""

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.bubble_s + sum(self.communication_s.values())


@dataclass(frozen=True)
class TrainingGoal:
    """Goal of a training: number of parameters, and units of work in all (tokens for a language model)."""

    parameters: float
    work: float


@dataclass(frozen=True)
class SetUp:
    """One way to train a model of a given size on given nodes, by a workload's cost model."""

    parallelism: str
    """Parallelism as text for people."""
    micro_batch: int
    """Sequences of one forward and backward pass."""
    step_s: float
    """Time of a step in seconds."""
    work_per_step: float
    """Units of work of one step of all ranks together."""
    memory_bytes: int
    """Memory of one rank in bytes."""
    mfu: float | None
    """Model FLOPs utilization by the PaLM convention, 0 to 1; None if the peak of the device is unknown."""
    command: str
    """Overrides to type after ``python -m launch``."""


PLACEHOLDER = re.compile(r"%\{(\w+)\}")


def fill(text: str, values: Mapping[str, Any]) -> str:
    """Return an argument with each ``%{NAME}`` replaced by ``values[NAME]``. Unknown names are not replaced."""
    return PLACEHOLDER.sub(lambda found: str(values.get(found.group(1), found.group(0))), text)


@dataclass(frozen=True)
class RankCommand:
    """Command of a rank, equal for all ranks. Environment variables such as RANK distinguish the ranks."""

    args: tuple[str, ...]
    """Program and arguments.

    Placeholders in the arguments, and in the values of ``env``, are replaced: ``%{rank}`` and ``%{local_rank}`` by the
    numbers of the rank, ``%{coordinator}`` by ``ADDRESS:PORT``. ADDRESS is that of the node of rank 0. PORT was free
    there when the start of the ranks began.
    """
    env: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that are added to those of the agent."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Environment variables that are set unless the user has set them."""
    workdir: Path | None = None
    """Working directory; None for the directory from which the job was submitted."""
    preload: tuple[str, ...] = ()
    """Modules that every rank imports.

    If ``args`` is ``sys.executable, "-m", MODULE, ...`` or ``sys.executable, FILE, ...``, each node imports the modules
    once, and its ranks are forked. During import, the modules must not start threads or CUDA, or read a variable of
    ``env``.
    """
    wants_memory_store: bool = False
    """True to run a memory store on each node, whose content outlives the ranks (``launch.worker.memory``)."""


@dataclass(frozen=True)
class RankContract:
    """How ranks behave. The agent uses this to find out how ranks ended and whether they hang."""

    records_events: bool = True
    """True if the ranks record their start and end in the event log through ``launch.worker``.

    If False, the agent records both. Exit status 0 of a rank then means finished.
    """
    stop_signal: str = "SIGTERM"
    """Signal that requests the ranks to save and leave."""
    requeue_exit: int | None = None
    """Exit status by which a rank requests a requeue after a save; None if there is no such status."""
    resumes: bool = True
    """True if a new start resumes from a checkpoint of the workload. If False, the ranks are started only once."""
    silence_timeout_s: float | None = None
    """Seconds without a new line in the log after which a rank without a heartbeat counts as hung; None: no limit."""
    progress: str | None = None
    """Regular expression that finds step records in the log of a rank; None if there are none."""
    unit: str | None = None
    """Unit of throughput: tokens, samples or images; None if not known."""
    work_per_step: float | None = None
    """Units of work of all ranks together in a step; None if not known."""
    weak_scaling: bool = False
    """True if the work of a step grows with the number of ranks."""
    max_steps: int | None = None
    """Number of steps of the whole run; None if not known."""
    writes_curves: bool = False
    """True if the agent writes TensorBoard's files from the step records of rank 0."""


@dataclass(frozen=True)
class CodeTree:
    """Code files of a run. They are compared before every attempt, and copied for ``copy_code``."""

    root: Path
    files: Callable[[Path], Iterable[tuple[str, Path]]]
    """Function that yields (name relative to a folder, path) for each code file in that folder, in sorted order.

    Its argument is the folder: ``root``, or a copy of ``root``. The order matters for the digest of the files.
    """
    has_launcher: bool
    """True if the folder contains the launcher itself, so that the launcher also runs from a copy."""


class Workload:
    """A kind of program that the launcher can start. A subclass must define ``command``; all else has a default.

        class Counter(Workload):
            name = "counter"

            def command(self, config, folder, attempt):
                return RankCommand((sys.executable, "count.py"))

    ``config`` is one point of a sweep, with the keys of the launcher and those of ``schema``. Except for ``rehearse``,
    no method starts or writes anything. All methods run on the login node, without torch. The agent of each node also
    calls ``command``, ``contract`` and ``code``.
    """

    name: str = ""
    """Name of the workload in ``environment.json`` and in reports."""
    schema: type[RunConfig] = RunConfig
    """Dataclass of the keys that the workload adds at the root of the config. Its ``validate`` raises ConfigError."""
    not_in_point: Sequence[str] = ()
    """Keys or groups of keys that are not part of the name of the run folder."""
    resumable: Sequence[str] = ()
    """Keys or groups of keys that may change between the attempts of one run."""
    raw_keys: Sequence[str] = ()
    """Keys whose value is taken exactly as typed, such as a regular expression."""
    length: Sequence[str] = ()
    """Keys that set the number of steps, with which a finished run can continue; empty if it cannot.

    They are also in ``resumable``.
    """
    figures: Sequence[str] | None = None
    """Names of the figures in step records that ``objective`` may name; None if not known."""
    goal_words: Sequence[str] = ()
    """Overrides that ``launch.project --fit`` adds for keys that the user does not set, such as a family of models.

    Empty if the workload cannot plan a model of a given size.
    """

    def make_paths_absolute(self, document: DictConfig) -> None:
        """Make the paths in the config absolute, because ranks do not run in the folder of the command.

        Args:
            document: composed config, changed in place.
        """
        make_absolute([(document, "output_dir"), (document, "run_dir")])

    def computes_on_cpus(self, config: Any) -> bool:
        """Return whether ranks use no GPUs with this config. If so, the launcher requests none."""
        return False

    def plan(self, config: Any, request: PlanRequest) -> WorkloadPlan:
        """Return the plan of a point. Takes a few milliseconds.

        Raises:
            ConfigError: the point cannot work.
        """
        contract = self.contract(config, request.world_size)
        rows = {"workload": self.name, "command": shlex.join(self.command(config, request.folder, attempt=1).args)}
        return WorkloadPlan(rows=rows, max_steps=contract.max_steps, resumes=contract.resumes)

    def command(self, config: Any, folder: RunFolder, attempt: int) -> RankCommand:
        """Return the command of the ranks of an attempt. ``attempt`` counts from 1."""
        raise NotImplementedError(f"{type(self).__name__}.command")

    def contract(self, config: Any, world_size: int) -> RankContract:
        """Return how ranks report, stop and end. ``world_size`` is their number."""
        return RankContract(records_events=False, resumes=False)

    def code(self, config: Any) -> CodeTree:
        """Return the code files of the program. The launcher reports files that change between attempts.

        With ``copy_code=true``, it also copies the files. ``command`` finds the path of the copy under ``code`` in the
        run's ``plan.json``, and starts the ranks from the copy. The default is the folder of the module that defines
        the class.
        """
        folder = Path(inspect.getfile(type(self))).absolute().parent
        return CodeTree(folder, code_files, has_launcher=False)

    def checkpoints(self, folder: RunFolder) -> Iterable[SavedCheckpoint] | None:
        """Return the checkpoints of a run, newest first, for ``resume_from`` and ``launch.verify``.

        None if only the program knows its checkpoints.
        """
        return None

    def copies(self, folder: RunFolder) -> Iterable[SavedCheckpoint] | None:
        """Return the copies of checkpoints at other paths, newest first; None if only the program knows them."""
        return None

    def step_time(self, config: Any, request: PlanRequest) -> StepTime | None:
        """Return the time of a step by a cost model, with which ``launch.project`` extrapolates measured steps.

        ``request.cluster`` describes the nodes; ``rate_factor`` and ``link_factor`` adapt the model to measured steps.
        None if there is no model, or if too little is known about the nodes.

        Raises:
            ConfigError: the point cannot work.
        """
        return None

    def rehearse(self, config: Any, folder: RunFolder) -> bool:
        """Try a training step of a point on this machine, without GPUs, for ``dry_run=deep``.

        Prints the findings. Returns True if there is no fault. ``folder`` is a temporary folder that contains only the
        config of the point.

        Raises:
            ConfigError: the workload, or this point of it, cannot be tried in this way.
        """
        raise ConfigError(
            f"dry_run=deep with workload={self.name}",
            "workload=gpt, or a workload whose class has the method rehearse",
            "dry_run=true",
        )

    def set_ups(self, config: Any, request: PlanRequest, goal: TrainingGoal) -> Sequence[SetUp]:
        """Return ways to reach a goal on the requested nodes, fastest first; empty by default.

        Raises:
            ConfigError: no way works on these nodes.
        """
        return ()


CODE_SUFFIXES = (".py", ".yaml", ".yml", ".json", ".toml", ".cfg", ".sh", ".txt", ".md", ".ini")
SKIPPED_FOLDERS = ("__pycache__", "outputs", "node_modules", "wandb")
MAX_FILES = 5000
"""Largest number of code files in a folder without git. A larger folder probably holds several programs."""


def code_files(root: Path, script: str | None = None) -> Iterator[tuple[str, Path]]:
    """Yield (name relative to ``root``, path) for each file of a program's folder ``root``, in the order of the names.

    In a git checkout, these are the files that git tracks, and code files that git does not ignore. In a copy of the
    code, these are all files. In another folder, these are all code files; if there are more than ``MAX_FILES``, only
    ``script``.
    """
    if (root / ORIGIN).is_file():
        # A program that runs from the copy leaves compiled files in it.
        paths = (path for path in root.rglob("*") if path.name != ORIGIN and "__pycache__" not in path.parts)
        names = [str(path.relative_to(root)) for path in paths]
    else:
        tracked, new = (
            [name for name in (git(root, "ls-files", "-z", *options) or b"").decode().split("\0") if name]
            for options in ((), ("--others", "--exclude-standard"))
        )
        names = [*tracked, *(name for name in new if name.endswith(CODE_SUFFIXES))]
        names = names or folder_names(root) or ([Path(script).name] if script else [])
    for name in sorted(set(names)):
        if (root / name).is_file():
            yield name, root / name


def folder_names(root: Path) -> list[str]:
    """Return the code files below a folder without git, relative to ``root``; empty if more than MAX_FILES."""
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        found += [str((Path(folder) / name).relative_to(root)) for name in files if name.endswith(CODE_SUFFIXES)]
        if len(found) > MAX_FILES:
            return []
    return found


def possible_sizes(request: PlanRequest, check: Callable[[PlanRequest], object]) -> tuple[int, ...]:
    """Return the numbers of nodes in ``request.smaller`` that ``check`` accepts, largest first.

    Args:
        request: the request of the point.
        check: function that raises ConfigError if the run cannot continue with the nodes of a request.

    Raises:
        ConfigError: ``request.smaller`` is not empty, and ``check`` refuses all its numbers.
    """

    possible: list[int] = []
    refusals: list[ConfigError] = []
    for nodes in request.smaller:
        try:
            check(replace(request, nodes=nodes, min_nodes=None))
            possible.append(nodes)
        except ConfigError as error:
            refusals.append(error)
    if refusals and not possible:
        most = request.smaller[0]
        raise ConfigError(
            f"resilience.min_nodes={request.min_nodes}, and with nodes={most}: {refusals[0].found}",
            f"a number of nodes up to {most} with which the run can continue at the same global batch",
            f"{refusals[0].fix.split(', or ')[0]}, or resilience.min_nodes=null",
        )
    return tuple(possible)


@cache
def load_workload(target: str) -> Workload:
    """Return an object of the workload class with the dotted path ``target``.

    Raises:
        ConfigError: the path cannot be imported, or is no workload.
    """
    module, _, name = target.rpartition(".")
    expected = "the dotted path of a subclass of launch.workload.Workload that this Python can import"
    fix = "workload=script script.path=train.py, workload=gpt, or workload._target_=PACKAGE.MODULE.CLASS"
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"workload._target_={target}: {error}", expected, fix) from error
    if not isinstance(kind, type) or not issubclass(kind, Workload):
        raise ConfigError(f"workload._target_={target}, which is no launch.workload.Workload", expected, fix)
    if kind.command is Workload.command:
        raise ConfigError(f"workload._target_={target}, which has no method command", expected, fix)
    return kind()
