"""Process of a rank as its agent watches it: the heartbeat and its thread, and the stacks that a stuck rank prints.

Standard library only. Must not know what a rank says of its steps.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
from pathlib import Path

from launch.runs.heartbeat import BEAT_S, HeartbeatFile
from launch.runs.unwritten import say

STACK_SIGNAL = signal.SIGQUIT
"""Signal by which an agent asks a rank that is stuck for the stacks of its threads."""


def is_child() -> bool:
    """True where multiprocessing started this process, which then is no rank but the helper of one."""
    module = sys.modules.get("multiprocessing.process")
    return module is not None and module.parent_process() is not None


def open_heartbeat(folder: str | None, rank: int) -> HeartbeatFile | None:
    """Open the heartbeat file of a rank; None where no agent looks for it, or none can be made."""
    if folder is None:
        return None
    try:
        heartbeat = HeartbeatFile(Path(folder) / str(rank))
    except OSError as error:  # in a container that does not see the node's folder for temporary files
        say(f"launch.worker: no heartbeat, stops are not agreed on: {error}")
        return None
    heartbeat.open_for_rank()
    return heartbeat


def register_stacks() -> None:
    """Write the stacks of all threads into the log when the agent asks for them, as it does of a rank that is stuck."""
    with contextlib.suppress(AttributeError, OSError, RuntimeError, ValueError):  # standard error is no file
        faulthandler.register(STACK_SIGNAL)


def beat_on(heartbeat: HeartbeatFile, parent: int | None) -> None:
    """Beat for as long as this process runs, and end it where its ``parent`` is gone."""
    while True:
        if parent is not None and os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)
        heartbeat.beat()
        time.sleep(BEAT_S)
