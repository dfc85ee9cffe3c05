"""The schema of the launcher: a training run, plus where and on how many nodes it happens.

Owns the fields that ``gpt`` does not know. Names are Slurm's for Slurm's things, spelled as in hydra-submitit-launcher.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, field
from enum import Enum
from typing import Any, Optional

from omegaconf import MISSING

from gpt.compose import NOT_IN_POINT as TRAIN_NOT_IN_POINT
from gpt.config import TrainConfig, require_positive, require_range
from gpt.errors import ConfigError

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045

NOT_IN_POINT = (
    *TRAIN_NOT_IN_POINT,
    "spares",
    "cluster",
    "resilience",
    "budget",
    "launch",
    "dry_run",
    "snapshot",
    "hydra",
)
"""Keys that say where and how a run is submitted, not what it is: they do not enter the name of its folder."""


class ClusterKind(Enum):
    """``auto`` is slurm where sbatch is found and a controller answers, local elsewhere."""

    auto = "auto"
    local = "local"
    slurm = "slurm"


def require_cluster_name(key: str, name: str | None) -> None:
    """Raise ConfigError where this is not the name of one cluster; null is the one the command talks to."""
    if name is not None and not re.fullmatch(r"[A-Za-z_][\w.-]*", name):
        raise ConfigError(
            f"{key}={name}", "the name of one cluster, as sacctmgr show clusters prints it", f"{key}=NAME, or null"
        )


@dataclass
class PlacementConfig:
    """One candidate of ``cluster.placement``. What is null is as ``cluster`` says."""

    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    constraint: Optional[str] = None
    gres: Optional[str] = None
    """Generic resources of each node there; where they name GPUs they stand for gpus_per_node."""
    gpus_per_node: Optional[int] = None
    """GPUs of each node there. Ranks stay as many as they are: their number is the run's, not the partition's."""
    cluster: Optional[str] = None
    """Another cluster that this one's slurmdbd knows (sbatch --clusters); it must see the same folders."""
    price_per_gpu_hour: Optional[float] = None
    """What a GPU costs there for an hour, in the site's currency."""


