"""Environment of the ranks: what the agent sets where the user has not, and what ``environment.json`` tells of it.

Owns the names and values, each with its reason. Records these names alone: other variables may hold secrets.
Torch-free.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Collection, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Default:
    """A variable that is set where the user has set neither it nor another name of the same thing."""

    name: str
    value: str
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Its names, by any of which the user may have set it."""
        return self.name, *self.aliases


DEFAULTS = (
    # A gloo group connects every pair of ranks at once else: P (P - 1) connections, as many requests of the store.
    Default("TORCH_GLOO_LAZY_INIT", "1"),
    # Blocks that grow leave no gaps between them, by which a GPU runs out of memory that is free.
    Default("PYTORCH_ALLOC_CONF", "expandable_segments:True", ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")),
    # NCCL's flight recorder: the last collectives of a rank, written to a file when one of them times out.
    Default("TORCH_FR_BUFFER_SIZE", "20000", ("TORCH_NCCL_TRACE_BUFFER_SIZE",)),
    Default("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
)
"""Set before torch is imported: a rank that is forked has what its interpreter was started with."""

DUMP_FILE = Default("TORCH_FR_DUMP_TEMP_FILE", "nccl_trace_rank_", ("TORCH_NCCL_DEBUG_INFO_TEMP_FILE",))
"""Beginning of the files of the flight recorder, to which torch appends the rank; one for each attempt."""

COMPILE_CACHE = "TORCHINDUCTOR_CACHE_DIR"
"""Folder in which torch's compiler keeps what it makes."""

RECORDED = (
    *(name for entry in (*DEFAULTS, DUMP_FILE) for name in entry.names),
    *("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", COMPILE_CACHE, "TRITON_CACHE_DIR"),
)
MOST_FILES = 1 << 20
"""Programs that close every number a file could have take minutes where a site allows a billion."""


def set_defaults(environment: MutableMapping[str, str] = os.environ, typed: Collection[str] = ()) -> None:
    """Set what is the same for all attempts, where the user has not.

    Args:
        environment: of the ranks.
        typed: names that the config sets for the ranks. A default for the same thing under another name goes: torch
            would obey both.
    """
    for entry in DEFAULTS:
        if not {*entry.names} & {*typed}:
            if not any(name in environment for name in entry.names):
                environment[entry.name] = entry.value
        elif environment.get(entry.name) == entry.value:
            del environment[entry.name]


def set_dump_file(
    run: Path, attempt: Path, environment: MutableMapping[str, str] = os.environ, typed: Collection[str] = ()
) -> None:
    """Have the flight recorder of each rank write into the folder of its attempt, unless the user has named a file.

    Args:
        run: folder of the run. A file in it was named for an attempt before this one.
        attempt: folder of the attempt.
        environment: of the ranks.
        typed: names that the config sets for the ranks.
    """
    named = [environment[name] for name in DUMP_FILE.names if name in environment]
    if all(name.startswith(f"{run}/") for name in named) and not {*DUMP_FILE.names} & {*typed}:
        environment[DUMP_FILE.name] = str(attempt / DUMP_FILE.value)


def dumped_ranks(attempt: Path) -> list[int]:
    """Ranks whose flight recorder has written into the folder of an attempt."""
    found = (path.name.removeprefix(DUMP_FILE.value) for path in attempt.glob(f"{DUMP_FILE.value}*"))
    return sorted(int(rank) for rank in found if rank.isdigit())


def describe_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str | int]:
    """List the variables of this process that steer communication and memory, and its limit of open files."""
    told: dict[str, str | int] = {name: environment[name] for name in RECORDED if name in environment}
    return told | {"open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0]}


def raise_open_files() -> int:
    """Raise the soft limit of open files of this process, and of those it starts, to the hard one; return the limit.

    Every connection, data file and log of a rank is one, and the usual soft limit is 1,024. What needs no privilege is
    done without asking.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = reachable_files(hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        return most
    return soft


def reachable_files(hard: int) -> int:
    """Soft limit of open files that agents and ranks have where this is the hard one; -1 is unlimited."""
    return MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
