"""``python -m launch.doctor``: look for what would break a run, without submitting it.

    python -m launch.doctor                                   this machine, and the cluster if there is one
    python -m launch.doctor -m nodes=1,2,4 cluster=mysite     the same arguments as python -m launch
    python -m launch.doctor nodes=8 cluster=mysite --on-cluster       and a short job that measures the nodes

Exit status: 0 where nothing is an error, 1 where something is, 2 where the arguments cannot be understood.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from submitit.core.utils import FailedJobError

import gpt_launch.own_names  # noqa: F401
from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch, require_folder, sweep_points, typed_config
from launch.doctor import machine, on_cluster, verdict
from launch.doctor.on_cluster import group_line, table
from launch.errors import CommandParser, ConfigError, refusing
from launch.plan.plan import Plan, make_plan
from launch.runs.files import deny_others_writing
from launch.runs.find import labels_for
from launch.slurm import facts, places
from launch.slurm import facts as findings
from launch.slurm.checks import Case, partitions_of
from launch.slurm.client import SlurmError
from launch.slurm.facts import Facts, Finding, Request
from launch.slurm.limits import Limits
from launch.slurm.points import CHOICES, gpu_type
from launch.slurm.submit import shapes

COMMAND = re.compile(r"(python -m launch\b.* )\.\.\.$")
"""Command to type that takes the same arguments."""


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = CommandParser(
        prog="python -m launch.doctor", description="Look for what would break a run, without submitting it."
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as you would give them to python -m launch")
    parser.add_argument(
        "-m", "--multirun", action="store_true", help="as for python -m launch; sweeps need no -m here either"
    )
    parser.add_argument(
        "--config-dir", "-cd", metavar="FOLDER", help="config files of your own, as for python -m launch"
    )
    parser.add_argument(
        "--on-cluster", action="store_true", help="submit a job of some minutes that measures the nodes"
    )
    parser.add_argument("--wait-min", type=float, default=10.0, help="how long that job may wait in the queue (10)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the report")
    return parser.parse_intermixed_args(argv)


def configs_of(points: Sequence[Sequence[str]], config_dir: Path | None = None) -> list[Config]:
    """The config of each point; ConfigError."""
    return [typed_config(compose_launch(overrides, config_dir)) for overrides in points]


def examine(
    points: Sequence[Sequence[str]], config_dir: Path | None = None
) -> tuple[list[Finding], list[Finding], list[Request], Facts]:
    """Examine what can be told without submitting: of this machine, of the requests; and what that was made from."""
    configs = configs_of(points, config_dir)
    first = configs[0]
    seen = facts.gather(
        first.cluster.kind,
        Path(first.output_dir),
        facts.clusters_named(configs),
        facts.container_problem(first.cluster),
    )
    plans: dict[str, tuple[Plan, Config, Sequence[str]]] = {}
    of_request: list[Finding] = []
    for overrides, config in zip(points, configs, strict=True):
        try:
            of_request += settle_resources(config, seen)
            sizes = [one.world_size for one in configs]
            plan = make_plan(config, list(overrides), seen.kind, sizes, gpu_type(config, seen))
            plans[plan.run_dir] = (plan, config, overrides)
        except ConfigError as error:
            of_request.append(findings.refusal(" ".join(["plan", *overrides]), error))
    named = [list(overrides) for _, _, overrides in plans.values()]
    labels = labels_for([(Path(path), typed) for path, typed in zip(plans, named, strict=True)]) if plans else []
    shown = [replace(plan, label=label) for (plan, _, _), label in zip(plans.values(), labels, strict=True)]
    groups = shapes(shown)
    requests = facts.requests_of(groups, {path: config for path, (_, config, _) in plans.items()}, seen)
    if seen.kind is ClusterKind.slurm:
        of_request += places.check_requests(seen, requests)
    of_machine = machine.check_machine(seen, first, requests, own_addresses(seen.machine.host))
    if seen.limits is not None and seen.kind is ClusterKind.slurm:
        earlier = on_cluster.earlier_results(Path(seen.output.path), on_cluster.name_of(seen.limits))
        of_machine = settle_sharing(of_machine, earlier)
    return of_machine, list(dict.fromkeys(of_request)), requests, seen  # what holds for several points is said once


def settle_resources(config: Config, seen: Facts) -> list[Finding]:
    """Ask for the GPUs and CPUs that the launcher would ask for, and say so.

    Raises:
        ConfigError: the launcher would refuse to choose.
    """
    if seen.kind is not ClusterKind.slurm:
        return []
    found = []
    for key, choose in CHOICES.items():
        number, finding = choose(config, seen)
        if number is not None:
            setattr(config.cluster, key, number)
        found += [] if finding is None else [finding]
    return found


def settle_sharing(of_machine: list[Finding], results: dict[str, Any] | None) -> list[Finding]:
    """Replace what the filesystems' types suggest of the folders by what nodes have seen of them, where they have."""
    if results is None or not verdict.is_shared(results):
        return of_machine
    seen = findings.fine("shared folder", f"every node of job {results['job_id']} saw it and wrote there")
    return [*(finding for finding in of_machine if finding.check not in ("shared folder", "program")), seen]


