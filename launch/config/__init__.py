"""Config schema of the launcher: the keys that every run has, whatever its program.

The classes contain the keys for nodes and ranks, restarts (``resilience``), ``budget``, and the command (``launch``).
"""

from __future__ import annotations

import importlib
import importlib.util
import shlex
import sys
from dataclasses import dataclass
from typing import Any, ClassVar, Optional

from omegaconf import MISSING

from launch.config.cluster import ClusterConfig
from launch.config.cluster import ClusterKind as ClusterKind  # for the importers of this module
from launch.errors import ConfigError, check_ranges, key
from launch.runs.compose import RunConfig
from launch.runs.folder import ReportFile
from launch.runs.records import ObjectiveOf

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045

ENGINES = ("fork", "exec", "torchrun", "nvrx")
NVRX = "nvidia_resiliency_ext"


def split_command(name: str, command: Any) -> list[str]:
    """Return program and arguments of a command that was typed as a string or as a list; empty for None.

    ``name`` is the key of the command, for error messages.

    Raises:
        ConfigError: a quote is not closed, or the command is empty.
    """
    if command is None:
        return []
    fix = f"'{name}=[PROGRAM,ARGUMENT]', or {name}=null"
    try:
        words = shlex.split(command) if isinstance(command, str) else [*map(str, command)]
    except (ValueError, TypeError) as error:  # an open quote, or a number
        raise ConfigError(f"{name}={command}: {error}", "a program and its arguments", fix) from error
    if not words:
        raise ConfigError(f"{name}={command!r}", "a program and its arguments", fix)
    return words


SIGNAL_MARGIN_S = 20
"""Seconds between the end of a grace period and the time limit of a job, for agents to record the end."""


@dataclass
class RestartLimits:
    """Largest number of restarts by cause; null: no limit.

    After ``forgive_after_s``, a failure no longer counts if the run has saved a newer checkpoint since.

    A run that was preempted, timed out, or left with the exit status of ``script.requeue_exit`` is requeued without a
    limit.
    """

    timed_out: ClassVar[None] = None  # max_without_progress stops a run that reaches its time limit in vain
    # One restart shows whether the cause was a faulty device or another process, and not the run itself.
    out_of_memory: ClassVar[int] = 1
    diverged: ClassVar[int] = 1
    node_failed: Optional[int] = key(10, "A node was lost or sick.", least=0)
    crashed: Optional[int] = key(
        3,
        "A rank failed in another way. Hangs have the same limit, counted apart (hang_timeout_s).",
        least=0,
    )

    @property
    def hung(self) -> int | None:
        """Largest number of restarts after hangs: the same number as after crashes, None for no limit."""
        return self.crashed


DEEP = "deep"
"""Value of ``dry_run`` with which the workload also runs a step without GPUs."""
CHAIN = "chain"
"""Value of ``resilience.requeue`` for clusters that do not requeue jobs: a next job continues the run."""


