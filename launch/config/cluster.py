"""The schema of where nodes come from and what they are: the keys under ``cluster``.

Names are Slurm's for Slurm's things, spelled as in hydra-submitit-launcher.
"""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from launch.errors import ConfigError, require_positive, require_range
from launch.runs.measured import read_matmul_rates, read_network

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


class ClusterKind(Enum):
    """``auto`` is slurm where sbatch is found and a controller answers, local elsewhere."""

    auto = "auto"
    local = "local"
    slurm = "slurm"


class ContainerRuntime(Enum):
    """``pyxis`` is NVIDIA's plugin of Slurm over enroot; ``apptainer`` the program of that name, once Singularity."""

    pyxis = "pyxis"
    apptainer = "apptainer"


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
    """Price of a GPU-hour there, in the site's currency."""


@dataclass
class LinkConfig:
    """One kind of link, in one direction."""

    latency_us: float = 2.0
    """Time of a message beside that of its bytes, microseconds."""
    bandwidth_gb_per_s: Optional[float] = None
    """10^9 bytes a second; null is what the vendor's own system with such GPUs has, else PCIe or 100 Gbit/s."""

    def validate(self, name: str) -> None:
        """Raise ConfigError where a number is out of its range."""
        if self.bandwidth_gb_per_s is not None:
            require_positive(f"cluster.interconnect.{name}.bandwidth_gb_per_s", self.bandwidth_gb_per_s)
        require_range(f"cluster.interconnect.{name}.latency_us", self.latency_us, 0, float("inf"))


@dataclass
class NodeLinkConfig(LinkConfig):
    """A link between nodes."""

    latency_us: float = 5.0


@dataclass
class InterconnectConfig:
    """The links of the nodes, by which parallel=auto ranks layouts; ``python -m launch.doctor --on-cluster`` measures
    them."""

    intra_node: LinkConfig = field(default_factory=LinkConfig)
    """From one GPU to the others of its node."""
    inter_node: NodeLinkConfig = field(default_factory=NodeLinkConfig)
    """From a node to others, all its network adapters together."""

    def validate(self) -> None:
        """Raise ConfigError where a number is out of its range."""
        self.intra_node.validate("intra_node")
        self.inter_node.validate("inter_node")


MAIL_TYPES = (
    *("NONE", "ALL", "BEGIN", "END", "FAIL", "REQUEUE", "INVALID_DEPEND", "STAGE_OUT", "ARRAY_TASKS"),
    *("TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50"),
)
"""Types of mail that sbatch(1) of Slurm 22.05 knows."""


