"""The variance of the loss over the last steps, against the standard library's."""

from __future__ import annotations

import math
import statistics

import pytest

from gpt.training.health import WINDOW, LossWindow
from launch.runs.records import StepRecord


def record(step: int, loss: float | None) -> StepRecord:
    return StepRecord(step=step, attempt=1, loss=loss, lr=0.1, grad_norm=1.0, tokens=1, samples=(0, 0), step_time_s=1.0)


def test_the_variance_of_the_last_losses() -> None:
    window, losses = LossWindow(), [5 / (1 + n / 50) + 0.1 * math.sin(7 * n) for n in range(2 * WINDOW)]
    told = []
    for step, loss in enumerate(losses, 1):
        made = record(step, loss)
        window.into(made)
        told.append(made.loss_variance)
        if step == WINDOW:
            window.into(record(step, None))  # a skipped step has no loss
    assert told[: WINDOW - 1] == [None] * (WINDOW - 1)
    for step in (WINDOW, WINDOW + 1, 2 * WINDOW):
        assert told[step - 1] == pytest.approx(statistics.pvariance(losses[step - WINDOW : step]), rel=1e-9)
    window.clear()
    made = record(1, 1.0)
    window.into(made)
    assert made.loss_variance is None, "a run that went back begins anew"
