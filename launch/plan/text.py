"""A plan as a person reads it, in the dry run and in the output of a batch script."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from launch.config import Config
from launch.errors import ConfigError
from launch.plan import expected, placement
from launch.plan.budget import Use, caps, rates_of, read_event_logs, refuse_above, use_text, used
from launch.plan.plan import Plan
from launch.runs.folder import RunFolder
from launch.runs.wording import counted


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
        **({"expected": expected.point_text(plan)} if plan.expected_s is not None else {}),
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
    """Numbers of nodes that a run goes on with, for people."""
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
    text += "; ".join(["", known]) if (known := expected.total_text(plans)) else ""
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
