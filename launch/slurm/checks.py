"""Checks of the requests of a command against Slurm's limits: partition, nodes, time, CPUs, GPUs, memory.

Each check yields findings: the fact, its consequence, and the remedy to type. ``check_before_submitting`` refuses a
point that Slurm would never start. If the point has several candidates (places where its job may run), those that
cannot run the point are skipped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property, partial

from rich.console import Console

from launch.config import CHAIN, ClusterConfig, Config
from launch.errors import ConfigError, Problem, closest, counted
from launch.plan import placement
from launch.plan.placement import Placement
from launch.plan.plan import Plan
from launch.slurm import client as scheduler
from launch.slurm.jobs import sbatch_text
from launch.slurm.limits import NOTHING, Gres, Limits, NodeLimits, Partition, SlurmFacts, gres, how_preempted
from launch.slurm.submit import shapes


class Level(Enum):
    """Severity of a finding: an ``error`` breaks the run, a ``warning`` may cost time or work, ``ok`` is no problem."""

    ok = "ok"
    warning = "warning"
    error = "error"


@dataclass(frozen=True)
class Finding(Problem):
    """Result of one check: a fact (``found``), its consequence (``expected``), and what to type next (``fix``).

    ``expected`` and ``fix`` are empty if the check found no problem.

    Attributes:
        level: severity.
        check: short name of the check.
        unless: condition under which the error does not occur. The check does not know whether the condition holds.
            Empty if the error is certain.
    """

    level: Level
    check: str
    unless: str = ""

    def __post_init__(self) -> None:
        assert self.level is Level.ok or (self.why and self.fix), "a complaint says why, and what to type"

    @property
    def why(self) -> str:
        """Consequence of the finding; empty if the check found no problem."""
        return self.expected


def fine(check: str, found: str) -> Finding:
    """Return a finding of level ``ok``: the fact ``found`` of the check named ``check``."""
    return Finding(found, "", "", Level.ok, check)


def warn(check: str, found: str, why: str, fix: str) -> Finding:
    """Return a finding of level ``warning``: a state that may cost time or work.

    Args:
        check: name of the check.
        found: the state.
        why: its consequence.
        fix: what to type.
    """
    return Finding(found, why, fix, Level.warning, check)


def fail(check: str, found: str, why: str, fix: str) -> Finding:
    """Return a finding of level ``error``: a state that breaks the run. The arguments are those of ``warn``."""
    return Finding(found, why, fix, Level.error, check)


def doubt(finding: Finding, unless: str) -> Finding:
    """Return ``finding`` as an uncertain error, which does not occur if the condition ``unless`` holds.

    A finding that is no error, or is already uncertain, is returned unchanged.
    """
    return replace(finding, unless=unless) if finding.level is Level.error and not finding.unless else finding


def has_errors(findings: Iterable[Finding]) -> bool:
    """Return whether any finding is an error."""
    return any(finding.level is Level.error for finding in findings)


PENDS = "Slurm would leave the job pending for good, or refuse it"
"""Consequence of a request that Slurm cannot meet. With EnforcePartLimits=NO, sbatch still accepts the request."""
REFUSES = "sbatch refuses the job"
MB_IN_GB = 1024
"""Number of Slurm's MB (MiB) in one GB of cluster.mem_gb (GiB)."""
NO_LIMIT = 2**62
OPTIONS = {
    "partition", "time", "time_min", "nodes", "nodelist", "cpus_per_task", "cpus_per_gpu", "mem", "mem_per_cpu",
    "mem_per_gpu", "gpus", "gpus_per_node", "gpus_per_task", "gres", "constraint", "account", "qos", "exclude", "array",
    "overcommit", "use_min_nodes", "reservation",
}  # fmt: skip
"""Options of sbatch in cluster.additional_parameters that change the values which the checks compare."""


