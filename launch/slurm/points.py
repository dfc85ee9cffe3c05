"""Plans of all points of a command: choose clusters, GPUs and CPUs, then compare the plans with Slurm's limits.

The functions are in the order of these steps. They write and submit nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from launch.config import ClusterKind, Config
from launch.config.compose import typed_config, workload_of
from launch.errors import ConfigError, counted
from launch.plan import placement
from launch.plan.plan import Plan, local_gpus, make_plan, unfinished
from launch.plan.preflight import add_expected, add_warnings, settle_exclusive, share_budget
from launch.runs.find import labels_for
from launch.runs.overrides import in_shell, typed_key, typed_value
from launch.runs.records import refuse_unknown_figure
from launch.slurm import client as scheduler
from launch.slurm import facts
from launch.slurm.checks import has_features, is_given_one_cpu, partitions_of, typed_options, why_unsure
from launch.slurm.facts import Finding, Level, SlurmFacts, fine, warn
from launch.slurm.limits import Limits, gres

TEXTS = ("script.env.", "cluster.exclude", "cluster.partition", "cluster.additional_parameters.")
"""Beginnings of keys whose values may contain a comma."""
GPU_OPTIONS = {"gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket", "gres", "G"}
"""Options of sbatch that request GPUs, or exclude GPUs."""
CPUS_PER_RANK = 4
"""CPUs for each rank: one for computation, one each for data, communication and records."""


def plan_sweep(
    documents: Sequence[DictConfig], typed: Sequence[Sequence[str]], console: Console
) -> tuple[list[Plan], list[Config]]:
    """Plan the points of a command, and print the choices that were made for them.

    Args:
        documents: composed config of each point, which gets the chosen values.
        typed: overrides of each point.
        console: console that prints.

    Returns:
        Plan and typed config of each point.

    Raises:
        ConfigError: a point cannot work, Slurm would never start it, or two points would share a folder.
    """
    kinds = choose_clusters(documents, console)
    configs = [typed_config(composed) for composed in documents]
    for config in configs:
        refuse_unknown_figure(config.objective, workload_of(config).figures)
    slurm = choose_resources(documents, configs, kinds, console)
    plans = plan_points(configs, typed, kinds, slurm)
    refuse_same_folder(plans, typed)
    labels = labels_for([(Path(plan.run_dir), words) for plan, words in zip(plans, typed, strict=True)])
    plans = [replace(plan, label=label) for plan, label in zip(plans, labels, strict=True)]
    return check_plans(plans, configs, slurm, console), configs


def choose_clusters(configs: Sequence[DictConfig], console: Console) -> list[ClusterKind]:
    """Return the cluster of each point. ``auto`` is decided once and printed.

    Raises:
        ConfigError: ``auto`` on a machine of a cluster whose controller does not answer.
    """
    kinds = [config.cluster.kind for config in configs]
    if ClusterKind.auto not in kinds:
        return list(kinds)
    problem = scheduler.controller_problem()
    if problem and not configs[0].dry_run:
        raise ConfigError(
            f"cluster=auto on a machine of a Slurm cluster that takes no jobs: {problem}",
            "a controller that answers; this may be a login node, so cluster=auto trains nothing here",
            "the same command when scontrol ping says UP, or cluster=local",
        )
    found = ClusterKind.slurm if problem is None else ClusterKind.local
    why = {None: "sbatch and a controller that answers", "": "no Slurm here: nodes are agents on this machine"}
    said = why.get(problem, f"no controller answers, and without dry_run this is refused: {problem}")
    console.print(f"cluster=auto: {found.name} ({said})", highlight=False)
    return [found if kind is ClusterKind.auto else kind for kind in kinds]


# GPUs and CPUs of points whose config does not name a number.


def choose_resources(
    documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind], console: Console
) -> SlurmFacts | None:
    """Choose the nodes, GPUs, ranks and CPUs that a command leaves open, and print the choices.

    Args:
        documents: composed config of each point.
        configs: the same configs, typed. Both are changed.
        kinds: cluster of each point.
        console: console that prints.

    Returns:
        Slurm's facts; None if no point needs them.

    Raises:
        ConfigError: a point requests more ranks on a node than GPUs.
    """
    if whole := settle_exclusive(documents, configs, kinds):
        console.print(whole, highlight=False, markup=False)
    needs_slurm = configs[0].launch.check_limits and ClusterKind.slurm in kinds
    slurm = facts.ask_slurm(facts.clusters_named(configs)) if needs_slurm else None
    visible = local_gpus() if ClusterKind.local in kinds else 0
    lines = choose_local_ranks(documents, configs, kinds, visible) if visible > 1 else []
    for line in [*lines, *(choose_on_slurm(documents, configs, kinds, slurm) if slurm is not None else [])]:
        console.print(line, highlight=False, markup=False)
    return slurm


def choose_local_ranks(
    documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind], gpus: int
) -> list[str]:
    """Use one rank for each of this machine's ``gpus`` in points that set no number of ranks. Returns the lines to
    print.

    Points with several local nodes share the GPUs. If a command has such a point, nothing is chosen: each point of a
    sweep over nodes keeps the same number of ranks.
    """
    local = [point for point in zip(documents, configs, kinds, strict=True) if point[2] is ClusterKind.local]
    if facts.torch_version().endswith("+cpu") or any(config.nodes > 1 for _, config, _ in local):
        return []
    said = []
    for document, config, _ in local:
        if config.ranks_per_node is None and not says_gpus(config) and not workload_of(config).computes_on_cpus(config):
            config.ranks_per_node = document.ranks_per_node = gpus
            said = [f"ranks_per_node={gpus}: this machine has {gpus} GPUs; ranks_per_node=1 takes one of them"]
    return said


def choose_on_slurm(
    documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind], slurm: SlurmFacts
) -> list[str]:
    """Choose values for ``CHOICES`` in each point on Slurm that leaves them open. Returns the lines to print."""
    said = []
    for key, choose in CHOICES.items():

        def choose_and_say(config: Config, choose: Choose = choose) -> tuple[int | None, str]:
            number, finding = choose(config, slurm)
            if finding is None or finding.level is Level.ok:
                return number, "" if finding is None else finding.found
            return number, f"warning: {finding.found}: {finding.why}; type {finding.fix}"

        said += placement.settle_key(key, choose_and_say, documents, configs, kinds)
    return said


def choose_gpus(config: Config, slurm: SlurmFacts) -> tuple[int | None, Finding | None]:
    """Return the number of GPUs to request on each node, and a finding to report.

    The number is what every node has; None if the config stays as it is.

    Raises:
        ConfigError: the config requests more ranks on a node than its GPUs.
    """
    is_open = not says_gpus(config) and not workload_of(config).computes_on_cpus(config)
    there = gpus_there(config, slurm) if is_open else None
    if there is None:
        return None, None
    where, kind = there.where, f" ({there.type})" if there.type else ""
    if slurm.torch.endswith("+cpu"):
        found = f"torch {slurm.torch} is built for CPUs, and nodes of {where} have GPUs{kind}"
        other = f"install torch for your CUDA; or cluster.gpus_per_node={there.most}"
        why = "no GPUs are requested, which its ranks could not use"
        return None, warn("gpus", found, why, f"cluster.gpus_per_node=0, for CPUs; or {other}")
    if there.least == 0:
        found = f"some nodes of {where} have up to {there.most} GPUs{kind}, and cluster.gpus_per_node is not set"
        fix = f"cluster.gpus_per_node={there.most} for those, or cluster.gpus_per_node=0"
        return None, warn("gpus", found, "no GPUs are requested, and the ranks compute on CPUs", fix)
    ranks = config.ranks_per_node
    if ranks is not None and ranks > there.least:
        raise ConfigError(
            f"ranks_per_node={ranks} on nodes of {where} with {there.least} GPUs{kind}, and no cluster.gpus_per_node",
            "one rank for each GPU, or ranks that compute on CPUs",
            f"ranks_per_node={there.least}, or cluster.gpus_per_node=0",
        )
    number, has = ranks or there.least, f"every node of {where} has {there.least}{kind}"
    found = f"cluster.gpus_per_node={number}: {has}; cluster.gpus_per_node=0 computes on CPUs"
    return number, fine("gpus", found)


def choose_cpus(config: Config, slurm: SlurmFacts) -> tuple[int | None, Finding | None]:
    """Return the number of CPUs to request on each node for its ranks, and a finding to report.

    Every node with the requested GPUs has this many CPUs, at every place that the point may use. None if Slurm gives
    more than one CPU by itself.
    """
    ranks = counted(config.ranks_on_node, "rank")
    wanted = CPUS_PER_RANK * config.ranks_on_node
    rooms: list[tuple[int, str]] = []
    for _, there in placement.configs(config):
        limits = slurm.at(there.cluster.cluster)
        if not isinstance(limits, Limits):
            return None, None
        for partition in partitions_of(limits, there):
            if not is_given_one_cpu(limits, partition, there.cluster):
                return None, None
            rooms += [
                (min(node.cpus, partition.max_cpus_per_node or node.cpus), f"{node.name} in {partition.name}")
                for node in limits.nodes_of(partition)
                if node.is_usable and node.count("gpu") >= (there.cluster.gpus_per_node or 0)
            ]
    if not rooms:
        return None, None
    smallest, name = min(rooms, key=lambda room: room[0])
    why = f"{CPUS_PER_RANK} for each of {ranks} on a node" if wanted <= smallest else f"all of {name}, for {ranks}"
    number = min(wanted, smallest)
    return number, fine("cpus", f"cluster.cpus_per_task={number}: {why}")


Choose = Callable[[Config, SlurmFacts], tuple[int | None, Finding | None]]
CHOICES: dict[str, Choose] = {"gpus_per_node": choose_gpus, "cpus_per_task": choose_cpus}
"""Keys of ``cluster`` -> function that chooses the value.

