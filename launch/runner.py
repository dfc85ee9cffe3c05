"""The steps of ``python -m launch`` in order: plan every point, submit the points or print the plan, watch, report."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

from omegaconf import DictConfig
from rich.console import Console

from gpt_launch import as_typed
from launch.config import DEEP, Config, LaunchConfig, ReportFile
from launch.config.compose import workload_of
from launch.errors import CommandFailedError
from launch.plan.placement import copy_code
from launch.plan.plan import Plan, unfinished, write_run, write_settled
from launch.plan.preflight import announce_plans
from launch.runs.find import Sweep, plain_console, record_sweep, sweep_overrides
from launch.runs.folder import RunFolder
from launch.runs.records import objective_value
from launch.slurm.client import SlurmError
from launch.slurm.failover import record_accepted
from launch.slurm.follow import stop_on_ctrl_c, watch_points
from launch.slurm.jobs import LocalQueueEntry, SlurmJob, refuse_running, start_launcher
from launch.slurm.resolve import plan_sweep
from launch.slurm.status import RunStatus, explain_end, new_run_status
from launch.slurm.submit import (
    explain_refusal,
    in_line,
    may_have_taken,
    remove_unused,
    shapes,
    show_plans,
    side_by_side,
    submit_somewhere,
)


@dataclass(frozen=True)
class PointResult:
    """Result of one point of a sweep after its end."""

    run_dir: str
    objective: str | None
    """Name of the requested figure of the step records; None if none was requested."""
    value: float | None
    """Value of the objective; None if none was requested, or no record has it."""
    error: str | None = None
    """Reason why the point did not finish; None if the point finished."""


Composed = tuple[DictConfig, Sequence[str]]
"""Composed config of a point, and its overrides."""


class SweepFailedError(CommandFailedError):
    """Raised if a point did not finish, was not submitted or failed its rehearsal, or if the user pressed Ctrl-C.

    ``status`` is the exit status of the command.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NothingSubmittedError(SweepFailedError):
    """Raised if sbatch has refused a job. ``run_sweep`` then removes new run folders without a job."""


def run_sweep(
    points: Sequence[Composed], *, tolerates_failures: bool = False, with_report: bool = True
) -> list[PointResult]:
    """Run composed points until they end, and report their scaling.

    Args:
        points: composed config and overrides of each point.
        tolerates_failures: True to return failed points too instead of raising an error.
        with_report: True to write and print the scaling table of the points.

    Returns:
        The result of each point; an empty list in a dry run.

    Raises:
        ConfigError: a point cannot work; nothing was written or submitted.
        SweepFailedError: a submission failed, the user stopped the command by Ctrl-C, a rehearsal found a fault, or a
            point did not finish. With ``tolerates_failures``, a point that did not finish raises no error.
    """
    console = plain_console()
    documents, typed = [composed for composed, _ in points], [overrides for _, overrides in points]
    plans, configs = plan_sweep(documents, typed, console)
    if configs[0].dry_run:
        show_plans(plans, configs, console)
        if configs[0].dry_run == DEEP:
            rehearse_points(plans, configs, points)
        return []
    for plan in unfinished(plans):
        refuse_running(plan)
    announce_plans(plans, configs, console)
    new_folders = [plan.run_dir for plan in plans if not Path(plan.run_dir).exists()]
    for plan, config, (composed, overrides) in zip(plans, configs, points, strict=True):
        if not plan.finished:
            if plan.code is not None:
                copy_code(Path(plan.code), workload_of(config).code(config))
            write_run(plan, composed, overrides)
    try:
        words = sweep_overrides(typed)
        failures = submit_and_watch(plans, console, configs[0].launch, words, with_report=with_report)
    except NothingSubmittedError:
        remove_unused(new_folders)
        raise
    if failures and not tolerates_failures:
        raise SweepFailedError("\n\n".join(failures.values()), 1)
    results = []
    for plan, config in zip(plans, configs, strict=True):
        why, name = failures.get(plan.run_dir), config.objective
        value = None
        if why is None and name is not None:
            value = objective_value(RunFolder(plan.run_dir), name, config.objective_of)
        results.append(PointResult(plan.run_dir, name, value, why))
    return results


def rehearse_points(plans: Sequence[Plan], configs: Sequence[Config], points: Sequence[Composed]) -> None:
    """Run one training step of every point on this machine without GPUs, for ``dry_run=deep``.

    The workload of a point runs the step in a temporary folder, and prints the faults that it finds.

    Args:
        plans: plan of each point.
        configs: config of each point, as an instance of its schema.
        points: composed config and overrides of each point.

    Raises:
        ConfigError: a point, or its workload, cannot be rehearsed.
        SweepFailedError: a rehearsal has found a fault.
    """
    failed = []
    for plan, config, (composed, overrides) in zip(plans, configs, points, strict=True):
        with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
            write_settled(plan, RunFolder(folder), copy.deepcopy(composed), overrides)
            if not workload_of(config).rehearse(config, RunFolder(folder)):
                failed.append(plan.title)
    if failed:
        raise SweepFailedError(f"dry_run=deep: the rehearsal has failed for {', '.join(failed)}", 2)


