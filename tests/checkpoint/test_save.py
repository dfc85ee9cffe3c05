"""Saving and loading: outcomes, plans that are kept, and other numbers of ranks."""

from __future__ import annotations

import itertools
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

from gpt.checkpoint.folders import VALIDATION_LOSS, Retention
from gpt.checkpoint.manager import OutdatedAttemptError
from gpt.checkpoint.messages import CheckpointError
from launch.errors import ConfigError
from tests.support.checkpoints import Checkpoints, Trained
from tests.support.distributed import run_distributed


def refuse_writes(*args: Any, **kwargs: Any) -> Any:
    raise OSError(28, "No space left on device")


def fail_in_many_ways(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    run = Trained("fsdp", seed=1)
    store = Checkpoints(folder, Retention(2, 0))
    store.save(1, run.state(), {}, {})
    found: dict[str, Any] = {}

    def attempt(name: str, **changes: Any) -> None:
        arguments: dict[str, Any] = {"step": 2, "state": run.state(), "rank_state": {}, "meta": {}} | changes
        with pytest.raises((CheckpointError, ConfigError)) as failure:
            store.save(**arguments)
        found[name] = (type(failure.value), str(failure.value).splitlines()[0])

    with mock.patch.object(FileSystem, "create_stream", refuse_writes if rank == 1 else FileSystem.create_stream):
        attempt("full disk on one rank")
    attempt("state that could not be read back", rank_state={"f": Path()} if rank == 1 else {})
    attempt("meta that is no JSON", meta={"f": {1}})
    attempt("outdated", may_commit=lambda: False)
    attempt("fence that fails", may_commit=lambda: 1 / 0)  # type: ignore[arg-type, return-value]
    dist.barrier()  # rank 0 has cleaned up before it gets here
    found["left"] = sorted(path.name for path in folder.iterdir())
    dist.barrier()
    if rank == 0:
        (folder / "step_00000002").mkdir()  # without its manifest it is no checkpoint, and makes room for one

    asked: list[tuple[int, list[str]]] = []

    def may_commit() -> bool:
        written = next(path for path in folder.iterdir() if path.name.startswith(".saving"))
        asked.append((rank, sorted(path.name for path in written.iterdir())))
        return True

    assert store.save(2, run.state(), {}, {}, may_commit) == folder / "step_00000002"
    found["asked"] = asked
    return found


def test_a_failure_on_one_rank_is_raised_on_all_and_commits_nothing(tmp_path: Path) -> None:
    by_rank = run_distributed(fail_in_many_ways, 2, tmp_path)
    for found in by_rank:
        assert found["full disk on one rank"][0] is ConfigError
        assert found["full disk on one rank"][1].endswith("No space left on device")
        assert found["state that could not be read back"][1].startswith("rank 1: ")
        assert "not JSON serializable" in found["meta that is no JSON"][1]
        assert found["outdated"][0] is OutdatedAttemptError
        assert "ZeroDivisionError" in found["fence that fails"][1]
        assert found["left"] == ["step_00000001"]
    ((rank, names),) = by_rank[0]["asked"] + by_rank[1]["asked"]
    assert rank == 0 and "manifest.json" in names, "asked once, when nothing but the rename is left to do"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "step_00000001",
        "step_00000002",
        "step_00000002.corrupt",
    ]


LOSSES = [3.0, 1.5, None, 2.5, 2.0, float("nan"), 2.0, None]
KEPT = {
    Retention(1): [8],
    Retention(3): [6, 7, 8],
    Retention(2, every=3): [3, 6, 7, 8],
    Retention(1, every=5, best=2): [2, 5, 7, 8],  # of equal losses the newer
}


def save_many(rank: int, world_size: int, root: Path) -> list[list[int]]:
    found = []
    for number, keeps in enumerate(KEPT):
        folder = root / str(number)
        store = Checkpoints(folder, keeps, dist.new_group(backend="gloo"))
        assert store.is_new()
        for step, loss in enumerate(LOSSES, start=1):
            store.save(step, {"model": {"w": torch.ones(3)}}, {}, {} if loss is None else {VALIDATION_LOSS: loss})
        assert not store.is_new()
        assert {path.name for path in folder.iterdir()} == {f"step_{step:08d}" for step in store.steps()}
        found.append(store.steps())
    return found


def test_retention(tmp_path: Path) -> None:
    (found,) = run_distributed(save_many, 1, tmp_path)
    assert found == [*KEPT.values()]


# Who writes what into a checkpoint is planned once, and again when it has to be.


SHAPES: dict[str, tuple[int, ...]] = {"a": (5, 3), "b": (4,), "c": (2, 2)}
PLAN = default_planner.create_default_global_save_plan


def sharded(step: int, *names: str) -> dict[str, Any]:
    """A state sharded over the ranks, with a number beside it, that tells the step it was made for."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    model = {n: distribute_tensor(torch.full(SHAPES[n], step + 0.5), mesh, [Shard(0)]) for n in names}
    return {"model": model, "optimizer": {"lr": float(step)}}


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

    first, second = (Checkpoints(root / name, Retention(9, 0)) for name in "xy")

    def save(store: Checkpoints, step: int, *names: str) -> None:
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
        full = mock.patch.object(FileSystem, "create_stream", refuse_writes if rank else FileSystem.create_stream)
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


# A checkpoint comes back bit for bit on its own topology, and on every other one and number of ranks.


STRATEGIES = ("ddp", "fsdp")
WORLD_SIZES = (1, 2, 3)


def train_and_save(rank: int, world_size: int, root: Path) -> dict[str, dict[str, str]]:
    digests = {}
    for strategy in STRATEGIES:
        run = Trained(strategy, seed=1, lr=0.02)
        for number in range(3):
            run.step(number)
        own = {"rng": torch.get_rng_state(), "python": (3, (1, 2), None), "rank": rank}
        store = Checkpoints(root / f"{strategy}{world_size}", Retention(1, 0))
        store.save(3, run.state(), own, {"step": 3, "position": 12, "saved_by": strategy})
        digests[f"{strategy}{world_size}"] = run.digests()
    return digests


def load_everything(rank: int, world_size: int, root: Path) -> dict[tuple[str, str], Any]:
    found = {}
    for saved, strategy in itertools.product(sorted(path.name for path in root.iterdir()), STRATEGIES):
        run = Trained(strategy, seed=2)
        before = run.digests()
        state = run.state()
        loaded = Checkpoints(root / saved, Retention(1, 0)).load(state)
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
