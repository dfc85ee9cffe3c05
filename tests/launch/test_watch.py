"""Ranks that stop without dying: found, named with their stacks, and the run goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from launch.agent.watch import Watchdog, stack_of
from launch.config import ResilienceConfig
from launch.runs.process import HeartbeatFile, Phase, read_heartbeat
from tests.support.commands import ROOT, environment, wait_for

LIMITS = ResilienceConfig(heartbeat_timeout_s=10**6, hang_timeout_s=20, startup_and_save_timeout_s=40)
STUCK = """
import threading, time
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


class Watched:
    """A watchdog of this process as some rank, under a clock that is set forward by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, rank: int = 0, **known: Any) -> None:
        self._real, self.ahead = time.monotonic, 0.0
        monkeypatch.setattr("launch.agent.watch.time.monotonic", lambda: self._real() + self.ahead)
        self._dog, self._ranks = Watchdog(folder, LIMITS, **known), {rank: os.getpid()}

    def poll(self, after_s: float = 0.0) -> list[Any]:
        self.ahead += after_s
        return self._dog.poll(self._ranks)

    def found(self, until_s: float) -> list[Any]:
        """Return the last finding of checks every four seconds: a jump would be a pause of the agent itself."""
        while self.ahead < until_s - 4:
            self.poll(4)
        return self.poll(4)


def rank_in(folder: Path, phase: Phase) -> None:
    """Show this process as rank 3, after its seventh step."""
    file = HeartbeatFile(folder / "3")
    file.open_for_rank()
    file.move(7, phase)


@pytest.mark.parametrize(("phase", "limit"), [("training", 20), ("evaluating", 20), ("saving", 40), ("starting", 40)])
def test_a_rank_without_progress_is_stuck_after_the_limit_of_its_phase(
    phase: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rank_in(tmp_path, Phase[phase])
    watched = Watched(monkeypatch, tmp_path, 3)
    while watched.ahead < limit - 4:
        assert watched.poll(4) == [], watched.ahead
    (found,) = watched.found(limit + 8)
    assert (found.rank, found.pid, found.step) == (3, os.getpid(), 7)
    assert found.why.startswith("hung: no progress for ") and found.why.endswith(phase)


def test_the_stacks_of_a_stopped_rank_are_complete(tmp_path: Path) -> None:
    told = {"RANK": "3", "LAUNCH_RUN_DIR": str(tmp_path), "LAUNCH_HEARTBEAT_DIR": str(tmp_path)}
    with (tmp_path / "log").open("wb") as log:
        words = [sys.executable, "-c", STUCK]
        process = subprocess.Popen(words, cwd=ROOT, env=environment(**told), stdout=log, stderr=log)
    try:
        wait_for(lambda: (sign := read_heartbeat(tmp_path / "3")) is not None and sign.step == 7, "its heartbeat")
        process.send_signal(signal.SIGSTOP)
        stacks = stack_of(process.pid, tmp_path / "log")
    finally:
        process.kill()
        process.wait()
    assert stacks.count("(most recent call first)") == 82 and "where_it_waits" in stacks, stacks[-300:]


def test_a_pause_of_the_agent_does_not_count_as_silence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank_in(tmp_path, Phase.training)
    watched = Watched(monkeypatch, tmp_path, 3)
    assert watched.poll() == watched.poll(1000) == []  # scontrol suspend


def test_a_rank_that_never_starts_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = Watched(monkeypatch, tmp_path).found(44)
    assert (found.rank, found.step) == (0, None) and "not started after" in found.why


@pytest.mark.parametrize("silence", [None, 60])
def test_a_rank_without_a_heartbeat_is_watched_by_its_log(
    silence: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "log"
    watched = Watched(monkeypatch, tmp_path, logs={0: log}, must_attach=False, silence_timeout_s=silence)
    HeartbeatFile(tmp_path / "0")  # made by the agent: nobody has opened it
    for _ in range(30):  # two minutes in which something is printed now and then
        with log.open("a") as file:
            file.write(".")
        assert watched.poll(4) == []
    found = watched.found(200)
    assert [one.why.startswith("hung: nothing printed for ") for one in found] == ([] if silence is None else [True])


def test_a_rank_that_has_only_attached_is_not_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    HeartbeatFile(tmp_path / "0").open_for_rank()
    watched = Watched(monkeypatch, tmp_path)
    while watched.ahead < 120:
        assert watched.poll(4) == []
