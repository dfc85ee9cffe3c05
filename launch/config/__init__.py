"""The schema of the launcher: where and on how many nodes a run happens, whatever it computes."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field, fields, replace
from typing import Any, Optional, Self

from omegaconf import MISSING

from launch.config.cluster import ClusterConfig, ClusterKind, InterconnectConfig, PlacementConfig
from launch.errors import ConfigError, require_positive, require_range
from launch.runs.files import ReportFile
from launch.runs.identity import RunConfig
from launch.runs.overrides import NOT_IN_POINT
from launch.runs.records import ObjectiveOf

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045

__all__ = [
    "NOT_IN_POINT",
    "BudgetConfig",
    "ClusterConfig",
    "ClusterKind",
    "Config",
    "HealthCheckConfig",
    "InterconnectConfig",
    "LaunchConfig",
    "PlacementConfig",
    "ResilienceConfig",
    "RestartLimits",
    "WorkloadConfig",
]


def split_command(key: str, command: Any, example: str) -> list[str]:
    """Program and arguments of a command that was typed as a string or as a list; none where there is none.

    Raises:
        ConfigError: its quotes are not closed.
    """
    if not isinstance(command, str):
        return [str(word) for word in command or ()]
    try:
        return shlex.split(command)
    except ValueError as error:
        raise ConfigError(f"{key}={command}: {error}", "quotes that are closed", f"a list: '[{example}]'") from error


@dataclass
class RestartLimits:
    """Restart limits by cause; null means as often as it takes. Failures are forgiven (resilience.forgive_after_s)."""

    preempted: Optional[int] = None
    timed_out: Optional[int] = None
    requested: Optional[int] = None
    """Left with the exit status that asks for the queue (script.requeue_exit)."""
    node_failed: Optional[int] = 10
    out_of_memory: Optional[int] = 1
    diverged: Optional[int] = 1
    """Ended by a FloatingPointError. Faulty hardware is cured by a restart, a learning rate is not: once tells them."""
    crashed: Optional[int] = 3
    hung: Optional[int] = 3


@dataclass
class HealthCheckConfig:
    """Checks that each agent makes of its node before every start of the ranks; a sick node is left to a spare.

    GPUs are checked where NVIDIA's driver is, links that were up at the first start of the job must be up at the next.
    """

    enabled: bool = True
    """False starts the ranks unchecked."""
    min_free_mib: float = 4.0
    """Room below which the filesystem of the run folder, of the temporary folder or of /dev/shm counts as full."""
    links: list[str] = field(default_factory=list)
    """Network interfaces and InfiniBand adapters that must be up at every start, such as [ib0,mlx5_0]."""
    command: Any = None
    """The site's own check: a program and its arguments, as a string that is split as a shell would, or as a list. Exit
    status 0 means healthy; else its last line is the reason."""
    timeout_s: float = 60.0
    """Seconds after which a check that has not come back means a sick node; the command has as many for itself."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range, or the command is none."""
        require_range("resilience.health_check.min_free_mib", self.min_free_mib, 0, float("inf"))
        require_range("resilience.health_check.timeout_s", self.timeout_s, 0.1, 3600)
        if self.command is not None and not self.words:
            raise ConfigError(
                f"resilience.health_check.command={self.command!r}",
                "a program and its arguments",
                "'resilience.health_check.command=\"/opt/site/check_node --quick\"', or null for none",
            )

    @property
    def words(self) -> list[str]:
        """Program and arguments of the command; none where there is no command."""
        return split_command("resilience.health_check.command", self.command, "/opt/site/check_node,--quick")


