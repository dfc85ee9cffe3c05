"""The event log since a person last asked for the run: what counts for restarts, limits and the queue. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Events = Sequence[dict[str, Any]]


def events_since_submission(events: Events) -> list[dict[str, Any]]:
    """Return the events since a person last typed the command: typing it again forgives what went before."""
    return list(events[last_command(events) :])


def last_command(events: Events) -> int:
    """Index of the submission that a person last asked for; a move to another partition is none."""
    return max((i for i, e in enumerate(events) if e["event"] == "submitted" and not e.get("moved")), default=0)
