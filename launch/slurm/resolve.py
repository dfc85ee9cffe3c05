"""Plans of all points of a command: choose clusters, GPUs and CPUs, then compare the plans with Slurm's limits.

The functions are in the order of these steps. They write and submit nothing.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from launch.agent.hosts import check_hosts, hosts_of, read_hostfile
from launch.config import ClusterConfig, ClusterKind, Config
from launch.config.compose import typed_config, workload_of
from launch.errors import ConfigError, counted
from launch.plan import placement
from launch.plan.plan import Plan, make_plan, unfinished
from launch.plan.preflight import add_expected, add_warnings, share_budget
from launch.runs.environment import visible_gpus
from launch.runs.find import labels_for
from launch.runs.overrides import typed_key
from launch.runs.records import refuse_unknown_figure
from launch.slurm import client as scheduler
from launch.slurm import limits
from launch.slurm.checks import (
    Finding,
    Level,
    check_before_submitting,
    features,
    fine,
    gives_whole_nodes,
    partitions_of,
    typed_options,
    warn,
    why_unsure,
)
from launch.slurm.limits import Limits, NodeLimits, Partition, SlurmFacts, gres
from launch.slurm.submit import share_jobs, side_by_side, start_after

GPU_OPTIONS = {"gpus", "gpus_per_node", "gpus_per_task", "gpus_per_socket", "gres", "G"}
"""Options of sbatch that request GPUs, or exclude GPUs."""
CPUS_PER_RANK = 4
"""Number of CPUs for each rank: one for computation, one each for data, communication and records."""
EXCLUSIVE = (
    "cluster.exclusive=true: points of a sweep over nodes or ranks would measure each other on shared nodes "
    "(cluster.exclusive=false shares them; a site may charge whole nodes)"
)


@dataclass
class OpenPoint:
    """One point of a command, while the launcher chooses the values that its overrides leave open."""

    document: DictConfig
    """Composed config, which is later written into the run folder."""
    kind: ClusterKind
    """``local``, ``slurm``, ``allocation`` or ``hosts``; never ``auto``."""
    overrides: Sequence[str] = ()
    config: Config = field(init=False)
    """The content of ``document`` as a Config object."""

    def __post_init__(self) -> None:
        self.config = typed_config(self.document)

    def store(self, *keys: str) -> None:
        """Copy the values of ``keys`` under ``cluster`` from ``config``, where they were chosen, to ``document``."""
        for key in keys:
            self.document.cluster[key] = getattr(self.config.cluster, key)

    def fit_nodes(self) -> str:
        """Set the keys of the point that depend on the nodes that the user already has.

        The keys are those for ranks, GPUs, time limit, placement and requeue. The nodes are the hosts of
        ``cluster.hostfile``, or those of the Slurm job in which this process runs. Returns a text on these nodes for
        people.
        """
        described = (fit_hosts if self.kind is ClusterKind.hosts else fit_job)(self.config)
        self.document.ranks_per_node = self.config.ranks_per_node
        self.store("gpus_per_node", "timeout_min", "placement")
        self.document.resilience.requeue = self.config.resilience.requeue
        return described


def plan_sweep(
    documents: Sequence[DictConfig], typed: Sequence[Sequence[str]], console: Console
) -> tuple[list[Plan], list[Config]]:
    """Return the plan and the config of each point of a command, and print the values that were chosen for them.

    Args:
        documents: composed config of each point, which gets the chosen values.
        typed: overrides of each point.
        console: console that prints.

    Raises:
        ConfigError: a point cannot work, Slurm would never start it, or two points would share a folder.
    """
    kinds = choose_clusters(documents, console)
    points = [OpenPoint(*parts) for parts in zip(documents, kinds, typed, strict=True)]
    for point in points:
        refuse_unknown_figure(point.config.objective, workload_of(point.config).figures)
    slurm = choose_resources(points, console)
    plans = plan_points(points, slurm)
    refuse_same_folder(plans, typed)
    labels = labels_for([(Path(plan.run_dir), words) for plan, words in zip(plans, typed, strict=True)])
    plans = [replace(plan, label=label) for plan, label in zip(plans, labels, strict=True)]
    configs = [point.config for point in points]
    plans = share_jobs(plans, configs[0].cluster.points_per_job)
    plans = [start_after(plan, config.launch.after) for plan, config in zip(plans, configs, strict=True)]
    return check_plans(plans, configs, slurm, console), configs


def choose_clusters(configs: Sequence[DictConfig], console: Console) -> list[ClusterKind]:
    """Return the kind of cluster of each point: ``local``, ``slurm``, ``allocation`` or ``hosts``.

    The choice for ``auto`` is made once and printed.

    Raises:
        ConfigError: ``auto`` on a machine of a cluster whose controller does not answer.
    """
    kinds = [ClusterKind.hosts if config.cluster.get("hostfile") else config.cluster.kind for config in configs]
    if ClusterKind.auto not in kinds:
        return list(kinds)
    if scheduler.held_job() is not None:
        return [ClusterKind.allocation if kind is ClusterKind.auto else kind for kind in kinds]
    problem = scheduler.controller_problem()
    if problem and not configs[0].dry_run:
        raise ConfigError(
            f"cluster=auto on a machine of a Slurm cluster that takes no jobs: {problem}",
            "a controller that answers; this may be a login node, so cluster=auto trains nothing here",
            "the same command when scontrol ping says UP, or cluster=local",
        )
    found, said = ClusterKind.local, "no Slurm here: nodes are agents on this machine"
    if problem is None:
        found, said = ClusterKind.slurm, "sbatch and a controller that answers"
    elif problem:
        said = f"no controller answers, and without dry_run this is refused: {problem}"
    console.print(f"cluster=auto: {found.name} ({said})")
    return [found if kind is ClusterKind.auto else kind for kind in kinds]


# Nodes that the user already has: those of a Slurm job, as in a shell of salloc, or the hosts of a hostfile. The points
# run one after another; in a job, each is a step of the job. A process of submitit on this machine starts the agents of
# a point, so that status and cancel work as for a local run.


def fit_job(config: Config) -> str:
    """Change the config of a point so that the point fits the Slurm job in which this process runs.

    The point gets the GPUs of the job's nodes, and the time that the job has left. It is not requeued.

    Returns:
        Description of the job for people.

    Raises:
        ConfigError: this process runs in no job, the job has too few nodes, or Slurm does not describe the job.
    """
    job = scheduler.held_job()
    if job is None:
        raise ConfigError(
            "cluster.kind=allocation outside of a Slurm job", "a shell of salloc, or a batch script", "cluster=slurm"
        )
    try:
        fields = scheduler.job_fields(job)
    except scheduler.SlurmError as error:
        raise ConfigError(
            f"job {job}, and Slurm does not describe it: {error}",
            "a controller that answers",
            "the same command when scontrol ping says UP",
        ) from error
    nodes, ends = int(fields["NumNodes"].split("-")[0]), scheduler.unix_time(fields.get("EndTime", ""))
    if config.nodes_asked > nodes:
        spares = f" spare_nodes={config.spare_nodes}" if config.spare_nodes else ""
        raise ConfigError(
            f"nodes={config.nodes}{spares} inside job {job}, which has {counted(nodes, 'node')}",
            "at most the nodes of the job in which this command runs",
            f"nodes={max(1, nodes - config.spare_nodes)}; or cluster=slurm, which submits another job",
        )
    refuse_without_srun(config)
    if config.cluster.gpus_per_node is None:
        asked = fields.get("TresPerNode", "").replace("gres:", "gres/")
        config.cluster.gpus_per_node = sum(part.count for part in gres(asked) if part.name == "gpu") or None
    left_min = config.cluster.timeout_min if ends is None else max(1, int((ends - time.time()) // 60))
    config.cluster.timeout_min, config.cluster.placement = left_min, []
    config.resilience.requeue = False
    return f"inside job {job}: {counted(nodes, 'node')}, {left_min} min left; cluster=slurm submits another job"


def fit_hosts(config: Config) -> str:
    """Set the ranks per node of a point to the smallest number of slots of its hosts, unless the config sets them.

    Returns:
        Description of the hosts for people.

    Raises:
        ConfigError: the hostfile is wrong or has too few hosts, or a host cannot take part.
    """
    if config.ranks_per_node is None and config.cluster.gpus_per_node is None:
        slots = list(read_hostfile(config).values())[: config.nodes_asked]
        config.ranks_per_node = min(slots, default=0) or None
    hosts = hosts_of(config)
    if not config.dry_run:
        check_hosts(hosts, Path(config.run_dir or config.output_dir).absolute())
    return f"on {', '.join(hosts)}, by ssh: {counted(config.ranks_on_node, 'rank')} on each"


def refuse_without_srun(config: Config) -> None:
    """Raise ConfigError if a run inside the user's own job does not start its agents by srun.

    Such a run sets ``cluster.hostfile``, or sets ``cluster.start`` to another way.
    """
    if not config.cluster.by_srun:
        raise ConfigError(
            "cluster.start or cluster.hostfile in a batch script of your own, or cluster.start in a job that you hold",
            "srun, or the hosts of a file",
            "scontrol show hostnames > hosts; then python -m launch cluster=local cluster.hostfile=hosts ...",
        )


# Values that a command leaves open: exclusive nodes, GPUs, ranks and CPUs.


def choose_resources(points: Sequence[OpenPoint], console: Console) -> SlurmFacts | None:
    """Choose the nodes, GPUs, ranks and CPUs that a command leaves open, and print the choices.

    Returns:
        Slurm's limits, or why they are not known. None if no point runs on Slurm, or ``launch.check_limits`` is false.

    Raises:
        ConfigError: a point requests more ranks on a node than GPUs.
    """
    on_slurm = [point for point in points if point.kind is ClusterKind.slurm]
    lines = choose_exclusive(on_slurm)
    held = (ClusterKind.allocation, ClusterKind.hosts)
    lines += [point.fit_nodes() for point in points if point.kind in held]
    if len(on_slurm) < len(points):
        lines += choose_local_ranks([point for point in points if point.kind is ClusterKind.local], len(visible_gpus()))
    slurm = None
    if on_slurm and points[0].config.launch.check_limits:
        slurm = limits.ask_slurm()
        for point in on_slurm:
            for finding in choose_on_slurm(point.config, slurm):
                says = f"warning: {finding.found}: {finding.why}; type {finding.fix}"
                lines.append(finding.found if finding.level is Level.ok else says)
            point.store(*CHOICES)
    for line in dict.fromkeys(lines):
        console.print(line)
    return slurm


def choose_exclusive(points: Sequence[OpenPoint]) -> list[str]:
    """Request exclusive nodes for points on Slurm if their numbers of ranks differ. Returns the lines to print."""
    if len({point.config.world_size for point in points}) < 2:
        return []
    lines = []
    for point in points:
        cluster = point.config.cluster
        if cluster.exclusive is None and "exclusive" not in cluster.additional_parameters:
            cluster.exclusive = True
            point.store("exclusive")
            lines = [EXCLUSIVE]
    return lines


def choose_local_ranks(points: Sequence[OpenPoint], gpus: int) -> list[str]:
    """Set ``ranks_per_node=gpus`` in ``points``, which run on this machine. ``gpus`` is the number of its GPUs.

    A point that sets ``ranks_per_node`` or its GPUs, or computes on CPUs, does not change. No point changes in three
    cases: the machine has fewer than two GPUs, torch is built for CPUs only, or any point has several local nodes.
    Several local nodes share the GPUs of this machine. A value for the other points alone would give the points of a
    sweep different numbers of ranks on a node.

    Returns:
        The lines to print.
    """
    if gpus < 2 or limits.torch_version().endswith("+cpu") or any(point.config.nodes > 1 for point in points):
        return []
    lines = []
    for point in points:
        config = point.config
        if config.ranks_per_node is None and not says_gpus(config) and not workload_of(config).computes_on_cpus(config):
            config.ranks_per_node = point.document.ranks_per_node = gpus
            lines = [f"ranks_per_node={gpus}: this machine has {gpus} GPUs; ranks_per_node=1 takes one of them"]
    return lines


def choose_on_slurm(config: Config, slurm: SlurmFacts) -> list[Finding]:
    """Choose the keys of ``CHOICES`` that a config on Slurm leaves open, and set them. Returns the findings to report.

    Raises:
        ConfigError: the config requests more ranks on a node than its GPUs.
    """
    found = []
    for key, choose in CHOICES.items():
        number, finding = choose(config, slurm)
        if number is not None:
            setattr(config.cluster, key, number)
        found.append(finding)
    return [finding for finding in found if finding is not None]


def partitions_there(config: Config, slurm: SlurmFacts) -> list[tuple[Partition, Config]]:
    """Return (partition, config) for each partition that a point may use.

    The config is that of the candidate with this partition. Empty if no controller answers.
    """
    if slurm.limits is None:
        return []
    every = placement.configs(config)
    return [(partition, there) for _, there in every for partition in partitions_of(slurm.limits, there)]


def nodes_there(config: Config, slurm: SlurmFacts) -> dict[str, list[NodeLimits]]:
    """Return name of a partition -> its nodes that have the features that the point requests.

    Empty if an option of sbatch or a plugin of the site may choose other nodes, or if no controller answers.
    """
    found: dict[str, list[NodeLimits]] = {}
    for partition, there in partitions_there(config, slurm):
        assert slurm.limits is not None
        if why_unsure(slurm.limits, there):
            return {}
        nodes = slurm.limits.nodes_of(partition)
        found.setdefault(partition.name, []).extend(node for node in nodes if features(there) <= node.features)
    return found


def gpu_type(config: Config, slurm: SlurmFacts) -> str | None:
    """Return the type of the GPUs on the nodes where a point may run, as Slurm's Gres names it.

    None if the type is not known, or if the nodes have GPUs of several types.
    """
    nodes = [node for inside in nodes_there(config, slurm).values() for node in inside]
    types = {part.type for node in nodes for part in node.gres if part.name == "gpu"}
    return types.pop() or None if len(types) == 1 else None


def choose_gpus(config: Config, slurm: SlurmFacts) -> tuple[int | None, Finding | None]:
    """Return the number of GPUs that a point requests on each node, and a finding to report.

    The number is ``ranks_per_node``. If that is not set, it is the smallest number of GPUs of a node, divided by the
    number of points that share a job. If torch is built for CPUs, or some nodes have no GPU, the number is None, and
    the finding is a warning. Both are None if the config sets the GPUs, if the ranks need none, or if no node is known
    to have one.

    Raises:
        ConfigError: the config requests more ranks on a node than its GPUs.
    """
    is_open = not says_gpus(config) and not workload_of(config).computes_on_cpus(config)
    there = nodes_there(config, slurm) if is_open else {}
    counts = [node.count("gpu") // config.cluster.points_per_job for nodes in there.values() for node in nodes]
    if not any(counts):
        return None, None
    where, least, most, kind = ", ".join(there), min(counts), max(counts), gpu_type(config, slurm)
    kind = f" ({kind})" if kind else ""
    if slurm.torch.endswith("+cpu"):
        found = f"torch {slurm.torch} is built for CPUs, and nodes of {where} have GPUs{kind}"
        fix = f"cluster.gpus_per_node=0, for CPUs; or install torch for your CUDA; or cluster.gpus_per_node={most}"
        return None, warn("gpus", found, "no GPUs are requested, which its ranks could not use", fix)
    if least == 0:
        found = f"some nodes of {where} have up to {most} GPUs{kind}, and cluster.gpus_per_node is not set"
        fix = f"cluster.gpus_per_node={most} for those, or cluster.gpus_per_node=0"
        return None, warn("gpus", found, "no GPUs are requested, and the ranks compute on CPUs", fix)
    ranks = config.ranks_per_node
    if ranks is not None and ranks > least:
        raise ConfigError(
            f"ranks_per_node={ranks} on nodes of {where} with {least} GPUs{kind}, and no cluster.gpus_per_node",
            "one rank for each GPU, or ranks that compute on CPUs",
            f"ranks_per_node={least}, or cluster.gpus_per_node=0",
        )
    has = f"every node of {where} has {least}{kind}; cluster.gpus_per_node=0 computes on CPUs"
    return ranks or least, fine("gpus", f"cluster.gpus_per_node={ranks or least}: {has}")


def choose_cpus(config: Config, slurm: SlurmFacts) -> tuple[int | None, Finding | None]:
    """Return the number of CPUs that a point requests on each node for its ranks, and a finding to report.

    Each usable node with the requested GPUs has this many CPUs, in every partition that the point may use. Number and
    finding are None if Slurm gives more than one CPU without a request, if no such node exists, or if Slurm's limits
    are not known.
    """
    there, known = partitions_there(config, slurm), slurm.limits
    if known is None or not all(is_given_one_cpu(known, partition, place.cluster) for partition, place in there):
        return None, None
    rooms = [
        (min(node.cpus, partition.max_cpus_per_node or node.cpus), f"{node.name} in {partition.name}", node, place)
        for partition, place in there
        for node in known.nodes_of(partition)
        if node.is_usable and node.count("gpu") >= (place.cluster.gpus_per_node or 0)
    ]
    if not rooms:
        return None, None
    ranks, wanted = counted(config.ranks_on_node, "rank"), CPUS_PER_RANK * config.ranks_on_node
    smallest, name, _, _ = min(rooms, key=lambda room: room[0])
    smallest = max(1, smallest // config.cluster.points_per_job)
    # A job with all GPUs gets all CPUs: fewer CPUs would come from one socket, far from the GPUs of the other socket.
    if all(0 < node.count("gpu") == place.cluster.gpus_per_node for _, _, node, place in rooms):
        number, why = smallest, f"all of {name}, as the job has all its GPUs"
    elif wanted > smallest:
        number, why = smallest, f"all of {name}, for {ranks}"
    else:
        number, why = wanted, f"{CPUS_PER_RANK} for each of {ranks} on a node"
    return number, fine("cpus", f"cluster.cpus_per_task={number}: {why}")


def is_given_one_cpu(limits: Limits, partition: Partition, cluster: ClusterConfig) -> bool:
    """Return whether a job without a number of CPUs gets only one CPU on each node, for its agent and all its ranks.

    For Slurm, the agent and its ranks are one task. The task gets one CPU under three conditions: Slurm allocates
    single CPUs or cores, not whole nodes; the config requests no number of CPUs; and Slurm has no default number for
    each GPU.
    """
    unit = limits.config.get("SelectTypeParameters", "").upper()
    by_core = "CR_CPU" in unit or "CR_CORE" in unit
    for_gpus = "DefCpuPerGPU" in limits.config.get("JobDefaults", "")
    is_open = cluster.cpus_per_task is None and not typed_options(cluster) & {"cpus_per_gpu", "ntasks_per_node"}
    return is_open and by_core and not for_gpus and not gives_whole_nodes(partition, cluster)


CHOICES = {"gpus_per_node": choose_gpus, "cpus_per_task": choose_cpus}
"""Key of ``cluster`` -> function that chooses its value.

