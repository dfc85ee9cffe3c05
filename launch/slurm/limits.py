"""Limits of the Slurm cluster as scontrol reports them, and the reasons for which a job is pending."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any, TypeVar

from launch.errors import Problem
from launch.slurm import client as scheduler
from launch.slurm.client import parse_fields

NOTHING = ("", "(null)", "N/A", "NONE", "none")
TIMEOUT_S = 10.0
"""Longest wait in seconds for the answer to one scontrol command."""
UNITS = " KMGTP"
GRES_COUNT = re.compile(r"\d+[KMGTP]?", re.IGNORECASE)
UNLIMITED = ("UNLIMITED", "INFINITE", "4294967295")
UNUSABLE = {
    *("DOWN", "DRAIN", "DRAINED", "DRAINING", "FAIL", "FAILING", "ERROR", "MAINT", "INVAL", "NOT_RESPONDING", "FUTURE")
}
Record = TypeVar("Record", "Partition", "NodeLimits")

# Values as scontrol prints them.


@dataclass(frozen=True)
class Gres:
    """Generic resources of one kind on a node. ``type`` is empty if the site names none."""

    name: str
    type: str
    count: int


def gres(text: str) -> tuple[Gres, ...]:
    """Return the generic resources in a text such as ``gpu:a100:4(S:0-1),gpu:v100:2`` or ``gpu:2``.

    A missing count means 1.
    """
    if text in NOTHING:
        return ()
    found = []
    for item in re.sub(r"\([^)]*\)", "", text).removeprefix("gres/").split(","):
        name, *rest = [part for part in item.strip().split(":") if part != "no_consume"]
        number = rest.pop() if rest and GRES_COUNT.fullmatch(rest[-1]) else "1"
        unit = UNITS.index(number[-1].upper()) if not number[-1].isdigit() else 0
        found.append(Gres(name, rest[0] if rest else "", int(number[:-1] if unit else number) * 1024**unit))
    return tuple(found)


def whole_number(text: str) -> int | None:
    """Return the whole number in ``text``; None for UNLIMITED and for other words."""
    return int(text) if text.isdigit() and text not in UNLIMITED else None


def names(text: str) -> tuple[str, ...] | None:
    """Return the names in a list separated by commas; None for ALL and for an empty list."""
    return None if text in (*NOTHING, "ALL") else tuple(text.split(","))


def minutes_of(text: str) -> float | None:
    """Return the minutes of ``[days-]hours:minutes:seconds``; None if unlimited."""
    seconds = scheduler.seconds(text)
    return None if seconds is None else seconds / 60


def count_of(text: str) -> int:
    """Return the whole number in ``text``; 0 for UNLIMITED and for other words."""
    return whole_number(text) or 0


def node_states(text: str) -> frozenset[str]:
    """Return the states of a node from Slurm's text, such as ``IDLE+DRAIN``.

    A ``*`` after a state means that the node does not answer, and gives the state ``NOT_RESPONDING``. Other marks
    (powered off, rebooting) are ignored.
    """
    return frozenset(item.strip("~#!%$@^-") for item in text.replace("*", "+NOT_RESPONDING").split("+"))


def from_slurm(key: str, parse: Callable[[str], Any] = str) -> Any:
    """Return a dataclass field that ``read_record`` fills from Slurm's field ``key``. ``parse`` turns its text into a
    value.

    ``key`` may name several fields, separated by spaces. Of these, the first that Slurm prints is parsed.
    """
    return field(metadata={"key": key, "parse": parse})


def read_record(kind: type[Record], line: str) -> Record:
    """Return the partition or node that one line of ``scontrol show ... --oneliner`` describes.

    ``kind`` is the dataclass of the result, whose fields are made by ``from_slurm``.
    """
    said = parse_fields(line)
    declared = {each.name: each.metadata for each in dataclasses.fields(kind)}
    values = {name: [said[key] for key in known["key"].split() if key in said] for name, known in declared.items()}
    return kind(**{name: known["parse"](next(iter(values[name]), "")) for name, known in declared.items()})


# A cluster: its partitions, nodes and configuration.


@dataclass(frozen=True)
class Partition:
    """Limits of one partition. None means no limit; memory is in MB as Slurm counts it (MiB)."""

    name: str = from_slurm("PartitionName")
    is_default: bool = from_slurm("Default", lambda text: text == "YES")
    state: str = from_slurm("State")
    max_time_min: float | None = from_slurm("MaxTime", minutes_of)
    min_nodes: int = from_slurm("MinNodes", count_of)
    max_nodes: int | None = from_slurm("MaxNodes", whole_number)
    grace_s: int = from_slurm("GraceTime", count_of)
    """Seconds between the signal of a preemption and the end of the job."""
    preempt_mode: str = from_slurm("PreemptMode", lambda text: text or "OFF")
    priority_tier: int = from_slurm("PriorityTier", count_of)
    allow_accounts: tuple[str, ...] | None = from_slurm("AllowAccounts", names)
    allow_qos: tuple[str, ...] | None = from_slurm("AllowQos", names)
    max_cpus_per_node: int | None = from_slurm("MaxCPUsPerNode", whole_number)
    max_memory_mb: int | None = from_slurm("MaxMemPerNode", whole_number)
    memory_per_cpu_mb: int | None = from_slurm("DefMemPerCPU", whole_number)
    """Default memory in MB for each CPU of a job."""
    memory_per_node_mb: int | None = from_slurm("DefMemPerNode", whole_number)
    is_exclusive: bool = from_slurm("OverSubscribe", lambda text: text.startswith("EXCLUSIVE"))
    """True if every job gets whole nodes."""
    total_nodes: int = from_slurm("TotalNodes", count_of)
    """Number of the partition's nodes, including nodes that Slurm does not show (PrivateData without ``cloud``)."""
    qos: str | None = from_slurm("QoS", lambda text: None if text in NOTHING else text)
    """QOS of the partition, which may lift limits of the partition for every job in it; None if there is none."""