@dataclass
class ResilienceConfig:
    """Restarts, requeue, and the timeouts after which something counts as failed."""

    max_restarts: RestartLimits = field(default_factory=RestartLimits)
    health_check: HealthCheckConfig = field(default_factory=HealthCheckConfig)
    max_without_progress: int = MISSING
    """After so many attempts in a row that saved no new checkpoint the run stops.

    One that was preempted, or lost a node, before its first step does not count: that was not the run's fault."""
    forgive_after_s: Optional[float] = 3600.0
    """Seconds after which a failure no longer counts for max_restarts, if the run has saved a newer checkpoint since.

    So a limit bounds how often a cause comes in an hour, and not in a run of weeks. null: failures count until the
    command is typed again."""
    min_nodes: Optional[int] = None
    """Go on with fewer nodes, but no fewer than these, where nodes are lost or sick and no spare is left: in the same
    job, at the same global batch. The next start of the job has all again. null: the job is requeued instead."""
    requeue: bool = MISSING
    """On Slurm, put a run that was preempted or ran into its time limit back into the queue."""

    fork_ranks: bool = True
    """Import what the ranks import once on each node, and fork the ranks; false starts Python for each of them.

    For workloads that name what to import, as gpt does (RankCommand.preload). Ranks are executed as ever where the code
    has changed since the start of the job, or where Python needs another start (deterministic=true)."""
    rendezvous_timeout_s: int = MISSING
    """Seconds in which all agents of a run must have found each other."""
    grace_period_s: int = MISSING
    """Seconds a run that was told to stop has for its last step and checkpoint before its ranks are killed."""
    node_timeout_s: int = MISSING
    """Seconds without a message from a node's agent after which the node counts as lost."""
    heartbeat_timeout_s: int = MISSING
    """Seconds in which the process of a rank has not run at all after which it counts as hung."""
    hang_timeout_s: int = MISSING
    """Seconds without progress (a forward and backward pass, a round of an evaluation) after which a rank is hung."""
    startup_and_save_timeout_s: int = MISSING
    """Seconds without progress while a rank starts (data, compilation, loading) or saves, without a sign between."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        for key in ("rendezvous_timeout_s", "grace_period_s", "max_without_progress", "startup_and_save_timeout_s"):
            require_positive(f"resilience.{key}", getattr(self, key))
        for key in ("node_timeout_s", "heartbeat_timeout_s", "hang_timeout_s"):
            require_range(f"resilience.{key}", getattr(self, key), 5, float("inf"))
        if self.min_nodes is not None:
            require_positive("resilience.min_nodes", self.min_nodes)
        if self.forgive_after_s is not None:
            require_range("resilience.forgive_after_s", self.forgive_after_s, 0, float("inf"))
        self.health_check.validate()
        for entry in fields(self.max_restarts):
            limit = getattr(self.max_restarts, entry.name)
            if limit is not None:
                require_range(f"resilience.max_restarts.{entry.name}", limit, 0, float("inf"))


@dataclass
class BudgetConfig:
    """Caps for all points of a command together, over all their attempts.

    An hour of an allocation counts for every GPU in it, from the start of the job to its end.
    """

    gpu_hours: Optional[float] = None
    """GPU-hours; at the cap a run saves and stops, and what could exceed it is not submitted. null: no cap."""
    cost: Optional[float] = None
    """GPU-hours times cluster.price_per_gpu_hour, in the same currency. null: no cap."""
    poll_s: float = MISSING
    """Seconds between two polls of what was used."""

    def validate(self, cluster: ClusterConfig) -> None:
        """Raise ConfigError where a number is out of its range, or nobody knows what is to be counted."""
        require_range("budget.poll_s", self.poll_s, 0.1, 3600)
        for key in ("gpu_hours", "cost"):
            cap = getattr(self, key)
            if cap is None:
                continue
            require_positive(f"budget.{key}", cap)
            if not cluster.gpus_per_node:
                raise ConfigError(
                    f"budget.{key}={cap:g}, and nodes that are not said to have GPUs",
                    "cluster.gpus_per_node, by which the hours of a node are counted; without GPUs, "
                    "cluster.timeout_min and resilience.max_restarts bound a run",
                    f"cluster.gpus_per_node=8, or budget.{key}=null",
                )
        if self.cost is not None and cluster.price_per_gpu_hour is None:
            raise ConfigError(
                f"budget.cost={self.cost:g} without a price",
                "what an hour of one GPU costs",
                "cluster.price_per_gpu_hour=2.5, or budget.gpu_hours=N in place of budget.cost",
            )


@dataclass
class LaunchConfig:
    """Behavior of the command before and after it submits."""

    check_limits: bool = True
    """Ask Slurm for its partitions and nodes, and refuse what could never start there. Slurm only."""

    detach: bool = MISSING
    """Return at once with the job ids, instead of following the jobs to the scaling table. Slurm only.

    Where they may have to be moved (cluster.placement), a process that does it stays behind on this machine."""
    sequential: bool = MISSING
    """Run the points of a sweep one after another, as they do on this machine; on Slurm by job dependencies
    (sbatch --dependency=afterany)."""
    poll_s: float = MISSING
    """Seconds between two polls of Slurm's queue while the command follows its jobs, 0.5 to 3600."""
    report_files: list[ReportFile] = MISSING
    """Files of the report that is written at the end: md, csv, png, svg, json, html, and tensorboard, a sweep's Scaling
    run or a run's Summary. Drawing is most of the work; python -m launch.report makes all of them later."""
    on_event: Any = None
    """Command of yours that the agent of the head node runs when a run starts, ends, fails, is requeued, loses a node
    or cannot copy a checkpoint, with the event in LAUNCH_EVENT and the like (docs/resilience.md). A string that is
    split as a shell would, or a list. The run folder keeps it: a token belongs into a file that the command reads."""
    on_event_timeout_s: float = 60.0
    """Seconds after which that command is killed, 1 to 600."""
    gpu_sample_s: float = 5.0
    """Seconds between two samples that each agent takes of its node's NVIDIA GPUs while the ranks run: power, energy,
    clocks, temperature, throttle reasons. 0 takes none; 1 to 3600 else. Needs nvidia-ml-py, pip install '.[gpu]'."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range, or a command is none."""
        require_range("launch.poll_s", self.poll_s, 0.5, 3600)
        if self.gpu_sample_s != 0 and not 1 <= self.gpu_sample_s <= 3600:
            expected = "0, for no samples, or seconds from 1 to 3600"
            raise ConfigError(f"launch.gpu_sample_s={self.gpu_sample_s:g}", expected, "launch.gpu_sample_s=5")
        require_range("launch.on_event_timeout_s", self.on_event_timeout_s, 1, 600)
        if self.on_event is not None and not self.on_event_command:
            found, fix = f"launch.on_event={self.on_event!r}", "launch.on_event=/home/me/notify.sh, or null for none"
            raise ConfigError(found, "a program and its arguments", fix)

    @property
    def on_event_command(self) -> list[str]:
        """Program and arguments of on_event; none where there is no command."""
        return split_command("launch.on_event", self.on_event, "/home/me/notify.sh,--quiet")


