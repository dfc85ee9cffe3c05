"""What a command may use at worst, shown and held against its budget before anything is submitted.

Owns the sum over the points of a command. Writes nothing. What is checked while they run is ``launch.agent.meter``'s.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from launch.agent.meter import rates_of, read_ledgers
from launch.config import Config
from launch.errors import ConfigError
from launch.plan.budget import Use, caps, refuse_above, used, words
from launch.plan.plan import Plan
from launch.runs.folder import RunFolder


def worst_of(plans: Sequence[Plan]) -> Use:
    """What one start of every point uses at most. Points without GPUs add no GPU-hours."""
    return sum((Use(plan.node_hours, plan.gpu_hours or 0.0, plan.cost or 0.0) for plan in plans), Use())


def used_before(plans: Sequence[Plan], configs: Sequence[Config]) -> Use:
    """What the earlier attempts of these points have used."""
    now = time.time()
    uses = (
        used(read_ledgers([RunFolder(plan.run_dir)]), now, rates_of(config))
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
    if caps(first):
        longest = max(config.cluster.timeout_min for config in configs)
        refuse_above(first, used_before(plans, configs), worst_of(plans), longest)
    return [replace(plan, command_run_dirs=tuple(other.run_dir for other in plans)) for plan in plans]


def worst_case_text(plans: Sequence[Plan], configs: Sequence[Config]) -> str:
    """The worst case as a person reads it: of one start, what was used before, and what bounds the rest."""
    head = "worst case" if len(plans) == 1 else f"worst case of all {len(plans)} points"
    text = f"{head}: {words(worst_of(plans))}"
    before = used_before(plans, configs)
    if before.node_hours:
        text += f"; used so far: {words(before)}"
    cap = [f"budget.{key}={value:g}" for key, value in caps(configs[0].budget).items()]
    if cap:
        return f"{text}; at most {' and '.join(cap)} over all attempts"
    requeues = configs[0].resilience.requeue and any(plan.cluster == "slurm" for plan in plans)
    return f"{text}, and as much again for each requeue (budget.gpu_hours=N is a cap over all)" if requeues else text
