"""Information before a submission: warnings from earlier attempts, expected time, worst case, and the plan."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from launch.config import ClusterKind, Config
from launch.config.compose import workload_of
from launch.errors import ConfigError, Problem, counted, duration_text
from launch.plan.budget import Use, caps, rates_of, read_event_logs, refuse_above, use_text, used
from launch.plan.placement import cluster_of, code_of, placement_lines, settle_key
from launch.plan.plan import Plan, unfinished
from launch.runs.environment import changed_since, code_state, library_versions, refuse_change
from launch.runs.events import fewer_nodes, saves_that_count, unsaved_text
from launch.runs.files import read_json
from launch.runs.find import labels_inside
from launch.runs.folder import RunFolder
from launch.runs.records import RECENT, recent_records
from launch.slurm.limits import Limits, how_preempted
from launch.workload import CodeTree

# Points of a sweep on Slurm must not slow each other down: exclusive nodes, and sequential submission.


WHY = (
    "cluster.exclusive=true: points of a sweep over nodes or ranks would measure each other on shared nodes "
    "(cluster.exclusive=false shares them; a site may charge whole nodes)"
)


def settle_exclusive(documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind]) -> str:
    """Request exclusive nodes for the points of a sweep over nodes or ranks, if the command leaves that open.

    The arguments are those of ``settle_key``.

    Returns:
        A remark for people; empty if nothing changed.
    """
    sizes = {config.world_size for config, kind in zip(configs, kinds, strict=True) if kind is ClusterKind.slurm}

    def choose(config: Config) -> tuple[bool | None, str]:
        cluster = config.cluster
        is_open = cluster.exclusive is None and "exclusive" not in cluster.additional_parameters
        return (True, WHY) if len(sizes) > 1 and is_open else (None, "")

    return "".join(settle_key("exclusive", choose, documents, configs, kinds))


def wait_for(plan: Plan, before: Sequence[str]) -> Plan:
    """Return the plan of a point that starts after the jobs ``before`` and after the user's own dependencies.

    Points of one job array run one at a time.
    """

    def after(slurm: dict[str, Any]) -> dict[str, Any]:
        if not before:
            return slurm | {"array_parallelism": 1}
        own = dict(slurm["additional_parameters"])
        dependencies = [own.pop("dependency", None), f"afterany:{':'.join(dict.fromkeys(before))}"]
        text = ",".join(filter(None, dependencies))
        return slurm | {"additional_parameters": own, "dependency": text, "array_parallelism": 1}

    candidates = [replace(one, slurm=after(one.slurm)) for one in plan.placement.candidates]
    return plan.replace_placement(replace(plan.placement, candidates=tuple(candidates)))


# Warnings from earlier attempts.


TAKEOVER_S = 10
"""Seconds that another agent needs to requeue a job after the head node counts as lost."""
MARGIN = 1.5
"""Factor of a proposed time over the measured time: the next save may be slower."""


def add_warnings(plan: Plan, config: Config, limits: Mapping[str | None, Limits] | None = None) -> Plan:
    """Return the plan with its warnings from earlier attempts.

    Args:
        plan: plan of the point.
        config: config of the point.
        limits: limits of the clusters where the point may run, by name, if known; None is the local cluster.

    Raises:
        ConfigError: ``require_same_code`` is set, and the code or a library has changed since the last attempt.
    """
    known = limits or {}
    found = (
        *_changed_code(plan, config),
        *_unsaved(plan),
        *_short_grace(plan, config, known),
        *_late_takeover(plan, config, known),
    )
    lines = [problem.warning().removeprefix("warning: ") for problem in found]
    return replace(plan, warnings=(*plan.warnings, *lines))


def _changed_code(plan: Plan, config: Config) -> Iterator[Problem]:
    folder = RunFolder(plan.run_dir)
    changed = changed_since(folder, _current(workload_of(config).code(config))) if folder.attempts() else None
    if changed is None:
        return
    if config.require_same_code:
        refuse_change(folder, *changed)
    found = f"changed since attempt {changed[0]}: {changed[1]}"
    yield Problem(found, "the same code and libraries in all attempts", "require_same_code=true to refuse a change")


@cache
def _current(tree: CodeTree) -> dict[str, Any]:
    """Return the code and libraries of the next attempt. They are computed once for all points of a command."""
    return {"code": code_of(tree), "git": code_state(tree.root), "software": library_versions()}


def _unsaved(plan: Plan) -> Iterator[Problem]:
    found = unsaved_text(RunFolder(plan.run_dir).read_events())
    if found is not None:
        yield Problem(found, "a filesystem with room for a checkpoint", f"df -h {plan.run_dir}")


def _short_grace(plan: Plan, config: Config, limits: Mapping[str | None, Limits]) -> Iterator[Problem]:
    """Warn if Slurm would kill the run before its save ends, by measured times of saves and steps."""
    known = _longest_stop(plan)
    if known is None:
        return
    took = f"a save took up to {known.save_s:.3g} s and a step {known.step_s:.3g} s in {known.folder}"
    saves = plan.promised.saves
    lost = "would lose the steps since its last periodic checkpoint" + (f" ({saves})" if saves else "")
    wish = 10 * math.ceil(MARGIN * known.stop_s / 10)
    leads = {"resilience.grace_period_s": config.resilience.grace_period_s}
    leads |= {"cluster.signal_delay_s": config.cluster.signal_delay_s} if plan.cluster == "slurm" else {}
    short = [key for key, value in leads.items() if known.stop_s > value]
    if short:
        values = " and ".join(f"{key}={leads[key]}" for key in short)
        found = f"{took}, and {values}: a run that is stopped {lost}"
        yield Problem(found, "time for a step and a save", " ".join(f"{key}={wish}" for key in short))
    for name, left in _preemption_graces(plan, limits) if plan.cluster == "slurm" else ():
        if known.stop_s > left:
            found = f"{took}, and partition {name} gives a preempted job {left} s (GraceTime and KillWait): it {lost}"
            fix = plan.promised.saves_more_often or f"a shorter {saves.split('=')[0] or 'interval between checkpoints'}"
            yield Problem(found, "checkpoints more often, which lose less", fix)


def _late_takeover(plan: Plan, config: Config, limits: Mapping[str | None, Limits]) -> Iterator[Problem]:
    """Warn if Slurm ends a job that has lost its head node before another agent can requeue it.

    A job that has spares or may shrink survives a lost node (``--no-kill``): Slurm 22.05 removes the node from the job.
    If the lost node has the batch script, the job ends as FAILED and is not requeued.
    """
    waits = config.resilience.node_timeout_s
    if plan.cluster != "slurm" or not (config.spare_nodes or config.may_shrink):
        return
    for down_s in {cluster.number("SlurmdTimeout") or 0 for cluster in limits.values()} - {0}:
        if waits + TAKEOVER_S >= down_s:
            yield Problem(
                f"resilience.node_timeout_s={waits}, and Slurm calls a node down after {down_s} s (SlurmdTimeout): "
                "a run that loses its first node ends as FAILED before another node can requeue it",
                "another node that requeues the job first",
                f"resilience.node_timeout_s={max(1, math.floor((down_s - TAKEOVER_S) / 2))}",
            )


def _preemption_graces(plan: Plan, limits: Mapping[str | None, Limits]) -> Iterator[tuple[str, int]]:
    """Yield each partition of the plan in which jobs are preempted, with the seconds that a preempted job has left."""
    for name, cluster in limits.items():
        there = [c.slurm.get("partition") for c in plan.placement.candidates if cluster_of(c.slurm) == name]
        asked = {partition for text in there for partition in (text.split(",") if text else [None])}
        for partition in cluster.partitions:
            named = partition.name in asked or (None in asked and partition.is_default)
            mode = how_preempted(cluster, partition)
            if named and mode != "OFF" and "SUSPEND" not in mode:
                yield partition.name, partition.grace_s + (cluster.number("KillWait") or 0)


@dataclass(frozen=True)
class StopTime:
    """Time that a run needs to stop: the longest of its last steps and saves, seconds."""

    save_s: float
    step_s: float
    folder: Path

    @property
    def stop_s(self) -> float:
        """Seconds from a signal at the start of a step to the end of the next save."""
        return self.step_s + self.save_s


def measure(folder: RunFolder) -> StopTime | None:
    """Return the stop time from the event log and the step records; None if no save was measured."""
    # A background save blocks the run for less than its duration, but the run waits for its last save.
    saved = [e for e in folder.read_events() if e["event"] == "saved" and "seconds" in e]
    saves = [max(e["seconds"], e.get("write_s", 0.0)) for e in saved]
    if not saves:
        return None
    steps = [record["step_time_s"] for record in recent_records(folder.metrics(0)) if "step_time_s" in record]
    return StopTime(max(saves[-RECENT:]), max(steps, default=0.0), folder.path)


def _longest_stop(plan: Plan) -> StopTime | None:
    """Return the stop time of the run, or the longest stop time of runs with equally large checkpoints in the
    same folder.
    """
    kind = plan.promised.checkpoint_kind
    others = [folder for folder in _other_runs(plan) if kind and _promised(folder).get("checkpoint_kind") == kind]
    known = [stop for folder in others if (stop := measure(folder)) is not None]
    return measure(RunFolder(plan.run_dir)) or max(known, key=lambda stop: stop.stop_s, default=None)


def _other_runs(plan: Plan) -> list[RunFolder]:
    """Return the other runs in the folder of a point, newest first."""
    own = Path(plan.run_dir)
    dated = sorted(((path.stat().st_mtime, path.parent) for path in own.parent.glob("*/plan.json")), reverse=True)
    return [RunFolder(path) for _, path in dated if path != own]


def _promised(folder: RunFolder) -> dict[str, Any]:
    found = read_json(folder.plan).get("promised")
    return found if isinstance(found, dict) else {}


# Expected time of a point: by the step time of an earlier run of the same kind, or by the model of its workload.


SAME_PLACE = ("partition", "constraint", "gres", "gpus_per_node", "cpus_per_task")
"""Parameters of submitit that describe the kind of nodes."""
MIN_STEPS = 5
"""Smallest number of steps for an estimate. With fewer steps, start-up and warm-up dominate."""


def add_expected(plan: Plan) -> Plan:
    """Return the plan with its expected time, if known."""
    if plan.finished or plan.max_steps is None:
        return plan
    own = RunFolder(plan.run_dir)
    saves = saves_that_count(own.read_events()) if plan.promised.resumes else []
    done = max((save["step"] for save in saves if save["step"] is not None), default=0)
    steps = plan.max_steps - (done if plan.goes_on.back_to is None else plan.goes_on.back_to)
    for folder in (own, *_other_runs(plan)):
        if (pace := _pace(folder, plan)) is not None:
            step_s, around_s = pace
            labels = {own.path: "this run"} if folder is own else labels_inside([own.path.parent])
            by = f"the {step_s:.3g} s a step of {labels.get(folder.path, folder.path.name)}"
            return replace(plan, expected_s=around_s + steps * step_s, expected_by=by)
    if (model_s := plan.promised.step_s) is None:
        return plan
    by = f"an estimate of {model_s:.3g} s a step, without start-up, evaluation and saving"
    return replace(plan, expected_s=steps * model_s, expected_by=by)


def _pace(folder: RunFolder, plan: Plan) -> tuple[float, float] | None:
    """Return the seconds of a step, and the seconds outside of steps, of the newest attempt of a run.

    The seconds of a step include its share of evaluations and saves. None if the run is of another kind, or made too
    few steps.
    """
    if not plan.promised.step_kind or _kind_of(read_json(folder.plan)) != _kind_of(plan.as_dict()):
        return None
    events = folder.read_events()
    fewer = fewer_nodes(events)  # The next start has all nodes.
    records = [r for r in recent_records(folder.metrics(0)) if isinstance(r.get("time"), int | float)]
    records = [r for r in records if r["attempt"] not in fewer]
    records = [r for r in records if r["attempt"] == records[-1]["attempt"]]
    if not records or records[-1]["step"] - records[0]["step"] < MIN_STEPS:
        return None
    first, last = records[0], records[-1]
    step_s = (last["time"] - first["time"]) / (last["step"] - first["step"])
    started = [event for event in events if event["event"] == "started"]
    begun = next((event for event in started if event.get("attempt") == last["attempt"]), None)
    agents = [e for e in events if e["event"] == "agent_started" and begun is not None and e["time"] <= begun["time"]]
    if not agents or begun is None:
        return step_s, 0.0
    first_start = next(event["time"] for event in started if event["time"] >= agents[-1]["time"])
    made = last["step"] - (begun.get("from_step") or 0)
    loading_s = max(0.0, last["time"] - begun["time"] - made * step_s)
    ends = [e["ended_at"] for e in events if e["event"] == "agent_ended" and e["ended_at"] >= last["time"]]
    leaving_s = ends[0] - last["time"] if ends else 0.0
    return step_s, first_start - agents[-1]["allocated_at"] + loading_s + leaving_s


def _kind_of(plan: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return the properties of a ``plan.json`` that determine the time of a step."""
    slurm = plan.get("slurm") or {}
    nodes = tuple(slurm.get(key) for key in SAME_PLACE) if plan.get("cluster") == "slurm" else ()
    step_kind = (plan.get("promised") or {}).get("step_kind")
    return plan.get("workload"), plan.get("cluster"), plan.get("nodes"), plan.get("ranks_per_node"), step_kind, nodes


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
    """Return the worst case of one start. A point without GPUs adds no GPU-hours."""
    return Use(plan.node_hours, plan.gpu_hours or 0.0, plan.cost or 0.0)