@dataclass
class ResilienceConfig:
    """Restarts, requeue, and the times after which something counts as failed."""

    max_restarts: RestartLimits = key(RestartLimits, "Largest number of restarts by cause.")
    health_check: Any = key(
        True,
        "Check each node before every start of its ranks: GPUs if NVIDIA's driver is installed, disks, memory, and"
        " links that were up at the first start. A spare replaces a sick node. false: ranks start unchecked. A command"
        " (a string as in a shell, or a list) is the site's own check, which runs besides: exit status 0 means healthy;"
        " otherwise its last line is the reason. It has 60 s.",
    )
    max_without_progress: ClassVar[int] = 3
    """Largest number of attempts in a row that save no new checkpoint; then the run stops.

    An attempt that was preempted or lost a node before its first step does not count.
    """
    forgive_after_s: ClassVar[float] = 3600.0
    """Seconds after which a failure no longer counts for max_restarts, if a newer checkpoint was saved since."""
    min_nodes: Optional[int] = key(
        None,
        "Smallest number of nodes with which the run continues, in the same job and with the same global batch, if"
        " nodes are lost and no spare is left. The next start of the job has all nodes again. null: the job is"
        " requeued instead.",
        least=1,
    )
    requeue: Any = key(
        MISSING,
        "On Slurm, requeue a run that was preempted or that reached its time limit. chain: for clusters that do not"
        " requeue jobs; a next job waits in the queue for the end of this one, and continues the run. It is cancelled"
        " when the run is over.",
    )
    engine: str = key(
        "fork",
        "What starts the ranks. fork: modules are imported once on each node, and the ranks are forked, for workloads"
        " that name these modules (RankCommand.preload); after a change of the code, and with deterministic=true, as"
        " exec. fork:torch+numpy: also for a Python script of yours, which imports these modules. exec: each rank is a"
        " new process. torchrun; nvrx: ft_launcher of nvidia-resiliency-ext;"
        " PACKAGE.MODULE.CLASS: an engine of yours (docs/resilience.md).",
    )
    rendezvous_timeout_s: ClassVar[float] = 600.0
    """Seconds in which all agents of a run must join."""
    grace_period_s: int = key(
        MISSING,
        "Time for the last step and checkpoint of a run that was stopped; then ranks are killed. Slurm sends SIGUSR2"
        " (sbatch --signal) this time and 20 s before the time limit.",
        unit="s",
        least=1,
    )
    node_timeout_s: int = key(
        MISSING,
        "Time without a message from the agent of a node after which the node counts as lost.",
        unit="s",
        least=5,
    )
    heartbeat_timeout_s: int = key(
        MISSING,
        "Time in which the process of a rank did not run at all, after which it counts as hung.",
        unit="s",
        least=5,
    )
    hang_timeout_s: int = key(
        MISSING,
        "Time without progress after which a rank counts as hung. Progress is a forward and backward pass, or a round"
        " of an evaluation.",
        unit="s",
        least=5,
    )
    startup_and_save_timeout_s: int = key(
        MISSING,
        "The same while a rank starts (data, compilation, loading) or saves a checkpoint.",
        unit="s",
        least=1,
    )

    @property
    def health_command(self) -> list[str]:
        """Return program and arguments of the site's own health check; empty if there is none."""
        return (
            [] if isinstance(self.health_check, bool) else split_command("resilience.health_check", self.health_check)
        )

    @property
    def preload(self) -> tuple[str, ...]:
        """Modules that ``engine=fork:MODULE+MODULE`` imports before it forks the ranks; empty without such modules.

        If torch is one of these modules, ``torch._dynamo`` is added. Every optimizer of torch imports this module,
        and the import takes half of the time of all imports.
        """
        kind, _, named = self.engine.partition(":")
        modules = named.split("+") if kind == "fork" and named else []
        return (*modules, *(["torch._dynamo"] if "torch" in modules else []))

    @property
    def own_engine(self) -> Any:
        """Class of the user that ``engine`` names; None for an engine of the launcher.

        Raises:
            ConfigError: the class cannot be imported or lacks a method, or a package is missing.
        """
        name, fix = f"resilience.engine={self.engine}", "resilience.engine=fork"
        if self.engine == "nvrx" and importlib.util.find_spec(NVRX) is None:
            found = f"{name}, and {sys.executable} has no package {NVRX}"
            raise ConfigError(found, "the package in the Python of the agents", f"pip install {NVRX}, or {fix}")
        if self.engine in ENGINES or self.preload:
            return None
        names = ", ".join((*ENGINES, "fork:MODULE+MODULE"))
        expected = f"one of {names}, or the dotted path of a class as launch.agent.engine.Engine"
        module, _, attribute = self.engine.rpartition(".")
        try:
            kind = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError, ValueError) as error:
            raise ConfigError(f"{name}: {error}", expected, fix) from error
        lacking = [method for method in ("start", "ranks", "statuses", "stop") if not hasattr(kind, method)]
        if lacking:
            raise ConfigError(f"{name}, which has no method {', '.join(lacking)}", expected, fix)
        return kind


