"""The objective of a run: one figure of its step records, by which a sweeper that searches chooses the next points.

Owns how a figure of many steps becomes one number. Torch-free.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum
from typing import get_args, get_type_hints

from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.runs.ranges import closest
from launch.runs.records import StepRecord, read_records


class ObjectiveOf(Enum):
    """Value of a run that is its objective: the smallest, the largest or the last."""

    minimum = "minimum"
    maximum = "maximum"
    last = "last"


def objective_value(folder: RunFolder, name: str, of: ObjectiveOf) -> float | None:
    """Return the objective of a run by the step records of its first rank that has them.

    Args:
        folder: of the run.
        name: figure of the records, such as val_loss.
        of: which of its values.

    Returns:
        The value; None where no record has the figure, or none that is finite.
    """
    for rank in folder.metric_ranks():
        found = [record[name] for record in read_records(folder.metrics(rank)) if is_number(record.get(name))]
        if found:
            values = {ObjectiveOf.minimum: min(found), ObjectiveOf.maximum: max(found), ObjectiveOf.last: found[-1]}
            return float(values[of])
    return None


def step_figures() -> tuple[str, ...]:
    """Names of the figures in the step records of a GPT that are one number each."""
    hints = get_type_hints(StepRecord)
    kinds = {name: set(get_args(hint)) or {hint} for name, hint in hints.items()}
    return tuple(
        name for name, found in kinds.items() if found & {float, int} and name not in ("step", "attempt", "samples")
    )


def refuse_unknown_figure(name: str | None, figures: Sequence[str] | None) -> None:
    """Raise ConfigError for an objective that no step will record, before a run is trained for it.

    Args:
        name: figure that was asked for; None for none.
        figures: those that the program records; None where only the program knows.
    """
    if name is None or figures is None or name in figures:
        return
    likely = [*closest(name, figures), *(figure for figure in ("val_loss",) if figure in figures)]
    raise ConfigError(
        f"objective={name}, which no step record has",
        f"one figure of the step records: {', '.join(figures)}",
        f"objective={likely[0] if likely else figures[0]}",
    )


def refuse_absent(folder: RunFolder, name: str) -> ConfigError:
    """Return the refusal of an objective that the records of a finished run do not have."""
    there = {
        figure
        for rank in folder.metric_ranks()
        for record in read_records(folder.metrics(rank))
        for figure, value in record.items()
        if is_number(value) and figure not in ("step", "attempt")
    }
    return ConfigError(
        f"objective={name}, and no step record in {folder.path / 'metrics'} has a finite {name}",
        f"one of the figures that the run recorded: {', '.join(sorted(there)) or 'none'}",
        f"objective={(closest(name, there) or sorted(there))[0]}" if there else "the same without objective",
    )


def is_number(value: object) -> bool:
    """Tell a finite number from what else a record may hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
