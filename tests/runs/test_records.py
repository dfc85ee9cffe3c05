"""Step records cost a run nothing, however poor the filesystem, and little of it however many ranks there are."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from launch.runs import records
from launch.runs.files import append_json_lines, append_whole
from launch.runs.records import FIRST_S, FOLLOWED_S, LONGEST_S, OF_THE_RUN, RecordWriter, StepRecord, read_records

STEPS = 1000


class Sleeps:
    """Stands in for ``time`` in the writer: a wait of its thread ends when the test says so."""

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.begun = threading.Semaphore(0)
        self.ended = threading.Semaphore(0)

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.begun.release()
        self.ended.acquire()


@pytest.fixture
def sleeps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Sleeps]:
    made = Sleeps()
    monkeypatch.setattr(records, "time", made)
    yield made


def line(step: int) -> dict[str, Any]:
    return {"step": step, "attempt": 1, "step_time_s": 0.5}


def test_records_of_half_a_second_are_written_by_the_handful_into_a_file_that_is_opened_once(
    tmp_path: Path, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Path] = []
    written: list[int] = []
    done = threading.Semaphore(0)

    def open_to_append(path: Path) -> int:
        opened.append(path)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def append(descriptor: int, data: bytes) -> None:
        append_whole(descriptor, data)
        written.append(len(data.splitlines()))
        done.release()

    monkeypatch.setattr(fcntl, "lockf", lambda *args: pytest.fail("one writer needs no lock"))
    monkeypatch.setattr(records, "open_to_append", open_to_append)
    monkeypatch.setattr(records, "append_whole", append)
    path = tmp_path / "rank_00001.jsonl"
    writer = RecordWriter(path, LONGEST_S)
    step, clock, wakes_at = 0, 0.0, 0.0
    while step < STEPS:
        step, clock = step + 1, clock + 0.5
        writer.put(line(step))
        if len(sleeps.waits) == len(written):  # the thread wakes up for the first record after a write
            assert sleeps.begun.acquire(timeout=60)
            wakes_at = clock + sleeps.waits[-1]
        if clock >= wakes_at:
            sleeps.ended.release()
            assert done.acquire(timeout=60)
    writer.flush()
    assert opened == [path] and len(written) <= STEPS / 10
    assert sleeps.waits[0] == FIRST_S and max(sleeps.waits) == LONGEST_S <= 10
    assert [record["step"] for record in read_records(path)] == list(range(1, STEPS + 1))


def test_a_filesystem_that_hangs_holds_up_nobody_who_puts_records(
    tmp_path: Path, sleeps: Sleeps, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, goes_on = threading.Event(), threading.Event()

    def hang(descriptor: int, data: bytes) -> None:
        hanging.set()
        assert goes_on.wait(60)
        append_whole(descriptor, data)

    monkeypatch.setattr(records, "append_whole", hang)
    writer = RecordWriter(tmp_path / "rank_00000.jsonl")
    writer.put(line(1))
    sleeps.ended.release()
    assert hanging.wait(60)
    for step in range(2, STEPS + 1):
        writer.put(line(step))  # would never return if it waited for the thread
    goes_on.set()
    writer.flush()
    assert len(read_records(tmp_path / "rank_00000.jsonl")) == STEPS


def test_a_filesystem_without_locks_takes_lines_and_another_failure_is_raised(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, name in enumerate(("ENOSYS", "ENOLCK", "ENOTSUP", "EIO")):

        def refuse(*args: Any, name: str = name) -> None:
            raise OSError(getattr(errno, name), "no")

        monkeypatch.setattr(fcntl, "lockf", refuse)
        path = tmp_path / str(number)
        if name == "EIO":
            with pytest.raises(OSError, match="no"):
                append_json_lines(path, [{"a": 1}])
        else:
            append_json_lines(path, [{"a": 1}])
            assert path.read_text() == '{"a": 1}\n'


def test_a_rank_above_0_writes_what_is_its_own() -> None:
    layers = {f"blocks.{i}": 0.0312345 for i in range(24)}
    record = StepRecord(7, 2, 2.5, 1e-3, 0.71234567, 2048, (0, 7), 0.5, layer_grad_norms=layers, mfu_palm=0.4, hfu=0.4)
    record.data_wait_s, record.memory_peak_gib, record.tokens_per_s, record.val_loss = 0.001, 61.5, 4096.0, 2.4
    own = record.own()
    assert own.keys() | OF_THE_RUN >= record.as_dict().keys() and not own.keys() & OF_THE_RUN
    assert {"step", "attempt", "time", "tokens", "samples", "step_time_s", "data_wait_s", "mfu_palm"} <= own.keys()
    assert FOLLOWED_S <= LONGEST_S and len(json.dumps(own)) < len(json.dumps(record.as_dict())) / 3
