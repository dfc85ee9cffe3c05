"""The ``submitted`` event of a run: which job works on it, and where.

The launcher enters it when sbatch has answered. One that dies in between leaves a job that nobody knows: its agent then
enters it when it starts, or a command that finds the job in the queue. Must not know how a job is submitted.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from typing import Any

from launch.errors import ConfigError
from launch.plan.plan import Plan
from launch.runs.damage import read_plan
from launch.runs.events import Events
from launch.runs.folder import RunFolder


def record_submitted(
    plan: Plan, job_id: str, candidate: int = 0, *, moved: bool = False, pid_started: str | None = None
) -> None:
    """Enter a submission into the event log; ``moved`` where the run waited elsewhere before.

    ``pid_started`` tells a local job, whose id is a process's, from others that get the same id later.

    The agent of a job that started at once may have been faster (``record_found``).
    """
    folder = RunFolder(plan.run_dir)
    if plan.cluster == "slurm" and is_recorded([e for e in folder.read_events() if "by" in e], [job_id]):
        return
    where = {"cluster": plan.cluster, "job_id": job_id, "host": os.uname().nodename, "nodes": plan.nodes}
    place = {"candidate": candidate, **plan.placement.candidates[candidate].as_event()}
    rest = ({"moved": True} if moved else {}) | ({} if pid_started is None else {"pid_started": pid_started})
    folder.record_event("submitted", **where, **place, **rest)


def record_found(folder: RunFolder, job_id: str, nodes: int, by: str) -> None:
    """Enter a Slurm job that its launcher could not enter any more, as far as the plan and the event log tell.

    The candidate is the one that the run was on its way to, or else the first: which others sbatch had refused is lost.
    """
    events = folder.read_events()
    moved = on_its_way(events)
    found: dict[str, Any] = {"cluster": "slurm", "job_id": job_id, "host": os.uname().nodename, "nodes": nodes}
    try:
        plan = Plan.from_dict(read_plan(folder))
        possible = plan.placement.possible
        candidate = moved["candidate"] if moved is not None else possible[0] if possible else 0
        found |= {"nodes": plan.nodes, "candidate": candidate, **plan.placement.candidates[candidate].as_event()}
    except (ConfigError, KeyError, TypeError, IndexError):  # without a plan it is still a job that can be cancelled
        found["candidate"] = 0
    folder.record_event("submitted", **found, by=by, **({"moved": True} if moved is not None else {}))


def is_recorded(events: Events, names: Collection[str]) -> bool:
    """Tell whether the event log has the submission of the job with one of these ids."""
    return any(event["event"] == "submitted" and str(event["job_id"]) in names for event in events)


def on_its_way(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last ``moved`` where no submission has followed it; None elsewhere."""
    last = next((event for event in reversed(events) if event["event"] in ("submitted", "moved")), None)
    return last if last is not None and last["event"] == "moved" else None
