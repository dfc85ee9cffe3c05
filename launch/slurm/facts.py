"""Facts about Slurm, requests that the checks compare with them, and the findings of the checks."""

from __future__ import annotations

import grp
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from importlib import metadata

from launch.config import Config
from launch.errors import Problem
from launch.plan.plan import Plan
from launch.slurm import client as scheduler
from launch.slurm import limits
from launch.slurm.limits import Limits


class Level(Enum):
    """Severity of a finding: an ``error`` breaks the run, a ``warning`` may cost time or work, ``ok`` is in order."""

    ok = "ok"
    warning = "warning"
    error = "error"


PENDS = "Slurm would leave the job pending for good, or refuse it"
"""Consequence of a request that Slurm cannot meet. With EnforcePartLimits=NO, Slurm still accepts the request."""


@dataclass(frozen=True)
class Finding(Problem):
    """Result of one check. ``expected`` and ``fix`` are empty if all is well.

    Attributes:
        level: severity.
        check: short name of the check.
        unless: condition, unknown here, under which the error does not occur; empty if the error is certain.
    """

    level: Level
    check: str
    unless: str = ""

    def __post_init__(self) -> None:
        assert self.level is Level.ok or (self.why and self.fix), "a complaint says why, and what to type"

    @property
    def why(self) -> str:
        """Consequence of the finding, or the doubt about it."""
        return self.expected


def fine(check: str, found: str) -> Finding:
    """Return a finding without complaint."""
    return Finding(found, "", "", Level.ok, check)


def warn(check: str, found: str, why: str, fix: str) -> Finding:
    """Return a finding about a state that may cost time or work."""
    return Finding(found, why, fix, Level.warning, check)


def fail(check: str, found: str, why: str, fix: str) -> Finding:
    """Return a finding about a state that breaks the run."""
    return Finding(found, why, fix, Level.error, check)


def doubt(finding: Finding, unless: str) -> Finding:
    """Return the finding. A certain error gets the condition ``unless`` under which it does not occur."""
    return replace(finding, unless=unless) if finding.level is Level.error and not finding.unless else finding


def has_errors(findings: Iterable[Finding]) -> bool:
    """Return whether any finding is an error."""
    return any(finding.level is Level.error for finding in findings)


# Requests, and the facts about Slurm with which the checks compare them.


@dataclass(frozen=True)
class Request:
    """Request to Slurm for points with equal resources: a job, or an array of ``len(points)`` elements."""

    config: Config
    plan: Plan | None
    """Plan of the points; None if the launcher refuses to plan. Its request to Slurm is checked anyway."""
    points: tuple[str, ...]
    batch_text: str
    excluded: frozenset[str] = frozenset()
    """Names of the nodes in cluster.exclude."""


@dataclass(frozen=True, kw_only=True)
class SlurmFacts:
    """Slurm's limits and the user's groups: enough to check a request."""

    limits: Limits | None
    """Limits of the local cluster; None if no controller answers."""
    slurm_problem: str = ""
    is_away: bool = False
    """True if the cluster's controller does not answer, so that nothing can be submitted."""
    others: dict[str, Limits | str] = field(default_factory=dict)
    """Name of another requested cluster -> its limits, or the reason why they are not known."""
    groups: tuple[str, ...] | None = None
    """Unix groups of the user; None for root, whom every partition accepts."""
    torch: str = ""
    """Version and build of torch in the job; empty if torch is not installed."""

    def at(self, cluster: str | None) -> Limits | str:
        """Return the limits of a cluster (None: the local cluster); if they are not known, the reason."""
        if cluster is not None:
            return self.others[cluster]
        return self.slurm_problem if self.limits is None else self.limits

    @property
    def known(self) -> dict[str | None, Limits]:
        """Return the limits that are known, by cluster."""
        clusters: tuple[str | None, ...] = (None, *self.others)
        return {name: there for name in clusters if isinstance(there := self.at(name), Limits)}


def last_line(error: Exception) -> str:
    """Return the last line of an error message."""
    return str(error).strip().splitlines()[-1]


def clusters_named(configs: Iterable[Config]) -> set[str]:
    """Return the other clusters that configs name, as their place or as a candidate."""
    named: set[str | None] = set()
    for config in configs:
        named |= {config.cluster.cluster, *(candidate.cluster for candidate in config.cluster.placement)}
    return {name for name in named if name is not None}


def ask_slurm(clusters: Iterable[str] = ()) -> SlurmFacts:
    """Read the limits of this cluster and of ``clusters``, one query for each controller."""
    groups = tuple(map(group_name, os.getgroups())) if os.getuid() else None
    try:
        found = limits.read()
    except scheduler.SlurmError as error:
        is_away = isinstance(error, limits.NoControllerError)
        return SlurmFacts(limits=None, slurm_problem=last_line(error), is_away=is_away, groups=groups)
    others: dict[str, Limits | str] = {}
    for name in sorted(clusters):
        try:
            others[name] = limits.read(name)
        except scheduler.SlurmError as error:
            others[name] = last_line(error)
    return SlurmFacts(limits=found, others=others, groups=groups, torch=torch_version())


def group_name(number: int) -> str:
    """Return the name of a Unix group; its number if it has no name."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def torch_version() -> str:
    """Return the version of the installed torch without importing it; empty if torch is not installed."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def requests_of(groups: Sequence[Sequence[Plan]], configs: dict[str, Config], facts: SlurmFacts) -> list[Request]:
    """Return one request for each group of plans with equal resources. ``configs`` has each plan's config, by
    run folder.
    """
    from launch.slurm.jobs import sbatch_text

    return [
        Request(config, group[0], tuple(plan.title for plan in group), sbatch_text(group), excluded(config, facts))
        for group in groups
        for config in [configs[group[0].run_dir]]
    ]


def excluded(config: Config, facts: SlurmFacts) -> frozenset[str]:
    """Return the node names in cluster.exclude, a host list such as ``n[1-3],n7``. Raises SlurmError if Slurm fails."""
    hosts = config.cluster.exclude
    if not hosts or facts.limits is None:
        return frozenset()
    return frozenset(scheduler.run("scontrol", "show", "hostnames", hosts).split())
