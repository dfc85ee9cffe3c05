"""Checkpoints are read again after they were written: a damaged one is told of, set aside, and costs no other one."""

from __future__ import annotations

from collections.abc import Generator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from gpt.checkpoint import CheckpointStore, folders, saving
from gpt.checkpoint.folders import FileSum, Manifest, Retention, sum_file, write_manifest
from gpt.checkpoint.saving import Scrub
from gpt.checkpoint.writer import ProcessWriter, WriterState, work_on
from gpt.training.checkpoints import tell_damage
from launch.errors import ConfigError
from launch.runs.events import damaged_text
from launch.runs.folder import RunFolder
from tests.support.commands import TINY
from tests.support.composing import config_from
from tests.support.distributed import run_distributed

sum_slowly = saving.sum_slowly


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((5,), float(step))}}


def rot(path: Path) -> Generator[float, None, FileSum]:
    """Flip a bit on the disk in a tensor of step 3, just before it is read again."""
    if path.parent.name == "step_00000003" and path.name.startswith("__"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    return (yield from sum_slowly(path))


def save_on_a_disk_that_rots(rank: int, size: int, root: Path) -> tuple[list[int], int]:
    folder = RunFolder(root)
    with mock.patch("gpt.checkpoint.saving.sum_slowly", rot):
        writer = ProcessWriter()
    store = CheckpointStore(folder.checkpoints, Retention(1, 0), writer=writer)
    store.saves.tell_damage = partial(tell_damage, folder, 7)
    for step in (1, 2, 3):
        store.save(step, state(step), {}, {})
    writer.close(patience_s=100)  # what is under way is read to its end
    left = store.steps()
    loaded = store.load(state(0))
    assert loaded is not None
    return left, loaded.step


def test_a_checkpoint_that_rots_is_set_aside_and_the_last_good_one_stays(tmp_path: Path) -> None:
    ((left, loaded),) = run_distributed(save_on_a_disk_that_rots, 1, tmp_path)
    events = RunFolder(tmp_path).read_events()
    told = {event["step"]: event for event in events if event["event"] == "checkpoint_set_aside"}
    assert list(told) == [3] and told[3]["attempt"] == 7
    assert told[3]["cause"] == "step_00000003: __0_0.distcp has a wrong checksum"
    assert not (tmp_path / "SAVE").exists(), "written damaged: one more would be, and more after it"
    assert "__0_0.distcp has a wrong checksum" in (damaged_text(events) or "")
    assert damaged_text([]) is None
    assert left[-1] == loaded == 2, "keep_last=1 has not deleted it for one that is damaged"


def write_checkpoint(folder: Path, step: int, is_whole: bool) -> None:
    path = folders.final_for(folder, step)
    path.mkdir()
    (path / "tensors").write_bytes(bytes([step] * 100))
    write_manifest(path, Manifest(step, 1, 0.0, {}, {"tensors": sum_file(path / "tensors")}))
    if not is_whole:
        (path / "tensors").write_bytes(bytes(100))


def test_others_are_deleted_when_the_newest_is_whole_and_never_the_last_that_was(tmp_path: Path) -> None:
    make = partial(write_checkpoint, tmp_path)
    memory = WriterState(has_idle_time=True)
    told: list[tuple[int, bool]] = []

    def job(step: int) -> None:
        Scrub(tmp_path, step, Retention(1), lambda step, damage, was_whole: told.append((step, was_whole))).run(memory)

    def read_on() -> None:
        assert memory.idle_work is not None
        for _ in memory.idle_work:
            assert folders.steps(tmp_path)
        memory.idle_work = None

    make(1, True)
    make(2, True)
    job(2)
    assert folders.steps(tmp_path) == [1, 2], "nothing is deleted before it was read"
    read_on()
    assert folders.steps(tmp_path) == [2] and memory.sound == 2
    make(3, False)
    job(3)
    read_on()
    assert told == [(3, False)] and folders.steps(tmp_path) == [2]
    for step in (4, 5, 6):  # those of steps 4 and 5 are given up
        make(step, True)
        job(step)
    assert folders.steps(tmp_path) == [2, 5, 6], "what is behind does not fill the disk"
    read_on()
    assert folders.steps(tmp_path) == [6]


def test_the_newest_is_read_again_and_again_where_that_is_asked_for(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.checkpoints.mkdir()
    for step in (1, 2):
        write_checkpoint(folder.checkpoints, step, is_whole=True)
    memory = WriterState(has_idle_time=True)
    Scrub(folder.checkpoints, 2, Retention(1), partial(tell_damage, folder, 7), every_s=3600.0).run(memory)
    readings = 0
    while memory.idle_work is not None:
        assert memory.rest_s() == 0
        work_on(memory)
        if memory.rest_s():  # until an hour later, which is now
            readings, memory.idle_at = readings + 1, 0.0
            assert memory.sound == 2 and folders.steps(folder.checkpoints) == [2] and not folder.events.exists()
            if readings == 2:
                write_checkpoint(tmp_path, 3, is_whole=False)
                folders.final_for(tmp_path, 3).joinpath("tensors").replace(
                    folders.final_for(folder.checkpoints, 2) / "tensors"
                )
    assert readings == 2 and memory.rest_s() is None
    assert [(e["event"], e["step"]) for e in folder.read_events()] == [("checkpoint_set_aside", 2)]
    # None is left, and the next one may be far.
    assert (tmp_path / "SAVE").exists() and folders.steps(folder.checkpoints) == []


@pytest.mark.parametrize(("typed", "every_s"), [("true", 0.0), ("false", None), ("30min", 1800.0), ("0.5 min", 30.0)])
def test_a_scrub_is_asked_for_by_one_key(typed: str, every_s: float | None) -> None:
    assert config_from([*TINY, f"checkpoint.scrub={typed}"]).checkpoint.scrub_every_s() == every_s


@pytest.mark.parametrize("typed", ["0min", "daily", "-1min"])
def test_another_scrub_is_refused(typed: str) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.scrub=30min") as refusal:
        config_from([*TINY, f"checkpoint.scrub={typed}"]).validate()
    assert refusal.value.found == f"checkpoint.scrub={typed}"


def test_scrubbing_needs_a_process_for_it() -> None:
    with pytest.raises(ConfigError, match=r"checkpoint\.scrub=true with checkpoint\.asynchronous=false"):
        config_from([*TINY, "checkpoint.scrub=true", "checkpoint.asynchronous=false"]).validate()