@dataclass
class BudgetConfig:
    """Caps on what all points of a command use together, over all their attempts.

    A GPU counts from the start of its job to the end of the job, even while no ranks run.
    """

    gpu_hours: Optional[float] = key(
        None,
        "GPU-hours. At the cap a run saves and stops; a point that could exceed it is not submitted. null: no cap.",
        unit="GPU-hours",
        above=0,
    )
    cost: Optional[float] = key(
        None, "GPU-hours times cluster.price_per_gpu_hour; null: no cap.", unit="currency of the site", above=0
    )

    def validate(self, cluster: ClusterConfig) -> None:
        """Raise ConfigError if a cap needs a number of GPUs or a price that ``cluster`` does not set."""
        for name, cap in (("gpu_hours", self.gpu_hours), ("cost", self.cost)):
            if cap is not None and not cluster.gpus_per_node:
                raise ConfigError(
                    f"budget.{name}={cap:g} without cluster.gpus_per_node",
                    "the GPUs of a node, which the cap counts; without GPUs, cluster.timeout_min and"
                    " resilience.max_restarts limit a run",
                    f"cluster.gpus_per_node=8, or budget.{name}=null",
                )
        if self.cost is not None and cluster.price_per_gpu_hour is None:
            raise ConfigError(
                f"budget.cost={self.cost:g} without a price",
                "the price of a GPU-hour",
                "cluster.price_per_gpu_hour=2.5, or budget.gpu_hours=N in place of budget.cost",
            )


@dataclass
class LaunchConfig:
    """What the command ``gpt-launch`` does before and after it submits a run."""

    check_limits: bool = key(True, "On Slurm, read its partitions and nodes, and refuse what could never start there.")
    detach: bool = key(
        MISSING,
        "On Slurm, return with the job ids at once, instead of following the jobs to the scaling table. With"
        " cluster.placement a process stays behind on this machine and moves the jobs.",
    )
    sequential: bool = key(
        MISSING, "Run the points of a sweep one after another; on Slurm by job dependencies (afterany)."
    )
    parallel: Any = key(
        1,
        "Points that run side by side on this machine, each with its share of the GPUs, or without GPUs of the CPUs."
        " auto: as many as their ranks have room. On Slurm, cluster.points_per_job does the same.",
    )
    stop_at_first_failure: bool = key(
        False, "Stop all other points of the command when one fails. Runs that can resume save a checkpoint before."
    )
    on: Optional[str] = key(
        None,
        "ssh:LOGIN or ssh:LOGIN:FOLDER: run the command on that login node, with a copy of the code of this folder"
        " (docs/howto.md). LAUNCH_ON does the same for every command. null: run it here.",
    )
    after: Optional[str] = key(
        None,
        "Run folder, or folder of runs, whose runs must finish before: Slurm starts the job then, and cancels it if"
        " one of them fails (afterok). afterany:FOLDER waits for any end. null: no wait.",
    )
    poll_s: float = key(
        MISSING,
        "Time between two polls of Slurm's queue while the command follows its jobs. The use of a budget is read at"
        " every sixth poll.",
        unit="s",
        least=0.5,
        most=3600,
    )
    report_files: list[ReportFile] = key(
        MISSING,
        "Files of the report at the end: md, csv, png, svg, json, html, and tensorboard (a sweep's Scaling run or a"
        " run's Summary). Drawing takes most of the time; python -m launch.report makes all of them later.",
    )
    on_event: Any = key(
        None,
        "Command that the agent of the head node runs when a run starts, ends, fails, is requeued, loses a node or"
        " cannot copy a checkpoint, with the event in LAUNCH_EVENT and the like (docs/resilience.md). A string as in a"
        " shell, or a list. It is killed after 60 s. The run folder keeps it, so a secret belongs into a file that it"
        " reads.",
    )

    @property
    def on_event_command(self) -> list[str]:
        """Return program and arguments of on_event; empty if there is no command."""
        return split_command("launch.on_event", self.on_event)


