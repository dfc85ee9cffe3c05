"""Checks of a run's request against the cluster: partition, nodes, time, CPUs, GPUs, memory, preemption."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from launch.config import ClusterConfig, Config
from launch.errors import closest, counted
from launch.slurm.facts import PENDS, Finding, Level, Request, doubt, fail, fine, has_errors, warn
from launch.slurm.limits import NOTHING, Gres, Limits, NodeLimits, Partition, gres, how_preempted

# Checks of what is asked of each node: GPUs, CPUs, memory, and what the site gives where nothing is asked.


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
"""Words, how much is requested, and how much of it a node gives."""


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
    """Return whether a job has its nodes, and all of their CPUs, to itself."""
    return bool(partition.is_exclusive or cluster.exclusive or "exclusive" in typed_options(cluster))


def is_given_one_cpu(limits: Limits, partition: Partition, cluster: ClusterConfig) -> bool:
    """Return whether Slurm would give the one task of a node, the agent with all ranks, a single CPU."""
    unit = limits.config.get("SelectTypeParameters", "").upper()
    by_core = "CR_CPU" in unit or "CR_CORE" in unit
    for_gpus = "DefCpuPerGPU" in limits.config.get("JobDefaults", "")
    is_open = cluster.cpus_per_task is None and not typed_options(cluster) & {"cpus_per_gpu", "ntasks_per_node"}
    return is_open and by_core and not for_gpus and not gives_whole_nodes(partition, cluster)


def check_defaults(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """CPUs and memory that were not requested, where the cluster's default is meant for jobs of one CPU."""
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


# The resources that a partition has for one job, in words: the second part of a refusal.


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


# Checks of what preemption does to a run: whether it comes back, and how long it has to save.


