"""Information before a submission: warnings from earlier attempts, expected time, worst case, and the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
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
from launch.runs.files import read_json
from launch.runs.find import labels_inside
from launch.runs.folder import RunFolder
from launch.runs.records import RECENT, recent_records
from launch.slurm.limits import SlurmFacts, how_preempted
from launch.workload import CodeTree

# Warnings from earlier attempts.


MARGIN = 1.5
"""Factor of a proposed time over the measured time: the next save may be slower."""


def add_warnings(plan: Plan, config: Config, slurm: SlurmFacts | None = None) -> Plan:
    """Return the plan with its warnings from earlier attempts.

    Args:
        plan: plan of the point.
        config: config of the point.
        slurm: limits of the clusters where the point may run; None if they are not known.

    Raises:
        ConfigError: ``require_same_code`` is set, and the code or a library has changed since the last attempt.
    """
    found = (*_changes(plan, config), *_short_grace(plan, config, slurm))
    lines = [problem.warning().removeprefix("warning: ") for problem in found]
    return replace(plan, warnings=(*plan.warnings, *lines))


def _changes(plan: Plan, config: Config) -> Iterator[Problem]:
    """Warn of code that has changed since the last attempt, and of a checkpoint that could not be written."""
    folder = RunFolder(plan.run_dir)
    changed = changed_since(folder, _current(workload_of(config).code(config))) if folder.attempts() else None
    if changed is not None:
        if config.require_same_code:
            refuse_change(folder, *changed)
        found = f"changed since attempt {changed[0]}: {changed[1]}"
        yield Problem(found, "the same code and libraries in all attempts", "require_same_code=true to refuse a change")
    if unsaved := unsaved_text(folder.read_events()):
        yield Problem(unsaved, "a filesystem with room for a checkpoint", f"df -h {plan.run_dir}")


@cache
def _current(tree: CodeTree) -> dict[str, Any]:
    """Return the code and libraries of the next attempt. They are computed once for all points of a command."""
    return {"code": code_of(tree), "git": code_state(tree.root), "software": library_versions()}


def _short_grace(plan: Plan, config: Config, slurm: SlurmFacts | None) -> Iterator[Problem]:
    """Warn if Slurm would kill the run before its save ends, by measured times of saves and steps."""
    own, kind = RunFolder(plan.run_dir), plan.promised.checkpoint_kind
    folders = [own]
    if measure_stop(own) is None and kind:  # Checkpoints of the same kind take as long to write.
        plans = ((folder, read_json(folder.plan).get("promised") or {}) for folder in _other_runs(plan))
        folders = [folder for folder, promised in plans if promised.get("checkpoint_kind") == kind]
    known = [(*times, folder.path) for folder in folders if (times := measure_stop(folder)) is not None]
    if not known:
        return
    save_s, step_s, path = max(known, key=lambda one: one[0] + one[1])
    took, stop_s = f"a save took up to {save_s:.3g} s and a step {step_s:.3g} s in {path}", save_s + step_s
    saves = plan.promised.saves
    lost = "would lose the steps since its last periodic checkpoint" + (f" ({saves})" if saves else "")
    leads = {"resilience.grace_period_s": config.resilience.grace_period_s}
    leads |= {"cluster.signal_delay_s": config.cluster.signal_delay_s} if plan.cluster == "slurm" else {}
    if short := [key for key, value in leads.items() if stop_s > value]:
        found = f"{took}, and {' and '.join(f'{key}={leads[key]}' for key in short)}: a run that is stopped {lost}"
        wish = 10 * math.ceil(MARGIN * stop_s / 10)
        yield Problem(found, "time for a step and a save", " ".join(f"{key}={wish}" for key in short))
    for name, left in _preemption_graces(plan, slurm).items():
        if stop_s > left:
            found = f"{took}, and partition {name} gives a preempted job {left} s (GraceTime and KillWait): it {lost}"
            fix = plan.promised.saves_more_often or "a shorter interval between checkpoints"
            yield Problem(found, "checkpoints more often, which lose less", fix)


def measure_stop(folder: RunFolder) -> tuple[float, float] | None:
    """Return the longest of the last saves and the longest of the last steps of a run, in seconds.

    Together they are the time that a run needs to stop. None if no save was measured.
    """
    # A background save blocks the run for less than its duration, but the run waits for its last save.
    saved = [e for e in folder.read_events() if e["event"] == "saved" and "seconds" in e]
    saves = [max(e["seconds"], e.get("write_s", 0.0)) for e in saved]
    if not saves:
        return None
    steps = [record["step_time_s"] for record in recent_records(folder.metrics(0)) if "step_time_s" in record]
    return max(saves[-RECENT:]), max(steps, default=0.0)


def _preemption_graces(plan: Plan, slurm: SlurmFacts | None) -> dict[str, int]:
    """Return the partitions of the plan in which jobs are preempted -> seconds that a preempted job has left."""
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


def _other_runs(plan: Plan) -> list[RunFolder]:
    """Return the other runs in the sweep folder of a point, newest first."""
    own = Path(plan.run_dir)
    dated = sorted(((path.stat().st_mtime, path.parent) for path in own.parent.glob("*/plan.json")), reverse=True)
    return [RunFolder(path) for _, path in dated if path != own]


# Expected time of a point: by the step time of an earlier run of the same kind, or by the model of its workload.


SAME_PLACE = ("partition", "constraint", "gres", "gpus_per_node", "cpus_per_task")
"""Parameters of submitit that describe the kind of nodes."""
MIN_STEPS = 5
"""Smallest number of steps for an estimate. With fewer steps, start-up and warm-up dominate."""


def add_expected(plan: Plan) -> Plan:
    """Return the plan with the expected seconds of its remaining steps, without start-up; unchanged if unknown."""
    if plan.finished or plan.max_steps is None:
        return plan
    own = RunFolder(plan.run_dir)
    saves = saves_that_count(own.read_events()) if plan.promised.resumes else []
    done = max((save["step"] for save in saves if save["step"] is not None), default=0)
    steps = plan.max_steps - (done if plan.goes_on.back_to is None else plan.goes_on.back_to)
    for folder in (own, *_other_runs(plan)):
        if (step_s := _measured_step(folder, plan)) is not None:
            labels = {own.path: "this run"} if folder is own else labels_inside([own.path.parent])
            by = f"the {step_s:.3g} s a step of {labels.get(folder.path, folder.path.name)}, without start-up"
            return replace(plan, expected_s=steps * step_s, expected_by=by)
    if (model_s := plan.promised.step_s) is None:
        return plan
    by = f"an estimate of {model_s:.3g} s a step, without start-up, evaluation and saving"
    return replace(plan, expected_s=steps * model_s, expected_by=by)


def _measured_step(folder: RunFolder, plan: Plan) -> float | None:
    """Return the seconds of a step of the newest attempt of a run, with its share of evaluations and saves.

    None if the run is of another kind, or made too few steps.
    """
    if not plan.promised.step_kind or _kind_of(read_json(folder.plan)) != _kind_of(plan.as_dict()):
        return None
    fewer = fewer_nodes(folder.read_events())  # The next start has all nodes.
    records = [r for r in recent_records(folder.metrics(0)) if isinstance(r.get("time"), int | float)]
    records = [r for r in records if r["attempt"] not in fewer]
    records = [r for r in records if r["attempt"] == records[-1]["attempt"]]
    steps = records[-1]["step"] - records[0]["step"] if records else 0
    return (records[-1]["time"] - records[0]["time"]) / steps if steps >= MIN_STEPS else None


def _kind_of(plan: Mapping[str, Any]) -> list[Any]:
    """Return the properties of a ``plan.json`` that determine the time of a step."""
    slurm = (plan.get("slurm") or {}) if plan.get("cluster") == "slurm" else {}
    alike = [plan.get(key) for key in ("workload", "cluster", "nodes", "ranks_per_node")]
    return [*alike, (plan.get("promised") or {}).get("step_kind"), *map(slurm.get, SAME_PLACE)]


# Budget and worst case of a command.


def share_budget(plans: Sequence[Plan], configs: Sequence[Config]) -> list[Plan]:
    """Return the plans with the run folders that share their budget.

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
        worst = sum(map(_worst_of, unfinished(plans)), Use())
        longest = max(config.cluster.timeout_min for config in configs)
        refuse_above(first, sum(_used_before(plans, configs), Use()), worst, longest)
    return [replace(plan, command_run_dirs=tuple(other.run_dir for other in plans)) for plan in plans]


