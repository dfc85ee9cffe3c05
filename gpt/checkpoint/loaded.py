"""A loaded checkpoint, as it is described to the training. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoadedCheckpoint:
    """Description of a loaded checkpoint; its tensors are in the state that was passed to ``load``."""

    step: int
    meta: dict[str, Any]
    world_size: int
    rank_state: dict[str, Any] | None
    """State that this rank saved for itself; None where the number of ranks is another than it was."""
    set_aside: tuple[str, ...] = ()
    """Newer checkpoints that were damaged, a line with name and reason for each."""
    is_from_memory: bool = False
    """True where it was loaded from the memory of the nodes."""
    fetched_for: str | None = None
    """Reason why it was fetched from a copy elsewhere; None where it was not."""
    memory_damage: str | None = None
    """Reason why memory, where checkpoints are kept there, gave none, or gave another copy of a part; None where there
    is nothing to say."""
