"""``python -m launch.doctor``: find what would break a run, without a submission.

    python -m launch.doctor                                   this machine, and the cluster if there is one
    python -m launch.doctor -m nodes=1,2,4 cluster=mysite     the same arguments as python -m launch
    python -m launch.doctor nodes=8 cluster=mysite --on-cluster       and a short job that measures the nodes

Exit status: 0 if no finding is an error, 1 if a finding is an error, 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from submitit.core.utils import FailedJobError

import gpt_launch.own_names  # noqa: F401
from gpt_launch import as_typed
from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch, require_config_dir, sweep_points, typed_config
from launch.doctor import findings, job
from launch.doctor.findings import Facts
from launch.errors import CommandParser, ConfigError, refusing
from launch.plan import placement
from launch.plan.plan import Plan, make_plan
from launch.runs.find import plain_console
from launch.runs.folder import deny_others_writing
from launch.slurm import checks
from launch.slurm.checks import Finding, Level, Request, fail, has_errors, warn
from launch.slurm.client import SlurmError
from launch.slurm.resolve import choose_on_slurm, gpu_type
from launch.slurm.submit import refusal_text

STYLES = {Level.ok: "green", Level.warning: "yellow", Level.error: "bold red"}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the parsed arguments ``argv``; None for those of this process."""
    description = "Find what would break a run, without a submission."
    parser = CommandParser(prog="python -m launch.doctor", description=description)
    add = parser.add_argument
    add("overrides", nargs="*", metavar="KEY=VALUE", help="as you would give them to python -m launch")
    add("-m", "--multirun", action="store_true", help="as for python -m launch; sweeps need no -m here either")
    add("--config-dir", "-cd", metavar="FOLDER", help="config files of your own, as for python -m launch")
    add("--on-cluster", action="store_true", help="submit a job of some minutes that measures the nodes")
    add("--wait-min", type=float, default=10.0, help="how long that job may wait in the queue (10)")
    add("--json", action="store_true", help="print JSON instead of the report")
    return parser.parse_intermixed_args(argv)


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; with --json, print only JSON on standard output.

    Returns the exit status: 0, 1 if a finding is an error, 130 after Ctrl-C.
    """
    given = arguments(argv)
    console = plain_console(stderr=given.json)
    deny_others_writing()
    try:
        found, results = diagnose(given, console)
    except KeyboardInterrupt:
        return 130
    status = int(has_errors(found))
    if given.json:
        rest = ("check", "found", "why", "fix", "unless")
        findings = [{"level": one.level.value, **{name: getattr(one, name) for name in rest}} for one in found]
        print(json.dumps({"status": status, "findings": findings, "on_cluster": results}, indent=2))
        return status
    for one in found:
        console.print(Text(f"{one.level.value:<8}", STYLES[one.level]) + Text(f"{one.check}: {as_typed(one.found)}"))
        if one.why:
            unless = f", unless {one.unless}" if one.unless else ""
            console.print(Text(f"{'':8}why   {as_typed(one.why)}{unless}", "dim"))
            console.print(Text(f"{'':8}type  {as_typed(one.fix)}"))
    count = Counter(one.level for one in found)
    console.print(f"{count[Level.error]} errors, {count[Level.warning]} warnings, {count[Level.ok]} ok")
    return status


def diagnose(given: argparse.Namespace, console: Console) -> tuple[list[Finding], dict[str, Any] | None]:
    """Run all checks, and with ``--on-cluster`` the doctor's job. Returns the findings, and the results of the job.

    The results are None if no job ran. ``given`` has the arguments of the command line.

    Raises:
        ConfigError: an override is wrong, or there is no cluster for the job.
    """
    config_dir = require_config_dir(given.config_dir)
    points = sweep_points(given.overrides, config_dir)
    of_machine, of_request, requests, seen = examine(points, config_dir)
    if not given.on_cluster:
        return [*of_machine, *of_request], None
    if has_errors(of_request):
        why, again = "the job asks for the same resources as the run", "the lines above, then the same command again"
        skipped = warn("job", "not submitted: see the errors above", why, again)
        return [*of_machine, *of_request, skipped], None
    measured, results = run_on_cluster(seen, requests, given.wait_min, console)
    if results is not None and results["nodes"]:
        # Guesses that the nodes have measured are left out, and so is advice to run this same command.
        known = {"program", *(one.check for one in measured)}
        of_machine = [one for one in of_machine if one.check not in known and "--on-cluster" not in one.fix]
    return [*of_machine, *of_request, *measured], results


# The checks that need no job.


def configs_of(points: Sequence[Sequence[str]], config_dir: Path | None = None) -> list[Config]:
    """Return the config of each point. Raises ConfigError if an override is unknown or wrong.

    ``points`` has the overrides of each point. ``config_dir`` is the folder of the user's own config files; None if
    there is none.
    """
    return [typed_config(compose_launch(overrides, config_dir)) for overrides in points]


def examine(
    points: Sequence[Sequence[str]], config_dir: Path | None = None
) -> tuple[list[Finding], list[Finding], list[Request], Facts]:
    """Run the checks that need no job.

    Args:
        points: overrides of each point.
        config_dir: folder of the user's own config files; None if there is none.

    Returns:
        The findings about the machine; the findings about the requests to Slurm; these requests, one for all points
        with equal resources; the facts of ``gather``.
    """
    configs = configs_of(points, config_dir)
    seen = findings.gather(configs)
    plans: dict[str, Plan] = {}
    planned: dict[str, Config] = {}
    of_request: list[Finding] = []
    sizes = [config.world_size for config in configs]
    for overrides, config in zip(points, configs, strict=True):
        try:
            of_request += choose_on_slurm(config, seen) if seen.kind is ClusterKind.slurm else []
            plan = make_plan(config, list(overrides), seen.kind, sizes, gpu_type(config, seen))
            plans[plan.run_dir], planned[plan.run_dir] = plan, config
        except ConfigError as error:
            if seen.limits is not None:  # The other checks of a request need a plan.
                for _, there in placement.configs(config):
                    of_request += checks.check_partition_names(seen.limits, there)
            why = f"python -m launch refuses it; expected: {error.expected}"
            of_request.append(fail(f"plan {' '.join(overrides)}".rstrip(), error.found, why, error.fix))
    requests = [request for _, request in checks.requests_of([*plans.values()], planned, seen)]
    if seen.kind is ClusterKind.slurm:
        of_request += checks.check_requests(seen, requests)
    of_machine = findings.check_machine(seen, configs[0], requests)
    return of_machine, list(dict.fromkeys(of_request)), requests, seen  # Each finding once.


# The job that measures the nodes.


def run_on_cluster(
    seen: Facts, requests: Sequence[Request], wait_min: float, console: Console
) -> tuple[list[Finding], dict[str, Any] | None]:
    """Submit the doctor's job with the resources of the command's largest request, and wait until it has ended.

    Returns the findings, and the results of the job. The results are None if sbatch refuses the job, or Slurm fails.

    Args:
        seen: facts about the login node and Slurm.
        requests: requests to Slurm by the command, one for all points with equal resources.
        wait_min: minutes after which a pending job is cancelled.
        console: console for progress.

    Raises:
        ConfigError: there is no cluster, or no run that can be planned.
    """
    if seen.limits is None or not requests:
        expected = "a Slurm cluster that answers, and a run that can be planned"
        raise ConfigError("--on-cluster without a cluster", expected, "python -m launch.doctor, without --on-cluster")
    largest = max(requests, key=lambda request: (request.config.nodes, request.config.world_size))
    placed, _ = checks.possible_places(seen, largest)
    if placed.possible:
        largest = replace(largest, plan=largest.plan.replace_placement(placed))

    try:
        results = job.measure_nodes(largest, Path(seen.output.path), wait_min, console.print)
    except (SlurmError, FailedJobError) as error:
        why = "a run with the same resources would be refused too"
        return [fail("job", refusal_text(SlurmError(str(error))), why, "python -m launch dry_run=true ...")], None
    console.print(f"wrote {results['folder']}/results.json")
    return findings.check_results(results), results


if __name__ == "__main__":
    sys.exit(main())
