"""Phases of one step, timed without waiting: by events in the queue of a GPU, by the host's clock elsewhere.

The times are read when the figures of the step are read, after the last event. Owns which phases there are. Must not
know what a phase does.
"""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

from gpt.parallel.engine import Engine
from gpt.parallel.timeline import BUBBLE, HOST, Moment, Timeline, recorded, total
from launch.runs.records import StepRecord

PARTS = ("data", "reduced"), ("reduced", "updated")
"""Moments between which a step computes gradients, and clips and applies them."""


class Phases:
    """Moments of one step: ``mark`` each in its order, and ``fill_in`` the record once the device has passed them.

    Args:
        device: that the step runs on.
        engine: tells which groups' communication it lets see; where some is out of sight none is told.
    """

    def __init__(self, device: torch.device, engine: Engine) -> None:
        self._timeline = Timeline(device)
        self._groups = engine.timed_groups
        self._moments: dict[str, Moment] = {"data": self._timeline.start}

    def recorded(self) -> AbstractContextManager[None]:
        """Record the waits of what is inside."""
        return recorded(self._timeline)

    def mark(self, name: str) -> None:
        """Mark where the step has come to; waits for nothing."""
        self._moments[name] = self._timeline.now()

    def fill_in(self, record: StepRecord) -> None:
        """Write the times of the phases into the record; the device has finished the step."""
        at = {name: self._timeline.seconds(moment) for name, moment in self._moments.items()}
        spans = self._timeline.spans()
        own = [span for span in spans if span.name == HOST] if self._groups is None else spans
        forward_backward_s, optimizer_s = (at[end] - at[begin] - total(own, at[begin], at[end]) for begin, end in PARTS)
        record.forward_backward_s, record.optimizer_s = forward_backward_s, optimizer_s
        if self._groups is None:
            return
        waited = {name: total(spans, 0, at["updated"], name) for name in {span.name for span in spans}}
        record.comm_s = sum(seconds for name, seconds in waited.items() if name not in (BUBBLE, HOST))
        for group in self._groups:
            setattr(record, f"comm_{group}_s", waited.get(group, 0.0))
        if "pp" in self._groups:
            record.bubble_s = waited.get(BUBBLE, 0.0)
