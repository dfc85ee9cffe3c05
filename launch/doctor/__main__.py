"""``python -m launch.doctor``: find what would break a run, without a submission.

    python -m launch.doctor                                   this machine, and the cluster if there is one
    python -m launch.doctor -m nodes=1,2,4 cluster=mysite     the same arguments as python -m launch
    python -m launch.doctor nodes=8 cluster=mysite --on-cluster       and a short job that measures the nodes

Exit status: 0 if nothing is an error, 1 if something is, 2 if the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from submitit.core.utils import FailedJobError

import gpt_launch.own_names  # noqa: F401
from launch.config import ClusterKind, Config
from launch.config.compose import compose_launch, require_folder, sweep_points, typed_config
from launch.doctor import job, machine, verdict
from launch.doctor.machine import Facts
from launch.errors import CommandParser, ConfigError, closest, refusing
from launch.plan.plan import Plan, make_plan
from launch.plan.preflight import print_table
from launch.runs.files import deny_others_writing
from launch.runs.find import labels_for
from launch.slurm import client as scheduler
from launch.slurm import places
from launch.slurm.checks import Case, partitions_of
from launch.slurm.client import SlurmError
from launch.slurm.facts import (
    Finding,
    Level,
    Request,
    clusters_named,
    excluded,
    fail,
    fine,
    has_errors,
    requests_of,
    warn,
)
from launch.slurm.limits import Limits
from launch.slurm.points import CHOICES, gpu_type
from launch.slurm.submit import refusal_text, shapes

COMMAND = re.compile(r"(python -m launch\b.* )\.\.\.$")
"""Pattern of a command in a finding whose three dots stand for this command's arguments."""
STYLES = {Level.ok: "green", Level.warning: "yellow", Level.error: "bold red"}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the arguments of the command line."""
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
    """Print the report, or only JSON on standard output. Returns the exit status."""
    given = arguments(argv)
    console = Console(soft_wrap=True, stderr=given.json)
    deny_others_writing()
    try:
        found, results = diagnose(given, console)
    except KeyboardInterrupt:
        return 130
    found = complete(found, given)
    status = int(has_errors(found))
    if given.json:
        findings = [
            {
                **{"level": one.level.value, "check": one.check, "found": one.found},
                **{"why": one.why, "fix": one.fix, "unless": one.unless},
            }
            for one in found
        ]
        print(json.dumps({"status": status, "findings": findings, "on_cluster": results}, indent=2))
        return status
    for one in found:
        console.print(Text(f"{one.level.value:<8}", STYLES[one.level]) + Text(f"{one.check}: {one.found}"))
        if one.why:
            unless = f", unless {one.unless}" if one.unless else ""
            console.print(Text(f"{'':8}why   {one.why}{unless}", "dim"))
            console.print(Text(f"{'':8}type  {one.fix}"))
    levels = [one.level for one in found]
    errors, warnings, fines = (levels.count(level) for level in (Level.error, Level.warning, Level.ok))
    console.print(f"{errors} errors, {warnings} warnings, {fines} ok", highlight=False)
    return status


def diagnose(given: argparse.Namespace, console: Console) -> tuple[list[Finding], dict[str, Any] | None]:
    """Run all checks, and with --on-cluster the job. Returns the findings and the results of the job."""
    config_dir = None if given.config_dir is None else require_folder("--config-dir", given.config_dir)
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
        # Advice to run this same command is left out, and so are guesses about folders that the nodes have measured.
        guesses = ("shared folder", "program") if verdict.is_shared(results) else ()
        of_machine = [one for one in of_machine if "--on-cluster" not in one.fix and one.check not in guesses]
    return [*of_machine, *of_request, *measured], results


def complete(found: Sequence[Finding], given: argparse.Namespace) -> list[Finding]:
    """Replace three dots at the end of a command by this command's arguments, so that a user can paste it."""
    folder = [] if given.config_dir is None else ["--config-dir", given.config_dir]
    words = shlex.join([*(["-m"] if given.multirun else []), *given.overrides, *folder])
    return [replace(one, fix=COMMAND.sub(lambda match: match[1] + words, one.fix).rstrip()) for one in found]


