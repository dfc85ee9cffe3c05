"""Stability of training: how much the loss of a step varies over the last steps.

A loss that spikes, or that swings more and more, shows here before a mean does. Must not know what follows from it.
"""

from __future__ import annotations

from collections import deque

import numpy as np

from launch.runs.records import StepRecord

WINDOW = 100
"""Steps over which the variance is taken: few enough that a loss that falls as it should adds little to it."""


class LossWindow:
    """The losses of the last steps of this attempt."""

    def __init__(self) -> None:
        self._losses: deque[float] = deque(maxlen=WINDOW)

    def into(self, record: StepRecord) -> None:
        """Take in the loss of a step, and put the variance over the last ``WINDOW`` steps into its record.

        Steps whose loss is not finite are left out.
        """
        if record.loss is not None:
            self._losses.append(record.loss)
        if len(self._losses) == WINDOW:
            record.loss_variance = float(np.var(np.fromiter(self._losses, dtype=np.float64)))

    def clear(self) -> None:
        """Forget the losses: the run goes back."""
        self._losses.clear()