@dataclass(frozen=True)
class NodeLimits:
    """Resources and state of one node."""

    name: str = from_slurm("NodeName")
    partitions: tuple[str, ...] = from_slurm("Partitions", lambda text: names(text) or ())
    states: frozenset[str] = from_slurm("State", node_states)
    reason: str = from_slurm("Reason")
    cpus: int = from_slurm("CPUEfctv CPUTot", count_of)
    memory_mb: int = from_slurm("RealMemory", count_of)
    gres: tuple[Gres, ...] = from_slurm("Gres", gres)
    features: frozenset[str] = from_slurm("AvailableFeatures", lambda text: frozenset(names(text) or ()))

    @property
    def is_usable(self) -> bool:
        """Return whether jobs can start on this node, now or after its present jobs."""
        return not self.states & UNUSABLE

    def count(self, name: str, kind: str = "") -> int:
        """Return the number of the node's generic resources with this name and this type.

        ``kind`` is the type; if it is empty, resources of all types count.
        """
        return sum(g.count for g in self.gres if g.name == name and kind in ("", g.type))


@dataclass(frozen=True)
class Limits:
    """Limits of a whole cluster: its partitions, nodes and configuration."""

    config: dict[str, str]
    """Configuration as scontrol reports it: name -> value; names without a value are absent."""
    partitions: tuple[Partition, ...]
    nodes: tuple[NodeLimits, ...]

    def number(self, key: str) -> int | None:
        """Return the number of ``key`` in slurm.conf, without its unit; None if the number is unlimited or absent."""
        return whole_number(self.config.get(key, "").split(" ")[0])

    def nodes_of(self, partition: Partition) -> list[NodeLimits]:
        """Return the nodes of a partition."""
        return [node for node in self.nodes if partition.name in node.partitions]

    @property
    def has_accounting(self) -> bool:
        """Return whether the cluster has a slurmdbd, and thus accounts, associations and QOSes."""
        return self.config.get("AccountingStorageType", "").endswith("/slurmdbd")


class NoControllerError(scheduler.SlurmError):
    """Raised if no controller answers, so that no job can be submitted."""


def read_limits() -> Limits:
    """Return the limits of the cluster.

    Each scontrol command is tried once, for TIMEOUT_S seconds at most, because a submission waits for the answers.

    Raises:
        NoControllerError: no controller answers, so nothing can be submitted.
        SlurmError: a later command fails. A submission then continues without the limits.
    """

    def ask(*words: str) -> str:
        return scheduler.run("scontrol", *words, timeout_s=TIMEOUT_S, retries=1)

    try:
        ask("ping")  # Fails at once if no process listens.
    except scheduler.SlurmError as error:
        raise NoControllerError(str(error)) from error
    partitions, nodes = (ask("show", kind, "--all", "--oneliner") for kind in ("partition", "node"))
    return parse_limits(ask("show", "config"), partitions, nodes)