@dataclass
class WorkloadConfig:
    """The program that is launched."""

    _target_: str = MISSING
    """Dotted path of the class that describes it to the launcher: see docs/workloads.md."""


@dataclass
class Config(RunConfig):
    """One point of a sweep, as far as the launcher knows it: the keys of its workload come on top."""

    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    nodes: int = 1
    """Nodes of the run; one agent is started on each."""
    ranks_per_node: Optional[int] = None
    """Processes on each node. null: cluster.gpus_per_node; on this machine its GPUs where all points have nodes=1; or
    1."""
    spare_nodes: int = 0
    """Slurm only: nodes asked for beyond ``nodes``. They wait, and one takes the place of a node that is lost."""
    objective: Optional[str] = None
    """Figure of the step records, such as val_loss, that each point of a sweep returns to Hydra's sweeper: what Optuna,
    Ax and Nevergrad search by. null returns nothing."""
    objective_of: ObjectiveOf = ObjectiveOf.minimum
    """Value of the objective that a run returns: its minimum, its maximum or the last one."""
    dry_run: bool = False
    """Print the plan and the sbatch text, and submit nothing."""
    copy_code: bool = False
    """Run from a copy of the code taken at submission, however the checkout changes while the job waits."""
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    resilience: ResilienceConfig = field(default_factory=ResilienceConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)

    @property
    def ranks_on_node(self) -> int:
        """Processes on each node, with the default resolved."""
        return self.ranks_per_node or self.cluster.gpus_per_node or 1

    @property
    def nodes_asked(self) -> int:
        """Nodes of the allocation."""
        return self.nodes + self.spare_nodes

    @property
    def may_shrink(self) -> bool:
        """Tell whether the run goes on with fewer nodes where some are lost."""
        return self.resilience.min_nodes is not None and self.resilience.min_nodes < self.nodes

    def with_nodes(self, nodes: int) -> Self:
        """Return the config of a start with another number of nodes."""
        return replace(self, nodes=nodes)

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_on_node

    def validate(self) -> None:
        """Raise ConfigError for the first thing that cannot work."""
        super().validate()
        require_positive("nodes", self.nodes)
        require_range("spare_nodes", self.spare_nodes, 0, float("inf"))
        if self.ranks_per_node is not None:
            require_positive("ranks_per_node", self.ranks_per_node)
        self.cluster.validate()
        self.resilience.validate()
        least = self.resilience.min_nodes
        if least is not None and least > self.nodes:
            raise ConfigError(
                f"resilience.min_nodes={least} with nodes={self.nodes}",
                f"at most the nodes that the run asks for, {self.nodes}",
                f"resilience.min_nodes={self.nodes}, or nodes={least}",
            )
        self.budget.validate(self.cluster)
        self.launch.validate()
        if self.launch.sequential and self.cluster.placement:
            raise ConfigError(
                "launch.sequential=true with cluster.placement",
                "jobs that stay where they are: the next one would no longer wait for one that is submitted elsewhere",
                "launch.sequential=false, or cluster.partition=NAME in place of cluster.placement",
            )
        gpus = self.cluster.gpus_per_node
        if gpus and self.ranks_on_node > gpus:
            raise ConfigError(
                f"ranks_per_node={self.ranks_on_node} on nodes with cluster.gpus_per_node={gpus}",
                "at most one rank for each GPU",
                f"ranks_per_node={gpus}",
            )
