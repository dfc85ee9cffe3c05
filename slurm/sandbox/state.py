"""The record of one sandbox, kept in its directory: what was asked for, where it listens, and which processes it owns.

Everything that must be found again after a crash is written here before it exists. Owns the layout of the directory.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from launch.errors import ConfigError
from slurm.sandbox.processes import Process
from slurm.sandbox.settings import Settings, directory_tag

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

    ``accounting`` is where its slurmdbd listens, or that of the sandbox it has joined; None where there is none.
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
    """The sandbox recorded in a directory; None where there is none."""
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
    """The sandbox recorded in a directory; ConfigError where there is none."""
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
