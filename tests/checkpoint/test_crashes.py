"""A save that dies at any of its writes, fsyncs and renames leaves a checkpoint at least as new as the one before."""

from __future__ import annotations

import os
import shutil
import signal
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from gpt.checkpoint import CheckpointStore
from gpt.checkpoint.folders import Retention
from gpt.checkpoint.saving import Saved
from gpt.checkpoint.target import saved_checkpoints
from gpt.checkpoint.writer import ProcessWriter
from tests.support.checkpoints import DiskCalls
from tests.support.distributed import RankFailedError, run_distributed

NEVER = 10**9
LEAST = 25
"""Calls that a save makes at the very least: fewer would mean that the harness misses some."""


class PowerCutError(BaseException):
    """The end of a process, which no code of a save may handle."""


def cut() -> None:
    raise PowerCutError


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((5,), float(step))}, "optimizer": {"lr": 0.5}}


def newest(folder: Path) -> int | None:
    """The newest checkpoint that is whole, byte for byte; all others are whole as well."""
    found = []
    for checkpoint in saved_checkpoints(folder):
        assert checkpoint.step is not None and checkpoint.find_damage(lambda told: None) == (), checkpoint
        found.append(checkpoint.step)
    return max(found, default=None)


def loaded_step(store: CheckpointStore) -> int:
    blank = state(0)
    loaded = store.load(blank)
    assert loaded is not None and not loaded.set_aside
    assert blank["model"]["w"].unique().tolist() == [float(loaded.step)]
    return loaded.step


def cut_the_power(rank: int, size: int, root: Path) -> list[int]:
    """Save step 2 as often as that makes calls, and cut the power at each; the newest checkpoint after each."""
    CheckpointStore(root / "sound", Retention(1, 0)).save(1, state(1), {}, {})
    found: list[int] = []
    while True:
        folder = root / str(len(found))
        shutil.copytree(root / "sound", folder)
        calls = DiskCalls(cut, len(found))
        try:
            with calls.watch():
                CheckpointStore(folder, Retention(1, 0)).save(2, state(2), {}, {})
        except PowerCutError:
            at = newest(folder)
            assert at == loaded_step(CheckpointStore(folder, Retention(1, 0)))
            found.append(at)
            shutil.rmtree(folder)
        else:
            assert calls.made == len(found) and newest(folder) == 2
            return found


def test_a_power_cut_at_any_call_of_a_save_leaves_a_checkpoint(tmp_path: Path) -> None:
    (found,) = run_distributed(cut_the_power, 1, tmp_path)
    assert len(found) > LEAST and set(found) == {1, 2}
    assert found == sorted(found), "from the commit on it is the new one"


def kill_the_writer(rank: int, size: int, root: Path) -> list[tuple[int, int]]:
    """As above, with the writer's process killed at each call; the newest at that moment, and after the next try."""
    CheckpointStore(root / "sound", Retention(1, 0)).save(1, state(1), {}, {})
    found: list[tuple[int, int]] = []
    while True:
        folder = root / str(len(found))
        shutil.copytree(root / "sound", folder)
        with DiskCalls(kill, len(found)).watch():
            writer = ProcessWriter()
        store = CheckpointStore(folder, Retention(1, 0), writer=writer, give_up_after_s=NEVER)
        saves = store.saves
        now = state(2)
        saves.start(2, now, {}, {}, os.getpid)  # a process id allows it
        now["model"]["w"].fill_(3.0)  # training goes on
        deaths = []
        while saves.is_pending:
            vote = saves.vote()
            if vote.failed:
                deaths.append(newest(folder))
            if not (vote.done or vote.failed):
                wait([writer._connection])
            after = saves.count(vote.phase, vote.done, vote.failed)
        assert isinstance(after, Saved) and loaded_step(store) == 2
        was_alive = writer.pid != 0
        writer.close()
        shutil.rmtree(folder)
        if was_alive and not deaths:
            return found  # it lived to delete the old one, or died while it did
        # Nothing kills this process, which then writes itself. And whoever dies after the rename has committed.
        assert len(deaths) <= 1
        found.append((deaths[0] or 0, after.step) if deaths else (2, after.step))


def test_a_writer_killed_at_any_call_is_made_up_for(tmp_path: Path) -> None:
    (found,) = run_distributed(kill_the_writer, 1, tmp_path)
    assert len(found) > LEAST and set(found) <= {(1, 2), (2, 2)}


def die_between_writing_and_figures(rank: int, size: int, root: Path, victim: int, is_counted: bool) -> None:
    """Save step 1; of step 2 all parts are written when a rank dies, before or after the ranks have learned that."""
    writer = ProcessWriter()
    store = CheckpointStore(root, Retention(1, 0), writer=writer, give_up_after_s=NEVER)
    store.save(1, state(1), {"rank": rank}, {})
    store.saves.start(2, state(2), {"rank": rank}, {}, os.getpid)
    while not (vote := store.saves.vote()).done:
        wait([writer._connection])
    dist.barrier()
    if is_counted:
        store.saves.count(vote.phase, size, 0)
    if rank == victim:
        kill()
    dist.barrier()  # in vain


def load_after_death(rank: int, size: int, root: Path) -> tuple[int, list[str]]:
    store = CheckpointStore(root, Retention(1, 0))
    step = loaded_step(store)
    left = [path.name for path in root.iterdir()]
    dist.barrier()
    store.save(step + 1, state(step + 1), {}, {})
    assert loaded_step(store) == step + 1
    return step, left


@pytest.mark.parametrize(("victim", "is_counted"), [(0, False), (1, False), (0, True), (1, True)])
def test_a_rank_that_dies_between_its_writing_and_the_figures_commits_nothing_by_half(
    victim: int, is_counted: bool, tmp_path: Path
) -> None:
    with pytest.raises(RankFailedError):
        run_distributed(die_between_writing_and_figures, 2, tmp_path, victim, is_counted)
    committed = newest(tmp_path) or 0
    assert committed in ((1, 2) if is_counted else (1,)), "only what all ranks know to be written"
    for step, left in run_distributed(load_after_death, 2, tmp_path):
        # A writer that was under way to the commit may live a moment longer than its rank.
        assert committed <= step <= (2 if is_counted else 1)
        assert not [name for name in left if name.startswith(".saving")]
