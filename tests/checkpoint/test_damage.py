"""Damaged checkpoints: bits that flip, writers that are killed, and readings after a save."""

from __future__ import annotations

import logging
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from gpt import checkpoint as folders
from gpt.checkpoint import Retention, Saved, manager, upkeep
from gpt.checkpoint.messages import CheckpointError
from gpt.checkpoint.target import saved_checkpoints
from gpt.checkpoint.upkeep import UpkeepPlan
from gpt.checkpoint.writer import ProcessWriter
from launch.runs.events import damaged_text
from launch.runs.folder import RunFolder
from tests.support.checkpoints import Checkpoints, DiskCalls, Trained, state
from tests.support.distributed import RankFailedError, run_distributed
from tests.support.planning import refused

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
    for path in sorted(path for path in folder.iterdir() if path.name not in (OF_RANKS[0][0], OF_RANKS[1][0])):
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
    saved = Checkpoints(root / "sound", Retention(2, 0))
    weights = []
    for step in (10, 20):
        run.step(step)
        weights.append([part.clone() for part in own_parts(run)])
        saved.save(step, run.state(), {"rank": rank, "step": step}, {"position": step})
    loaded_into = run.state()
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
        loaded = Checkpoints(folder, Retention(2, 0)).load(loaded_into)
        is_before = all(map(torch.equal, own_parts(run), weights[0]))
        results.append({"name": name, "loaded": loaded, "is_before": is_before, "warnings": list(warnings)})
    again = Checkpoints(folder, Retention(2, 0)).load(loaded_into)
    assert again is not None and (again.step, again.set_aside) == (10, ())
    return results


def test_any_damage_to_any_file_falls_back_to_the_checkpoint_before(tmp_path: Path) -> None:
    by_rank = run_distributed(damage_and_load, 2, tmp_path)
    of_ranks = {name for pair in OF_RANKS for name in pair}
    files = {entry.name for entry in (tmp_path / "sound" / NEWEST).iterdir()}
    assert files == {".metadata", "manifest.json", *of_ranks}
    damages = list(all_damages(tmp_path / "sound" / NEWEST))
    of_rank_1 = {pair[1] for pair in OF_RANKS}
    assert {name for name, damage in damages if damage is take_from_the_step_before} >= {"manifest.json", *of_rank_1}
    for rank, results in enumerate(by_rank):
        assert len(results) == len(damages) >= 4 * (len(files) - 2) + 7
        own = {"rank": rank, "step": 10}
        for number, result in enumerate(results):
            loaded = result["loaded"]
            assert (loaded.step, loaded.meta, loaded.rank_state) == (10, {"position": 10}, own), result
            assert result["is_before"], result
            assert len(loaded.set_aside) == 1 and result["name"] in loaded.set_aside[0], result
            assert len(result["warnings"]) == (1 if rank == 0 else 0)
            if rank == 0:
                assert result["name"] in result["warnings"][0] and "set aside" in result["warnings"][0]
            names = {path.name for path in (tmp_path / f"damaged{number}").iterdir()}
            assert names == {BEFORE, f"{NEWEST}.corrupt"}, "set aside, not deleted"


