"""Timeouts of the collectives of training, by the time that a step takes.

The first steps load, compile and connect, for minutes where there are many ranks. Those after them are alike: a
collective that takes many times as long is stuck, and on NCCL its timeout is what dumps the flight recorder.
"""

from __future__ import annotations

from gpt.config import ParallelConfig
from gpt.parallel.distributed import World, set_timeouts

FIRST = 2
"""Steps that are not like those to come: they compile, and fill the caches of memory and data."""
MEASURED = 3
FACTOR = 20
LEAST_S = 100.0
"""A rank may wait for a filesystem, or write a profile, while the others wait for it. As torchtitan has it."""


class StepTimeouts:
    """Cuts the timeout of the process groups, once, after the first steps of an attempt.

    The control group keeps its own: over it ranks wait for what one of them writes.
    """

    def __init__(self, world: World, config: ParallelConfig) -> None:
        self._world = world
        self._config = config
        self._times: list[float] | None = []

    def after(self, step_time_s: float) -> None:
        """Take in the time of one more step."""
        if self._times is None:
            return
        self._times.append(step_time_s)
        if len(self._times) == FIRST + MEASURED:
            set_timeouts(step_timeout(self._config, max(self._times[FIRST:])), without=[self._world.control])
            self._times = None


def step_timeout(config: ParallelConfig, step_time_s: float) -> float:
    """Return the timeout of a collective in seconds, for steps of ``step_time_s`` seconds at most."""
    if config.step_timeout_s is not None:
        return config.step_timeout_s
    return min(config.timeout_s, max(LEAST_S, FACTOR * step_time_s))
