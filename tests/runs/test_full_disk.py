"""A filesystem without room, which takes neither records nor events: ranks go on, and nothing of it is lost."""

from __future__ import annotations

import csv
import os
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from gpt.checkpoint import steps
from gpt.metrics.writers import Records, StepsCsv, View
from launch import cancel
from launch.agent.node import start_time
from launch.agent.watch import RankRecords
from launch.runs import folder as unwritten
from launch.runs.events import unsaved_text
from launch.runs.folder import RunFolder, read_json
from launch.runs.process import ENVIRONMENT, read_heartbeat
from launch.runs.records import RecordWriter, StepRecord, read_records
from launch.slurm import follow, jobs
from launch.workload import CodeTree, RankCommand, RankContract
from tests.support.commands import TINY, descendants, ranks_of, run, start_fork, wait_for


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small filesystem of its own; skips where this user may not mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", place], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)


def fill(disk: Path) -> None:
    """Leave no block free."""
    with suppress(OSError), (disk / "filler").open("ab", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    assert unwritten.is_full(disk)


def use_up_the_last_block(folder: RunFolder) -> None:
    """Take what room the event log has in the block that it ends in."""
    assert not unwritten._keeps, "a process that keeps lines would never be told"
    with suppress(OSError):
        while True:
            folder.record_event("note")


LAYERS = [f"layer{i}" for i in range(99)]


def record(step: int) -> StepRecord:
    return StepRecord(step, 1, 2.0, 1e-3, 1.0, 32, (0, 3), 0.1, layer_grad_norms=dict.fromkeys(LAYERS, 1.0))


def test_what_a_full_disk_did_not_take_is_written_when_there_is_room(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(disk / "run")
    folder.record_event("started", attempt=1)
    records = RecordWriter(folder.metrics(0))
    view = View(folder, "steps.csv", lambda step, done: StepsCsv(folder.steps_csv, LAYERS, done), 0, (), 0.0)

    def step(number: int) -> None:
        records.put(record(number).as_dict())
        records.flush()
        view.write(record(number))

    step(1)
    fill(disk)
    for number in range(2, 60):
        step(number)
    with pytest.raises(OSError, match="No space left"):  # a command must not say what is not written
        for number in range(200):
            folder.record_event("saved", attempt=1, step=number)
    monkeypatch.setattr(unwritten, "_keeps", True)
    before = len(folder.read_events())
    for number in range(100, 110):
        folder.record_event("saved", attempt=1, step=number)
    assert [e["step"] for e in folder.read_events()[before:]] == [*range(100, 110)], "its own process sees them"
    assert len(folder.events.read_bytes().splitlines()) == before
    unwritten.tell_unwritten()
    told = capsys.readouterr().err
    assert f"not in {folder.events}: " in told and '"step": 109' in told
    assert told.count(f"step records of {folder.metrics(0)} are kept in memory") == 1
    assert "steps.csv: [Errno 28]" in told

    (disk / "filler").unlink()
    step(60)
    folder.record_event("finished", attempt=1)
    view.close()
    lines = folder.metrics(0).read_bytes().splitlines()
    assert len(lines) == 60 and [each["step"] for each in read_records(folder.metrics(0))] == [*range(1, 61)]
    with folder.steps_csv.open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [*range(1, 61)]
    events = [e["event"] for e in folder.read_events()]
    assert len(events) == len(folder.events.read_bytes().splitlines()) and events[-2:] == ["saved", "finished"]


def test_a_view_that_is_made_again_has_each_record_once(tmp_path: Path) -> None:
    """The records of some short steps come together, when all of them are on the disk already."""
    folder, failures = RunFolder(tmp_path), [OSError(28, "No space left on device")]

    def open_csv(step: int, done: Records) -> StepsCsv:
        while failures:
            raise failures.pop()
        return StepsCsv(folder.steps_csv, LAYERS, done)

    view = View(folder, "steps.csv", open_csv, 0, (), 0.0)
    records = RecordWriter(folder.metrics(0))
    for number in range(1, 5):
        records.put(record(number).as_dict())
    records.flush()
    for number in range(1, 7):
        view.write(record(number))
    view.close()
    with folder.steps_csv.open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [*range(1, 7)]


def heartbeat_step(pid: int) -> int:
    """The step that a rank shows its agent."""
    variables = dict(v.split(b"=", 1) for v in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") if b"=" in v)
    found = read_heartbeat(Path(os.fsdecode(variables[ENVIRONMENT.encode()])) / "0")
    assert found is not None
    return found.step


def test_a_run_outlives_a_full_disk_and_saves_when_there_is_room(disk: Path, tmp_path: Path) -> None:
    folder = RunFolder(disk / "run")
    words = [*TINY, "optim.max_steps=1000000", "eval.interval=0", "checkpoint.interval=0", f"run_dir={folder.path}"]
    process = start_fork("launch launch.report_files=[md]", *words, cwd=tmp_path, log=tmp_path / "log")
    wait_for(lambda: len(read_records(folder.metrics(0))) > 2, "the third step")
    rank = ranks_of(descendants(process.pid))[0]
    fill(disk)
    use_up_the_last_block(folder)
    full_at = heartbeat_step(rank)
    wait_for(lambda: heartbeat_step(rank) > full_at + 30, "steps on a full disk")
    assert "its filesystem has no room" in run(f"launch.status {folder.path}", cwd=tmp_path)
    (folder.path / "SAVE").touch()
    wait_for(lambda: any((folder.checkpoints).glob(".saving*")), "the beginning of a save")
    full_at = heartbeat_step(rank)
    wait_for(lambda: heartbeat_step(rank) > full_at + 30, "steps beside a save that fails")
    assert not steps(folder.checkpoints)
    (disk / "filler").unlink()
    wait_for(lambda: steps(folder.checkpoints), "the save that is tried again")
    (folder.path / "STOP").touch()
    process.wait(timeout=120)
    events = [e for e in folder.read_events() if e["event"] in ("save_failed", "saved")]
    assert {e["event"] for e in events[:-2]} == {"save_failed"} and "Errno 28" in events[0]["cause"]
    assert [e["event"] for e in events[-2:]] == ["saved", "saved"] and events[0]["step"] == events[-2]["step"]
    assert folder.read_events()[-1]["event"] != "rank_failed" and folder.attempts() == [1]
    assert unsaved_text(events) is None


def test_a_cancel_that_cannot_be_entered_ends_the_run_all_the_same(
    disk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(follow, "POLL_S", 0.01)
    monkeypatch.setattr(jobs, "SECOND_SIGNAL_S", 0.01)
    folder = RunFolder(disk / "run")
    folder.create_attempt()
    controller = subprocess.Popen(["sleep", "600"])
    place = {"cluster": "local", "job_id": str(controller.pid), "host": os.uname().nodename}
    folder.record_event("submitted", **place, pid_started=start_time(controller.pid))
    fill(disk)
    use_up_the_last_block(folder)
    assert cancel.main([str(folder.path)]) == 0
    assert "ended without a save, as its event log cannot say why: " in capsys.readouterr().out
    assert controller.wait(timeout=60) == -15


def test_an_agent_describes_its_ranks_when_there_is_room(disk: Path) -> None:
    folder = RunFolder(disk / "run")
    folder.create_attempt()
    attempt = SimpleNamespace(
        folder=folder, number=1, place=0, ranks=[0], rdzv=SimpleNamespace(members=(0,)), workload="script",
        command=RankCommand(("true",), {}), contract=RankContract(records_events=False),
        tree=CodeTree(disk, lambda root: (), False),
        config=SimpleNamespace(world_size=1), record=lambda event, **details: None,
    )  # fmt: skip
    records = RankRecords(cast(Any, attempt))
    fill(disk)
    records.begin()
    records.poll()
    (disk / "filler").unlink()
    records.poll()
    assert [entry["rank"] for entry in read_json(folder.environment(1))["ranks"]] == [0]
