"""Figures of a step record: values that JSON can hold, and the time of a step.

Standard library only: of other libraries' numbers only ``item`` is asked for. Must not know where records are written.
"""

from __future__ import annotations

import numbers
import time
from collections.abc import Mapping
from typing import Any

from launch.runs.heartbeat import Phase

PAUSES = (Phase.evaluating, Phase.saving)
"""Phases whose time is not part of a step."""


class StepTimes:
    """Time of a step between two step records, without the pauses in between."""

    def __init__(self) -> None:
        self._recorded: tuple[int, float] | None = None
        self._pause: float | None = None
        self._paused_s = 0.0

    def enter(self, phase: Phase) -> None:
        """Note that another phase begins now."""
        now = time.perf_counter()
        if self._pause is not None:
            self._paused_s += now - self._pause
        self._pause = now if phase in PAUSES else None

    def take(self, step: int, now: float) -> float | None:
        """Seconds of a step since the record before; None at the first one, and where ``step`` is not a later one."""
        seconds = None
        if self._recorded is not None and step > self._recorded[0]:
            seconds = (now - self._recorded[1] - self._paused_s) / (step - self._recorded[0])
        self._recorded, self._paused_s = (step, now), 0.0
        return seconds


def plain_figure(value: object) -> Any:
    """Turn a figure into what JSON can hold.

    Raises:
        TypeError: it is neither a real number nor a list or mapping of such.
    """
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain_figure(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_figure(each) for each in value]
    if isinstance(value, numbers.Real):
        return float(value)
    item = getattr(value, "item", None)
    if callable(item):
        scalar = item()
        if isinstance(scalar, (bool, int, float)):
            return scalar
    raise TypeError(f"{type(value).__name__} is no real number")