@dataclass
class ClusterConfig:
    """Source of the nodes. All but ``kind`` and the times is for Slurm."""

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
    exclusive: Optional[bool] = None
    """Whole nodes, shared with no other job (sbatch --exclusive). null: for the points of a sweep over nodes or ranks,
    which would otherwise run beside each other and measure that."""
    gres: Optional[str] = None
    """Generic resources of each node, where gpus_per_node does not say it."""
    gpus_per_node: Optional[int] = None
    """GPUs of each node; one rank is started on each of them unless ranks_per_node says otherwise. null: those that
    every node of the partition has, where Slurm tells; 0: none, and ranks that compute on CPUs."""
    gpu_memory_gib: Optional[float] = None
    """Memory of one GPU, GiB; where it is said, a run that does not fit is refused."""
    gpu_name: Optional[str] = None
    """Name of the GPUs, as nvidia-smi -L prints it or short (H100, A100-80GB); by it peak, memory and links are known
    (gpt/accounting/hardware.py)."""
    gpu_tflops: Optional[float] = None
    """Dense peak of one GPU in the precision of the run, TFLOP/s; null is what is known of gpu_name."""
    matmul_efficiency: float = 0.5
    """The share of that peak at which a pass computes while it sends nothing; parallel=auto only."""
    matmul_rates: Optional[str] = None
    """File of ``python -m gpt.bench_matmul``: rates of matrix products by size, in place of peak and efficiency."""
    interconnect: InterconnectConfig = field(default_factory=InterconnectConfig)
    network: Optional[str] = None
    """File of ``python -m launch.bench_network``: each collective as it was measured, in place of interconnect."""
    cpus_per_task: Optional[int] = None
    """CPUs of each node for all of its ranks: there is one task, the agent, on a node. null: 4 for each rank, at most
    what every node of the partition has; where nodes are whole, or the site gives CPUs by GPU, what Slurm gives."""
    bind_cpus: bool = True
    """Bind each rank to the CPUs of the job that are near its GPU (its NUMA node), where they are known and enough."""
    mem_gb: Optional[float] = None
    """Memory of each node, as sbatch --mem=NG asks for it: Slurm's GB are GiB (2^30 bytes)."""
    price_per_gpu_hour: Optional[float] = None
    """Price of a GPU-hour, in the site's currency."""
    placement: list[PlacementConfig] = field(default_factory=list)
    """Candidates, in this order: a point that waits longer than retry_interval_min moves to the next candidate, round
    and round. What a candidate does not say is as above; with no candidate the run stays where ``cluster`` puts it."""
    retry_interval_min: float = 30.0
    """Minutes that a point waits in one place before it moves to the next, fractions allowed. It loses the
    priority that its age has earned it there."""
    give_up_after_min: Optional[float] = None
    """A point that waits longer than this, minutes, over all places, is taken out of the queue; null: it waits on."""
    comment: Optional[str] = None
    mail_user: Optional[str] = None
    """Recipient of Slurm's mail about the jobs of a run (sbatch --mail-user); null: nobody."""
    mail_type: str = "BEGIN,END,FAIL,REQUEUE"
    """Events that mail_user hears of, as for sbatch --mail-type; ARRAY_TASKS: of each point of a sweep by itself."""
    array_parallelism: int = 256
    """Most elements of a job array that run at the same time."""
    container: Optional[str] = None
    """Image that the agents and their ranks run in: a file, or a name as the runtime takes it; null: none."""
    container_runtime: Optional[ContainerRuntime] = None
    """pyxis or apptainer."""
    container_mounts: list[str] = field(default_factory=list)
    """Folders of the node in the container, SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro. The working directory and the
    folder of the runs are mounted anyhow."""
    container_python: str = "python3"
    """Python of the image, which has this package and what it needs (containers/)."""
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
        for key in ("gpus_per_node", "gpu_memory_gib", "gpu_tflops", "cpus_per_task", "mem_gb", "price_per_gpu_hour"):
            if getattr(self, key) is not None:
                least = 0 if key in ("gpus_per_node", "price_per_gpu_hour") else 1
                require_range(f"cluster.{key}", getattr(self, key), least, float("inf"))
        for entry in fields(self):
            if getattr(self, entry.name) == "":
                raise ConfigError(
                    f"cluster.{entry.name}= without a value, as a variable of the shell that is not set leaves it",
                    "a text, or null where Slurm is to choose",
                    f"cluster.{entry.name}=VALUE, or cluster.{entry.name}=null",
                )
        require_range("cluster.matmul_efficiency", self.matmul_efficiency, 0.01, 1)
        self.interconnect.validate()
        if self.network is not None:
            read_network(Path(self.network))
        if self.matmul_rates is not None:
            read_matmul_rates(Path(self.matmul_rates))
        self.validate_mail()
        self.validate_container()
        self.validate_cluster()
        self.validate_placement()

    def validate_mail(self) -> None:
        """Raise ConfigError where Slurm has no mail of this type: sbatch would say so only when it is asked."""
        unknown = [word for word in self.mail_type.split(",") if word.strip().upper() not in MAIL_TYPES]
        if unknown:
            raise ConfigError(
                f"cluster.mail_type={self.mail_type}, with {', '.join(map(repr, unknown))} in it",
                f"some of {', '.join(MAIL_TYPES)}",
                "'cluster.mail_type=\"END,FAIL,REQUEUE\"'",
            )

    def validate_container(self) -> None:
        """Raise ConfigError where image and runtime are not named together, or a mount is none."""
        if (self.container is None) != (self.container_runtime is None):
            runtime = None if self.container_runtime is None else self.container_runtime.name
            raise ConfigError(
                f"cluster.container={self.container or 'null'} with cluster.container_runtime={runtime or 'null'}",
                "an image and what runs it, or neither",
                f"cluster.container={self.container or 'IMAGE'} cluster.container_runtime={runtime or 'apptainer'}",
            )
        for entry in self.container_mounts:
            parts = entry.split(":")
            paths, options = parts[:2], parts[2:]
            is_sound = (
                all(path.startswith("/") for path in paths) and len(options) <= 1 and set(options) <= {"ro", "rw"}
            )
            if not is_sound or "," in entry:
                raise ConfigError(
                    f"cluster.container_mounts with {entry!r} in it",
                    "SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, absolute paths without commas",
                    '\'cluster.container_mounts=["/data","/scratch/me:/scratch:ro"]\'',
                )

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
