"""The order of a sweep: plan every point, refuse or show, submit, watch, report.

Owns the order of these steps and the exit status. One point is a sweep of one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING

from omegaconf import DictConfig
from rich.console import Console

from launch.config import ClusterKind, Config, LaunchConfig
from launch.config.compose import typed_config, workload_of
from launch.errors import ConfigError
from launch.jobs.point_result import PointResult, result_of
from launch.jobs.stop import next_start_text, stop_on_ctrl_c
from launch.plan import code_copy
from launch.plan.alone import settle_exclusive
from launch.plan.expected import add_expected
from launch.plan.plan import Plan, make_plan, write_run
from launch.plan.preflight import add_warnings
from launch.plan.text import share_budget, worst_case_text
from launch.runs.find import labels_for
from launch.runs.folder import RunFolder
from launch.runs.labels import sweep_overrides
from launch.runs.report_files import ReportFile
from launch.runs.sweeps import Sweep, record_sweep
from launch.scheduler import client as scheduler
from launch.scheduler.limits import Limits

if TYPE_CHECKING:
    from launch.checks.facts import SlurmFacts
    from launch.jobs.handles import SlurmJob
    from launch.jobs.status import RunStatus

Composed = tuple[DictConfig, Sequence[str]]


class SweepFailedError(RuntimeError):
    """At least one point did not finish. ``status`` is the exit status of the command."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NothingSubmittedError(SweepFailedError):
    """sbatch has refused, so that a run folder without a submission is of no use to anybody."""


def run_sweep(
    points: Sequence[Composed], *, tolerates_failures: bool = False, with_report: bool = True
) -> list[PointResult]:
    """Take composed points, each with what was typed for it, to a scaling table, or without a report to their end.

    Args:
        points: composed, each with what was typed for it.
        tolerates_failures: return points that failed among the others instead of raising.
        with_report: write and show the scaling table of the points.

    Returns:
        What became of each point; nothing in a dry run.

    Raises:
        ConfigError: a point cannot work; nothing was written or submitted.
        SweepFailedError: a point failed or was stopped.
    """
    console = Console(soft_wrap=True)
    kinds = choose_clusters([config for config, _ in points], console)
    configs = [typed_config(composed) for composed, _ in points]
    if whole := settle_exclusive([composed for composed, _ in points], configs, kinds):
        console.print(whole, highlight=False, markup=False)
    slurm: SlurmFacts | None = None
    if configs[0].launch.check_limits and ClusterKind.slurm in kinds:
        from launch.checks import cpus, facts, gpus

        slurm = facts.ask_slurm(facts.clusters_named(configs))
        documents = [composed for composed, _ in points]
        told = gpus.settle_gpus(documents, configs, kinds, slurm)  # before the CPUs, which go by the ranks of a node
        for line in [*told, *cpus.settle_cpus(documents, configs, kinds, slurm)]:
            console.print(line, highlight=False, markup=False)
    plans = plan_points(configs, [overrides for _, overrides in points], kinds, slurm)
    refuse_same_folder(plans)
    labels = labels_for([(Path(plan.run_dir), typed) for plan, (_, typed) in zip(plans, points, strict=True)])
    plans = [replace(plan, label=label) for plan, label in zip(plans, labels, strict=True)]
    limits: Mapping[str | None, Limits] = {}
    if slurm is not None:
        from launch.checks import candidates

        if unfinished(plans) and not points[0][0].dry_run:
            candidates.refuse_without_controller(slurm)
        plans, limits = candidates.look_before_submitting(slurm, plans, configs, console), slurm.known
    if points[0][0].launch.detach:
        refuse_local(plans)
    budgeted = share_budget(plans, configs)
    plans = [add_warnings(add_expected(plan), config, limits) for plan, config in zip(budgeted, configs, strict=True)]
    if points[0][0].dry_run:
        from launch.jobs.dry_run import show_plans

        show_plans(plans, configs, console)
        return []
    from launch.jobs.adoption import refuse_running

    for plan in unfinished(plans):
        refuse_running(plan)
    show_finished(plans, console)
    for plan in plans:
        if text := plan.goes_on.text(plan.max_steps):
            console.print(f"{plan.title}: {text}", highlight=False, markup=False)
    if unfinished(plans):
        console.print(worst_case_text(plans, configs), highlight=False, markup=False)
    show_warnings(plans, console)
    made = [plan.run_dir for plan in plans if not Path(plan.run_dir).exists()]
    for plan, config, (composed, overrides) in zip(plans, configs, points, strict=True):
        if plan.finished:
            continue
        if plan.code is not None:
            code_copy.take(Path(plan.code), workload_of(config).code(config))
        write_run(plan, composed, overrides)
    try:
        typed = sweep_overrides([overrides for _, overrides in points])
        failures = submit_and_watch(plans, console, configs[0].launch, typed, with_report=with_report)
    except NothingSubmittedError:
        from launch.jobs.submit import remove_unused

        remove_unused(made)
        raise
    if failures and not tolerates_failures:
        raise SweepFailedError("\n\n".join(failures.values()), 1)
    return [result_of(plan, config, failures) for plan, config in zip(plans, configs, strict=True)]