@dataclass
class ClusterConfig:
    """Where the nodes come from. All but ``kind`` and the times is for Slurm."""

    kind: ClusterKind = MISSING
    cluster: Optional[str] = None
    """Another cluster that this one's slurmdbd knows (sbatch --clusters), with the same folders; null: this one."""
    timeout_min: int = MISSING
    """Time limit of a job, minutes (sbatch --time)."""
    signal_delay_s: int = MISSING
    """Seconds before the time limit at which SIGUSR2 asks the run to save and leave (sbatch --signal)."""
    partition: Optional[str] = None
    account: Optional[str] = None
    qos: Optional[str] = None
    constraint: Optional[str] = None
    exclude: Optional[str] = None
    """Nodes not to use."""
    gres: Optional[str] = None
    """Generic resources of each node, where gpus_per_node does not say it."""
    gpus_per_node: Optional[int] = None
    """GPUs of each node; one rank is started on each of them unless ranks_per_node says otherwise."""
    gpu_memory_gib: Optional[float] = None
    """Memory of one GPU, GiB; where it is said, a run that does not fit is refused."""
    cpus_per_task: Optional[int] = None
    """CPUs of each node for all of its ranks: there is one task, the agent, on a node."""
    mem_gb: Optional[float] = None
    """Memory of each node, GB."""
    price_per_gpu_hour: Optional[float] = None
    """What a GPU costs for an hour, in the site's currency."""
    placement: list[PlacementConfig] = field(default_factory=list)
    """Where to try, in this order: a point that waits longer than retry_interval_min moves to the next candidate, round
    and round. What a candidate does not say is as above; with no candidate the run stays where ``cluster`` puts it."""
    retry_interval_min: float = 30.0
    """How long a point waits in one place before it moves to the next, minutes, fractions allowed. It loses the
    priority that its age has earned it there."""
    give_up_after_min: Optional[float] = None
    """A point that waits longer than this, minutes, over all places, is taken out of the queue; null: it waits on."""
    comment: Optional[str] = None
    array_parallelism: int = 256
    """Most elements of a job array that run at the same time."""
    setup: list[str] = field(default_factory=list)
    """Shell lines of the batch script before the run: module load, conda activate, export."""
    srun_args: list[str] = field(default_factory=list)
    additional_parameters: dict[str, Any] = field(default_factory=dict)
    """Any other sbatch option, name without dashes: value."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        require_positive("cluster.timeout_min", self.timeout_min)
        require_range("cluster.signal_delay_s", self.signal_delay_s, 0, 60 * self.timeout_min)
        require_positive("cluster.array_parallelism", self.array_parallelism)
        for key in ("gpus_per_node", "gpu_memory_gib", "cpus_per_task", "mem_gb", "price_per_gpu_hour"):
            if getattr(self, key) is not None:
                least = 0 if key in ("gpus_per_node", "price_per_gpu_hour") else 1
                require_range(f"cluster.{key}", getattr(self, key), least, float("inf"))
        self.validate_cluster()
        self.validate_placement()

    def validate_cluster(self) -> None:
        """Raise ConfigError where it is not one cluster that a job goes to."""
        for key in ("clusters", "M"):
            if key in self.additional_parameters:
                raise ConfigError(
                    f"cluster.additional_parameters.{key}={self.additional_parameters[key]}",
                    "one cluster, which the launcher asks about the job later",
                    "cluster.cluster=NAME, or cluster.placement='[{cluster: A}, {cluster: B}]' for several",
                )
        require_cluster_name("cluster.cluster", self.cluster)

    def validate_placement(self) -> None:
        """Raise ConfigError where the candidates, or the times they are tried for, make no sense."""
        require_positive("cluster.retry_interval_min", self.retry_interval_min)
        if self.give_up_after_min is not None:
            require_positive("cluster.give_up_after_min", self.give_up_after_min)
            if len(self.placement) > 1 and self.give_up_after_min <= self.retry_interval_min:
                raise ConfigError(
                    f"cluster.give_up_after_min={self.give_up_after_min:g} and "
                    f"cluster.retry_interval_min={self.retry_interval_min:g}",
                    "time for more than the first candidate of cluster.placement",
                    f"cluster.give_up_after_min={len(self.placement) * self.retry_interval_min:g}",
                )
        for index, candidate in enumerate(self.placement):
            key = f"cluster.placement[{index}]"
            if candidate.gpus_per_node is not None:
                require_range(f"{key}.gpus_per_node", candidate.gpus_per_node, 0, float("inf"))
            if candidate.price_per_gpu_hour is not None:
                require_range(f"{key}.price_per_gpu_hour", candidate.price_per_gpu_hour, 0, float("inf"))
            require_cluster_name(f"{key}.cluster", candidate.cluster)
            twice = [i for i, other in enumerate(self.placement[:index]) if astuple(other) == astuple(candidate)]
            if twice:
                raise ConfigError(
                    f"{key} is the same as cluster.placement[{twice[0]}]",
                    "candidates that differ: a move to the same place only loses the wait there",
                    "cluster.placement='[{partition: A}, {partition: B}]'",
                )


@dataclass
class RestartLimits:
    """How often a run starts again after each cause; null means as often as it takes."""

    preempted: Optional[int] = None
    timed_out: Optional[int] = None
    node_failed: Optional[int] = 10
    out_of_memory: Optional[int] = 1
    crashed: Optional[int] = 3
    hung: Optional[int] = 3


@dataclass
class ResilienceConfig:
    """What is done when a run is interrupted, and how long things may take before they count as failed."""

    max_restarts: RestartLimits = field(default_factory=RestartLimits)
    max_without_progress: int = MISSING
    """After so many attempts in a row that saved no new checkpoint the run stops."""
    requeue: bool = MISSING
    """On Slurm, put a run that was preempted or ran into its time limit back into the queue."""

    rendezvous_timeout_s: int = MISSING
    """Seconds in which all agents of a run must have found each other."""
    stop_grace_s: int = MISSING
    """Seconds a run that was told to stop has for its last step and checkpoint before its ranks are killed."""
    node_timeout_s: int = MISSING
    """Seconds without a word from a node's agent after which the node counts as lost."""
    frozen_timeout_s: int = MISSING
    """Seconds in which the process of a rank has not run at all after which it counts as hung."""
    hang_timeout_s: int = MISSING
    """Seconds without progress (a forward and backward pass, a round of an evaluation) after which a rank is hung."""
    hang_timeout_slow_s: int = MISSING
    """The same while a rank starts (data, compilation, loading) or writes a checkpoint, which give no sign between."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        for key in ("rendezvous_timeout_s", "stop_grace_s", "max_without_progress", "hang_timeout_slow_s"):
            require_positive(f"resilience.{key}", getattr(self, key))
        for key in ("node_timeout_s", "frozen_timeout_s", "hang_timeout_s"):
            require_range(f"resilience.{key}", getattr(self, key), 5, float("inf"))
        for key in ("preempted", "timed_out", "node_failed", "out_of_memory", "crashed", "hung"):
            limit = getattr(self.max_restarts, key)
            if limit is not None:
                require_range(f"resilience.max_restarts.{key}", limit, 0, float("inf"))


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
    """Seconds between two looks at what was used."""

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
    """What the command does after it has submitted."""

    detach: bool = MISSING
    """Return at once with the job ids, instead of following the jobs to the scaling table. Slurm only.

    Where they may have to be moved (cluster.placement), a process that does it stays behind on this machine."""


@dataclass
class Config(TrainConfig):
    """One point of a sweep."""

    nodes: int = 1
    """Nodes of the run; one agent is started on each."""
    ranks_per_node: Optional[int] = None
    """Processes on each node; null means cluster.gpus_per_node, or 1."""
    spares: int = 0
    """Slurm only: nodes asked for beyond ``nodes``. They wait, and one takes the place of a node that is lost."""
    dry_run: bool = False
    """Print the plan and the sbatch text, and submit nothing."""
    snapshot: bool = False
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
        return self.nodes + self.spares

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.nodes * self.ranks_on_node

    def validate(self) -> None:
        """Raise ConfigError for the first thing that cannot work."""
        super().validate()
        require_positive("nodes", self.nodes)
        require_range("spares", self.spares, 0, float("inf"))
        if self.ranks_per_node is not None:
            require_positive("ranks_per_node", self.ranks_per_node)
        self.cluster.validate()
        self.resilience.validate()
        self.budget.validate(self.cluster)
        gpus = self.cluster.gpus_per_node
        if gpus and self.ranks_on_node > gpus:
            raise ConfigError(
                f"ranks_per_node={self.ranks_on_node} on nodes with cluster.gpus_per_node={gpus}",
                "at most one rank for each GPU",
                f"ranks_per_node={gpus}",
            )
