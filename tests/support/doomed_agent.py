"""An agent whose ranks die: rank 1 of the first attempt, and the whole node of rank 1 in the second.

``python -m tests.support.doomed_agent RUN_DIR``. Each dies as soon as the event log of its attempt tells of a
checkpoint in memory that is newer than the last one on the disk; until then steps take their time.
"""

from __future__ import annotations

import os
import signal
import sys
import time

import gpt.training.step
from launch.agent.main import main
from launch.runs.folder import RunFolder

PACE_S = 0.3
lr_at = gpt.training.step.lr_at


def doomed(config: object, step: int) -> float:
    """The learning rate of a step, if this rank gets so far."""
    attempt = int(os.environ["LAUNCH_ATTEMPT"])
    if attempt < 3:
        events = [e for e in RunFolder(os.environ["LAUNCH_RUN_DIR"]).read_events() if e.get("attempt") == attempt]
        newest = {kind: max((e["step"] for e in events if e["event"] == kind), default=0) for kind in KINDS}
        if newest["saved"] and newest["saved_in_memory"] > newest["saved"]:
            if os.environ["RANK"] == "1":
                os.kill(os.getpid() if attempt == 1 else int(os.environ["LAUNCH_AGENT_PID"]), signal.SIGKILL)
        elif newest["saved"] or any(e["event"] == "saved_in_memory" for e in events):
            time.sleep(PACE_S)
    return lr_at(config, step)  # type: ignore[arg-type]


KINDS = ("saved", "saved_in_memory")

if __name__ == "__main__":
    gpt.training.step.lr_at = doomed
    sys.exit(main())
