"""Who writes what into a checkpoint is planned once, and again when it has to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from gpt.checkpoint import CheckpointStore
from gpt.checkpoint.folders import Retention
from launch.errors import ConfigError
from tests.support.distributed import run_distributed

SHAPES: dict[str, tuple[int, ...]] = {"a": (5, 3), "b": (4,), "c": (2, 2)}
PLAN = default_planner.create_default_global_save_plan


def sharded(step: int, *names: str) -> dict[str, Any]:
    """A state sharded over the ranks, with a number beside it, that tells the step it was made for."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {n: distribute_tensor(torch.full(SHAPES[n], step + 0.5), mesh, [Shard(0)]) for n in names}
    return {"model": model, "optimizer": {"lr": float(step)}}


def refuse(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def save_again_and_again(rank: int, size: int, root: Path) -> tuple[list[tuple[int, int]], list[dict[str, Any]]]:
    """For each save the global plans made for it and the items that this rank sent; and what was loaded after it."""
    planned, sent, found, loaded = [], [], [], []
    gather = dist.gather_object

    def count(plans: Any, *args: Any) -> Any:
        planned.append(len(plans))
        return PLAN(plans, *args)

    def watch(obj: Any, **kwargs: Any) -> Any:
        if isinstance(obj, SavePlan):  # a load has plans as well
            sent.append(len(obj.items))
        return gather(obj, **kwargs)

    first, second = (CheckpointStore(root / name, Retention(9, 0)) for name in "xy")

    def save(store: CheckpointStore, step: int, *names: str) -> None:
        planned.clear()
        sent.clear()
        state = sharded(step, *names)
        store.save(step, state, {}, {})
        blank = sharded(0, *names)
        store.load(blank)
        assert all(torch.equal(t.full_tensor(), state["model"][n].full_tensor()) for n, t in blank["model"].items())
        found.append((len(planned), sum(sent)))
        loaded.append({**{n: t.full_tensor()[0] for n, t in blank["model"].items()}, "lr": blank["optimizer"]["lr"]})

    with (
        mock.patch.object(default_planner, "create_default_global_save_plan", count),
        mock.patch.object(dist, "gather_object", watch),
    ):
        save(first, 1, "a", "b")
        save(first, 2, "a", "b")
        save(second, 3, "c")
        save(first, 4, "a", "b")
        save(first, 5, "a", "b", "c")
        full = mock.patch.object(FileSystem, "create_stream", refuse if rank else FileSystem.create_stream)
        with full, pytest.raises(ConfigError):
            save(first, 6, "a", "b", "c")
        save(first, 7, "a", "b", "c")
        save(first, 8, "a", "b", "c")
    return found, loaded


def test_unchanged_states_are_planned_once_and_every_save_holds_its_own_values(tmp_path: Path) -> None:
    (first, loaded), (other, also) = run_distributed(save_again_and_again, 2, tmp_path)
    # The tensors, and the number beside them; nothing where the plan stands. It does after a write that failed.
    assert first == [(1, 3), (0, 0), (1, 2), (0, 0), (1, 4), (0, 0), (0, 0)]
    assert other == [(0, items) for _, items in first], "rank 0 plans for all"
    for of_rank in (loaded, also):
        for step, values in zip((1, 2, 3, 4, 5, 7, 8), of_rank, strict=True):
            assert values.pop("lr") == step
            assert all(tensor.unique().tolist() == [step + 0.5] for tensor in values.values())
