"""Outcome of a run by its event log alone: over or not, in which state, and why it does not start again.

Owns what follows from the order of the events. Asks neither Slurm nor the files of the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.agent.restart_policy import WANTED, Action, Cause
from launch.runs.events import saves_that_count
from launch.runs.failures import first_failure

DECISIVE = ("submitted", "moved", "requeued", "agent_started", "started", "agent_ended")
"""Events of which the last one tells whether an agent works on the run, or is going to."""
ENDED = {"finished", "stopped", "cancelled", "budget_reached"}
PLACED = ("submitted", "moved", "gave_up", "stayed")
"""Events that say where a point waits: the last of them holds."""


def outcome(events: Sequence[dict[str, Any]]) -> str:
    """State of a run whose job is over, by its event log; silence is a failure."""
    names = {e["event"] for e in events}
    ended = next((e for e in events if e["event"] in ("cancelled", "budget_reached")), None)
    attempts = [e["attempt"] for e in events if e.get("attempt") is not None]
    # What fails after a cancel, or at the cap, failed because of it.
    before = events if ended is None else events[: events.index(ended)]
    if attempts and first_failure(before, max(attempts)):
        return "failed"
    if "finished" in names:
        return "finished"
    if ended is not None:
        return "cancelled" if ended["event"] == "cancelled" else "budget_exceeded"
    if why_not_restarted(events) is not None:
        return "failed"
    return "stopped" if names & {"stopped", "agent_stopped"} else "failed"


def has_ended(events: Sequence[dict[str, Any]]) -> bool:
    """Tell whether the event log says that nothing more will happen: the agent decided to stop, and has left since."""
    last = next((e for e in reversed(events) if e["event"] in DECISIVE), None)
    if last is None or last["event"] != "agent_ended" or last.get("cause") == "killed":
        return False
    decisions = [e for e in events_since_start(events) if e["event"] in ("decided", "requeue_failed")]
    return bool(decisions) and (decisions[-1]["event"] == "requeue_failed" or decisions[-1]["action"] == Action.stop)


def why_not_restarted(events: Sequence[dict[str, Any]]) -> str | None:
    """The reason in the event log for which a run that was interrupted, or failed, stays so."""
    last = next((e for e in reversed(events) if e["event"] in ("decided", "requeue_failed", "started")), None)
    if last is None or last["event"] == "started":
        return None
    if last["event"] == "requeue_failed":
        return str(last["cause"])
    # A decision of a former release does not name the cause; that was then told by the ranks alone.
    is_unwanted = last["action"] == Action.stop and last.get("cause", Cause.finished) not in WANTED
    return str(last["reason"]) if is_unwanted else None


def state_between_places(events: Sequence[dict[str, Any]], is_out: bool) -> tuple[str, str] | None:
    """State and detail of a point whose launcher took it out of the queue, to put it elsewhere or for good."""
    last = last_placed(events)
    if last is not None and last["event"] == "gave_up":
        return "placement_timeout", str(last["cause"])
    if last is not None and last["event"] == "moved" and is_out and all(e["event"] != "cancelled" for e in events):
        return "pending", f"on its way to {last['to']}"
    return None


def last_placed(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The last event that says where the point waits; None where it ran after that."""
    for event in reversed(events):
        if event["event"] in PLACED:
            return event
        if event["event"] in ("agent_started", "started"):
            return None
    return None


def events_since_start(events: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Events from the last ``started`` on."""
    return events[max((i for i, e in enumerate(events) if e["event"] == "started"), default=0) :]


def saved_step(events: Sequence[dict[str, Any]]) -> int | None:
    """The step of the newest checkpoint that the event log knows of."""
    return max((save["step"] for save in saves_that_count(events)), default=None)