def plan_points(
    configs: Sequence[Config],
    typed: Sequence[Sequence[str]],
    kinds: Sequence[ClusterKind],
    slurm: SlurmFacts | None = None,
) -> list[Plan]:
    """Plan all points of a command.

    Args:
        slurm: what Slurm tells of itself; None where it was not asked.

    Raises:
        ConfigError: one cannot work; where a cluster does not have its nodes, that is said first.
    """
    sizes = [config.world_size for config in configs]
    try:
        return [
            make_plan(config, overrides, kind, sizes, gpu_type_at(config, kind, slurm))
            for config, overrides, kind in zip(configs, typed, kinds, strict=True)
        ]
    except ConfigError:
        if slurm is not None:
            from launch.checks import candidates

            on_slurm = [config for config, kind in zip(configs, kinds, strict=True) if kind is ClusterKind.slurm]
            # What would repair the point is of no use where it could never be given its nodes.
            candidates.refuse_missing_nodes(slurm, on_slurm)
        raise


def gpu_type_at(config: Config, kind: ClusterKind, slurm: SlurmFacts | None) -> str | None:
    """Type of the GPUs where a point may go, as Slurm names it; None where nobody tells."""
    if slurm is None or kind is not ClusterKind.slurm:
        return None
    from launch.checks import gpus

    return gpus.gpu_type(config, slurm)


def unfinished(plans: Sequence[Plan]) -> list[Plan]:
    """The points that have steps ahead of them: what is finished takes no nodes to say so."""
    return [plan for plan in plans if not plan.finished]


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


def show_warnings(plans: Sequence[Plan], console: Console) -> None:
    """Print what the plans warn of; a warning that several points share once."""
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        names = [plan.title for plan in plans if warning in plan.warnings]
        where = "" if len(names) == len(plans) else f"{', '.join(names)}: "
        console.print(f"warning: {where}{warning}", highlight=False, markup=False)


def submit_and_watch(
    plans: Sequence[Plan], console: Console, after: LaunchConfig, typed: Sequence[str], *, with_report: bool = True
) -> dict[str, str]:
    """Submit what is not finished; then follow to the end and report on all of it, or say how to.

    Returns:
        The run folder of each point that did not finish, and why.
    """
    from launch.jobs import display as watch
    from launch.jobs.endings import explain, show_progress_problems
    from launch.jobs.status import new_run_status

    points = [new_run_status(plan) for plan in unfinished(plans)]
    submit(points, console, sequential=after.sequential)
    sweep = record_sweep(group_folder(plans), [plan.point for plan in plans], typed) if len(plans) > 1 else None
    if after.detach and points:
        console.print(follow_up(plans, sweep), highlight=False, markup=False)
        leave_failover(unfinished(plans), console)
        return {}
    try:
        watch.watch(points, console, after.poll_s)
    except KeyboardInterrupt:
        stop_on_ctrl_c(points, console)
        raise SweepFailedError(f"stopped; {next_start_text(points)}", 130) from None
    if with_report:
        report(plans, sweep, console, after.report_files)
        show_progress_problems(points, console)
    return {str(point.folder.path): explain(point) for point in points if point.state != "finished"}


