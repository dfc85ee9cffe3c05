"""Information before a submission: warnings from earlier attempts, expected time, worst case, and the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from rich.console import Console

from gpt_launch import as_typed
from launch.config import Config
from launch.config.compose import workload_of
from launch.errors import ConfigError, Problem, counted, duration_text
from launch.plan.budget import Use, caps, rates_of, read_event_logs, refuse_above, use_text, used
from launch.plan.placement import code_of, placement_lines
from launch.plan.plan import Plan, unfinished
from launch.runs.environment import changed_since, code_state, library_versions, refuse_change
from launch.runs.events import fewer_nodes, saves_that_count, unsaved_text
from launch.runs.folder import RunFolder
from launch.runs.records import RECENT, recent_records
from launch.slurm.limits import SlurmFacts, how_preempted
from launch.workload import CodeTree

# Warnings from earlier attempts.


MARGIN = 1.5
"""Proposed grace period divided by the measured time of a step and a save. The next save may be slower.
"""


def add_warnings(plan: Plan, config: Config, slurm: SlurmFacts | None = None) -> Plan:
    """Return the plan with additional warnings from earlier attempts.

    Args:
        plan: plan of the point.
        config: config of the point.
        slurm: limits of the cluster where the point may run; None if they are not known.

    Raises:
        ConfigError: ``require_same_code`` is set, and the code or a library has changed since the last attempt.
    """
    lines = [problem.warning().removeprefix("warning: ") for problem in _problems(plan, config, slurm)]
    return replace(plan, warnings=(*plan.warnings, *lines))


def _problems(plan: Plan, config: Config, slurm: SlurmFacts | None) -> Iterator[Problem]:
    """Yield problems that the earlier attempts of a point show; none if there were no attempts.

    They are: code that has changed, a last save that failed, and too little time to save before a stop.

    ``slurm`` has the limits of the cluster; None if they are not known.

    Raises:
        ConfigError: the code has changed, and ``require_same_code`` is true.
    """
    folder = RunFolder(plan.run_dir)
    changed = changed_since(folder, _current(workload_of(config).code(config))) if folder.attempts() else None
    if changed is not None:
        if config.require_same_code:
            refuse_change(folder, *changed)
        found = f"changed since attempt {changed[0]}: {changed[1]}"
        yield Problem(found, "the same code and libraries in all attempts", "require_same_code=true to refuse a change")
    if unsaved := unsaved_text(folder.read_events()):
        yield Problem(unsaved, "a filesystem with room for a checkpoint", f"df -h {plan.run_dir}")
    if (took := measure_stop(folder)) is None:
        return
    text, stop_s = f"a save took up to {took[0]:.3g} s and a step {took[1]:.3g} s", sum(took)
    lost = "loses the steps since its last periodic checkpoint"
    if stop_s > (grace_s := config.resilience.grace_period_s):
        found = f"{text}, and resilience.grace_period_s={grace_s}: a run that is stopped {lost}"
        fix = f"resilience.grace_period_s={10 * math.ceil(MARGIN * stop_s / 10)}"
        yield Problem(found, "time for a step and a save", fix)
    for name, left_s in _preemption_graces(plan, slurm).items():
        if stop_s > left_s:
            has = f"a job that partition {name} preempts has {left_s} s (GraceTime and KillWait)"
            found = f"{text}, and {has}: it {lost}"
            fix = plan.promised.saves_more_often or "a shorter interval between checkpoints"
            yield Problem(found, "checkpoints more often, which lose less", fix)


def _preemption_graces(plan: Plan, slurm: SlurmFacts | None) -> dict[str, int]:
    """Return partition -> seconds from the signal of a preemption to the kill, for the plan's partitions.

    Partitions whose jobs are not preempted, or only suspended, are left out. Empty if no limits are known.
    """
    found: dict[str, int] = {}
    if slurm is None or slurm.limits is None or plan.cluster != "slurm":
        return found
    for candidate in plan.placement.candidates:
        named = candidate.slurm.get("partition")
        for partition in slurm.limits.partitions:
            mode = how_preempted(slurm.limits, partition)
            is_used = partition.name in named.split(",") if named else partition.is_default
            if is_used and mode != "OFF" and "SUSPEND" not in mode:
                found[partition.name] = partition.grace_s + (slurm.limits.number("KillWait") or 0)
    return found


@cache
def _current(tree: CodeTree) -> dict[str, Any]:
    """Return the code and libraries of the next attempt, in the form of ``environment.json``.

    They are computed once for all points of a command.
    """
    return {"code": code_of(tree), "git": code_state(tree.root), "software": library_versions()}


def measure_stop(folder: RunFolder) -> tuple[float, float] | None:
    """Return (longest of the last saves, longest of the last steps) of a run in seconds.

    The sum is the time that a run needs to stop. None if no save was measured. The second value is 0 if no step time
    was recorded.
    """
    # A background save blocks the run for less than its duration, but the run waits for its last save.
    saved = [e for e in folder.read_events() if e["event"] == "saved" and "seconds" in e]
    saves = [max(e["seconds"], e.get("write_s", 0.0)) for e in saved]
    if not saves:
        return None
    steps = [record["step_time_s"] for record in recent_records(folder.metrics(0)) if "step_time_s" in record]
    return max(saves[-RECENT:]), max(steps, default=0.0)


# Expected time of a point: by the step time that the run has measured, or by the model of its workload.


MIN_STEPS = 5
"""Smallest number of steps for an estimate of the step time. With fewer steps, start-up and warm-up dominate."""


def add_expected(plan: Plan) -> Plan:
    """Return the plan with the expected seconds of its remaining steps, without start-up; unchanged if unknown."""
    if plan.finished or plan.max_steps is None:
        return plan
    own = RunFolder(plan.run_dir)
    events = own.read_events()
    saves = saves_that_count(events) if plan.promised.resumes else []
    done = max((save["step"] for save in saves if save["step"] is not None), default=0)
    steps = plan.max_steps - (done if plan.goes_on.back_to is None else plan.goes_on.back_to)
    fewer = fewer_nodes(events)  # The next start has all nodes.
    records = [r for r in recent_records(own.metrics(0)) if isinstance(r.get("time"), int | float)]
    records = [r for r in records if r["attempt"] not in fewer]
    records = [r for r in records if r["attempt"] == records[-1]["attempt"]]
    made = records[-1]["step"] - records[0]["step"] if records else 0
    if made >= MIN_STEPS:
        step_s = (records[-1]["time"] - records[0]["time"]) / made
        by = f"measured in this run: {step_s:.3g} s a step; start-up is not counted"
    elif (model_s := plan.promised.step_s) is not None:
        step_s = model_s
        by = f"estimated: {step_s:.3g} s a step; start-up, evaluation and saving are not counted"
    else:
        return plan
    return replace(plan, expected_s=steps * step_s, expected_by=by)


# Budget and worst case of a command.


def share_budget(plans: Sequence[Plan], configs: Sequence[Config]) -> list[Plan]:
    """Return the plans. Each gets the list of the run folders of all points, because all points share one budget.

    Raises:
        ConfigError: the caps differ between points, or the worst case exceeds a cap.
    """
    first = configs[0].budget
    for config in configs:
        if config.budget != first:
            raise ConfigError(
                f"points with {caps(first) or 'no budget'} and with {caps(config.budget) or 'no budget'}",
                "one budget: its caps are for all points of a command together",
                "one command for each, with its own budget.gpu_hours",
            )
    if caps(first) and unfinished(plans):
        worst = sum((plan.worst for plan in unfinished(plans)), Use())
        longest = max(config.cluster.timeout_min for config in configs)
        refuse_above(first, sum(_used_before(plans, configs), Use()), worst, longest)
    return [replace(plan, command_run_dirs=tuple(other.run_dir for other in plans)) for plan in plans]


def _used_before(plans: Sequence[Plan], configs: Sequence[Config]) -> list[Use]:
    """Return the use of the earlier attempts of each point until now, in the order of ``plans``."""
    now, pairs = time.time(), zip(plans, configs, strict=True)
    return [used(read_event_logs([RunFolder(plan.run_dir)]), now, rates_of(config)) for plan, config in pairs]


def _sum_text(plans: Sequence[Plan], uses: Sequence[Use]) -> str:
    """Return the sum of ``uses`` as text: node-hours, GPU-hours and cost. ``plans`` are those of the same points.

    If all points run on this machine, the text has hours in place of node-hours.
    """
    total = sum(uses, Use())
    if any(plan.cluster != "local" for plan in plans):
        return use_text(total)
    hours = sum(use.node_hours / plan.nodes_asked for plan, use in zip(plans, uses, strict=True))
    gpus = use_text(replace(total, node_hours=0.0))
    return ", ".join(filter(None, [f"{duration_text(3600 * hours)} on this machine", gpus]))


def expected_text(plans: Sequence[Plan]) -> str:
    """Return a text on the expected use of the points with a known duration, and how long the longest run takes.

    "" if no duration is known.
    """
    known = [plan for plan in plans if plan.expected_s is not None]
    if not known:
        return ""
    uses = [plan.worst.scaled((plan.expected_s or 0.0) / (60 * plan.timeout_min)) for plan in known]
    longest = max(known, key=lambda plan: plan.expected_s or 0.0)
    took = duration_text(longest.expected_s or 0.0)
    time_text = f", in {took}" if longest.cluster == "slurm" else ""
    if len(known) > 1:
        time_text = f"; the longest run, {longest.title}, takes {took}"
    return f"{_sum_text(known, uses)}{time_text} ({longest.expected_by})"


def worst_case_text(plans: Sequence[Plan], configs: Sequence[Config]) -> str:
    """Return lines of text on the node-hours, GPU-hours and cost of the points.

    The lines are: the worst case, if each unfinished point is started once and runs until its time limit; the expected
    use; the use so far; and the caps of the budget, which apply to all attempts together.
    """
    ahead = unfinished(plans)
    if not ahead:
        return "nothing is left to run"
    limits = " or ".join(f"{limit} min" for limit in sorted({plan.timeout_min for plan in ahead}))
    who = f"all {len(ahead)} runs last" if len(ahead) > 1 else "the run lasts"
    most = _sum_text(ahead, [plan.worst for plan in ahead])
    lines = [f"worst case: {most}, if {who} until the time limit of {limits}"]
    if expected := expected_text(ahead):
        lines.append(f"expected: {expected}")
    before = _used_before(plans, configs)
    if any(use.node_hours for use in before):
        lines.append(f"used so far: {_sum_text(plans, before)}")
    if cap := [f"budget.{key}={value:g}" for key, value in caps(configs[0].budget).items()]:
        lines.append(f"limit: {' and '.join(cap)} for all attempts together")
    elif configs[0].resilience.requeue and any(plan.cluster == "slurm" for plan in ahead):
        lines.append("a requeued job may use as much again; budget.gpu_hours=N limits all attempts together")
    return "\n".join(lines)


# The plan of a point in the dry run, and the announcement of a command before it submits.


def plan_text(plan: Plan) -> str:
    """Return the plan as text for people: one line for each fact, note, warning and candidate."""
    gpus = "" if plan.gpu_hours is not None else ", no GPUs requested"
    spares = f", and {plan.spares} spare" if plan.spares else ""
    on = f" ({counted(plan.nodes_asked, 'node')} for {plan.timeout_min} min)" if plan.cluster != "local" else ""
    fewer = " or ".join(map(str, plan.promised.fewer_nodes))
    rows = {
        "finished": "already: nothing is submitted; fresh=true runs it again in a new folder" if plan.finished else "",
        "goes": plan.goes_on.text(plan.max_steps),
        "nodes": f"{plan.nodes} x {plan.ranks_per_node} = {counted(plan.world_size, 'rank')} on {plan.cluster}{spares}",
        **plan.promised.rows,
        "lost nodes": f"continues with {fewer} in the same job, if no spare is left" if fewer else "",
        "worst case": f"{_sum_text([plan], [plan.worst])}{gpus}{on}",
        "expected": expected_text([plan]),
        "folder": plan.run_dir,
        "nodes are": "the job's alone (cluster.exclusive)" if plan.slurm.get("exclusive") else "",
        "job": f"one for {', '.join(plan.job_points)}, side by side" if plan.job_points else "",
        "code": plan.code or "",
    }
    lines = [f"point {plan.title}", *(f"  {key:<11} {value}" for key, value in rows.items() if value)]
    for label, passage in plan.promised.notes.items():
        lines += [f"  {label if number == 0 else '':<11} {line}" for number, line in enumerate(passage)]
    lines += [f"  {'warning':<11} {warning}" for warning in plan.warnings]
    return "\n".join([*lines, *placement_lines(plan.placement)])


def announce_plans(plans: Sequence[Plan], configs: Sequence[Config], console: Console) -> None:
    """Print what a submission will do.

    The lines are: the finished points, how the other points continue, their use of resources
    (``worst_case_text``), and the warnings.
    """
    lines = []
    if finished := [plan.title for plan in plans if plan.finished]:
        lines.append(f"finished already, and not submitted: {', '.join(finished)} (fresh=true uses a new folder)")
    lines += [f"{plan.title}: {text}" for plan in plans if (text := plan.goes_on.text(plan.max_steps))]
    lines += [worst_case_text(plans, configs)] if unfinished(plans) else []
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        names = [plan.title for plan in plans if warning in plan.warnings]
        where = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        lines.append(f"warning: {where}{warning}")
    for line in lines:
        console.print(as_typed(line))
