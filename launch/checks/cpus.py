"""CPUs that a job asks for where ``cluster.cpus_per_task`` is null: what the ranks of a node need, by Slurm's facts.

Slurm gives a task that says nothing one CPU, and the agent, which is the one task of a node, would share it with all
ranks. Owns that default. Asks nobody: the facts are handed in.
"""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig

from launch.checks.facts import SlurmFacts
from launch.checks.nodes import is_given_one_cpu
from launch.checks.request import partitions_of
from launch.config import ClusterKind, Config
from launch.plan.open_keys import settle_key
from launch.plan.placement import configs as configs_at
from launch.runs.wording import counted
from launch.scheduler.limits import Limits, NodeLimits, Partition

CPUS_PER_RANK = 4
"""One to compute, one each for data, communication and records."""


def settle_cpus(
    documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind], facts: SlurmFacts
) -> list[str]:
    """Have each point on Slurm ask for the CPUs that the ranks of a node need, where nothing says how many.

    The arguments, and what is returned, are those of ``settle_key``.

    Args:
        facts: what Slurm tells of itself. Where it tells nothing of a place, that point is left as it is.
    """

    def choose(config: Config) -> tuple[int | None, str]:
        found = cpus_for(config, facts)
        return (None, "") if found is None else (found[0], f"cluster.cpus_per_task={found[0]}: {found[1]}")

    return settle_key("cpus_per_task", choose, documents, configs, kinds)


def cpus_for(config: Config, facts: SlurmFacts) -> tuple[int, str] | None:
    """CPUs of each node for a point, and what they follow from; None where Slurm gives more than one by itself.

    Every node that has the GPUs asked for can give them, at every place that the point may go to.
    """
    wanted = CPUS_PER_RANK * config.ranks_on_node
    why = f"{CPUS_PER_RANK} for each of {counted(config.ranks_on_node, 'rank')} on a node"
    smallest: int | None = None
    for _, there in configs_at(config):
        limits = facts.at(there.cluster.cluster)
        if not isinstance(limits, Limits):
            return None
        for partition in partitions_of(limits, there):
            if not is_given_one_cpu(limits, partition, there.cluster):
                return None
            for node in fitting(limits, partition, there):
                most = min(node.cpus, partition.max_cpus_per_node or node.cpus)
                if smallest is None or most < smallest:
                    smallest, name = most, f"{node.name} in {partition.name}"
    if smallest is None:
        return None
    if wanted > smallest:
        return smallest, f"all of {name}, for {counted(config.ranks_on_node, 'rank')}"
    return wanted, why


def fitting(limits: Limits, partition: Partition, config: Config) -> list[NodeLimits]:
    """Nodes of a partition that take jobs and have the GPUs that are asked for."""
    nodes = limits.nodes_of(partition)
    return [node for node in nodes if node.is_usable and node.count("gpu") >= (config.cluster.gpus_per_node or 0)]