@dataclass(frozen=True)
class Request:
    """Request to Slurm for points with equal resources: one job, or one array of ``len(points)`` elements.

    Attributes:
        config: config of the first point.
        plan: plan of the first point.
        points: titles of all points, for messages.
        batch_text: batch script of the job or array.
    """

    config: Config
    plan: Plan
    points: tuple[str, ...]
    batch_text: str
    excluded: frozenset[str] = frozenset()
    """Names of the nodes that cluster.exclude lists."""


def excluded(config: Config, facts: SlurmFacts) -> frozenset[str]:
    """Return the names of the nodes that cluster.exclude lists, such as ``n[1-3],n7``; empty if no controller answers.

    Raises SlurmError if Slurm fails.
    """
    known = config.cluster.exclude and facts.limits is not None
    return frozenset(scheduler.host_names(config.cluster.exclude or "") if known else ())


@dataclass(frozen=True)
class Case:
    """One request at one partition: the argument of the functions that check a single partition."""

    limits: Limits
    partition: Partition
    request: Request

    @property
    def config(self) -> Config:
        """Config of the request."""
        return self.request.config

    @cached_property
    def nodes(self) -> list[NodeLimits]:
        """Nodes of the partition that are not excluded and have the requested features. Some may be down."""
        nodes = self.limits.nodes_of(self.partition)
        return [n for n in nodes if n.name not in self.request.excluded and features(self.config) <= n.features]

    def exceeds(self, check: str, found: str, fix: str) -> Finding:
        """Return the error that the request exceeds a limit of the partition. The arguments are those of ``fail``.

        A QOS of the job or of the partition may lift the limit. Therefore the error is uncertain if there is such a
        QOS, and if Slurm does not enforce the limits at submission (EnforcePartLimits). In all other cases the error is
        certain.
        """
        qos = self.config.cluster.qos or self.partition.qos
        is_strict = self.limits.config.get("EnforcePartLimits", "NO") not in ("NO", "0")
        return Finding(found, PENDS, fix, Level.error, check, f"QOS {qos} lifts it" if qos and not is_strict else "")


# Facts about a config and a partition that several checks use.


def typed_options(cluster: ClusterConfig) -> set[str]:
    """Return the names of the sbatch options in cluster.additional_parameters, with underscores."""
    return {str(key).replace("-", "_") for key in cluster.additional_parameters}


def partitions_of(limits: Limits, config: Config) -> list[Partition]:
    """Return the partitions that the job could use: those that the config names, else the default partition."""
    names = partition_names(config)
    return [p for p in limits.partitions if (p.name in names if names else p.is_default)]


def partition_names(config: Config) -> list[str]:
    """Return the names in cluster.partition. Slurm chooses one of them."""
    return [name.strip() for name in (config.cluster.partition or "").split(",") if name.strip()]


def features(config: Config) -> frozenset[str]:
    """Return the features that cluster.constraint requests. Every node of the job must have all of them.

    Empty if cluster.constraint is not set, or has another form than plain names joined by &.
    """
    text = config.cluster.constraint or ""
    return frozenset(text.split("&")) if re.fullmatch(r"[\w.-]+(&[\w.-]+)*", text) else frozenset()


def why_unsure(limits: Limits, config: Config) -> str:
    """Return why a job may request other resources, or run on other nodes, than its config shows; "" if it does not.

    The cause is an option in cluster.additional_parameters, or a plugin of the site. The text is a condition for
    ``doubt``.
    """
    others = sorted(typed_options(config.cluster) & OPTIONS)
    if others:
        return f"cluster.additional_parameters ({', '.join(others)}) makes it fit"
    plugins = [limits.config.get(key, "") for key in ("JobSubmitPlugins", "CliFilterPlugins")]
    if not partition_names(config) and any(plugin not in NOTHING for plugin in plugins):
        return "the site's submit plugin sends jobs that name no partition elsewhere"
    return ""


