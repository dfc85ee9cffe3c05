"""The sign of life of a rank: a few numbers in a file on this node, which its agent reads while the rank cannot answer.

Owns the file's format. A thread beats as long as the process runs at all; the loop says where it is. Where no agent
asks for it (LAUNCH_HEARTBEAT_DIR is not set), nothing is written. Torch-free. Must not know what is done about silence.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

FORMAT = struct.Struct("<ddqqq")
BEAT_S = 1.0
ENVIRONMENT = "LAUNCH_HEARTBEAT_DIR"


class Phase(IntEnum):
    """What a rank is doing. ``starting`` and ``saving`` may take long without a sign in between."""

    starting = 0
    training = 1
    evaluating = 2
    saving = 3
    leaving = 4


@dataclass(frozen=True)
class Sign:
    """What a rank last said of itself. Times are of the monotonic clock, which all processes of a machine share."""

    beat: float
    """When the process last ran at all."""
    moved: float
    """When the loop last said where it is."""
    pid: int
    step: int
    """Steps done."""
    phase: Phase


class Pulse:
    """A rank's own side. ``at`` costs about a microsecond."""

    def __init__(self, path: Path | None) -> None:
        self._map: mmap.mmap | None = None
        if path is None:
            return
        with path.open("wb+") as file:
            file.truncate(FORMAT.size)
            self._map = mmap.mmap(file.fileno(), FORMAT.size)
        self.at(0, Phase.starting)
        threading.Thread(target=self._beat, name="pulse", daemon=True).start()

    @classmethod
    def from_env(cls, rank: int) -> Pulse:
        """Beat where the agent of this node looks, if there is one."""
        folder = os.environ.get(ENVIRONMENT)
        return cls(Path(folder) / str(rank) if folder else None)

    def at(self, step: int, phase: Phase) -> None:
        """Say where the loop is: ``step`` steps done, and in which phase."""
        if self._map is not None:
            now = time.monotonic()
            FORMAT.pack_into(self._map, 0, now, now, os.getpid(), step, phase)

    def _beat(self) -> None:
        assert self._map is not None
        while True:
            time.sleep(BEAT_S)
            struct.pack_into("<d", self._map, 0, time.monotonic())


def read(path: Path) -> Sign | None:
    """The last sign of the rank that writes ``path``; None before its first one."""
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if len(data) < FORMAT.size:
        return None
    beat, moved, pid, step, phase = FORMAT.unpack(data)
    return Sign(beat, moved, pid, step, Phase(phase)) if pid else None