def complete(found: Sequence[Finding], given: argparse.Namespace) -> list[Finding]:
    """Put the arguments of this command where a command to type ends with three dots, so that it can be pasted."""
    folder = [] if given.config_dir is None else ["--config-dir", given.config_dir]
    words = shlex.join([*(["-m"] if given.multirun else []), *given.overrides, *folder])
    return [replace(one, fix=COMMAND.sub(rf"\1{_literal(words)}", one.fix).rstrip()) for one in found]


def _literal(text: str) -> str:
    """Return the text as a replacement of ``re.sub``, in which a backslash would mean something."""
    return text.replace("\\", r"\\")


def own_addresses(host: str) -> tuple[str, ...]:
    """Addresses that this machine's name resolves to."""
    try:
        return tuple(sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)}))
    except OSError:
        return ()


def run_on_cluster(
    seen: Facts, requests: Sequence[Request], wait_min: float, console: Console
) -> tuple[list[Finding], dict[str, Any] | None]:
    """Measure the nodes of the largest request.

    Raises:
        ConfigError: there is no cluster to submit to.
    """
    if seen.limits is None or not requests:
        expected = "a Slurm cluster that answers, and a run that can be planned"
        raise ConfigError("--on-cluster without a cluster", expected, "python -m launch.doctor, without --on-cluster")
    largest = max(requests, key=lambda request: (request.plan.nodes, request.plan.world_size))
    settled = places.possible_places(seen, largest)
    if settled.possible:
        largest = replace(largest, plan=largest.plan.replace_placement(settled))
    try:
        results = on_cluster.measure(
            largest,
            on_cluster.ClusterOfJob(on_cluster.name_of(seen.limits), left_over(seen, largest)),
            Path(seen.output.path),
            wait_min,
            lambda line: console.print(line, highlight=False, markup=False),
        )
    except (SlurmError, FailedJobError) as error:
        return [on_cluster.refused(error)], None
    if results["ranks"]:
        console.print(table(results))
        console.print(group_line(results), highlight=False)
    console.print(f"wrote {results['folder']}/results.json", highlight=False, markup=False)
    return verdict.check_results(results), results


def left_over(seen: Facts, request: Request) -> int | None:
    """Nodes that work beyond those that a request asks for, where it could go; None where Slurm does not tell."""
    there = seen.at(request.config.cluster.cluster)
    if not isinstance(there, Limits):
        return None
    of_each = [
        sum(node.is_usable for node in Case(there, partition, request).nodes)
        for partition in partitions_of(there, request.config)
    ]
    return max(0, max(of_each) - request.config.nodes_asked) if of_each else None


def diagnose(given: argparse.Namespace, console: Console) -> tuple[list[Finding], dict[str, Any] | None]:
    """Look, submit where asked to, and say what was found."""
    config_dir = None if given.config_dir is None else require_folder("--config-dir", given.config_dir)
    points = sweep_points(given.overrides, config_dir)
    of_machine, of_request, requests, seen = examine(points, config_dir)
    if not given.on_cluster:
        return [*of_machine, *of_request], None
    if findings.has_errors(of_request):
        why = "the job asks for the same resources as the run"
        skipped = findings.warn(
            "job", "not submitted: see the errors above", why, "the lines above, then the same command again"
        )
        return [*of_machine, *of_request, skipped], None
    measured, results = run_on_cluster(seen, requests, given.wait_min, console)
    if results is not None and verdict.is_shared(results):
        of_machine = [finding for finding in of_machine if finding.check not in ("shared folder", "program")]
    if results is not None and results["nodes"]:  # what this very command would tell has been told
        of_machine = [finding for finding in of_machine if "--on-cluster" not in finding.fix]
    return [*of_machine, *of_request, *measured], results


@refusing
def main(argv: Sequence[str] | None = None) -> int:
    """Print the report, or JSON alone on standard output."""
    given = arguments(argv)
    console = Console(soft_wrap=True, stderr=given.json)
    deny_others_writing()
    try:
        found, results = diagnose(given, console)
    except KeyboardInterrupt:
        return 130
    found = complete(found, given)
    status = int(findings.has_errors(found))
    if given.json:
        print(json.dumps({"status": status, "findings": findings.as_json(found), "on_cluster": results}, indent=2))
    else:
        findings.show(found, console)
        console.print(findings.summary(found), highlight=False)
    return status


if __name__ == "__main__":
    sys.exit(main())
