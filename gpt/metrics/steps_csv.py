"""The file ``steps.csv``: rank 0's records as a table that every spreadsheet opens, one row a step.

Owns its columns. The step records are the truth: at every start the file is made again from those that still count, so
a step that was lost with a crash and done again has one row. Torch-free.
"""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from launch.runs.records import TOLD_ONCE, StepRecord

LAYER_NORM = "grad_norm/"
"""Prefix of a layer's name, in the column of its gradient norm."""


class StepsCsv:
    """Writer of the table at ``path``, which begins with the rows of ``earlier`` records."""

    def __init__(self, path: Path, layers: Sequence[str], earlier: Iterable[dict[str, Any]]) -> None:
        left_out = ("samples", LAYERS, TOLD_ONCE)
        whole = [field.name for field in dataclasses.fields(StepRecord) if field.name not in left_out]
        self._columns = [*whole, "first_sample", "last_sample", *(LAYER_NORM + name for name in layers)]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", buffering=1)  # a line at a time, so that a reader sees whole rows
        self._writer = csv.DictWriter(self._file, self._columns, extrasaction="ignore", lineterminator="\n")
        self._writer.writeheader()
        for record in earlier:
            self._writer.writerow(row(record))

    def write(self, record: StepRecord) -> None:
        """Add one row; what is not known is an empty cell."""
        self._writer.writerow(row(record.as_dict()))

    def close(self) -> None:
        """Close the file."""
        self._file.close()


LAYERS = "layer_grad_norms"


def row(record: dict[str, Any]) -> dict[str, Any]:
    """Build the cells of a record, column -> value."""
    cells = {name: value for name, value in record.items() if name not in ("samples", LAYERS)}
    cells["first_sample"], cells["last_sample"] = record["samples"]
    return cells | {LAYER_NORM + name: norm for name, norm in record.get(LAYERS, {}).items()}
