"""The result of a point when its command ends: whether it finished, and the objective that it came to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launch.config import Config
from launch.plan.plan import Plan
from launch.runs.folder import RunFolder
from launch.runs.objective import objective_value


@dataclass(frozen=True)
class PointResult:
    """Result of one point."""

    run_dir: str
    objective: str | None
    """Figure of the step records that was asked for."""
    value: float | None
    """Its value; None where it was not asked for, or no record has it."""
    error: str | None = None
    """Reason for which the point did not finish; None where it did."""


def result_of(plan: Plan, config: Config, failures: Mapping[str, str]) -> PointResult:
    """Result of a point, with the figure that its command asks for; ``failures`` are texts by run folder."""
    why, name = failures.get(plan.run_dir), config.objective
    if why is not None or name is None:
        return PointResult(plan.run_dir, name, None, why)
    return PointResult(plan.run_dir, name, objective_value(RunFolder(plan.run_dir), name, config.objective_of))
