"""Facts and checks of the login node: environment, limits, versions, and the filesystems of the folders.

``gather`` reads all facts once. The checks are pure functions of the facts.
"""

from __future__ import annotations

import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil
from packaging.requirements import Requirement

import launch
from launch.config import ClusterConfig, ClusterKind, Config
from launch.config.cluster import ContainerRuntime
from launch.runs.environment import reachable_files
from launch.slurm import client as scheduler
from launch.slurm.checks import Finding, Request, fail, fine, warn
from launch.slurm.limits import SlurmFacts, ask_slurm
from launch.slurm.submit import INHERITED, INHERITED_NAMES, KEPT

DISTRIBUTION = "gpt-launch"
RLIMITS = {"nofile": resource.RLIMIT_NOFILE, "core": resource.RLIMIT_CORE, "memlock": resource.RLIMIT_MEMLOCK}
PYTHONS = ((3, 11), (3, 12), (3, 13))
GIB = 2**30
FEW_FILES = 4096
SHARED = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "panfs", "pvfs2", "wekafs", "cifs", "smb3"),
    *("afs", "gfs2", "ocfs2", "fuse.glusterfs", "glusterfs", "fuse.juicefs", "fuse.quobyte", "fuse.daos"),
    "fuse.moosefs",
}
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
"""Types of filesystems in memory, which each machine has for itself."""
MEASURE = "python -m launch.doctor --on-cluster ..."
SHARED_PATH = "output_dir=PATH on a filesystem that all nodes mount"


@dataclass(frozen=True)
class Folder:
    """A path that may not exist yet, and its filesystem."""

    path: str
    exists: str
    """The path itself, or the deepest existing folder above it."""
    filesystem: str
    """Type of the filesystem by the kernel: nfs4, lustre, ext4, tmpfs, ..."""
    free_bytes: int = 0
    free_inodes: int = 0
    problem: str = ""
    """Error when a file is written; empty if a file was written and removed."""


@dataclass(frozen=True, kw_only=True)
class Facts(SlurmFacts):
    """Facts for all checks: about Slurm, the login node, and the Python that the job will run."""

    kind: ClusterKind
    """Local or slurm, never auto."""
    was_auto: bool
    client: bool
    """True if Slurm's commands are installed here."""
    output: Folder
    """The run's output_dir."""
    programs: tuple[Folder, ...]
    """Folders of the job's Python and of the launcher's code, without folders of the system."""
    container_problem: str = ""
    """Problem with cluster.container; empty if there is none."""
    environment: dict[str, str]
    soft: dict[str, int]
    """Soft limits of this shell: nofile, core in bytes, memlock in bytes. -1 means unlimited."""
    hard: dict[str, int]
    python: tuple[int, int]
    executable: str
    versions: dict[str, str]
    """Name of a distribution -> installed version, for torch and each requirement. A missing one is absent."""
    requirements: tuple[str, ...]
    """Requirements of the launcher's distribution; empty if it is not installed."""


def gather(configs: Sequence[Config]) -> Facts:
    """Read all facts about the points of a command."""
    config = configs[0]
    kind = config.cluster.kind
    slurm = SlurmFacts(limits=None) if kind is ClusterKind.local else ask_slurm()
    requirements: tuple[str, ...] = ()
    with suppress(metadata.PackageNotFoundError):
        requirements = tuple(metadata.distribution(DISTRIBUTION).requires or ())
    versions: dict[str, str] = {}
    for name in {"torch", *(Requirement(text).name for text in requirements)}:
        with suppress(metadata.PackageNotFoundError):
            versions[name.lower()] = metadata.version(name)
    places = {Path(launch.__file__).resolve().parents[1]}
    places |= {Path(sys.prefix)} if sys.prefix != sys.base_prefix else set()
    return Facts(
        **vars(slurm),
        kind=ClusterKind.slurm if kind is ClusterKind.slurm or slurm.limits is not None else ClusterKind.local,
        was_auto=kind is ClusterKind.auto,
        client=shutil.which("sbatch") is not None,
        output=look_at_folder(Path(config.output_dir)),
        programs=tuple(Folder(str(place), str(place), filesystem_of(place)) for place in sorted(places)),
        container_problem=container_problem(config.cluster),
        environment=dict(os.environ),
        soft={name: resource.getrlimit(number)[0] for name, number in RLIMITS.items()},
        hard={name: resource.getrlimit(number)[1] for name, number in RLIMITS.items()},
        python=sys.version_info[:2],
        executable=sys.executable,
        versions=versions,
        requirements=requirements,
    )


