"""Ranks that stop without dying: found, named with their stacks, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.agent.watch import Watchdog, stack_of
from launch.config import ResilienceConfig
from launch.runs import heartbeat
from launch.runs.heartbeat import HeartbeatFile, Phase
from tests.support.commands import ROOT, environment, wait_for

LIMITS = ResilienceConfig(heartbeat_timeout_s=10**6, hang_timeout_s=20, startup_and_save_timeout_s=40)
STEPPING = """
import sys, time
from launch import worker
run = worker.attach()
run.phase(sys.argv[1], 7)
def where_it_waits():
    time.sleep(600)
where_it_waits()
"""


class Clock:
    """The monotonic clock, set forward by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._real, self.ahead = time.monotonic, 0.0
        monkeypatch.setattr("launch.agent.watch.time.monotonic", lambda: self._real() + self.ahead)


@contextmanager
def rank(folder: Path, phase: str, program: str = STEPPING) -> Iterator[subprocess.Popen[bytes]]:
    """A process that says where it is, once, and then only beats."""
    with (folder / "log").open("wb") as log:
        command = [sys.executable, "-c", program, phase]
        told = {"RANK": "3", "LAUNCH_RUN_DIR": str(folder), "LAUNCH_HEARTBEAT_DIR": str(folder)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment(**told), stdout=log, stderr=log)
    try:
        wait_for(
            lambda: (sign := heartbeat.read_heartbeat(folder / "3")) is not None and sign.step == 7, "its sign of life"
        )
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("phase", "limit"), [("training", 20), ("evaluating", 20), ("saving", 40), ("starting", 40)])
def test_a_rank_without_progress_is_stuck_after_the_limit_of_its_phase(
    phase: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with rank(tmp_path, phase) as process:
        clock, dog = Clock(monkeypatch), Watchdog(tmp_path, LIMITS)
        ranks = {3: process.pid}
        assert dog.poll(ranks) == []
        while clock.ahead < limit - 4:  # in steps: a jump would be a pause of the agent itself
            clock.ahead += 4
            assert dog.poll(ranks) == [], clock.ahead
        for _ in range(3):
            clock.ahead += 4
            found = dog.poll(ranks)
        assert [(one.rank, one.step) for one in found] == [(3, 7)]
        assert found[0].why.startswith("hung: no progress for ") and found[0].why.endswith(phase)
        assert "where_it_waits" in stack_of(process.pid, tmp_path / "log")


MANY_THREADS = """
import sys, threading, time
from launch import worker
run = worker.attach()
def deep(frames):
    deep(frames - 1) if frames else time.sleep(600)
for _ in range(80):
    threading.Thread(target=deep, args=(60,), daemon=True).start()
run.phase("training", 7)
def where_it_waits():
    time.sleep(600)
where_it_waits()
"""


def interrupt(process: subprocess.Popen[bytes], log: Path, heard: threading.Event, sizes: list[int]) -> None:
    """Stop a process for a while when it has begun to write into its log; the sizes that the log had then."""
    before = log.stat().st_size
    while not heard.is_set() and not sizes:
        if log.stat().st_size > before:
            os.kill(process.pid, signal.SIGSTOP)
            heard.wait(0.4)
            sizes.append(log.stat().st_size)
            os.kill(process.pid, signal.SIGCONT)


def test_stacks_are_complete_although_the_rank_is_interrupted(tmp_path: Path) -> None:
    log, amid = tmp_path / "log", 0
    with rank(tmp_path, "training", MANY_THREADS) as process:
        for _ in range(20):  # whoever interrupts may itself come too late
            heard, sizes = threading.Event(), list[int]()
            thread = threading.Thread(target=interrupt, args=(process, log, heard, sizes))
            thread.start()
            try:
                stacks = stack_of(process.pid, log)
            finally:
                heard.set()
                thread.join()
            assert stacks.count("(most recent call first)") == 82 and "where_it_waits" in stacks, stacks[-300:]
            amid += bool(sizes) and sizes[0] < log.stat().st_size
            if amid == 2:
                break
    assert amid == 2, "twice it was interrupted before the end"


def test_a_pause_of_the_agent_does_not_count_as_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with rank(tmp_path, "training") as process:
        clock, dog = Clock(monkeypatch), Watchdog(tmp_path, LIMITS)
        assert dog.poll({3: process.pid}) == []
        clock.ahead = 1000  # scontrol suspend
        assert dog.poll({3: process.pid}) == []


def test_a_rank_that_never_starts_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, dog = Clock(monkeypatch), Watchdog(tmp_path, LIMITS)
    while clock.ahead < 44:
        clock.ahead += 4
        found = dog.poll({0: os.getpid()})
    assert [(one.rank, one.step) for one in found] == [(0, None)] and "not started after" in found[0].why


@pytest.mark.parametrize("silence", [None, 60])
def test_a_rank_without_a_heartbeat_is_watched_by_its_log(
    silence: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, log = Clock(monkeypatch), tmp_path / "log"
    dog = Watchdog(tmp_path, LIMITS, {0: log}, must_attach=False, silence_timeout_s=silence)
    HeartbeatFile(tmp_path / "0")  # made by the agent: nobody has opened it
    for _ in range(30):  # two minutes in which something is printed now and then
        clock.ahead += 4
        with log.open("a") as file:
            file.write(".")
        assert dog.poll({0: os.getpid()}) == []
    for _ in range(20):
        clock.ahead += 4
        found = dog.poll({0: os.getpid()})
    assert [one.why.startswith("hung: nothing printed for ") for one in found] == ([] if silence is None else [True])


def test_a_rank_that_has_only_attached_is_not_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = HeartbeatFile(tmp_path / "0")
    file.open_for_rank()
    clock, dog = Clock(monkeypatch), Watchdog(tmp_path, LIMITS)
    for _ in range(30):
        clock.ahead += 4
        assert dog.poll({0: os.getpid()}) == []
    file.move(1, Phase.training)
    for _ in range(30):
        clock.ahead += 4
        found = dog.poll({0: os.getpid()})
    sign = heartbeat.read_heartbeat(tmp_path / "0")
    assert found and sign is not None and (sign.step, sign.phase) == (1, Phase.training)