def meet_hopeless_cases(rank: int, world_size: int, root: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    run = Trained("ddp", seed=1)
    found["never saved"] = Checkpoints(root / "empty", Retention(1, 0)).load(run.state())

    store = Checkpoints(root / "all_bad", Retention(2, 0))
    for step in (1, 2):
        store.save(step, run.state(), {}, {})
    if rank == 0:
        for path in (root / "all_bad").iterdir():
            flip_bit(path / "__1_0.distcp")
    dist.barrier()
    for attempt in ("first start", "second start"):
        found[attempt] = str(refused(store.load, run.state()))
    # The step may be reached and saved again; its damaged namesakes stay where they are.
    for _ in range(2):
        store.save(2, run.state(), {}, {})
        if rank == 0:
            flip_bit(root / "all_bad" / "step_00000002" / ".metadata")
        dist.barrier()
        refused(store.load, run.state())

    store = Checkpoints(root / "other_model", Retention(1, 0))
    store.save(1, run.state(), {}, {})
    small = {"model": {"0.weight": torch.zeros(7, 10)}}
    reshaped = {"model": {**run.state()["model"], "0.weight": torch.zeros(5, 10)}, "optim": run.state()["optim"]}
    for name, other in (("part of it", small), ("other shape", reshaped)):
        found[name] = str(refused(store.load, other))
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


# A save that dies at any of its writes, fsyncs and renames leaves a checkpoint at least as new as the one before.


NEVER = 10**9
LEAST = 25
"""Calls that a save makes at the very least: fewer would mean that the harness misses some."""


class PowerCutError(BaseException):
    """The end of a process, which no code of a save may handle."""


def cut() -> None:
    raise PowerCutError


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def newest(folder: Path) -> int | None:
    """The newest checkpoint that is whole, byte for byte; all others are whole as well."""
    found = []
    for checkpoint in saved_checkpoints(folder):
        assert checkpoint.step is not None and checkpoint.find_damage(lambda told: None) == (), checkpoint
        found.append(checkpoint.step)
    return max(found, default=None)


def loaded_step(store: Checkpoints) -> int:
    blank = state(0)
    loaded = store.load(blank)
    assert loaded is not None and not loaded.set_aside
    assert blank["model"]["w"].unique().tolist() == [float(loaded.step)]
    return loaded.step


def cut_the_power(rank: int, size: int, root: Path) -> list[int]:
    """Save step 2 as often as that makes calls, and cut the power at each; the newest checkpoint after each."""
    Checkpoints(root / "sound", Retention(1, 0)).save(1, state(1), {}, {})
    found: list[int] = []
    while True:
        folder = root / str(len(found))
        shutil.copytree(root / "sound", folder)
        (folder / ".saving_notes").mkdir()  # somebody else's: not swept
        calls = DiskCalls(cut, len(found))
        try:
            with calls.watch():
                Checkpoints(folder, Retention(1, 0)).save(2, state(2), {}, {})
        except PowerCutError:
            at = newest(folder)
            assert at == loaded_step(Checkpoints(folder, Retention(1, 0)))
            hidden = [path.name for path in folder.iterdir() if path.name.startswith(".")]
            assert hidden == [".saving_notes"], "what was begun is swept"
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
    Checkpoints(root / "sound", Retention(1, 0)).save(1, state(1), {}, {})
    manager.RETRY_S = 0.0  # of this process
    found: list[tuple[int, int]] = []
    while True:
        folder = root / str(len(found))
        shutil.copytree(root / "sound", folder)
        with DiskCalls(kill, len(found)).watch():
            writer = ProcessWriter()
        store = Checkpoints(folder, Retention(1, 0), writer=writer, give_up_after_s=NEVER)
        now = state(2)
        store.start(2, now, {}, {}, os.getpid)  # a process id allows it
        now["model"]["w"].fill_(3.0)  # training goes on
        deaths = []
        while store.is_pending:
            votes = store.poll()
            if votes.figures["failed"]:
                deaths.append(newest(folder))
            elif not votes.figures["done"]:
                wait([writer._connection], 0.1)  # or until the next try is due
            after = store.advance(votes.phase, votes.figures)
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
    store = Checkpoints(root, Retention(1, 0), writer=writer, give_up_after_s=NEVER)
    store.save(1, state(1), {"rank": rank}, {})
    store.start(2, state(2), {"rank": rank}, {}, os.getpid)
    while not (votes := store.poll()).figures["done"]:
        wait([writer._connection])
    dist.barrier()
    if is_counted:
        store.advance(votes.phase, {"done": size, "failed": 0})
    if rank == victim:
        kill()
    dist.barrier()  # in vain


def load_after_deaths(rank: int, size: int, roots: list[Path]) -> list[tuple[int, list[str]]]:
    found = []
    for root in roots:
        store = Checkpoints(root, Retention(1, 0))
        step = loaded_step(store)
        found.append((step, [path.name for path in root.iterdir()]))
        dist.barrier()
        store.save(step + 1, state(step + 1), {}, {})
        assert loaded_step(store) == step + 1
    return found


def test_a_rank_that_dies_between_its_writing_and_the_figures_commits_nothing_by_half(tmp_path: Path) -> None:
    cases = [(victim, is_counted) for victim in (0, 1) for is_counted in (False, True)]
    roots, committed = [tmp_path / str(number) for number in range(len(cases))], []
    for root, (victim, is_counted) in zip(roots, cases, strict=True):
        with pytest.raises(RankFailedError):
            run_distributed(die_between_writing_and_figures, 2, root, victim, is_counted)
        committed.append(newest(root) or 0)
        assert committed[-1] in ((1, 2) if is_counted else (1,)), "only what all ranks know to be written"
    for found in run_distributed(load_after_deaths, 2, roots):
        for (step, left), least, (_, is_counted) in zip(found, committed, cases, strict=True):
            # A writer that was under way to the commit may live a moment longer than its rank.
            assert least <= step <= (2 if is_counted else 1)
            assert not [name for name in left if name.startswith(".saving")]


# Checkpoints are read again after they were written: a damaged one is told of, set aside, and costs no other one.


def rot(path: Path) -> None:
    """Flip a bit on the disk in a tensor of step 3, just before it is read again."""
    if path.parent.name == "step_00000003" and path.name.startswith("__"):
        flip_bit(path)


def save_on_a_disk_that_rots(rank: int, size: int, folder: RunFolder) -> tuple[list[int], int]:
    for steps in ((1, 2), (3,)):
        with mock.patch.object(upkeep, "drop_cached", rot):
            writer = ProcessWriter()
        writer.patience_s = 100.0
        store = Checkpoints(folder.checkpoints, Retention(1, 0), writer=writer)
        store.upkeep = UpkeepPlan(folder, 7, Retention(1), scrubs=True, copy_to=None)
        for step in steps:
            store.save(step, state(step), {}, {})
        writer.close()  # what is under way is read to its end
    left = store.steps()
    return left, loaded_step(store)


def test_a_checkpoint_that_rots_is_set_aside_and_the_last_good_one_stays(tmp_path: Path) -> None:
    ((left, loaded),) = run_distributed(save_on_a_disk_that_rots, 1, RunFolder(tmp_path))
    events = RunFolder(tmp_path).read_events()
    told = {event["step"]: event for event in events if event["event"] == "checkpoint_set_aside"}
    assert list(told) == [3] and told[3]["attempt"] == 7
    assert told[3]["cause"] == "step_00000003: __0_0.distcp has a wrong checksum"
    assert "__0_0.distcp has a wrong checksum" in (damaged_text(events) or "")
    assert damaged_text([]) is None
    assert left == [loaded] == [2], "keep_last=1 has not deleted it for one that is damaged"


def save_faster_than_scrubs(rank: int, size: int, folder: RunFolder) -> list[list[int]]:
    may_read, has_read, retire = threading.Event(), threading.Event(), folders.retire

    def retire_and_tell(*args: Any) -> None:
        retire(*args)
        if threading.current_thread() is not threading.main_thread():
            has_read.set()

    store = Checkpoints(folder.checkpoints, Retention(1))
    store.upkeep = UpkeepPlan(folder, 7, Retention(1), scrubs=True, copy_to=None)
    found = []
    with (
        mock.patch.object(upkeep, "drop_cached", lambda path: may_read.wait()),
        mock.patch.object(folders, "retire", retire_and_tell),
    ):
        may_read.set()
        for step in (1, 2, 3, 4):
            store.save(step, state(step), {}, {})
            assert has_read.wait(60)
            may_read.clear()  # from step 2 on
            found.append(store.steps())
        may_read.set()
        store.writer.close()
    return [*found, store.steps()]


def test_checkpoints_that_are_not_read_yet_do_not_fill_the_disk(tmp_path: Path) -> None:
    (found,) = run_distributed(save_faster_than_scrubs, 1, RunFolder(tmp_path))
    assert found == [[1], [1, 2], [1, 2, 3], [1, 3, 4], [4]], "the last that was whole stays beside the newest two"
