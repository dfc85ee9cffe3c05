"""The order of a sweep: plan every point, refuse or show, submit, watch, report.

Owns the order of these steps and the exit status. One point is a sweep of one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console

from launch.config import ClusterKind, Config, LaunchConfig
from launch.config.compose import typed_config, workload_of
from launch.errors import ConfigError
from launch.jobs.stop import stop_on_ctrl_c
from launch.plan import code_copy
from launch.plan.plan import Plan, make_plan, write_run
from launch.plan.preflight import add_warnings
from launch.plan.text import share_budget, worst_case_text
from launch.runs.failures import failure_text
from launch.runs.files import write_json
from launch.runs.folder import RunFolder
from launch.scheduler import client as scheduler

if TYPE_CHECKING:
    from launch.jobs.status import RunStatus

Composed = tuple[DictConfig, Sequence[str]]


class SweepFailedError(RuntimeError):
    """At least one point did not finish. ``status`` is the exit status of the command."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


def run_sweep(points: Sequence[Composed]) -> None:
    """Take composed points, each with what was typed for it, to a scaling table.

    Raises:
        ConfigError: a point cannot work; nothing was written or submitted.
        SweepFailedError: a point failed or was stopped.
    """
    console = Console(soft_wrap=True)
    kinds = choose_clusters([config for config, _ in points], console)
    plans: list[Plan] = []
    configs: list[Config] = []
    for (composed, overrides), kind in zip(points, kinds, strict=True):
        configs.append(typed_config(composed))
        plans.append(make_plan(configs[-1], overrides, kind))
    refuse_same_folder(plans)
    if any(plan.cluster == "slurm" and config.cluster.placement for plan, config in zip(plans, configs, strict=True)):
        from launch.checks.candidates import settle_placements

        plans = settle_placements(plans, configs, console)
    if points[0][0].launch.detach:
        refuse_local(plans)
    plans = [add_warnings(plan, config) for plan, config in zip(share_budget(plans, configs), configs, strict=True)]
    if points[0][0].dry_run:
        from launch.jobs.dry_run import show_plans

        show_plans(plans, configs, console)
        return
    for plan in plans:
        refuse_running(plan)
    console.print(worst_case_text(plans, configs), highlight=False, markup=False)
    show_warnings(plans, console)
    for copy, tree in {
        plan.code: workload_of(config).code(config) for plan, config in zip(plans, configs, strict=True)
    }.items():
        if copy is not None:
            code_copy.take(Path(copy), tree)
    for (composed, overrides), plan in zip(points, plans, strict=True):
        write_run(plan, composed, overrides)
    submit_and_watch(plans, console, configs[0].launch)


def choose_clusters(configs: Sequence[DictConfig], console: Console) -> list[ClusterKind]:
    """The cluster of each point; ``auto`` is decided once and said."""
    kinds = [config.cluster.kind for config in configs]
    if ClusterKind.auto not in kinds:
        return list(kinds)
    answers = scheduler.controller_answers()
    found = ClusterKind.slurm if answers else ClusterKind.local
    why = "sbatch and a controller that answers" if answers else "no Slurm here: nodes are agents on this machine"
    console.print(f"cluster=auto: {found.name} ({why})", highlight=False)
    return [found if kind is ClusterKind.auto else kind for kind in kinds]


def refuse_same_folder(plans: Sequence[Plan]) -> None:
    """Raise ConfigError where two points would write into one folder."""
    seen: set[str] = set()
    for plan in plans:
        if plan.run_dir in seen:
            raise ConfigError(
                f"two points of the sweep with the folder {plan.run_dir}",
                "a folder for each point; run_dir, cluster.* and resilience.* do not tell points apart",
                "a sweep over something that changes the run, or one command for each with its own name=NAME",
            )
        seen.add(plan.run_dir)


def refuse_local(plans: Sequence[Plan]) -> None:
    """Raise ConfigError where a run would have to do without the launcher that it is bound to."""
    if any(plan.cluster == "local" for plan in plans):
        raise ConfigError(
            "launch.detach=true with agents on this machine (cluster=local)",
            "a Slurm cluster: a local run ends with its launcher, so that it cannot be forgotten",
            "cluster=slurm; or, without launch.detach: nohup python -m launch ... > launch.out &",
        )


def refuse_running(plan: Plan) -> None:
    """Raise ConfigError where an earlier submission still works on the same folder."""
    from launch.jobs.handles import running_job

    running = running_job(RunFolder(plan.run_dir).read_events())
    if running is not None:
        waits = running.endswith("pending") and plan.placement.is_watched
        move = f"; where its launcher is gone, python -m launch.move {quote(plan.run_dir)} moves it on" if waits else ""
        raise ConfigError(
            f"{plan.run_dir} is being worked on by {running}",
            "one job for a run folder",
            f"wait for it or cancel it; fresh=true makes a new folder{move}",
        )


def show_warnings(plans: Sequence[Plan], console: Console) -> None:
    """Print what the plans warn of; a warning that several points share once."""
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        names = [plan.point for plan in plans if warning in plan.warnings]
        where = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        console.print(f"warning: {where}{warning}", highlight=False, markup=False)


