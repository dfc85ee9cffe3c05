"""The event log since a person last asked for the run: what counts for restarts, limits and the queue. Torch-free."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from launch.runs.folder import RunFolder
from launch.runs.wording import counted, how_often

Events = Sequence[dict[str, Any]]
FEWER_NODES, ALL_NODES = "fewer_nodes", "all_nodes"
"""Events of an attempt that runs on fewer nodes than its run asks for, and of the first one on all nodes after it."""


def events_since_submission(events: Events) -> list[dict[str, Any]]:
    """Return the events since a person last typed the command: typing it again forgives what went before."""
    return list(events[last_command(events) :])


def last_command(events: Events) -> int:
    """Index of the submission that a person last asked for; a move to another partition is none.

    Nor is a second entry of the same job: where its agent and its launcher did not see each other's.
    """
    last, before = 0, None
    for index, event in enumerate(events):
        if event["event"] == "submitted":
            is_second = before is not None and "by" in {**event, **before} and event["job_id"] == before["job_id"]
            if not event.get("moved") and not is_second:
                last = index
            before = event
    return last


CHANGED = ("resumed_from", "extended")
"""Events of a command that has a run go on otherwise than where it stopped (``launch.runs.rollback``)."""


def planned_steps(events: Events) -> int | None:
    """Steps that the newest attempt was to make in all; None where the event log does not tell."""
    told = [event["max_steps"] for event in events if event["event"] == "started" and event.get("max_steps")]
    return int(told[-1]) if told else None


def saves_that_count(events: Events) -> list[dict[str, Any]]:
    """Return the ``saved`` events of checkpoints that the run has not gone back from, oldest first."""
    found: list[dict[str, Any]] = []
    for event in events:
        if event["event"] == "saved":
            found.append(event)
        elif event["event"] == "resumed_from":
            found = [save for save in found if save["step"] is None or save["step"] <= event["step"]]
    return found


def is_finished(events: Events) -> bool:
    """Tell whether the newest attempt made the last step of the run: a new start would find nothing to do.

    It would where a command has extended the run since, or taken it back to an earlier checkpoint.
    """
    changed = max((number for number, event in enumerate(events) if event["event"] in CHANGED), default=-1)
    if changed > max((number for number, event in enumerate(events) if event["event"] == "started"), default=-1):
        return False
    numbers = [e["attempt"] for e in events if e.get("attempt") is not None]
    newest = [e for e in events if numbers and e.get("attempt") == max(numbers)]
    ends = [e["cause"] for e in newest if e["event"] == "attempt_ended"]
    if ends or any(e["event"] == "agent_started" for e in events):
        return bool(ends) and ends[-1] == "finished"
    names = {e["event"] for e in newest}  # of ranks that no agent watched, as with gpt.train
    return "finished" in names and "rank_failed" not in names


def fewer_nodes(events: Events) -> dict[int, dict[str, Any]]:
    """The attempts that ran on fewer nodes than the run asks for, each with its event: ``nodes``, ``asked``, ``cause``.

    Their steps take longer, and are never to be put together with those of the others.
    """
    return {event["attempt"]: event for event in events if event["event"] == FEWER_NODES}


def damaged_text(events: Events) -> str | None:
    """Name the checkpoints that were found damaged and set aside since the command was typed; None where none was."""
    found = [event["cause"] for event in events_since_submission(events) if event["event"] == "checkpoint_set_aside"]
    return f"damaged and set aside: {'; '.join(found)}" if found else None


def unread_text(folder: RunFolder) -> str | None:
    """Tell how many lines of the event log of a run could not be read; None where all could."""
    unread = folder.unread_events()
    if not unread:
        return None
    return f"{counted(unread, 'line')} of {folder.events} could not be read; what they told of the run is missing here"


def slow_ranks(events: Events) -> list[dict[str, Any]]:
    """Return the events of the ranks that are slow in the attempt that began last, by rank."""
    slow: dict[int, dict[str, Any]] = {}
    for event in events:
        if event["event"] in ("started", "attempt_ended", "finished", "stopped"):
            slow.clear()
        elif event["event"] == "straggler":
            slow[event["rank"]] = event
        elif event["event"] == "straggler_ended":
            slow.pop(event["rank"], None)
    return [slow[rank] for rank in sorted(slow)]


def uncopied_text(events: Events) -> str | None:
    """Tell since when checkpoints could not be copied elsewhere, and why; None where the last one could."""
    failed = _since(events, failure="copy_failed", success="copied")
    if not failed:
        return None
    cause, tried = failed[-1]["cause"], how_often(len(failed))
    return f"no checkpoint could be copied since {local_time(failed[0])} (tried {tried}): {cause}"


def unsaved_text(events: Events) -> str | None:
    """Tell since when checkpoints could not be written, and why; None where the last one could."""
    failed = _since(events, failure="save_failed", success="saved")
    if not failed:
        return None
    last, tried = failed[-1], how_often(len(failed))
    since = local_time(failed[0])
    return f"no checkpoint could be written since {since} (tried {tried}, last of step {last['step']}): {last['cause']}"


def skipped_text(events: Events) -> str | None:
    """Tell of the steps of the newest attempt that changed no weights, and where it went back; None where all did."""
    began = max((number for number, event in enumerate(events) if event["event"] == "started"), default=0)
    skipped = [event for event in events[began:] if event["event"] == "step_skipped"]
    back = [event for event in events[began:] if event["event"] == "rolled_back"]
    told = []
    if skipped:
        last = skipped[-1]
        told.append(
            f"{counted(len(skipped), 'step')} skipped in this attempt, last step {last['step']}: {last['cause']}"
        )
    if back:
        last = back[-1]
        told.append(f"gone back {how_often(len(back))}, last to step {last['step']}: {last['cause']}")
    return "; ".join(told) or None


def _since(events: Events, *, failure: str, success: str) -> list[dict[str, Any]]:
    """Return the events ``failure`` after the last event ``success``, oldest first."""
    last = max((number for number, event in enumerate(events) if event["event"] == success), default=-1)
    return [event for event in events[last + 1 :] if event["event"] == failure]


def local_time(event: Mapping[str, Any]) -> str:
    """Write the time of an event as a clock here shows it, to the minute."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(event["time"]))
