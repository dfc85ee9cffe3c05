"""A checkpoint comes back bit for bit on its own topology, and on every other one and number of ranks."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from gpt.checkpoint import CheckpointStore
from gpt.checkpoint.folders import Retention
from tests.support.checkpoints import Trained
from tests.support.distributed import run_distributed

STRATEGIES = ("ddp", "fsdp")
WORLD_SIZES = (1, 2, 4)


def train_and_save(rank: int, world_size: int, root: Path) -> dict[str, dict[str, str]]:
    digests = {}
    for strategy in STRATEGIES:
        run = Trained(strategy, seed=1, lr=0.02)
        for number in range(3):
            run.step(number)
        own = {"rng": torch.get_rng_state(), "python": (3, (1, 2), None), "rank": rank}
        store = CheckpointStore(root / f"{strategy}{world_size}", Retention(1, 0))
        store.save(3, run.state(), own, {"step": 3, "position": 12, "saved_by": strategy})
        digests[f"{strategy}{world_size}"] = run.digests()
    return digests


def load_everything(rank: int, world_size: int, root: Path) -> dict[tuple[str, str], Any]:
    found = {}
    for saved, strategy in itertools.product(sorted(path.name for path in root.iterdir()), STRATEGIES):
        run = Trained(strategy, seed=2)
        before = run.digests()
        state = run.state()
        loaded = CheckpointStore(root / saved, Retention(1, 0)).load(state)
        run.take(state)
        found[saved, strategy] = (before, run.digests(), loaded)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, str]]]:
    root = tmp_path_factory.mktemp("saved")
    digests: dict[str, dict[str, str]] = {}
    for world_size in WORLD_SIZES:
        digests |= run_distributed(train_and_save, world_size, root)[0]
    return root, digests


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_every_checkpoint_loads_bit_equal_on_any_topology(
    saved: tuple[Path, dict[str, dict[str, str]]], world_size: int
) -> None:
    root, digests = saved
    results = run_distributed(load_everything, world_size, root)
    for rank, result in enumerate(results):
        assert len(result) == len(STRATEGIES) * len(WORLD_SIZES) * len(STRATEGIES)
        for (name, strategy), (before, after, loaded) in result.items():
            assert after == digests[name], f"{name} on {world_size} x {strategy}"
            changed = {key for key in after if before.get(key) != after[key]}
            assert {"/model/0.weight", "/optim/param_groups/0/lr", "/optim/state/0.weight/exp_avg_sq"} <= changed
            assert (loaded.step, loaded.set_aside) == (3, ())
            assert loaded.meta == {"step": 3, "position": 12, "saved_by": name[:-1]}
            assert loaded.world_size == int(name[-1])
            if loaded.world_size == world_size:
                assert loaded.rank_state["rank"] == rank
                assert loaded.rank_state["python"] == (3, (1, 2), None)
            else:
                assert loaded.rank_state is None


def resume_and_train(rank: int, world_size: int, folder: Path) -> tuple[dict[str, str], dict[str, str]]:
    straight = Trained("fsdp", seed=1)
    for number in range(4):
        straight.step(number)
        if number == 1:
            CheckpointStore(folder, Retention(1, 0)).save(2, straight.state(), {}, {})
    resumed = Trained("fsdp", seed=2)
    state = resumed.state()
    assert CheckpointStore(folder, Retention(1, 0)).load(state) is not None
    resumed.take(state)
    for number in (2, 3):
        resumed.step(number)
    return straight.digests(), resumed.digests()


def test_training_goes_on_bit_for_bit(tmp_path: Path) -> None:
    for straight, resumed in run_distributed(resume_and_train, 2, tmp_path):
        assert straight == resumed