def _expected_of(plan: Plan) -> Use:
    share = (plan.expected_s or 0.0) / (60 * plan.timeout_min)
    gpu_hours, cost = (None if value is None else share * value for value in (plan.gpu_hours, plan.cost))
    return Use(share * plan.node_hours, gpu_hours, cost)


def _used_before(plans: Sequence[Plan], configs: Sequence[Config]) -> list[Use]:
    """Return the use of the earlier attempts of each point."""
    now, pairs = time.time(), zip(plans, configs, strict=True)
    return [used(read_event_logs([RunFolder(plan.run_dir)]), now, rates_of(config)) for plan, config in pairs]


def _sum_text(plans: Sequence[Plan], uses: Sequence[Use]) -> str:
    """Write the sum of the uses of all points, in node-hours; in hours of this machine if all points are local."""
    total = sum(uses, Use())
    if any(plan.cluster == "slurm" for plan in plans):
        return use_text(total)
    hours = sum(use.node_hours / plan.nodes_asked for plan, use in zip(plans, uses, strict=True))
    return ", ".join(filter(None, [f"{duration_text(3600 * hours)} on this machine", use_text(total, nodes=False)]))


def total_text(plans: Sequence[Plan]) -> str:
    """Write the expected use of all points together; empty if nothing is known."""
    ahead = unfinished(plans)
    known = [plan for plan in ahead if plan.expected_s is not None]
    if len(ahead) <= 1 or not known:
        return "".join(f"expected: {_expected_text(plan)}" for plan in known)
    of = "" if len(known) == len(ahead) else f" of {', '.join(plan.title for plan in known)}"
    total, longest = _sum_text(known, [*map(_expected_of, known)]), max(plan.expected_s or 0.0 for plan in known)
    return f"expected{of}: {total}, {duration_text(longest)} for the longest point (dry_run=true says by what)"


