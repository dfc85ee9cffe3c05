"""Checks of the login node: environment, limits, versions, and where the folders lie.

Pure functions over the facts. Must not ask the outside anything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from launch.config import ClusterKind, Config
from launch.runs.environment import reachable_files
from launch.slurm.facts import DISTRIBUTION, Facts, Finding, Folder, Request, fail, fine, warn
from launch.slurm.submit import INHERITED, INHERITED_NAMES, KEPT

SHARED = (
    *(
        "nfs",
        "nfs4",
        "lustre",
        "gpfs",
        "beegfs",
        "ceph",
        "fuse.ceph",
        "panfs",
        "pvfs2",
        "wekafs",
        "cifs",
        "smb3",
        "afs",
    ),
    *("gfs2", "ocfs2", "fuse.glusterfs", "glusterfs", "fuse.juicefs", "fuse.quobyte", "fuse.daos", "fuse.moosefs"),
)
IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
"""Filesystems that every machine has for itself."""
GIB = 2**30
"""A checkpoint: weights and two moments of Adam, 4 bytes each."""
SBATCH_KEYS = {
    "SBATCH_PARTITION": "partition",
    "SBATCH_ACCOUNT": "account",
    "SBATCH_QOS": "qos",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_EXCLUDE": "exclude",
    "SBATCH_GRES": "gres",
    "SBATCH_TIMELIMIT": "timeout_min",
}
FEW_FILES = 4096
PYTHONS = ((3, 11), (3, 12), (3, 13))


def check_container(facts: Facts, config: Config) -> Iterator[Finding]:
    """Return whether the image of the run is there, and what starts it; nodes may have what this machine lacks."""
    image, runtime = config.cluster.container, config.cluster.container_runtime
    if image is None or runtime is None:
        return
    if facts.container_problem:
        why = "agents and ranks are started in the container, and would fail where the nodes see the same"
        fix = "cluster.container=IMAGE that all nodes see, cluster.container_runtime=apptainer or pyxis"
        yield warn("container", facts.container_problem, why, f"{fix}; or cluster.setup='[\"module load apptainer\"]'")
    else:
        yield fine("container", f"{image}, by {runtime.name}")


def check_slurm(facts: Facts) -> Iterator[Finding]:
    """Return whether there is a Slurm to talk to."""
    if facts.limits is not None:
        version = facts.limits.config.get("SLURM_VERSION", "of unknown version")
        yield fine("slurm", f"cluster {facts.limits.config.get('ClusterName', '')}, Slurm {version}, answers")
    elif facts.kind is ClusterKind.slurm:
        why = "cluster=slurm submits with sbatch"
        fix = "scontrol ping; then ask the site" if facts.client else "a login node of the cluster, or cluster=local"
        yield fail("slurm", facts.slurm_problem, why, fix)
    elif facts.client:
        why = "cluster=auto would train on this machine, which may be a login node"
        yield warn("slurm", f"sbatch is installed, and {facts.slurm_problem}", why, "cluster=slurm")
    else:
        found = "cluster=auto: no Slurm here" if facts.was_auto else "cluster=local"
        yield fine("slurm", f"{found}; nodes are agents on this machine")


def check_inherited(facts: Facts) -> Iterator[Finding]:
    """Variables of an enclosing job or launcher, which bind and name the processes of what is started by hand."""
    present = [
        name
        for name in facts.machine.environment
        if (name.startswith(INHERITED) or name in INHERITED_NAMES) and name not in (*KEPT, *SBATCH_KEYS)
    ]
    if not present:
        yield fine("environment", "nothing inherited from a job or a launcher")
        return
    some = sorted(present, key=lambda name: (not name.startswith(("SLURM_CPU_BIND", "RANK", "MASTER")), name))
    shown = ", ".join(some[:6]) + (f" and {len(some) - 6} more" if len(some) > 6 else "")
    inside = "this shell is inside a Slurm job: " if "SLURM_JOB_ID" in present else ""
    yield warn(
        "environment",
        f"{inside}{shown} set",
        "python -m launch hides them from its jobs, but srun, sbatch and torchrun typed by hand hand them on: "
        "SLURM_CPU_BIND alone pins every rank to the CPUs of the old job",
        f"unset {' '.join(some)}",
    )


def check_sbatch_variables(facts: Facts, config: Config) -> Iterator[Finding]:
    """SBATCH_* of the user's own, which are hidden with the inherited ones."""
    for name, key in SBATCH_KEYS.items():
        value = facts.machine.environment.get(name)
        if facts.kind is not ClusterKind.slurm or value is None or str(getattr(config.cluster, key)) == value:
            continue
        typed = "MINUTES" if key == "timeout_min" else shlex.quote(value)
        why = f"sbatch by hand takes it; python -m launch hides SBATCH_* and asks for what cluster.{key} says"
        yield warn("environment", f"{name}={value} set", why, f"cluster.{key}={typed}")


