"""A plan as text: resources, expected time and cost, and the announcement of a sweep."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from launch.config import Config
from launch.errors import ConfigError, counted
from launch.plan import placement
from launch.plan.budget import Use, caps, rates_of, read_event_logs, refuse_above, use_of, use_text, used
from launch.plan.plan import Plan, unfinished
from launch.runs.events import fewer_nodes, saves_that_count
from launch.runs.files import read_json
from launch.runs.find import labels_inside
from launch.runs.folder import RunFolder
from launch.runs.records import recent_records

# The expected time of a point, beside its worst case: by an earlier run of the same kind, or by its workload's
# model.


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
    """The pace of a run; None if it was of another kind, or made too few steps."""
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


# A plan as a person reads it, in the dry run and in the output of a batch script.


def plan_text(plan: Plan) -> str:
    """The plan as a person reads it."""
    gpus = "" if plan.gpu_hours is not None else ", no GPUs asked for"
    spares = f", and {plan.spares} spare" if plan.spares else ""
    done = {"finished": "already: nothing is submitted; fresh=true runs it again in a new folder"}
    rows = {
        **(done if plan.finished else {}),
        **({"goes": going_on} if (going_on := plan.goes_on.text(plan.max_steps)) else {}),
        "nodes": f"{plan.nodes} x {plan.ranks_per_node} = {counted(plan.world_size, 'rank')} on {plan.cluster}{spares}",
        **plan.promised.rows,
        **({"lost nodes": fewer_text(plan.promised.fewer_nodes)} if plan.promised.fewer_nodes else {}),
        "worst case": f"{use_text(Use(plan.node_hours, plan.gpu_hours, plan.cost))}{gpus} ("
        f"{counted(plan.nodes_asked, 'node')} for {plan.timeout_min} min)",
        **({"expected": point_text(plan)} if plan.expected_s is not None else {}),
        "folder": plan.run_dir,
    }
    rows |= {"nodes are": "the run's alone (cluster.exclusive)"} if plan.slurm.get("exclusive") else {}
    rows |= {"code": plan.code} if plan.code else {}
    lines = [f"point {plan.title}", *(f"  {key:<11} {value}" for key, value in rows.items())]
    for label, passage in plan.promised.notes.items():
        lines += [f"  {label if number == 0 else '':<11} {line}" for number, line in enumerate(passage)]
    lines += [f"  {'warning':<11} {warning}" for warning in plan.warnings]
    return "\n".join([*lines, *placement.text(plan.placement)])


def fewer_text(sizes: Sequence[int]) -> str:
    """Numbers of nodes that a run continues with, for people."""
    return f"goes on with {' or '.join(map(str, sizes))} in the same job, where no spare is left"


def worst_of(plans: Sequence[Plan]) -> Use:
    """Worst case of one start of every point that is not finished. Points without GPUs add no GPU-hours."""
    ahead = [plan for plan in plans if not plan.finished]
    return sum((Use(plan.node_hours, plan.gpu_hours or 0.0, plan.cost or 0.0) for plan in ahead), Use())


def used_before(plans: Sequence[Plan], configs: Sequence[Config]) -> Use:
    """Use of the earlier attempts of these points."""
    now = time.time()
    uses = (
        used(read_event_logs([RunFolder(plan.run_dir)]), now, rates_of(config))
        for plan, config in zip(plans, configs, strict=True)
    )
    return sum(uses, Use())


def share_budget(plans: Sequence[Plan], configs: Sequence[Config]) -> list[Plan]:
    """The plans, each knowing the run folders that it shares the budget with.

    Raises:
        ConfigError: the caps differ between points, or the worst case goes above one.
    """
    first = configs[0].budget
    for config in configs:
        if config.budget != first:
            raise ConfigError(
                f"points with {caps(first) or 'no budget'} and with {caps(config.budget) or 'no budget'}",
                "one budget: its caps are for all points of a command together",
                "one command for each, with its own budget.gpu_hours",
            )
    if caps(first) and not all(plan.finished for plan in plans):
        longest = max(config.cluster.timeout_min for config in configs)
        refuse_above(first, used_before(plans, configs), worst_of(plans), longest)
    return [replace(plan, command_run_dirs=tuple(other.run_dir for other in plans)) for plan in plans]


def worst_case_text(plans: Sequence[Plan], configs: Sequence[Config]) -> str:
    """The worst case as a person reads it: of one start, what was used before, and what bounds the rest."""
    ahead = sum(not plan.finished for plan in plans)
    if not ahead:
        return "worst case: nothing is left to run"
    every = f"all {ahead}" if ahead == len(plans) else f"the {ahead} other"
    head = "worst case" if len(plans) == 1 else f"worst case of {every} point{'' if ahead == 1 else 's'}"
    limits = {plan.timeout_min for plan in plans if not plan.finished}
    limit = f" of {limits.pop()} min" if len(limits) == 1 else ""
    text = f"{head}: {use_text(worst_of(plans))} (every node to its time limit{limit})"
    text += "; ".join(["", known]) if (known := total_text(plans)) else ""
    before = used_before(plans, configs)
    if before.node_hours:
        text += f"; used so far: {use_text(before)}"
    cap = [f"budget.{key}={value:g}" for key, value in caps(configs[0].budget).items()]
    if cap:
        return f"{text}; at most {' and '.join(cap)} over all attempts"
    requeues = configs[0].resilience.requeue and any(plan.cluster == "slurm" and not plan.finished for plan in plans)
    return f"{text}; {requeue_text(plans)}" if requeues else text


def requeue_text(plans: Sequence[Plan]) -> str:
    """Say what a requeue can add to the worst case: the time limit of one job begins again, not that of all."""
    ahead = [plan for plan in plans if not plan.finished and plan.cluster == "slurm"]
    largest = max(ahead, key=lambda plan: (plan.node_hours, plan.gpu_hours or 0.0))
    once = use_text(worst_of([largest]))
    each = f"each requeue (preemption, time limit, lost node) begins the time limit again: up to {once} more"
    of = f" for {largest.title}" if len(ahead) > 1 else ""
    cap = "budget.gpu_hours=N caps it all" if largest.gpu_hours else "resilience.requeue=false allows none"
    return f"{each}{of} ({cap})"


# Announcement of a sweep before it is submitted: what is finished, where the rest continues, and the worst case.


def announce(plans: Sequence[Plan], configs: Sequence[Config], console: Console) -> None:
    """Print which points are finished, where the others go on, their worst case, and what the plans warn of."""
    show_finished(plans, console)
    for plan in plans:
        if text := plan.goes_on.text(plan.max_steps):
            console.print(f"{plan.title}: {text}", highlight=False, markup=False)
    if unfinished(plans):
        console.print(worst_case_text(plans, configs), highlight=False, markup=False)
    show_warnings(plans, console)


def show_finished(plans: Sequence[Plan], console: Console) -> None:
    """Say which points are finished already, and how to run them again."""
    finished = [plan for plan in plans if plan.finished]
    names = [plan.title + ran_elsewhere(plan) for plan in finished]
    if names:
        them = "it again in a new folder" if len(names) == 1 else "them again in new folders"
        text = f"finished already, and not submitted: {', '.join(names)} (fresh=true runs {them})"
        console.print(text, highlight=False, markup=False)


def ran_elsewhere(plan: Plan) -> str:
    """Say where a finished point ran, if it was not on the cluster that this command is for."""
    ran = next(
        (e["cluster"] for e in reversed(RunFolder(plan.run_dir).read_events()) if e["event"] == "submitted"), None
    )
    return "" if ran in (None, plan.cluster) else f" (on {ran}, and so not compared with points on {plan.cluster})"


def show_warnings(plans: Sequence[Plan], console: Console) -> None:
    """Print what the plans warn of; a warning that several points share once."""
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        names = [plan.title for plan in plans if warning in plan.warnings]
        where = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        console.print(f"warning: {where}{warning}", highlight=False, markup=False)