def _expected_text(plan: Plan) -> str:
    seconds, use = duration_text(plan.expected_s or 0.0), _sum_text([plan], [_expected_of(plan)])
    return f"{use if plan.cluster == 'local' else f'{seconds}, {use}'}, by {plan.expected_by}"


def worst_case_text(plans: Sequence[Plan], configs: Sequence[Config]) -> str:
    """Write the worst case of one start of each point, the use so far, and the bounds of later starts."""
    ahead = unfinished(plans)
    if not ahead:
        return "worst case: nothing is left to run"
    every = f"all {len(ahead)}" if len(ahead) == len(plans) else f"the {len(ahead)} other"
    head = "worst case" if len(plans) == 1 else f"worst case of {every} point{'' if len(ahead) == 1 else 's'}"
    limits = {plan.timeout_min for plan in ahead}
    limit = f" of {limits.pop()} min" if len(limits) == 1 else ""
    whose = "every node to its" if any(plan.cluster == "slurm" for plan in ahead) else "each point to its"
    parts = [f"{head}: {_sum_text(ahead, [*map(_worst_of, ahead)])} ({whose} time limit{limit})", total_text(plans)]
    before = _used_before(plans, configs)
    if any(use.node_hours for use in before):
        parts.append(f"used so far: {_sum_text(plans, before)}")
    cap = [f"budget.{key}={value:g}" for key, value in caps(configs[0].budget).items()]
    on_slurm = [plan for plan in ahead if plan.cluster == "slurm"]
    if cap:
        parts.append(f"at most {' and '.join(cap)} over all attempts")
    elif configs[0].resilience.requeue and on_slurm:
        # A requeue restarts the time limit of one job, not the limit of all jobs.
        largest = max(on_slurm, key=lambda plan: (plan.node_hours, plan.gpu_hours or 0.0))
        of = f" for {largest.title}" if len(on_slurm) > 1 else ""
        bound = "budget.gpu_hours=N caps it all" if largest.gpu_hours else "resilience.requeue=false allows none"
        parts.append(
            "each requeue (preemption, time limit, lost node) begins the time limit again: up to "
            f"{use_text(_worst_of(largest))} more{of} ({bound})"
        )
    return "; ".join(filter(None, parts))