def gives_whole_nodes(partition: Partition, cluster: ClusterConfig) -> bool:
    """Return whether a job gets whole nodes in a partition: all CPUs of the nodes, and no other jobs on them.

    Either the partition always gives whole nodes, or ``cluster`` requests exclusive nodes.
    """
    return bool(partition.is_exclusive or cluster.exclusive or "exclusive" in typed_options(cluster))


def request_fewer_nodes(config: Config, most: int) -> str:
    """Return the overrides with which the config requests at most ``most`` nodes, spare nodes included.

    If fewer spare nodes are enough, only ``spare_nodes`` is reduced. Otherwise ``nodes`` is reduced. If ``most`` is not
    above ``spare_nodes``, ``spare_nodes`` also becomes 0.
    """
    if config.spare_nodes and config.nodes <= most:
        return f"spare_nodes={most - config.nodes}"
    return f"nodes={max(1, most - config.spare_nodes)}" if most > config.spare_nodes else f"nodes={most} spare_nodes=0"


def gres_text(part: Gres) -> str:
    """Return a generic resource as sbatch accepts it, such as ``gpu:a100:4``."""
    return ":".join(text for text in (part.name, part.type, str(part.count)) if text)


def kinds_text(nodes: Sequence[NodeLimits]) -> str:
    """Return the generic resources of nodes as one text, each kind once."""
    return ", ".join(sorted({gres_text(part) for node in nodes for part in node.gres})) or "no generic resources"


# The checks of one request at one partition.


def check_partition_state(case: Case) -> Iterator[Finding]:
    """Check that the partition accepts and starts jobs."""
    name, state = case.partition.name, case.partition.state
    fixes = [f"cluster.partition={other.name}" for other in case.limits.partitions if other.state == "UP"]
    fix, found = [*fixes, f"scontrol show partition {name}"][0], f"partition {name} is {state}"
    if state == "DOWN":
        why = "jobs wait there until an administrator brings it up"
        yield doubt(fail("partition", found, why, fix), "an administrator does")
    elif state != "UP":
        yield fail("partition", found, REFUSES, fix)


def check_access(case: Case) -> Iterator[Finding]:
    """Check that the partition accepts the account and the QOS.

    Unix groups are not checked: sbatch itself refuses a user who is in none of the partition's groups.
    """
    limits, partition, cluster = case.limits, case.partition, case.config.cluster
    for key, value, allowed in (
        ("account", cluster.account, partition.allow_accounts),
        ("qos", cluster.qos, partition.allow_qos),
    ):
        if allowed is None or value in allowed:
            continue
        said = f"cluster.{key} is not set" if value is None else f"cluster.{key}={value}"
        found = f"partition {partition.name} takes {key} {', '.join(allowed)} only, and {said}"
        fix = f"cluster.{key}={(closest(value or '', allowed) or allowed)[0]}"
        # Without accounting, Slurm knows no default, and 22.05.8 says "Job's account not known" permanently.
        if value is None and (key != "account" or limits.has_accounting):
            yield warn(key, found, f"your default {key} must be among them", fix)
            continue
        # Since Slurm 23.02, the list of a partition also covers subaccounts (slurm.conf, AllowAccounts).
        may_be_subaccount = key == "account" and limits.has_accounting
        wrong = fail(key, found, PENDS, fix)
        yield doubt(wrong, "it is a subaccount of one of them") if may_be_subaccount else wrong


def check_time(case: Case) -> Iterator[Finding]:
    """Check the time limit of the job against that of the partition."""
    asked, most = case.config.cluster.timeout_min, case.partition.max_time_min
    if most is not None and asked > most:
        found = f"cluster.timeout_min={asked}, and MaxTime of {case.partition.name} is {most:g} min"
        yield case.exceeds("time limit", found, f"cluster.timeout_min={int(most)}")


