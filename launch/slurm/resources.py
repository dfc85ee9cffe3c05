"""GPUs and CPUs of a job whose config does not say how many."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from omegaconf import DictConfig

from launch.config import ClusterKind, Config
from launch.config.compose import workload_of
from launch.errors import ConfigError, counted
from launch.plan.placement import configs as configs_at
from launch.plan.placement import settle_key
from launch.slurm.facts import Finding, Level, SlurmFacts, fine, warn
from launch.slurm.limits import Limits, NodeLimits, Partition, gres
from launch.slurm.request import has_features, is_given_one_cpu, is_sent_elsewhere, partitions_of, typed_options

# CPUs that a job asks for where ``cluster.cpus_per_task`` is null: what the ranks of a node need, by Slurm's facts.


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

    Every node that has the GPUs requested can give them, at every place that the point may go to.
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
    """Nodes of a partition that take jobs and have the GPUs that are requested."""
    nodes = limits.nodes_of(partition)
    return [node for node in nodes if node.is_usable and node.count("gpu") >= (config.cluster.gpus_per_node or 0)]


# GPUs that a job takes where nothing says how many: those that every node has where it may go, or this machine's.


GPU_OPTIONS = {"gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket", "gres", "G"}
"""Options of sbatch that ask for GPUs, or that say there are none to be requested."""
NONE_WANTED = "cluster.gpus_per_node=0 computes on CPUs"


@dataclass(frozen=True)
class Gpus:
    """GPUs of the nodes that a job could go to.

    Attributes:
        where: names of the partitions.
        least: GPUs of the node that has fewest.
        most: GPUs of the node that has most.
        type: as the nodes' Gres name it; None where they name none, or several.
    """

    where: str
    least: int
    most: int
    type: str | None


def settle_gpus(
    documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind], facts: SlurmFacts
) -> list[str]:
    """Have each point on Slurm ask for the GPUs that every node has where it may go, where nothing says how many.

    The arguments, and what is returned, are those of ``settle_key``.

    Args:
        facts: what Slurm tells of itself. Where it tells nothing of a place, that point is left as it is.

    Raises:
        ConfigError: more ranks are requested on a node than its GPUs, and nothing says which of the two is meant.
    """

    def choose(config: Config) -> tuple[int | None, str]:
        number, finding = choose_gpus(config, facts)
        return number, "" if finding is None else line_of(finding)

    return settle_key("gpus_per_node", choose, documents, configs, kinds)


def settle_local_ranks(
    documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind], gpus: int, torch: str
) -> list[str]:
    """Have each point on this machine start a rank on each of its GPUs, where nothing says how many ranks.

    Points that stand for several nodes share the GPUs, and so nothing is chosen for a command with such points: in a
    sweep over nodes each of them keeps the same number of ranks.

    Args:
        documents: the composed config of each point, which its run folder will hold.
        configs: the same, typed; both are changed.
        kinds: the cluster of each point.
        gpus: of this machine that may be used.
        torch: version of it that is installed; empty if there is none.

    Returns:
        What was decided and by what, for people.
    """
    local = [point for point in zip(documents, configs, kinds, strict=True) if point[2] is ClusterKind.local]
    if gpus < 2 or built_for_cpus(torch) or any(config.nodes > 1 for _, config, _ in local):
        return []
    told = ""
    for document, config, _ in local:
        if config.ranks_per_node is None and not says_gpus(config) and not workload_of(config).computes_on_cpus(config):
            config.ranks_per_node = document.ranks_per_node = gpus
            told = f"ranks_per_node={gpus}: this machine has {gpus} GPUs; ranks_per_node=1 takes one of them"
    return [told] if told else []


def line_of(finding: Finding) -> str:
    """Finding in one line; a warning with its reason and what to type."""
    return (
        finding.found if finding.level is Level.ok else f"warning: {finding.found}: {finding.why}; type {finding.fix}"
    )


def choose_gpus(config: Config, facts: SlurmFacts) -> tuple[int | None, Finding | None]:
    """GPUs of each node to ask for, None where the config stays as it is; and what to say of that, if anything.

    Raises:
        ConfigError: more ranks are requested on a node than its GPUs, and nothing says which of the two is meant.
    """
    if (
        says_gpus(config)
        or workload_of(config).computes_on_cpus(config)
        or (there := gpus_there(config, facts)) is None
    ):
        return None, None
    where, kind = there.where, f" ({there.type})" if there.type else ""
    if built_for_cpus(facts.torch):
        found = f"torch {facts.torch} is built for CPUs, and nodes of {where} have GPUs{kind}"
        fix = (
            f"cluster.gpus_per_node=0, for CPUs; or install torch for your CUDA; or cluster.gpus_per_node={there.most}"
        )
        return None, warn("gpus", found, "no GPUs are asked for, which its ranks could not use", fix)
    if there.least == 0:
        found = f"some nodes of {where} have up to {there.most} GPUs{kind}, and cluster.gpus_per_node is not set"
        fix = f"cluster.gpus_per_node={there.most} for those, or cluster.gpus_per_node=0"
        return None, warn("gpus", found, "no GPUs are asked for, and the ranks compute on CPUs", fix)
    ranks = config.ranks_per_node
    if ranks is not None and ranks > there.least:
        raise ConfigError(
            f"ranks_per_node={ranks} on nodes of {where} with {there.least} GPUs{kind}, and no cluster.gpus_per_node",
            "one rank for each GPU, or ranks that compute on CPUs",
            f"ranks_per_node={there.least}, or cluster.gpus_per_node=0",
        )
    number = ranks or there.least
    has = f"every node of {where} has {there.least}{kind}; {NONE_WANTED}"
    return number, fine("gpus", f"cluster.gpus_per_node={number}: {has}")


def refuse_without_gpus(config: Config, facts: SlurmFacts) -> None:
    """Raise ConfigError if a batch script of the user's asks for no GPUs on nodes that all have some.

    Args:
        config: of the run; ``cluster.gpus_per_node`` is what the job has been given.
        facts: those of Slurm.
    """
    number, _ = choose_gpus(config, facts)
    if number is not None:
        raise ConfigError(
            f"a job without GPUs, on nodes that all have {number} or more",
            "GPUs that the job asks for, one rank on each: without them the ranks compute on CPUs",
            f"sbatch --gpus-per-node={number} ..., as before; or cluster.gpus_per_node=0, for CPUs",
        )


def built_for_cpus(torch: str) -> bool:
    """Return whether a torch of this version was built without any kind of GPU."""
    return torch.endswith("+cpu")


def says_gpus(config: Config) -> bool:
    """Return whether the config says how many GPUs there are to be, none included, here or at a candidate."""
    return any(
        there.cluster.gpus_per_node is not None
        or any(part.name == "gpu" for part in gres(there.cluster.gres or ""))
        or bool(typed_options(there.cluster) & GPU_OPTIONS)
        for _, there in configs_at(config)
    )


def gpu_type(config: Config, facts: SlurmFacts) -> str | None:
    """Type of the GPUs where a point may go, as Slurm's Gres name it; None if it is not known, or not one."""
    there = gpus_there(config, facts)
    return None if there is None else there.type


def gpus_there(config: Config, facts: SlurmFacts) -> Gpus | None:
    """GPUs of the nodes that a point may go to; None where no node has one, or Slurm does not tell of a place."""
    names, nodes = dict[str, None](), list[NodeLimits]()
    for _, there in configs_at(config):
        limits = facts.at(there.cluster.cluster)
        if not isinstance(limits, Limits) or is_sent_elsewhere(limits, there):
            return None
        for partition in partitions_of(limits, there):
            names[partition.name] = None
            nodes += [node for node in limits.nodes_of(partition) if has_features(node, there)]
    counts = [node.count("gpu") for node in nodes]
    if not any(counts):
        return None
    types = {kind for node in nodes for kind in types_of(node)}
    return Gpus(", ".join(names), min(counts), max(counts), types.pop() or None if len(types) == 1 else None)


def types_of(node: NodeLimits) -> Iterator[str]:
    """Yield the types of a node's GPUs; an empty one where the site gives none."""
    yield from (part.type for part in node.gres if part.name == "gpu")
