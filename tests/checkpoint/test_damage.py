"""Damaged checkpoints are noticed, set aside and passed over; a run never begins again from nothing because of them."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gpt.checkpoint import CheckpointError, CheckpointStore
from gpt.checkpoint.folders import Retention
from launch.errors import ConfigError
from tests.support.checkpoints import Trained
from tests.support.distributed import run_distributed

NEWEST, BEFORE = "step_00000020", "step_00000010"
OF_RANKS = (("__0_0.distcp", "__1_0.distcp"), ("rank_00000.pt", "rank_00001.pt"))
"""Files of the two ranks, of one kind each."""


def flip_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[random.Random(path.name).randrange(len(raw))] ^= 1
    path.write_bytes(raw)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def take_from_the_step_before(path: Path) -> None:
    shutil.copy(path.parent.with_name(BEFORE) / path.name, path)


def exchange_with(name: str) -> Callable[[Path], None]:
    def exchange(path: Path) -> None:
        kept = path.read_bytes()
        path.write_bytes(path.with_name(name).read_bytes())
        path.with_name(name).write_bytes(kept)

    return exchange


def write_garbage(path: Path) -> None:
    path.write_bytes(b'{"format": 1, "files": []}')


def change_meaning(path: Path) -> None:
    path.write_text(path.read_text().replace('"position": 20', '"position": 21'))


def all_damages(folder: Path) -> Iterator[tuple[str, Callable[[Path], None]]]:
    for path in sorted(folder.iterdir()):
        yield from ((path.name, damage) for damage in (flip_bit, cut_short, grow, Path.unlink))
        if path.read_bytes() != (folder.with_name(BEFORE) / path.name).read_bytes():
            yield path.name, take_from_the_step_before
    yield from ((first, exchange_with(second)) for first, second in OF_RANKS)
    yield from (("manifest.json", damage) for damage in (write_garbage, change_meaning))


def own_parts(run: Trained) -> list[torch.Tensor]:
    """This rank's shards of the weights; a state dict of the run holds the same memory."""
    return [parameter.detach().to_local() for parameter in run.model.parameters()]  # type: ignore[attr-defined]


def damage_and_load(rank: int, world_size: int, root: Path) -> list[dict[str, Any]]:
    """Save two checkpoints, then load after each kind of damage to each file of the newer one."""
    run = Trained("fsdp", seed=1)
    saved = CheckpointStore(root / "sound", Retention(2, 0))
    weights = []
    for step in (10, 20):
        run.step(step)
        weights.append([part.clone() for part in own_parts(run)])
        saved.save(step, run.state(), {"rank": rank, "step": step}, {"position": step})
    state = run.state()
    warnings: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("gpt.checkpoint").addHandler(handler)

    results = []
    for number, (name, damage) in enumerate(all_damages(root / "sound" / NEWEST)):
        folder = root / f"damaged{number}"
        if rank == 0:
            shutil.copytree(root / "sound", folder)
            damage(folder / NEWEST / name)
        dist.barrier()
        warnings.clear()
        for part, newest in zip(own_parts(run), weights[1], strict=True):
            part.copy_(newest)
        loaded = CheckpointStore(folder, Retention(2, 0)).load(state)
        is_before = all(map(torch.equal, own_parts(run), weights[0]))
        again = CheckpointStore(folder, Retention(2, 0)).load(state)
        found = {"name": name, "loaded": loaded, "is_before": is_before, "again": again, "warnings": list(warnings)}
        results.append(found)
        dist.barrier()
    return results


def test_any_damage_to_any_file_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    by_rank = run_distributed(damage_and_load, 2, tmp_path)
    of_ranks = {name for pair in OF_RANKS for name in pair}
    files = {entry.name for entry in (tmp_path / "sound" / NEWEST).iterdir()}
    assert files == {".metadata", "manifest.json", *of_ranks}
    damages = list(all_damages(tmp_path / "sound" / NEWEST))
    assert {name for name, damage in damages if damage is take_from_the_step_before} >= {"manifest.json", *of_ranks}
    for rank, results in enumerate(by_rank):
        assert len(results) == len(damages) >= 5 * len(files) + 3
        own = {"rank": rank, "step": 10}
        for number, result in enumerate(results):
            loaded = result["loaded"]
            assert (loaded.step, loaded.meta, loaded.rank_state) == (10, {"position": 10}, own), result
            assert result["is_before"], result
            assert len(loaded.set_aside) == 1 and result["name"] in loaded.set_aside[0], result
            assert (result["again"].step, result["again"].set_aside) == (10, ())
            assert len(result["warnings"]) == (1 if rank == 0 else 0)
            if rank == 0:
                assert result["name"] in result["warnings"][0] and "set aside" in result["warnings"][0]
            names = {path.name for path in (tmp_path / f"damaged{number}").iterdir()}
            assert names == {BEFORE, f"{NEWEST}.corrupt"}, "set aside, not deleted"


def meet_hopeless_cases(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    run = Trained("ddp", seed=1)
    found["never saved"] = CheckpointStore(root / "empty", Retention(1, 0)).load(run.state())

    store = CheckpointStore(root / "all_bad", Retention(2, 0))
    for step in (1, 2):
        store.save(step, run.state(), {}, {})
    if rank == 0:
        for path in (root / "all_bad").iterdir():
            flip_bit(path / "__1_0.distcp")
    dist.barrier()
    for attempt in ("first start", "second start"):
        with pytest.raises(ConfigError) as refusal:
            store.load(run.state())
        found[attempt] = str(refusal.value)
    # The step may be reached and saved again; its damaged namesakes stay where they are.
    for _ in range(2):
        store.save(2, run.state(), {}, {})
        if rank == 0:
            flip_bit(root / "all_bad" / "step_00000002" / ".metadata")
        dist.barrier()
        with pytest.raises(ConfigError):
            store.load(run.state())

    store = CheckpointStore(root / "other_model", Retention(1, 0))
    store.save(1, run.state(), {}, {})
    small = {"model": {"0.weight": torch.zeros(7, 10)}}
    reshaped = {"model": {**run.state()["model"], "0.weight": torch.zeros(5, 10)}, "optim": run.state()["optim"]}
    for name, state in (("part of it", small), ("other shape", reshaped)):
        with pytest.raises(ConfigError) as refusal:
            store.load(state)
        found[name] = str(refusal.value)
    with pytest.raises(CheckpointError, match="a step is saved once"):
        store.save(1, run.state(), {}, {})
    found["steps"] = store.steps()
    return found


def test_refusals(tmp_path: Path) -> None:
    for found in run_distributed(meet_hopeless_cases, 2, tmp_path):
        assert found["never saved"] is None
        for attempt in ("first start", "second start"):
            assert "step_00000001.corrupt, step_00000002.corrupt" in found[attempt]
            assert "fresh=true" in found[attempt]
        assert "the checkpoint also holds" in found["part of it"]
        assert "cannot be loaded into this model" in found["other shape"]
        assert found["steps"] == [1], "a checkpoint that fits another model is not damaged"
    names = {path.name for path in (tmp_path / "all_bad").iterdir()}
    assert names == {f"step_0000000{s}.corrupt" for s in "12"} | {f"step_00000002.corrupt.{n}" for n in "23"}