def check_node_count(case: Case) -> Iterator[Finding]:
    """Check the number of nodes: limits of the partition, nodes that exist, and nodes that work."""
    config, partition, there = case.config, case.partition, case.limits.nodes_of(case.partition)
    spares = f" and spare_nodes={config.spare_nodes}" if config.spare_nodes else ""
    asked, head = config.nodes_asked, f"nodes={config.nodes}{spares}"
    known = sorted(frozenset().union(*(node.features for node in there)))
    for feature in (missing := sorted(features(config) - {*known})):
        found = f"cluster.constraint={config.cluster.constraint}, and no node of {partition.name} has {feature}"
        likely = (closest(feature, known) or known or ["null"])[0]
        yield fail("constraint", found, PENDS, f"cluster.constraint={likely}")
    if missing:
        return
    exist = len(case.nodes)
    most = exist if partition.max_nodes is None else min(exist, partition.max_nodes)
    if asked > most:
        limit = f"MaxNodes is {most}" if most < exist else f"it has {most} that fit cluster.exclude and constraint"
        found, fix = f"{head} in partition {partition.name}: {limit}", request_fewer_nodes(config, most)
        yield case.exceeds("nodes", found, fix) if asked <= exist else fail("nodes", found, PENDS, fix)
        return
    if asked < partition.min_nodes:
        found = f"{head}, and MinNodes of {partition.name} is {partition.min_nodes}"
        yield case.exceeds("nodes", found, f"nodes={partition.min_nodes - config.spare_nodes}")
    broken = [node for node in case.nodes if not node.is_usable]
    working = exist - len(broken)
    if asked > working:
        shown = ", ".join(f"{node.name} {'+'.join(sorted(node.states))} {node.reason}".strip() for node in broken[:4])
        found = f"{head}, and {working} of {exist} in {partition.name} work: {shown}"
        yield warn("nodes", found, "the job waits until they are back", request_fewer_nodes(config, max(1, working)))


def wants(case: Case) -> Iterator[tuple[str, str, float, str, Callable[[NodeLimits], float]]]:
    """Yield the resources that a job requests on each node.

    Each is a tuple: key of the config, prefix, requested amount, unit of the amount, function. The prefix is the part
    of the key's value before the amount: ``gpu:a100:`` for ``cluster.gres=gpu:a100:4``. It is empty for other keys. The
    function returns the amount that a given node can give to a job.
    """
    cluster, partition = case.config.cluster, case.partition
    if cluster.gpus_per_node:
        yield "cluster.gpus_per_node", "", cluster.gpus_per_node, "GPUs", lambda node: node.count("gpu")
    for part in gres(cluster.gres or ""):
        kind = gres_text(part).removesuffix(str(part.count))
        have = partial(NodeLimits.count, name=part.name, kind=part.type)
        yield "cluster.gres", kind, part.count, f"of {part.name}", have
    if cluster.cpus_per_task:
        most = partition.max_cpus_per_node or NO_LIMIT
        yield "cluster.cpus_per_task", "", cluster.cpus_per_task, "CPUs", lambda node: min(node.cpus, most)
    if cluster.mem_gb:
        room = partition.max_memory_mb or case.limits.number("MaxMemPerNode") or NO_LIMIT
        yield "cluster.mem_gb", "", cluster.mem_gb, "GiB", lambda node: min(node.memory_mb, room) / MB_IN_GB


def check_resources(case: Case) -> Iterator[Finding]:
    """Check that enough nodes of the partition have the requested GPUs, generic resources, CPUs and memory."""
    config, name, enough = case.config, case.partition.name, case.nodes
    if len(enough) < config.nodes_asked:
        return  # check_node_count reports this.
    points = len(case.request.plan.job_points) or 1
    for key, kind, amount, unit, have in wants(case):
        most = max(have(node) for node in case.nodes) // points
        if amount <= most:
            enough = [node for node in enough if have(node) >= points * amount]
            continue
        there = f" (nodes have {kinds_text(case.nodes)})" if most == 0 else ""
        there += f" for each of {points} points" if points > 1 else ""
        found = f"{key}={kind}{amount:.12g}, and the best node of {name} has {most:.4g} {unit}{there}"
        yield fail("resources", found, PENDS, f"{key}={f'{kind}{int(most)}' if most else 'null'}")
    if len(enough) < config.nodes_asked:
        found = f"nodes={config.nodes}, and {len(enough)} of {name} have all that each node must have"
        yield fail("resources", found, PENDS, f"nodes={max(1, len(enough) - config.spare_nodes)}")


