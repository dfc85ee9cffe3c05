"""The objective of a run: one figure of its step records, by which a sweeper that searches chooses the next points.

Owns how a figure of many steps becomes one number. Torch-free.
"""

from __future__ import annotations

import math
from enum import Enum

from launch.runs.folder import RunFolder
from launch.runs.records import read_records


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


def is_number(value: object) -> bool:
    """Tell a finite number from what else a record may hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