@dataclass
class WorkloadConfig:
    """The keys under ``workload``, which choose the program that is launched."""

    _target_: str = key(MISSING, "Dotted path of the class that describes the program (docs/workloads.md).")


@dataclass
class Config(RunConfig):
    """Config of one point of a sweep: the keys of the launcher. Its workload adds more keys."""

    workload: WorkloadConfig = key(WorkloadConfig, "The program that is launched.")
    nodes: int = key(1, "Nodes of the run; one agent is started on each.", least=1)
    ranks_per_node: Optional[int] = key(
        None,
        "Processes on each node. null: cluster.gpus_per_node; the GPUs of this machine if it runs all points with"
        " nodes=1; otherwise 1.",
        least=1,
    )
    spare_nodes: int = key(
        0, "On Slurm, further nodes of the job. They wait, and one replaces a node that is lost.", least=0
    )
    spare_jobs: int = key(
        0,
        "On Slurm, largest number of one-node jobs that replace lost nodes, for each start of the job. Such a job is"
        " submitted when a node is lost, no spare is left and the run continues with fewer nodes"
        " (resilience.min_nodes).",
        least=0,
    )
    objective: Optional[str] = key(
        None,
        "Figure of the step records, such as val_loss, that each point returns to Hydra's sweeper; Optuna, Ax and"
        " Nevergrad search with it. null returns nothing.",
    )
    objective_of: ObjectiveOf = key(
        ObjectiveOf.minimum, "Value of the objective that a run returns: its minimum, its maximum or the last one."
    )
    dry_run: Any = key(
        False,
        "Print the plan and the sbatch text, and submit nothing. deep: also rehearse a step without GPUs, at the true"
        " number of ranks.",
    )
    copy_code: bool = key(
        False, "Run a copy of the code, made at submission, so that later changes of the checkout have no effect."
    )
    launch: LaunchConfig = key(LaunchConfig, "Behavior of the command.")
    cluster: ClusterConfig = key(ClusterConfig, "Source of the nodes.")
    resilience: ResilienceConfig = key(ResilienceConfig, "Restarts, requeue and timeouts.")
    budget: BudgetConfig = key(BudgetConfig, "Caps on GPU-hours and cost.")

    @property
    def budget_poll_s(self) -> float:
        """Seconds between two comparisons of the use with the budget."""
        return 6 * self.launch.poll_s

    @property
    def signal_delay_s(self) -> int:
        """Seconds before the time limit at which Slurm's SIGUSR2 makes the run save and leave (sbatch --signal)."""
        return self.resilience.grace_period_s + SIGNAL_MARGIN_S

    @property
    def ranks_on_node(self) -> int:
        """Number of ranks on each node: as configured, or by default the number of GPUs, or 1 without GPUs."""
        return self.ranks_per_node or self.cluster.gpus_per_node or 1

    @property
    def nodes_asked(self) -> int:
        """Number of nodes that the job requests, spares included."""
        return self.nodes + self.spare_nodes

    @property
    def may_shrink(self) -> bool:
        """True if the run continues with fewer nodes after it has lost one."""
        return self.resilience.min_nodes is not None and self.resilience.min_nodes < self.nodes

    @property
    def world_size(self) -> int:
        """Number of ranks of the run, on all nodes together."""
        return self.nodes * self.ranks_on_node

    def validate(self) -> None:
        """Raise ConfigError for the first key whose value cannot work."""
        check_ranges(self)
        super().validate()
        self.cluster.validate()
        self.cluster.validate_start(self.nodes_asked)
        # Refuse what cannot be read, before anything is submitted.
        _ = self.resilience.health_command, self.launch.on_event_command, self.resilience.own_engine
        grace_s, limit_s = self.resilience.grace_period_s, 60 * self.cluster.timeout_min
        if self.signal_delay_s > limit_s:
            raise ConfigError(
                f"resilience.grace_period_s={grace_s} with cluster.timeout_min={self.cluster.timeout_min}",
                f"at most the time limit, {limit_s} s, less {SIGNAL_MARGIN_S} s",
                f"resilience.grace_period_s={limit_s - SIGNAL_MARGIN_S}",
            )
        least = self.resilience.min_nodes
        if least is not None and least > self.nodes:
            raise ConfigError(
                f"resilience.min_nodes={least} with nodes={self.nodes}",
                f"at most the nodes of the run, {self.nodes}",
                f"resilience.min_nodes={self.nodes}, or nodes={least}",
            )
        self.budget.validate(self.cluster)
        if self.dry_run not in (True, False, DEEP):
            raise ConfigError(f"dry_run={self.dry_run}", f"true, false or {DEEP}", f"dry_run={DEEP}")
        requeue = self.resilience.requeue
        if requeue not in (True, False, CHAIN):
            raise ConfigError(f"resilience.requeue={requeue}", f"true, false or {CHAIN}", f"resilience.requeue={CHAIN}")
        if self.launch.sequential and (self.cluster.placement or requeue == CHAIN):
            found, instead = f"resilience.requeue={CHAIN}", "resilience.requeue=true"
            if self.cluster.placement:
                found, instead = "cluster.placement", "cluster.partition=NAME in place of cluster.placement"
            raise ConfigError(
                f"launch.sequential=true with {found}",
                "runs that keep their job: the next job would no longer wait for a run that continues in another one",
                f"launch.sequential=false, or {instead}",
            )
        self.validate_shared_job()
        if self.spare_jobs and not (self.may_shrink and self.cluster.by_srun):
            raise ConfigError(
                f"spare_jobs={self.spare_jobs} for a run that cannot continue with fewer nodes, or without srun",
                "resilience.min_nodes below nodes, and agents that srun starts",
                f"resilience.min_nodes={max(1, self.nodes - self.spare_jobs)}, or spare_jobs=0",
            )
        if self.launch.stop_at_first_failure and self.launch.detach:
            raise ConfigError(
                "launch.stop_at_first_failure=true with launch.detach=true",
                "a command that stays, and sees the failure",
                "launch.detach=false",
            )
        gpus = self.cluster.gpus_per_node
        if gpus and self.ranks_on_node > gpus:
            raise ConfigError(
                f"ranks_per_node={self.ranks_on_node} on nodes with cluster.gpus_per_node={gpus}",
                "at most one rank for each GPU",
                f"ranks_per_node={gpus}",
            )

    def validate_shared_job(self) -> None:
        """Raise ConfigError if ``cluster.points_per_job`` is set for points that cannot share a job.

        A point can share a job if it has one node, srun starts its agent, and no key needs a job for the point alone.
        """
        cluster, each = self.cluster, f"cluster.points_per_job={self.cluster.points_per_job}"
        refused = {
            f"nodes={self.nodes} spare_nodes={self.spare_nodes}": self.nodes_asked > 1,
            "cluster.gres": cluster.gres is not None,
            "cluster.placement": bool(cluster.placement),
            "cluster.give_up_after_min": cluster.give_up_after_min is not None,
            f"resilience.requeue={CHAIN}": self.resilience.requeue == CHAIN,
            "launch.sequential=true": self.launch.sequential,
            f"cluster.start={cluster.start.name} or cluster.hostfile": not cluster.by_srun,
        }
        for found, is_set in refused.items():
            if is_set and cluster.points_per_job > 1:
                raise ConfigError(
                    f"{each} with {found}",
                    "points of one node each, which share its GPUs (cluster.gpus_per_node) and keep their job",
                    f"cluster.points_per_job=1, or the same without {found.split('=')[0]}",
                )
