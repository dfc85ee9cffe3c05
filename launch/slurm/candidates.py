"""Checks of what a command submits: where each point could run, and why it could not elsewhere.

Applies the checks of ``launch.slurm.request`` to every candidate of ``cluster.placement``, or to the one place there
is without a list. Pure functions over Slurm's limits and a request; ``look_before_submitting`` prints what they find.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console

from launch.config import Config
from launch.errors import ConfigError
from launch.plan import placement
from launch.plan.placement import Placement
from launch.plan.plan import Plan
from launch.slurm import request as asked
from launch.slurm.facts import Finding, Level, Request, SlurmFacts, fail, has_errors, requests_of
from launch.slurm.limits import Limits
from launch.slurm.request import what_fits
from launch.slurm.submit import shapes


def check_requests(facts: SlurmFacts, requests: Sequence[Request]) -> list[Finding]:
    """All checks of all jobs, each at every candidate of its placement; what is said twice is said once."""
    found: list[Finding] = []
    for request in requests:
        each = [check_at(facts, request, name, config) for name, config in placement.configs(request.config)]
        some_fit = any(not has_errors(findings) for findings in each)
        for findings in each:
            # One candidate that cannot is no obstacle: the launcher skips it.
            found += [asked.soften(finding) if some_fit else finding for finding in findings]
    return list(dict.fromkeys(found))


def check_at(facts: SlurmFacts, request: Request, name: str, config: Config) -> list[Finding]:
    """All checks at one candidate, whose name goes with every complaint; no name if there is no list."""
    try:
        config.validate()
    except ConfigError as error:
        findings = [fail("resources", error.found, f"expected: {error.expected}", error.fix)]
    else:
        findings = check_on_its_cluster(facts, replace(request, config=config))
    if not name:
        return findings
    return [f if f.level is Level.ok else replace(f, found=f"at {name}: {f.found}") for f in findings]


def check_on_its_cluster(facts: SlurmFacts, request: Request) -> list[Finding]:
    """All checks against the limits of the cluster that the request goes to; none where no controller answers here."""
    if facts.limits is None:
        return []
    name = request.config.cluster.cluster
    there = facts.at(name)
    if isinstance(there, str):
        fix = "sacctmgr show clusters lists those that this cluster's slurmdbd knows; cluster.cluster=null is this one"
        return [fail("cluster", f"cluster.cluster={name}, and {there}", "nothing can be submitted there", fix)]
    return asked.check_request(there, request, facts.groups)


def errors_at(facts: SlurmFacts, request: Request) -> list[list[Finding]]:
    """The errors of a request at each candidate."""
    each = (check_at(facts, request, "", config) for _, config in placement.configs(request.config))
    return [[finding for finding in findings if finding.level is Level.error] for findings in each]


def settle(facts: SlurmFacts, request: Request) -> Placement:
    """The placement of a request, with the reason at each candidate where it could never run.

    Where no candidate is left, those stay whose errors are all in doubt: Slurm is then let to say.
    """
    errors = errors_at(facts, request)
    some_fit = any(not found for found in errors)
    settled = request.plan.placement
    for index, found in enumerate(errors):
        if found and (some_fit or not all(error.unless for error in found)):
            settled = settled.rule_out(index, "; ".join(error.found for error in found))
    return settled


def refuse_missing_nodes(facts: SlurmFacts, configs: Sequence[Config]) -> None:
    """Raise ConfigError if a point asks for more nodes than any partition has that it could go to.

    Needs no plan of the points, unlike the other checks; says nothing where an option or a plugin of the site decides.
    """
    for config in sorted(configs, key=lambda config: -config.nodes_asked):
        most = max((most_nodes(facts, candidate) for _, candidate in placement.configs(config)), default=float("inf"))
        if config.nodes_asked > most:
            spares = f" and spare_nodes={config.spare_nodes}" if config.spare_nodes else ""
            raise ConfigError(
                f"nodes={config.nodes}{spares}, and {int(most)} nodes at most in a partition that the job could go to",
                fitting(facts, config),
                f"{asked.fewer_nodes(config, int(most))}; where you know better, launch.check_limits=false",
            )


def most_nodes(facts: SlurmFacts, config: Config) -> float:
    """The most nodes that a partition has which a job could go to; infinite where that cannot be told."""
    there = facts.at(config.cluster.cluster) if facts.limits is not None else ""
    if isinstance(there, str) or asked.is_sent_elsewhere(there, config):
        return float("inf")
    of_each = [
        max(len(there.nodes_of(partition)), partition.total_nodes) for partition in asked.partitions_of(there, config)
    ]
    return max(of_each, default=float("inf"))


def refuse_impossible(facts: SlurmFacts, request: Request, settled: Placement) -> None:
    """Raise ConfigError if a job could start at no candidate."""
    if settled.possible:
        return
    points = f"point {request.points[0]}" if len(request.points) == 1 else f"points {', '.join(request.points)}"
    if request.config.cluster.placement:
        reasons = "".join(f"\n  {candidate.name}: {candidate.never}" for candidate in settled.candidates)
        raise ConfigError(
            f"{points} could run at no candidate of cluster.placement:{reasons}",
            "a candidate whose partition can run it",
            "python -m launch.doctor, with the same arguments: it says for each what to ask for instead",
        )
    (errors,) = errors_at(facts, request)
    found = "; ".join(error.found for error in errors)
    fixes = " ".join(dict.fromkeys(error.fix for error in errors))
    raise ConfigError(
        f"{points}, which Slurm would never start: {found}",
        fitting(facts, request.config),
        f"{fixes}; where you know better, launch.check_limits=false submits it all the same",
    )


def fitting(facts: SlurmFacts, config: Config) -> str:
    """Describe the resources for one job of the partitions that it could go to, or else of all of the cluster."""
    there = facts.at(config.cluster.cluster)
    if not isinstance(there, Limits):
        return "a cluster that answers"
    named = asked.partitions_of(there, config)
    return "; ".join(what_fits(there, partition) for partition in named or there.partitions)


def refuse_without_controller(facts: SlurmFacts) -> None:
    """Raise ConfigError if no controller answers that could take a job."""
    if facts.is_away:
        raise ConfigError(
            f"cluster=slurm, and {facts.slurm_problem}",
            "a Slurm controller that answers: nothing was submitted, and nothing written",
            "the same command when scontrol ping says UP; cluster=local to run here; dry_run=true only plans",
        )


def look_before_submitting(
    facts: SlurmFacts, plans: Sequence[Plan], configs: Sequence[Config], console: Console
) -> list[Plan]:
    """Compare what is requested from Slurm with what it has.

    Candidates of a placement where a point could never run are left out, and printed with the reason.

    Raises:
        ConfigError: a point could start nowhere.
    """
    if facts.limits is None:
        why = f"warning: {facts.slurm_problem}: what is asked of Slurm was not compared with what it has"
        console.print(why, highlight=False, markup=False)
        return list(plans)
    by_folder = {plan.run_dir: config for plan, config in zip(plans, configs, strict=True)}
    groups = shapes([plan for plan in plans if plan.cluster == "slurm"])
    settled: dict[str, Placement] = {}
    told: list[str] = []
    requests = zip(groups, requests_of(groups, by_folder, facts), strict=True)
    # The largest first: advice that suits it suits the others.
    for group, request in sorted(requests, key=lambda one: -one[1].config.nodes_asked):
        placed = settle(facts, request)
        refuse_impossible(facts, request, placed)
        settled |= {plan.run_dir: placed for plan in group}
        told += [f"{text} (for {', '.join(request.points)})" for text in remarks(facts, request, placed)]
    for text in dict.fromkeys(told):
        console.print(text, highlight=False, markup=False)
    return [plan.replace_placement(settled[plan.run_dir]) if plan.run_dir in settled else plan for plan in plans]


def remarks(facts: SlurmFacts, request: Request, settled: Placement) -> Iterator[str]:
    """Yield remarks on a request that is submitted: candidates that are skipped, and errors in doubt."""
    for candidate, errors in zip(settled.candidates, errors_at(facts, request), strict=True):
        if candidate.never:
            yield f"cluster.placement: {candidate.name} is skipped: {candidate.never}"
            continue
        at = f"at {candidate.name}: " if candidate.name else ""
        for error in errors:
            yield f"warning: {at}{error.found}: {error.why}, unless {error.unless}; or type {error.fix}"
