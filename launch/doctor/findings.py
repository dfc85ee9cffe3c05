"""Findings of the doctor about the login node, the compute nodes and the links between them.

The checks are pure functions, and yield findings. A check that finds no problem yields a finding of level ``ok`` or
none. Checks of the login node use the ``Facts`` that ``gather`` reads once. Checks of nodes and links use the
``results.json`` of the doctor's job.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import launch
from launch.config import ClusterConfig, ClusterKind, Config
from launch.config.cluster import ContainerRuntime
from launch.runs.environment import reachable_files
from launch.slurm import client as scheduler
from launch.slurm.checks import Finding, Request, fail, fine, warn
from launch.slurm.limits import SlurmFacts, ask_slurm, torch_version

GIB = 2**30
FEW_FILES = 4096
SHARED = {
    *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "fuse.ceph", "panfs", "pvfs2", "wekafs", "cifs", "smb3"),
    *("afs", "gfs2", "ocfs2", "fuse.glusterfs", "glusterfs", "fuse.juicefs", "fuse.quobyte", "fuse.daos"),
    "fuse.moosefs",
}
IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs"}
"""Types of filesystems in memory, which machines do not share."""
MEASURE = "python -m launch.doctor --on-cluster ..."
SHARED_PATH = "output_dir=PATH on a filesystem that all nodes mount"


@dataclass(frozen=True)
class Folder:
    """A folder that may not exist yet, and its filesystem."""

    path: str
    exists: str
    """Path of the folder itself if it exists, else of the deepest existing folder above it."""
    filesystem: str
    """Type of the filesystem by the kernel: nfs4, lustre, ext4, tmpfs, ..."""
    free_bytes: int = 0
    problem: str = ""
    """Error of the attempt to write a test file into the folder; empty if it could be written."""


@dataclass(frozen=True, kw_only=True)
class Facts(SlurmFacts):
    """What the checks know about Slurm, the login node, and the Python that the job will run."""

    kind: ClusterKind
    """``local`` or ``slurm``, never ``auto``."""
    client: bool
    """True if Slurm's commands are installed here."""
    output: Folder
    """The folder output_dir of the run."""
    programs: tuple[Folder, ...]
    """Folders of the job's Python and of the launcher's code, without folders of the system."""
    container_problem: str = ""
    """Problem with cluster.container; empty if there is none."""
    threads: str | None
    """OMP_NUM_THREADS of this shell, which the job inherits; None if it is not set."""
    open_files: int
    """Number of open files that the hard limit of this shell allows."""
    locked_bytes: int
    """Soft limit of locked memory of this shell in bytes; -1 means unlimited."""
    executable: str


def gather(configs: Sequence[Config]) -> Facts:
    """Return the facts that the checks need about this machine, Slurm and the run.

    ``configs`` are the configs of the points of a command. Only the first is used: the points share these settings.
    """
    config = configs[0]
    kind = config.cluster.kind
    slurm = SlurmFacts(limits=None) if kind is ClusterKind.local else ask_slurm()
    places = {Path(launch.__file__).resolve().parents[1]}
    places |= {Path(sys.prefix)} if sys.prefix != sys.base_prefix else set()
    return Facts(
        **{**vars(slurm), "torch": torch_version()},  # Known even if Slurm does not answer.
        kind=ClusterKind.slurm if kind is ClusterKind.slurm or slurm.limits is not None else ClusterKind.local,
        client=shutil.which("sbatch") is not None,
        output=look_at_folder(Path(config.output_dir)),
        programs=tuple(Folder(str(place), str(place), filesystem_of(place)) for place in sorted(places)),
        container_problem=container_problem(config.cluster),
        threads=os.environ.get("OMP_NUM_THREADS"),
        open_files=reachable_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1]),
        locked_bytes=resource.getrlimit(resource.RLIMIT_MEMLOCK)[0],
        executable=sys.executable,
    )


def filesystem_of(path: Path) -> str:
    """Return the kernel's name of a path's filesystem, such as nfs4 or fuse.juicefs.

    The name is used because statfs returns the same type number for all FUSE filesystems. The deepest mount above the
    path counts; of several mounts at the same place, the last. Return ``unknown`` if the path is below no mount.
    """
    path.exists()  # Lets an automounter mount the filesystem first.
    real = Path(os.path.realpath(path))
    above = [mount for mount in psutil.disk_partitions(all=True) if real.is_relative_to(mount.mountpoint)]
    return max(reversed(above), key=lambda mount: len(mount.mountpoint)).fstype if above else "unknown"


