"""Takeover of a job whose head node is lost: the next node that is there puts it into the queue.

Owns who takes over, and with which attempt. Must not know what is decided after an attempt. Torch-free.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from launch.agent.node import Node
from launch.agent.outcome import apply_decision
from launch.agent.requeue import wait_for_controller
from launch.agent.restart_policy import Action, Cause, RunFailedError, RunSettledError
from launch.config import Config
from launch.runs.events import events_since_submission
from launch.runs.folder import RunFolder
from launch.scheduler import client as scheduler

TAKE_OVER_S = 3.0
"""Time that each node leaves to the one before it."""


def take_over_as_leader(folder: RunFolder, node: Node, config: Config, why: str, known: int | None) -> None:
    """On another node: the head node, which decides, is lost. The next node that is there puts the job into the queue.

    Args:
        known: newest attempt that the head node has announced to this one; None where it has announced none.

    Raises:
        RunFailedError: always where this node could do nothing more; the job's end is the head node's.
    """
    time.sleep(TAKE_OVER_S * (node.index - 1))  # those before this one come first
    if not node.is_slurm:
        raise RunFailedError(f"the head node, {node.host_of(0)}, is lost: {why}")
    events = events_since_submission(folder.read_events())
    if is_given_up(events, node):
        raise RunFailedError(f"{node.host} was cut off, and the others go on without it: {why}")
    attempt = orphaned_attempt(events, node, known)
    folder.record_event("node_lost", attempt=attempt, node=0, host=node.host_of(0), cause=why)
    try:
        apply_decision(folder, node, config, attempt, Cause.node_failed, f"node {node.host_of(0)} is lost: {why}")
    except RunSettledError:
        raise
    except RunFailedError:
        # Nobody else would end what is left of the job.
        wait_for_controller(folder, lambda: scheduler.cancel(node.slurm_job))
        raise


def is_given_up(events: Sequence[dict[str, Any]], node: Node) -> bool:
    """Tell whether the head node of this start of the job takes this node for lost: then it works on, and decides."""
    began = max((number for number, e in enumerate(events) if e["event"] == "agent_started"), default=0)
    return any(e["event"] == "node_lost" and e["host"] == node.host for e in events[began:])


def orphaned_attempt(events: Sequence[dict[str, Any]], node: Node, known: int | None) -> int | None:
    """Return the attempt that a lost head node has left to its other nodes; None where it fell between two attempts.

    Args:
        events: the event log since the submission.
        known: newest attempt that the head node has announced to this one; None where it has announced none.

    Raises:
        RunFailedError: the head node has gone on without this one, which was cut off, or has decided what follows.
    """
    begun = [i for i, e in enumerate(events) if e["event"] == "agent_started" and e["job"] == node.job]
    events = events[begun[-1] :] if begun else events
    started = max((e["attempt"] for e in events if e["event"] == "started"), default=None)
    if started is not None and (known is None or started > known):
        raise RunFailedError(f"attempt {started} was started without {node.host}, which had been cut off")
    if not any(e["event"] == "attempt_ended" and e["attempt"] == known for e in events):
        return known
    decided = [e["action"] for e in events if e["event"] == "decided"]
    if decided and decided[-1] == Action.restart:
        return None
    raise RunFailedError(f"the head node, {node.host_of(0)}, is lost, and has decided what follows attempt {known}")
