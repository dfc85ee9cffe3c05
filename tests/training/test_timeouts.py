"""Timeouts of collectives: cut once the first steps have shown how long one takes."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from gpt.config import Device, ParallelConfig
from gpt.parallel.distributed import open_world
from gpt.training.execution import FIRST, MEASURED, StepTimeouts, step_timeout
from tests.support.distributed import run_distributed


@pytest.mark.parametrize(
    ("slowest", "typed", "expected"),
    [(0.1, None, 100), (5.0, None, 100), (10.0, None, 200), (60.0, None, 600), (60.0, 30, 30)],
)
def test_the_timeout_follows_the_step_time(slowest: float, typed: int | None, expected: float) -> None:
    assert step_timeout(ParallelConfig(timeout_s=600, step_timeout_s=typed), slowest) == expected


def timeouts_of(world_size: int) -> list[timedelta]:
    """Timeouts of the default group, of one made later, and of the control group, after the first steps."""
    with open_world(Device.cpu, timeout_s=500) as world:
        other = dist.new_group(backend="gloo", timeout=timedelta(seconds=500))
        timeouts = StepTimeouts(world, ParallelConfig(timeout_s=500))
        cpu, found = torch.device("cpu"), []
        for step in range(FIRST + MEASURED):
            timeouts.after(1000.0 if step < FIRST else 6.0 + step)
            groups = (dist.distributed_c10d._get_default_group(), other, world.control)
            found.append([group._get_backend(cpu).options._timeout for group in groups])
        assert found[:-1] == [[timedelta(seconds=500)] * 3] * (FIRST + MEASURED - 1)
        return found[-1]


def test_groups_of_training_are_cut_after_the_first_steps_and_the_control_group_is_not() -> None:
    assert "RANK" not in os.environ
    most = 20 * (6.0 + FIRST + MEASURED - 1)
    assert timeouts_of(1) == [timedelta(seconds=most)] * 2 + [timedelta(seconds=500)]


def lose_a_peer(rank: int, world_size: int) -> str:
    """Rank 0 waits for rank 1, which sends nothing, under a cut timeout."""
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=600))
    world = type("World", (), {"control": control})()
    timeouts = StepTimeouts(world, ParallelConfig(timeout_s=600, step_timeout_s=1))
    for _ in range(FIRST + MEASURED):
        timeouts.after(0.01)
    message = ""
    if rank == 0:
        try:
            dist.all_reduce(torch.ones(1))
        except RuntimeError as error:
            message = str(error)
    dist.barrier(control)  # until then the other rank is there
    return message


def test_a_collective_that_is_stuck_fails_after_the_cut_timeout() -> None:
    """Under the 600 s of before this test would run into the limit of its processes."""
    message, _ = run_distributed(lose_a_peer, 2)
    assert "imed out" in message and "1000" in message, message