def check(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """Everything about preemption in one partition."""
    mode = how_preempted(limits, partition)
    if mode == "OFF":
        yield fine("preemption", f"nothing preempts jobs in {partition.name}")
        return
    if mode == "REQUEUE":
        yield from check_requeue(limits, partition, request)
    else:
        done = (
            "suspended, and its collectives time out" if "SUSPEND" in mode else "ended and not put back into the queue"
        )
        why = f"a preempted run is {done}; typing the same command again goes on from its last checkpoint"
        yield warn(
            "preemption", f"PreemptMode of {partition.name} is {mode}", why, elsewhere(limits, partition, request)
        )
    if "SUSPEND" not in mode:
        yield from check_grace(limits, partition, request)


def check_requeue(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """Return whether the batch job may be requeued: JobRequeue of the cluster, or --requeue."""
    options = {str(key).replace("-", "_"): value for key, value in request.config.cluster.additional_parameters.items()}
    if options.get("no_requeue"):
        found, fix = "cluster.additional_parameters.no_requeue is set", "~cluster.additional_parameters.no_requeue"
    elif limits.number("JobRequeue") == 0 and not options.get("requeue"):
        found, fix = "JobRequeue=0 on this cluster, and no --requeue", "+cluster.additional_parameters.requeue=true"
    else:
        yield fine("preemption", f"jobs in {partition.name} may be preempted, and are requeued")
        return
    why = f"jobs in {partition.name} may be preempted, and this one would be ended instead of requeued"
    yield warn("preemption", found, why, fix)


def check_grace(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """Return whether a preempted run has the time to save that it has before its time limit.

    Slurm 22.05 ends a preempted job GraceTime and then KillWait after it was told.
    """
    wait = limits.number("KillWait") or 0
    lead, left = request.config.cluster.signal_delay_s, partition.grace_s + wait
    if lead <= left:
        return
    found = (
        f"GraceTime of {partition.name} is {partition.grace_s} s (KillWait {wait} s), and cluster.signal_delay_s={lead}"
    )
    why = f"a preempted run has about {left} s for a save, not {lead} s: a slower one is lost"
    yield warn("preemption", found, why, elsewhere(limits, partition, request))


def elsewhere(limits: Limits, partition: Partition, request: Request) -> str:
    """Propose what to type to lose less: checkpoints twice as often, or a large partition that is not preempted."""
    often = request.plan.promised.saves_more_often or "more frequent checkpoints"
    safe = [
        p.name
        for p in limits.partitions
        if p.name != partition.name
        and p.state == "UP"
        and how_preempted(limits, p) == "OFF"
        and len(limits.nodes_of(p)) >= request.config.nodes
    ]
    return f"{often}, or cluster.partition={safe[0]}" if safe else often


# Checks of what a run asks of Slurm against what the cluster has: partition, nodes, time, CPUs, GPUs, memory,
# arrays.


def check_request(limits: Limits, request: Request, groups: Sequence[str] | None) -> list[Finding]:
    """All checks of one job or array. ``groups`` are the Unix groups of the user; None for root, who passes."""
    found, partitions = list(check_partition_names(limits, request)), partitions_of(limits, request.config)
    each = [[*check_partition(limits, partition, request, groups)] for partition in partitions]
    some_fit = any(not has_errors(findings) for findings in each)
    for findings in each:
        # Of several partitions Slurm takes the first that can: one that cannot is no obstacle.
        found += [soften(finding) if some_fit else finding for finding in findings]
    found += check_array(limits, request)
    return [*(with_doubts(limits, request, finding) for finding in found), *check_accounting(limits)]


OPTIONS = (
    "partition", "time", "time_min", "nodes", "nodelist", "cpus_per_task", "cpus_per_gpu", "mem", "mem_per_cpu",
    "mem_per_gpu", "gpus", "gpus_per_node", "gpus_per_task", "gres", "constraint", "account", "qos", "exclude", "array",
    "overcommit", "use_min_nodes", "reservation",
)  # fmt: skip
"""Options of sbatch that change what the checks compare, where they come by cluster.additional_parameters."""


def with_doubts(limits: Limits, request: Request, finding: Finding) -> Finding:
    """Return the finding with what could make it wrong: options and site plugins that the checks know nothing of."""
    why = is_sent_elsewhere(limits, request.config)
    return doubt(finding, why) if why else finding


def is_sent_elsewhere(limits: Limits, config: Config) -> str:
    """Return the reason for which a job may ask for something else, or go elsewhere, than its keys say; or nothing."""
    asked = {str(key).replace("-", "_") for key in config.cluster.additional_parameters}
    others = sorted(asked & set(OPTIONS))
    if others:
        return f"cluster.additional_parameters ({', '.join(others)}) makes it fit"
    plugins = [limits.config.get(key, "") for key in ("JobSubmitPlugins", "CliFilterPlugins")]
    if not asked_names(config) and any(plugin not in NOTHING for plugin in plugins):
        return "the site's submit plugin sends jobs that name no partition elsewhere"
    return ""


def fewer_nodes(config: Config, most: int) -> str:
    """Return what to type for at most so many nodes: fewer spares where the nodes themselves fit, else fewer nodes."""
    if config.spare_nodes and config.nodes <= most:
        return f"spare_nodes={most - config.nodes}"
    return f"nodes={max(1, most - config.spare_nodes)}" if most > config.spare_nodes else f"nodes={most} spare_nodes=0"


def soften(finding: Finding) -> Finding:
    """Return the finding as a warning at most."""
    return replace(finding, level=Level.warning) if finding.level is Level.error else finding


def asked_names(config: Config) -> list[str]:
    """The partitions that were requested by name; Slurm takes any of several."""
    return [name.strip() for name in (config.cluster.partition or "").split(",") if name.strip()]


def partitions_of(limits: Limits, config: Config) -> list[Partition]:
    """The partitions the job could go to: those named, or the default."""
    names = asked_names(config)
    return [p for p in limits.partitions if (p.name in names if names else p.is_default)]


def check_partition_names(limits: Limits, request: Request) -> Iterator[Finding]:
    """Return whether the partitions exist."""
    there = [partition.name for partition in limits.partitions]
    names = asked_names(request.config)
    for name in names:
        if name not in there:
            likely = closest(name, there) or there
            found = f"cluster.partition={name}, and there are {', '.join(there) or 'none'}"
            yield fail(
                "partition", found, "sbatch refuses the job", f"cluster.partition={likely[0] if likely else 'NAME'}"
            )
    if not names and not any(partition.is_default for partition in limits.partitions):
        found = f"no cluster.partition, and none of {', '.join(there) or 'no partitions'} is the default"
        yield fail("partition", found, "sbatch refuses the job", f"cluster.partition={there[0] if there else 'NAME'}")


def check_partition(
    limits: Limits, partition: Partition, request: Request, groups: Sequence[str] | None
) -> Iterator[Finding]:
    """Everything that depends on the partition, or a finding that all is fine."""
    of_nodes = [
        *check_nodes(limits, partition, request),
        *check_asked(limits, partition, request, eligible(limits, partition, request)),
    ]
    hidden = partition.total_nodes - len(limits.nodes_of(partition))
    if hidden > 0:
        of_nodes = [doubt(finding, f"{hidden} nodes that Slurm does not show have it") for finding in of_nodes]
    complaints = [
        *check_state(limits, partition),
        *check_access(limits, partition, request, groups),
        *check_time(limits, partition, request),
        *of_nodes,
        *check_defaults(limits, partition, request),
    ]
    if not has_errors(complaints):
        room = f"{request.config.nodes_asked} of {len(eligible(limits, partition, request))} nodes"
        yield fine("partition", f"{partition.name}: {room} for {request.config.cluster.timeout_min} min")
    yield from complaints
    yield from check(limits, partition, request)


def check_state(limits: Limits, partition: Partition) -> Iterator[Finding]:
    """Return whether the partition takes and starts jobs."""
    if partition.state == "UP":
        return
    others = [p.name for p in limits.partitions if p.state == "UP"]
    why = "jobs wait there until somebody brings it up" if partition.state == "DOWN" else "sbatch refuses the job"
    fix = f"cluster.partition={others[0]}" if others else f"scontrol show partition {partition.name}"
    found = fail("partition", f"partition {partition.name} is {partition.state}", why, fix)
    yield doubt(found, "somebody does") if partition.state == "DOWN" else found


def check_access(
    limits: Limits, partition: Partition, request: Request, groups: Sequence[str] | None
) -> Iterator[Finding]:
    """Account, QOS and Unix group, as far as the partition tells. ``groups`` is None for root, who passes."""
    cluster = request.config.cluster
    lists = (
        ("account", cluster.account, partition.allow_accounts, partition.deny_accounts),
        ("qos", cluster.qos, partition.allow_qos, partition.deny_qos),
    )
    for key, value, allowed, denied in lists:
        if allowed is not None and value is None:
            # Without accounting Slurm knows no default and 22.05.8 says "Job's account not known", for good.
            found = f"partition {partition.name} takes {key} {', '.join(allowed)} only, and cluster.{key} is not set"
            if key == "account" and not limits.has_accounting:
                yield fail(key, found, PENDS, f"cluster.{key}={allowed[0]}")
            else:
                yield warn(key, found, f"your default {key} must be among them", f"cluster.{key}={allowed[0]}")
        elif allowed is not None and value not in allowed:
            found = f"cluster.{key}={value}, and partition {partition.name} takes {', '.join(allowed)} only"
            likely = closest(str(value), allowed) or allowed
            wrong = fail(key, found, PENDS, f"cluster.{key}={likely[0]}")
            # In newer releases the list of a partition holds for subaccounts too (slurm.conf, AllowAccounts).
            has_parents = key == "account" and limits.has_accounting and limits.version >= (23, 2)
            yield doubt(wrong, "it is a subaccount of one of them") if has_parents else wrong
        elif allowed is None and value is not None and value in (denied or ()):
            found = f"cluster.{key}={value}, which partition {partition.name} turns away"
            yield fail(key, found, PENDS, f"cluster.{key}=ANOTHER, or cluster.partition=ANOTHER")
    if groups is not None and partition.allow_groups is not None and not set(groups) & set(partition.allow_groups):
        found = f"partition {partition.name} takes groups {', '.join(partition.allow_groups)}, not {', '.join(groups)}"
        yield fail(
            "group", found, "sbatch refuses the job", "cluster.partition=ANOTHER, or ask the site for membership"
        )


def unless_lifted(finding: Finding, flag: str, limits: Limits, partition: Partition, request: Request) -> Finding:
    """Return an error about a limit of the partition, in doubt where the job's QOS may have the flag that lifts it."""
    lifted = limits.may_be_lifted(flag, partition, request.config.cluster.qos)
    return doubt(finding, f"its QOS has the flag {flag}") if lifted else finding


def check_time(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """The time limit, and whether there is time for a save before it."""
    asked = request.config.cluster.timeout_min
    if partition.max_time_min is not None and asked > partition.max_time_min:
        found = f"cluster.timeout_min={asked}, and MaxTime of {partition.name} is {partition.max_time_min:g} min"
        above = fail("time limit", found, PENDS, f"cluster.timeout_min={int(partition.max_time_min)}")
        yield unless_lifted(above, "PartitionTimeLimit", limits, partition, request)
    lead, grace = request.config.cluster.signal_delay_s, request.config.resilience.grace_period_s
    if grace > lead:
        found = f"resilience.grace_period_s={grace} and cluster.signal_delay_s={lead}"
        why = "Slurm ends the job at its time limit, before a slow save is given up on"
        yield warn("time limit", found, why, f"cluster.signal_delay_s={grace + 20}")


def eligible(limits: Limits, partition: Partition, request: Request) -> list[NodeLimits]:
    """The nodes of a partition that are not excluded and have the features requested, usable or not."""
    nodes = limits.nodes_of(partition)
    return [node for node in nodes if node.name not in request.excluded and has_features(node, request.config)]


def has_features(node: NodeLimits, config: Config) -> bool:
    """Return whether a node has the features that are requested."""
    return features(config) <= node.features


def features(config: Config) -> frozenset[str]:
    """The features every node must have. Only plain names joined by & are understood; the rest is left to Slurm."""
    text = config.cluster.constraint or ""
    return frozenset(text.split("&")) if re.fullmatch(r"[\w.-]+(&[\w.-]+)*", text) else frozenset()


def check_nodes(limits: Limits, partition: Partition, request: Request) -> Iterator[Finding]:
    """The number of nodes: the partition's limits, those there are, and those that work."""
    asked, spares, there = request.config.nodes_asked, request.config.spare_nodes, limits.nodes_of(partition)
    asked_text = f"nodes={request.config.nodes}" + (f" and spare_nodes={spares}" if spares else "")
    missing = features(request.config) - frozenset().union(*(node.features for node in there))
    for feature in sorted(missing):
        known = sorted(frozenset().union(*(node.features for node in there)))
        found = f"cluster.constraint={request.config.cluster.constraint}, and no node of {partition.name} has {feature}"
        yield fail(
            "constraint", found, PENDS, f"cluster.constraint={(closest(feature, known) or known or ['null'])[0]}"
        )
    if missing:
        return
    left = eligible(limits, partition, request)
    most = min(len(left), len(left) if partition.max_nodes is None else partition.max_nodes)
    if asked > most:
        limit = f"MaxNodes is {most}" if most < len(left) else f"it has {most} that fit cluster.exclude and constraint"
        fix = fewer_nodes(request.config, most)
        above = fail("nodes", f"{asked_text} in partition {partition.name}: {limit}", PENDS, fix)
        exist = asked <= len(left)
        yield unless_lifted(above, "PartitionMaxNodes", limits, partition, request) if exist else above
        return
    if asked < partition.min_nodes:
        found = f"{asked_text}, and MinNodes of {partition.name} is {partition.min_nodes}"
        below = fail("nodes", found, PENDS, f"nodes={partition.min_nodes - spares}")
        yield unless_lifted(below, "PartitionMinNodes", limits, partition, request)
    broken = [node for node in left if not node.is_usable]
    if asked > len(left) - len(broken):
        shown = ", ".join(f"{node.name} {'+'.join(sorted(node.states))} {node.reason}".strip() for node in broken[:4])
        found = f"{asked_text}, and {len(left) - len(broken)} of {len(left)} in {partition.name} work: {shown}"
        fix = fewer_nodes(request.config, max(1, len(left) - len(broken)))
        yield warn("nodes", found, "the job waits until they are back", fix)


def check_array(limits: Limits, request: Request) -> Iterator[Finding]:
    """The size of the job array. MaxArraySize is one more than the highest index."""
    size, most = len(request.points), limits.number("MaxArraySize")
    if size > 1 and most is not None and size > most:
        found = f"an array of {size} points of one shape, and MaxArraySize={most} allows indices up to {most - 1}"
        fix = (
            f"sweeps of at most {most} points of one shape for each command"
            if most > 1
            else "one command for each point"
        )
        yield fail("array", found, "sbatch refuses the array", fix)


def check_accounting(limits: Limits) -> Iterator[Finding]:
    """Return whether sacct knows anything. Nothing of ours needs it."""
    kind = limits.config.get("AccountingStorageType", "")
    if kind.endswith("/none") or not kind:
        yield fine(
            "accounting", "none here, so no sacct: states are read from squeue and the run folder, and that is enough"
        )
    else:
        yield fine("accounting", kind)
