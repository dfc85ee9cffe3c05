"""Limits of a Slurm cluster as scontrol reports them, and the reasons for which a job is pending."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from launch.slurm import client as scheduler
from launch.slurm.client import parse_fields

# Limits of a Slurm cluster, as scontrol tells them: configuration, partitions, nodes; and the flags of its QOSes.


NOTHING = ("", "(null)", "N/A", "NONE", "none")
TIMEOUT_S = 10.0
"""Time for one answer, seconds."""
UNITS = " KMGTP"
GRES_COUNT = re.compile(r"\d+[KMGTP]?", re.IGNORECASE)
UNLIMITED = ("UNLIMITED", "INFINITE", "4294967295")
UNUSABLE = {
    "DOWN",
    "DRAIN",
    "DRAINED",
    "DRAINING",
    "FAIL",
    "FAILING",
    "ERROR",
    "MAINT",
    "INVAL",
    "NOT_RESPONDING",
    "FUTURE",
}


@dataclass(frozen=True)
class Gres:
    """Generic resources of one kind on a node; ``type`` is empty where the site gives none."""

    name: str
    type: str
    count: int


@dataclass(frozen=True)
class Partition:
    """One partition. A limit that is None is none; memory in MB as Slurm counts it (MiB)."""

    name: str
    is_default: bool
    state: str
    max_time_min: float | None
    min_nodes: int
    max_nodes: int | None
    grace_s: int
    preempt_mode: str
    priority_tier: int
    allow_accounts: tuple[str, ...] | None
    deny_accounts: tuple[str, ...] | None
    allow_qos: tuple[str, ...] | None
    deny_qos: tuple[str, ...] | None
    allow_groups: tuple[str, ...] | None
    max_cpus_per_node: int | None
    max_memory_mb: int | None
    memory_per_cpu_mb: int | None
    """Memory of a job for each CPU where it asks for none."""
    memory_per_node_mb: int | None
    is_exclusive: bool
    """True where jobs get whole nodes without asking."""
    total_nodes: int = 0
    """Nodes that belong to it, with those that Slurm does not show (PrivateData without ``cloud``)."""
    qos: str | None = None
    """QOS of the partition itself, whose limits and flags hold for every job in it."""


@dataclass(frozen=True)
class NodeLimits:
    """One node: what it has, and whether it takes jobs."""

    name: str
    partitions: tuple[str, ...]
    states: frozenset[str]
    reason: str
    cpus: int
    memory_mb: int
    gres: tuple[Gres, ...]
    features: frozenset[str]

    @property
    def is_usable(self) -> bool:
        """Return whether jobs can start here, now or when it is free."""
        return not self.states & UNUSABLE

    def count(self, name: str, kind: str = "") -> int:
        """Count the generic resources of this name, and of this type where it is given."""
        return sum(g.count for g in self.gres if g.name == name and kind in ("", g.type))


@dataclass(frozen=True)
class Limits:
    """A whole cluster."""

    version: tuple[int, ...]
    config: dict[str, str]
    """Lines of the configuration that have a value."""
    partitions: tuple[Partition, ...]
    nodes: tuple[NodeLimits, ...]
    qos_flags: Mapping[str, frozenset[str]] | None = field(default_factory=dict)
    """Flags of each QOS by its name; None where slurmdbd, which knows them, does not answer."""

    def number(self, key: str) -> int | None:
        """A number of slurm.conf, without its unit; None if it is unlimited or not said."""
        return count(self.config.get(key, "").split(" ")[0])

    def nodes_of(self, partition: Partition) -> list[NodeLimits]:
        """The nodes of a partition."""
        return [node for node in self.nodes if partition.name in node.partitions]

    @property
    def has_accounting(self) -> bool:
        """Return whether there is a slurmdbd, and with it accounts, associations and QOSes."""
        return self.config.get("AccountingStorageType", "").endswith("/slurmdbd")

    def may_be_lifted(self, flag: str, partition: Partition, qos: str | None) -> bool:
        """Return whether a QOS with this flag may lift a limit of the partition for a job; by its default where ``qos``
        is None. With EnforcePartLimits no QOS does (slurm.conf)."""
        if not self.has_accounting or self.config.get("EnforcePartLimits", "NO") not in ("NO", "0"):
            return False
        if self.qos_flags is None:
            return True
        names = [qos, partition.qos or ""] if qos else list(self.qos_flags)
        return any(flag in self.qos_flags.get(name, ()) for name in names)


class NoControllerError(scheduler.SlurmError):
    """No controller answers: nothing can be submitted."""


def read(cluster: str | None = None) -> Limits:
    """Ask the controller, or that of another cluster; SlurmError where it does not answer, or no such one is known.

    Each question is asked once, and for TIMEOUT_S: a submission waits for the answers, and can do without.
    """
    at = scheduler.cluster_option(cluster)

    def ask(*words: str) -> str:
        return scheduler.run("scontrol", *at, *words, timeout_s=TIMEOUT_S, retries=1)

    try:
        ask("ping")  # fails at once where nobody listens
    except scheduler.SlurmError as error:
        raise NoControllerError(str(error)) from error
    config = ask("show", "config")
    partitions = ask("show", "partition", "--all", "--oneliner")
    found = parse(config, partitions, ask("show", "node", "--all", "--oneliner"))
    return replace(found, qos_flags=read_qos_flags()) if found.has_accounting else found


def read_qos_flags() -> dict[str, frozenset[str]] | None:
    """Ask slurmdbd for the flags of every QOS; None if it does not answer."""
    words = ("--noheader", "--parsable2", "show", "qos", "format=Name,Flags")
    try:
        text = scheduler.run("sacctmgr", *words, timeout_s=TIMEOUT_S, retries=1)
    except scheduler.SlurmError:
        return None
    rows = [line.split("|") for line in text.splitlines() if line.count("|") == 1]
    return {name: frozenset(flags.split(",")) for name, flags in rows}


def parse(config_text: str, partition_text: str, node_text: str) -> Limits:
    """The three answers of scontrol as values."""
    said = re.findall(r"^(\S+)\s+=[ ]?(.*?)\s*$", config_text, re.MULTILINE)
    # A plugin that a site does without is (null) in 24.11, and one named none in 22.05.
    config = {key: value for key, value in said if value != "(null)"}
    version = tuple(int(item) for item in re.findall(r"\d+", config.get("SLURM_VERSION", ""))[:2])
    partitions = tuple(partition(record) for record in records(partition_text, "PartitionName"))
    return Limits(version, config, partitions, tuple(node(record) for record in records(node_text, "NodeName")))


def records(text: str, key: str) -> Iterator[dict[str, str]]:
    """Yield the fields of each line that starts with ``key``."""
    for line in text.splitlines():
        if line.startswith(f"{key}="):
            yield parse_fields(line)


def partition(fields: dict[str, str]) -> Partition:
    """A line of ``scontrol show partition --oneliner``."""
    return Partition(
        name=fields["PartitionName"],
        is_default=fields.get("Default") == "YES",
        state=fields.get("State", "UP"),
        max_time_min=minutes(fields.get("MaxTime", "")),
        min_nodes=count(fields.get("MinNodes", "")) or 0,
        max_nodes=count(fields.get("MaxNodes", "")),
        grace_s=count(fields.get("GraceTime", "")) or 0,
        preempt_mode=fields.get("PreemptMode", "OFF"),
        priority_tier=count(fields.get("PriorityTier", "")) or 0,
        allow_accounts=names(fields.get("AllowAccounts", "")),
        deny_accounts=names(fields.get("DenyAccounts", "")),
        allow_qos=names(fields.get("AllowQos", "")),
        deny_qos=names(fields.get("DenyQos", "")),
        allow_groups=names(fields.get("AllowGroups", "")),
        max_cpus_per_node=count(fields.get("MaxCPUsPerNode", "")),
        max_memory_mb=count(fields.get("MaxMemPerNode", "")),
        memory_per_cpu_mb=count(fields.get("DefMemPerCPU", "")),
        memory_per_node_mb=count(fields.get("DefMemPerNode", "")),
        is_exclusive=fields.get("OverSubscribe", "").startswith("EXCLUSIVE"),
        total_nodes=count(fields.get("TotalNodes", "")) or 0,
        qos=None if fields.get("QoS", "N/A") in NOTHING else fields["QoS"],
    )


def node(fields: dict[str, str]) -> NodeLimits:
    """A line of ``scontrol show node --oneliner``."""
    features = fields.get("AvailableFeatures", "")
    return NodeLimits(
        name=fields["NodeName"],
        partitions=names(fields.get("Partitions", "")) or (),
        # A * says that the node does not answer; other marks (powered off, rebooting) are no hindrance.
        states=frozenset(
            item.strip("~#!%$@^-") for item in fields.get("State", "").replace("*", "+NOT_RESPONDING").split("+")
        ),
        reason=fields.get("Reason", ""),
        cpus=count(fields.get("CPUEfctv", "")) or count(fields.get("CPUTot", "")) or 0,
        memory_mb=count(fields.get("RealMemory", "")) or 0,
        gres=gres(fields.get("Gres", "")),
        features=frozenset() if features in NOTHING else frozenset(features.split(",")),
    )


def gres(text: str) -> tuple[Gres, ...]:
    """``gpu:a100:4(S:0-1),gpu:v100:2`` or ``gpu:2``, of a node or of a request (where a missing count means 1)."""
    if text in NOTHING:
        return ()
    found = []
    for item in re.sub(r"\([^)]*\)", "", text).removeprefix("gres/").split(","):
        name, *rest = [part for part in item.strip().split(":") if part != "no_consume"]
        number = rest.pop() if rest and GRES_COUNT.fullmatch(rest[-1]) else "1"
        unit = UNITS.index(number[-1].upper()) if not number[-1].isdigit() else 0
        found.append(Gres(name, rest[0] if rest else "", int(number[:-1] if unit else number) * 1024**unit))
    return tuple(found)


def count(text: str) -> int | None:
    """A whole number; None for UNLIMITED and for what is no number."""
    return int(text) if text.isdigit() and text not in UNLIMITED else None


def names(text: str) -> tuple[str, ...] | None:
    """A list of names; None for ALL and for nothing."""
    return None if text in (*NOTHING, "ALL") else tuple(text.split(","))


def minutes(text: str) -> float | None:
    """``[days-]hours:minutes:seconds`` in minutes; None if it is unlimited."""
    if text in NOTHING or text in UNLIMITED:
        return None
    days, _, clock = text.rpartition("-")
    hours, mins, seconds = (int(item) for item in clock.split(":"))
    return (int(days or 0) * 24 + hours) * 60 + mins + seconds / 60


def how_preempted(limits: Limits, partition: Partition) -> str:
    """Preempt mode of this partition, as Slurm names it; OFF where nothing can preempt it."""
    kind, mode = limits.config.get("PreemptType", "preempt/none"), partition.preempt_mode.upper()
    if kind.endswith("/none") or mode == "OFF":
        return "OFF"
    if kind.endswith("partition_prio"):
        own = {node.name for node in limits.nodes_of(partition)}
        above = [p for p in limits.partitions if p.priority_tier > partition.priority_tier]
        if not any(own & {node.name for node in limits.nodes_of(p)} for p in above):
            return "OFF"
    return mode


# Reasons for which a job is pending, as squeue tells them: those that no waiting removes, and what to type then.


OWN_WISH = ("JobHeldUser", "Dependency", "BeginTime", "JobArrayTaskLimit")
"""Reasons that are the user's own wish: another place would only get around them."""