def check_defaults(case: Case) -> Iterator[Finding]:
    """Warn if a job requests fewer CPUs on a node than ranks, and if it requests no memory.

    A job without a request gets the site's default memory, and is killed if it uses more. There is no warning for jobs
    that get whole nodes.
    """
    limits, partition, cluster = case.limits, case.partition, case.config.cluster
    ranks = case.config.ranks_on_node
    if gives_whole_nodes(partition, cluster):
        return
    if cluster.cpus_per_task is not None and cluster.cpus_per_task < ranks:
        found = f"cluster.cpus_per_task={cluster.cpus_per_task} for {counted(ranks, 'rank')} on a node"
        yield warn("cpus", found, "the ranks of a node share these CPUs", f"cluster.cpus_per_task={4 * ranks}")
    per_cpu = partition.memory_per_cpu_mb or limits.number("DefMemPerCPU") or 0
    per_node = partition.memory_per_node_mb or limits.number("DefMemPerNode")
    share = per_node or per_cpu * (cluster.cpus_per_task or 1)
    if share and cluster.mem_gb is None and not typed_options(cluster) & {"mem", "mem_per_cpu", "mem_per_gpu"}:
        found = f"cluster.mem_gb is not set: each node gives {share / MB_IN_GB:.4g} GiB"
        why = "a job that requests no memory gets the site's default, and is killed when it uses more"
        yield warn("memory", found, why, f"cluster.mem_gb={16 * ranks}")


def check_preemption(case: Case) -> Iterator[Finding]:
    """Warn of a partition whose preempted jobs do not return to the queue."""
    name, mode = case.partition.name, how_preempted(case.limits, case.partition)
    found = f"PreemptMode of {name} is {mode}"
    if "SUSPEND" in mode:
        why = "a preempted run is suspended, and its collectives time out; the same command resumes it"
        fix = case.request.plan.promised.saves_more_often or "more frequent checkpoints"
        yield warn("preemption", found, why, fix)
    elif mode not in ("OFF", "REQUEUE") and case.config.resilience.requeue != CHAIN:
        why = "a preempted run is ended and not requeued; the same command resumes from its last checkpoint"
        yield warn("preemption", found, why, f"resilience.requeue={CHAIN}, which continues in a next job")


def check_partition(case: Case) -> Iterator[Finding]:
    """Yield the findings of all checks at one partition; if there is no error, also a finding of level ``ok``."""
    complaints = [*check_node_count(case), *check_resources(case)]
    hidden = case.partition.total_nodes - len(case.limits.nodes_of(case.partition))
    if hidden > 0:
        complaints = [doubt(finding, f"{hidden} nodes that Slurm does not show have it") for finding in complaints]
    complaints += [*check_partition_state(case), *check_access(case), *check_time(case), *check_defaults(case)]
    if not has_errors(complaints):
        room = f"{case.config.nodes_asked} of {len(case.nodes)} nodes for {case.config.cluster.timeout_min} min"
        yield fine("partition", f"{case.partition.name}: {room}")
    yield from complaints
    yield from check_preemption(case)


# The checks of one request on one cluster.


def check_request(limits: Limits, request: Request) -> list[Finding]:
    """Return the findings of all checks of one job or array."""
    cases = [Case(limits, partition, request) for partition in partitions_of(limits, request.config)]
    found = [
        *check_partition_names(limits, request.config),
        *soften_some([[*check_partition(case)] for case in cases]),  # Slurm uses the first partition that fits.
    ]
    why = why_unsure(limits, request.config)
    return [doubt(finding, why) if why else finding for finding in found]