def filesystem_of(path: Path) -> str:
    """Return the kernel's name of a path's filesystem, such as nfs4 or fuse.juicefs; ``unknown`` without a mount.

    The name distinguishes FUSE filesystems, which share one number of statfs. The deepest mount counts; of several
    mounts at the same path, the last.
    """
    path.exists()  # Lets an automounter mount the filesystem first.
    real = Path(os.path.realpath(path))
    above = [mount for mount in psutil.disk_partitions(all=True) if real.is_relative_to(mount.mountpoint)]
    return max(reversed(above), key=lambda mount: len(mount.mountpoint)).fstype if above else "unknown"


def look_at_folder(path: Path) -> Folder:
    """Return filesystem and free space of a folder, and the error if a test file cannot be written."""
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    space, problem = os.statvfs(there), ""
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = error.strerror or str(error)
    # Filesystems without a fixed inode table (btrfs, some NFS servers) report 0 of 0.
    inodes = space.f_favail if space.f_files else sys.maxsize
    return Folder(str(path), str(there), filesystem_of(there), space.f_bavail * space.f_frsize, inodes, problem)


def container_problem(cluster: ClusterConfig) -> str:
    """Return the problem with a run's container that this machine can see; empty if there is none."""
    image = cluster.container
    if image is None:
        return ""
    if image.startswith(("/", ".", "~")) and not Path(image).expanduser().exists():
        return f"there is no image {image}"
    if cluster.container_runtime is ContainerRuntime.apptainer:
        return "" if shutil.which("apptainer") else "apptainer is not on the PATH"
    try:
        options = scheduler.run("srun", "--help")
    except scheduler.SlurmError as error:
        return f"srun does not answer: {str(error).strip().splitlines()[-1]}"
    return "" if "--container-image" in options else "srun has no --container-image, which pyxis adds"


# The checks. ``config`` is the config of the first point.


def check_machine(facts: Facts, config: Config, requests: Sequence[Request]) -> list[Finding]:
    """Return the findings of all checks of the login node."""
    return [
        *check_slurm(facts),
        *check_versions(facts),
        *check_programs(facts),
        *check_container(facts, config),
        *check_output_folder(facts),
        *check_space(facts, requests),
        *check_environment(facts),
        *check_threads(facts, config),
        *check_limits(facts, config),
    ]


def check_slurm(facts: Facts) -> Iterator[Finding]:
    """Check that Slurm answers, if it is requested or installed."""
    if facts.limits is not None:
        version = facts.limits.config.get("SLURM_VERSION", "of unknown version")
        yield fine("slurm", f"cluster {facts.limits.config.get('ClusterName', '')}, Slurm {version}, answers")
    elif facts.kind is ClusterKind.slurm:
        fix = "scontrol ping; then ask the site" if facts.client else "a login node of the cluster, or cluster=local"
        yield fail("slurm", facts.slurm_problem, "cluster=slurm submits with sbatch", fix)
    elif facts.client:
        why = "cluster=auto would train on this machine, which may be a login node"
        yield warn("slurm", f"sbatch is installed, and {facts.slurm_problem}", why, "cluster=slurm")
    else:
        found = "cluster=auto: no Slurm here" if facts.was_auto else "cluster=local"
        yield fine("slurm", f"{found}; nodes are agents on this machine")


def check_versions(facts: Facts) -> Iterator[Finding]:
    """Check Python, torch and the other requirements of the job's Python, without importing them."""
    python = f"{facts.python[0]}.{facts.python[1]}"
    if facts.python in PYTHONS:
        yield fine("python", f"{python}, torch {facts.versions.get('torch', 'missing')}")
    else:
        fix = f"python{PYTHONS[-1][0]}.{PYTHONS[-1][1]} -m venv .venv && .venv/bin/pip install -e ."
        why = "tested are Python 3.11 to 3.13, and the job runs this one"
        yield fail("python", f"Python {python} at {facts.executable}", why, fix)
    if not facts.requirements:
        found = f"{DISTRIBUTION} is not installed in {facts.executable}"
        yield warn("libraries", found, "the versions that fit are then not known", "pip install -e .")
    for wanted in map(Requirement, facts.requirements):
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = facts.versions.get(wanted.name.lower())
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            found = f"{wanted.name} {version or 'is not installed'} in {facts.executable}"
            why = f"the job runs this Python, and {wanted.name}{wanted.specifier} is tested"
            yield fail("libraries", found, why, f"pip install '{wanted.name}{wanted.specifier}'")


