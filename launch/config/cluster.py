"""Config schema of the nodes and their source: the keys under ``cluster``.

A key that sets an option of sbatch has the name of this option in hydra-submitit-launcher, such as ``cpus_per_task``.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from enum import Enum
from pathlib import Path
from typing import Any, Optional

from omegaconf import MISSING

from launch.errors import ConfigError, key
from launch.runs.measured import read_matmul_rates, read_network

# OmegaConf 2.3 reads these annotations at run time and knows Optional[X], not X | None.
# ruff: noqa: UP045


class ClusterKind(Enum):
    """Source of the nodes.

    ``auto`` means ``allocation`` inside a Slurm job, such as a shell of salloc: the run uses the nodes of that job.
    Outside of a job, ``auto`` means ``slurm`` if sbatch is found and a controller answers, else ``local``, processes of
    this machine. ``hosts`` means the hosts of ``cluster.hostfile``.
    """

    auto = "auto"
    local = "local"
    slurm = "slurm"
    allocation = "allocation"
    hosts = "hosts"


class AgentStart(Enum):
    """Program that starts the agents on the nodes of a job: Slurm's srun; ssh; or none, for a job of one node."""

    srun = "srun"
    ssh = "ssh"
    none = "none"


class ContainerRuntime(Enum):
    """Program that runs a container: NVIDIA's Slurm plugin pyxis (with enroot), or Apptainer, formerly Singularity."""

    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class PlacementConfig:
    """Where a job can run, such as a partition, and the resources that it requests there.

    These keys exist under ``cluster`` and in each candidate of ``cluster.placement``. A key that is null in a candidate
    has the value of ``cluster``.
    """

    partition: Optional[str] = key(None, "Partition; null: Slurm's default.")
    account: Optional[str] = key(None, "Account; null: the user's default.")
    qos: Optional[str] = key(None, "Quality of service.")
    constraint: Optional[str] = key(None, "Features that the nodes must have (sbatch --constraint).")
    gres: Optional[str] = key(
        None,
        "Generic resources of each node, if gpus_per_node is not enough (sbatch --gres). GPUs in it replace"
        " gpus_per_node.",
    )
    gpus_per_node: Optional[int] = key(
        None,
        "GPUs of each node; one rank is started on each unless ranks_per_node is set. null: as many as every node of"
        " the partition has; 0: none, and ranks on CPUs. In a placement the number of ranks stays the same.",
        least=0,
    )
    price_per_gpu_hour: Optional[float] = key(None, "Price of a GPU-hour.", unit="currency of the site", least=0)