def check_limits(facts: Facts) -> Iterator[Finding]:
    """Limits of this shell, which Slurm hands on to the job by default (PropagateResourceLimits)."""
    soft, hard = facts.machine.soft, facts.machine.hard
    where = (
        "the ranks run"
        if facts.kind is ClusterKind.local
        else "Slurm hands it on (PropagateResourceLimits) and the ranks run"
    )
    most = reachable_files(hard["nofile"])
    if most < FEW_FILES:
        why = f"{where} into 'Too many open files': every connection, data file and log of a rank is one"
        fix = "ask the site for a higher hard limit: agents raise the soft one to it by themselves"
        yield warn("open files", f"ulimit -Hn is {most}", why, fix)
    else:
        told = "unlimited" if soft["nofile"] < 0 else soft["nofile"]
        raised = f", which agents raise to {most} for their ranks" if 0 <= soft["nofile"] < most else ""
        yield fine("open files", f"ulimit -n is {told}{raised}")
    if soft["core"] < 0:
        why = "a crash writes one core dump for each rank, each as large as its memory, into the folder it runs in"
        yield warn("core dumps", "ulimit -c is unlimited", why, "ulimit -c 0")


def check_memlock(facts: Facts, config: Config) -> Iterator[Finding]:
    """Locked memory, which RDMA needs on nodes that take this shell's limits over."""
    if facts.limits is None or not config.cluster.gpus_per_node or config.nodes == 1:
        return
    handed_on = facts.limits.config.get("PropagateResourceLimits", "ALL").upper()
    kept_out = facts.limits.config.get("PropagateResourceLimitsExcept", "").upper()
    size = facts.machine.soft["memlock"]
    if 0 <= size < GIB and ("ALL" in handed_on or "MEMLOCK" in handed_on) and "MEMLOCK" not in kept_out:
        why = "Slurm hands it on to the nodes, and InfiniBand registers its buffers as locked memory (ibv_reg_mr fails)"
        yield warn("locked memory", f"ulimit -l is {size // 1024} KiB", why, "ulimit -l unlimited")


def check_threads(facts: Facts, config: Config) -> Iterator[Finding]:
    """OMP_NUM_THREADS, which the job inherits."""
    text = facts.machine.environment.get("OMP_NUM_THREADS")
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


def check_versions(facts: Facts) -> Iterator[Finding]:
    """Python, torch and the other requirements of the Python that the job will run, without importing them."""
    machine = facts.machine
    if machine.python not in PYTHONS:
        found = f"Python {machine.python[0]}.{machine.python[1]} at {machine.executable}"
        fix = f"python{PYTHONS[-1][0]}.{PYTHONS[-1][1]} -m venv .venv && .venv/bin/pip install -e ."
        yield fail("python", found, "tested are Python 3.11 to 3.13, and the job runs this one", fix)
    else:
        yield fine(
            "python", f"{machine.python[0]}.{machine.python[1]}, torch {machine.versions.get('torch', 'missing')}"
        )
    if not machine.requirements:
        why = "without it nobody can say which versions fit"
        yield warn("libraries", f"{DISTRIBUTION} is not installed in {machine.executable}", why, "pip install -e .")
    for text in machine.requirements:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        version = machine.versions.get(wanted.name.lower())
        if version is None or not wanted.specifier.contains(version, prereleases=True):
            found = f"{wanted.name} {version or 'is not installed'} in {machine.executable}"
            why = f"the job runs this Python, and {wanted.name}{wanted.specifier} is what is tested"
            yield fail("libraries", found, why, f"pip install '{wanted.name}{wanted.specifier}'")


def sharing(folder: Folder) -> tuple[str, str]:
    """Return whether all nodes see a folder, by the type of its filesystem: yes, no or unsure; and why.

    Its name tells nothing: /tmp may be shared, and /home each node's own. The job of ``--on-cluster`` asks the nodes.
    """
    if folder.filesystem in SHARED:
        return "yes", f"{folder.filesystem} is shared"
    if folder.filesystem in IN_MEMORY:
        return "no", f"{folder.filesystem} is each machine's own"
    return "unsure", f"{folder.filesystem} is this machine's own unless it is exported, or the nodes are this machine"