def check_programs(facts: Facts) -> Iterator[Finding]:
    """Check that each node can find the job's Python and code by their paths."""
    for folder in facts.programs if facts.kind is ClusterKind.slurm else ():
        above = [other for other in facts.programs if Path(other.path) in Path(folder.path).parents]
        if any(other.filesystem == folder.filesystem for other in above):
            continue  # The environment is inside the checkout: the finding about the checkout is enough.
        found = f"{folder.path}: {sharing(folder)}"
        if folder.filesystem in SHARED:
            yield fine("program", found)
        else:
            why = f"the job runs {facts.executable} by its path on every node, and they may not have it"
            yield warn("program", found, why, f"srun --nodes=1 ls {folder.path}")


def sharing(folder: Folder) -> str:
    """Return text on whether all nodes see a folder, by the type of its filesystem.

    The path is not enough: /tmp may be shared, and /home local to each node. With ``--on-cluster``, a job measures
    whether the nodes share the folder.
    """
    if folder.filesystem in SHARED:
        return f"{folder.filesystem} is shared"
    if folder.filesystem in IN_MEMORY:
        return f"{folder.filesystem} is each machine's own"
    return f"{folder.filesystem} is this machine's own unless it is exported, or the nodes are this machine"


def check_container(facts: Facts, config: Config) -> Iterator[Finding]:
    """Check the container's image and runtime. The nodes may have a runtime that this machine lacks."""
    image, runtime = config.cluster.container, config.cluster.container_runtime
    if facts.container_problem:
        why = "agents and ranks are started in the container, and would fail where the nodes see the same"
        fix = "cluster.container=IMAGE that all nodes see, cluster.container_runtime=apptainer or pyxis"
        yield warn("container", facts.container_problem, why, f"{fix}; or cluster.setup='[\"module load apptainer\"]'")
    elif image is not None and runtime is not None:
        yield fine("container", f"{image}, by {runtime.name}")


def check_output_folder(facts: Facts) -> Iterator[Finding]:
    """Check output_dir, with submitit's pickles and the logs: all nodes must see the same folder."""
    path, kind = facts.output.path, facts.output.filesystem
    if facts.kind is ClusterKind.local:
        yield fine("shared folder", f"{path} on {kind}, used on this machine only")
        return
    why = "the nodes read the job's pickle and the run folder there, and would find nothing: the job fails at once"
    if kind in SHARED:
        yield fine("shared folder", f"{path}: {sharing(facts.output)}")
    elif kind in IN_MEMORY:
        yield fail("shared folder", f"output_dir {path}: {sharing(facts.output)}", why, SHARED_PATH)
    else:
        yield warn("shared folder", f"output_dir {path}: {sharing(facts.output)}", why, MEASURE)


def check_space(facts: Facts, requests: Sequence[Request]) -> Iterator[Finding]:
    """Check that output_dir has enough space for the checkpoints that are kept."""
    folder, need = facts.output, 0
    for request in requests:
        if request.plan is not None:
            promised = request.plan.promised
            need += (promised.checkpoint_bytes or 0) * promised.checkpoints_kept * len(request.points)
    found = f"{folder.free_bytes / GIB:.1f} GiB free at {folder.exists}"
    if folder.problem:
        fix = "output_dir=PATH that is yours"
        yield fail("disk", f"{folder.exists}: {folder.problem}", "nothing can be written there", fix)
    elif need > folder.free_bytes:
        why = f"checkpoints of all points take about {need / GIB:.1f} GiB (weights, Adam's moments; keep_last + 1)"
        yield fail("disk", found, why, "output_dir=PATH with more room, or checkpoint.keep_last=1")
    elif folder.free_inodes < 10_000:
        few = f"{folder.free_inodes} inodes free at {folder.exists}"
        yield warn("disk", few, "every file takes one", "output_dir=PATH")
    else:
        yield fine("disk", f"{found}, checkpoints take about {need / GIB:.1f} GiB")


