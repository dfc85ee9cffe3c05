"""Finds ranks of this node that have stopped: frozen as a whole, or without progress.

Owns the limits' meaning and what is told about a rank that is stuck, its stack included. Torch-free. Must not know how
ranks are started or ended.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.agent import processes
from launch.config import ResilienceConfig
from launch.runs import heartbeat as pulse
from launch.runs.heartbeat import Phase, Sign

SLOW = (Phase.starting, Phase.saving, Phase.leaving)
PAUSED_S = 5.0
STACK_WAIT_S = 2.0
STACK_SIGNAL = signal.SIGQUIT
"""Ranks answer it by writing the stacks of all their threads into their log (faulthandler)."""
NEARLY = 0.8
"""Share of its limit after which a silent rank is named beside the one that reached it."""


@dataclass(frozen=True)
class Stuck:
    """A rank that does not go on."""

    rank: int
    pid: int
    step: int | None
    """Steps it had done; None where it never got as far as telling."""
    why: str
    since: float
    """When it last gave a sign, Unix time."""


class Watchdog:
    """Looks at the signs of life of this node's ranks."""

    def __init__(self, folder: Path, limits: ResilienceConfig) -> None:
        self._folder = folder
        self._limits = limits
        self._started = self._looked = time.monotonic()

    def look(self, ranks: Mapping[int, int], share: float = 1.0) -> list[Stuck]:
        """Those of ``ranks`` (rank: process id) that have been silent for ``share`` of their limit, longest first.

        After a pause of this process itself (``scontrol suspend`` stops all alike) every limit begins anew.
        """
        now = time.monotonic()
        if now - self._looked > PAUSED_S:
            self._started = now
        self._looked = now
        found = [self._judge(rank, pid, now, share) for rank, pid in ranks.items()]
        return sorted((stuck for stuck in found if stuck is not None), key=lambda stuck: stuck.since)

    def _judge(self, rank: int, pid: int, now: float, share: float) -> Stuck | None:
        sign = pulse.read(self._folder / str(rank))
        limits = self._limits
        if sign is None or sign.pid != pid:
            limit = limits.hang_timeout_slow_s * share
            silent = now - self._started
            return _stuck(rank, pid, None, f"not started after {silent:.0f} s", silent) if silent > limit else None
        frozen = now - max(sign.beat, self._started)
        if frozen > limits.frozen_timeout_s * share:
            state = "stopped" if processes.is_stopped(pid) else "frozen"
            return _stuck(rank, pid, sign.step, f"{state}: the process has not run for {frozen:.0f} s", frozen)
        silent = now - max(sign.moved, self._started)
        if silent > self._limit(sign) * share:
            return _stuck(rank, pid, sign.step, f"hung: no progress for {silent:.0f} s while {sign.phase.name}", silent)
        return None

    def _limit(self, sign: Sign) -> float:
        return self._limits.hang_timeout_slow_s if sign.phase in SLOW else self._limits.hang_timeout_s


def _stuck(rank: int, pid: int, step: int | None, why: str, silent: float) -> Stuck:
    return Stuck(rank, pid, step, why, time.time() - silent)


def stack_of(pid: int, log: Path) -> str:
    """The stacks of a rank's threads, by having it write them into its log; empty where it does not answer.

    A stopped process answers when it goes on: it is continued, and the caller must end it right after.
    """
    before = _size(log)
    try:
        os.kill(pid, STACK_SIGNAL)
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return ""
    deadline, size = time.monotonic() + STACK_WAIT_S, before
    while time.monotonic() < deadline:
        time.sleep(0.1)
        grown = _size(log)
        if grown == size > before:
            break
        size = grown
    with log.open("rb") as file:
        file.seek(before)
        return file.read().decode(errors="replace").strip()


def _size(log: Path) -> int:
    return log.stat().st_size if log.exists() else 0