def check_output_folder(facts: Facts) -> Iterator[Finding]:
    """Return whether output_dir, with the pickles of submitit and the logs in it, is one folder for all nodes."""
    path = facts.output.path
    if facts.kind is ClusterKind.local:
        yield fine("shared folder", f"{path} on {facts.output.filesystem}, used on this machine only")
        return
    answer, found = sharing(facts.output)
    why = "the nodes read the job's pickle and the run folder there, and would find nothing: the job fails at once"
    if answer == "yes":
        yield fine("shared folder", f"{path}: {found}")
    elif answer == "no":
        yield fail(
            "shared folder", f"output_dir {path}: {found}", why, "output_dir=PATH on a filesystem that all nodes mount"
        )
    else:
        yield warn("shared folder", f"output_dir {path}: {found}", why, "python -m launch.doctor --on-cluster ...")


def check_space(facts: Facts, requests: list[Request]) -> Iterator[Finding]:
    """Return whether output_dir can be written to, and holds the checkpoints that are kept."""
    folder = facts.output
    if folder.problem:
        yield fail(
            "disk",
            f"{folder.exists}: {folder.problem}",
            "nothing can be written there",
            "output_dir=PATH that is yours",
        )
        return
    promises = [(request.plan.promised, len(request.points)) for request in requests]
    need = sum((promised.checkpoint_bytes or 0) * promised.checkpoints_kept * points for promised, points in promises)
    found = f"{folder.free_bytes / GIB:.1f} GiB free at {folder.exists}"
    if need > folder.free_bytes:
        why = f"checkpoints of all points take about {need / GIB:.1f} GiB (weights, Adam's moments; keep_last + 1)"
        yield fail("disk", found, why, "output_dir=PATH with more room, or checkpoint.keep_last=1")
    elif folder.free_inodes < 10_000:
        yield warn(
            "disk", f"{folder.free_inodes} inodes free at {folder.exists}", "every file takes one", "output_dir=PATH"
        )
    else:
        yield fine("disk", f"{found}, checkpoints take about {need / GIB:.1f} GiB")


def check_programs(facts: Facts) -> Iterator[Finding]:
    """Return whether the nodes find the Python and the code that the job names by path."""
    for folder in facts.machine.programs if facts.kind is ClusterKind.slurm else ():
        above = [other for other in facts.machine.programs if Path(other.path) in Path(folder.path).parents]
        if any(other.filesystem == folder.filesystem for other in above):
            continue  # an environment in the checkout: said of that
        answer, found = sharing(folder)
        if answer == "yes":
            yield fine("program", f"{folder.path}: {found}")
            continue
        why = f"the job runs {facts.machine.executable} by its path on every node, and they may not have it"
        yield warn("program", f"{folder.path}: {found}", why, f"srun --nodes=1 ls {folder.path}")


def check_host_name(facts: Facts, addresses: tuple[str, ...]) -> Iterator[Finding]:
    """Return whether this machine's name leads anywhere; ``addresses`` is what it resolves to."""
    host = facts.machine.host
    if not addresses:
        why = "srun typed here, and torchrun, give the nodes this name to call back"
        yield warn("host name", f"{host} does not resolve", why, f"getent hosts {host}")
    elif facts.kind is ClusterKind.slurm and all(address.startswith("127.") for address in addresses):
        why = "a process that announces itself by name, as torchrun does, is then unreachable from other nodes"
        yield warn(
            "host name", f"{host} resolves to {', '.join(addresses)}", why, "python -m launch.doctor --on-cluster ..."
        )
    else:
        yield fine("host name", f"{host} resolves to {', '.join(addresses)}")


def check_machine(facts: Facts, config: Config, requests: list[Request], addresses: tuple[str, ...]) -> list[Finding]:
    """All checks of this module."""
    return [
        *check_slurm(facts),
        *check_versions(facts),
        *check_programs(facts),
        *check_container(facts, config),
        *check_output_folder(facts),
        *check_space(facts, requests),
        *check_inherited(facts),
        *check_sbatch_variables(facts, config),
        *check_threads(facts, config),
        *check_limits(facts),
        *check_memlock(facts, config),
        *check_host_name(facts, addresses),
    ]
