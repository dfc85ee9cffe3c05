"""Checks of a command's requests at every candidate of ``cluster.placement``, before anything is submitted.

``check_before_submitting`` refuses requests that Slurm would never start, and skips candidates that cannot run a point.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rich.console import Console

from launch.config import Config
from launch.errors import ConfigError
from launch.plan import placement
from launch.plan.placement import Placement
from launch.plan.plan import Plan
from launch.slurm.checks import (
    MB_IN_GB,
    NO_LIMIT,
    Finding,
    Level,
    Request,
    check_request,
    excluded,
    fail,
    kinds_text,
    partitions_of,
    soften_some,
)
from launch.slurm.dependency import shapes
from launch.slurm.jobs import sbatch_text
from launch.slurm.limits import Limits, Partition, SlurmFacts


def requests_of(
    plans: Sequence[Plan], configs: dict[str, Config], facts: SlurmFacts
) -> list[tuple[list[Plan], Request]]:
    """Return each group of plans with equal resources, and its request. ``configs`` is run folder -> config."""
    found = []
    for group in shapes(plans):
        config, points = configs[group[0].run_dir], tuple(plan.title for plan in group)
        found.append((group, Request(config, group[0], points, sbatch_text(group), excluded(config, facts))))
    return found


def check_candidates(facts: SlurmFacts, request: Request) -> list[tuple[str, list[Finding]]]:
    """Return the name of each candidate of a request, and the findings of all checks there.

    Without an answer of a controller, only the config of the candidate is checked.
    """
    found = []
    for name, config in placement.configs(request.config):
        try:
            config.validate()
            findings = [] if facts.limits is None else check_request(facts.limits, replace(request, config=config))
        except ConfigError as error:
            findings = [fail("resources", error.found, f"expected: {error.expected}", error.fix)]
        found.append((name, findings))
    return found


def check_requests(facts: SlurmFacts, requests: Sequence[Request]) -> list[Finding]:
    """Return the findings of all checks of all requests at every candidate, each finding once.

    A candidate that cannot run a point is skipped.
    """
    found: list[Finding] = []
    for request in requests:
        each = []
        for name, findings in check_candidates(facts, request):
            at = f"at {name}: " if name else ""
            each.append([f if f.level is Level.ok else replace(f, found=f"{at}{f.found}") for f in findings])
        found += soften_some(each)
    return list(dict.fromkeys(found))


def possible_places(facts: SlurmFacts, request: Request) -> tuple[Placement, list[list[Finding]]]:
    """Return the placement of a request without impossible candidates, and the errors of each candidate.

    If no candidate is left, candidates with only uncertain errors remain: Slurm then decides.
    """
    errors = [[f for f in findings if f.level is Level.error] for _, findings in check_candidates(facts, request)]
    some_fit = any(not found for found in errors)
    places = request.plan.placement
    for index, found in enumerate(errors):
        if found and (some_fit or not all(error.unless for error in found)):
            places = places.rule_out(index, "; ".join(error.found for error in found))
    return places, errors


# Refusals and warnings of a command before it submits.


def refuse_impossible(facts: SlurmFacts, request: Request, places: Placement, errors: Sequence[Finding]) -> None:
    """Raise ConfigError if a job could start at no candidate of ``places``. ``errors`` are the errors that the checks
    found for the first candidate."""
    if places.possible:
        return
    points = f"the job for {', '.join(request.points)}"
    if request.config.cluster.placement:
        reasons = "".join(f"\n  {candidate.name}: {candidate.never}" for candidate in places.candidates)
        raise ConfigError(
            f"{points} could run at no candidate of cluster.placement:{reasons}",
            "a candidate whose partition can run it",
            "python -m launch.doctor, with the same arguments: for each candidate it says what to request instead",
        )
    assert facts.limits is not None
    rooms = [room_in(facts.limits, part) for part in partitions_of(facts.limits, request.config)]
    fixes = dict.fromkeys(error.fix for error in errors)
    raise ConfigError(
        f"{points}, which Slurm would never start: {places.candidates[0].never}",
        "; ".join(rooms or (room_in(facts.limits, part) for part in facts.limits.partitions)),
        f"{' '.join(fixes)}; launch.check_limits=false submits without this check",
    )


def room_in(limits: Limits, partition: Partition) -> str:
    """Describe the largest job that a partition takes: nodes, time, and the resources of the best node."""
    nodes = limits.nodes_of(partition)
    if not nodes:
        return f"partition {partition.name} has no nodes"
    most = min(len(nodes), partition.max_nodes or NO_LIMIT)
    time = "without a time limit" if partition.max_time_min is None else f"for {partition.max_time_min:g} min"
    cpus = min(max(node.cpus for node in nodes), partition.max_cpus_per_node or NO_LIMIT)
    memory = min(max(node.memory_mb for node in nodes), partition.max_memory_mb or NO_LIMIT) / MB_IN_GB
    each = f"up to {cpus} CPUs, {memory:.4g} GiB of memory, {kinds_text(nodes)}"
    return f"partition {partition.name}: at most {most} nodes {time}, each of {each}"


def check_before_submitting(
    facts: SlurmFacts, plans: Sequence[Plan], configs: Sequence[Config], console: Console
) -> list[Plan]:
    """Compare the requests of a command with Slurm's limits, and print the candidates that are ruled out.

    Returns:
        The plans without the candidates where they could never run.

    Raises:
        ConfigError: a point could start nowhere.
    """
    if facts.limits is None:
        said = f"warning: {facts.slurm_problem}: what is asked of Slurm was not compared with what it has"
        console.print(said)
        return list(plans)
    by_folder = {plan.run_dir: config for plan, config in zip(plans, configs, strict=True)}
    checked: dict[str, Placement] = {}
    lines: list[str] = []
    requests = requests_of([plan for plan in plans if plan.cluster == "slurm"], by_folder, facts)
    # The largest request first: advice for it also suits the smaller ones.
    for group, request in sorted(requests, key=lambda one: -one[1].config.nodes_asked):
        (places, errors), points = possible_places(facts, request), ", ".join(request.points)
        refuse_impossible(facts, request, places, errors[0])
        checked |= {plan.run_dir: places for plan in group}
        for candidate, found in zip(places.candidates, errors, strict=True):
            if candidate.never:
                lines.append(f"cluster.placement: {candidate.name} is skipped: {candidate.never} (for {points})")
                continue
            at = f"at {candidate.name}: " if candidate.name else ""
            lines += [
                f"warning: {at}{error.found}: {error.why}, unless {error.unless}; or type {error.fix} (for {points})"
                for error in found
            ]
    for line in dict.fromkeys(lines):
        console.print(line)
    return [plan.replace_placement(checked[plan.run_dir]) if plan.run_dir in checked else plan for plan in plans]