# The checks that need no job.


def configs_of(points: Sequence[Sequence[str]], config_dir: Path | None = None) -> list[Config]:
    """Return the config of each point. Raises ConfigError."""
    return [typed_config(compose_launch(overrides, config_dir)) for overrides in points]


def examine(
    points: Sequence[Sequence[str]], config_dir: Path | None = None
) -> tuple[list[Finding], list[Finding], list[Request], Facts]:
    """Run the checks that need no job. Returns findings of the machine and of the requests, requests, and facts."""
    configs = configs_of(points, config_dir)
    seen = machine.gather(configs[0], clusters_named(configs))
    plans: dict[str, tuple[Plan, Config, Sequence[str]]] = {}
    chosen: list[Finding] = []
    refused: list[Finding] = []
    requests: list[Request] = []
    for overrides, config in zip(points, configs, strict=True):
        try:
            chosen += choose_resources(config, seen)
            sizes = [one.world_size for one in configs]
            plan = make_plan(config, list(overrides), seen.kind, sizes, gpu_type(config, seen))
            plans[plan.run_dir] = (plan, config, overrides)
        except ConfigError as error:
            title, why = " ".join(overrides), f"python -m launch refuses it; expected: {error.expected}"
            refused.append(fail(f"plan {title}".rstrip(), error.found, why, error.fix))
            requests.append(Request(config, None, (title,), "", excluded(config, seen)))
    names = labels_for([(Path(path), list(words)) for path, (_, _, words) in plans.items()]) if plans else []
    shown = [replace(plan, label=label) for (plan, _, _), label in zip(plans.values(), names, strict=True)]
    planned = requests_of(shapes(shown), {path: config for path, (_, config, _) in plans.items()}, seen)
    of_machine = machine.check_machine(seen, configs[0], planned)
    of_request = list(chosen)
    if seen.kind is ClusterKind.slurm:
        of_request += places.check_requests(seen, [*planned, *requests])
        if seen.limits is not None:
            earlier = job.earlier_results(Path(seen.output.path), job.name_of(seen.limits))
            of_machine = settle_sharing(of_machine, earlier)
            for request in () if has_errors(of_request) else planned:
                of_request += check_options(request)
    return of_machine, list(dict.fromkeys([*of_request, *refused])), planned, seen  # Each finding once.