def look_at_folder(path: Path) -> Folder:
    """Return filesystem and free space of a folder, and the error if a test file cannot be written into it."""
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    space, problem = os.statvfs(there), ""
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = error.strerror or str(error)
    return Folder(str(path), str(there), filesystem_of(there), space.f_bavail * space.f_frsize, problem)


def container_problem(cluster: ClusterConfig) -> str:
    """Return the problem with a run's container that this machine can see; "" if there is none."""
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
        *check_python(facts),
        *check_programs(facts),
        *check_container(facts, config),
        *check_output_folder(facts),
        *check_space(facts, requests),
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
    elif facts.client and facts.slurm_problem:
        why = "cluster=auto would train on this machine, which may be a login node"
        yield warn("slurm", f"sbatch is installed, and {facts.slurm_problem}", why, "cluster=slurm")
    else:
        yield fine("slurm", "not used here: nodes are agents on this machine")


def check_python(facts: Facts) -> Iterator[Finding]:
    """Check that the job's Python has torch. torch is not imported, and versions of other libraries are not checked."""
    if facts.torch:
        yield fine("python", f"{facts.executable}, torch {facts.torch}")
    else:
        fix = f"{facts.executable} -m pip install -e ."
        yield fail("python", f"no torch in {facts.executable}", "the job runs this Python", fix)


def check_programs(facts: Facts) -> Iterator[Finding]:
    """Check that each node can find the job's Python and code by their paths."""
    # The environment may be inside the checkout: one finding for each filesystem is enough.
    each = {folder.filesystem: folder for folder in reversed(facts.programs)}
    for folder in each.values() if facts.kind is ClusterKind.slurm else ():
        found = f"{folder.path}: {sharing(folder)}"
        if folder.filesystem in SHARED:
            yield fine("program", found)
        else:
            why = f"the job runs {facts.executable} by its path on every node, and they may not have it"
            yield warn("program", found, why, f"srun --nodes=1 ls {folder.path}")


def sharing(folder: Folder) -> str:
    """Return a text that says, from the type of its filesystem, whether all nodes see a folder.

    The path of the folder is not enough: /tmp may be shared, and /home may be local to each node. The text is only a
    guess from this machine; with ``--on-cluster``, a job measures whether the nodes share the folder.
    """
    if folder.filesystem in SHARED:
        return f"{folder.filesystem} is shared"
    if folder.filesystem in IN_MEMORY:
        return f"{folder.filesystem} is each machine's own"
    return f"{folder.filesystem} is this machine's own unless it is exported, or the nodes are this machine"


def check_container(facts: Facts, config: Config) -> Iterator[Finding]:
    """Check the container's image and runtime. The nodes may have a runtime that this machine does not have."""
    image, runtime = config.cluster.container, config.cluster.container_runtime
    if facts.container_problem:
        why = "agents and ranks are started in the container, and would fail where the nodes see the same"
        fix = "cluster.container=IMAGE that all nodes see, cluster.container_runtime=apptainer or pyxis"
        yield warn("container", facts.container_problem, why, f"{fix}; or cluster.setup='[\"module load apptainer\"]'")
    elif image is not None and runtime is not None:
        yield fine("container", f"{image}, by {runtime.name}")


def check_output_folder(facts: Facts) -> Iterator[Finding]:
    """Check that all nodes can see output_dir, which also contains submitit's pickles and the logs."""
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
        promised = request.plan.promised
        need += (promised.checkpoint_bytes or 0) * promised.checkpoints_kept * len(request.points)
    found = f"{folder.free_bytes / GIB:.1f} GiB free at {folder.exists}"
    if folder.problem:
        fix = "output_dir=PATH that is yours"
        yield fail("disk", f"{folder.exists}: {folder.problem}", "nothing can be written there", fix)
    elif need > folder.free_bytes:
        why = f"checkpoints of all points take about {need / GIB:.1f} GiB (weights, Adam's moments; keep_last + 1)"
        yield fail("disk", found, why, "output_dir=PATH with more room, or checkpoint.keep_last=1")
    else:
        yield fine("disk", f"{found}, checkpoints take about {need / GIB:.1f} GiB")


