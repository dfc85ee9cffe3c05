"""``python -m launch.status [PATH...]``: state of runs, from the queue, their event logs and their newest steps.

Prints a table or JSON. Needs no accounting in Slurm, works for local runs, and changes nothing.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import gpt_launch.own_names  # noqa: F401
from gpt_launch import as_typed
from launch.errors import CommandParser, duration_text, refusing
from launch.runs.events import damaged_text, skipped_text, straggling_ranks, uncopied_text, unread_text, unsaved_text
from launch.runs.find import find_runs, natural, plain_console, print_table
from launch.runs.folder import is_full
from launch.runs.measured import usage_text
from launch.runs.records import UNITS
from launch.slurm.client import SlurmError
from launch.slurm.follow import quiet_text, speed_text
from launch.slurm.status import (
    RunStatus,
    adopt_found,
    events_since_start,
    find_run_statuses,
    poll,
    update_from_event_log,
    verdict_of,
    why_not_restarted,
)

COLUMNS = ("point", "state", "job", "nodes", "attempt", "step", "throughput", "loss", "ETA")
SLOW = ("rank", "host", "step", "own_s", "median_s", "steps")
"""Fields of a slow rank in ``--json``.

``own_s`` is the mean own time of the rank in seconds, over ``steps`` steps: step time without waits for other ranks.
``median_s`` is the median of the same means of the other ranks, in seconds.
"""


def as_dict(point: RunStatus) -> dict[str, Any]:
    """Return the state of a run for ``--json``. Unknown values are absent."""
    events, since = point.events(), point.job_status.since
    failure = point.failure() if point.state in ("failed", "running", "pending") else None
    verdict = verdict_of(point)
    known = {
        "point": point.folder.point,
        "label": point.name,
        "run_dir": str(point.folder.path),
        "state": point.state,
        "detail": point.detail or None,
        "advice": point.advice or None,
        "damage": point.damage
        or damaged_text(events)
        or unread_text(point.folder)
        or ("its filesystem has no room" if is_full(point.folder.path) else None),
        "early": next((e["early"] for e in reversed(events) if e.get("early")), None)
        if point.state == "finished"
        else None,
        "unsaved": unsaved_text(events),
        "uncopied": uncopied_text(events),
        "skipped": skipped_text(events),
        "partition": point.job_status.partition or None,
        "waiting_s": None if point.state != "pending" or since is None else max(0.0, time.time() - since),
        "job_id": None if point.job is None else point.job.job_id,
        "nodes": point.nodes,
        "fewer_nodes": point.fewer_nodes() if point.state == "running" else None,
        "attempt": max(point.attempts(), default=None),
        "step": point.latest.get("step"),
        "max_steps": point.max_steps,
        **{f"{unit}_per_s": point.latest.get(f"{unit}_per_s") for unit in UNITS},
        "loss": point.latest.get("loss"),
        "eta_s": point.eta_s,
        "quiet_s": point.quiet_s,
        "slow_ranks": [{key: event.get(key) for key in SLOW} for event in straggling_ranks(events)] or None,
        "sick_nodes": sick_nodes(point) or None,
        "not_restarted": why_not_restarted(events),
        "usage": usage_text(point.folder) or None,
        "verdict": verdict and {"kind": verdict.kind, "cause": verdict.sentence, "fix": verdict.fix},
        "failure": failure and {key: failure.get(key) for key in ("attempt", "rank", "host", "step", "cause", "log")},
    }
    return {key: value for key, value in known.items() if value is not None}


def sick_nodes(point: RunStatus) -> list[dict[str, Any]]:
    """Return ``host`` and ``cause`` of each sick node that the newest start left out, or that prevented the start."""
    newest = max(point.attempts(), default=0)
    now = events_since_start(point.events())  # The start did not begin.
    found = [e for e in point.events() if e["event"] == "node_sick" and (e in now or e["attempt"] == newest)]
    return [{"host": e["host"], "cause": e["cause"]} for e in found]


def cells(known: dict[str, Any]) -> list[str]:
    """Return the row of a run in the table, one text for each of ``COLUMNS``. ``known`` comes from ``as_dict``."""
    total = f"/{known['max_steps']}" if "max_steps" in known else ""
    step = f"{known.get('step', 0)}{total}" if total or "step" in known else ""
    return [
        known["label"],
        known["state"],
        known.get("job_id", ""),
        nodes_text(known),
        str(known.get("attempt", "")),
        step,
        speed_text(known),
        f"{known['loss']:.4f}" if "loss" in known else "",
        duration_text(round(known["eta_s"])) if "eta_s" in known else "",
    ]


def nodes_text(known: dict[str, Any]) -> str:
    """Return the number of nodes as text; ``1 of 2`` while the run continues on fewer nodes than requested.

    ``known`` comes from ``as_dict``.
    """
    fewer = known.get("fewer_nodes")
    return str(known.get("nodes", "")) if fewer is None else f"{fewer['nodes']} of {fewer['asked']}"


def status_notes(known: dict[str, Any]) -> list[str]:
    """Return the lines about a run below the table: why it waits or failed, problems, and what to type.

    ``known`` comes from ``as_dict``.
    """
    where = f" in partition {known['partition']}" if "partition" in known else ""
    where += f" for {duration_text(round(known['waiting_s']))}" if "waiting_s" in known else ""
    why = f", {known['detail']}" if "detail" in known else ""
    lines = [f"{known['state']}{where}{why}"] if where or why else []
    lines += [f"finished early: {known['early']}"] if "early" in known else []
    lines += [known[name] for name in ("advice", "damage", "unsaved", "uncopied", "skipped") if name in known]
    lines += [quiet_text(known["quiet_s"])] if "quiet_s" in known else []
    for one in known.get("slow_ranks", ()):
        host = f" on {one['host']}" if one["host"] else ""
        times = f"{1000 * one['own_s']:,.1f} ms of its own a step, and the median {1000 * one['median_s']:,.1f} ms"
        lines.append(f"rank {one['rank']}{host} is slow: {times} (over {one['steps']} steps up to {one['step']})")
    lines += [f"node {one['host']} is sick and was left out: {one['cause']}" for one in known.get("sick_nodes", ())]
    if "fewer_nodes" in known:
        lines.append(f"continues with {nodes_text(known)} nodes: {known['fewer_nodes']['cause']}")
    failure = known.get("failure")
    if failure is not None:
        lines.append(f"log: {failure['log']}")
    if "verdict" in known:
        lines += [f"why: {known['verdict']['cause']}", f"type next: {known['verdict']['fix']}"]
    if "not_restarted" in known:
        lines.append(f"not started again: {known['not_restarted']}")
    lines += [known["usage"]] if "usage" in known else []
    return [f"{known['label']}: {line}" for line in lines]


def show_statuses(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print a table and notes for each sweep, with the path of the sweep's folder as heading.

    ``rows`` are the runs of all sweeps, each as ``as_dict`` returns it.
    """
    sweeps: dict[Path, list[dict[str, Any]]] = {}
    for row in rows:
        sweeps.setdefault(Path(row["run_dir"]).parent, []).append(row)
    for folder, inside in sweeps.items():
        console.print(str(folder))
        inside = sorted(inside, key=lambda row: natural(row["label"]))
        print_table(console, COLUMNS, [cells(row) for row in inside], left=COLUMNS[:3])
        for line in (line for row in inside for line in status_notes(row)):
            console.print(as_typed(line))


@refusing
def main(arguments: Sequence[str] | None = None) -> int:
    """Print the states of runs, as a table or as JSON.

    Returns the exit status: 0; 1 if Slurm did not answer, so that only event logs were read; 2 if there is no run.
    """
    parser = CommandParser(prog="python -m launch.status", description="Show the state of runs.")
    parser.add_argument(
        "paths", nargs="*", type=Path, default=[Path("outputs")], metavar="PATH",
        help="a run folder, a folder with runs in it, or the label of a run (default: outputs)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print a list of objects; unknown values are absent")
    args = parser.parse_intermixed_args(arguments)
    points = find_run_statuses(find_runs(args.paths))
    problem = poll(points, trust_log=True)
    try:
        adopt_found(points)
    except SlurmError as error:
        problem = problem or error
    if problem is not None:
        update_from_event_log(points)
    rows = [as_dict(point) for point in points]
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        show_statuses(rows, plain_console())
    if problem is not None:
        print(f"{problem}\nstates of Slurm jobs are what their event logs say", file=sys.stderr)
    return 0 if problem is None else 1


if __name__ == "__main__":
    sys.exit(main())