# The plan of a point in the dry run, and the announcement of a command before it submits.


def plan_text(plan: Plan) -> str:
    """Write the plan for people."""
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
        "expected": _expected_text(plan) if plan.expected_s is not None else "",
        "folder": plan.run_dir,
        "nodes are": "the run's alone (cluster.exclusive)" if plan.slurm.get("exclusive") else "",
        "code": plan.code or "",
    }
    lines = [f"point {plan.title}", *(f"  {key:<11} {value}" for key, value in rows.items() if value)]
    for label, passage in plan.promised.notes.items():
        lines += [f"  {label if number == 0 else '':<11} {line}" for number, line in enumerate(passage)]
    lines += [f"  {'warning':<11} {warning}" for warning in plan.warnings]
    return "\n".join([*lines, *placement_lines(plan.placement)])


def announce(plans: Sequence[Plan], configs: Sequence[Config], console: Console) -> None:
    """Print the finished points, how the others continue, their worst case, and the warnings."""
    lines = []
    if finished := [plan.title + _ran_elsewhere(plan) for plan in plans if plan.finished]:
        them = "it again in a new folder" if len(finished) == 1 else "them again in new folders"
        lines.append(f"finished already, and not submitted: {', '.join(finished)} (fresh=true runs {them})")
    lines += [f"{plan.title}: {text}" for plan in plans if (text := plan.goes_on.text(plan.max_steps))]
    lines += [worst_case_text(plans, configs)] if unfinished(plans) else []
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        names = [plan.title for plan in plans if warning in plan.warnings]
        where = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        lines.append(f"warning: {where}{warning}")
    for line in lines:
        console.print(line, highlight=False, markup=False)


def _ran_elsewhere(plan: Plan) -> str:
    """Return the name of the cluster where a finished point ran; empty if it is the cluster of this command."""
    submitted = [event["cluster"] for event in RunFolder(plan.run_dir).read_events() if event["event"] == "submitted"]
    ran = submitted[-1] if submitted else plan.cluster
    return "" if ran == plan.cluster else f" (on {ran}, and so not compared with points on {plan.cluster})"