def submit_and_watch(
    plans: Sequence[Plan], console: Console, after: LaunchConfig, typed: Sequence[str], *, with_report: bool = True
) -> dict[str, str]:
    """Submit the unfinished points, follow them until they end, and write the report.

    With ``launch.detach``, only submit the points, and print the commands that follow them.

    Args:
        plans: plan of each point.
        console: console for progress.
        after: keys under ``launch`` in the config, which say how to submit, watch and report.
        typed: overrides of the command, for the record of the sweep.
        with_report: True to write the report.

    Returns:
        Run folder -> reason, for each point that did not finish; empty with ``launch.detach``.

    Raises:
        SweepFailedError: a submission failed, or the user stopped the command by Ctrl-C.
    """
    points = [new_run_status(plan) for plan in unfinished(plans)]
    submit(points, console, sequential=after.sequential)
    sweep = (
        record_sweep(Path(plans[0].run_dir).parent, [plan.point for plan in plans], typed) if len(plans) > 1 else None
    )
    if after.detach and points:
        console.print(follow_up(plans, sweep))
        leave_failover(unfinished(plans), console)
        return {}
    try:
        stops, parallel = after.stop_at_first_failure, side_by_side(after.parallel, plans)
        watch_points(points, console, after.poll_s, stops_at_failure=stops, parallel=parallel)
    except KeyboardInterrupt:
        stop_on_ctrl_c(points, console)
        text = "stopped; the same command resumes from the last checkpoint, or begins again without one"
        raise SweepFailedError(text, 130) from None
    if with_report:
        report_sweep(plans, sweep, console, after.report_files)
        for point in points:
            causes = [event["cause"] for event in point.events() if event["event"].startswith("progress_")]
            for cause in dict.fromkeys(causes):
                console.print(f"warning: {point.name}: {cause}")
    return {str(point.folder.path): explain_end(point) for point in points if point.state != "finished"}


def submit(points: Sequence[RunStatus], console: Console, *, sequential: bool) -> None:
    """Submit points that run in Slurm to Slurm, and enter the other points in the queue of this machine.

    Points with equal resources become one job array. With ``sequential``, each Slurm job starts only after the job
    before it has ended.

    Raises:
        NothingSubmittedError: sbatch refused. Jobs that sbatch accepted before continue.
        SweepFailedError: sbatch did not answer in time, and may have accepted the job.
    """
    by_folder = {str(point.folder.path): point for point in points}
    before: list[SlurmJob] = []
    for group in shapes([point.plan for point in points if point.plan and point.plan.cluster == "slurm"]):
        if sequential:
            group = in_line(group, before)
        try:
            done = submit_somewhere(group, group[0].placement.possible[0])
        except SlurmError as error:
            ids = ", ".join(point.job.job_id for point in points if point.job is not None)
            rest = f"\nalready submitted, and continuing: {ids}" if ids else ""
            # A busy controller may have accepted the job, which then needs its folder.
            kind = SweepFailedError if may_have_taken(error) else NothingSubmittedError
            raise kind(f"{explain_refusal(group[0], error)}{rest}", 1) from error
        before = done.jobs
        for plan, job in zip(group, done.jobs, strict=True):
            record_accepted(by_folder[plan.run_dir], plan, job, done, console)
    for point in points:
        if point.job is None:
            LocalQueueEntry(point.folder).enter(point.events_before)


def follow_up(plans: Sequence[Plan], sweep: Sweep | None) -> str:
    """Return text with the commands by which a user follows a sweep after its launcher has ended."""
    one, number = quote(unfinished(plans)[0].run_dir), "" if sweep is None else f" --sweep {sweep.number}"
    whole = quote(plans[0].run_dir if sweep is None else str(Path(plans[0].run_dir).parent))
    commands = (f"status {whole}", f"logs -f {one}", f"cancel {whole}", f"report {whole}{number}")
    lines = [as_typed(f"  python -m launch.{command}") for command in commands]
    return "\n".join(["the jobs continue without this command; to follow them:", *lines])


def leave_failover(plans: Sequence[Plan], console: Console) -> None:
    """Start a background process that watches points that wait in a queue of Slurm.

    The process moves a point that waits too long to its next candidate, such as another partition. After the time that
    the user set, the process gives the point up. No process is started if no point has another candidate or such a
    time.
    """
    watched = [plan.run_dir for plan in plans if plan.placement.is_watched]
    if watched:
        folder = Path(watched[0]).parent
        log = folder / ".launch" / "move.log"
        process = start_launcher(["move", *watched], log)
        whole = folder if len(plans) > 1 else watched[0]
        console.print(
            f"process {process.pid} on {os.uname().nodename} stays in the background and moves what waits to its next "
            f"place (log: {log}).\nWithout it, say after a reboot, jobs keep their places; to have them moved again:\n"
            f"  nohup python -m launch.move {quote(str(whole))} &"
        )


def report_sweep(plans: Sequence[Plan], sweep: Sweep | None, console: Console, files: Sequence[ReportFile]) -> None:
    """Print the scaling table of a sweep, or the summary of a single run, and write the kinds of files in ``files``.

    ``sweep`` is the record of the sweep; None for a single run.
    """
    from launch.report import select, show_and_write, tabulate_selection

    folder = Path(plans[0].run_dir)
    selection = select(folder) if sweep is None else select(folder := folder.parent, sweep.number)
    try:
        show_and_write(tabulate_selection(selection), console, files)
    except OSError as error:  # The display has failed; the results are still printed.
        later = as_typed(f"python -m launch.report {quote(str(folder))}")
        console.print(f"the report is not written: {error}; later: {later}, or elsewhere with --out FOLDER")
