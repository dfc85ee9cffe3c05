"""The resources that a partition has for one job, in words: the second part of a refusal.

Pure functions over Slurm's limits.
"""

from __future__ import annotations

from launch.checks.nodes import MB_IN_GB, gres_text, memory_text
from launch.scheduler.limits import Limits, NodeLimits, Partition


def what_fits(limits: Limits, partition: Partition) -> str:
    """The most that one job may ask for in a partition: nodes, time, and what the best node has of each resource."""
    nodes = limits.nodes_of(partition)
    if not nodes:
        return f"partition {partition.name} has no nodes"
    most = min(len(nodes), partition.max_nodes or len(nodes))
    time = "without a time limit" if partition.max_time_min is None else f"for {partition.max_time_min:g} min"
    least = f"{partition.min_nodes} to " if partition.min_nodes > 1 else "at most "
    return f"partition {partition.name}: {least}{most} nodes {time}, each of {of_each(nodes, partition)}"


def of_each(nodes: list[NodeLimits], partition: Partition) -> str:
    """CPUs, memory and generic resources of the best node."""
    cpus = min(max(node.cpus for node in nodes), partition.max_cpus_per_node or 2**31)
    memory = min(max(node.memory_mb for node in nodes), partition.max_memory_mb or 2**62) / MB_IN_GB
    kinds = sorted({gres_text(part) for node in nodes for part in node.gres})
    return ", ".join([f"up to {cpus} CPUs", f"{memory_text(memory)} of memory", *(kinds or ["no generic resources"])])
