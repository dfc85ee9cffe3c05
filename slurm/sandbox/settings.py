"""Settings of a sandbox, checked before anything is started.

Owns the defaults and the words of the refusals. Must not know how any of it is built.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

from launch.errors import ConfigError

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
