"""Checks of the candidates of ``cluster.placement``: where a point could run, and why it could not elsewhere.

Applies the checks of ``launch.checks.request`` to each candidate: pure functions over Slurm's limits and a request, and
one that asks for the limits where the launcher needs them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from launch.checks import request as asked
from launch.checks.facts import Facts, Request, clusters_named, gather, requests_of
from launch.checks.findings import Finding, Level, fail, has_errors
from launch.config import ClusterKind, Config
from launch.errors import ConfigError
from launch.plan import placement
from launch.plan.placement import Placement
from launch.plan.plan import Plan


def check_requests(facts: Facts, requests: Sequence[Request]) -> list[Finding]:
    """All checks of all jobs, each at every candidate of its placement; what is said twice is said once."""
    found: list[Finding] = []
    for request in requests:
        each = [check_at(facts, request, name, config) for name, config in placement.configs(request.config)]
        some_fit = any(not has_errors(findings) for findings in each)
        for findings in each:
            # One candidate that cannot is no obstacle: the launcher skips it.
            found += [asked.soften(finding) if some_fit else finding for finding in findings]
    return list(dict.fromkeys(found))


def check_at(facts: Facts, request: Request, name: str, config: Config) -> list[Finding]:
    """All checks at one candidate, whose name goes with every complaint; no name where there is no list."""
    try:
        config.validate()
    except ConfigError as error:
        findings = [fail("resources", error.found, f"expected: {error.expected}", error.fix)]
    else:
        findings = check_on_its_cluster(facts, replace(request, config=config))
    if not name:
        return findings
    return [f if f.level is Level.ok else replace(f, found=f"at {name}: {f.found}") for f in findings]


def check_on_its_cluster(facts: Facts, request: Request) -> list[Finding]:
    """All checks against the limits of the cluster that the request goes to."""
    name = request.config.cluster.cluster
    if name is None or facts.limits is None:
        return asked.check_request(facts, request)
    there = facts.others[name]
    if isinstance(there, str):
        fix = "sacctmgr show clusters lists those that this cluster's slurmdbd knows; cluster.cluster=null is this one"
        return [fail("cluster", f"cluster.cluster={name}, and {there}", "nothing can be submitted there", fix)]
    return asked.check_request(replace(facts, limits=there), request)


def settle(facts: Facts, request: Request) -> Placement:
    """The placement of a request, with the reason at each candidate where it could never run."""
    settled = request.plan.placement
    for index, (_, config) in enumerate(placement.configs(request.config)):
        errors = [finding for finding in check_at(facts, request, "", config) if finding.level is Level.error]
        if errors:
            settled = settled.rule_out(index, "; ".join(finding.found for finding in errors))
    return settled


def refuse_impossible(point: str, settled: Placement) -> None:
    """Raise ConfigError where the point could run at no candidate."""
    if settled.possible:
        return
    reasons = "".join(f"\n  {candidate.name}: {candidate.never}" for candidate in settled.candidates)
    raise ConfigError(
        f"point {point} could run at no candidate of cluster.placement:{reasons}",
        "a candidate whose partition can run it",
        "python -m launch.doctor, with the same arguments: it says for each what to ask for instead",
    )


def settle_placements(plans: Sequence[Plan], configs: Sequence[Config], console: Console) -> list[Plan]:
    """Leave out the candidates of a placement where a point could never run, and say why.

    Raises:
        ConfigError: there is none where it could.
    """
    by_folder = {plan.run_dir: config for plan, config in zip(plans, configs, strict=True)}
    listed = [plan for plan in plans if plan.cluster == "slurm" and by_folder[plan.run_dir].cluster.placement]
    named = clusters_named(by_folder[plan.run_dir] for plan in listed)
    seen = gather(ClusterKind.slurm, Path(listed[0].run_dir), named)
    if seen.limits is None:
        why = f"the limits of the partitions are not known ({seen.slurm_problem}): no candidate was looked at"
        console.print(f"cluster.placement: {why}", highlight=False, markup=False)
    settled: dict[str, Plan] = {}
    skipped: dict[str, list[str]] = {}
    for request in requests_of([[plan] for plan in listed], by_folder, seen):
        placement = settle(seen, request)
        refuse_impossible(request.plan.point, placement)
        settled[request.plan.run_dir] = request.plan.replace_placement(placement)
        for candidate in placement.candidates:
            if candidate.never:
                skipped.setdefault(f"{candidate.name} is skipped: {candidate.never}", []).append(request.plan.point)
    for text, names in skipped.items():
        whose = "" if len(names) == len(listed) else f" (for {', '.join(names)})"
        console.print(f"cluster.placement: {text}{whose}", highlight=False, markup=False)
    return [settled.get(plan.run_dir, plan) for plan in plans]