def choose_resources(config: Config, seen: Facts) -> list[Finding]:
    """Set the GPUs and CPUs in ``config`` that the launcher would request, and return findings about them.

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


def check_options(request: Request) -> Iterator[Finding]:
    """Check options in cluster.additional_parameters by ``sbatch --test-only``, which submits nothing."""
    given = request.config.cluster.additional_parameters
    if not given:
        return
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(request.batch_text)
        file.flush()
        try:
            scheduler.run("sbatch", "--test-only", file.name)
        except SlurmError as error:
            said = refusal_text(error)
            names = ", ".join(f"{name}={value}" for name, value in given.items())
            fix = "sbatch --help"
            if unknown := re.search(r"unrecognized option '--([\w-]+)", said):
                options = re.findall(r"--([a-z][a-z-]+)", scheduler.run("sbatch", "--help"))
                likely = [name.replace("-", "_") for name in closest(unknown[1], options)]
                fix = f"+cluster.additional_parameters.{likely[0]}=VALUE" if likely else fix
            why = "sbatch would refuse the job of the run"
            yield fail("options", f"cluster.additional_parameters with {names}: {said}", why, fix)


def settle_sharing(of_machine: list[Finding], results: dict[str, Any] | None) -> list[Finding]:
    """Return the findings. Measurements of the folders by an earlier job replace guesses from their filesystems."""
    if results is None or not verdict.is_shared(results):
        return of_machine
    seen = fine("shared folder", f"every node of job {results['job_id']} saw it and wrote there")
    return [*(finding for finding in of_machine if finding.check not in ("shared folder", "program")), seen]


# The job that measures the nodes.


def run_on_cluster(
    seen: Facts, requests: Sequence[Request], wait_min: float, console: Console
) -> tuple[list[Finding], dict[str, Any] | None]:
    """Measure the nodes of the largest request. Returns findings and results; the results are None if sbatch refuses.

    Raises:
        ConfigError: there is no cluster, or no run that can be planned.
    """
    if seen.limits is None or not requests:
        expected = "a Slurm cluster that answers, and a run that can be planned"
        raise ConfigError("--on-cluster without a cluster", expected, "python -m launch.doctor, without --on-cluster")
    largest = max(requests, key=lambda request: (request.config.nodes, request.config.world_size))
    placed = places.possible_places(seen, largest)
    if placed.possible and largest.plan is not None:
        largest = replace(largest, plan=largest.plan.replace_placement(placed))
    about = {"cluster": job.name_of(seen.limits), "left_over": left_over(seen, largest)}

    def say(line: str) -> None:
        console.print(line, highlight=False, markup=False)

    try:
        results = job.measure(largest, about, Path(seen.output.path), wait_min, say)
    except (SlurmError, FailedJobError) as error:
        why = "a run with the same resources would be refused too"
        return [fail("job", refusal_text(SlurmError(str(error))), why, "python -m launch dry_run=true ...")], None
    if results["ranks"]:
        show_measurements(results, console)
    say(f"wrote {results['folder']}/results.json")
    return verdict.check_results(results), results


def left_over(seen: Facts, request: Request) -> int | None:
    """Return the number of working nodes beyond the requested ones, in the best partition; None if not known."""
    there = seen.at(request.config.cluster.cluster)
    if not isinstance(there, Limits):
        return None
    of_each = [
        sum(node.is_usable for node in Case(there, partition, request).nodes)
        for partition in partitions_of(there, request.config)
    ]
    return max(0, max(of_each) - request.config.nodes_asked) if of_each else None


def show_measurements(results: dict[str, Any], console: Console) -> None:
    """Print a line about each rank with its device and links, and a line about the all-reduce over all ranks."""
    clocks = {node["index"]: node.get("clock_offset_s") for node in results["nodes"]}
    rows = []
    for rank in results["ranks"]:
        rates = [link["bandwidth_gbit"] for link in rank.get("links", ())]
        delays = [link["latency_us"] for link in rank.get("links", ())]
        clock = clocks.get(rank["node"])
        rows.append(
            [
                *(str(rank["rank"]), str(rank["host"]), str(rank["device"]), f"{rank['matmul_tflops']:.3g}"),
                *((f"{max(rates):.3g}", f"{min(rates):.3g}", f"{min(delays):.0f}") if rates else ("", "", "")),
                "" if clock is None else f"{1000 * clock:+.3f}",
            ]
        )
    links = ("best link Gbit/s", "worst link Gbit/s", "latency us")
    titles = ("rank", "host", "device", "matmul TFLOP/s", *links, "clock ms")
    print_table(console, titles, rows, left=("host", "device"))
    groups = [rank["group"] for rank in results["ranks"] if "group" in rank]
    if groups:
        worst = min(groups, key=lambda group: float(group["bandwidth_gbit"]))
        latency = max(float(group["latency_us"]) for group in groups)
        over = f"all-reduce over {len(groups)} ranks ({results['ranks'][0]['backend']})"
        rate = f"{worst['bandwidth_gbit']:.3g} Gbit/s (bus {worst['bus_gbit']:.3g})"
        size = f"{worst['bytes'] / 2**20:g} MiB"
        console.print(f"{over}: {latency:.0f} us for 4 bytes, {size} at {rate}", highlight=False)


if __name__ == "__main__":
    sys.exit(main())
