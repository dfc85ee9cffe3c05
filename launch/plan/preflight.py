"""Preflight warnings of a plan, from what the run folders of earlier attempts hold. Writes nothing.

Owns the warnings that ``dry_run`` and a submission show. What cannot work at all is refused by ``launch.plan``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from launch.config import Config
from launch.config.compose import workload_of
from launch.plan import code_copy as snapshot
from launch.plan.placement import cluster_of
from launch.plan.plan import Plan
from launch.runs.events import unsaved_text
from launch.runs.files import read_json
from launch.runs.folder import RunFolder
from launch.runs.provenance import changed_since, code_state, library_versions, refuse_change
from launch.runs.records import RECENT, recent_records
from launch.scheduler.limits import Limits, how_preempted
from launch.workload import CodeTree

TAKEOVER_S = 10
"""Time that the agents of a job need, once the head node has been silent for long enough, until it is requeued."""
MARGIN = 1.5
"""Factor of a proposed time over the measured one: the next save may be slower."""


def add_warnings(plan: Plan, config: Config, limits: Mapping[str | None, Limits] | None = None) -> Plan:
    """Return the plan with its preflight warnings.

    Args:
        limits: those of the clusters it may go to, as far as they are known; by name, None being the local one.

    Raises:
        ConfigError: the code or a library has changed since the last attempt, and ``strict`` forbids that.
    """
    return replace(
        plan,
        warnings=(
            *plan.warnings,
            *changed_code(plan, config),
            *unsaved(plan),
            *short_grace(plan, config, limits or {}),
            *late_takeover(plan, config, limits or {}),
        ),
    )


def changed_code(plan: Plan, config: Config) -> Iterator[str]:
    """Tell whether the next attempt would run something else than the last one did."""
    folder = RunFolder(plan.run_dir)
    changed = changed_since(folder, _current(workload_of(config).code(config))) if folder.attempts() else None
    if changed is None:
        return
    if config.require_same_code:
        refuse_change(folder, *changed)
    yield f"changed since attempt {changed[0]}: {changed[1]} (require_same_code=true refuses that)"


@cache
def _current(tree: CodeTree) -> dict[str, Any]:
    """The code and libraries that an attempt would run with, looked at once for all points of a command."""
    return {"code": snapshot.code(tree), "git": code_state(tree.root), "software": library_versions()}


def unsaved(plan: Plan) -> Iterator[str]:
    """Tell whether the last attempts could not write their checkpoints, which the next would meet again."""
    told = unsaved_text(RunFolder(plan.run_dir).read_events())
    if told is not None:
        yield f"{told}; type df -h {plan.run_dir}"


def short_grace(plan: Plan, config: Config, limits: Mapping[str | None, Limits]) -> Iterator[str]:
    """Tell whether the run would be killed before it has saved, by what its saves and steps have taken so far."""
    known = evidence(plan)
    if known is None:
        return
    took = f"a save took up to {known.save_s:.3g} s and a step {known.step_s:.3g} s in {known.folder}"
    saves = plan.promised.saves
    lost = "would go back to its last periodic checkpoint" + (f" ({saves})" if saves else "")
    wish = 10 * math.ceil(MARGIN * known.stop_s / 10)
    delay, grace = config.cluster.signal_delay_s, config.resilience.grace_period_s
    short = [
        f"{key}={value}"
        for key, value in (("resilience.grace_period_s", grace), ("cluster.signal_delay_s", delay))
        if known.stop_s > value and (key.startswith("resilience") or plan.cluster == "slurm")
    ]
    if short:
        longer = " ".join(f"{key.split('=')[0]}={wish}" for key in short)
        yield f"{took}, and {' and '.join(short)}: told to stop, the run {lost}; type {longer}"
    for name, left in preemption_graces(plan, limits) if plan.cluster == "slurm" else ():
        if known.stop_s > left:
            yield (
                f"{took}, and partition {name} gives a preempted job {left} s (GraceTime and KillWait): it {lost}; "
                f"a shorter {saves.split('=')[0] or 'interval between checkpoints'} loses less"
            )


def late_takeover(plan: Plan, config: Config, limits: Mapping[str | None, Limits]) -> Iterator[str]:
    """Tell whether Slurm ends a job whose head node is lost before another agent can put it back into the queue.

    A job with spares, or that may shrink, is not to end by a lost node (``--no-kill``). Slurm 22.05 then takes the node
    out of the job, also where it is the one of the batch script, with which the job ends as FAILED and is not requeued.
    """
    waits = config.resilience.node_timeout_s
    if plan.cluster != "slurm" or not (config.spare_nodes or config.may_shrink):
        return
    for down_s in {cluster.number("SlurmdTimeout") for cluster in limits.values()} - {None, 0}:
        assert down_s is not None
        if waits + TAKEOVER_S >= down_s:
            yield (
                f"resilience.node_timeout_s={waits}, and Slurm calls a node down after {down_s} s (SlurmdTimeout): "
                "a run that loses its first node ends as FAILED before another node can requeue it; "
                f"type resilience.node_timeout_s={max(1, math.floor((down_s - TAKEOVER_S) / 2))}"
            )


def evidence(plan: Plan) -> StopTime | None:
    """Measured stop time of the run's own folder, or else with the same model in other points of its sweep."""
    own = RunFolder(plan.run_dir)
    others = (RunFolder(path.parent) for path in sorted(own.path.parent.glob("*/plan.json")))
    return measure(own) or slowest(measure(other) for other in others if has_same_model(other, plan))


def has_same_model(folder: RunFolder, plan: Plan) -> bool:
    """Tell whether a run's checkpoints are as large as the plan's."""
    if not folder.events.is_file():
        return False
    there = read_json(folder.plan).get("promised") or {}
    return bool(plan.promised.checkpoint_kind) and there.get("checkpoint_kind") == plan.promised.checkpoint_kind


def preemption_graces(plan: Plan, limits: Mapping[str | None, Limits]) -> Iterator[tuple[str, int]]:
    """The partitions of the plan in which jobs are preempted, with the seconds that one has to leave."""
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
    """Time that a run needs to stop, by the longest of its last steps and saves, seconds."""

    save_s: float
    step_s: float
    folder: Path

    @property
    def stop_s(self) -> float:
        """A signal that comes at the start of a step waits for its end; then the run saves."""
        return self.step_s + self.save_s


def measure(folder: RunFolder) -> StopTime | None:
    """Measure the stop time by the event log and the step records; None where no save was measured yet."""
    # In the background a save holds up the run for less than it takes, which is what the last one is waited for.
    saved = [e for e in folder.read_events() if e["event"] == "saved" and "seconds" in e]
    saves = [max(e["seconds"], e.get("write_s", 0.0)) for e in saved]
    if not saves:
        return None
    steps = [record["step_time_s"] for record in recent_records(folder.metrics(0)) if "step_time_s" in record]
    return StopTime(max(saves[-RECENT:]), max(steps, default=0.0), folder.path)


def slowest(measured: Iterable[StopTime | None]) -> StopTime | None:
    """The one that takes longest; None where nothing was measured."""
    return max((m for m in measured if m is not None), key=lambda m: m.stop_s, default=None)
