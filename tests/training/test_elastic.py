"""A run goes on with other numbers of ranks: the losses of one process, and every sample once."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpt.config import TrainConfig
from gpt.training.state import save
from gpt.training.step import queue_step
from launch.runs.heartbeat import Phase
from tests.support.distributed import run_distributed
from tests.support.learning import compose, start_composed

SIZES = (4, 2, 3, 1)
STEPS = 2
"""Steps with each number of ranks."""
BATCH = 12
WORDS = (
    "model.n_layer=1",
    f"optim.global_batch={BATCH}",
    "optim.max_micro_batch=3",
    f"optim.max_steps={STEPS * len(SIZES)}",
)
STRATEGIES = ("ddp", "fsdp")
Steps = list[tuple[float, float, int, int]]
"""Loss, gradient norm, and the first and the last sample of this rank, step by step."""


def go_on(rank: int, size: int, folder: Path, configs: dict[str, TrainConfig], steps: int) -> dict[str, Steps]:
    """Go on from the newest checkpoint of each strategy, if there is one, and save."""
    found = {}
    for strategy, config in configs.items():
        run = start_composed(rank, size, folder / strategy, config)
        assert run.batch.global_batch == BATCH and run.batch.micro <= 3
        made = []
        for _ in range(steps):
            record, _ = queue_step(run, None, Phase.training).finish(0.0)
            assert record.loss is not None and record.grad_norm is not None
            made.append((record.loss, record.grad_norm, *record.samples))
        save(run)
        run.batches.close()
        found[strategy] = made
    return found


def test_four_two_three_and_one_rank_learn_through_checkpoints_what_one_process_learns(tmp_path: Path) -> None:
    configs = {strategy: compose(f"parallel={strategy}", *WORDS) for strategy in STRATEGIES}
    (alone,) = run_distributed(go_on, 1, tmp_path / "alone", {"ddp": configs["ddp"]}, STEPS * len(SIZES))
    parts = [run_distributed(go_on, size, tmp_path / "elastic", configs, STEPS) for size in SIZES]
    for strategy in STRATEGIES:
        curve = [step[:2] for ranks in parts for step in ranks[0][strategy]]
        for (loss, norm), (loss_alone, norm_alone, *_) in zip(curve, alone["ddp"], strict=True):
            assert loss == pytest.approx(loss_alone, rel=1e-5, abs=0), strategy
            assert norm == pytest.approx(norm_alone, rel=1e-4), strategy
        seen = [list(range(first, last + 1)) for ranks in parts for of in ranks for _, _, first, last in of[strategy]]
        assert sorted(sample for samples in seen for sample in samples) == list(range(BATCH * STEPS * len(SIZES)))
