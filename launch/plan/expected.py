"""The expected time of a point, beside its worst case: by an earlier run of the same kind, or by its workload's model.

Owns which earlier run speaks for a point, and what it says. Where nothing is known there is no figure. Writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from launch.plan.budget import Use, use_of, use_text
from launch.plan.plan import Plan
from launch.runs.events import fewer_nodes, saves_that_count
from launch.runs.files import read_json
from launch.runs.find import labels_inside
from launch.runs.folder import RunFolder
from launch.runs.records import recent_records

SAME_PLACE = ("partition", "constraint", "gres", "gpus_per_node", "cpus_per_task")
"""Parameters of submitit by which runs on Slurm had the same kind of nodes, as far as a plan knows."""
MIN_STEPS = 5
"""With fewer steps, start-up and warm-up are most of what was measured."""


@dataclass(frozen=True)
class Pace:
    """Seconds that the newest attempt of a run took: a step with its share of evaluations and saves, and the rest."""

    step_s: float
    around_s: float
    """From the start of the allocation to the first step, and from the last step to the end."""
    run: Path
    """Folder of the run."""


def add_expected(plan: Plan) -> Plan:
    """Return the plan with its expected time, where anything is known of it."""
    steps = steps_ahead(plan)
    if plan.finished or steps is None:
        return plan
    own = RunFolder(plan.run_dir)
    found = next((pace for folder in (own, *similar(plan)) if (pace := measure(folder, plan)) is not None), None)
    if found is not None:
        labels = labels_inside([own.path.parent])
        of = "this run" if found.run == own.path else labels.get(found.run, found.run.name)
        seconds, by = found.around_s + steps * found.step_s, f"the {found.step_s:.3g} s a step of {of}"
    elif plan.promised.step_s is not None:
        seconds = steps * plan.promised.step_s
        by = f"an estimate of {plan.promised.step_s:.3g} s a step, without start-up, evaluation and saving"
    else:
        return plan
    return replace(plan, expected_s=seconds, expected_by=by)


def steps_ahead(plan: Plan) -> int | None:
    """Steps that the next start has to make; None where nobody knows how many there are."""
    if plan.max_steps is None:
        return None
    saves = saves_that_count(RunFolder(plan.run_dir).read_events()) if plan.promised.resumes else []
    done = max((save["step"] for save in saves if save["step"] is not None), default=0)
    return plan.max_steps - (done if plan.goes_on.back_to is None else plan.goes_on.back_to)


def similar(plan: Plan) -> Iterator[RunFolder]:
    """The runs beside a point whose steps take as long, newest first."""
    beside = RunFolder(plan.run_dir).path.parent.glob("*/plan.json")
    dated = sorted(((path.stat().st_mtime, path) for path in beside), reverse=True)
    yield from (RunFolder(path.parent) for _, path in dated if str(path.parent) != plan.run_dir)


def measure(folder: RunFolder, plan: Plan) -> Pace | None:
    """The pace of a run; None where it was of another kind, or made too few steps."""
    there = read_json(folder.plan)
    if kind_of(there) != kind_of(plan.as_dict()) or not plan.promised.step_kind:
        return None
    events = folder.read_events()
    fewer = fewer_nodes(events)  # the next start has all nodes
    records = [r for r in recent_records(folder.metrics(0)) if isinstance(r.get("time"), int | float)]
    records = [r for r in records if r["attempt"] not in fewer]
    records = [r for r in records if r["attempt"] == records[-1]["attempt"]]
    if not records or records[-1]["step"] - records[0]["step"] < MIN_STEPS:
        return None
    first, last = records[0], records[-1]
    step_s = (last["time"] - first["time"]) / (last["step"] - first["step"])
    return Pace(step_s, around(events, last, step_s), folder.path)


def around(events: Sequence[dict[str, Any]], last: dict[str, Any], step_s: float) -> float:
    """Seconds of an allocation that the steps do not explain: before the first, and after the last."""
    begun = [e for e in events if e["event"] == "started" and e.get("attempt") == last["attempt"]]
    agents = [e for e in events if e["event"] == "agent_started" and begun and e["time"] <= begun[0]["time"]]
    if not agents:
        return 0.0
    first_start = next(e["time"] for e in events if e["event"] == "started" and e["time"] >= agents[-1]["time"])
    made = last["step"] - (begun[0].get("from_step") or 0)
    before = max(0.0, last["time"] - begun[0]["time"] - made * step_s)
    ended = [e["ended_at"] for e in events if e["event"] == "agent_ended" and e["ended_at"] >= last["time"]]
    return first_start - agents[-1]["allocated_at"] + before + (ended[0] - last["time"] if ended else 0.0)


def kind_of(plan: dict[str, Any]) -> tuple[Any, ...]:
    """Return the properties that two plans share whose steps take as long."""
    slurm = plan.get("slurm") or {}
    nodes = tuple(slurm.get(key) for key in SAME_PLACE) if plan.get("cluster") == "slurm" else ()
    step_kind = (plan.get("promised") or {}).get("step_kind")
    return plan.get("workload"), plan.get("cluster"), plan.get("nodes"), plan.get("ranks_per_node"), step_kind, nodes


def point_text(plan: Plan) -> str:
    """The expected time of one point with its use and where it is known from; empty where nothing is."""
    if plan.expected_s is None:
        return ""
    return f"{time_text(plan.expected_s)}, {use_text(expected_use(plan))}, by {plan.expected_by}"


def total_text(plans: Sequence[Plan]) -> str:
    """The expected use of all points together, as far as it is known."""
    ahead = [plan for plan in plans if not plan.finished]
    known = [plan for plan in ahead if plan.expected_s is not None]
    if not known:
        return ""
    if len(ahead) == 1:
        return f"expected: {point_text(known[0])}"
    total = expected_use(known[0])
    for plan in known[1:]:
        total += expected_use(plan)
    of = "" if len(known) == len(ahead) else f" of {', '.join(plan.title for plan in known)}"
    longest = max(plan.expected_s or 0.0 for plan in known)
    return f"expected{of}: {use_text(total)}, {time_text(longest)} for the longest point (dry_run=true says by what)"


def expected_use(plan: Plan) -> Use:
    """Describe the node-hours that the point is expected to use."""
    hours = (plan.expected_s or 0.0) / 3600
    worst_hours = plan.node_hours / plan.nodes_asked
    gpus = None if plan.gpu_hours is None else round(plan.gpu_hours / worst_hours)
    price = None if plan.cost is None or not plan.gpu_hours else plan.cost / plan.gpu_hours
    return use_of(hours, plan.nodes_asked, gpus, price)


def time_text(seconds: float) -> str:
    """An expected time for people: 90 s, 12 min, 2.4 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
