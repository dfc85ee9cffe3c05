"""The interface between the launcher and the program that it starts.

A workload adds keys to the config, plans a point, and has the command of a rank. The launcher imports none of them:
``workload._target_`` in the config names the class. ``gpt.workload`` is the first one,
``launch.script`` the one for any script; docs/workloads.md shows how to write another. Torch-free.
"""

from __future__ import annotations

import importlib
import inspect
import os
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.errors import ConfigError
from launch.runs.compose import make_absolute
from launch.runs.environment import ORIGIN, git
from launch.runs.events import SavedCheckpoint
from launch.runs.folder import RunFolder
from launch.runs.identity import RunConfig

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from launch.config import ClusterConfig

BEFORE_WORKLOADS = "gpt.workload.GptWorkload"
"""Target of run folders that were made when there was only one: their config does not name it."""


@dataclass(frozen=True)
class PlanRequest:
    """One point of a sweep, which a workload has to plan."""

    overrides: tuple[str, ...]
    """Arguments that were typed for this point, ``key=value``."""
    folder: RunFolder
    """Folder of the run; it may hold an earlier attempt."""
    is_local: bool
    """True where the nodes are agents on this machine, and not Slurm's."""
    nodes: int
    ranks_per_node: int
    cluster: ClusterConfig
    """Keys under ``cluster``, which describe the nodes."""
    local_gpus: int
    """GPUs of this machine that may be used."""
    local_gpu_name: str | None = None
    """Name of the first GPU of this machine."""
    gpu_type: str | None = None
    """Type of the nodes' GPUs in Slurm's Gres (``a100``): the chip, rarely its memory."""
    sweep_sizes: tuple[int, ...] = ()
    """Numbers of ranks of all points of the command, as far as the launcher knows: advice has to suit them all."""
    rate_factor: float = 1.0
    """Factor on the compute rate of a cost model, fitted to measured steps by ``launch.project``."""
    link_factor: float = 1.0
    """Factor on the bandwidth of all links of a cost model, and its inverse on their latency; fitted likewise."""

    min_nodes: int | None = None
    """Smallest number of nodes with which the run may go on where some are lost; None if it may not."""

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_per_node

    @property
    def smaller(self) -> list[int]:
        """Smaller numbers of nodes that ``min_nodes`` allows, from the largest."""
        return [] if self.min_nodes is None else list(range(self.nodes - 1, self.min_nodes - 1, -1))


@dataclass(frozen=True)
class WorkloadPlan:
    """Plan of a workload for a point. A figure that is not known is left out, never zero."""

    rows: Mapping[str, str] = field(default_factory=dict)
    """Lines of the plan for people: title and text."""
    notes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Longer passages below them: title and lines."""
    warnings: tuple[str, ...] = ()
    """Lines on settings that work but are probably a mistake; shown in the plan and before a submission."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Figures for programs, as JSON has them: these keys at the root of ``plan.json`` are the workload's."""
    settled: Mapping[str, Any] = field(default_factory=dict)
    """Dotted keys that the command did not set, and the values that the plan chose."""
    max_steps: int | None = None
    """Steps of the whole run, from which the remaining time follows."""
    checkpoint_kind: str = ""
    """Runs with the same one have checkpoints of one size, so that a save of one tells how long the other's takes."""
    checkpoint_bytes: int | None = None
    """Size of one checkpoint."""
    step_kind: str = ""
    """Runs with the same one take as long for a step on the same nodes; empty where nothing tells."""
    step_s: float | None = None
    """Time of a step by a model of the workload, seconds; None if it has none for these nodes."""
    saves: str = ""
    """Override that says how often the run saves, for messages, such as ``checkpoint.interval=200``."""
    saves_more_often: str = ""
    """Override that has the run save twice as often, for messages, such as ``checkpoint.interval=100``."""
    checkpoints_kept: int = 1
    """Checkpoints that lie in the run folder at most at the same time, the one being written included."""
    resumes: bool = True
    """True where a new start resumes from a checkpoint, so that an interrupted run may be requeued."""
    uses_cpus: bool | None = None
    """True where the ranks compute on CPUs; None where that is not known."""
    fewer_nodes: tuple[int, ...] = ()
    """Those of ``PlanRequest.smaller``, from the largest, with which the run can go on from a checkpoint of any other
    number: same steps, same global batch. The agents start the ranks with one of them where nodes are lost."""