def soften_some(each: Sequence[Sequence[Finding]]) -> Iterator[Finding]:
    """Yield the findings of all alternatives: partitions or candidates. A job needs only one of them.

    If at least one alternative has no error, the errors of the other alternatives become warnings. ``each`` has one
    sequence of findings for each alternative.
    """
    some_fit = any(not has_errors(findings) for findings in each)
    for finding in (finding for findings in each for finding in findings):
        is_mild = some_fit and finding.level is Level.error
        yield replace(finding, level=Level.warning) if is_mild else finding


def check_partition_names(limits: Limits, config: Config) -> Iterator[Finding]:
    """Check that the named partitions exist; without names, that there is a default partition."""
    there, names = [partition.name for partition in limits.partitions], partition_names(config)
    listed = ", ".join(there) or "none"
    for name in (name for name in names if name not in there):
        likely = (closest(name, there) or there or ["NAME"])[0]
        found = f"cluster.partition={name}, and there are {listed}"
        yield fail("partition", found, REFUSES, f"cluster.partition={likely}")
    if not names and not any(partition.is_default for partition in limits.partitions):
        found = f"no cluster.partition, and none of {listed} is the default"
        yield fail("partition", found, REFUSES, f"cluster.partition={(there or ['NAME'])[0]}")


# The checks of all requests of a command, at every candidate of ``cluster.placement``.


def requests_of(
    plans: Sequence[Plan], configs: dict[str, Config], facts: SlurmFacts
) -> list[tuple[list[Plan], Request]]:
    """Return (plans with equal resources, their request) for each group of plans.

    ``configs`` is run folder -> config.
    """
    found = []
    for group in shapes(plans):
        config, points = configs[group[0].run_dir], tuple(plan.title for plan in group)
        found.append((group, Request(config, group[0], points, sbatch_text(group), excluded(config, facts))))
    return found


def check_candidates(facts: SlurmFacts, request: Request) -> list[tuple[str, list[Finding]]]:
    """Return (name of a candidate, findings of all checks there) for each candidate of a request.

    If no controller answers, only the config of the candidate is checked.
    """
    found = []
    for name, config in placement.configs(request.config):
        try:
            config.validate()
            findings = [] if facts.limits is None else check_request(facts.limits, replace(request, config=config))
        except ConfigError as error:
            findings = [fail("resources", error.found, f"expected: {error.expected}", error.fix)]
        found.append((name, findings))
    return found


def check_requests(facts: SlurmFacts, requests: Sequence[Request]) -> list[Finding]:
    """Return the findings of all checks for all requests at every candidate, each finding once.

    A candidate that cannot run a point is skipped, so its errors become warnings if another candidate can.
    """
    found: list[Finding] = []
    for request in requests:
        each = []
        for name, findings in check_candidates(facts, request):
            at = f"at {name}: " if name else ""
            each.append([f if f.level is Level.ok else replace(f, found=f"{at}{f.found}") for f in findings])
        found += soften_some(each)
    return list(dict.fromkeys(found))


def possible_places(facts: SlurmFacts, request: Request) -> tuple[Placement, list[list[Finding]]]:
    """Return the placement of a request, in which the impossible candidates are ruled out, and each candidate's errors.

    A candidate with an error is impossible. There is one exception: if all candidates have errors, a candidate whose
    errors are all uncertain stays possible, and Slurm decides.
    """
    errors = [[f for f in findings if f.level is Level.error] for _, findings in check_candidates(facts, request)]
    some_fit = any(not found for found in errors)
    places = request.plan.placement
    for index, found in enumerate(errors):
        if found and (some_fit or not all(error.unless for error in found)):
            places = places.rule_out(index, "; ".join(error.found for error in found))
    return places, errors


# Refusals and warnings of a command before it submits.