def check_environment(facts: Facts) -> Iterator[Finding]:
    """Check for variables of an enclosing job or launcher."""
    inherited = [name for name in facts.environment if name.startswith(INHERITED) or name in INHERITED_NAMES]
    some = [name for name in inherited if name not in KEPT]
    some.sort(key=lambda name: (not name.startswith(("SLURM_CPU_BIND", "RANK", "MASTER")), name))
    if some:
        shown = ", ".join(some[:6]) + (f" and {len(some) - 6} more" if len(some) > 6 else "")
        inside = "this shell is inside a Slurm job: " if "SLURM_JOB_ID" in some else ""
        yield warn(
            "environment",
            f"{inside}{shown} set",
            "python -m launch hides them from its jobs, but srun, sbatch and torchrun typed by hand pass them on: "
            "SLURM_CPU_BIND alone pins every rank to the CPUs of the old job",
            f"unset {' '.join(some)}",
        )
    else:
        yield fine("environment", "nothing inherited from a job or a launcher")


def check_threads(facts: Facts, config: Config) -> Iterator[Finding]:
    """Check OMP_NUM_THREADS, which the job inherits."""
    text = facts.environment.get("OMP_NUM_THREADS")
    if text is None:
        yield fine("threads", "OMP_NUM_THREADS is not set; the agent sets 1 for each rank")
        return
    threads = int(text) if text.isdigit() else 0
    cpus, ranks = config.cluster.cpus_per_task, config.ranks_on_node
    most = max(1, (cpus or ranks) // ranks)
    if threads == 0:
        why = "libraries that cannot read it take every CPU they see, on every rank"
        yield warn("threads", f"OMP_NUM_THREADS={text}", why, "export OMP_NUM_THREADS=1")
    elif threads > most and (cpus is not None or threads > 8):
        room = f"cluster.cpus_per_task={cpus} for {ranks} ranks" if cpus is not None else f"{ranks} ranks on a node"
        why = "the job inherits it, and threads that share cores wait for each other"
        yield warn("threads", f"OMP_NUM_THREADS={threads} and {room}", why, f"export OMP_NUM_THREADS={most}")
    else:
        yield fine("threads", f"OMP_NUM_THREADS={threads}")


def check_limits(facts: Facts, config: Config) -> Iterator[Finding]:
    """Check limits of this shell, which Slurm passes to the job by default (PropagateResourceLimits)."""
    soft, most = facts.soft["nofile"], reachable_files(facts.hard["nofile"])
    if most < FEW_FILES:
        ends = "the ranks run into 'Too many open files': every connection, data file and log of a rank is one"
        passed = "" if facts.kind is ClusterKind.local else "Slurm passes it on (PropagateResourceLimits) and "
        fix = "ask the site for a higher hard limit: agents raise the soft one to it by themselves"
        yield warn("open files", f"ulimit -Hn is {most}", passed + ends, fix)
    else:
        raised = f", which agents raise to {most} for their ranks" if 0 <= soft < most else ""
        yield fine("open files", f"ulimit -n is {'unlimited' if soft < 0 else soft}{raised}")
    if facts.soft["core"] < 0:
        why = "a crash writes one core dump for each rank, each as large as its memory, into the folder it runs in"
        yield warn("core dumps", "ulimit -c is unlimited", why, "ulimit -c 0")
    if facts.limits is None or not config.cluster.gpus_per_node or config.nodes == 1:
        return
    passed = facts.limits.config.get("PropagateResourceLimits", "ALL").upper()
    kept = facts.limits.config.get("PropagateResourceLimitsExcept", "").upper()
    size = facts.soft["memlock"]
    if 0 <= size < GIB and ("ALL" in passed or "MEMLOCK" in passed) and "MEMLOCK" not in kept:
        why = "Slurm passes it to the nodes, and InfiniBand registers its buffers as locked memory (ibv_reg_mr fails)"
        yield warn("locked memory", f"ulimit -l is {size // 1024} KiB", why, "ulimit -l unlimited")
