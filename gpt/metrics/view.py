"""A view of a run's step records that a failing filesystem may take away for a while, and never the training with it.

Owns giving a view up and making it again from the step records, which are the truth. Must not know what it shows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord, read_records
from launch.runs.unwritten import say

RETRY_S = 30.0
"""Between two tries to make a view again; each reads the records of rank 0."""

Records = Sequence[dict[str, Any]]


class MetricWriter(Protocol):
    """Destination of step records, such as a file or a service."""

    def write(self, record: StepRecord) -> None:
        """Write one record; records come in the order of their steps."""

    def close(self) -> None:
        """Finish after the last record."""


class View:
    """Writer that outlives the one behind it: given up at an OSError, and opened again later.

    Args:
        folder: the run folder.
        name: of the view, for people.
        open_writer: opens the writer behind it for a run that goes on after a step, whose records are given.
        step: step after which the attempt goes on, 0 at the beginning.
        done: records up to that step.
        retry_s: seconds between two tries.
    """

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        open_writer: Callable[[int, Records], MetricWriter],
        step: int,
        done: Records,
        retry_s: float = RETRY_S,
    ) -> None:
        self._folder = folder
        self._name = name
        self._open = open_writer
        self._retry_s = retry_s
        self._writer: MetricWriter | None = None
        self._since = step
        """The last step whose record the view has."""
        self._tried = 0.0
        try:
            self._writer = open_writer(step, done)
        except OSError as error:
            self._give_up(error)

    def write(self, record: StepRecord) -> None:
        """Write one record, and those before it that the view lacks."""
        try:
            if self._writer is None:
                if time.monotonic() - self._tried < self._retry_s:
                    return
                self._writer = self._make_again(record.step)
            self._writer.write(record)
            self._since = record.step
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Make the view complete where it can be, and close it."""
        try:
            if self._writer is None:
                self._writer = self._make_again(None)
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _make_again(self, before: int | None) -> MetricWriter:
        """Open the writer as after a restart, and write the records that it lacks, up to step ``before``."""
        self._tried = time.monotonic()
        records = read_records(self._folder.metrics(0))
        writer = self._open(self._since, [record for record in records if record["step"] <= self._since])
        for missed in records:
            if self._since < missed["step"] and (before is None or missed["step"] < before):
                writer.write(StepRecord(**{"loss": None, "grad_norm": None} | missed))
        return writer

    def _give_up(self, error: OSError) -> None:
        say(f"{self._name}: {error}; training goes on, and it is made again from the step records")
        self._tried = time.monotonic()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None
