"""A view of a run's step records that a failing filesystem may take away for a while, and never the training with it.

Owns giving a view up and making it again from the step records, which are the truth. Must not know what it shows.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from launch.runs.files import say
from launch.runs.folder import RunFolder
from launch.runs.records import StepRecord, read_records

RETRY_S = 30.0
"""Between two tries to make a view again; each reads the records of rank 0."""
KEPT_S = 60.0
"""Time for which records are kept that a view has: longer than it takes until they are on the disk."""

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
        self._recent: deque[tuple[float, StepRecord]] = deque()
        """Records with the time they came, those of the last ``KEPT_S`` and all since the writer was given up."""
        try:
            self._writer = open_writer(step, done)
        except OSError as error:
            self._give_up(error)

    def write(self, record: StepRecord) -> None:
        """Write one record, and those before it that the view lacks; nothing where the view was made again with it."""
        if record.step <= self._since:
            return
        self._recent.append((time.monotonic(), record))
        try:
            if self._writer is not None:
                self._writer.write(record)
                self._since = record.step
                while self._recent[0][0] < self._recent[-1][0] - KEPT_S:
                    self._recent.popleft()
            elif time.monotonic() - self._tried >= self._retry_s:
                self._make_again()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Make the view complete where it can be, and close it."""
        try:
            if self._writer is None:
                self._make_again()
            assert self._writer is not None
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _make_again(self) -> None:
        """Open the writer as after a restart, and write the records that it lacks.

        The newest are not on the disk yet: they are written some seconds later, or when there is room again.
        """
        self._tried = time.monotonic()
        records = read_records(self._folder.metrics(0))
        last = records[-1]["step"] if records else 0
        records += [record.as_dict() for _, record in self._recent if record.step > last]
        self._writer = self._open(self._since, [record for record in records if record["step"] <= self._since])
        for missed in records:
            if missed["step"] > self._since:
                self._writer.write(StepRecord(**{"loss": None, "grad_norm": None} | missed))
                self._since = missed["step"]

    def _give_up(self, error: OSError) -> None:
        say(f"{self._name}: {error}; training goes on, and it is made again from the step records")
        self._tried = time.monotonic()
        if self._writer is not None:
            with contextlib.suppress(OSError):
                self._writer.close()
        self._writer = None