def _worst_of(plan: Plan) -> Use:
    """Return the worst case of one start, with zero GPU-hours or cost where they are not known."""
    return Use(plan.node_hours, plan.gpu_hours or 0.0, plan.cost or 0.0)


def _used_before(plans: Sequence[Plan], configs: Sequence[Config]) -> list[Use]:
    """Return the use of the earlier attempts of each point."""
    now, pairs = time.time(), zip(plans, configs, strict=True)
    return [used(read_event_logs([RunFolder(plan.run_dir)]), now, rates_of(config)) for plan, config in pairs]


def _sum_text(plans: Sequence[Plan], uses: Sequence[Use]) -> str:
    """Write the summed GPU-hours and cost, and node-hours, or hours of this machine if all points are local."""
    total = sum(uses, Use())
    if any(plan.cluster == "slurm" for plan in plans):
        return use_text(total)
    hours = sum(use.node_hours / plan.nodes_asked for plan, use in zip(plans, uses, strict=True))
    return ", ".join(filter(None, [f"{duration_text(3600 * hours)} on this machine", use_text(total, nodes=False)]))


def expected_text(plans: Sequence[Plan]) -> str:
    """Write the expected use of all points whose time is known, and the time of the longest; else empty."""
    known, uses = [plan for plan in plans if plan.expected_s is not None], []
    for plan in known:
        share = (plan.expected_s or 0.0) / (60 * plan.timeout_min)
        gpu_hours, cost = (None if value is None else share * value for value in (plan.gpu_hours, plan.cost))
        uses.append(Use(share * plan.node_hours, gpu_hours, cost))
    if not known:
        return ""
    longest = max(known, key=lambda plan: plan.expected_s or 0.0)
    most = f", {duration_text(longest.expected_s or 0.0)} for {longest.title}"
    is_told = len(known) == 1 and longest.cluster == "local"
    return f"{_sum_text(known, uses)}{'' if is_told else most}, by {longest.expected_by}"


