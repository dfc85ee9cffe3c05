"""Preflight warnings from earlier attempts, the ``submitted`` event, and points that would disturb each other."""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from launch.config import ClusterKind, Config
from launch.config.compose import workload_of
from launch.errors import ConfigError
from launch.plan import code_copy as snapshot
from launch.plan.placement import cluster_of, settle_key
from launch.plan.plan import Plan
from launch.runs.environment import changed_since, code_state, library_versions, refuse_change
from launch.runs.events import Events, unsaved_text
from launch.runs.files import read_json
from launch.runs.folder import RunFolder, read_plan
from launch.runs.records import RECENT, recent_records
from launch.slurm.limits import Limits, how_preempted
from launch.workload import CodeTree

# The ``submitted`` event of a run: which job works on it, and where.


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
    """Return whether the event log has the submission of the job with one of these ids."""
    return any(event["event"] == "submitted" and str(event["job_id"]) in names for event in events)


def on_its_way(events: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the last ``moved`` where no submission has followed it; None elsewhere."""
    last = next((event for event in reversed(events) if event["event"] in ("submitted", "moved")), None)
    return last if last is not None and last["event"] == "moved" else None


# Means that keep the points of a sweep on Slurm from measuring each other: whole nodes, and one point after another.


WHY = "cluster.exclusive=true: points of a sweep over nodes or ranks would measure each other on shared nodes"


def settle_exclusive(documents: Sequence[DictConfig], configs: Sequence[Config], kinds: Sequence[ClusterKind]) -> str:
    """Have the points of a sweep over nodes or ranks ask Slurm for whole nodes, where the command leaves that open.

    The arguments are those of ``settle_key``.

    Returns:
        What was decided, for people; empty where nothing was.
    """
    sizes = {config.world_size for config, kind in zip(configs, kinds, strict=True) if kind is ClusterKind.slurm}

    def choose(config: Config) -> tuple[bool | None, str]:
        cluster = config.cluster
        is_open = cluster.exclusive is None and "exclusive" not in cluster.additional_parameters
        if len(sizes) < 2 or not is_open:
            return None, ""
        return True, f"{WHY} (cluster.exclusive=false shares them; a site may charge whole nodes)"

    return "".join(settle_key("exclusive", choose, documents, configs, kinds))


def wait_for(plan: Plan, before: Sequence[str]) -> Plan:
    """The plan of a point that starts when no job of ``before`` is left, and alone of its job array."""
    candidates = [
        replace(one, slurm={**one.slurm, **dependency(one.slurm, before), "array_parallelism": 1})
        for one in plan.placement.candidates
    ]
    return plan.replace_placement(replace(plan.placement, candidates=tuple(candidates)))


def dependency(slurm: dict[str, Any], before: Sequence[str]) -> dict[str, Any]:
    """The parameters of submitit by which a job waits for others too, beside what the user has it wait for."""
    if not before:
        return {}
    own = dict(slurm["additional_parameters"])
    typed = own.pop("dependency", None)
    after = f"afterany:{':'.join(dict.fromkeys(before))}"
    return {"additional_parameters": own, "dependency": f"{typed},{after}" if typed else after}


# Preflight warnings of a plan, from what the run folders of earlier attempts hold. Writes nothing.


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
    """Return whether the next attempt would run something else than the last one did."""
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
    """Return whether the last attempts could not write their checkpoints, which the next would meet again."""
    told = unsaved_text(RunFolder(plan.run_dir).read_events())
    if told is not None:
        yield f"{told}; type df -h {plan.run_dir}"


def short_grace(plan: Plan, config: Config, limits: Mapping[str | None, Limits]) -> Iterator[str]:
    """Return whether the run would be killed before it has saved, by what its saves and steps have taken so far."""
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
    """Return whether Slurm ends a job whose head node is lost before another agent can put it back into the queue.

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
    """Return whether a run's checkpoints are as large as the plan's."""
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