def submit_and_watch(plans: Sequence[Plan], console: Console, after: LaunchConfig) -> None:
    """Submit; then follow to the end and report, or say how to."""
    from launch.jobs import display as watch
    from launch.jobs.status import new_run_status

    points = [new_run_status(plan) for plan in plans]
    submit(points, console)
    write_json(sweep_folder(plans) / "sweep.json", {"points": [plan.point for plan in plans]})
    if after.detach:
        console.print(follow_up(plans), highlight=False, markup=False)
        leave_failover(plans, console)
        return
    try:
        watch.watch(points, console, after.poll_s)
    except KeyboardInterrupt:
        stop_on_ctrl_c(points, console)
        raise SweepFailedError("stopped; the same command goes on from the last checkpoint", 130) from None
    report(plans, console)
    show_progress_problems(points, console)
    failed = [point for point in points if point.state != "finished"]
    if failed:
        raise SweepFailedError("\n\n".join(explain(point) for point in failed), 1)


def show_progress_problems(points: Sequence[RunStatus], console: Console) -> None:
    """Say where ``script.progress`` did not find what it was meant to."""
    for point in points:
        causes = [event["cause"] for event in point.events() if event["event"].startswith("progress_")]
        for cause in dict.fromkeys(causes):
            console.print(f"warning: {point.name}: {cause}", highlight=False, markup=False)


def submit(points: Sequence[RunStatus], console: Console) -> None:
    """Submit what is for Slurm, one job for each shape; local points get in line.

    Raises:
        SweepFailedError: sbatch refused. What it had taken before goes on.
    """
    from launch.jobs.handles import LocalQueueEntry
    from launch.jobs.submit import record_submitted, shapes, submit_somewhere

    by_folder = {str(point.folder.path): point for point in points}
    for group in shapes([point.plan for point in points if point.plan and point.plan.cluster == "slurm"]):
        try:
            done = submit_somewhere(group, group[0].placement.possible[0])
        except scheduler.SlurmError as error:
            ids = ", ".join(point.job.name for point in points if point.job is not None)
            rest = f"\nalready submitted, and going on: {ids}" if ids else ""
            raise SweepFailedError(f"{group[0].point}: {error}{rest}", 1) from error
        for plan, job in zip(group, done.jobs, strict=True):
            point = by_folder[plan.run_dir]
            point.job = job
            record_submitted(plan, job.job_id, done.candidate)
            for refused, why in done.refused.items():
                point.folder.record_event("refused", candidate=refused, cause=why)
                text = f"{point.name}: {plan.placement.candidates[refused].name} is skipped: {why}"
                console.print(text, highlight=False, markup=False)
            place = plan.placement.candidates[done.candidate].name
            at = f" at {place}" if place else ""
            console.print(f"{point.name}: job {job.name}{at}", highlight=False, markup=False)
    for point in points:
        if point.job is None:
            LocalQueueEntry(point.folder).enter(point.events_before)


def sweep_folder(plans: Sequence[Plan]) -> Path:
    """The folder that the points of a sweep lie in."""
    return Path(plans[0].run_dir).parent


def follow_up(plans: Sequence[Plan]) -> str:
    """The commands for a sweep that goes on without its launcher."""
    one, sweep = plans[0].run_dir, str(sweep_folder(plans))
    whole = one if len(plans) == 1 else sweep
    commands = [f"status {quote(whole)}", f"logs -f {quote(one)}", f"cancel {quote(whole)}", f"report {quote(sweep)}"]
    lines = [f"  python -m launch.{command}" for command in commands]
    return "\n".join(["the jobs go on without this command; to follow them:", *lines])


def leave_failover(plans: Sequence[Plan], console: Console) -> None:
    """Leave a process behind that moves the points that wait, where there is another place for them."""
    from launch.jobs.failover import start_in_background

    watched = [Path(plan.run_dir) for plan in plans if plan.placement.is_watched]
    if not watched:
        return
    log = sweep_folder(plans) / ".launch" / "move.log"
    process = start_in_background(watched, log)
    whole = plans[0].run_dir if len(plans) == 1 else str(sweep_folder(plans))
    text = (
        f"process {process.pid} on {os.uname().nodename} goes on in the background and moves what waits to its next "
        f"place (log: {log}).\nWithout it, say after a reboot, jobs wait where they are; to have them moved again:\n"
        f"  nohup python -m launch.move {quote(whole)} &"
    )
    console.print(text, highlight=False, markup=False)


def report(plans: Sequence[Plan], console: Console) -> None:
    """Write and show the scaling table of these points."""
    from launch import report as scaling

    sweep = sweep_folder(plans)
    table = scaling.build(sweep, [Path(plan.run_dir) for plan in plans])
    scaling.show(table, console)
    for path in scaling.write(table, sweep):
        console.print(f"wrote {path}", highlight=False)


def explain(point: RunStatus) -> str:
    """Explain why a point did not finish, and name the log to read on."""
    from launch.jobs.handles import agent_logs

    failure = point.failure() if point.state == "failed" else None
    head = f"{point.name} {point.state}" + (f" ({point.detail})" if point.detail else "")
    if failure is not None:
        decided = [e["reason"] for e in point.events() if e["event"] == "decided" and e["action"] == "stop"]
        last = f"\nnot started again: {decided[-1]}" if decided else ""
        return f"{head}: {failure_text(failure)}{last}"
    logs = agent_logs(point.folder.path, point.job, 0)[::-1] if point.job is not None else []
    log = next((log for log in logs if log.is_file() and log.stat().st_size), None)
    if log is not None and point.state == "failed":
        lines = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        return f"{head}; the first agent's last words ({log}):\n{lines}"
    if point.state == "failed":
        return f"{head}; nothing was recorded in {point.folder.path}"
    if point.state == "placement_timeout":
        return f"{head}; the same command submits it again"
    return head


def fail(error: SweepFailedError) -> int:
    """Print why, and give the exit status."""
    print(f"\n{error}", file=sys.stderr)
    return error.status