@dataclass(frozen=True)
class StepTime:
    """Time of an optimizer step by a workload's cost model, by cause: seconds of the rank that sets the pace."""

    compute_s: float
    bubble_s: float = 0.0
    """Pipeline bubble."""
    communication_s: Mapping[str, float] = field(default_factory=dict)
    """Exposed communication by name, such as the axes of a device mesh."""

    @property
    def step_s(self) -> float:
        """Seconds of the whole step."""
        return self.compute_s + self.bubble_s + sum(self.communication_s.values())


@dataclass(frozen=True)
class TrainingGoal:
    """A model of so many parameters, to be trained on so many units of work, tokens for a language model."""

    parameters: float
    work: float


@dataclass(frozen=True)
class SetUp:
    """One way to train towards a goal on given nodes, by a workload's cost model."""

    parallelism: str
    """The parallelism in words."""
    micro_batch: int
    step_s: float
    work_per_step: float
    """Units of work of one step, of all ranks together."""
    memory_bytes: int
    """Of one rank."""
    mfu: float | None
    """Share of the device's peak, by the PaLM convention; None where the peak is unknown."""
    command: str
    """Overrides that make it so, to be typed after ``python -m launch``."""


@dataclass(frozen=True)
class RankCommand:
    """Command of a rank. All ranks of a run start alike; RANK and the like tell them apart."""

    args: tuple[str, ...]
    """Program and arguments."""
    env: Mapping[str, str] = field(default_factory=dict)
    """Variables that are added to the environment of the agent."""
    defaults: Mapping[str, str] = field(default_factory=dict)
    """Variables that are set where the user has not set them."""
    workdir: Path | None = None
    """Working directory; None for the one the job was submitted from."""
    preload: tuple[str, ...] = ()
    """Modules that every rank imports. Where ``args`` is ``sys.executable, "-m", MODULE, ...`` each node imports them
    once, and its ranks are forked. They must start no threads and no CUDA, and read none of ``env`` while imported."""
    wants_memory_store: bool = False
    """Keep a memory store on each node, whose content outlives the ranks (``launch.worker.memory``)."""


@dataclass(frozen=True)
class RankContract:
    """Behavior of the ranks, from which the agent knows how they ended and whether they hang."""

    records_events: bool = True
    """True where the ranks write ``started`` and how they ended into the event log through ``launch.worker``. Otherwise
    the agent does: exit status 0 is finished."""
    stop_signal: str = "SIGTERM"
    """Sent to the ranks to have them save and leave."""
    requeue_exit: int | None = None
    """Exit status that means: saved, put me back into the queue."""
    resumes: bool = True
    """True where a new start resumes from a checkpoint of the workload's own. Otherwise there is no second start."""
    silence_timeout_s: float | None = None
    """Seconds without a line in its log after which a rank without a heartbeat counts as hung; None: never."""
    progress: str | None = None
    """Regular expression that finds step records in the log of a rank."""
    unit: str | None = None
    """Unit of throughput: tokens, samples, images."""
    work_per_step: float | None = None
    """Units that all ranks together do in a step."""
    weak_scaling: bool = False
    """True where the work of a step grows with the number of ranks."""
    max_steps: int | None = None
    writes_curves: bool = False
    """True where the agent writes TensorBoard's files from the step records of rank 0."""


@dataclass(frozen=True)
class CodeTree:
    """The files that make a run what it is: fingerprinted before every attempt, and copied for ``copy_code``."""

    root: Path
    files: Callable[[Path], Iterable[tuple[str, Path]]]
    """Of a root, which may be that of a copy: names relative to it and paths, in order."""
    has_launcher: bool
    """True if the folder contains the launcher itself, which then runs from the copy too."""


