"""Settings of a sandbox, and its record: addresses, nodes and processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from launch.errors import ConfigError
from slurm.sandbox.processes import Process

# Settings of a sandbox, checked before anything is started.


MAX_NODES = 200
# A Unix socket's path holds 107 bytes, and slurmd puts `spool/n200_4294967295.4294967295` behind the directory.
MAX_DIRECTORY_LENGTH = 70


@dataclass(frozen=True)
class Settings:
    """The shape of a sandbox.

    Attributes:
        nodes: number of nodes, called n1, n2, ...
        cpus_per_node: CPUs that Slurm hands out on each node, whatever the machine has.
        gpus_per_node: fake GPUs (files that swallow everything) on each node.
        memory_gib_per_node: memory that Slurm checks --mem against, whatever the machine has.
        partitions: one text each, ``NAME`` or ``NAME:KEY=VALUE,...`` in the words of slurm.conf; the first is the
            default, and each is preferred to those before it.
        slurm_conf: ``KEY=VALUE`` lines that replace or add to those of slurm.conf.
        namespaces: whether nodes are hosts of their own where the machine allows it.
        accounting: whether there is a slurmdbd, with a database of its own: sacct, and clusters that know each other.
        cluster_name: what Slurm calls the cluster.
        join: the directory of a sandbox with accounting, whose slurmdbd and MUNGE key this one uses as well, so that
            commands reach either from the other (``sbatch --clusters``, ``squeue -M``); empty for none.
    """

    nodes: int = 4
    cpus_per_node: int = 8
    gpus_per_node: int = 2
    memory_gib_per_node: int = 256
    partitions: tuple[str, ...] = ("low", "high")
    slurm_conf: tuple[str, ...] = ()
    namespaces: bool = True
    accounting: bool = False
    cluster_name: str = "sandbox"
    join: str = ""

    def node_names(self) -> list[str]:
        """The names of all nodes, in order."""
        return [f"n{index}" for index in range(1, self.nodes + 1)]


def default_directory() -> Path:
    """Default folder of a sandbox: in $XDG_STATE_HOME, by default ~/.local/state."""
    state_home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state_home) / "slurm-sandbox"


def directory_tag(directory: Path) -> str:
    """Eight letters that belong to this directory alone, for the names of its network interfaces."""
    return hashlib.sha256(str(directory).encode()).hexdigest()[:8]


def check(settings: Settings, directory: Path) -> None:
    """Refuse numbers and names that cannot work; ConfigError."""
    limits = {
        "--nodes": (settings.nodes, 1, MAX_NODES),
        "--cpus-per-node": (settings.cpus_per_node, 1, 4096),
        "--gpus-per-node": (settings.gpus_per_node, 0, 64),
        "--memory-gib-per-node": (settings.memory_gib_per_node, 1, 65536),
    }
    for option, (value, low, high) in limits.items():
        if not low <= value <= high:
            nearest = min(max(value, low), high)
            raise ConfigError(f"{option} {value}", f"a number from {low} to {high}", f"{option} {nearest}")
    _check_partitions(settings.partitions)
    _check_accounting(settings)
    for line in settings.slurm_conf:
        if not re.fullmatch(r"[A-Za-z]+=[^\n]+", line):
            raise ConfigError(f"--set {line!r}", "a line of slurm.conf, KEY=VALUE", "--set KillWait=5")
    if len(os.fsencode(directory)) > MAX_DIRECTORY_LENGTH:
        raise ConfigError(
            found=f"--dir {directory} ({len(os.fsencode(directory))} bytes)",
            expected=f"at most {MAX_DIRECTORY_LENGTH} bytes, because Unix sockets lie in it",
            fix="--dir /tmp/slurm-sandbox",
        )


def _check_accounting(settings: Settings) -> None:
    # It becomes the name of tables in the database, which knows lower case only.
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,39}", settings.cluster_name):
        raise ConfigError(
            f"--cluster-name {settings.cluster_name!r}",
            "lower-case letters, digits and underscores, 40 at most",
            "--cluster-name beta",
        )
    if settings.join and settings.accounting:
        raise ConfigError(
            f"--accounting and --join {settings.join}",
            "one of them: a sandbox that joins another uses that one's slurmdbd",
            f"--join {settings.join}",
        )


def _check_partitions(partitions: tuple[str, ...]) -> None:
    example = "--partitions low:GraceTime=10 high:MaxTime=60"
    if not partitions:
        raise ConfigError("no partition", "at least one", example)
    for text in partitions:
        if not re.fullmatch(r"[A-Za-z][\w-]*(:\w+=[^\s,=]+(,\w+=[^\s,=]+)*)?", text):
            raise ConfigError(f"--partitions {text!r}", "NAME or NAME:KEY=VALUE,KEY=VALUE", example)
    names = [text.partition(":")[0] for text in partitions]
    if len(set(names)) < len(names):
        raise ConfigError(f"--partitions {' '.join(names)}", "each name once", example)


# The record of one sandbox, kept in its directory: what was requested, where it listens, and which processes it
# owns.


Mode = Literal["namespaces", "one-host"]
RECORD = "sandbox.json"


@dataclass(frozen=True)
class Endpoint:
    """Address on which a daemon listens."""

    address: str
    port: int


@dataclass
class State:
    """A sandbox as recorded; ``processes`` has its daemons (munged, slurmctld, ...) and one for each node that is on.

    ``accounting`` is where its slurmdbd listens, or that of the sandbox it has joined; None if there is none.
    ``why_one_host`` holds the reason for the mode one-host, empty in the mode namespaces; ``started`` is set once every
    node was idle.
    """

    directory: Path
    settings: Settings
    mode: Mode
    why_one_host: str = ""
    controller: Endpoint = Endpoint("", 0)
    nodes: dict[str, Endpoint] = field(default_factory=dict)
    processes: dict[str, Process] = field(default_factory=dict)
    started: bool = False
    accounting: Endpoint | None = None

    @property
    def bridge(self) -> str:
        """The name of the sandbox's bridge, which belongs to this directory alone."""
        return f"ssb{directory_tag(self.directory)}"

    @property
    def slurm_conf(self) -> Path:
        """The configuration file of every daemon and client."""
        return self.directory / "etc" / "slurm.conf"

    @property
    def munge_socket(self) -> Path:
        """Socket of this sandbox's munged; that of the sandbox it has joined, whose key must be its own."""
        return (Path(self.settings.join) if self.settings.join else self.directory) / "munge" / "socket"

    def log(self, daemon: str) -> Path:
        """File of the output of a daemon: munged, slurmctld, slurmdbd, mariadbd, or a node's name."""
        return self.directory / "log" / f"{daemon}.out"

    def save(self) -> None:
        """Write the record, whole or not at all."""
        record = asdict(self)
        del record["directory"]
        temporary = self.directory / f".{RECORD}.new"
        temporary.write_text(json.dumps(record, indent=1) + "\n")
        temporary.replace(self.directory / RECORD)

    def own(self, name: str, process: Process) -> None:
        """Record a process of this sandbox under its name."""
        self.processes[name] = process
        self.save()

    def disown(self, name: str) -> None:
        """Forget a process that has ended."""
        self.processes.pop(name, None)
        self.save()