def submit(points: Sequence[RunStatus], console: Console, *, sequential: bool) -> None:
    """Submit what is for Slurm, one job for each shape; local points get in line.

    Raises:
        NothingSubmittedError: sbatch refused. What it had taken before goes on.
        SweepFailedError: it did not answer in time, and may have taken the job.
    """
    from launch.jobs.handles import LocalQueueEntry
    from launch.jobs.submit import explain_refusal, in_line, may_have_taken, shapes, submit_somewhere
    from launch.plan.submission import record_submitted

    by_folder = {str(point.folder.path): point for point in points}
    before: list[SlurmJob] = []
    for group in shapes([point.plan for point in points if point.plan and point.plan.cluster == "slurm"]):
        if sequential:
            group = in_line(group, before)
        try:
            done = submit_somewhere(group, group[0].placement.possible[0])
        except scheduler.SlurmError as error:
            ids = ", ".join(point.job.name for point in points if point.job is not None)
            rest = f"\nalready submitted, and going on: {ids}" if ids else ""
            # A controller that is only busy may have taken the job all the same, and it needs its folder.
            kind = SweepFailedError if may_have_taken(error) else NothingSubmittedError
            raise kind(f"{explain_refusal(group[0], error)}{rest}", 1) from error
        before = done.jobs
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


def group_folder(plans: Sequence[Plan]) -> Path:
    """The folder that the points of a sweep lie in."""
    return Path(plans[0].run_dir).parent


def follow_up(plans: Sequence[Plan], sweep: Sweep | None) -> str:
    """The commands for a sweep that goes on without its launcher."""
    one, whole = unfinished(plans)[0].run_dir, plans[0].run_dir if sweep is None else str(group_folder(plans))
    number = "" if sweep is None else f" --sweep {sweep.number}"
    commands = [
        *(f"status {quote(whole)}", f"logs -f {quote(one)}", f"cancel {quote(whole)}"),
        f"report {quote(whole)}{number}",
    ]
    lines = [f"  python -m launch.{command}" for command in commands]
    return "\n".join(["the jobs go on without this command; to follow them:", *lines])


def leave_failover(plans: Sequence[Plan], console: Console) -> None:
    """Leave a process behind that moves the points that wait, where there is another place for them."""
    from launch.jobs.failover import start_in_background

    watched = [Path(plan.run_dir) for plan in plans if plan.placement.is_watched]
    if not watched:
        return
    log = group_folder(plans) / ".launch" / "move.log"
    process = start_in_background(watched, log)
    whole = plans[0].run_dir if len(plans) == 1 else str(group_folder(plans))
    text = (
        f"process {process.pid} on {os.uname().nodename} goes on in the background and moves what waits to its next "
        f"place (log: {log}).\nWithout it, say after a reboot, jobs wait where they are; to have them moved again:\n"
        f"  nohup python -m launch.move {quote(whole)} &"
    )
    console.print(text, highlight=False, markup=False)


def report(plans: Sequence[Plan], sweep: Sweep | None, console: Console, files: Sequence[ReportFile]) -> None:
    """Write and show the scaling table of these points, or the summary of the one there is."""
    from launch.report import select, show_and_write, tabulate_selection

    folder = Path(plans[0].run_dir) if sweep is None else group_folder(plans)
    selection = select(folder) if sweep is None else select(folder, sweep.number)
    try:
        show_and_write(tabulate_selection(selection), console, files)
    except OSError as error:  # what is shown is known; what the points came to is still to be told
        later = f"python -m launch.report {quote(str(folder))}"
        console.print(f"the report is not written: {error}; later: {later}", highlight=False, markup=False)


def fail(error: SweepFailedError) -> int:
    """Print why, and give the exit status."""
    print(f"\n{error}", file=sys.stderr)
    return error.status
