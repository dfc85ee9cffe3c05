"""Findings of the checks, and how they are shown.

Owns the three levels, the report and the exit status. Must not know what is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from enum import Enum
from typing import Any

from rich.console import Console
from rich.text import Text

from launch.errors import ConfigError


class Level(Enum):
    """Severity of a finding: ``error`` breaks the run, ``warning`` may cost time or work, ``ok`` was looked at."""

    ok = "ok"
    warning = "warning"
    error = "error"


PENDS = "Slurm would leave the job pending for good, or refuse it"
"""Consequence of a request that cannot be met: with EnforcePartLimits=NO it is accepted all the same."""
STYLES = {Level.ok: "green", Level.warning: "yellow", Level.error: "bold red"}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: a short name of the check.
        found: what is there, with its values.
        why: why it matters; empty where all is well.
        fix: the line to type; empty where all is well.
        unless: what would have to be so for an error to be none, where that cannot be told from here; empty where
            the error is certain.
    """

    level: Level
    check: str
    found: str
    why: str = ""
    fix: str = ""
    unless: str = ""

    def __post_init__(self) -> None:
        assert self.level is Level.ok or (self.why and self.fix), "a complaint says why, and what to type"


def fine(check: str, found: str) -> Finding:
    """All is well."""
    return Finding(Level.ok, check, found)


def warn(check: str, found: str, why: str, fix: str) -> Finding:
    """May cost time or work."""
    return Finding(Level.warning, check, found, why, fix)


def fail(check: str, found: str, why: str, fix: str) -> Finding:
    """Breaks the run."""
    return Finding(Level.error, check, found, why, fix)


def doubt(finding: Finding, unless: str) -> Finding:
    """Return the finding, an error no longer certain."""
    return replace(finding, unless=unless) if finding.level is Level.error and not finding.unless else finding


def refusal(check: str, error: ConfigError) -> Finding:
    """Finding for what the launcher itself would refuse."""
    why = f"python -m launch refuses it, so what it asks of Slurm was not looked at; expected: {error.expected}"
    return fail(check, error.found, why, error.fix)


def has_errors(findings: Iterable[Finding]) -> bool:
    """Tell whether any finding is an error."""
    return any(finding.level is Level.error for finding in findings)


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON holds them."""
    return [{**asdict(finding), "level": finding.level.value} for finding in findings]


def show(findings: Iterable[Finding], console: Console) -> None:
    """Print the findings, each with its reason and the line to type."""
    for finding in findings:
        head = Text()
        head.append(f"{finding.level.value:<8}", STYLES[finding.level])
        head.append(f"{finding.check}: {finding.found}")
        console.print(head)
        if finding.why:
            unless = f", unless {finding.unless}" if finding.unless else ""
            console.print(Text(f"{'':8}why   {finding.why}{unless}", "dim"))
        if finding.fix:
            console.print(Text(f"{'':8}type  {finding.fix}"))


def summary(findings: Iterable[Finding]) -> str:
    """Count the findings of each level, in one line."""
    levels = [finding.level for finding in findings]
    errors, warnings = levels.count(Level.error), levels.count(Level.warning)
    return f"{errors} errors, {warnings} warnings, {levels.count(Level.ok)} ok"