def refuse_impossible(facts: SlurmFacts, request: Request, places: Placement, errors: Sequence[Finding]) -> None:
    """Raise ConfigError if all candidates of ``places`` are ruled out, so that the job could never start.

    ``errors`` are the errors of the first candidate. Without cluster.placement, this is the only candidate, and the
    message has the remedies of these errors.
    """
    if places.possible:
        return
    points = f"the job for {', '.join(request.points)}"
    if request.config.cluster.placement:
        reasons = "".join(f"\n  {candidate.name}: {candidate.never}" for candidate in places.candidates)
        raise ConfigError(
            f"{points} could run at no candidate of cluster.placement:{reasons}",
            "a candidate whose partition can run it",
            "python -m launch.doctor, with the same arguments: for each candidate it says what to request instead",
        )
    assert facts.limits is not None
    rooms = [room_in(facts.limits, part) for part in partitions_of(facts.limits, request.config)]
    fixes = dict.fromkeys(error.fix for error in errors)
    raise ConfigError(
        f"{points}, which Slurm would never start: {places.candidates[0].never}",
        "; ".join(rooms or (room_in(facts.limits, part) for part in facts.limits.partitions)),
        f"{' '.join(fixes)}; launch.check_limits=false submits without this check",
    )


def room_in(limits: Limits, partition: Partition) -> str:
    """Return a text on the largest job that a partition accepts.

    The text has the number of nodes, the time, and the most CPUs and memory that any node of the partition has.
    """
    nodes = limits.nodes_of(partition)
    if not nodes:
        return f"partition {partition.name} has no nodes"
    most = min(len(nodes), partition.max_nodes or NO_LIMIT)
    time = "without a time limit" if partition.max_time_min is None else f"for {partition.max_time_min:g} min"
    cpus = min(max(node.cpus for node in nodes), partition.max_cpus_per_node or NO_LIMIT)
    memory = min(max(node.memory_mb for node in nodes), partition.max_memory_mb or NO_LIMIT) / MB_IN_GB
    each = f"up to {cpus} CPUs, {memory:.4g} GiB of memory, {kinds_text(nodes)}"
    return f"partition {partition.name}: at most {most} nodes {time}, each of {each}"


def check_before_submitting(
    facts: SlurmFacts, plans: Sequence[Plan], configs: Sequence[Config], console: Console
) -> list[Plan]:
    """Compare the requests of a command with Slurm's limits, and print each candidate that is ruled out.

    If the limits are not known, only a warning is printed.

    Returns:
        The plans. In their placements, the candidates that could never run the point are ruled out.

    Raises:
        ConfigError: a point could start nowhere.
    """
    if facts.limits is None:
        said = f"warning: {facts.slurm_problem}: the requests were not compared with Slurm's limits"
        console.print(said)
        return list(plans)
    by_folder = {plan.run_dir: config for plan, config in zip(plans, configs, strict=True)}
    checked: dict[str, Placement] = {}
    lines: list[str] = []
    requests = requests_of([plan for plan in plans if plan.cluster == "slurm"], by_folder, facts)
    # The largest request first: advice for it also suits the smaller ones.
    for group, request in sorted(requests, key=lambda one: -one[1].config.nodes_asked):
        (places, errors), points = possible_places(facts, request), ", ".join(request.points)
        refuse_impossible(facts, request, places, errors[0])
        checked |= {plan.run_dir: places for plan in group}
        for candidate, found in zip(places.candidates, errors, strict=True):
            if candidate.never:
                lines.append(f"cluster.placement: {candidate.name} is skipped: {candidate.never} (for {points})")
                continue
            at = f"at {candidate.name}: " if candidate.name else ""
            lines += [
                f"warning: {at}{error.found}: {error.why}, unless {error.unless}; or type {error.fix} (for {points})"
                for error in found
            ]
    for line in dict.fromkeys(lines):
        console.print(line)
    return [plan.replace_placement(checked[plan.run_dir]) if plan.run_dir in checked else plan for plan in plans]
