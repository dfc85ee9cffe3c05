"""Ballots: figures by which ranks tell each other of saves, with those of a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Ballot:
    """Figures of one rank about saves, summed over the ranks with those of a step."""

    phase: int = 0
    """Phase of the save in flight that they are about."""
    figures: tuple[float, ...] = ()
    """Writers that are done and that have failed, where a save is in flight; then, where the time decides, whether it
    has come, by rank 0's clock. All ranks hand out equally many."""


NO_BALLOT = Ballot()