GPUs come first: the number of ranks on a node decides the CPUs.
"""


def says_gpus(config: Config) -> bool:
    """Return whether the config sets a number of GPUs (also zero), itself or at a candidate."""
    return any(
        there.cluster.gpus_per_node is not None
        or any(part.name == "gpu" for part in gres(there.cluster.gres or ""))
        or bool(typed_options(there.cluster) & GPU_OPTIONS)
        for _, there in placement.configs(config)
    )


@dataclass(frozen=True)
class NodeGpus:
    """GPUs of the nodes that a job could use."""

    where: str
    """Names of the partitions."""
    least: int
    """Smallest number of GPUs of a node."""
    most: int
    type: str | None
    """Type of the GPUs in Slurm's Gres; None if the nodes have several types, or name none."""


def gpus_there(config: Config, slurm: SlurmFacts) -> NodeGpus | None:
    """Return the GPUs of nodes that a point may use; None if no node has one, or Slurm does not report a place."""
    names, nodes = dict[str, None](), []
    for _, there in placement.configs(config):
        limits = slurm.at(there.cluster.cluster)
        if not isinstance(limits, Limits) or why_unsure(limits, there):
            return None
        for partition in partitions_of(limits, there):
            names[partition.name] = None
            nodes += [node for node in limits.nodes_of(partition) if has_features(node, there)]
    counts = [node.count("gpu") for node in nodes]
    if not any(counts):
        return None
    types = {part.type for node in nodes for part in node.gres if part.name == "gpu"}
    return NodeGpus(", ".join(names), min(counts), max(counts), types.pop() or None if len(types) == 1 else None)