@dataclass
class ClusterConfig(PlacementConfig):
    """The keys under ``cluster``: where the nodes of a run come from, what they have, and what a job requests there.

    Most keys have an effect only on Slurm.
    """

    kind: ClusterKind = key(MISSING, "Where the nodes come from.")
    timeout_min: int = key(MISSING, "Time limit of a job (sbatch --time).", unit="min", above=0)
    exclude: Optional[str] = key(None, "Nodes that are not used (sbatch --exclude).")
    exclusive: Optional[bool] = key(
        None,
        "Whole nodes, not shared with other jobs (sbatch --exclusive). null: true for the points of a sweep over nodes"
        " or ranks, because points that share nodes slow each other down.",
    )
    gpu_memory_gib: Optional[float] = key(
        None, "Memory of one GPU. If it is known, a run that does not fit is refused.", unit="GiB", least=1
    )
    gpu_name: Optional[str] = key(
        None,
        "Name of the GPUs, as nvidia-smi -L prints it or short (H100, A100-80GB); it gives peak, memory and links"
        " (gpt/accounting/accelerators.csv).",
    )
    gpu_tflops: Optional[float] = key(
        None, "Dense peak of one GPU in the precision of the run; null: from gpu_name.", unit="TFLOP/s", least=1
    )
    matmul_rates: Optional[str] = key(
        None,
        "File of python -m gpt.bench_matmul: measured rates of matrix products by size, instead of gpu_tflops.",
    )
    inter_node_gb_per_s: Optional[float] = key(
        None,
        "Bandwidth from one node to other nodes in one direction, all its network adapters together, for parallel=auto"
        " to compare layouts; launch.doctor --on-cluster measures it. null: of the vendor's own system with such GPUs,"
        " else 100 Gbit/s.",
        unit="GB/s",
        above=0,
    )
    network: Optional[str] = key(
        None, "File of python -m launch.bench_network: measured collectives, instead of stated or assumed links."
    )
    cpus_per_task: Optional[int] = key(
        None,
        "CPUs of each node for all of its ranks together, because the agent is the only task of a node. null: 4 for"
        " each rank, at most what every node of the partition has; all CPUs of a node for all of its GPUs; Slurm's own"
        " number if nodes are whole, or if the site gives CPUs by GPU.",
        least=1,
    )
    mem_gb: Optional[float] = key(None, "Memory of each node (sbatch --mem=NG: Slurm's G is GiB).", unit="GiB", least=1)
    placement: list[PlacementConfig] = key(
        list,
        "Places to try in this order. A point that waits longer than retry_interval_min moves to the next place, and"
        " from the last one to the first.",
    )
    retry_interval_min: float = key(
        30.0,
        "Longest wait of a point in one place of placement; the move loses the priority by age.",
        unit="min",
        above=0,
    )
    give_up_after_min: Optional[float] = key(
        None, "Wait over all places after which a point leaves the queue; null: never.", unit="min", above=0
    )
    points_per_job: int = key(
        1,
        "Points of a sweep in one job, side by side on one node, with requeue and cancel for each. The other keys say"
        " what one point gets, and the job requests as much for each of its points.",
        least=1,
    )
    array_parallelism: int = key(256, "Largest number of elements of a job array that run at the same time.", above=0)
    python: Optional[str] = key(
        None,
        "Python of the agents on the nodes, with this package and its dependencies. null: the Python that submits; in a"
        " container python3 of the image (containers/).",
    )
    container: Optional[str] = key(None, "Image in which agents and ranks run: a file, or a name of the runtime.")
    container_runtime: Optional[ContainerRuntime] = key(None, "Program that runs the image.")
    container_mounts: list[str] = key(
        list,
        "Folders of the node in the container: SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro. The working directory and"
        " the run folders are always mounted.",
    )
    setup: list[str] = key(
        list,
        "Shell lines of the batch script before the run: module load, conda activate, export. The job ends at the"
        " first line that fails; end a line with || true if its failure is harmless.",
    )
    srun_args: list[str] = key(list, "Further options of srun.")
    start: AgentStart = key(
        AgentStart.srun,
        "Start of the agents by the batch script, for clusters where srun fails there. ssh: your own ssh, to each node"
        " of the job, which then has whole nodes unless exclusive=false. none: no program, for a job of one node.",
    )
    hostfile: Optional[str] = key(
        None,
        "File with the hosts of a run without Slurm, whatever kind says: lines NAME or NAME slots=8, as for DeepSpeed"
        " and MPI, with a rank for each slot. The run uses the first hosts, by ssh, as many as nodes and spare_nodes.",
    )
    additional_parameters: dict[str, Any] = key(dict, "Further options of sbatch: name without dashes, and value.")

    @property
    def by_srun(self) -> bool:
        """True if srun starts the agents on the nodes of a job."""
        return self.start is AgentStart.srun and self.hostfile is None

    def validate(self) -> None:
        """Raise ConfigError for keys that contradict each other. ``check_ranges`` checks the range of numbers."""
        for field in fields(self):
            if getattr(self, field.name) == "":
                raise ConfigError(
                    f"cluster.{field.name}= without a value, as an unset variable of the shell leaves it",
                    "a text, or null for Slurm's choice",
                    f"cluster.{field.name}=VALUE, or cluster.{field.name}=null",
                )
        if self.network is not None:
            read_network(Path(self.network))
        if self.matmul_rates is not None:
            read_matmul_rates(Path(self.matmul_rates))
        self.validate_container()
        self.validate_placement()

    def validate_start(self, nodes: int) -> None:
        """Raise ConfigError if ``start`` cannot start the agents of ``nodes`` nodes, spares included."""
        if self.start is AgentStart.none and nodes > 1:
            raise ConfigError(
                f"cluster.start=none with {nodes} nodes",
                "one node: the batch script starts the agent of its own node only",
                "cluster.start=ssh, or nodes=1",
            )
        needs_srun = self.srun_args or self.container_runtime is ContainerRuntime.pyxis
        if needs_srun and not self.by_srun:
            raise ConfigError(
                "cluster.srun_args, or pyxis, for agents that srun does not start",
                "nothing that only srun can do",
                "cluster.srun_args=[] and cluster.container_runtime=apptainer; or cluster.start=srun",
            )

    def validate_container(self) -> None:
        """Raise ConfigError if only one of image and runtime is set, or if ``container_mounts`` has a wrong form."""
        if (self.container is None) != (self.container_runtime is None):
            runtime = None if self.container_runtime is None else self.container_runtime.name
            raise ConfigError(
                f"cluster.container={self.container or 'null'} with cluster.container_runtime={runtime or 'null'}",
                "an image and the program that runs it, or neither",
                f"cluster.container={self.container or 'IMAGE'} cluster.container_runtime={runtime or 'apptainer'}",
            )
        for entry in self.container_mounts:
            paths, options = entry.split(":")[:2], entry.split(":")[2:]
            is_absolute = all(path.startswith("/") for path in paths)
            if not is_absolute or len(options) > 1 or not set(options) <= {"ro", "rw"} or "," in entry:
                raise ConfigError(
                    f"cluster.container_mounts with {entry!r} in it",
                    "SOURCE, SOURCE:TARGET or SOURCE:TARGET:ro, absolute paths without commas",
                    '\'cluster.container_mounts=["/data","/scratch/me:/scratch:ro"]\'',
                )

    def validate_placement(self) -> None:
        """Raise ConfigError if ``placement`` cannot work, or ``additional_parameters`` chooses another Slurm cluster.

        A placement cannot work if two candidates are equal, or if ``give_up_after_min`` leaves no time for a second
        candidate.
        """
        for name in ("clusters", "M"):
            if name in self.additional_parameters:
                raise ConfigError(
                    f"cluster.additional_parameters.{name}={self.additional_parameters[name]}",
                    "the cluster of this machine, which the launcher queries for the job later",
                    f"the same command without cluster.additional_parameters.{name}, on a machine of that cluster",
                )
        give_up, count = self.give_up_after_min, len(self.placement)
        if give_up is not None and count > 1 and give_up <= self.retry_interval_min:
            raise ConfigError(
                f"cluster.give_up_after_min={give_up:g} and cluster.retry_interval_min={self.retry_interval_min:g}",
                "time for more than the first candidate of cluster.placement",
                f"cluster.give_up_after_min={count * self.retry_interval_min:g}",
            )
        seen = [astuple(candidate) for candidate in self.placement]
        for index, candidate in enumerate(self.placement):
            first = seen.index(astuple(candidate))
            if first < index:
                raise ConfigError(
                    f"cluster.placement[{index}] is the same as cluster.placement[{first}]",
                    "candidates that differ: a move to the same place only loses the wait there",
                    "cluster.placement='[{partition: A}, {partition: B}]'",
                )