def check_threads(facts: Facts, config: Config) -> Iterator[Finding]:
    """Check OMP_NUM_THREADS, which the job inherits."""
    text, ranks = facts.threads, config.ranks_on_node
    most = max(1, (config.cluster.cpus_per_task or 4 * ranks) // ranks)
    if text is None:
        yield fine("threads", "OMP_NUM_THREADS is not set; the agent sets 1 for each rank")
    elif not text.isdigit() or not 0 < int(text) <= most:
        found = f"OMP_NUM_THREADS={text}, and CPUs for {most} threads of each of {ranks} ranks"
        why = "the job inherits it, and threads that share cores wait for each other"
        yield warn("threads", found, why, f"export OMP_NUM_THREADS={most}")
    else:
        yield fine("threads", f"OMP_NUM_THREADS={text}")


def check_limits(facts: Facts, config: Config) -> Iterator[Finding]:
    """Check limits of this shell, which Slurm passes to the job by default (PropagateResourceLimits)."""
    if facts.open_files < FEW_FILES:
        why = "the ranks run into 'Too many open files': every connection, data file and log of a rank is one"
        fix = "ask the site for a higher hard limit: agents raise the soft one to it by themselves"
        yield warn("open files", f"ulimit -Hn is {facts.open_files}", why, fix)
    else:
        yield fine("open files", f"agents raise ulimit -n to {facts.open_files} for their ranks")
    if facts.limits is None or not config.cluster.gpus_per_node or config.nodes == 1:
        return
    passed = facts.limits.config.get("PropagateResourceLimits", "ALL").upper()
    kept = facts.limits.config.get("PropagateResourceLimitsExcept", "").upper()
    size = facts.locked_bytes
    if 0 <= size < GIB and ("ALL" in passed or "MEMLOCK" in passed) and "MEMLOCK" not in kept:
        why = "Slurm passes it to the nodes, and InfiniBand registers its buffers as locked memory (ibv_reg_mr fails)"
        yield warn("locked memory", f"ulimit -l is {size // 1024} KiB", why, "ulimit -l unlimited")


# The checks of nodes and links, by the results of the job. Each node is compared with the other nodes, so a cluster
# that is slow as a whole gets no complaint. The findings without complaint have the measured figures.


Results = dict[str, Any]

SLOW = 0.5
"""Share of the usual bandwidth. A link or node below this share is reported.

The bandwidth of a node is that of its best link. The usual bandwidth of nodes is the median of all nodes. The usual
bandwidth of a link is that of the slower one of its two nodes. An oversubscribed network tree gives about half.
"""
BROKEN = 0.1
"""Share of the usual bandwidth (as for ``SLOW``) below which the finding is an error, not a warning."""
SLOW_GPU = 0.8
SKEW_S = 1.0
WAITS = "every collective of a run waits for it"


def check_results(results: Results) -> list[Finding]:
    """Return all findings from the results of the job."""
    checks = [check_node_records, check_folder, check_ports, check_clocks, check_cpus, check_gpus, check_bandwidth]
    return [one for check in [check_job, *(checks if results["nodes"] else [])] for one in check(results)]


def host(results: Results, index: int) -> str:
    """Return the host name of the node with this index; ``node INDEX`` if the node has left no record."""
    return next((str(node["host"]) for node in results["nodes"] if node["index"] == index), f"node {index}")


def hosts(nodes: Iterable[dict[str, Any]]) -> str:
    """Return the host names in the records of nodes, joined by commas."""
    return ", ".join(str(node["host"]) for node in nodes)


def check_job(results: Results) -> Iterator[Finding]:
    """Check that the job started, and that each of its nodes left a record."""
    job, count, asked = results["job_id"], len(results["nodes"]), results["asked"]["nodes"]
    why = "do not see the folder, or cannot run this Python or this code"
    logs = f"cat {results['logs']}/*_log.*"
    if not results["started"]:
        again = "python -m launch.doctor --on-cluster --wait-min 60 ..."
        found = f"job {job} did not start: {results['state']}; it was cancelled"
        yield warn("job", found, "nothing was measured", again)
    elif count == 0 and (said := results.get("start")):
        works = "cluster.start=ssh"
        found = f"srun fails inside of job {job}, and ssh {'works' if said.endswith(works) else 'too'}: {said}"
        fix = works if said.endswith(works) else "cluster.start=none nodes=1"
        yield fail("start", found, "the batch script of a run starts the agents by srun", fix)
    elif count == 0:
        found = f"job {job} ended ({results['state']}), and no node wrote anything into {results['folder']}"
        yield fail("job", found, f"the nodes {why}", f"{logs}; then {SHARED_PATH}")
    elif count < asked:
        found = f"{count} of {asked} nodes wrote their record: {hosts(results['nodes'])}"
        yield fail("job", found, f"the others {why}", logs)
    else:
        yield fine("job", f"job {job} ran on {hosts(results['nodes'])}")


def check_node_records(results: Results) -> Iterator[Finding]:
    """Report the problems that the records of the nodes show.

    The problems are: errors, faults, skipped measurements, different software, parts that training needs but the node
    lacks, and low limits of open files. Faults concern a disk, a link, a GPU or the run folder. The health check of a
    run's agents finds the same faults.
    """
    nodes = results["nodes"]
    for node in nodes:
        if node.get("error"):
            fix = f"cluster.exclude={node['host']}, once the log says why: cat {results['logs']}/*_log.*"
            yield fail("node", f"{node['host']}: {node['error']}", "a run would fail there in the same way", fix)
        for fault in node.get("faults", ()):
            why = "a start leaves such a node out, and is refused where no spare takes its place"
            yield fail("health", f"{node['host']}: {fault}", why, f"cluster.exclude={node['host']}")
    if skipped := [node["skipped"] for node in nodes if "skipped" in node]:
        found, why = f"nothing was measured: {skipped[0]}", "an all-reduce would wait for its timeout"
        yield warn("links", found, why, "what the other lines say, then the same command again")
    kinds = {f"Python {node['python']}, torch {node['torch']}": str(node["host"]) for node in nodes}
    if len(kinds) > 1:
        found = ", ".join(f"{software} on {name}" for software, name in sorted(kinds.items()))
        why = "ranks of one run must run the same software"
        yield fail("software", found, why, "one environment on a shared filesystem")
    for lacking in dict.fromkeys(tuple(part) for node in nodes for part in node.get("lacks", ())):
        found, why, fix = lacking
        there = hosts(node for node in nodes if list(lacking) in node.get("lacks", ()))
        yield warn("parts", f"{found} on {there}", why, fix)
    if few := [node for node in nodes if node["open_files"] < FEW_FILES]:
        found = f"ulimit -Hn is below {FEW_FILES} on {hosts(few)}"
        why = "'Too many open files'; agents raise the soft limit to the hard one, and no further"
        yield warn("open files", found, why, "ask the site for a higher hard limit there (LimitNOFILE of slurmd)")


def check_folder(results: Results) -> Iterator[Finding]:
    """Check that each node sees the files of all nodes in the shared folder."""
    nodes, asked = results["nodes"], results["asked"]["nodes"]
    for node in nodes:
        if node.get("unseen"):
            others = ", ".join(host(results, index) for index in node["unseen"])
            found = f"{node['host']} does not see what {others} wrote into {results['folder']} ({node['filesystem']})"
            why = "each node has a folder of its own by that name: logs, metrics and checkpoints fall apart"
            yield fail("shared folder", found, why, SHARED_PATH)
    if len(nodes) == asked and all(node.get("unseen") == [] for node in nodes):
        kinds = ", ".join(sorted({str(node["filesystem"]) for node in nodes}))
        yield fine("shared folder", f"measured: seen and written by every node ({kinds})")


def check_ports(results: Results) -> Iterator[Finding]:
    """Check that each node can connect to a free port of each other node."""
    closed = False
    for node in results["nodes"]:
        for index, problem in sorted(node.get("ports", {}).items()):
            if problem:
                closed, other = True, host(results, int(index))
                why = "ranks listen on free ports of every node; a firewall between nodes stops the rendezvous"
                fix = f"cluster.exclude={other}, and ask the site to open ports between nodes"
                yield fail("ports", f"{node['host']} does not reach {other}: {problem}", why, fix)
    if not closed and len(results["nodes"]) > 1:
        yield fine("ports", "every node reaches a free port on every other")


def check_clocks(results: Results) -> Iterator[Finding]:
    """Check that the clock of each node differs from that of the first node by at most SKEW_S seconds.

    The error of the measurement is subtracted from the difference.
    """
    measured = [node for node in results["nodes"] if "clock_offset_s" in node]
    for node in measured:
        offset, name = node["clock_offset_s"], node["host"]
        if abs(offset) - node["clock_error_s"] > SKEW_S:
            found = f"the clock of {name} is {offset:+.1f} s off that of {host(results, 0)}"
            why = "times in events and logs of different nodes cannot be compared; Slurm's munge fails at minutes"
            yield warn("clocks", found, why, f"cluster.exclude={name}, and ask the site about NTP there")
    if measured:
        yield fine("clocks", f"at most {max(abs(node['clock_offset_s']) for node in measured):.3f} s apart")


def check_cpus(results: Results) -> Iterator[Finding]:
    """Check that the agent of each node may use as many CPUs as ``cluster.cpus_per_task`` requests."""
    asked = results["asked"]["cpus_per_task"]
    if few := [node for node in results["nodes"] if asked and node["cpus"] < asked]:
        least = min(node["cpus"] for node in few)
        found = f"the agents on {hosts(few)} may use {least} CPUs, and cluster.cpus_per_task={asked}"
        yield warn("cpus", found, "all ranks of a node share them", f"cluster.cpus_per_task={least}")


def check_gpus(results: Results) -> Iterator[Finding]:
    """Check that each rank has a GPU if GPUs were requested, and that no GPU is slower than the other GPUs."""
    ranks, asked = results["ranks"], results["asked"]["gpus_per_node"]
    for node in results["nodes"] if asked else ():
        seen = [rank["gpus_seen"] for rank in ranks if rank["node"] == node["index"]]
        if seen and min(seen) < results["asked"]["ranks_per_node"]:
            found = f"{node['host']}: cluster.gpus_per_node={asked}, and torch {node['torch']} sees {min(seen)}"
            fix = "srun --gpus-per-node=1 nvidia-smi; pip install torch with the CUDA of the driver"
            yield fail("gpus", found, "the run would train on the CPU or fail", fix)
    on_gpus = [rank for rank in ranks if rank["backend"] == "nccl"]
    usual = statistics.median(rank["matmul_tflops"] for rank in on_gpus) if on_gpus else 0.0
    for rank in on_gpus:
        speed, name = rank["matmul_tflops"], rank["host"]
        if speed < SLOW_GPU * usual:
            found = f"GPU of rank {rank['rank']} on {name}: {speed:.0f} TFLOP/s, usual {usual:.0f}"
            yield warn("gpus", found, "every step waits for the slowest rank", f"cluster.exclude={name}")
    if speeds := [rank["matmul_tflops"] for rank in ranks]:
        devices = ", ".join(sorted({rank["device"] for rank in ranks}))
        yield fine("matmul", f"{min(speeds):.3g} to {max(speeds):.3g} TFLOP/s a rank on {devices}")


def check_bandwidth(results: Results) -> Iterator[Finding]:
    """Report nodes whose links are all slow, and single slow links between nodes with other good links."""
    pairs: dict[tuple[int, int], float] = {}
    """Pair of nodes -> the smallest bandwidth among the links of their ranks, in Gbit/s."""
    for rank in results["ranks"]:
        for link in rank.get("links", ()):
            pair, rate = (min(rank["node"], link["node"]), max(rank["node"], link["node"])), link["bandwidth_gbit"]
            pairs[pair] = min(pairs.get(pair, rate), rate)
    if not pairs:
        return
    # One good link shows that the node itself is sound.
    best = {node: max(rate for pair, rate in pairs.items() if node in pair) for pair in sorted(pairs) for node in pair}
    usual = statistics.median(best.values())
    slow = {node for node, value in best.items() if value < SLOW * usual}
    for node in sorted(slow):
        name = host(results, node)
        found = f"every link of {name} is slow: {best[node]:.3g} Gbit/s at best, usual are {usual:.3g}"
        yield (fail if best[node] < BROKEN * usual else warn)("bandwidth", found, WAITS, f"cluster.exclude={name}")
    for (a, b), value in sorted(pairs.items()):
        expected, one, other = min(best[a], best[b]), host(results, a), host(results, b)
        if not slow & {a, b} and value < SLOW * expected:
            found = f"the link {one} - {other}: {value:.3g} Gbit/s, both do {expected:.3g} elsewhere"
            why = "collectives that use it wait for it"
            yield (fail if value < BROKEN * expected else warn)("bandwidth", found, why, f"cluster.exclude={other}")
    if not slow:
        ends = f"{min(best.values()):.3g} to {max(best.values()):.3g}"
        yield fine("bandwidth", f"{ends} Gbit/s from node to node, each way")