def load(directory: Path) -> State | None:
    """The sandbox recorded in a directory; None if there is none."""
    try:
        record = json.loads((directory / RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError):
        return None
    settings = record["settings"] | {name: tuple(record["settings"][name]) for name in ("partitions", "slurm_conf")}
    return State(
        directory=directory,
        settings=Settings(**settings),
        mode=record["mode"],
        why_one_host=record["why_one_host"],
        controller=Endpoint(**record["controller"]),
        accounting=Endpoint(**record["accounting"]) if record.get("accounting") else None,
        nodes={name: Endpoint(**value) for name, value in record["nodes"].items()},
        processes={name: Process(**value) for name, value in record["processes"].items()},
        started=record["started"],
    )


def require(directory: Path) -> State:
    """The sandbox recorded in a directory; ConfigError if there is none."""
    state = load(directory)
    if state is None:
        raise ConfigError(
            found=f"no sandbox in {directory}",
            expected="one that was started",
            fix=f"python -m slurm.sandbox up --dir {directory}",
        )
    return state


@contextlib.contextmanager
def locked(directory: Path, *, create: bool = False) -> Iterator[bool]:
    """Hold a sandbox's directory for one command at a time; False, and no lock, where it does not exist."""
    while True:
        if create:
            directory.mkdir(parents=True, exist_ok=True)
        try:
            handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield False
            return
        except NotADirectoryError as error:
            raise ConfigError(f"{directory} is a file", "a directory", "--dir /tmp/slurm-sandbox") from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            # `down` of another process may have removed the directory while this one waited for the lock.
            if _is_still(directory, handle):
                yield True
                return
        finally:
            os.close(handle)


def _is_still(directory: Path, handle: int) -> bool:
    try:
        return os.path.samestat(directory.stat(), os.fstat(handle))
    except FileNotFoundError:
        return False
