"""Checks of what is asked of each node: GPUs, CPUs, memory, and what the site gives where nothing is asked.

Pure functions over Slurm's limits and a request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from launch.checks.facts import Request
from launch.checks.findings import PENDS, Finding, fail, warn
from launch.config import ClusterConfig
from launch.runs.wording import counted
from launch.scheduler.limits import Gres, Limits, NodeLimits, Partition, gres


def check_asked(
    limits: Limits, partition: Partition, request: Request, nodes: Sequence[NodeLimits]
) -> Iterator[Finding]:
    """GPUs, CPUs and memory of each node: more than any node has, or more than enough nodes have."""
    if len(nodes) < request.config.nodes_asked:
        return  # said already
    fits: list[Callable[[NodeLimits], bool]] = []
    for key, asked, have in wants(limits, partition, request):
        most = max(have(node) for node in nodes)
        if asked > most:
            kinds = sorted({gres_text(g) for node in nodes for g in node.gres}) or ["no generic resources"]
            there = f" (nodes have {', '.join(kinds)})" if most == 0 else ""
            found = f"{key[0]}={key[1]}, and the best node of {partition.name} has {key[2](most)}{there}"
            yield fail("resources", found, PENDS, key[3].format(int(most)) if most else f"{key[0]}=null")
        else:
            fits.append(lambda node, have=have, asked=asked: have(node) >= asked)  # type: ignore[misc]
    enough = [node for node in nodes if all(fit(node) for fit in fits)]
    if len(enough) < request.config.nodes_asked:
        found = f"nodes={request.config.nodes}, and {len(enough)} of {partition.name} have all that is asked of each"
        yield fail("resources", found, PENDS, f"nodes={max(1, len(enough) - request.config.spare_nodes)}")


WantText = tuple[str, str, Callable[[float], str], str]
"""Key, value, an amount for people, and how to ask for less."""
Want = tuple[WantText, float, Callable[[NodeLimits], float]]
"""Words, how much is asked for, and how much of it a node gives."""


def wants(limits: Limits, partition: Partition, request: Request) -> Iterator[Want]:
    """Check what is asked of each node, one after the other."""
    cluster = request.config.cluster
    text: WantText
    if cluster.gpus_per_node:
        text = ("cluster.gpus_per_node", str(cluster.gpus_per_node), "{:g} GPUs".format, "cluster.gpus_per_node={}")
        yield text, cluster.gpus_per_node, lambda node: node.count("gpu")
    for part in gres(cluster.gres or ""):
        text = (
            "cluster.gres",
            gres_text(part),
            f"{{:g}} of {part.name}".format,
            f"cluster.gres={gres_text(part, '{}')}",
        )
        yield text, part.count, lambda node, part=part: node.count(part.name, part.type)  # type: ignore[misc]
    if cluster.cpus_per_task:
        most = partition.max_cpus_per_node or 2**31
        text = ("cluster.cpus_per_task", str(cluster.cpus_per_task), "{:g} CPUs".format, "cluster.cpus_per_task={}")
        yield text, cluster.cpus_per_task, lambda node: min(node.cpus, most)
    if cluster.mem_gb:
        room = partition.max_memory_mb or limits.number("MaxMemPerNode") or 2**62
        text = ("cluster.mem_gb", f"{cluster.mem_gb:g}", memory_text, "cluster.mem_gb={}")
        yield text, cluster.mem_gb, lambda node: min(node.memory_mb, room) / MB_IN_GB


MB_IN_GB = 1024
"""Slurm's MB, which are MiB, in one of cluster.mem_gb."""


def memory_text(gb: float) -> str:
    """Memory in units of cluster.mem_gb for people, in GiB as every other message."""
    return f"{gb:.4g} GiB"


def gres_text(part: Gres, number: str | None = None) -> str:
    """A generic resource as sbatch takes it."""
    return ":".join(text for text in (part.name, part.type, number or str(part.count)) if text)


def typed_options(cluster: ClusterConfig) -> set[str]:
    """Options of sbatch among cluster.additional_parameters, however they are spelled."""
    return {str(key).replace("-", "_") for key in cluster.additional_parameters}


def gives_whole_nodes(partition: Partition, cluster: ClusterConfig) -> bool:
    """Tell whether a job has its nodes, and all of their CPUs, to itself."""
    return bool(partition.is_exclusive or cluster.exclusive or "exclusive" in typed_options(cluster))


def is_given_one_cpu(limits: Limits, partition: Partition, cluster: ClusterConfig) -> bool:
    """Tell whether Slurm would give the one task of a node, the agent with all ranks, a single CPU."""
    unit = limits.config.get("SelectTypeParameters", "").upper()
    by_core = "CR_CPU" in unit or "CR_CORE" in unit
    for_gpus = "DefCpuPerGPU" in limits.config.get("JobDefaults", "")
    is_open = cluster.cpus_per_task is None and not typed_options(cluster) & {"cpus_per_gpu", "ntasks_per_node"}
    return is_open and by_core and not for_gpus and not gives_whole_nodes(partition, cluster)


def check_defaults(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """CPUs and memory that were not asked for, where the cluster's default is meant for jobs of one CPU."""
    cluster, ranks = request.config.cluster, request.config.ranks_on_node
    options = typed_options(cluster)
    if gives_whole_nodes(partition, cluster):
        return
    if is_given_one_cpu(limits, partition, cluster):
        on_it = f"{counted(ranks, 'rank')} with their data and communication threads"
        why = f"Slurm gives the one task of a node 1 CPU, for {on_it}"
        yield warn("cpus", "cluster.cpus_per_task is not set", why, f"cluster.cpus_per_task={4 * ranks}")
    elif cluster.cpus_per_task is not None and cluster.cpus_per_task < ranks:
        found = f"cluster.cpus_per_task={cluster.cpus_per_task} for {counted(ranks, 'rank')} on a node"
        yield warn(
            "cpus",
            found,
            "it is the CPUs of the whole node's ranks; they would share",
            f"cluster.cpus_per_task={4 * ranks}",
        )
    per_cpu = partition.memory_per_cpu_mb or limits.number("DefMemPerCPU")
    per_node = partition.memory_per_node_mb or limits.number("DefMemPerNode")
    if cluster.mem_gb is None and not options & {"mem", "mem_per_cpu", "mem_per_gpu"} and (per_cpu or per_node):
        share = per_node or (per_cpu or 0) * (cluster.cpus_per_task or 1)
        why = "a job that asks for no memory gets the site's default, and is killed when it uses more"
        yield warn(
            "memory",
            f"cluster.mem_gb is not set: each node gives {memory_text(share / MB_IN_GB)}",
            why,
            f"cluster.mem_gb={16 * ranks}",
        )