class Workload:
    """A kind of program that the launcher can start. A subclass has to say how a rank is started, and may say more.

        class Counter(Workload):
            name = "counter"

            def command(self, config, folder, attempt):
                return RankCommand((sys.executable, "count.py"))

    ``config`` is one point of a sweep, with the keys of the launcher and those of ``schema``. No method starts or
    writes anything. All of them run on the login node, without torch; the agent of each node also calls ``command``,
    ``contract`` and ``code``.
    """

    name: str = ""
    """Goes into ``environment.json``, and so into reports."""
    schema: type[RunConfig] = RunConfig
    """Dataclass of the keys that it adds at the root of the config, a subclass of RunConfig. Its ``validate`` raises
    ConfigError."""
    not_in_point: Sequence[str] = ()
    """Keys, or groups of keys, that do not distinguish runs: they do not enter the name of the run folder."""
    resumable: Sequence[str] = ()
    """Keys, or groups of keys, that may change between the attempts of one run."""
    raw_keys: Sequence[str] = ()
    """Keys whose value is taken as typed, such as a regular expression."""
    length: Sequence[str] = ()
    """Keys, ``resumable`` too, that set the number of steps of a run, if a finished run can continue with more."""
    figures: Sequence[str] | None = None
    """Names in the step records, which ``objective`` may name; None if they are not known."""
    goal_words: Sequence[str] = ()
    """Overrides with which ``launch.project --fit`` starts."""

    def make_paths_absolute(self, document: DictConfig) -> None:
        """Make paths among the keys absolute: they are relative to the folder of the command, and ranks run elsewhere.

        Args:
            document: the composed config, changed in place.
        """
        make_absolute([(document, "output_dir"), (document, "run_dir")])

    def computes_on_cpus(self, config: Any) -> bool:
        """Return whether the config uses no GPUs, so that the launcher requests none."""
        return False

    def plan(self, config: Any, request: PlanRequest) -> WorkloadPlan:
        """Return the plan of a point, in a few milliseconds.

        Raises:
            ConfigError: the point cannot work.
        """
        contract = self.contract(config, request.world_size)
        rows = {"workload": self.name, "command": shlex.join(self.command(config, request.folder, attempt=1).args)}
        return WorkloadPlan(rows=rows, max_steps=contract.max_steps, resumes=contract.resumes)

    def command(self, config: Any, folder: RunFolder, attempt: int) -> RankCommand:
        """Return the command of the ranks of an attempt. Attempts are counted from 1."""
        raise NotImplementedError(f"{type(self).__name__}.command")

    def contract(self, config: Any, world_size: int) -> RankContract:
        """Return how the ranks report, stop and end."""
        return RankContract(records_events=False, resumes=False)

    def code(self, config: Any) -> CodeTree:
        """Return the files whose change between attempts is noticed, and that ``copy_code=true`` copies.

        By default the folder of the module that defines the class. ``command`` finds the copy under ``code`` in the
        ``plan.json`` of the run.
        """
        folder = Path(inspect.getfile(type(self))).absolute().parent
        return CodeTree(folder, code_files, has_launcher=False)

    def checkpoints(self, folder: RunFolder) -> Iterable[SavedCheckpoint] | None:
        """Return the checkpoints of a run, newest first, for ``resume_from`` and ``launch.verify``.

        None if only the program knows its checkpoints.
        """
        return None

    def copies(self, folder: RunFolder) -> Iterable[SavedCheckpoint] | None:
        """Return the copies of checkpoints that are kept elsewhere, newest first; None as for ``checkpoints``."""
        return None

    def step_time(self, config: Any, request: PlanRequest) -> StepTime | None:
        """Return the time of a step by a cost model, with which ``launch.project`` extrapolates measured steps.

        ``request.cluster`` describes the nodes; ``rate_factor`` and ``link_factor`` say how much faster they are.
        None if there is no model, or if too little is known of the nodes.

        Raises:
            ConfigError: the point cannot work.
        """
        return None

    def set_ups(self, config: Any, request: PlanRequest, goal: TrainingGoal) -> Sequence[SetUp]:
        """Return ways to train towards a goal on the nodes of the request, the fastest first; none by default.

        Raises:
            ConfigError: there is none on these nodes.
        """
        return ()


CODE_SUFFIXES = (".py", ".yaml", ".yml", ".json", ".toml", ".cfg", ".sh", ".txt", ".md", ".ini")
SKIPPED_FOLDERS = ("__pycache__", "outputs", "node_modules", "wandb")
MAX_FILES = 5000
"""A folder with more files than this, and without git, is not the folder of one program."""


