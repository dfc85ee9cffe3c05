"""What DistributedDataParallel does beside averaging gradients."""

from __future__ import annotations

from pathlib import Path

import torch

from gpt.parallel.ddp import DDPEngine
from tests.support.distributed import run_distributed
from tests.support.learning import start


def last_measured(rank: int, size: int, folder: Path) -> int:
    """Take a hundred steps, and return the last one of which DDP has statistics."""
    engine = start(rank, size, folder, "parallel=ddp", "model.n_layer=1", "optim.max_micro_batch=8").engine
    assert isinstance(engine, DDPEngine)
    for _ in range(100):
        engine.module(torch.zeros(1, 2, dtype=torch.long)).sum().backward()
    found = engine.module._get_ddp_logging_data()["iteration"]
    assert isinstance(found, int)
    return found


def test_it_measures_no_step_after_its_first_ten(tmp_path: Path) -> None:
    """By default it does in each hundredth, and waits for the device there."""
    assert run_distributed(last_measured, 2, tmp_path / "run") == [10, 10]
