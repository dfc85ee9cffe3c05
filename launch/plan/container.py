"""Containers: the words by which srun starts the agent of each node inside an image (``cluster.container``).

The agent runs in the container, and so do the ranks that it starts. pyxis is a plugin of srun and takes options;
Apptainer is a program that srun starts. Owns these words and the mounts. Pure functions; torch-free.
"""

from __future__ import annotations

from pathlib import Path

from launch.config import ClusterConfig, Config
from launch.config.cluster import ContainerRuntime
from launch.errors import ConfigError

SLURM_PATHS = ("/etc/slurm", "/run/munge")
"""Paths of the node that Slurm's client in the image needs: agents ask the controller about their job."""


def refuse_local_container(config: Config) -> None:
    """Raise ConfigError where the agents of this machine would run without the container that is asked for."""
    if config.cluster.container is not None:
        raise ConfigError(
            f"cluster.container={config.cluster.container} with agents on this machine (cluster=local)",
            "a Slurm cluster, whose srun starts the container on each node",
            "cluster=slurm; or the whole command in the container: apptainer exec IMAGE python -m launch ...",
        )


def mounts(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> list[str]:
    """Mounts as ``SOURCE:TARGET`` with options behind: those that were asked for, and what every run needs.

    Working directory and the folder of the run, with the files of its jobs beside it, have their own paths inside.
    """
    asked = [entry if ":" in entry else f"{entry}:{entry}" for entry in cluster.container_mounts]
    targets = {entry.split(":")[1] for entry in asked}
    own = [str(workdir), str(run_dir.parent), *(path for path in SLURM_PATHS if Path(path).exists())]
    return [*asked, *(f"{path}:{path}" for path in dict.fromkeys(own) if path not in targets)]


def srun_arguments(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> list[str]:
    """Options of srun for pyxis; none for Apptainer, nor without a container."""
    if cluster.container is None or cluster.container_runtime is not ContainerRuntime.pyxis:
        return []
    return [
        f"--container-image={cluster.container}",
        f"--container-mounts={','.join(mounts(cluster, workdir, run_dir))}",
        f"--container-workdir={workdir}",
    ]


def python_words(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> list[str] | None:
    """Words that start the Python of the agent where that is the image's; None without a container."""
    if cluster.container is None:
        return None
    if cluster.container_runtime is ContainerRuntime.pyxis:
        return [cluster.container_python]
    binds = [word for entry in mounts(cluster, workdir, run_dir) for word in ("--bind", entry)]
    gpus = [] if cluster.gpus_per_node == 0 else ["--nv"]  # where a node has none, it says so and goes on
    return ["apptainer", "exec", *gpus, "--pwd", str(workdir), *binds, cluster.container, cluster.container_python]


def agent_words(cluster: ClusterConfig, workdir: Path, run_dir: Path) -> list[str]:
    """Words behind ``srun`` that start the agents of a run from a batch script."""
    python = python_words(cluster, workdir, run_dir) or ["python"]
    return [*srun_arguments(cluster, workdir, run_dir), *python, "-m", "launch.agent", str(run_dir)]
