"""Checks of what a run asks of Slurm against what the cluster has: partition, nodes, time, CPUs, GPUs, memory, arrays.

Pure functions over Slurm's limits and a request. A request that no partition could ever run is an error: Slurm often
accepts it all the same (EnforcePartLimits=NO) and leaves it pending for good.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from launch.checks import nodes as resources
from launch.checks import preemption
from launch.checks.facts import Request
from launch.checks.findings import PENDS, Finding, Level, doubt, fail, fine, has_errors, warn
from launch.config import Config
from launch.runs.ranges import closest
from launch.scheduler.limits import NOTHING, Limits, NodeLimits, Partition


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
    """The partitions that were asked for by name; Slurm takes any of several."""
    return [name.strip() for name in (config.cluster.partition or "").split(",") if name.strip()]


def partitions_of(limits: Limits, config: Config) -> list[Partition]:
    """The partitions the job could go to: those named, or the default."""
    names = asked_names(config)
    return [p for p in limits.partitions if (p.name in names if names else p.is_default)]


def check_partition_names(limits: Limits, request: Request) -> Iterator[Finding]:
    """Tell whether the partitions exist."""
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
        *resources.check_asked(limits, partition, request, eligible(limits, partition, request)),
    ]
    hidden = partition.total_nodes - len(limits.nodes_of(partition))
    if hidden > 0:
        of_nodes = [doubt(finding, f"{hidden} nodes that Slurm does not show have it") for finding in of_nodes]
    complaints = [
        *check_state(limits, partition),
        *check_access(limits, partition, request, groups),
        *check_time(limits, partition, request),
        *of_nodes,
        *resources.check_defaults(limits, partition, request),
    ]
    if not has_errors(complaints):
        room = f"{request.config.nodes_asked} of {len(eligible(limits, partition, request))} nodes"
        yield fine("partition", f"{partition.name}: {room} for {request.config.cluster.timeout_min} min")
    yield from complaints
    yield from preemption.check(limits, partition, request)


def check_state(limits: Limits, partition: Partition) -> Iterator[Finding]:
    """Tell whether the partition takes and starts jobs."""
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
    """The nodes of a partition that are not excluded and have the features asked for, usable or not."""
    nodes = limits.nodes_of(partition)
    return [node for node in nodes if node.name not in request.excluded and has_features(node, request.config)]


def has_features(node: NodeLimits, config: Config) -> bool:
    """Tell whether a node has the features that are asked for."""
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
    """Tell whether sacct knows anything. Nothing of ours needs it."""
    kind = limits.config.get("AccountingStorageType", "")
    if kind.endswith("/none") or not kind:
        yield fine(
            "accounting", "none here, so no sacct: states are read from squeue and the run folder, and that is enough"
        )
    else:
        yield fine("accounting", kind)
