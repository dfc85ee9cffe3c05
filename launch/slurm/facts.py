"""Facts that the checks need, gathered once, and the findings that the checks return."""

from __future__ import annotations

import grp
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import Enum
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.text import Text

import launch
from launch.config import ClusterConfig, ClusterKind, Config
from launch.config.cluster import ContainerRuntime
from launch.errors import ConfigError
from launch.plan.plan import Plan
from launch.slurm import client as scheduler
from launch.slurm import limits
from launch.slurm.limits import Limits

# Findings of the checks, and how they are shown.


class Level(Enum):
    """Severity of a finding: ``error`` breaks the run, ``warning`` may cost time or work, ``ok`` was looked at."""

    ok = "ok"
    warning = "warning"
    error = "error"


PENDS = "Slurm would leave the job pending for good, or refuse it"
"""Consequence of a request that cannot be met: with EnforcePartLimits=NO it is accepted all the same."""
STYLES = {Level.ok: "green", Level.warning: "yellow", Level.error: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: a short name of the check.
        found: what is there, with its values.
        why: why it matters; empty where all is well.
        fix: the line to type; empty where all is well.
        unless: what would have to be so for an error to be none, where that cannot be told from here; empty where
            the error is certain.
    """

    level: Level
    check: str
    found: str
    why: str = ""
    fix: str = ""
    unless: str = ""

    def __post_init__(self) -> None:
        assert self.level is Level.ok or (self.why and self.fix), "a complaint says why, and what to type"


def fine(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(Level.ok, check, found)


def warn(check: str, found: str, why: str, fix: str) -> Finding:
    """May cost time or work."""
    return Finding(Level.warning, check, found, why, fix)


def fail(check: str, found: str, why: str, fix: str) -> Finding:
    """Breaks the run."""
    return Finding(Level.error, check, found, why, fix)


def doubt(finding: Finding, unless: str) -> Finding:
    """Return the finding, an error no longer certain."""
    return replace(finding, unless=unless) if finding.level is Level.error and not finding.unless else finding


def refusal(check: str, error: ConfigError) -> Finding:
    """Finding for what the launcher itself would refuse."""
    why = f"python -m launch refuses it, so what it asks of Slurm was not looked at; expected: {error.expected}"
    return fail(check, error.found, why, error.fix)


def has_errors(findings: Iterable[Finding]) -> bool:
    """Return whether any finding is an error."""
    return any(finding.level is Level.error for finding in findings)


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON holds them."""
    return [{**asdict(finding), "level": finding.level.value} for finding in findings]


def show(findings: Iterable[Finding], console: Console) -> None:
    """Print the findings, each with its reason and the line to type."""
    for finding in findings:
        head = Text()
        head.append(f"{finding.level.value:<8}", STYLES[finding.level])
        head.append(f"{finding.check}: {finding.found}")
        console.print(head)
        if finding.why:
            unless = f", unless {finding.unless}" if finding.unless else ""
            console.print(Text(f"{'':8}why   {finding.why}{unless}", "dim"))
        if finding.fix:
            console.print(Text(f"{'':8}type  {finding.fix}"))


def summary(findings: Iterable[Finding]) -> str:
    """Count the findings of each level, in one line."""
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count(Level.error), levels.count(Level.warning)
    return f"{errors} errors, {warnings} warnings, {levels.count(Level.ok)} ok"


# Facts for the checks, gathered once: this machine, the folders of the run, Slurm's limits, and what is requested.


DISTRIBUTION = "gpt-launch"
RLIMITS = {"nofile": resource.RLIMIT_NOFILE, "core": resource.RLIMIT_CORE, "memlock": resource.RLIMIT_MEMLOCK}


@dataclass(frozen=True)
class Folder:
    """A path that need not exist yet, and the filesystem it would lie on."""

    path: str
    exists: str
    """The deepest folder above it that is there."""
    filesystem: str
    """The kernel's word: nfs4, lustre, ext4, tmpfs, ..."""
    free_bytes: int = 0
    free_inodes: int = 0
    problem: str = ""
    """Error of writing there; empty where a file was written and removed."""


@dataclass(frozen=True)
class Machine:
    """The login node, and the Python that the job will run."""

    host: str
    environment: dict[str, str]
    soft: dict[str, int]
    """Limits of this shell (nofile, core in bytes, memlock in bytes); -1 is unlimited."""
    hard: dict[str, int]
    python: tuple[int, int]
    executable: str
    versions: dict[str, str]
    """Installed versions of torch and of what is required, by distribution; one that is not there is absent."""
    requirements: tuple[str, ...]
    """Requirements of our distribution; empty if it is not installed."""
    programs: tuple[Folder, ...]
    """Folders of the job's Python and of our code, where that is a folder of the user's and not of the system."""


@dataclass(frozen=True)
class Request:
    """Request of one shape of the sweep to Slurm: a job, or an array of ``len(points)`` elements."""

    config: Config
    plan: Plan
    points: tuple[str, ...]
    batch_text: str
    excluded: frozenset[str] = frozenset()
    """Names of the nodes that cluster.exclude stands for."""


@dataclass(frozen=True, kw_only=True)
class SlurmFacts:
    """The limits that Slurm tells of itself, and whom it would let in: enough to check a request."""

    limits: Limits | None
    """None where no controller answers."""
    slurm_problem: str = ""
    is_away: bool = False
    """True where that is for want of a controller, so that nothing can be submitted."""
    others: dict[str, Limits | str] = field(default_factory=dict)
    """The limits of other clusters that are requested, by name; the reason where one is not known or not there."""
    groups: tuple[str, ...] | None = None
    """Unix groups of the user; None for root, whom every partition lets in."""
    torch: str = ""
    """Version of the torch that the job will import, which tells what it was built for; empty if there is none."""

    def at(self, cluster: str | None) -> Limits | str:
        """The limits of a cluster, None being the local one; the reason where they are not known."""
        if cluster is not None:
            return self.others[cluster]
        return self.slurm_problem if self.limits is None else self.limits

    @property
    def known(self) -> dict[str | None, Limits]:
        """The limits that are known, by cluster."""
        clusters: tuple[str | None, ...] = (None, *self.others)
        return {name: there for name in clusters if isinstance(there := self.at(name), Limits)}


@dataclass(frozen=True, kw_only=True)
class Facts(SlurmFacts):
    """Everything the checks may look at."""

    kind: ClusterKind
    """local or slurm, with auto resolved."""
    was_auto: bool
    machine: Machine
    output: Folder
    client: bool
    """True where Slurm's commands are installed here."""
    container_problem: str = ""
    """Objection to cluster.container; empty where nothing does, or there is none."""


def filesystem_of(path: Path) -> str:
    """The type of the filesystem that ``path`` lies on, from /proc/self/mountinfo.

    The kernel's name rather than statfs's number: FUSE filesystems (fuse.juicefs, fuse.sshfs) all share one number.
    """
    path.exists()  # lets an automounter mount it first
    return filesystem_in(Path("/proc/self/mountinfo").read_text(), os.path.realpath(path))


def filesystem_in(mounts: str, path: str) -> str:
    """The type of the deepest, and of those the last, mount above ``path``. ``mounts`` is a mountinfo file."""
    best, kind = -1, "unknown"
    for line in mounts.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= best:
            best, kind = len(point), right.split()[0]
    return kind


def look_at_folder(path: Path) -> Folder:
    """Find the filesystem of a folder, and whether a file can be written there. Leaves nothing behind."""
    there = next(folder for folder in (path, *path.parents) if folder.is_dir())
    space = os.statvfs(there)
    problem = ""
    try:
        with tempfile.TemporaryFile(dir=there) as file:
            file.write(b"x")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        problem = error.strerror or str(error)
    free = space.f_bavail * space.f_frsize
    # Filesystems without a fixed table of inodes (btrfs, some NFS servers) report 0 of 0.
    inodes = space.f_favail if space.f_files else sys.maxsize
    return Folder(str(path), str(there), filesystem_of(there), free, inodes, problem)


def look_at_machine() -> Machine:
    """This machine and its Python. Imports no library to learn its version."""
    try:
        required = tuple(metadata.distribution(DISTRIBUTION).requires or ())
    except metadata.PackageNotFoundError:
        required = ()
    found: dict[str, str] = {}
    for name in {"torch", *(Requirement(text).name for text in required)}:  # and not the files of all there are
        with suppress(metadata.PackageNotFoundError):
            found[name.lower()] = metadata.version(name)
    pairs = {name: resource.getrlimit(number) for name, number in RLIMITS.items()}
    places = {
        Path(launch.__file__).resolve().parents[1],
        *([Path(sys.prefix)] if sys.prefix != sys.base_prefix else []),
    }
    return Machine(
        host=os.uname().nodename,
        environment=dict(os.environ),
        soft={name: soft for name, (soft, _) in pairs.items()},
        hard={name: hard for name, (_, hard) in pairs.items()},
        python=sys.version_info[:2],
        executable=sys.executable,
        versions=found,
        requirements=required,
        programs=tuple(Folder(str(place), str(place), filesystem_of(place)) for place in sorted(places)),
    )


def group_name(number: int) -> str:
    """The name of a group, or its number where it has none."""
    try:
        return grp.getgrgid(number).gr_name
    except KeyError:
        return str(number)


def last_line(error: Exception) -> str:
    """Last line of an error."""
    return str(error).strip().splitlines()[-1]


def look_at_cluster(name: str) -> Limits | str:
    """The limits of another cluster, or why it is none to submit to."""
    try:
        return limits.read(name)
    except scheduler.SlurmError as error:
        return last_line(error)


def clusters_named(configs: Iterable[Config]) -> set[str]:
    """The other clusters that configs name, as a place or as a candidate."""
    named: set[str | None] = set()
    for config in configs:
        named |= {config.cluster.cluster, *(candidate.cluster for candidate in config.cluster.placement)}
    return {name for name in named if name is not None}


def ask_slurm(clusters: Iterable[str] = ()) -> SlurmFacts:
    """Ask for the limits of this cluster and of ``clusters``, each controller once."""
    groups = tuple(group_name(number) for number in os.getgroups()) if os.getuid() else None
    try:
        found = limits.read()
    except scheduler.SlurmError as error:
        is_away = isinstance(error, limits.NoControllerError)
        return SlurmFacts(limits=None, slurm_problem=last_line(error), is_away=is_away, groups=groups)
    others = {name: look_at_cluster(name) for name in sorted(clusters)}
    return SlurmFacts(limits=found, others=others, groups=groups, torch=torch_version())


def torch_version() -> str:
    """Version of the installed torch, without importing it; empty if there is none."""
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return ""


def container_problem(cluster: ClusterConfig) -> str:
    """Problem with the container of a run, as far as this machine tells; empty if there is none."""
    image, runtime = cluster.container, cluster.container_runtime
    if image is None:
        return ""
    if image.startswith(("/", ".", "~")) and not Path(image).expanduser().exists():
        return f"there is no image {image}"
    if runtime is ContainerRuntime.apptainer:
        return "" if shutil.which("apptainer") else "apptainer is not on the PATH"
    try:
        options = scheduler.run("srun", "--help")
    except scheduler.SlurmError as error:
        return f"srun does not answer: {last_line(error)}"
    return "" if "--container-image" in options else "srun has no --container-image, which pyxis adds"


def gather(kind: ClusterKind, output: Path, clusters: Iterable[str] = (), container: str = "") -> Facts:
    """Look at everything. ``kind`` is what the config says, auto included; ``clusters`` are others than this one.

    ``container`` is what ``container_problem`` found.
    """
    slurm = SlurmFacts(limits=None) if kind is ClusterKind.local else ask_slurm(clusters)
    resolved = ClusterKind.slurm if kind is ClusterKind.slurm or slurm.limits is not None else ClusterKind.local
    return Facts(
        **vars(slurm),
        kind=resolved,
        was_auto=kind is ClusterKind.auto,
        machine=look_at_machine(),
        output=look_at_folder(output),
        client=shutil.which("sbatch") is not None,
        container_problem=container,
    )


def expand_hosts(expression: str | None) -> frozenset[str]:
    """The names that a host list (``n[1-3],n7``) stands for; SlurmError."""
    if not expression:
        return frozenset()
    return frozenset(scheduler.run("scontrol", "show", "hostnames", expression).split())


def requests_of(groups: Sequence[Sequence[Plan]], configs: dict[str, Config], facts: SlurmFacts) -> list[Request]:
    """One request for each shape. ``configs`` holds the config of every plan, by run folder."""
    from launch.slurm.jobs import sbatch_text

    requests = []
    for group in groups:
        config = configs[group[0].run_dir]
        excluded = expand_hosts(config.cluster.exclude) if facts.limits is not None else frozenset()
        points = tuple(plan.title for plan in group)
        requests.append(Request(config, group[0], points, sbatch_text(group), excluded))
    return requests