def gpu_type(config: Config, slurm: SlurmFacts) -> str | None:
    """Return the type of the GPUs where a point may run, as Slurm's Gres names it; None if unknown or several."""
    there = gpus_there(config, slurm)
    return None if there is None else there.type


# Plans, and their comparison with Slurm's limits.


def plan_points(
    configs: Sequence[Config],
    typed: Sequence[Sequence[str]],
    kinds: Sequence[ClusterKind],
    slurm: SlurmFacts | None = None,
) -> list[Plan]:
    """Plan all points of a command. ``slurm`` has Slurm's facts; None if no point needs them.

    Raises:
        ConfigError: a point cannot work. A cluster that lacks the nodes is reported first.
    """
    sizes = [config.world_size for config in configs]
    on_slurm = [config for config, kind in zip(configs, kinds, strict=True) if kind is ClusterKind.slurm]
    try:
        return [
            make_plan(
                config, words, kind, sizes, gpu_type(config, slurm) if slurm and kind is ClusterKind.slurm else None
            )
            for config, words, kind in zip(configs, typed, kinds, strict=True)
        ]
    except ConfigError:
        if slurm is not None:
            from launch.slurm.places import refuse_missing_nodes

            refuse_missing_nodes(slurm, on_slurm)
        raise


def refuse_same_folder(plans: Sequence[Plan], typed: Sequence[Sequence[str]]) -> None:
    """Raise ConfigError if two points would write into one folder."""
    seen: dict[str, Sequence[str]] = {}
    for plan, words in zip(plans, typed, strict=True):
        other = seen.setdefault(plan.run_dir, words)
        if other is words:
            continue
        apart = sorted({typed_key(word) for word in {*other} ^ {*words}})
        if not apart:
            raise ConfigError(
                f"the point {' '.join(words)} more than once in the sweep",
                "each point once: a second run with the same settings would write into the folder of the first",
                "each value once, or seed=0,1 for runs that differ in their seed alone",
            )
        quoted = ""
        for key in (key for key in apart if key.startswith(TEXTS)):
            values = [value for point in typed if (value := typed_value(point, key)) is not None]
            quoted += in_shell(key, f'"{",".join(dict.fromkeys(values))}"') + " "
        raise ConfigError(
            f"two points of the sweep with the folder {plan.run_dir}, which differ in {', '.join(apart)}",
            "a folder for each point; run_dir, cluster.* and resilience.* do not name the folder"
            + ("; a comma outside quotes means several points" if quoted else ""),
            (f"{quoted.strip()}, or " if quoted else "")
            + "a sweep over something that changes the run, or one command for each with its own name=NAME",
        )


def check_plans(plans: list[Plan], configs: Sequence[Config], slurm: SlurmFacts | None, console: Console) -> list[Plan]:
    """Compare the plans with Slurm's limits. Returns the plans with budget, expected times and warnings.

    Raises:
        ConfigError: Slurm would refuse a point, or never start it; or a detached run would lose its launcher.
    """
    limits: Mapping[str | None, Limits] = {}
    if slurm is not None:
        from launch.slurm.places import check_before_submitting, refuse_without_controller

        if unfinished(plans) and not configs[0].dry_run:
            refuse_without_controller(slurm)
        plans, limits = check_before_submitting(slurm, plans, configs, console), slurm.known
    if configs[0].launch.detach and any(plan.cluster == "local" for plan in plans):
        raise ConfigError(
            "launch.detach=true with agents on this machine (cluster=local)",
            "a Slurm cluster: a local run ends with its launcher, so that no run is forgotten",
            "cluster=slurm; or, without launch.detach: nohup python -m launch ... > launch.out &",
        )
    budgeted = share_budget(plans, configs)
    return [add_warnings(add_expected(plan), config, limits) for plan, config in zip(budgeted, configs, strict=True)]