GPUs come first, because they set the number of ranks on a node, which decides the CPUs.
"""


def says_gpus(config: Config) -> bool:
    """Return whether the config sets a number of GPUs (0 included), for all candidates or for one of them."""
    return any(
        there.cluster.gpus_per_node is not None
        or any(part.name == "gpu" for part in gres(there.cluster.gres or ""))
        or bool(typed_options(there.cluster) & GPU_OPTIONS)
        for _, there in placement.configs(config)
    )


# Plans, and their comparison with Slurm's limits.


def plan_points(points: Sequence[OpenPoint], slurm: SlurmFacts | None = None) -> list[Plan]:
    """Return the plans of all points of a command. ``slurm`` is the result of ``choose_resources``.

    Raises:
        ConfigError: a point cannot work.
    """
    sizes = [point.config.world_size for point in points]
    plans = []
    for point in points:
        kind = gpu_type(point.config, slurm) if slurm and point.kind is ClusterKind.slurm else None
        plans.append(make_plan(point.config, point.overrides, point.kind, sizes, kind))
    return plans


def refuse_same_folder(plans: Sequence[Plan], typed: Sequence[Sequence[str]]) -> None:
    """Raise ConfigError if two points would write into one folder. ``typed`` has the overrides of each point."""
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
        raise ConfigError(
            f"two points of the sweep with the folder {plan.run_dir}, which differ in {', '.join(apart)}",
            "a folder for each point, which run_dir, cluster.* and resilience.* do not name",
            f"'{apart[0]}=\"A,B\"' for one text with a comma; a sweep over something that changes the run; "
            "or one command for each with its own name=NAME",
        )


def check_plans(plans: list[Plan], configs: Sequence[Config], slurm: SlurmFacts | None, console: Console) -> list[Plan]:
    """Compare the plans with Slurm's limits. Returns the plans with budget, expected times and warnings.

    Args:
        plans: plan of each point.
        configs: config of each point.
        slurm: result of ``choose_resources``. With None, the comparison is left out.
        console: console that prints the findings of the comparison.

    Raises:
        ConfigError: Slurm would refuse a point, or never start it; the controller does not answer; ``launch.detach`` is
            set, and a run is not on Slurm; or ``launch.parallel`` is too large.
    """
    if slurm is not None:
        if slurm.is_away and unfinished(plans) and not configs[0].dry_run:
            raise ConfigError(
                f"cluster=slurm, and {slurm.slurm_problem}",
                "a Slurm controller that answers: nothing was submitted, and nothing written",
                "the same command when scontrol ping says UP; cluster=local to run here; dry_run=true only plans",
            )
        plans = check_before_submitting(slurm, plans, configs, console)
    kind = next((plan.cluster for plan in plans if plan.cluster != "slurm"), None)
    if configs[0].launch.detach and kind is not None:
        raise ConfigError(
            f"launch.detach=true with agents that this command starts (cluster={kind})",
            "a Slurm cluster: a local run ends with its launcher, so that no run is forgotten",
            "cluster=slurm; or, without launch.detach: nohup python -m launch ... > launch.out &",
        )
    side_by_side(configs[0].launch.parallel, plans)  # refuses what has no room
    budgeted = share_budget(plans, configs)
    return [add_warnings(add_expected(plan), config, slurm) for plan, config in zip(budgeted, configs, strict=True)]