def parse_limits(config_text: str, partition_text: str, node_text: str) -> Limits:
    """Return the limits of a cluster from the outputs of ``scontrol show`` for config, partitions and nodes.

    The outputs about partitions and nodes have one line for each (option ``--oneliner``).
    """
    said = re.findall(r"^(\S+)\s+=[ ]?(.*?)\s*$", config_text, re.MULTILINE)
    # A plugin that a site does not use is (null) in 24.11, and none in 22.05.
    config = {key: value for key, value in said if value != "(null)"}
    partitions = [read_record(Partition, s) for s in partition_text.splitlines() if s.startswith("PartitionName=")]
    nodes = [read_record(NodeLimits, s) for s in node_text.splitlines() if s.startswith("NodeName=")]
    return Limits(config, tuple(partitions), tuple(nodes))


def how_preempted(limits: Limits, partition: Partition) -> str:
    """Return Slurm's name of a partition's preempt mode; OFF if no other job can preempt its jobs."""
    kind = limits.config.get("PreemptType", "preempt/none")
    above = {p.name for p in limits.partitions if p.priority_tier > partition.priority_tier}
    is_below = any(above & {*node.partitions} for node in limits.nodes_of(partition))
    if kind.endswith("/none") or (kind.endswith("partition_prio") and not is_below):
        return "OFF"
    return partition.preempt_mode.upper()


@dataclass(frozen=True, kw_only=True)
class SlurmFacts:
    """What the checks of a request know about the cluster: Slurm's limits, and the torch of the job."""

    limits: Limits | None
    """Limits of the cluster; None if Slurm did not report them."""
    slurm_problem: str = ""
    """Reason why the limits are not known; empty if they are known."""
    is_away: bool = False
    """True if no controller of the cluster answers, so that nothing can be submitted."""
    torch: str = ""
    """Version and build of torch that the job uses; empty if torch is not installed."""


def ask_slurm() -> SlurmFacts:
    """Return the limits of the cluster, or the reason why they are not known, and the version of torch."""
    try:
        return SlurmFacts(limits=read_limits(), torch=torch_version())
    except scheduler.SlurmError as error:
        problem = str(error).strip().splitlines()[-1]
        return SlurmFacts(limits=None, slurm_problem=problem, is_away=isinstance(error, NoControllerError))


def torch_version() -> str:
    """Return the version of the installed torch without importing it; empty if torch is not installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


# Reasons for which a job is pending, as squeue prints them: reasons that waiting does not change, and the remedy to
# type.


OWN_WISH = ("JobHeldUser", "Dependency", "BeginTime", "JobArrayTaskLimit")
"""Slurm's reasons for jobs that are pending because the user wants it, for example because of a dependency.

The launcher does not move such a job to another candidate of its placement.
"""

FITS = "python -m launch.cancel {run}; python -m launch.doctor, with the same arguments, says what fits"
"""Text to type for a job whose request the cluster can never meet."""
LASTING = (
    (
        r"Partition(NodeLimit|TimeLimit|Config)|BadConstraints|MaxMemPerLimit|(Assoc|QOS)Max\w*(PerJob|PerNode)|QOSMin\w+",
        "its request is outside of the limits of its partition, nodes, account or QOS",
        FITS,
    ),
    (
        r"(Account|QOS)NotAllowed|Invalid(Account|QOS)|(Job's|User's) .*use this partition",
        "its partition does not take its account or QOS",
        FITS,
    ),
    (
        "ReservationDeleted|DeadLine|DependencyNeverSatisfied",
        "its reservation, deadline or dependency is past",
        "python -m launch.cancel {run}",
    ),
    (
        "JobHeldUser|JobHoldMaxRequeue|launch failed requeued held|job requeued in held state",
        "you hold it, or Slurm holds it after requeues",
        "scontrol release {job}",
    ),
    ("JobHeldAdmin", "an administrator holds it, or its priority is 0", "ask the site to release {job}"),
    (
        "PartitionDown|PartitionInactive|NodeDown|ReqNodeNotAvail, *UnavailableNodes|Nodes required for job are DOWN",
        "its partition is switched off, or nodes that it needs are down, drained or reserved",
        "sinfo -R names nodes with their reasons; ask the site, or python -m launch.cancel {run}",
    ),
)
"""Reasons that waiting does not change: (pattern for the beginning of the reason, its meaning, the text to type)."""


def advice(reason: str, job: str = "JOB", run: str = "RUN") -> Problem | None:
    """Return why a pending job never starts by itself, and what to type; None if the job only has to wait.

    Args:
        reason: reason as squeue prints it.
        job: id of the job.
        run: run folder, as an argument of ``launch.cancel``.
    """
    said = reason.replace("_", " ")
    for pattern, meaning, fix in LASTING:
        if re.match(pattern, said):
            found = f"waiting does not change {reason.split(',')[0]}: {meaning}"
            return Problem(found, "a job that can start", fix.format(job=job, run=run))
    return None