def code_files(root: Path, script: str | None = None) -> Iterator[tuple[str, Path]]:
    """Yield the files of a program's folder: names relative to ``root`` and paths, in order.

    In a checkout these are the files that git tracks, and code that it does not ignore; in a copy of the code, all
    files; in another folder, all code, or only ``script`` if the folder has too many files.
    """
    if (root / ORIGIN).is_file():
        # A program that runs from the copy leaves compiled files there.
        paths = (path for path in root.rglob("*") if path.name != ORIGIN and "__pycache__" not in path.parts)
        names = [str(path.relative_to(root)) for path in paths]
    else:
        names = git_names(root) or folder_names(root) or ([Path(script).name] if script else [])
    for name in sorted(set(names)):
        if (root / name).is_file():
            yield name, root / name


def git_names(root: Path) -> list[str]:
    """Return the files that git tracks, and code that it neither tracks nor ignores."""
    tracked = git(root, "ls-files", "-z")
    untracked = git(root, "ls-files", "-z", "--others", "--exclude-standard")
    new = [name for name in (untracked or b"").decode().split("\0") if name.endswith(CODE_SUFFIXES)]
    return [name for name in [*(tracked or b"").decode().split("\0"), *new] if name]


def folder_names(root: Path) -> list[str]:
    """Return the code below a folder without git; nothing if it has more than MAX_FILES files of code."""
    found: list[str] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in SKIPPED_FOLDERS]
        found += [str((Path(folder) / name).relative_to(root)) for name in files if name.endswith(CODE_SUFFIXES)]
        if len(found) > MAX_FILES:
            return []
    return found


def possible_sizes(request: PlanRequest, check: Callable[[PlanRequest], object]) -> tuple[int, ...]:
    """Return the numbers of nodes among ``request.smaller`` that ``check`` does not refuse, from the largest.

    Args:
        check: raises ConfigError where the run cannot go on with the nodes of a request.

    Raises:
        ConfigError: there are such numbers, and it refuses all of them.
    """

    def refusal(nodes: int) -> ConfigError | None:
        try:
            check(replace(request, nodes=nodes, min_nodes=None))
        except ConfigError as error:
            return error
        return None

    refusals = {nodes: refusal(nodes) for nodes in request.smaller}
    possible = tuple(nodes for nodes, error in refusals.items() if error is None)
    if refusals and not possible:
        least = min(refusals)
        below = next((nodes for nodes in range(least - 1, 0, -1) if refusal(nodes) is None), None)
        first = next(error for error in refusals.values() if error is not None)
        fixes = [f"resilience.min_nodes={below}"] if below else [first.fix.split(", or ")[0]]
        raise ConfigError(
            f"resilience.min_nodes={request.min_nodes}, and with nodes={max(refusals)}: {first.found}",
            f"a number of nodes from {least} to {max(refusals)} with which the run can go on at the same global batch",
            ", or ".join([*fixes, "resilience.min_nodes=null"]),
        )
    return possible


@cache
def load_workload(target: str) -> Workload:
    """Make the workload that a dotted path names.

    Raises:
        ConfigError: it cannot be imported, or is no workload.
    """
    module_name, _, name = target.rpartition(".")
    expected = "the dotted path of a subclass of launch.workload.Workload that this Python can import"
    fix = "workload=script script.path=train.py, workload=gpt, or workload._target_=PACKAGE.MODULE.CLASS"
    try:
        module = importlib.import_module(module_name) if module_name else None
    except ImportError as error:
        raise ConfigError(f"workload._target_={target}: {error}", expected, fix) from error
    kind = getattr(module, name, None)
    if not isinstance(kind, type):
        raise ConfigError(f"workload._target_={target}, and {module_name or target} has no class {name}", expected, fix)
    if not issubclass(kind, Workload) or kind.command is Workload.command:
        lacking = "is no launch.workload.Workload" if not issubclass(kind, Workload) else "has no method command"
        raise ConfigError(f"workload._target_={target}, which {lacking}", expected, fix)
    return kind()