def worst_case_text(plans: Sequence[Plan], configs: Sequence[Config]) -> str:
    """Write the worst case of one start of each point, the use so far, and the bounds of later starts."""
    ahead = unfinished(plans)
    if not ahead:
        return "worst case: nothing is left to run"
    of = "" if len(plans) == 1 else f" of {len(ahead)} of {len(plans)} points"
    limits = " or ".join(f"{limit} min" for limit in sorted({plan.timeout_min for plan in ahead}))
    parts = [f"worst case{of}: {_sum_text(ahead, [*map(_worst_of, ahead)])} (each to its time limit of {limits})"]
    if expected := expected_text(ahead):
        parts.append(f"expected: {expected}")
    before = _used_before(plans, configs)
    if any(use.node_hours for use in before):
        parts.append(f"used so far: {_sum_text(plans, before)}")
    on_slurm = [plan for plan in ahead if plan.cluster == "slurm"]
    if cap := [f"budget.{key}={value:g}" for key, value in caps(configs[0].budget).items()]:
        parts.append(f"at most {' and '.join(cap)} over all attempts")
    elif configs[0].resilience.requeue and on_slurm:
        # A requeue restarts the time limit of one job, not the limit of all jobs.
        largest = max(on_slurm, key=lambda plan: (plan.node_hours, plan.gpu_hours or 0.0))
        bound = "budget.gpu_hours=N caps it all" if largest.gpu_hours else "resilience.requeue=false allows none"
        parts.append(
            "each requeue (preemption, time limit, lost node) begins the time limit again: up to "
            f"{use_text(_worst_of(largest))} more for {largest.title} ({bound})"
        )
    return "; ".join(parts)


# The plan of a point in the dry run, and the announcement of a command before it submits.


def plan_text(plan: Plan) -> str:
    """Return the plan as text for people: one line for each fact, note, warning and candidate."""
    gpus = "" if plan.gpu_hours is not None else ", no GPUs requested"
    spares = f", and {plan.spares} spare" if plan.spares else ""
    worst = Use(plan.node_hours, plan.gpu_hours, plan.cost)
    on = f" ({counted(plan.nodes_asked, 'node')} for {plan.timeout_min} min)" if plan.cluster == "slurm" else ""
    fewer = " or ".join(map(str, plan.promised.fewer_nodes))
    rows = {
        "finished": "already: nothing is submitted; fresh=true runs it again in a new folder" if plan.finished else "",
        "goes": plan.goes_on.text(plan.max_steps),
        "nodes": f"{plan.nodes} x {plan.ranks_per_node} = {counted(plan.world_size, 'rank')} on {plan.cluster}{spares}",
        **plan.promised.rows,
        "lost nodes": f"continues with {fewer} in the same job, if no spare is left" if fewer else "",
        "worst case": f"{_sum_text([plan], [worst])}{gpus}{on}",
        "expected": expected_text([plan]),
        "folder": plan.run_dir,
        "nodes are": "the run's alone (cluster.exclusive)" if plan.slurm.get("exclusive") else "",
        "code": plan.code or "",
    }
    lines = [f"point {plan.title}", *(f"  {key:<11} {value}" for key, value in rows.items() if value)]
    for label, passage in plan.promised.notes.items():
        lines += [f"  {label if number == 0 else '':<11} {line}" for number, line in enumerate(passage)]
    lines += [f"  {'warning':<11} {warning}" for warning in plan.warnings]
    return "\n".join([*lines, *placement_lines(plan.placement)])


def announce_plans(plans: Sequence[Plan], configs: Sequence[Config], console: Console) -> None:
    """Print the finished points, how the others continue, their worst case, and the warnings."""
    lines = []
    if finished := [plan.title + _ran_elsewhere(plan) for plan in plans if plan.finished]:
        lines.append(f"finished already, and not submitted: {', '.join(finished)} (fresh=true uses a new folder)")
    lines += [f"{plan.title}: {text}" for plan in plans if (text := plan.goes_on.text(plan.max_steps))]
    lines += [worst_case_text(plans, configs)] if unfinished(plans) else []
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        names = [plan.title for plan in plans if warning in plan.warnings]
        where = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        lines.append(f"warning: {where}{warning}")
    for line in lines:
        console.print(as_typed(line))


def _ran_elsewhere(plan: Plan) -> str:
    """Return a remark that names the cluster where a finished point ran; empty if this command uses it too."""
    submitted = [event["cluster"] for event in RunFolder(plan.run_dir).read_events() if event["event"] == "submitted"]
    ran = submitted[-1] if submitted else plan.cluster
    return "" if ran == plan.cluster else f" (on {ran}, and so not compared with points on {plan.cluster})"


def plain_console(**options: Any) -> Console:
    """Return a console that prints texts as they are: brackets and numbers of a user are no markup."""
    return Console(**{"soft_wrap": True, "highlight": False, "markup": False, **options})
