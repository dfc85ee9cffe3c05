"""Saves in the background: of the state as it was, one at a time, tried again where they fail, and kept as asked."""

from __future__ import annotations

import errno
import os
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from gpt.checkpoint import folders, part
from gpt.checkpoint.folders import FailedSave, Retention, Saved
from gpt.checkpoint.manager import room_error
from gpt.checkpoint.part import SharedMemory
from gpt.checkpoint.writer import ProcessWriter
from gpt.train import build, train
from launch.errors import ConfigError
from launch.runs.folder import RunFolder
from launch.worker import Run as Rank
from tests.support.checkpoints import Checkpoints, state
from tests.support.distributed import run_distributed
from tests.support.learning import compose, world_of

NEVER = 10**9
STEPS, INTERVAL = 6, 2
WORDS = [
    *(f"optim.max_steps={STEPS}", "eval.interval=2", f"checkpoint.interval={INTERVAL}", "checkpoint.keep_last=9"),
    *("model.n_layer=1", "logging.tensorboard=false"),
]


class Held:
    """Writers that wait inside their first write until they are let go, in whatever process they are."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()

    def write_part(self, content: Any, folder: Path) -> None:
        os.read(self._read, 1)
        part.write_part(content, folder)

    def let_go(self, writes: int) -> None:
        os.write(self._write, bytes(writes))


class Letting(Rank):
    """A rank that lets the writer go a step after its first save began, and notes what was saved by then."""

    held: Held | None = None
    calls = 0
    saved_when_let_go: list[int] | None = None

    def save_requested(self) -> bool:
        self.calls += 1
        if self.held is not None and self.calls == INTERVAL + 2:
            self.saved_when_let_go = folders.steps(self.checkpoint_dir)
            self.held.let_go(STEPS)
        return False


def train_held(rank: int, size: int, root: Path) -> dict[str, Any]:
    """Train with saves in the background whose first is held, and with saves that are waited for."""
    found, files = dict[str, Any](), dict[int, list[dict[str, bytes]]]()
    for name in ("asynchronous", "synchronous"):
        beside = str(name == "asynchronous").lower()
        config = compose(*WORDS, f"checkpoint.asynchronous={beside}", f"checkpoint.scrub={beside}")
        config.data.cache_dir = str(root / "cache")
        held = Held()
        writer = None
        if name == "asynchronous":
            with mock.patch("gpt.checkpoint.writer.write_part", held.write_part):
                writer = ProcessWriter()
        worker = Letting(rank, rank, size)
        torch.manual_seed(0)
        run = build(config, RunFolder(root / name), world_of(rank, size), 1, worker, writer)
        worker.open_folder(run.folder.path, 1)
        assert (run.checkpoints.upkeep is not None) is config.checkpoint.scrub
        worker.held = held if writer else None
        assert train(run) == "finished"
        if writer is not None:
            writer.close()
        saved = [event for event in run.folder.read_events() if event["event"] == "saved"]
        found[name] = {
            "early": worker.saved_when_let_go,
            "steps": folders.steps(run.folder.checkpoints),
            "events": [event["step"] for event in saved if "write_s" in event],
        }
    if rank == 0:
        for step in range(INTERVAL, STEPS + 1, INTERVAL):
            both = (folders.final_for(root / name / "checkpoints", step) for name in found)
            paths = [[p for p in sorted(folder.iterdir()) if p.name.startswith(("__", "rank"))] for folder in both]
            files[step] = [{path.name: path.read_bytes() for path in of} for of in paths]
    return found | {"files": files}


def test_steps_go_on_beside_a_save_and_change_nothing_in_it(tmp_path: Path) -> None:
    first, second = run_distributed(train_held, 2, tmp_path)
    saved = [*range(INTERVAL, STEPS + 1, INTERVAL)]
    assert first["asynchronous"]["early"] == [], "a step was done while the writers were held in their first write"
    for name in ("asynchronous", "synchronous"):
        assert first[name]["events"] == first[name]["steps"] == second[name]["steps"] == saved
    for step, (beside, waited_for) in first["files"].items():
        assert len(beside) == 4, "tensors and own state of both ranks"
        assert beside == waited_for, f"step {step} holds the state of another step"


def fail_on_one(rank: int, size: int, root: Path, number: int) -> tuple[list[Any], list[int], list[int], str]:
    """A disk that fails on one rank, is found good again, and then fails for good."""
    broken = root / "broken"

    def write_part(content: Any, folder: Path) -> None:
        if rank == 1 and broken.exists():
            raise OSError(number, os.strerror(number))
        part.write_part(content, folder)

    with mock.patch("gpt.checkpoint.writer.write_part", write_part), mock.patch("gpt.checkpoint.manager.RETRY_S", 0.0):
        writer = ProcessWriter()
        store = Checkpoints(root / "run", Retention(2, 0), writer=writer, give_up_after_s=NEVER)
        for step in (1, 2):
            store.save(step, state(step), {}, {})
        broken.touch()
        store.start(3, state(3), {}, {}, os.getpid)
        found: list[Any] = [store.finish(hurries=False), store.finish(hurries=False)]
        during = store.steps()
        torch.distributed.barrier()
        if rank == 0:
            broken.unlink()
        torch.distributed.barrier()
        while not isinstance(found[-1], Saved):
            found.append(store.finish(hurries=False))
        after = store.steps()
        torch.distributed.barrier()
        broken.touch()
        store.give_up_after_s = 0.0
        store.start(4, state(4), {}, {}, os.getpid)
        with pytest.raises(ConfigError) as raised:
            store.finish()
        assert not store.is_pending and store.steps() == after
        writer.close()
        return found, during, after, str(raised.value)


def test_a_disk_that_fails_is_told_counted_and_tried_again(tmp_path: Path) -> None:
    number = errno.ENOSPC
    for other in (errno.EDQUOT, errno.EIO):
        assert room_error(f"rank 0: OSError: [Errno {other}] x\n\n[Errno 1]") == os.strerror(other)
    assert room_error("rank 0: OSError: [Errno 13] x") is None
    for found, during, after, refusal in run_distributed(fail_on_one, 2, tmp_path, number):
        failed, saved = found[:-1], found[-1]
        assert isinstance(saved, Saved) and saved.step == 3 and len(failed) >= 2
        assert all(isinstance(entry, FailedSave) for entry in failed)
        assert [entry.failures for entry in failed] == [*range(1, len(failed) + 1)]
        assert failed[0].cause.startswith(f"rank 1: OSError: [Errno {number}]")
        assert during == [2], "what the third would have replaced made room for it"
        assert after == [2, 3]
        assert f"step 4 cannot be written into {tmp_path / 'run'}: {os.strerror(number)}" in refusal
        assert "goes on from step 3" in refusal


@pytest.mark.parametrize("failing", ["cudaHostRegister", "cudaHostUnregister"])
def test_memory_that_cannot_be_pinned_leaves_no_error_to_the_next_kernel(failing: str, monkeypatch: Any) -> None:
    """CUDA keeps the error of a failed call until the next kernel is launched, which raises it."""
    kept: list[str] = []

    def call(name: str, *_: object) -> int:
        kept.extend([name] * (name == failing))
        return len(kept)

    def launch(*_: object, **__: object) -> None:
        if kept:
            raise RuntimeError(f"CUDA error of {kept.pop()}")

    calls = {name: partial(call, name) for name in ("cudaHostRegister", "cudaHostUnregister")}
    monkeypatch.setattr("torch.cuda.cudart", lambda: SimpleNamespace(**calls))
    monkeypatch.setattr("torch.empty", lambda *_, device: SimpleNamespace(fill_=launch))
    memory = SharedMemory(64, pin=True)
    assert memory.is_pinned is (failing != "cudaHostRegister")
    launch()
    memory.close()
    launch()
