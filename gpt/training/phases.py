"""Phases of one step, timed without waiting: by events in the queue of a GPU, by the host's clock elsewhere.

The times are read when the figures of the step are read, after the last event. Owns which phases there are. Must not
know what a phase does.
"""

from __future__ import annotations

import time

import torch

from gpt.parallel.engine import Engine
from launch.runs.records import StepRecord

Moment = float | torch.cuda.Event
"""Host time in seconds, or a place in the queue of the GPU."""


class Phases:
    """Moments of one step: ``mark`` each in its order, and ``fill_in`` the record once the device has passed them.

    Args:
        device: that the step runs on.
        engine: tells when its gradients are computed and only their reduction is left, where it reduces them nowhere
            else: then what it waits for others is known, and is told apart.
    """

    def __init__(self, device: torch.device, engine: Engine) -> None:
        self._is_cuda = device.type == "cuda"
        self._moments: dict[str, Moment] = {}
        self._tells_communication = engine.reduces_at_the_end
        if self._tells_communication:
            engine.on_gradients = lambda: self.mark("gradients")

    def mark(self, name: str) -> None:
        """Mark where the step has come to; waits for nothing."""
        if not self._is_cuda:
            self._moments[name] = time.perf_counter()
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._moments[name] = event

    def fill_in(self, record: StepRecord) -> None:
        """Write the times of the phases into the record; the device has finished the step."""
        # The sum of the figures lies between clipping and update, which wait for it.
        record.optimizer_s = self._between("reduced", "clipped") + self._between("summed", "updated")
        if not self._tells_communication:
            record.forward_backward_s = self._between("data", "reduced")
            return
        record.forward_backward_s = self._between("data", "gradients")
        record.comm_s = self._between("gradients", "reduced") + self._between("clipped", "summed")

    def _between(self, begin: str, end: str) -> float:
        """Seconds from one moment to another."""
        since, until = self._moments[begin], self._moments[end]
        if isinstance(since, torch.cuda.Event) and isinstance(until, torch.cuda.Event):
            return float(since.elapsed_time(until)) / 1000
        assert isinstance(since, float) and isinstance(until, float)
        return until - since
