"""A save in flight: what one rank keeps of it, its vote, and what becomes of it.

Owns these records. Must not know how the ranks agree, nor where the bytes go.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist

from gpt.checkpoint.formats import Format
from gpt.checkpoint.part import Part, encode_rank_state, rank_file
from gpt.checkpoint.staging import StagedPart
from gpt.checkpoint.writer import Result, Writer


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was committed."""

    step: int
    path: Path
    write_s: float
    """Seconds from the beginning of the save to its commit, of which training waited for the first part only."""


@dataclass(frozen=True)
class FailedWrite:
    """A write that failed, and is tried again."""

    step: int
    cause: str
    failures: int
    """Number of failed writes since the last checkpoint."""
    has_room: bool
    """False where the disk was full, over its quota or broken."""


@dataclass(frozen=True)
class Vote:
    """One rank's word on the save in flight; the sums over all ranks are what ``Saves.count`` takes."""

    phase: int
    """Number of the phase that it is about, the same on all ranks; 0: no save is in flight."""
    done: int = 0
    failed: int = 0


class Phase(Enum):
    """Phase of a save in flight."""

    write = "write"
    commit = "commit"


@dataclass
class InFlight:
    """The save in flight, as one rank knows it."""

    step: int
    meta: dict[str, Any]
    may_commit: Callable[[], bool]
    started: float
    part: Part | StagedPart | None
    """None where it could not be collected on this rank, so that each try fails."""
    temporary: Path
    phase: Phase = Phase.write
    result: Result | None = None


def take_over(
    step: int,
    state: Any,
    rank_state: dict[str, Any],
    fmt: Format,
    writer: Writer,
    group: dist.ProcessGroup | None,
) -> Part | StagedPart:
    """Take this rank's part of a state over; when this returns, the state may change. Collective.

    Raises:
        Exception: the format's, or the writer's.
    """
    collected = fmt.collect(step, state, group)
    collected.files[rank_file(dist.get_rank(group))] = encode_rank_state(rank_state)
    return writer.stage(collected)