LESS = "python -m launch.cancel {run}; python -m launch.doctor, with the same arguments, says what fits"
ASK = "sinfo -R names nodes with their reasons; ask the site, or python -m launch.cancel {run} and ask for other nodes"
RELEASE = "scontrol {cluster}release {job}"


@dataclass(frozen=True)
class LastingReason:
    """A reason that stays until somebody does something."""

    pattern: str
    """Regular expression for the beginning of what squeue prints."""
    meaning: str
    fix: str
    """Words to type; ``{job}``, ``{cluster}`` (the option that names another cluster) and ``{run}`` are filled in."""


LASTING = (
    LastingReason("PartitionNodeLimit", "its partition takes fewer or more nodes, or those it needs are down", LESS),
    LastingReason("PartitionTimeLimit", "its time limit is above that of its partition", LESS),
    LastingReason("PartitionConfig", "it exceeds a limit of its partition, or what the nodes there have", LESS),
    LastingReason("BadConstraints", "no nodes have what it asks for, so Slurm holds it", LESS),
    LastingReason("MaxMemPerLimit", "it asks for more memory of each CPU or node than is allowed", LESS),
    LastingReason(r"(Assoc|QOS)Max\w*(PerJob|PerNode)", "it exceeds what its account or QOS lets a job ask for", LESS),
    LastingReason(r"QOSMin\w+", "it asks for less than a job of its QOS has to", LESS),
    LastingReason("AccountNotAllowed|QOSNotAllowed", "its partition does not take its account or QOS", LESS),
    LastingReason(r"(Job's|User's) .*use this partition", "its partition does not take its account or QOS", LESS),
    LastingReason("InvalidAccount|InvalidQOS", "its account or QOS does not exist, or is not yours", LESS),
    LastingReason("ReservationDeleted", "the reservation it asks for is gone", LESS),
    LastingReason("DeadLine", "it cannot end before the deadline it was given", LESS),
    LastingReason("DependencyNeverSatisfied", "the job it depends on has ended in another way", LESS),
    LastingReason("JobHeldUser", "you, or a coordinator of your account, hold it", RELEASE),
    LastingReason("JobHoldMaxRequeue", "it was requeued as often as the site allows, and is held", RELEASE),
    LastingReason("launch failed requeued held", "it could not be launched on its nodes, and is held", RELEASE),
    LastingReason("job requeued in held state", "it was requeued with a hold", RELEASE),
    LastingReason("JobHeldAdmin", "an administrator holds it, or its priority is 0", "ask the site to release {job}"),
    LastingReason("PartitionDown|PartitionInactive", "its partition is switched off", ASK),
    LastingReason("NodeDown|ReqNodeNotAvail, *UnavailableNodes", "nodes it needs are down, drained or silent", ASK),
    LastingReason(
        "Nodes required for job are DOWN",
        "too few nodes are left: others are down, drained, or kept for a partition that goes first",
        ASK,
    ),
)


def lasting_reason(reason: str) -> LastingReason | None:
    """The entry for a reason that no waiting removes; None for one that goes away by itself."""
    said = reason.replace("_", " ")
    return next((entry for entry in LASTING if re.match(entry.pattern, said)), None)


def advice(reason: str, job: str, run: str, cluster: str | None = None) -> str:
    """Say what a pending job waits for and what to type, where waiting is not enough; otherwise empty.

    Args:
        reason: as squeue prints it.
        job: the id of the job.
        run: what ``launch.cancel`` takes.
        cluster: name of the cluster that it waits on, where that is another one.
    """
    entry = lasting_reason(reason)
    if entry is None:
        return ""
    option = f"--clusters={cluster} " if cluster else ""
    fix = entry.fix.format(job=job, run=run, cluster=option)
    return f"waiting does not change {reason.split(',')[0]}: {entry.meaning}; type {fix}"
